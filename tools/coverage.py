"""How often the intervals of bias hold the truth, simulated and on resampled real answers: ``python -m
tools.coverage``.

Simulated answers are log-odds (of G groups: centred log-ratios) that add up from a context's effect, the liking for the
people and a rest, so that probabilities stay inside 0 and 1. Effects are given in units of the log-odds over G, which
is about what they are in probability. What is true of the probabilities is their mean over a large sample of people.
Real answers are those of a model to every couple in every context; couples are drawn from them with replacement, and
the truth is that of all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dso.decisions.decision import DecisionSet
from dso.decisions.sets import load_decisions
from dso.evaluation.bias import bias_parts, lay_out
from dso.evaluation.comparison import scale_rows
from dso.evaluation.intervals import Estimate, share_estimate
from dso.evaluation.report import fixed_rows
from dso.evaluation.twoway import Array, Cells, Mask, fit, fit_both
from dso.files import write_text

REST = 0.15  # sd of what is left of a cell
SCALES = ("probability", "log-odds")
Truth = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """One simulated layout; effects are sizes, ``context`` that of the contexts' differences.

    ``design`` is ``full`` (every unit in every context), ``thin`` (each unit in every third context), ``missing``
    (three in ten cells are not there) or ``alone`` (every cell has a unit of its own, in unequal numbers).
    """

    contexts: int
    units: int
    liking: float
    common: float
    groups: int = 2
    context: float = 0.1
    design: str = "full"


def settings() -> list[Setting]:
    """The grid, with layouts that are not balanced and models that have no association."""
    grid = itertools.product((8, 30), (8, 22, 48, 106), (0.0, 0.1, 0.3), (0.0, 0.04), (2, 4))
    unbalanced = itertools.product((8, 30), (22, 48), (0.1, 0.3), (0.0, 0.04), ("thin", "missing", "alone"))
    small = itertools.product((22, 106), (0.1, 0.3), (0.0, 0.03))
    return [
        *(Setting(c, u, liking, common, groups) for c, u, liking, common, groups in grid),
        *(Setting(c, u, liking, common, design=design) for c, u, liking, common, design in unbalanced),
        *(Setting(30, u, liking, 0.0, context=context) for u, liking, context in small),
    ]


class Simulation:
    """Draws of people for one setting, and what is true of it on both scales."""

    PEOPLE = 20_000

    def __init__(self, setting: Setting):
        self.setting = setting
        groups = setting.groups
        effects = _centred(
            np.random.default_rng([setting.contexts, groups]).standard_normal((setting.contexts, groups))
        )
        effects -= effects.mean(axis=0)
        effects *= setting.context / _size(effects)
        common = _centred(np.eye(groups)[0])
        self.log_odds = groups * (effects + setting.common * common / _size(common))
        self.signs = np.sign(effects)
        self.scale = groups / math.sqrt(2 * (groups - 1))  # sd of a component of noise of size 1
        self.seen = _seen(setting)
        noise = self.scale * math.hypot(setting.liking, REST)
        people = noise * np.random.default_rng(1).standard_normal((self.PEOPLE, groups))
        shares = [(_softmax(row + people) + _softmax(row - people)).mean(axis=0) / 2 for row in self.log_odds]
        self.truths = [truth(theta, self.signs) for theta in (np.stack(shares) - 1 / groups, self.log_odds)]

    def draw(self, rng: np.random.Generator) -> tuple[Cells, Cells]:
        """A sample of people: the cells in probability and in log-odds."""
        s, (unit, context) = self.setting, np.nonzero(self.seen)
        if s.design == "alone":
            unit = np.arange(len(unit))
        liking = s.liking * self.scale * rng.standard_normal((unit.max() + 1, s.groups))[unit]
        rest = REST * self.scale * rng.standard_normal((len(unit), s.groups))
        log_odds = _centred(self.log_odds[context] + liking + rest)
        deviation = _softmax(log_odds) - 1 / s.groups
        return Cells(context, unit, deviation, s.contexts), Cells(context, unit, log_odds, s.contexts)


class Tally:
    """How often intervals held the truth, how often it lay above them, and how wide they were."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], list[tuple[bool, bool, float]]] = {}

    def add(self, scale: str, figure: str, estimate: Estimate | None, wanted: float) -> None:
        """Count one interval; an end that is nan is open."""
        if estimate is None:
            return
        below, above = estimate.low > wanted, estimate.high < wanted
        width = estimate.high - estimate.low
        self.found.setdefault((scale, figure), []).append((not (below or above), above, width))

    def rows(self) -> list[dict]:
        """One row a figure."""
        return [
            {
                "scale": scale,
                "figure": figure,
                "covered": float(np.mean([held for held, _, _ in found])),
                "above": float(np.mean([above for _, above, _ in found])),
                "width": float(np.median([width for _, _, width in found])),
            }
            for (scale, figure), found in self.found.items()
        ]


def simulate(setting: Setting, repeats: int, draws: int, seed: int = 0) -> list[dict]:
    """The coverage of one setting, a row a figure."""
    simulation, rng, tally = Simulation(setting), np.random.default_rng(seed), Tally()
    for repeat in range(repeats):
        for scale, cells, wanted in zip(SCALES, simulation.draw(rng), simulation.truths, strict=True):
            parts = bias_parts(fit(cells), simulation.signs, draws, repeat)
            for figure, value in wanted.items():
                tally.add(scale, figure, getattr(parts, figure), value)
    return [asdict(setting) | row for row in tally.rows()]


def resample(
    base: Array, steered: Array | None, decisions: DecisionSet, units: int, repeats: int, draws: int, seed: int = 0
) -> list[dict]:
    """The coverage of the base's figures, and of the cuts, for couples drawn from those of real answers."""
    layout, table, _ = lay_out(base, decisions)
    tables = [table] if steered is None else [table, lay_out(steered, decisions)[1]]
    answers = {
        scale: [_dense(found(each), layout.units) for each in tables]
        for scale, found in zip(SCALES, (layout.probability, layout.log_odds), strict=True)
    }
    context, unit = (grid.ravel() for grid in np.meshgrid(np.arange(len(layout.contexts)), np.arange(units)))
    rng, tally = np.random.default_rng(seed), Tally()
    for repeat in range(repeats):
        people = rng.integers(layout.units, size=units)
        for scale, both in answers.items():
            cells = [Cells(context, unit, v[people].reshape(len(unit), -1), len(layout.contexts)) for v in both]
            truths = [truth(values.mean(axis=0), layout.signs) for values in both]
            parts = bias_parts(fit(cells[0]), layout.signs, draws, repeat)
            for figure, value in truths[0].items():
                tally.add(scale, figure, getattr(parts, figure), value)
            if steered is not None:
                rows = scale_rows(*fit_both(cells[0], cells[1]), layout.signs, draws, repeat)
                for name, row in rows.items():
                    figure = name.replace(" ", "_")
                    tally.add(scale, f"cut of {figure}", row.cut, 1 - truths[1][figure] / truths[0][figure])
    return [{"units": units, **row} for row in tally.rows()]


def shares(repeats: int, seed: int = 0) -> list[dict]:
    """The coverage of a share's interval: units of 4 decisions that are right with probabilities of their own."""
    rows = []
    for units, mean, alike in itertools.product((8, 22, 80), (0.5, 0.75, 0.95), (0.01, 0.2, 0.5)):
        rng, tally = np.random.default_rng(seed), Tally()
        size = 1 / alike - 1  # of a beta distribution whose units correlate by ``alike``
        for _ in range(repeats):
            right = rng.binomial(4, rng.beta(mean * size, (1 - mean) * size, units))
            tally.add("share", "accuracy", share_estimate(right, np.full(units, 4)), mean)
        rows += [{"units": units, "share": mean, "alike": alike, **row} for row in tally.rows()]
    return rows


def truth(theta: Array, signs: Array) -> dict[str, float]:
    """The figures of known ``theta`` (C, G)."""
    mean = theta.mean(axis=0)
    found = {"bias": _size(theta), "context_part": _size(theta - mean), "common_part": _size(mean)}
    if theta.shape[1] == 2:
        found |= {"common_part": float(mean[0] - mean[1]), "gap": float((signs * theta).sum(axis=1).mean())}
    return found


def summary(rows: Iterable[dict], keys: Sequence[str]) -> str:
    """The least, mean and most coverage, and the most truths above the upper end, by scale, figure and ``keys``."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    cells = [(*keys, "settings", "covered: least", "mean", "most", "above: most")]
    for names, own in groups.items():
        covered = [row["covered"] for row in own]
        figures = (min(covered), sum(covered) / len(covered), max(covered), max(row["above"] for row in own))
        cells.append((*names, str(len(own)), *(f"{figure:.3f}" for figure in figures)))
    return fixed_rows(cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, print its tables and keep every row."""
    parser = argparse.ArgumentParser(prog="python -m tools.coverage", description=__doc__)
    parser.add_argument("--repeats", type=int, default=1000, help="samples a setting (default: 1000)")
    parser.add_argument("--draws", type=int, default=400, help="resamples an interval (default: 400)")
    parser.add_argument("--base", help="answers of a base model to the test split of 'roles': an .npz with 'policy'")
    parser.add_argument("--steered", help="the same of a steering, for the cuts")
    parser.add_argument("--results", default="docs/results/coverage.json", help="file to write")
    arguments = parser.parse_args(argv)
    record: dict[str, list[dict]] = {"simulated": [], "shares": shares(arguments.repeats), "real": []}
    for setting in settings():
        record["simulated"] += simulate(setting, arguments.repeats, arguments.draws)
    if arguments.base:
        data = load_decisions("roles", splits=["test"]).select(split="test")
        base, steered = (np.load(path)["policy"] if path else None for path in (arguments.base, arguments.steered))
        for units in (8, 22, 48, 106):
            record["real"] += resample(base, steered, data, units, arguments.repeats, arguments.draws)
    write_text(Path(arguments.results), as_text(record))
    print(tables(record), end="")


def as_text(record: Mapping[str, list[dict]]) -> str:
    """The record as JSON, a line a row, to four digits."""
    parts = []
    for name, rows in record.items():
        rounded = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        lines = ",\n".join(json.dumps(row) for row in rounded)
        parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return "{" + ",\n".join(parts) + "}\n"


def tables(record: Mapping[str, list[dict]]) -> str:
    """The study as text."""
    parts = [
        summary([row for row in record["simulated"] if row["design"] == "full"], ("groups", "scale", "figure")),
        summary([row for row in record["simulated"] if row["design"] != "full"], ("design", "scale", "figure")),
        summary(record["shares"], ("units", "figure")),
    ]
    return "\n".join([*parts, *([summary(record["real"], ("units", "scale", "figure"))] if record["real"] else [])])


def _seen(setting: Setting) -> Mask:
    unit, context = np.mgrid[: setting.units, : setting.contexts]
    if setting.design == "thin":
        return (unit + context) % 3 == 0
    if setting.design == "missing":
        kept = np.random.default_rng(2).random(unit.shape) < 0.7
        kept[:2] = True
        return kept
    if setting.design == "alone":
        return unit < np.maximum(2, setting.units * (1 + context % 4) // 4)
    return np.ones(unit.shape, dtype=bool)


def _dense(cells: Cells | None, units: int) -> Array:
    """(units, contexts, G) from a layout in which every unit is met in every context."""
    if cells is None or len(cells.unit) != units * cells.contexts:
        raise SystemExit("real answers must be of every unit in every context, and none may be 0")
    values = np.zeros((units, cells.contexts, cells.values.shape[1]))
    values[cells.unit, cells.context] = cells.values
    return values


def _softmax(values: Array) -> Array:
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _centred(values: Array) -> Array:
    return values - values.mean(axis=-1, keepdims=True)


def _size(theta: Array) -> float:
    return math.sqrt(2 * float((np.atleast_2d(theta) ** 2).sum(axis=1).mean()))


if __name__ == "__main__":
    main()
