"""Trackers without W&B itself: what is recorded, and that a process that misbehaves stops and slows nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from stable_baselines3.common.logger import Logger
from tiny import small_set
from wandb_tools import KEY, clean_environment, tracking_processes

import trainers.tracking.wandb_relay as relay_module
from dso.errors import UserError
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.intervals import Estimate
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.config.reading import ConfigError
from launch.config.schema import WandbSection, known_configs, load_config
from trainers.tracking import wandb_worker
from trainers.tracking.records import SAMPLE_COLUMNS, curve_records, decision_samples, scalars, without_credentials
from trainers.tracking.tracker import (
    ScalarWriter,
    TensorBoardTracker,
    Tracker,
    WandbTracker,
    check_tracker,
    open_tracker,
    run_id,
)
from trainers.tracking.wandb_relay import Relay

# What is recorded


def test_scalars_are_the_finite_numbers_against_the_optimiser_steps() -> None:
    record = {"step": 60, "train/kl": 0.5, "eval/accuracy": math.nan, "time/fps": 3, "train/note": "x", "plain": 1.0}
    assert scalars(record, 20) == {"train/global_step": 3, "train/decisions": 60, "train/kl": 0.5, "time/fps": 3}
    assert scalars({"step": 0, "eval/bias": None}, 20) == {"train/global_step": 0, "train/decisions": 0}


def test_the_logger_hands_its_records_on() -> None:
    told: list[dict] = []
    logger = Logger(None, [ScalarWriter(told.append, 4)])
    logger.record("train/kl", 0.25)
    logger.dump(8)
    logger.record("eval/bias", 0.5)
    logger.dump(8)
    assert told == [
        {"log": {"train/global_step": 2, "train/decisions": 8, "train/kl": 0.25}},
        {"log": {"train/global_step": 2, "train/decisions": 8, "eval/bias": 0.5}},
    ]


def test_what_was_not_measured_of_the_kept_steering_is_left_out() -> None:
    said: list[dict] = []
    # four groups have no gap, a fixed price no KL of training decisions
    row = {"step": 25, "bias": 0.1, "accuracy": math.nan, "gap": None, "training_kl": None}
    WandbTracker(SimpleNamespace(put=said.append), "x").selected(row)
    assert said == [{"log": {"train/global_step": 25, "selected/step": 25, "selected/bias": 0.1}}]


def point(scale: float, bias: float, accuracy: float) -> SimpleNamespace:
    measured = SimpleNamespace(
        corrected=Estimate(bias, bias - 0.1, bias + 0.1),
        soft=Estimate(bias + 0.01, 0.0, 1.0),
        hard=Estimate(bias + 0.02, 0.0, 1.0),
        soft_floor=0.05,
        order_effect=0.4 + bias,
    )
    return SimpleNamespace(
        scale=scale, bias=measured, accuracy=Estimate(accuracy, 0.0, 1.0), answer_mass=0.9, kl=scale / 10
    )


def test_the_curve_is_a_table_two_charts_and_a_summary() -> None:
    first, second, third, last = curve_records([point(0.0, 0.5, math.nan), point(1.0, 0.25, 0.75)])
    assert first["table"]["columns"][:3] == ["scale", "bias", "bias low"]
    assert first["table"]["rows"][0][:8] == [0.0, 0.5, 0.4, 0.6, 0.51, 0.05, 0.52, None]
    bias = second["line"]
    assert (bias["x"], bias["y"], bias["stroke"]) == ("scale", "value", "measure")
    assert [0.0, 0.5, "bias"] in bias["rows"]
    assert [1.0, 0.05, "noise floor"] in bias["rows"]
    assert len(bias["rows"]) == 6
    assert [row for row in third["line"]["rows"] if row[2] == "accuracy"] == [[1.0, 0.75, "accuracy"]]
    assert last["summary"]["test/bias"] == 0.25
    assert last["summary"]["test/base bias"] == 0.5
    assert (last["summary"]["test/order effect"], last["summary"]["test/base order effect"]) == (0.65, 0.9)
    assert "test/base accuracy" not in last["summary"]


def test_samples_are_of_every_context_and_say_what_steering_changes(backbone: Backbone) -> None:
    data = small_set().select(split="test")
    steering = Steering.for_model(backbone.model)
    for operator in steering.operators.values():
        operator.a.data.fill_(0.3)
    handle = steering.attach(backbone.model)
    rows = decision_samples(backbone, data, handle, count=8)
    named = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in rows]
    assert {row["context"] for row in named} == {"nurse", "pilot", "baker", "judge"}
    assert {row["kind"] for row in named} == {"ambiguous", "unambiguous"}
    assert len({row["decision"] for row in named}) == 8
    chosen = data.select(lambda d: d.id in {row["decision"] for row in named})
    before, after = (measured.policy for measured in Evaluator(backbone, chosen, handle).curve([0.0, 1.0]))
    for place, decision in enumerate(chosen):
        own = [row for row in named if row["decision"] == decision.id]
        assert [row["candidate"] for row in own] == [candidate.text for candidate in decision.candidates]
        assert [row["right"] for row in own] == (
            [None, None] if decision.ambiguous else [decision.answer == 0, decision.answer == 1]
        )
        assert [row["before"] for row in own] == pytest.approx(list(before[place]))
        assert [row["after"] for row in own] == pytest.approx(list(after[place]))
        assert {row["prompt"] for row in own} == {decision.prompt}
    assert any(abs(row["before"] - row["after"]) > 0.01 for row in named)


def test_credentials_in_addresses_are_replaced() -> None:
    told = {"data": {"set": "https://user:secret@host/x"}, "list": ["s3://key@bucket", "a@b"], "number": 3}
    assert without_credentials(told) == {
        "data": {"set": "https://***@host/x"},
        "list": ["s3://***@bucket", "a@b"],
        "number": 3,
    }


# Which tracker


def options(**changed: object) -> dict:
    return {"config": {}, "say": lambda _: None, "warn": lambda _: None} | changed


def test_no_tracker_where_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    plain = [
        open_tracker("none", tmp_path, **options()),
        open_tracker("wandb", tmp_path, **options(is_main=False)),
        open_tracker("tensorboard", tmp_path, **options(is_main=False)),
        open_tracker("wandb", tmp_path, **options(mode="disabled")),
    ]
    monkeypatch.setenv("WANDB_MODE", "disabled")
    plain.append(open_tracker("wandb", tmp_path, **options()))
    for tracker in plain:
        assert type(tracker) is Tracker
        with tracker:
            assert tracker.outputs(4) == []
    assert list(tmp_path.iterdir()) == []
    assert type(open_tracker("wandb", tmp_path, **options(mode="offline"))) is not Tracker


@pytest.mark.parametrize("name", [name for name in known_configs() if "/" in load_config(name).model.name])
def test_runs_of_published_models_are_tracked_online_with_a_key_and_offline_without(name: str) -> None:
    config = load_config(name)
    assert (config.run.tracking, config.run.wandb.mode) == ("wandb", "auto")


@pytest.mark.parametrize(
    ("settings", "key", "mode"),
    [
        ("online", True, "online"),
        ("online", False, "offline"),
        ("offline", True, "offline"),
        ("disabled", True, "disabled"),
    ],
)
def test_without_a_key_a_run_is_offline_and_otherwise_as_wandbs_own_settings_say(
    settings: str, key: bool, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = SimpleNamespace(mode=settings, base_url="https://api.wandb.ai")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(setup=lambda: SimpleNamespace(settings=stated)))
    clean_environment(monkeypatch, tmp_path, **({"WANDB_API_KEY": KEY} if key else {}))
    assert wandb_worker.own_mode() == mode


def test_a_key_is_looked_for_where_wandb_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment(monkeypatch, tmp_path)
    monkeypatch.delenv("NETRC")
    assert not wandb_worker.has_key("https://own.server:8080")
    (tmp_path / ".netrc").write_text(f"machine own.server\n  login user\n  password {KEY}\n")
    assert wandb_worker.has_key("https://own.server:8080")
    assert not wandb_worker.has_key("https://another.server")
    (tmp_path / ".netrc").write_text("machine")  # not one
    assert not wandb_worker.has_key("https://own.server:8080")


def test_the_id_stays_with_the_folder_unless_a_sweep_gives_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first = run_id(tmp_path)
    assert len(first) == 8
    assert run_id(tmp_path) == first
    other = tmp_path / "other"
    other.mkdir()
    assert run_id(other) != first
    monkeypatch.setenv("WANDB_RUN_ID", "of-a-sweep")
    assert run_id(tmp_path) == "of-a-sweep"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert run_id(tmp_path) == "of-a-sweep"


def test_a_tracker_that_is_not_installed_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker("none")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_tracker("none")
    with pytest.raises(
        UserError, match=r"run.tracking: tensorboard is not installed; pip install 'dso\[tensorboard\]'"
    ):
        check_tracker("tensorboard")
    with pytest.raises(UserError, match=r"pip install 'dso\[train\]'"):
        check_tracker("wandb")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"project": "a/b"}, "project: must be up to 128 characters"),
        ({"project": ""}, "project: must not be empty"),
        ({"tags": ("a", "a")}, "tags: has a value twice"),
        ({"tags": ("a", "b" * 65)}, r"tags\[1\]: must have 1 to 64 characters, found 65"),
        ({"timeout": 0.5}, "timeout: must be at least 1"),
        ({"entity": ""}, "entity: must not be empty"),
    ],
)
def test_settings_that_the_server_would_refuse_are_refused_at_once(values: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        WandbSection(**values)


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoardTracker(tmp_path) as tracker:
        logger = Logger(None, tracker.outputs(4))
        for step in (4, 8):
            logger.record("train/kl", step / 16)
            logger.dump(step)
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/kl")] == [(4, 0.25), (8, 0.5)]


# A process that misbehaves

READY = """
import json, os, sys, time
def answer(**values): print(json.dumps(values), flush=True)
messages = (json.loads(line) for line in sys.stdin)
setup = next(messages)
answer(mode=setup["mode"])
with open(os.path.join(setup["folder"], "told." + setup["mode"]), "a") as told:
    def keep():
        for message in messages:
            print(json.dumps(message), file=told, flush=True)
            if "finish" in message:
                break
"""
HONEST = "    answer(ready={'folder': 'F', 'url': 'U'}); keep(); answer(told=True); answer(done='')\n"
WORKERS = {
    "honest": READY + HONEST,
    "has no address": READY + HONEST.replace("'U'", "None"),
    "never begins": "import time\ntime.sleep(600)",
    "ends at once": "raise SystemExit(3)",
    "does not open": READY + "    if setup['mode'] == 'online': time.sleep(600)\n" + HONEST,
    "says why": READY + "    if setup['mode'] == 'online': answer(failed='no such entity'); sys.exit(1)\n" + HONEST,
    "ends in the middle": READY + "    if setup['mode'] == 'online':\n        answer(ready={'folder': 'F', 'url': 'U'})"
    "; next(messages); sys.exit(1)\n" + HONEST,
    "does not read": READY + "    if setup['mode'] == 'online':\n        answer(ready={'folder': 'F', 'url': 'U'})"
    "; time.sleep(600)\n" + HONEST,
    "does not finish": READY + "    answer(ready={'folder': 'F', 'url': 'U'}); keep(); answer(told=True)\n"
    "    time.sleep(600)\n",
}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Puts a worker of the table in the place of the real one, with seconds instead of minutes."""
    for name, seconds in {"BEGIN": 60.0, "LOCAL": 60.0, "SLACK": 0.5, "PATIENCE": 0.2}.items():
        monkeypatch.setattr(relay_module, name, seconds)

    def put(name: str) -> None:
        path = tmp_path / "worker.py"
        path.write_text(textwrap.dedent(WORKERS[name]))
        monkeypatch.setattr(relay_module, "WORKER", path)

    return put


class Run:
    """A relay with ten records, what it said, and the seconds that the records and the end took."""

    def __init__(self, folder: Path, mode: str = "online", size: int = 1, code: int = 0, timeout: float = 60.0):
        self.folder = folder / "run"
        self.folder.mkdir()
        self.said: list[str] = []
        self.warned: list[str] = []
        setup = {"mode": mode, "folder": str(self.folder), "timeout": timeout}
        self.bound = timeout + relay_module.SLACK + 2 * relay_module.LOCAL
        self.relay = Relay(setup, self.said.append, self.warned.append)
        started = time.monotonic()
        self.relay.begin([{"log": {"train/global_step": 0}}])
        for step in range(1, 11):
            self.relay.put({"log": {"train/global_step": step, "padding": "x" * size}})
        self.took = time.monotonic() - started
        started = time.monotonic()
        self.relay.close(code)
        self.closing = time.monotonic() - started
        # On a busy machine the end takes so long that it is announced.
        self.said = [line for line in self.said if not line.startswith("waiting for W&B")]

    def told(self, mode: str) -> list[dict]:
        path = self.folder / f"told.{mode}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self, mode: str) -> list[int]:
        return [message["log"]["train/global_step"] for message in self.told(mode) if "log" in message]


def test_a_process_is_told_everything_in_order(worker, tmp_path: Path) -> None:
    worker("honest")
    run = Run(tmp_path)
    assert run.steps("online") == list(range(1, 11))
    assert run.told("online")[-1] == {"finish": 0}
    assert (run.said[-1], run.warned) == ("W&B: U", [])
    assert run.relay._worker.process.returncode == 0
    run.relay.close(0)  # again: nothing happens
    assert not tracking_processes(run.folder)


def test_a_run_that_wandbs_own_settings_disable_says_so(worker, tmp_path: Path) -> None:
    worker("has no address")
    run = Run(tmp_path, mode="disabled")
    assert (run.said[-1], run.warned) == ("W&B: disabled, as its own settings say", [])


def test_an_offline_run_begins_with_what_was_before_a_resume(worker, tmp_path: Path) -> None:
    worker("honest")
    run = Run(tmp_path, mode="offline")
    assert run.steps("offline") == list(range(11))
    assert run.said[-1] == "W&B: offline run, to be sent with: wandb sync F"
    assert run.warned == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("does not open", "its server did not answer in time"),
        ("says why", "no such entity"),
        ("ends in the middle", "its process"),
    ],
)
def test_what_cannot_be_sent_is_kept_offline_with_one_warning(name: str, reason: str, worker, tmp_path: Path) -> None:
    worker(name)
    run = Run(tmp_path, timeout=2.0)
    assert run.took < 1.5
    assert run.closing < run.bound
    assert run.steps("offline") == list(range(11))
    assert run.told("offline")[-1] == {"finish": 0}
    assert len(run.warned) == 1
    assert run.warned[0].startswith(f"W&B: {reason}")
    assert run.warned[0].endswith("the run is kept offline, send it later with: wandb sync F")
    assert not tracking_processes(run.folder)


def test_a_process_that_does_not_read_holds_nobody_up(worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "STUCK", 2.0)
    worker("does not read")
    run = Run(tmp_path, size=200_000)  # more than a pipe takes
    assert run.took < 1.5
    assert run.steps("offline") == list(range(11))
    assert len(run.warned) == 1
    assert "nothing was read for 2 s" in run.warned[0]


@pytest.mark.parametrize("name", ["never begins", "ends at once"])
def test_tracking_that_is_impossible_is_given_up(
    name: str, worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "BEGIN", 1.0)
    worker(name)
    run = Run(tmp_path)
    assert run.closing < run.bound
    assert len(run.warned) == 1
    assert run.warned[0].endswith("wandb/worker.log says more)")
    assert not tracking_processes(run.folder)


def test_a_finish_that_hangs_is_cut_and_said(worker, tmp_path: Path) -> None:
    worker("does not finish")
    run = Run(tmp_path, timeout=4.0)
    assert 4.0 <= run.closing < run.bound
    assert run.warned == ["W&B: not everything was sent in time; what is missing there is here: wandb sync F"]
    assert run.steps("online") == list(range(1, 11))
    assert not run.told("offline")
    assert not tracking_processes(run.folder)


def test_a_run_that_ended_early_waits_for_nothing_but_the_server(worker, tmp_path: Path) -> None:
    worker("does not open")
    run = Run(tmp_path, code=1, timeout=1.0)
    assert run.closing < 1.0 + relay_module.LOCAL / 2  # the time for keeping things offline is not taken
    assert not run.told("offline")
    assert not tracking_processes(run.folder)


def test_ctrl_c_while_waiting_ends_the_process(worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker("does not finish")
    relay = Relay({"mode": "online", "folder": str(tmp_path), "timeout": 600.0}, lambda _: None, lambda _: None)
    relay.begin()
    join = relay._thread.join
    waits: list[float] = []

    def interrupted(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        join(max(seconds, 2.0))

    monkeypatch.setattr(relay._thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        relay.close(0)
    assert not relay._thread.is_alive()
    assert not tracking_processes(tmp_path)


def test_the_memory_is_bounded_and_says_so(worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "KEPT", 4)
    worker("honest")
    run = Run(tmp_path)
    steps = run.steps("online")
    assert steps[-4:] == [7, 8, 9, 10]
    lost = 10 - len(steps)
    expected = [f"W&B: the first {lost} records were dropped; what is missing there is here: wandb sync F"]
    assert run.warned == (expected if lost else [])


def test_the_process_sees_only_the_folder_of_the_run(worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "another process")
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    seen = relay_module.environment(tmp_path / "wandb", "S")
    places = {name: value for name, value in seen.items() if name.startswith("WANDB_") and name.endswith("DIR")}
    assert len(places) == 4
    assert all(Path(value).is_relative_to(tmp_path) for value in places.values())
    assert "WANDB_SERVICE" not in seen
    assert seen["TMPDIR"] == "S"
    worker("honest")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    run = Run(tmp_path)
    assert run.steps("online")
    assert list(scratch.iterdir()) == []
