"""Trackers without a server: what is recorded, which tracker hears of it, and a W&B client that raises and hangs."""

from __future__ import annotations

import importlib.util
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from stable_baselines3.common.logger import Logger
from tiny import small_set
from wandb_tools import KEY, clean_environment

from dso.errors import UserError
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.intervals import Estimate
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.config.keys import build
from launch.config.reading import ConfigError
from launch.config.schema import TrainConfig, known_configs, load_config
from trainers.tracking import weights_and_biases
from trainers.tracking.records import SAMPLE_COLUMNS, curve_records, decision_samples, scalars, without_credentials
from trainers.tracking.tracker import TensorBoardTracker, Tracker, check_tracker, open_tracker
from trainers.tracking.weights_and_biases import QUIET, ScalarWriter, WandbTracker, has_key, own_mode, run_id

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
        {"train/global_step": 2, "train/decisions": 8, "train/kl": 0.25},
        {"train/global_step": 2, "train/decisions": 8, "eval/bias": 0.5},
    ]


def point(scale: float, bias: float, accuracy: float) -> SimpleNamespace:
    size = Estimate(bias, bias - 0.1, bias + 0.1)
    odds = SimpleNamespace(bias=Estimate(4 * bias, 0.0, 3.0))
    measured = SimpleNamespace(bias=size, context_part=size, log_odds=odds, order_effect=0.4 + bias)
    cut = SimpleNamespace(bias=Estimate(0.5, 0.25, 0.75), log_odds=Estimate(0.3, 0.1, 0.5)) if scale else None
    return SimpleNamespace(
        scale=scale,
        bias=measured,
        accuracy=Estimate(accuracy, 0.0, 1.0),
        answer_mass=0.9,
        kl=scale / 10,
        kl_unambiguous=scale / 20,
        cut=cut,
    )


def test_the_curve_is_a_table_two_charts_and_a_summary() -> None:
    curve = curve_records([point(0.0, 0.5, math.nan), point(1.0, 0.25, 0.75)])
    assert curve.columns[:3] == ["scale", "bias", "bias low"]
    before, after = (dict(zip(curve.columns, row, strict=True)) for row in curve.rows)
    assert [before[name] for name in ("bias", "bias low", "bias high", "log-odds bias")] == [0.5, 0.4, 0.6, 2.0]
    assert (before["cut"], before["accuracy"]) == (None, None)
    assert [after[name] for name in ("cut", "cut low", "cut high", "log-odds cut")] == [0.5, 0.25, 0.75, 0.3]
    bias, cost = curve.charts
    assert [0.0, 0.5, "bias"] in bias.rows
    assert [1.0, 0.65, "order effect"] in bias.rows
    assert len(bias.rows) == 6
    assert [row for row in cost.rows if row[2] == "accuracy"] == [[1.0, 0.75, "accuracy"]]
    assert curve.summary["test/bias"] == 0.25
    assert curve.summary["test/base bias"] == 0.5
    assert (curve.summary["test/order effect"], curve.summary["test/base order effect"]) == (0.65, 0.9)
    assert "test/base accuracy" not in curve.summary


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
    assert (config.run.report_to, config.run.wandb.mode) == ("wandb", "auto")


@pytest.fixture
def own_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """W&B reads its environment once; here it is this test's."""
    wandb.teardown()
    clean_environment(monkeypatch, tmp_path / "home", **QUIET)
    yield monkeypatch
    wandb.teardown()


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
def test_without_a_mode_of_ours_wandbs_own_settings_say(mode: str, own_session: pytest.MonkeyPatch) -> None:
    own_session.setenv("WANDB_MODE", mode)
    assert own_mode() == mode


def test_a_key_is_looked_for_where_wandb_keeps_it(tmp_path: Path, own_session: pytest.MonkeyPatch) -> None:
    """And nobody is asked for one."""
    assert own_mode() == "online"
    assert not has_key()
    wandb.teardown()
    own_session.setenv("WANDB_API_KEY", KEY)
    assert has_key()
    wandb.teardown()
    own_session.delenv("WANDB_API_KEY")
    own_session.setenv("WANDB_BASE_URL", "http://own.server:8080")
    own_session.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine own.server:8080\n  login user\n  password {KEY}\n")
    assert has_key()


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
        UserError, match=r"run.report_to: tensorboard is not installed; pip install 'dso\[tensorboard\]'"
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
        build(TrainConfig, {"run": {"report_to": "wandb", "wandb": values}})


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


# A client that misbehaves


class Client:
    """What :class:`WandbTracker` uses of ``wandb``, failing where it is told to; ``logged`` is by mode, in order."""

    def __init__(self, *failing: str):
        self.failing = failing
        self.logged: dict[str, list[Any]] = {"online": [], "offline": []}
        self.ended: list[tuple[str, int]] = []
        self.left = 0
        self.never = threading.Event()

    def open(self, mode: str) -> Any:
        self.fail(f"{mode} init")

        def log(values: dict[str, Any]) -> None:
            if values["step"] == 3:
                self.fail(f"{mode} log")
            self.logged[mode].append(values["step"])

        def finish(exit_code: int) -> None:
            self.fail(f"{mode} finish")
            self.ended.append((mode, exit_code))

        settings = SimpleNamespace(sync_dir=f"/{mode}")
        return SimpleNamespace(log=log, finish=finish, offline=mode == "offline", url="U", settings=settings)

    def fail(self, where: str) -> None:
        if f"{where} hangs" in self.failing:
            self.never.wait(60)
        if where in self.failing:
            raise ValueError(f"{where} failed.")

    def leave(self) -> None:
        self.left += 1


class Told:
    """Five records of a run and its end, told to a tracker with such a client."""

    def __init__(self, client: Client, folder: Path, patch: pytest.MonkeyPatch, timeout: float = 30.0, code: int = 0):
        self.said: list[str] = []
        self.warned: list[str] = []
        patch.setattr(weights_and_biases, "_leave", client.leave)
        patch.setattr(weights_and_biases, "has_key", lambda: True)
        say, warn = self.said.append, self.warned.append
        tracker = WandbTracker(folder, config={}, mode="online", timeout=timeout, say=say, warn=warn)
        patch.setattr(tracker, "_open", client.open)
        started = time.monotonic()
        tracker.outputs(4)
        for step in range(5):
            tracker._news.put(lambda run, step=step: run.log({"step": step}))
        self.took = time.monotonic() - started
        started = time.monotonic()
        tracker.close(code)
        self.closing = time.monotonic() - started
        tracker.close(code)  # again: nothing happens
        client.never.set()
        self.said = [line for line in self.said if not line.startswith("waiting")]  # a busy machine


def test_a_client_is_told_everything_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    told = Told(client, tmp_path, monkeypatch, code=1)
    assert client.logged == {"online": [0, 1, 2, 3, 4], "offline": []}
    assert (told.said, told.warned, client.ended) == (["W&B: U"], [], [("online", 1)])


@pytest.mark.parametrize(
    ("where", "known"),
    [("online init", []), ("online log", [0, 1, 2]), ("online finish", [0, 1, 2, 3, 4])],
)
def test_what_cannot_be_sent_is_kept_offline_from_the_first_record_on(
    where: str, known: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(where)
    told = Told(client, tmp_path, monkeypatch)
    assert client.logged == {"online": known, "offline": [0, 1, 2, 3, 4]}
    way = "the run is kept offline, send it later with: wandb sync /offline"
    assert (told.warned, client.left) == ([f"W&B: {where} failed; {way}"], 2)  # there, and at the end
    assert client.ended == [("offline", 0)]


def test_a_record_that_is_refused_offline_costs_that_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("online init", "offline log")
    told = Told(client, tmp_path, monkeypatch)
    assert client.logged["offline"] == [0, 1, 2, 4]
    assert told.warned[1:] == ["W&B refused a record: offline log failed"]


def test_a_client_that_does_not_work_at_all_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(Client("online init", "offline init"), tmp_path, monkeypatch)
    assert told.warned == ["W&B: online init failed; this run is not tracked"]


def test_what_is_missing_at_the_end_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told(Client("online init", "offline finish"), tmp_path, monkeypatch)
    assert told.warned[1:] == ["W&B: offline finish failed; what there is can be sent with: wandb sync /offline"]


@pytest.mark.parametrize("where", ["online init hangs", "online log hangs", "online finish hangs"])
def test_a_client_that_hangs_holds_nobody_up(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_and_biases, "SLACK", 1.0)
    monkeypatch.setattr(weights_and_biases, "PATIENCE", 0.2)
    told = Told(Client(where), tmp_path, monkeypatch, timeout=0.5)
    assert told.took < 1.0
    assert 2.0 <= told.closing < 4.0  # twice the server's time, and the slack
    assert told.warned == [f"W&B: did not end within 2 s; what it has is in {tmp_path}/wandb"]


def test_a_run_that_ended_early_waits_for_the_server_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_and_biases, "PATIENCE", 0.2)
    told = Told(Client("online init hangs"), tmp_path, monkeypatch, timeout=0.5, code=1)
    assert 0.7 <= told.closing < 3.0
