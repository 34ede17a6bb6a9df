"""The same command for a model that sees: a run on decisions with images, from its config to its report."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from cases import CASES
from gymnasium.utils.env_checker import check_env
from PIL import Image
from running import FILES, config_of
from small_runs import contents
from tiny import small_set
from vision_models import make_model, make_processor

import envs  # noqa: F401 - registers the environments
from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.decisions.sets import load_decisions
from dso.evaluation.evaluator import Evaluator
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from dso.steering.sites import resolve_sites
from envs.basis import _answer_outputs
from envs.decision import DecisionEnv
from envs.images import ImageObservation
from launch.run.measure import scale_points
from launch.run.train import train

JOBS = ("nurse", "pilot", "judge")
FRAMES = {
    "train": ("<image>The {} is ", "<image>One {}: "),
    "validation": ("<image>Some {} is ",),
    "test": ("<image>My {} is ", "See <image>. The {}: "),
}


def pictured(folder: Path) -> DecisionSet:
    """Decisions about one picture each, of three sizes, answered with a letter that stands for a group."""
    letters = (Candidate(text="A", group="female"), Candidate(text="H", group="male"))
    generator, decisions = np.random.default_rng(0), []
    for number, size in enumerate(((16, 16), (24, 16), (16, 40), (20, 20))):
        path = folder / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        for split, frames in FRAMES.items():
            for frame in frames:
                for job in JOBS:
                    decisions.append(
                        Decision(
                            id=f"{split}/{frame}/{job}/{number}", context=job, kind="ambiguous", template=frame,
                            split=split, unit=str(number), candidates=letters, images=(str(path),),
                            prompt=({"role": "user", "content": frame.format(job)},),
                        )
                    )  # fmt: skip
    return DecisionSet(tuple(decisions), ("female", "male"), "pictured")


def test_a_run_on_images_lowers_the_bias(tmp_path: Path) -> None:
    processor = make_processor("LLaVA")
    make_model("LLaVA", len(processor.tokenizer), seed=2).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pictured(tmp_path).write_jsonl(tmp_path / "set.jsonl")
    config = config_of(
        tmp_path, tmp_path / "model", data__set=str(tmp_path / "set.jsonl"), model__max_tokens=2000,
        train__unambiguous=0, train__ambiguous=24,
    )  # fmt: skip
    result = train(config, name="x", quiet=True)
    assert contents(result.folder).keys() == FILES
    base, half, whole = result.points
    assert base.kl == 0 and 0 < half.kl < whole.kl
    assert whole.bias.paper < base.bias.paper / 2  # 0.35 and 0.13
    steering = Steering.from_pretrained(result.folder / "steering")
    assert all("language_model" in site for site in steering.config.sites)
    # What was measured is what a fresh model with that steering does.
    backbone = Backbone.load(str(tmp_path / "model"), device="cpu")
    data = load_decisions(str(tmp_path / "set.jsonl")).select(split="test")
    (again,) = scale_points(Evaluator(backbone, data, steering.attach(backbone.model)), [1.0], None, 20)
    assert again.bias.paper == pytest.approx(whole.bias.paper, abs=1e-5)
    assert json.loads((result.folder / "validation.json").read_text())[-1]["decisions"] == 144


@torch.no_grad()
@pytest.mark.parametrize("name", ["LLaVA", "Qwen2-VL"])
def test_a_basis_from_data_sees_the_images(tmp_path: Path, name: str) -> None:
    backbone = CASES[name].backbone()
    decisions = pictured(tmp_path).select(split="train")
    (site,) = sites = [name for name in resolve_sites(backbone.model) if name.endswith("language_model.norm")]
    found = {rows[0]: outputs[site][0] for rows, outputs in _answer_outputs(backbone, decisions, sites)}
    # At the final norm the output at the answer position is what the output layer is given.
    wanted = backbone.score(list(decisions), hidden=True).hidden.double()
    torch.testing.assert_close(torch.stack([found[i] for i in range(len(decisions))]), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_environments_take_decisions_with_images(tmp_path: Path) -> None:
    backbone = CASES["Qwen2-VL"].backbone()
    decisions = pictured(tmp_path)
    env = gymnasium.make("dso/Decision-v0", backbone=backbone, decisions=decisions)
    handle, _ = env.reset(seed=0)
    _, reward, terminated, _, info = env.step(0)
    wanted = backbone.score([decisions[int(handle)]]).policy().exp()[0].tolist()
    assert terminated and -1 <= reward <= 1 and info["policy"] == pytest.approx(wanted, abs=1e-5)


@torch.no_grad()
def test_images_are_observed_as_the_files_show_them(tmp_path: Path, backbone: Backbone) -> None:
    decisions = pictured(tmp_path)
    sees = CASES["LLaVA"].backbone()
    env = ImageObservation(DecisionEnv(sees, decisions))
    check_env(env, skip_render_check=True)
    assert env.observation_space["images"].shape == (1, 40, 24, 3)  # the files are 16 to 24 wide and 16 to 40 high
    for index in (0, len(decisions) - 1):
        seen, _ = env.reset(options={"index": index})
        decision, pixels = decisions[index], np.asarray(Image.open(decisions[index].images[0]))
        assert tuple(seen["tokens"][seen["tokens"] >= 0]) == sees.encode(decision).prompt
        np.testing.assert_array_equal(seen["images"][0, : pixels.shape[0], : pixels.shape[1]], pixels)
        assert seen["images"].sum() == pixels.sum()
    with pytest.raises(ValueError, match="small has no images; TokenObservation is for text"):
        ImageObservation(DecisionEnv(backbone, small_set()))
