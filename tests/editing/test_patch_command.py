"""``dso patch``, and a patch where a steering is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import byte_tokenizer, small_set, tiny_llama

from dso.editing.localise import editable
from dso.editing.patch import Patch
from launch.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, and one with two other weights of 4,608."""
    home = tmp_path_factory.mktemp("models")
    target = tiny_llama()
    reference = copy.deepcopy(target)
    with torch.no_grad():
        for weight in list(editable(reference).values())[-2:]:
            weight.view(-1)[3] += 5.0
    for name, model in (("target", target), ("reference", reference)):
        model.save_pretrained(home / name)
        byte_tokenizer().save_pretrained(home / name)
    return home


def test_a_patch_is_written_and_used_as_a_steering(models, tmp_path, capsys):
    target, out = str(models / "target"), str(tmp_path / "patch")
    assert main(["patch", target, str(models / "reference"), "--k", "2", "--out", out]) == 0
    said = capsys.readouterr().out
    assert "2 of 4,608 weights (0.04%)" in said and "scale -1000 to 1000" in said
    assert "by kind: up_proj 50%, down_proj 50%" in said and "by layer: 1 100%" in said
    patch = Patch.from_pretrained(out)
    assert len(patch) == 2 and "2 of 4,608 weights" in patch.card and patch.config.base_model == target

    small_set(("test",)).write_jsonl(tmp_path / "small.jsonl")
    arguments = [
        "evaluate",
        out,
        "--set",
        str(tmp_path / "small.jsonl"),
        "--scales=-1,1",
        "--bootstrap",
        "2",
        "--quiet",
    ]
    assert main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows if row} >= {"-1.00", "0.00", "1.00"}
    texts = []
    for scale in ("0", "1"):
        assert main(["generate", out, "Ann is", "--scale", scale, "--max-new-tokens", "6"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]


def test_what_cannot_be_patched_is_one_line(models, tmp_path, capsys):
    target = str(models / "target")
    (tmp_path / "file").write_text("mine")
    for words, reason in (
        ([target, target, "--out", str(tmp_path / "out")], "nothing to edit: the models do not differ"),
        ([target, target, "--out", str(tmp_path / "file")], "is no folder"),
        ([target, target, "--k", "0", "--out", str(tmp_path / "out")], "k is 0, expected a share"),
    ):
        assert main(["patch", *words]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and (tmp_path / "file").read_text() == "mine"
