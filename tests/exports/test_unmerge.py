"""Unmerging gives the base model back, within what it reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import tiny
from safetensors.torch import load_file
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from dso.errors import UserError
from dso.exports.maps import AffineMap, affine_map
from dso.exports.merge import Merging
from dso.exports.unmerge import unmerge
from dso.steering.model import Steering
from dso.steering.operators import make_operator
from launch.cli import main

SCALE = 0.5


def merged(model, folder: Path, operator: str = "scale", *, dtype: str | None = None, **facts) -> Steering:
    """``model``, ``steering`` and ``merged`` in a folder."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:  # norms and biases that are not all alike, as trained ones are
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(folder / "model", max_shard_size="9kB")
    byte_tokenizer().save_pretrained(folder / "model")
    rank = 2 if operator == "low_rank" else None
    steering = Steering.for_model(model, operator=operator, rank=rank, base_model=str(folder / "model"), **facts)
    with torch.no_grad():
        for value in steering.tensors().values():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    steering.save_pretrained(folder / "steering")
    merging = Merging.of(steering, SCALE)
    merging.write(folder / "merged", dtype, allow_partial=True, stated=str(folder / "steering"))
    return steering


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("name", "operator", "sites"),
    [
        ("Llama", "affine", None),
        ("Llama", "low_rank", None),
        ("Llama", "affine", ["attention"]),
        ("Qwen3", "affine", None),
        ("Gemma3", "affine", None),
        ("GPT-2", "affine", None),
        ("OLMo", "scale", None),
        ("Phi3", "low_rank", None),
    ],
)
def test_the_base_model_comes_back_within_the_reported_difference(
    name: str, operator: str, sites: list[str] | None, tmp_path: Path
) -> None:
    merged(tiny(name), tmp_path, operator, **({} if sites is None else {"sites": sites}))
    report = unmerge(tmp_path / "merged", tmp_path / "back")
    base, back = weights(tmp_path / "model"), weights(tmp_path / "back")
    assert base.keys() == back.keys()  # no bias is left
    apart = {key: (base[key].double() - back[key].double()).abs().max().item() for key in base}
    assert report.largest == max(apart.values()) < 1e-5 and report.tensors == len(apart)
    assert report.differing == sum(value > 0 for value in apart.values()) < len(apart)
    assert report.hooks.largest < 1e-4 and report.known
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("model", "back")]
    assert configs[0] == configs[1]
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in (tmp_path / "model").iterdir()}
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_a_bfloat16_model_that_was_merged_in_float32_comes_back_bit_for_bit(tmp_path: Path) -> None:
    merged(tiny_llama().to(torch.bfloat16), tmp_path, dtype="float32")
    report = unmerge(tmp_path / "merged", tmp_path / "back")
    assert report.dtype == "bfloat16" and report.differing == 0 and report.largest == 0 and report.known
    base, back = weights(tmp_path / "model"), weights(tmp_path / "back")
    assert all(torch.equal(base[key], back[key]) for key in base)


def test_inverse_maps_undo_by_hand() -> None:
    diagonal = AffineMap(torch.tensor([2.0, -0.5]), offset=torch.tensor([4.0, 1.0])).inverse()
    assert diagonal.diagonal.tolist() == [0.5, -2.0] and diagonal.offset.tolist() == [-2.0, 2.0]
    # I + u v^T with u = v = (1, 0) is diag(2, 1).
    unit = torch.tensor([[1.0], [0.0]])
    back = AffineMap(low_rank=(unit, unit)).inverse()
    assert back.rows(torch.eye(2)).tolist() == [[0.5, 0.0], [0.0, 1.0]]
    assert AffineMap(low_rank=(-unit, unit)).inverse() is None and AffineMap(torch.tensor([0.0, 1.0])).inverse() is None
    made = make_operator("scale", 2, None)
    assert affine_map(made, 1.0).inverse() == AffineMap()


def test_the_command_says_what_it_compared_and_what_it_could_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged(tiny_llama(), tmp_path)
    words = ["unmerge", str(tmp_path / "merged"), "--out"]
    assert main([*words, str(tmp_path / "back")]) == 0
    assert f" tensors are off {tmp_path / 'model'}'s, by " in (said := capsys.readouterr().out)
    assert f"unmerged     {tmp_path / 'steering'} at scale 0.5, in float32\n" in said
    (tmp_path / "model").rename(tmp_path / "gone")
    assert main([*words, str(tmp_path / "again")]) == 0
    assert "is not at hand, so the weights were not compared" in capsys.readouterr().out
    assert main([*words, str(tmp_path / "third"), "--model", str(tmp_path / "gone")]) == 0
    assert " tensors are off " in capsys.readouterr().out
    (tmp_path / "steering").rename(tmp_path / "moved")
    assert main([*words, str(tmp_path / "fourth")]) == 2 and not (tmp_path / "fourth").exists()
    assert main([*words, str(tmp_path / "fourth"), "--steering", str(tmp_path / "moved")]) == 0
    capsys.readouterr()
    assert main([*words, str(tmp_path / "back")]) == 2 and "is there already" in capsys.readouterr().err
    assert main(["unmerge", str(tmp_path / "back"), "--out", str(tmp_path / "x")]) == 2  # has no probe any more


def test_what_was_set_to_zero_cannot_come_back(tmp_path: Path) -> None:
    steering = merged(tiny_llama(), tmp_path)
    steering.tensors()["model.norm.a"].data[3] = -1 / SCALE
    steering.save_pretrained(tmp_path / "steering")
    with pytest.raises(UserError, match=r"model\.norm: the steering sets a part of it to 0 at this scale"):
        unmerge(tmp_path / "merged", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not [*tmp_path.glob(".*")]
