"""README's commands run one after the other, as a user types them, on a model and a set that take seconds."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import write_config

from launch.cli import main

ROOT = Path(__file__).parents[2]
LONGEST = 150  # lines that are read to their end
STANDS_FOR = {"smollm2-roles": "smollm2-roles.yaml", "FILE.jsonl": "decisions.jsonl", "MODEL": "model"}
NOT_HERE = {"make", "pip", "deepspeed"}  # have tests of their own, or need a network


def readme_commands() -> list[list[str]]:
    text = (ROOT / "README.md").read_text("utf-8")
    shell = [part.partition("```")[0] for part in text.split("```bash\n")[1:]]
    return [shlex.split(line, comments=True) for block in shell for line in block.splitlines() if line.strip()]


def served(words: list[str]) -> int:
    """The exit code of a server that is stopped once it says where it is."""
    command = [sys.executable, "-m", "launch.cli", *words, "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert "http://127.0.0.1:" in process.stdout.readline()
        process.terminate()
        return process.wait(120)


def test_the_readme_is_read_to_its_end() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= LONGEST


def test_the_commands_run_in_their_order(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: tests/launching has those of their own."""
    os.symlink(model_folder, tmp_path / "model")
    config = json.loads(write_config(tmp_path, Path("model")).read_text("utf-8"))  # JSON is YAML
    config["run"] = {"output_dir": "runs"}
    config["steering"] = {"operator": "scale"}  # as the config that stands there
    config["train"]["preference"] = {}
    os.rename(tmp_path / "letters.jsonl", tmp_path / "decisions.jsonl")
    config["data"]["set"] = "decisions.jsonl"
    (tmp_path / "smollm2-roles.yaml").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in readme_commands():
        if words[0] in NOT_HERE:
            continue
        words = [STANDS_FOR.get(word, word) for word in words]
        words = [word.replace("=MODEL", "=model").replace("=FILE.jsonl", "=decisions.jsonl") for word in words]
        if words[1] in ("evaluate", "report", "calibrate") or (words[1] == "compare" and "--out" not in words):
            words += ["--set", "decisions.jsonl"]
        code = served(words[1:]) if words[1] == "serve" else main(words[1:])
        assert code == 0, f"{shlex.join(words)}\n{''.join(capsys.readouterr())}"
        ran.append(words[1])
    used = ["generate", "evaluate", "compare", "compare", "report", "calibrate", "merge", "verify", "export", "serve"]
    assert ran == ["train", *used, "decisions", "train"]
    assert json.loads((tmp_path / "runs" / "mine" / "curve.json").read_text("utf-8"))


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_every_program_is_known(words: list[str]) -> None:
    assert words[0] in NOT_HERE | {"dso"}
