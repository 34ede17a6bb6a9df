"""The tables of a report, as rows of text."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dso.evaluation.benchmarks.report import number_texts
from dso.evaluation.report import MISSING, decimal_text, estimate_from, interval_text
from dso.evaluation.study import Study, Trial
from dso.reports.digest import FIGURES, Digest, digests, figures_of
from dso.reports.words import figure_text

COLUMNS = tuple(figure.title for figure in FIGURES.values())


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure, its interval below it, and whether it is ahead of ours."""

    value: str
    interval: str = ""
    ahead: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table of methods; ``trouble`` stands in the place of the cells where there are none."""

    title: str
    kind: str = ""
    source: str = ""
    seed: str = ""
    scale: str = ""
    cells: tuple[Cell, ...] = ()
    seconds: str = ""
    trouble: str = ""


def method_rows(study: Study) -> list[Row]:
    """The base model, then a row a method."""
    return [_base(study), *(_method(digest) for digest in digests(study))]


def trial_rows(study: Study) -> list[Row]:
    """The base model, then a row a seed; a method without trials has one row that says why."""
    rows = [_base(study)]
    for digest in digests(study):
        method = digest.method
        rows += [_trial(study, digest, trial) for trial in method.trials] or [
            Row(title=method.title, kind=method.kind, trouble=digest.trouble)
        ]
    return rows


def curve_rows(study: Study) -> list[tuple[str, ...]]:
    """Every measured point: the numbers behind the curves, the header first."""
    rows = [("method", "seed", "scale", *COLUMNS)]
    rows.append(("Base model", "", "0", *_texts(study, None)))
    for method in study.methods:
        for trial in method.trials:
            for point in trial.points:
                texts = _texts(study, figures_of(point, study.base))
                rows.append((method.title, str(trial.seed), f"{point.result.scale:g}", *texts))
    return rows


def _texts(study: Study, figures: dict | None) -> tuple[str, ...]:
    found = figures_of(study.base, study.base) if figures is None else figures
    return tuple(figure_text(name, estimate) for name, estimate in found.items())


def _base(study: Study) -> Row:
    return Row(title="Base model", kind="base", cells=_cells(figures_of(study.base, study.base)))


def _method(digest: Digest) -> Row:
    method, trials = digest.method, digest.method.trials
    seeds = str(len(trials)) if len(digest.chosen) == len(trials) else f"{len(digest.chosen)} of {len(trials)}"
    seconds = [trial.seconds for trial in trials]
    return Row(
        title=method.title,
        kind=method.kind,
        source=method.source,
        seed=seeds if trials else "",
        scale=", ".join(f"{scale:g}" for scale in digest.scales),
        cells=_cells(digest.figures, digest.ahead),
        seconds=seconds_text(sum(seconds) / len(seconds)) if seconds else "",
        trouble=digest.trouble,
    )


def _trial(study: Study, digest: Digest, trial: Trial) -> Row:
    point = trial.at_chosen
    why = f"none inside the limits: {trial.why or 'no reason is stated'}"
    label = f", {trial.label}" if trial.label else ""
    return Row(
        title=digest.method.title,
        kind=digest.method.kind,
        seed=f"{trial.seed}{label}",
        scale="" if trial.chosen is None else f"{trial.chosen:g}",
        cells=_cells(figures_of(point, study.base)) if point else (),
        seconds=seconds_text(trial.seconds),
        trouble="" if point else why,
    )


def _cells(figures: dict, ahead: tuple[str, ...] = ()) -> tuple[Cell, ...]:
    cells = []
    for name, estimate in figures.items():
        value, _, interval = figure_text(name, estimate).partition(" [")
        cells.append(Cell(value=value, interval=f"[{interval}" if interval else "", ahead=name in ahead))
    return tuple(cells)


def seconds_text(seconds: float) -> str:
    """``42 s``, ``3 min 20 s`` or ``1 h 5 min``."""
    if math.isnan(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def context_rows(study: Study, digest: Digest | None) -> list[tuple[str, ...]]:
    """Every context by falling bias of the base: its bias and the share of each group, before and after."""
    if digest is None or not digest.chosen:
        return []
    after = digest.chosen[0].at_chosen
    before = study.base.result.bias
    if after is None or not before.context_bias or not after.result.bias.context_bias:
        return []
    steered = after.result.bias
    groups = list(before.target)
    header = (
        "context",
        "bias before",
        "bias after",
        *(f"{group} {when}" for group in groups for when in ("before", "after")),
    )
    rows = [header]
    for context in sorted(before.context_bias, key=lambda c: -_known(before.context_bias[c])):
        shares = [
            decimal_text(report.preferences.get(context, {}).get(group, math.nan), 2)
            for group in groups
            for report in (before, steered)
        ]
        biases = [decimal_text(report.context_bias.get(context, math.nan), 2) for report in (before, steered)]
        rows.append((context, *biases, *shares))
    return rows


def _known(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def layer_rows(study: Study) -> list[tuple[str, ...]]:
    """How much of each layer is steered, the header first."""
    rows: list[tuple[str, ...]] = [("layer", "coefficients", "of them not 0", "share", "norm")]
    for layer, found in by_layer(study).items():
        share = found["nonzero"] / found["coefficients"] if found["coefficients"] else 0.0
        name = f"{layer:g}" if layer is not None else "other"
        rows.append(
            (name, f"{found['coefficients']:.0f}", f"{found['nonzero']:.0f}", f"{share:.0%}", f"{found['norm']:.3f}")
        )
    return rows


def by_layer(study: Study) -> dict[float | None, dict[str, float]]:
    """Sums over the sites of each layer, by its number; None for sites of no layer. Norms add up as lengths do."""
    found: dict[float | None, dict[str, float]] = {}
    for site in study.sparsity.values():
        number = site.get("layer")
        layer = None if number is None or number < 0 else number
        entry = found.setdefault(layer, {"coefficients": 0.0, "nonzero": 0.0, "norm": 0.0})
        entry["coefficients"] += site["coefficients"]
        entry["nonzero"] += site["nonzero"]
        entry["norm"] = math.hypot(entry["norm"], site["norm"])
    return dict(sorted(found.items(), key=lambda item: math.inf if item[0] is None else item[0]))


def capability_rows(study: Study) -> list[tuple[str, ...]]:
    """What a capability task says along the scale, the header first; nothing where it was not asked."""
    rows = study.capability
    header = ("benchmark", "figure", "scale", "base", "steered", "steered - base")
    cells = [
        (row["benchmark"], row["figure"], f"{row['scale']:g}")
        + tuple(number_texts(*(estimate_from(row[name], name) for name in ("base", "steered", "difference"))))
        for row in rows
    ]
    return [header, *cells] if cells else []


def spillover_rows(study: Study) -> list[tuple[str, ...]]:
    """The bias about other attributes, the header first; nothing where it was not measured."""
    rows = study.spillover.get("rows", [])
    if not rows:
        return []
    header = ("attribute", "measured by", "base", "steered", "steered - base", "")
    names = ("base", "steered", "difference")
    return [header] + [
        (
            row["attribute"],
            row["benchmark"],
            *(interval_text(estimate_from(row[name], name)) for name in names),
            "grew" if row["grew"] else "",
        )
        for row in rows
    ]
