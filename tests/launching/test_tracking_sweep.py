"""The shipped W&B sweep: it parses as W&B reads it, its parameters are keys of the config, and its command is a run."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import fields
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from launch.commands.parsers import build_parser
from launch.config.schema import load_config
from trainers.callbacks import Validation

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "launch" / "cluster" / "sweep" / "smollm2-roles.yaml"
SCRIPT = SWEEP.with_name("train.sh")
STAND_IN = "#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


@pytest.fixture(scope="module")
def sweep() -> dict[str, Any]:
    return load_sweep_config(str(SWEEP))


def choices(parameter: dict[str, Any]) -> list[Any]:
    return parameter.get("values") or [parameter["min"], parameter["max"]]


def test_every_parameter_is_a_key_of_the_config_with_values_that_it_takes(sweep: dict[str, Any]) -> None:
    assert len(sweep["parameters"]) >= 3
    default = load_config("smollm2-roles")
    for path, parameter in sweep["parameters"].items():
        assert attrgetter(path)(default) is not None
        for value in choices(parameter):
            assert isinstance(value, int | float)  # W&B's YAML reads 1e-4 as a string
            changed = load_config("smollm2-roles", [f"{path}={value}"])
            assert attrgetter(path)(changed) == value


def test_the_objective_is_something_that_is_tracked(sweep: dict[str, Any]) -> None:
    group, name = sweep["metric"]["name"].split("/")
    assert group == "selected"
    assert name in {field.name for field in fields(Validation)}
    assert sweep["metric"]["goal"] == "minimize"
    assert sweep["project"] == load_config("smollm2-roles").run.wandb.project


def run_agent_command(sweep: dict[str, Any], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What W&B's agent would start for the first value of each parameter, with a stand-in for dso."""
    arguments = {path: {"value": choices(parameter)[0]} for path, parameter in sweep["parameters"].items()}
    known = create_sweep_command_args({"args": arguments})
    known |= {"env": ["/usr/bin/env"], "program": [str(ROOT / sweep["program"])]}
    parts = create_sweep_command(list(sweep["command"]))
    command = [word for part in parts for word in (known[part[2:-1]] if part.startswith("${") else [part])]
    stand_in = folder / "dso"
    stand_in.write_text(STAND_IN, encoding="utf-8")
    stand_in.chmod(0o755)
    plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    plain["PATH"] = f"{folder}:{plain['PATH']}"
    return subprocess.run(command, env=plain | environment, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_agents_command_is_a_run_of_its_own(sweep: dict[str, Any], tmp_path: Path) -> None:
    done = run_agent_command(sweep, tmp_path, WANDB_SWEEP_ID="abc", WANDB_RUN_ID="1e234567")
    assert done.returncode == 0, done.stderr
    arguments = build_parser().parse_args(json.loads(done.stdout))
    assert arguments.command == "train"
    assert arguments.resume == "auto"
    config = load_config(arguments.config, arguments.overrides)
    assert (config.run.output_dir, config.run.run_name, config.run.report_to) == ("runs/sweep-abc", "1e234567", "wandb")
    for path, parameter in sweep["parameters"].items():
        assert attrgetter(path)(config) == choices(parameter)[0]


def test_the_script_says_what_it_lacks(sweep: dict[str, Any], tmp_path: Path) -> None:
    outside = run_agent_command(sweep, tmp_path)
    assert outside.returncode == 2
    assert "started by wandb agent" in outside.stderr
    bare = subprocess.run([str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert bare.returncode == 2
    assert "name a config" in bare.stderr
