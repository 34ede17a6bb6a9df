"""The same command for a model that sees: a run on decisions with images, from its config to its report."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from cases import CASES
from PIL import Image
from running import FILES, config_of
from training import contents
from vision_models import make_model, make_processor

import envs  # noqa: F401 - registers the environments
from dso.backbone import Backbone
from dso.data import load_decisions
from dso.decisions import Candidate, Decision, DecisionSet
from dso.evaluation import Evaluator
from dso.steering import Steering
from envs.decision import TokenObservation
from launch.measure import scale_points
from launch.train import train

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
    assert whole.bias.soft.value < base.bias.soft.value / 2  # 0.35 and 0.13
    steering = Steering.from_pretrained(result.folder / "steering")
    assert all("language_model" in site for site in steering.config.sites)
    # What was measured is what a fresh model with that steering does.
    backbone = Backbone.load(str(tmp_path / "model"), device="cpu")
    data = load_decisions(str(tmp_path / "set.jsonl")).select(split="test")
    (again,) = scale_points(Evaluator(backbone, data, steering.attach(backbone.model)), [1.0], None, 20)
    assert again.bias.soft.value == pytest.approx(whole.bias.soft.value, abs=1e-5)
    assert json.loads((result.folder / "validation.json").read_text())[-1]["decisions"] == 144


@torch.no_grad()
def test_environments_take_decisions_with_images(tmp_path: Path) -> None:
    backbone = CASES["Qwen2-VL"].backbone()
    decisions = pictured(tmp_path)
    env = gymnasium.make("dso/Decision-v0", backbone=backbone, decisions=decisions)
    handle, _ = env.reset(seed=0)
    _, reward, terminated, _, info = env.step(0)
    wanted = backbone.score([decisions[int(handle)]]).policy().exp()[0].tolist()
    assert terminated and -1 <= reward <= 1 and info["policy"] == pytest.approx(wanted, abs=1e-5)
    tokens, _ = TokenObservation(env).reset(seed=0)
    assert tuple(tokens[tokens >= 0]) == backbone.encode(decisions[int(handle)]).prompt
