"""The command line: what each command prints, its exit code, and one line for everything that a user can mend."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from small_runs import contents, letters_set, write_config

import dso
import launch.commands.decisions
import launch.commands.inspect
from dso.decisions.decision import Decision
from dso.decisions.jsonl import read_jsonl
from dso.errors import UserError
from dso.evaluation.report import ScalePoint
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.cli import main
from launch.commands.parsers import build_parser

ROOT = Path(__file__).parents[2]
CONTROL = ("\r", "\x1b")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Trained(NamedTuple):
    config: Path
    run: Path
    steering: str
    outcome: Outcome


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    """Run a command; its exit code and what it printed."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Trained:
    """``dso train`` as a user calls it, in a process of its own whose output is piped; not to be written to."""
    folder = tmp_path_factory.mktemp("cli")
    config = write_config(folder, model_folder)
    arguments = [sys.executable, "-m", "launch.cli", "train", str(config), "train.max_steps=12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    run = folder / "runs" / "letters"
    return Trained(config, run, str(run / "steering"), Outcome(done.returncode, done.stdout, done.stderr))


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2, one line on stderr, nothing on stdout."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("dso: ")
    assert outcome.err.count("\n") == 1, outcome.err
    for part in parts:
        assert part in outcome.err


# dso train


def test_train_prints_its_progress_and_ends_with_a_table(trained: Trained) -> None:
    code, out, err = trained.outcome
    assert code == 0, err
    assert not any(sign in out + err for sign in CONTROL)
    lines = out.splitlines()
    assert lines[0].split("  ")[0] == "scale"
    assert [line.split()[0] for line in lines[2:5]] == ["0.00", "0.50", "1.00"]
    for name, file in (("picture", "curve.png"), ("report", "report.md"), ("steering", "steering")):
        (line,) = (line for line in lines if line.startswith(name))
        assert str(trained.run / file) in line
    said = err.splitlines()
    validations = [line.split(":")[0] for line in said if line.startswith("validation")]
    turned = [line for line in validations if ", turned to " in line]  # in the end, as far as the limits allow
    assert validations == [*(f"validation at step {step}" for step in range(0, 13, 2)), *turned]
    start = "measuring the base model on 20 decisions of validation, then 12 steps of 20 decisions"
    assert said[0] == f"{trained.run}: {start}"  # minutes pass before there is a figure
    assert said[1].endswith("kept")  # the base model is the first candidate
    assert any(line.startswith("step 10/12  running_bias 0.") for line in said)
    assert said[-1] == "measuring 3 scales on 20 decisions of test"
    assert len(said) == 10 + len(turned), err  # and nothing from any library


def test_quiet_prints_only_the_result(trained: Trained, call: Any) -> None:
    code, out, err = call("train", trained.config, "train.max_steps=12", "--resume", "--quiet")
    assert (code, err) == (0, "")
    assert out == trained.outcome.out  # measured again: the same


def test_the_resolved_config_is_a_config(trained: Trained, call: Any) -> None:
    code, out, err = call("train", trained.run / "config.yaml", "--resume", "--quiet")
    assert (code, out, err) == (0, trained.outcome.out, "")


def test_an_existing_run_is_left_alone(trained: Trained, call: Any) -> None:
    before = contents(trained.run)
    assert_refused(
        call("train", trained.config, "train.max_steps=12"), f"{trained.run}: exists", "--resume", "--overwrite"
    )
    assert_refused(call("train", trained.config, "train.max_steps=3", "--resume"), "was trained with another config")
    assert contents(trained.run) == before


def test_overwrite_starts_anew(tmp_path: Path, model_folder: Path, call: Any) -> None:
    config = write_config(tmp_path, model_folder)
    assert call("train", config, "train.max_steps=1", "--quiet").code == 0
    assert call("train", config, "train.max_steps=2", "--quiet", "--overwrite").code == 0
    history = json.loads((tmp_path / "runs/letters/validation.json").read_text())
    assert [row["step"] for row in history if row["scale"] == 1] == [0, 2]
    assert {row["step"] for row in history} == {0, 2}  # of the first run nothing is left


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.step=3", ("override 'train.step=3'", "did you mean train.max_steps?")),
        ("trian.steps=3", ("unknown key; did you mean train?",)),
        ("train.max_steps", ("expected key=value",)),
        ("train.max_steps=many", ("train.max_steps: expected an integer, found 'many'",)),
        ("data.target={female: 0.5, male: 0.6}", ("data.target: the shares must sum to 1, found 1.1",)),
        ("data.target={a: 0.5, b: 0.5}", ("the target names groups ['a', 'b'], the decisions have",)),
        ("model.name=./none", ("model './none': no",)),
        ("data.set=role", ("unknown decision set 'role'; did you mean 'roles'",)),
        ("run.output_dir=/dev/null/runs", ("/dev/null/runs/letters: cannot be written",)),
    ],
)
def test_bad_input_to_train_writes_nothing(
    tmp_path: Path, model_folder: Path, call: Any, override: str, parts: tuple[str, ...]
) -> None:
    config = write_config(tmp_path, model_folder)
    before = contents(tmp_path)
    assert_refused(call("train", config, override), *parts)
    assert contents(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_an_unknown_config_is_refused_with_the_nearest(call: Any) -> None:
    assert_refused(call("train", "smolm2-roles"), "did you mean smollm2-roles?")
    assert_refused(call("train", "no/such.yaml"), "no/such.yaml: cannot be read: No such file")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-20],
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        lambda data: b"",
    ],
)
def test_a_damaged_state_is_refused_and_kept(tmp_path: Path, model_folder: Path, call: Any, spoil: Any) -> None:
    config = write_config(tmp_path, model_folder)
    assert call("train", config, "train.max_steps=1", "--quiet").code == 0
    state = tmp_path / "runs/letters/state/step-1.safetensors"
    for path in state.parent.iterdir():  # the one before, too, or it would be gone on from
        path.write_bytes(spoil(path.read_bytes()))
    before = contents(tmp_path / "runs")
    assert_refused(call("train", config, "train.max_steps=1", "--resume"), str(state))
    assert contents(tmp_path / "runs") == before


def test_a_full_disk_is_one_line_that_names_the_file(
    tmp_path: Path, model_folder: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, model_folder)
    usage = type("Usage", (), {"free": 1_000_000})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert_refused(call("train", config), f"{tmp_path}/runs/letters: only 1 MB free")
    assert not (tmp_path / "runs").exists()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dso.files.os.fsync", full)
    assert_refused(call("train", config, "--quiet"), f"{tmp_path}/runs/letters: cannot be written: No space left")


# Ctrl-C


def test_ctrl_c_keeps_what_was_done_and_resume_finishes(tmp_path: Path, model_folder: Path, call: Any) -> None:
    config = write_config(tmp_path, model_folder, train__max_steps=150, evaluation__eval_steps=50)
    command = [sys.executable, "-m", "launch.cli", "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "letters" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count('"train/kl"') > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert not any(sign in err for sign in CONTROL)
    said, told = err.splitlines()[-2:]
    assert said == "stopping after this step; Ctrl-C again stops at once"
    done = int(told.split("stopped after step ")[1].split()[0])
    assert 2 < done < 150
    folder = tmp_path / "runs" / "letters"
    assert told == (
        f"dso: stopped after step {done} of 150; {folder} has everything so far. "
        "Go on with the same command and --resume"
    )
    assert metrics.read_text().count('"train/kl"') == done
    finished = call("train", config, "--resume", "--quiet")
    assert (finished.code, finished.err) == (0, "")
    assert metrics.read_text().count('"train/kl"') == 150
    history = json.loads((folder / "validation.json").read_text())
    assert [row["step"] for row in history if row["scale"] == 1] == [0, 50, 100, 150]


def test_an_interrupt_anywhere_else_is_one_line(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.commands.decisions, "run", interrupted)
    assert call("decisions", "roles") == (130, "", "dso: interrupted\n")


# Errors of other kinds


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ValueError("a bug"), KeyError("k"), TypeError("t"), ImportError("gone", name="launch.nothing")):

        def broken(_: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(launch.commands.decisions, "run", broken)
        with pytest.raises(type(error)):
            main(["decisions", "roles"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("do this"), "dso: do this\n"),
        (OSError(errno.EACCES, "Permission denied", "/a/b"), "dso: /a/b: Permission denied\n"),
        (OSError("no space to convert the model"), "dso: no space to convert the model\n"),
        (
            ModuleNotFoundError("No module named 'yaml'", name="yaml"),
            "dso: No module named 'yaml'; training needs: pip install 'dso[train]'\n",
        ),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    call: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    def refuse(_: object) -> int:
        raise error

    monkeypatch.setattr(launch.commands.inspect, "run", refuse)
    assert call("inspect", "x") == (2, "", line)


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    letters_set().write_jsonl(tmp_path / "letters.jsonl")
    command = f"{sys.executable} -m launch.cli decisions {tmp_path}/letters.jsonl --examples 999 | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("letters: 24 decisions")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "x", "--bootstrap", "0"],
        ["evaluate", "x", "--contexts", "-1"],
        ["generate", "x", "hello", "--max-new-tokens", "0"],
        ["generate", "x", "hello", "--scale", "much"],
        ["inspect", "x", "--top", "1.5"],
        ["decisions", "roles", "--examples", "-3"],
        ["nothing"],
        [],
    ],
)
def test_the_parser_refuses_what_is_no_number_of_things(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: dso" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dso {dso.__version__}\n"


@pytest.mark.parametrize("command", ["train", "freeform"])
def test_without_arguments_only_the_config_is_asked_for(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: the following arguments are required: config\n")


def test_every_command_has_help() -> None:
    for command in ("train", "evaluate", "compare", "generate", "inspect", "decisions"):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args([command, "--help"])
        assert caught.value.code == 0


# dso evaluate


def test_evaluate_measures_what_the_run_measured(trained: Trained, tmp_path: Path, call: Any) -> None:
    data = trained.config.parent / "letters.jsonl"
    code, out, err = call(
        "evaluate", trained.steering, "--set", data, "--scales", "1,0.5", "--contexts", 2,
        "--json", tmp_path / "points.json", "--figure", tmp_path / "points.png",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert not any(sign in out for sign in CONTROL)
    assert out.splitlines()[:5] == trained.outcome.out.splitlines()[:5]  # the base model is always measured
    assert "The 2 of 4 contexts with the largest bias after" in out
    found, wanted = (
        [ScalePoint.from_json(record) for record in json.loads(path.read_text())]
        for path in (tmp_path / "points.json", trained.run / "curve.json")
    )
    for point, other in zip(found, wanted, strict=True):
        assert point.bias.bias.value == pytest.approx(other.bias.bias.value, abs=1e-6)
        assert point.kl == pytest.approx(other.kl, abs=1e-6)
    assert (tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")


def test_compare_says_what_two_scales_of_a_steering_differ_in(trained: Trained, tmp_path: Path, call: Any) -> None:
    data = trained.config.parent / "letters.jsonl"
    code, out, err = call(
        "compare", "none", f"{trained.steering}@0.5", "--set", data, "--bootstrap", 20, "--json", tmp_path / "c.json"
    )
    assert (code, err) == (0, "")
    assert out.startswith("first   none\nsecond  ")
    wanted = {p["scale"]: p for p in json.loads((trained.run / "curve.json").read_text())}
    found = json.loads((tmp_path / "c.json").read_text())
    for name, figure in (("bias", "probability"), ("bias, log-odds", "log_odds")):
        values = [wanted[scale]["bias"][figure]["bias"][0] for scale in (0, 0.5)]
        assert [found[name][which][0] for which in ("first", "second")] == pytest.approx(values, abs=1e-5)
        assert found[name]["difference"][0] == pytest.approx(values[1] - values[0], abs=1e-5)
        assert found[name]["cut"][0] == pytest.approx(1 - values[1] / values[0], abs=1e-4)
    assert found["KL"]["second"][0] == pytest.approx(wanted[0.5]["kl"], abs=1e-6)
    assert found["accuracy"]["first"] == pytest.approx(wanted[0]["accuracy"], abs=1e-6)
    swapped = call("compare", f"{trained.steering}@0.5", trained.steering, "--set", data, "--bootstrap", 20)
    assert swapped.code == 0 and "KL unambiguous" in swapped.out


def test_where_nothing_can_be_written_nothing_is_measured(trained: Trained, tmp_path: Path, call: Any) -> None:
    (tmp_path / "file").write_text("")
    place, data = tmp_path / "file" / "points", trained.config.parent / "letters.jsonl"
    for words in (
        ("evaluate", trained.steering, "--set", data, "--json", place),
        ("evaluate", trained.steering, "--set", data, "--figure", place),
        ("compare", "none", trained.steering, "--set", data, "--json", place),
        ("benchmark", trained.steering, "weat", "--json", place),
    ):
        assert_refused(call(*words), f"{place}: Not a directory")
    for words in (("report", "--audit"), ("calibrate", "--max-kl", 1)):
        asked = (*words, trained.steering, "--set", data, "--out", place)
        assert_refused(call(*asked), "file/points", "Not a directory")


def test_compare_refuses_what_it_cannot_compare(trained: Trained, call: Any) -> None:
    data = trained.config.parent / "letters.jsonl"
    assert_refused(call("compare", "none", "none", "--set", data), "name the base model with --model")
    assert_refused(call("compare", "none", f"{trained.steering}@nan", "--set", data), "finite scale, as in FOLDER@0.5")
    assert_refused(call("compare", "none", f"{trained.steering}@7", "--set", data), "scale is 7")


def test_a_steering_is_measured_in_the_dtype_that_is_asked_for(trained: Trained, tmp_path: Path, call: Any) -> None:
    data, points = trained.config.parent / "letters.jsonl", {}
    for dtype in ("float32", "bfloat16"):
        options = ["--set", data, "--scales", "1", "--bootstrap", 5, "--dtype", dtype, "--device", "cpu", "--quiet"]
        assert call("evaluate", trained.steering, *options, "--json", tmp_path / dtype).code == 0
        points[dtype] = [ScalePoint.from_json(record) for record in json.loads((tmp_path / dtype).read_text())]
    for exact, rounded in zip(points["float32"], points["bfloat16"], strict=True):
        assert 0 < abs(exact.answer_mass - rounded.answer_mass) < 0.02  # 8 bits of a number


def test_evaluate_takes_a_target_and_a_bare_model(trained: Trained, model_folder: Path, call: Any) -> None:
    data = trained.config.parent / "letters.jsonl"
    options = ["--set", data, "--bootstrap", 5, "--target", "female=0.9", "--target", "male=.1"]
    code, out, _ = call("evaluate", "none", "--model", model_folder, *options)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:3]] == ["0.00"]
    assert "female 0.9, male 0.1" in out


def test_evaluate_measures_against_the_target_that_the_steering_states(
    trained: Trained, model_folder: Path, tmp_path: Path, call: Any
) -> None:
    backbone = Backbone.load(str(model_folder))
    facts = {"base_model": str(model_folder), "groups": ("male", "female"), "target": (0.3, 0.7)}
    Steering.for_model(backbone.model, **facts).save_pretrained(tmp_path / "steering")
    options = ["--set", trained.config.parent / "letters.jsonl", "--bootstrap", 5, "--scales", "0"]
    assert "female 0.7, male 0.3" in call("evaluate", tmp_path / "steering", *options).out
    asked = call("evaluate", tmp_path / "steering", *options, "--target", "female=0.5", "--target", "male=0.5")
    assert "female 0.5, male 0.5" in asked.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--scales", "nan"], ("--scales 'nan': expected comma-separated numbers",)),
        (["--scales", "0,x"], ("--scales '0,x'",)),
        (["--scales", "0,1.5"], ("scale is 1.5, expected a number from 0 to 1, the range this steering states",)),
        (["--scales", "-1"], ("scale is -1",)),
        (["--split", "tset"], ("no decision with split='tset'", "splits are train, validation, test")),
        (["--target", "female=0.9"], ("the target names groups ['female']",)),
        (["--target", "female=0.9", "--target", "male=0.2"], ("sum to 1",)),
        (["--target", "female=a", "--target", "male=0.2"], ("must be numbers",)),
        (["--option", "x"], ("--option 'x': expected key=value",)),
        (["--option", "groups=[a"], ("not valid YAML",)),
        (["--option", "colour=red"], ("unknown option 'colour'",)),
        (["--model", "./none"], ("model './none'",)),
    ],
)
def test_bad_input_to_evaluate(trained: Trained, call: Any, arguments: list[str], parts: tuple[str, ...]) -> None:
    data = trained.config.parent / "letters.jsonl"
    assert_refused(call("evaluate", trained.steering, "--set", data, "--bootstrap", 5, *arguments), *parts)


def test_evaluate_needs_a_model_and_a_steering(trained: Trained, call: Any) -> None:
    data = trained.config.parent / "letters.jsonl"
    assert_refused(call("evaluate", "none", "--set", data), "name the base model with --model")
    assert_refused(call("evaluate", "./none", "--set", data), "./none: no steering there")


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    """A model of the same shape with other weights."""
    from tiny import byte_tokenizer, tiny_llama

    model = tiny_llama(seed=1)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def wider_model(tmp_path: Path) -> Path:
    from tiny import byte_tokenizer, tiny_llama

    tiny_llama(width=32).save_pretrained(tmp_path / "wider")
    byte_tokenizer().save_pretrained(tmp_path / "wider")
    return tmp_path / "wider"


def test_a_steering_of_another_model_is_refused(
    trained: Trained, call: Any, other_model: Path, wider_model: Path
) -> None:
    data = trained.config.parent / "letters.jsonl"
    for model, reason in ((other_model, "not the ones trained on"), (wider_model, "has width 32, expected 16")):
        assert_refused(call("evaluate", trained.steering, "--set", data, "--model", model), reason, "was made for")
        assert_refused(call("generate", trained.steering, "Hello", "--model", model), reason)


def test_a_damaged_steering_is_refused(trained: Trained, tmp_path: Path, call: Any) -> None:
    for name in ("dso_model.safetensors", "dso_config.json"):
        for spoil in (lambda data: data[:-9], lambda data: data[:200] + bytes([data[200] ^ 4]) + data[201:]):
            copy = tmp_path / "copy"
            copy.mkdir(exist_ok=True)
            for path, data in contents(Path(trained.steering)).items():
                (copy / path).write_bytes(spoil(data) if path == name else data)
            assert_refused(call("inspect", copy), f"{copy / name}: ")
            assert_refused(call("generate", copy, "Hello"), f"{copy / name}: ")


# dso generate, dso inspect


def test_generate_continues_a_text_at_a_scale(trained: Trained, model_folder: Path, call: Any) -> None:
    backbone = Backbone.load(str(model_folder), device="cpu")
    bare = backbone.generate("The nurse is ", max_new_tokens=12)
    with Steering.from_pretrained(trained.steering).on(backbone.model, 1.0):
        steered = backbone.generate("The nurse is ", max_new_tokens=12)
    found = {
        scale: call("generate", trained.steering, "The nurse is ", "--scale", scale, "--max-new-tokens", 12)
        for scale in (0, 1)
    }
    assert found == {0: (0, bare + "\n", ""), 1: (0, steered + "\n", "")}
    assert bare != steered
    assert call("generate", trained.steering, "Who?", "--chat", "--max-new-tokens", 3).code == 0


@pytest.mark.parametrize("scale", ["nan", "inf", "1.01", "-0.5"])
def test_generate_refuses_a_scale_out_of_range(trained: Trained, call: Any, scale: str) -> None:
    outcome = call("generate", trained.steering, "Hello", f"--scale={scale}")
    assert_refused(outcome, "scale is", "expected a number from 0 to 1")


def test_generate_refuses_an_empty_prompt_and_a_chat_without_a_template(
    trained: Trained, call: Any, tmp_path: Path, model_folder: Path
) -> None:
    assert_refused(call("generate", trained.steering, "  "), "the prompt is empty")
    plain = tmp_path / "plain"
    plain.mkdir()
    for path, data in contents(model_folder).items():
        if path != "chat_template.jinja":
            (plain / path).write_bytes(data)
    outcome = call("generate", trained.steering, "Hello", "--chat", "--model", plain)
    assert_refused(outcome, "has no chat template; leave --chat away")


def test_inspect_shows_what_a_steering_states(trained: Trained, model_folder: Path, call: Any) -> None:
    code, out, err = call("inspect", trained.steering, "--top", 2)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "operator     affine at 5 sites"
    assert lines[1] == f"base model   {model_folder}"
    assert lines[3] == "fair shares  female 0.5, male 0.5"
    assert lines[4] == "scoring      sum of tokens"
    assert lines[5] == "scale        0 to 1"
    assert lines[6] == "coefficients 160, of which 0 are exactly 0"
    steering = Steering.from_pretrained(trained.steering)
    tensors, curve = steering.tensors(), steering.config.scale_curve
    measured, lines = [line for line in lines if line.startswith("at scale ")], lines[:7] + lines[7 + len(curve) :]
    assert [float(line.split()[2]) for line in measured] == [point["scale"] for point in curve]
    assert f"bias {curve[0]['bias']['probability']['bias'][0]:.3f} [" in measured[0] and "cut by" not in measured[0]
    assert ", cut by " in measured[-1] and "; log-odds " in measured[-1]
    sizes: dict[str, float] = {}
    for key, value in tensors.items():
        sizes[key[:-2]] = sizes.get(key[:-2], 0.0) + float(value.norm())
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:2]
    assert [line.split()[0] for line in lines[8:]] == largest
    assert f"|a| {tensors[f'{largest[0]}.a'].norm():.3f}  |b| {tensors[f'{largest[0]}.b'].norm():.3f}" in lines[8]
    assert_refused(call("inspect", trained.run), "no steering there")


def test_what_an_older_version_measured_is_said_to_be_so(trained: Trained, tmp_path: Path, call: Any) -> None:
    steering = Steering.from_pretrained(trained.steering)
    old = {"scale": 1.0, "bias": {"soft": [0.1, 0.0, 0.2], "corrected": [0.1, 0.0, 0.2]}, "kl": 0.1}
    steering.config = replace(steering.config, scale_curve=(old,))
    steering.save_pretrained(tmp_path / "old")
    code, out, err = call("inspect", tmp_path / "old")
    assert (code, err) == (0, "")
    assert "measured     by an older version of dso; dso evaluate measures anew" in out


# dso decisions


def test_decisions_counts_and_shows_examples(trained: Trained, model_folder: Path, call: Any) -> None:
    data = trained.config.parent / "letters.jsonl"
    code, out, err = call("decisions", data, "--examples", 2)
    assert (code, err) == (0, "")
    assert out.startswith("letters: 64 decisions in 4 contexts\ngroups: female, male\n")
    assert out.count("'A' (female)") == 2 * 3 * 2  # of each split and kind
    assert out.count("<- right") == 2 * 3
    assert call("decisions", data, "--examples", 0).out.count("(female)") == 0
    chat = trained.config.parent / "chat.jsonl"
    read = read_jsonl(data)
    asked = ({"role": "user", "content": "Who is the nurse?"},)
    decision = Decision(
        **{name: getattr(read[0], name) for name in ("id", "context", "kind", "candidates")}, prompt=asked
    )
    type(read)((decision,)).write_jsonl(chat)
    assert "[user] Who is the nurse?" in call("decisions", chat).out
    assert "<user>Who is the nurse?" in call("decisions", chat, "--model", model_folder).out
    assert call("decisions", "roles", "--examples", 0).code == 0


GOOD = {
    "id": "1", "context": "nurse", "kind": "ambiguous", "prompt": "The nurse is", "answer": None, "template": "t",
    "split": "train", "candidates": [{"text": " Ann", "group": "female"}, {"text": " Bob", "group": "male"}],
}  # fmt: skip


def test_an_ascii_terminal_shows_names_with_accents_escaped(tmp_path: Path) -> None:
    names = [{"text": " Jos\u00e9", "group": "male"}, {"text": " Zo\u00eb", "group": "female"}]
    data = tmp_path / "jos\u00e9.jsonl"
    data.write_text(json.dumps(GOOD | {"prompt": "Jos\u00e9 or Zo\u00eb?", "candidates": names}), encoding="utf-8")
    command = [sys.executable, "-m", "launch.cli", "decisions", str(data)]
    shell = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, encoding="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"  | Jos\xe9 or Zo\xeb?" in done.stdout and r"' Jos\xe9' (male)" in done.stdout
    data.write_text("{", encoding="utf-8")
    done = subprocess.run(command, cwd=ROOT, env=shell, capture_output=True, text=True, encoding="ascii")
    assert done.returncode == 2 and r"jos\xe9.jsonl:1: not valid JSON" in done.stderr


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"candidates": GOOD["candidates"][:1]}, "1 candidate(s), a decision needs at least 2"),
        ({"candidates": [GOOD["candidates"][0]] * 2}, "two candidates have the same text ' Ann'"),
        ({"candidates": [{"text": " Ann"}]}, "a candidate must be"),
        ({"candidates": [{"text": " ", "group": "female"}, GOOD["candidates"][1]]}, "a candidate's text is empty"),
        ({"candidates": [{"text": " X", "group": ""}, GOOD["candidates"][1]]}, "candidate ' X' has no group"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": 7}, "prompt must be a string or a list"),
        ({"prompt": [{"role": "boss", "content": "x"}]}, "unknown role 'boss'"),
        ({"kind": "maybe"}, "kind is 'maybe', expected one of ambiguous, unambiguous"),
        ({"answer": 0}, "an ambiguous decision has none"),
        ({"kind": "unambiguous", "answer": 2}, "answer is 2, expected the index of a candidate (0 to 1)"),
        ({"id": ""}, "the id is empty"),
        ({"id": 5}, "id must be a string, found 5"),
        ({"context": ""}, "the context is empty"),
        ({"stereotype": 3}, "stereotype must be a group or null"),
        ({"images": "x.png"}, "images must be a list of paths"),
        ({"colour": "red"}, "unknown key(s) 'colour'; known are id,"),
        ({"id": "0"}, "duplicate id '0', first used on line 1"),
    ],
)
def test_a_bad_decision_is_refused_with_its_line(
    tmp_path: Path, call: Any, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{**GOOD, "id": "0"}, {**GOOD, **change}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert_refused(call("decisions", path), f"{path}:2: ", reason)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "\xff"}', "not valid UTF-8 at byte 8"),
        (b'{"id": ', "not valid JSON: "),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"id": "1"}', "missing key(s) context, kind, prompt, candidates, answer, template, split"),
    ],
)
def test_a_line_that_is_no_decision_is_refused(tmp_path: Path, call: Any, line: bytes, reason: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line + b"\n")
    assert_refused(call("decisions", path), f"{path}:2: {reason}")


def test_a_set_that_is_none_is_refused(tmp_path: Path, call: Any) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("\n")
    assert_refused(call("decisions", path), f"{path}: ", "no decisions")
    one = {**GOOD, "candidates": [{"text": " A", "group": "female"}, {"text": " B", "group": "female"}]}
    path.write_text(json.dumps(one))
    assert_refused(call("decisions", path), "expected at least two different ones")
    path.write_text(json.dumps({**GOOD, "stereotype": "other"}))
    assert_refused(call("decisions", path), "stereotype 'other', which is not among the groups female, male")
    path.write_text(json.dumps(GOOD))
    outcome = call("decisions", path, "--option", "groups=[female, x]")
    assert_refused(outcome, f"{path}:1: unknown group 'male'; known are abstain, female, x")
    assert_refused(call("decisions", tmp_path / "none.jsonl"), "cannot be read: No such file")
