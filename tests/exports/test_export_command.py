"""``dso export``: the folders that it writes, what it says, and what it refuses before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from exporting import moved
from tiny import small_set

from dso.models.backbone import Backbone
from launch.cli import main


@pytest.fixture(scope="module")
def steering(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steering") / "steering"
    moved(Backbone.load(str(model_folder)).model, "scale").save_pretrained(folder)
    return folder


def test_strengths_get_a_folder_each_and_their_cost_is_measured(
    steering: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_set(("test",)).write_jsonl(tmp_path / "set.jsonl")
    words = ["export", steering, "--to", "lora", "--out", tmp_path / "out", "--model", model_folder]
    words += ["--scale", "0.5,1", "--rank", 4, "--allow-partial", "--decisions", tmp_path / "set.jsonl"]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    alphas = {
        path.parent.name: json.loads(path.read_text())["lora_alpha"] for path in tmp_path.rglob("adapter_config.json")
    }
    assert alphas == {"scale-0.5": 2, "scale-1": 4}
    assert "LoRA of rank 4 on 10 linear layers; 48 weaker slopes are left out" in out  # 12 at each of 4 norms
    assert "left out: model.norm: lm_head, which reads it, has the weight of model.embed_tokens; " in out
    rows = re.findall(r"^(base|with hooks|the adapter) +(\S+) +(.*\S)$", out.partition("On 40 decisions:")[2], re.M)
    names = [("base", "0"), *((who, at) for at in ("0.5", "1") for who in ("with hooks", "the adapter"))]
    assert [row[:2] for row in rows] == names
    assert len({row[2] for row in rows}) == 5  # what was cut shows in the figures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "lora"], "1 of 5 sites cannot be a LoRA: 'model.norm'"),
        (["--to", "lora", "--scale", "0,1"], "scale 0 is the base model"),
        (["--to", "gguf-lora", "--scale", "2"], "expected a number from 0 to 1"),
        (["--to", "lora", "--scale", "x"], "--scale 'x': expected comma-separated numbers"),
        (["--to", "ln-tuning", "--rank", "2"], "--rank is of LoRA"),
        (["--to", "gguf-lora", "--tied-head"], "--tied-head is of --to lora"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    steering: Path, model_folder: Path, tmp_path: Path, words: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(["export", str(steering), "--model", str(model_folder), "--out", str(tmp_path / "out"), *words]) == 2
    found = capsys.readouterr().err.splitlines()
    assert message in found[-1] and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["ln-tuning", "gguf-lora"])
def test_each_format_is_written(steering: Path, model_folder: Path, tmp_path: Path, kind: str) -> None:
    words = ["export", steering, "--to", kind, "--out", tmp_path / "out", "--model", model_folder, "--allow-partial"]
    assert main([str(word) for word in words]) == 0
    wanted = {"ln-tuning": {"adapter_config.json", "adapter_model.safetensors"}, "gguf-lora": {"adapter.gguf"}}[kind]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", *wanted}
