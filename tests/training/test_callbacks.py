"""Selection keeps the best inside the constraints and nothing else; progress, stops and records."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import learn, make_trainer, operators
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger

from trainers.callbacks import Checkpoints, Limits, Progress, Selection, Validation
from trainers.tracking.jsonlines import JsonLines

BASE = Validation(step=0, bias=0.4, accuracy=0.8, kl=0.0, answer_mass=1.0)


def row(step: int, **values: float) -> Validation:
    """Better than the base and inside everything, but for ``values``."""
    return replace(BASE, **{"step": step, "bias": 0.1, "kl": 0.05, **values})


def selection(kl_budget: float | None = 0.1, **options: Any) -> Selection:
    return Selection(lambda step: BASE, every=1, steps=9, limits=Limits(kl_budget=kl_budget, **options))


def kept(*rows: Validation, kl_budget: float | None = 0.1) -> int:
    """The step of the candidate that is kept of the base and ``rows``."""
    chosen = selection(kl_budget)
    for each in (BASE, *rows):
        chosen.offer(each, {})
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


def test_a_run_that_keeps_nothing_says_why() -> None:
    chosen = selection()
    for each in (BASE, row(1, kl=0.2), row(2, kl=0.2, answer_mass=0.5), row(3, accuracy=0.7), row(4, bias=0.5)):
        chosen.offer(each, {})
    said = "KL above 0.1: 2, answer mass below 0.9 of the base's: 1, accuracy below the base's: 1, no less biased: 1"
    assert chosen.nothing_kept() == f"none of 4 measured steps was kept ({said}); the steering is the base model"
    chosen.offer(row(4, kl=0.15, scale=0.5), {})  # a smaller scale of the same step
    assert chosen.nothing_kept() == f"none of 4 measured steps was kept ({said}); the steering is the base model"
    chosen.offer(row(5), {})
    assert chosen.nothing_kept() is None


def test_the_operators_of_the_best_are_kept_as_they_were_then() -> None:
    chosen, own = selection(), torch.zeros(2)
    for each in (BASE, row(1, bias=0.3), row(2, kl=0.2), row(3)):
        own += 1
        chosen.offer(each, {"norm.b": own})
    assert chosen.best_tensors["norm.b"].tolist() == [4.0, 4.0]
    own += 1
    assert not chosen.offer(row(4, bias=0.2), {"norm.b": own})
    assert chosen.best_tensors["norm.b"].tolist() == [4.0, 4.0]


def test_where_only_the_base_is_inside_it_is_kept() -> None:
    assert kept(row(1, kl=0.2), row(2, answer_mass=0.5), row(3, bias=0.5)) == 0


def test_of_equal_bias_the_smaller_kl_wins_and_then_the_earlier() -> None:
    assert kept(row(1, bias=0.0, kl=0.08), row(2, bias=0.0, kl=0.03), row(3, bias=0.0, kl=0.03)) == 2


def test_of_two_with_less_bias_than_noise_the_one_with_less_is_kept() -> None:
    """Bias is no figure that stops at 0: what is below is told apart too."""
    assert kept(row(1, bias=-0.01, kl=0.01), row(2, bias=-0.03, kl=0.02), row(3, bias=0.0, kl=0.0)) == 2


def test_what_was_not_measured_is_null_in_the_json_of_a_validation() -> None:
    found = row(3, accuracy=math.nan, log_odds=0.4).to_json()
    assert (found["accuracy"], found["order_effect"], found["gap"]) == (None, None, None)
    assert (found["step"], found["log_odds"]) == (3, 0.4)


def test_without_a_budget_any_kl_will_do() -> None:
    assert kept(row(1, kl=5.0), kl_budget=None) == 1
    assert kept(row(1, kl=5.0, answer_mass=0.1), kl_budget=None) == 0


def test_what_cannot_be_measured_is_not_held_against_a_candidate() -> None:
    chosen = selection()
    for each in (replace(BASE, accuracy=math.nan, answer_mass=math.nan), row(1, accuracy=math.nan)):
        chosen.offer(each, {})
    assert chosen.best.step == 1


@pytest.mark.parametrize("seed", range(5))
def test_random_sequences_against_a_plain_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [BASE] + [
        Validation(
            step=step,
            bias=float(rng.choice([0.0, 0.1, 0.2, 0.5])),
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
        measure,
        every=3,
        steps=7,
        limits=Limits(kl_budget=0.1),
        on_measured=lambda r, better: told.append((r.step, better)),
    )
    learn(trainer, 7, chosen)
    assert steps == [0, 3, 6, 7]
    assert told == [(0, True), (3, True), (6, False), (7, False)]
    assert not any(value.any() for value in tensors[0].values())
    assert all(torch.equal(value, tensors[3][key]) for key, value in chosen.best_tensors.items())
    assert any(not torch.equal(value, operators(trainer)[key]) for key, value in chosen.best_tensors.items())


def test_operators_outside_are_turned_down_until_they_are_inside() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    scales, told = [], []

    def measure(step: int, scale: float = 1.0) -> Validation:
        scales.append((step, scale))
        kl = 0.0 if not step else 0.4 * scale**2.2  # not quite the square that is reckoned with
        return row(step, bias=0.4 - 0.3 * scale * (step > 0), kl=kl, scale=scale)

    chosen = Selection(
        measure, every=9, steps=2, limits=Limits(kl_budget=0.1), on_measured=lambda *found: told.append(found)
    )
    learn(trainer, 2, chosen)
    assert scales[:2] == [(0, 1.0), (2, 1.0)]
    assert chosen.best == chosen.history[-1]
    assert 0.08 < chosen.best.kl <= 0.1
    assert [r.scale for r in chosen.history] == [scale for _, scale in scales]
    assert [better for _, better in told] == [True, *[False] * (len(told) - 2), True]
    for key, value in operators(trainer).items():
        torch.testing.assert_close(chosen.best_tensors[key], chosen.best.scale * value)
    again = Selection(measure, every=9, steps=2, limits=Limits(kl_budget=0.1))
    again.restore(*json.loads(json.dumps([{}, chosen.state()[1]])))
    assert again.best == chosen.best


def test_operators_are_turned_up_while_that_is_inside_and_better() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)

    def measure(step: int, scale: float = 1.0) -> Validation:
        return row(step, bias=0.4 - 0.1 * scale * (step > 0), kl=0.0112 * scale**2 * (step > 0), scale=scale)

    chosen = Selection(measure, every=9, steps=2, limits=Limits(kl_budget=0.1))
    learn(trainer, 2, chosen)
    # KL is 0.045 at 2; at 4 it is 0.179, beyond the budget; in between, at 2.83, it is 0.090, and at 3.36 0.127.
    assert [r.scale for r in chosen.history] == pytest.approx([1, 1, 2, 4, 8**0.5, (4 * 8**0.5) ** 0.5])
    assert chosen.best == chosen.history[-2]
    for key, value in operators(trainer).items():
        torch.testing.assert_close(chosen.best_tensors[key], 8**0.5 * value)
    # A run that is killed in between tries the same scales when it goes on.
    again = Selection(measure, every=9, steps=2, limits=Limits(kl_budget=0.1))
    again.offer(chosen.history[0], {})
    for measured, then in pairwise([*chosen.history[1:], None]):
        again.offer(measured, {})
        assert again._higher() == (None if then is None else then.scale)


def test_operators_are_turned_up_no_further_than_where_bias_is_least() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)

    def measure(step: int, scale: float = 1.0) -> Validation:
        return row(step, bias=abs(0.3 - 0.2 * scale * (step > 0)), kl=0.0, scale=scale)

    chosen = Selection(measure, every=9, steps=2, limits=Limits(kl_budget=0.1))
    learn(trainer, 2, chosen)
    # 0.1 at 1 and at 2, 0.02 in between, at 1.41; and 0.036 between that and 2, at 1.68.
    assert [r.scale for r in chosen.history] == pytest.approx([1, 1, 2, 2**0.5, 8**0.25])
    assert chosen.best.scale == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("limit", "outside", "reason"),
    [
        ({"neutral_kl": 0.05}, {"neutral_kl": 0.051}, "neutral KL above 0.05: 1"),
        ({"neutral_kl": 0.05}, {"neutral_kl": math.nan}, "neutral KL above 0.05: 1"),
        ({"unambiguous_kl": 0.4}, {"unambiguous_kl": 0.41}, "KL on unambiguous decisions above 0.4: 1"),
        ({"order_increase": 0.02}, {"order_effect": 0.33}, "order effect above the base's: 1"),
    ],
)
def test_limits_on_harm_are_kept(limit: dict[str, float], outside: dict[str, float], reason: str) -> None:
    for limits, step in ((limit, 0), ({}, 1)):
        chosen = selection(**limits)
        for each in (replace(BASE, order_effect=0.3, neutral_kl=0.0), row(1, bias=0.0, kl=0.0, **outside)):
            chosen.offer(each, {})
        assert chosen.best.step == step
        assert (reason in (chosen.nothing_kept() or "")) == (step == 0)
    inside = selection(**limit)
    for each in (
        replace(BASE, order_effect=0.3),
        row(1, bias=0.0, order_effect=0.32, neutral_kl=0.05, unambiguous_kl=0.4),
    ):
        inside.offer(each, {})
    assert inside.best.step == 1


@pytest.mark.parametrize(
    ("outside", "scale"),
    [
        ({"kl": 0.4}, math.sqrt(0.97 / 4)),
        ({"answer_mass": 0.7}, 0.97 / 3),
        ({"kl": 0.4, "answer_mass": 0.7}, 0.97 / 3),
        ({"kl": 0.4, "scale": 0.5}, 0.5 * math.sqrt(0.97 / 4)),
        ({}, None),
        ({"accuracy": 0.5}, None),  # what a smaller scale does to it cannot be reckoned
        ({"kl": math.nan}, None),
        ({"kl": math.inf}, None),
        ({"kl": 0.2, "neutral_kl": 0.1, "unambiguous_kl": 1.6}, math.sqrt(0.97 / 4)),  # the furthest beyond its limit
    ],
)
def test_the_scale_that_would_be_inside(outside: dict[str, float], scale: float | None) -> None:
    chosen = selection(neutral_kl=0.05, unambiguous_kl=0.4)
    assert chosen.turned_down(row(1, **outside)) == (scale if scale is None else pytest.approx(scale))


def test_operators_that_stay_outside_are_given_up() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    chosen = Selection(
        lambda step, scale=1.0: row(step, kl=0.3 * (step > 0), scale=scale),
        every=9,
        steps=1,
        limits=Limits(kl_budget=0.1),
    )
    learn(trainer, 1, chosen)
    assert [r.step for r in chosen.history] == [0, *[1] * (1 + Selection.TRIES)]
    assert chosen.best.step == 0


def test_an_interrupted_run_measures_the_same_steps() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    first = Selection(row, every=2, steps=6, limits=Limits(kl_budget=0.1))
    learn(trainer, 3, first)  # stops at 3, which is no step to measure
    assert [r.step for r in first.history] == [0, 2]
    tensors, facts = first.state()
    second = Selection(row, every=2, steps=6, limits=Limits(kl_budget=0.1))
    second.restore(tensors, json.loads(json.dumps(facts)))
    assert (second.best, second.history) == (first.best, first.history)
    learn(trainer, 3, second)
    assert [r.step for r in second.history] == [0, 2, 4, 6]


def test_measurements_are_records_of_their_own(tmp_path: Path) -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    trainer.set_logger(Logger(None, [JsonLines(tmp_path / "metrics.jsonl")]))
    chosen = Selection(lambda step: row(step, accuracy=math.nan), every=2, steps=3, limits=Limits(kl_budget=0.1))
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
    progress.close()
    assert progress.bar.n == 3
    assert "step 1/5" not in stderr.text
    again = Progress(5)
    learn(trainer, 2, again)
    again.close()
    assert (again.bar.initial, again.bar.n) == (3, 5)
    last = stderr.text.split("\r")[-1]
    assert "5/5" in last
    assert "<00:00" in last  # left
    assert "running_bias=" in last


# Saving


class Saves(Checkpoints):
    """Notes the steps at which the state is saved."""

    def __init__(self, every: int) -> None:
        self.steps: list[int] = []
        super().__init__(lambda: self.steps.append(self.model.steps_done), every)


def test_saved_every_few_steps_and_where_something_is_due() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    saves = Saves(3)
    chosen = Selection(
        row, every=4, steps=9, limits=Limits(kl_budget=0.1), on_measured=lambda *_: setattr(saves, "due", True)
    )
    learn(trainer, 9, CallbackList([chosen, saves]))
    assert saves.steps == [0, 3, 4, 6, 8, 9]  # 0, 4, 8 and the last were measured
    learn(trainer, 1, CallbackList([saves]))
    assert saves.steps[6:] == [9]


def test_nothing_is_saved_over_while_steps_are_skipped() -> None:
    trainer = make_trainer(learning_rate=0.01, ambiguous=4)
    saves = Saves(1)

    class Skips(Progress):
        def _on_rollout_start(self) -> None:
            self.model.skipped_in_a_row = int(self.model.steps_done in (2, 3))
            saves.due = self.model.steps_done == 3

    learn(trainer, 6, CallbackList([Skips(9, quiet=True), saves]))
    assert saves.steps == [1, 4, 5]
    assert not saves.due
