"""Selection keeps the best inside the constraints and nothing else; progress, stops and records."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger
from training import learn, make_trainer, operators

from trainers.callbacks import JsonLines, OrderlyStop, Progress, Selection, Validation

BASE = Validation(step=0, bias=0.4, soft_bias=0.45, floor=0.1, accuracy=0.8, kl=0.0, answer_mass=1.0)


def row(step: int, **values: float) -> Validation:
    """Better than the base and inside everything, but for ``values``."""
    return replace(BASE, **{"step": step, "bias": 0.1, "kl": 0.05, **values})


def selection(kl_budget: float | None = 0.1, **options: Any) -> Selection:
    return Selection(lambda step: BASE, every=1, steps=9, kl_budget=kl_budget, **options)


def kept(*rows: Validation, kl_budget: float | None = 0.1) -> int:
    """The step of the candidate that is kept of the base and ``rows``."""
    chosen = selection(kl_budget)
    for each in (BASE, *rows):
        chosen.offer(each)
    return chosen.best.step


# Which candidate is kept


def test_the_smallest_bias_inside_is_kept_whenever_it_comes() -> None:
    assert kept(row(1, bias=0.3), row(2, bias=0.05), row(3, bias=0.2)) == 2
    assert kept(row(1, bias=0.3), row(2, bias=0.2), row(3, bias=0.1)) == 3


@pytest.mark.parametrize(
    "outside",
    [
        {"kl": 0.1001},
        {"kl": math.nan},
        {"answer_mass": 0.899},
        {"accuracy": 0.789},  # the base's 0.8 less one point, and a little more
    ],
)
def test_a_candidate_outside_is_never_kept(outside: dict[str, float]) -> None:
    assert kept(row(1, bias=0.0, **outside)) == 0
    assert kept(row(1, bias=0.3), row(2, bias=0.0, **outside), row(3, bias=0.2)) == 3


@pytest.mark.parametrize("edge", [{"kl": 0.1}, {"answer_mass": 0.9}, {"accuracy": 0.79}, {"accuracy": 1.0}])
def test_the_edges_are_inside(edge: dict[str, float]) -> None:
    assert kept(row(1, **edge)) == 1


def test_where_only_the_base_is_inside_it_is_kept() -> None:
    assert kept(row(1, kl=0.2), row(2, answer_mass=0.5), row(3, bias=0.5)) == 0


def test_of_equal_bias_the_smaller_kl_wins_and_then_the_earlier() -> None:
    assert kept(row(1, bias=0.0, kl=0.08), row(2, bias=0.0, kl=0.03), row(3, bias=0.0, kl=0.03)) == 2


def test_without_a_budget_any_kl_will_do() -> None:
    assert kept(row(1, kl=5.0), kl_budget=None) == 1
    assert kept(row(1, kl=5.0, answer_mass=0.1), kl_budget=None) == 0


def test_what_cannot_be_measured_is_not_held_against_a_candidate() -> None:
    chosen = selection()
    for each in (replace(BASE, accuracy=math.nan, answer_mass=math.nan), row(1, accuracy=math.nan)):
        chosen.offer(each)
    assert chosen.best.step == 1


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_against_a_plain_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [BASE] + [
        Validation(
            step=step,
            bias=float(rng.choice([0.0, 0.1, 0.2, 0.5])),
            soft_bias=0.0,
            floor=0.0,
            accuracy=float(rng.uniform(0.75, 0.85)),
            kl=float(rng.choice([0.02, 0.09, 0.15])),
            answer_mass=float(rng.uniform(0.8, 1.2)),
        )
        for step in range(1, 40)
    ]
    inside = [r for r in rows if r.kl <= 0.1 and r.answer_mass >= 0.9 and r.accuracy >= 0.79]
    assert kept(*rows[1:]) == min(inside, key=lambda r: (r.bias, r.kl, r.step)).step


# Selection in a run


def test_measured_at_the_start_every_so_often_and_at_the_end() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    steps, told, tensors = [], [], {}

    def measure(step: int) -> Validation:
        steps.append(step)
        tensors[step] = operators(trainer)
        return row(step, bias={0: 0.4, 3: 0.1, 6: 0.2, 7: 0.3}[step], kl=0.0)

    chosen = Selection(
        measure, every=3, steps=7, kl_budget=0.1, on_measured=lambda r, better: told.append((r.step, better))
    )
    learn(trainer, 7, chosen)
    assert steps == [0, 3, 6, 7]
    assert told == [(0, True), (3, True), (6, False), (7, False)]
    assert not any(value.any() for value in tensors[0].values())
    assert all(torch.equal(value, tensors[3][key]) for key, value in chosen.best_tensors.items())
    assert any(not torch.equal(value, operators(trainer)[key]) for key, value in chosen.best_tensors.items())


def test_an_interrupted_run_measures_the_same_steps() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    first = Selection(row, every=2, steps=6, kl_budget=0.1)
    learn(trainer, 3, first)  # stops at 3, which is no step to measure
    assert [r.step for r in first.history] == [0, 2]
    tensors, facts = first.state()
    second = Selection(row, every=2, steps=6, kl_budget=0.1)
    second.restore(tensors, json.loads(json.dumps(facts)))
    assert (second.best, second.history) == (first.best, first.history)
    learn(trainer, 3, second)
    assert [r.step for r in second.history] == [0, 2, 4, 6]


def test_measurements_are_records_of_their_own(tmp_path: Path) -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    trainer.set_logger(Logger(None, [JsonLines(tmp_path / "metrics.jsonl")]))
    chosen = Selection(lambda step: row(step, accuracy=math.nan), every=2, steps=3, kl_budget=0.1)
    trainer.learn(12, chosen)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "eval/bias" in r, "train/kl" in r) for r in rows] == [
        (0, True, False),
        (4, False, True),
        (8, False, True),
        (8, True, False),
        (12, False, True),
        (12, True, False),
    ]
    assert rows[0]["eval/accuracy"] is None  # JSON has no nan
    assert rows[0]["eval/kl"] == 0.05


# Records


def test_going_on_drops_the_records_that_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (4, 8, 12):
        lines = JsonLines(path)
        lines.write({"b": torch.tensor(1.5), "a": np.float32(0.5), "n": math.inf}, {}, step)
        lines.close()
    path.write_text(path.read_text() + '{"step": 16, "a":')  # killed here
    JsonLines(path, until=8).close()
    assert path.read_text() == "".join(f'{{"step": {step}, "a": 0.5, "b": 1.5, "n": null}}\n' for step in (4, 8))
    JsonLines(tmp_path / "new.jsonl", until=8).close()
    assert (tmp_path / "new.jsonl").read_text() == ""


# Progress


class Terminal:
    """A stderr that says it is one, or not."""

    def __init__(self, is_terminal: bool) -> None:
        self.text, self.is_terminal = "", is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("quiet", [False, True])
def test_piped_progress_is_lines(monkeypatch: pytest.MonkeyPatch, quiet: bool) -> None:
    monkeypatch.setattr("sys.stderr", stderr := Terminal(False))
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    progress = Progress(5, every=2, quiet=quiet)
    learn(trainer, 5, progress)
    progress.say("a word")
    lines = stderr.text.splitlines()
    assert [line.split("  ")[0] for line in lines] == ([] if quiet else ["step 2/5", "step 4/5", "a word"])
    assert "\r" not in stderr.text
    assert all("running_bias" in line and "kl" in line for line in lines[:-1])


def test_on_a_terminal_there_is_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stderr := Terminal(True))
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    progress = Progress(5, every=1)
    learn(trainer, 3, progress)
    assert progress.bar.n == 3
    assert "step 1/5" not in stderr.text
    again = Progress(5)
    learn(trainer, 2, again)
    assert (again.bar.initial, again.bar.n) == (3, 5)
    last = stderr.text.split("\r")[-1]
    assert "5/5" in last
    assert "<00:00" in last  # left
    assert "running_bias=" in last


# An orderly stop


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("usual_signals")
def test_the_first_signal_stops_after_the_step_and_the_second_one_at_once() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    with OrderlyStop(trainer, said.append), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert trainer.stop_requested
        assert "Ctrl-C again" in said[0]
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_is_asked_to_stop_ends_at_a_whole_step() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)

    class Interrupt(Progress):
        def _on_step(self) -> bool:
            if self.n_calls == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return True

    with OrderlyStop(trainer):
        learn(trainer, 9, CallbackList([Interrupt(9, quiet=True)]))
    assert (trainer.steps_done, trainer._n_updates) == (2, 2)


def test_other_threads_are_left_without_it() -> None:
    trainer = make_trainer(ambiguous=4)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            with OrderlyStop(trainer):
                pass
        except ValueError as error:
            failed.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert signal.getsignal(signal.SIGINT) is before
