"""A method's seeds as one row: the mean of each figure at the scales chosen on validation, and where it is ahead.

Over several seeds an interval goes from the lowest to the highest end of the seeds' own 95% intervals, which is wider
than the mean's; of a figure without intervals it is the range of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.study import Method, Point, Study, Trial

PLACES = 3  # by which figures are shown, so that nobody is ahead by less


class Figure(NamedTuple):
    """One figure of a point.

    Attributes:
        title: at the head of its column.
        of: reads it from a point and the base's.
        better: -1 where less of it is better, 1 where more is, 0 where it is not ranked by.
        percent: whether it is shown as a percentage.
    """

    title: str
    of: Callable[[Point, Point], Estimate]
    better: int = 0
    percent: bool = False


def _plain(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan)


def _mass(point: Point, base: Point) -> Estimate:
    before = base.result.answer_mass
    return _plain(point.result.answer_mass / before if before else math.nan)


def _cut(point: Point) -> Estimate:
    return point.result.cut.bias if point.result.cut else UNMEASURED


def _log_odds_cut(point: Point) -> Estimate:
    return point.result.cut.log_odds if point.result.cut else UNMEASURED


FIGURES: dict[str, Figure] = {
    "bias": Figure("bias", lambda p, _: p.result.bias.bias, -1),
    "cut": Figure("cut", lambda p, _: _cut(p), percent=True),
    "log_odds": Figure("bias in log-odds", lambda p, _: p.result.bias.log_odds.bias, -1),
    "log_odds_cut": Figure("cut in log-odds", lambda p, _: _log_odds_cut(p), percent=True),
    "order": Figure("order effect", lambda p, _: _plain(p.result.bias.order_effect)),
    "accuracy": Figure("accuracy", lambda p, _: p.result.accuracy, 1),
    "mass": Figure("answer mass", _mass),
    "kl": Figure("KL", lambda p, _: _plain(p.result.kl)),
    "neutral_kl": Figure("neutral KL", lambda p, _: _plain(p.neutral_kl), -1),
    "perplexity": Figure("perplexity", lambda p, _: p.perplexity, -1, percent=True),
}
BIASES = ("bias", "log_odds")
COSTS = ("accuracy", "neutral_kl", "perplexity")


def figures_of(point: Point, base: Point) -> dict[str, Estimate]:
    """Every figure of a point by its name in :data:`FIGURES`."""
    return {name: figure.of(point, base) for name, figure in FIGURES.items()}


@dataclass(frozen=True, kw_only=True)
class Digest:
    """A method at the scales that its seeds chose.

    Attributes:
        method: with its trials.
        chosen: the trials that chose a scale.
        figures: over those, by the name in :data:`FIGURES`; empty where there are none.
        ahead: names of the figures by which it is ahead of ours.
    """

    method: Method
    chosen: tuple[Trial, ...]
    figures: dict[str, Estimate]
    ahead: tuple[str, ...] = ()

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales that were chosen, each once."""
        return tuple(sorted({trial.chosen for trial in self.chosen if trial.chosen is not None}))

    @property
    def trouble(self) -> str:
        """Why there are no figures, in words; empty where there are."""
        if self.figures:
            return ""
        if self.method.failed or not self.method.trials:
            return f"failed: {self.method.failed or 'it has no trials'}"
        whys = dict.fromkeys(trial.why for trial in self.method.trials if trial.why)
        return f"none inside the limits: {'; '.join(whys) or 'no reason is stated'}"


def digests(study: Study) -> tuple[Digest, ...]:
    """Every method in the study's order; rivals and ablations say where they are ahead of ours."""
    found = tuple(_digest(method, study.base) for method in study.methods)
    ours = ours_of(found)
    if ours is None or not ours.figures:
        return found
    return tuple(
        Digest(method=d.method, chosen=d.chosen, figures=d.figures, ahead=_ahead(d, ours))
        if d.method.kind in ("rival", "ablation") and d.figures
        else d
        for d in found
    )


def ours_of(found: Iterable[Digest]) -> Digest | None:
    """What the study is about: its first method of ours."""
    return next((digest for digest in found if digest.method.kind == "ours"), None)


def apart(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals have no number in common; never where one is open."""
    return one.high < other.low or other.high < one.low


def _digest(method: Method, base: Point) -> Digest:
    chosen = tuple(trial for trial in method.trials if trial.at_chosen is not None)
    each = [figures_of(trial.at_chosen, base) for trial in chosen if trial.at_chosen is not None]
    figures = {name: over_seeds([figures[name] for figures in each]) for name in FIGURES} if each else {}
    return Digest(method=method, chosen=chosen, figures=figures)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of what was measured, with its interval as the module's docstring says; an open end stays open."""
    known = [estimate for estimate in estimates if not math.isnan(estimate.value)]
    if not known:
        return UNMEASURED
    if len(known) == 1:
        return known[0]
    values = [estimate.value for estimate in known]
    bare = all(math.isnan(estimate.low) and math.isnan(estimate.high) for estimate in known)
    lows, highs = (values, values) if bare else ([e.low for e in known], [e.high for e in known])
    return Estimate(
        sum(values) / len(values),
        math.nan if any(map(math.isnan, lows)) else min(lows),
        math.nan if any(map(math.isnan, highs)) else max(highs),
    )


def _ahead(one: Digest, ours: Digest) -> tuple[str, ...]:
    return tuple(
        name
        for name in (*BIASES, *COSTS)
        # False where either is nan.
        if FIGURES[name].better * round(one.figures[name].value - ours.figures[name].value, PLACES) > 0
    )
