"""The plots of a report, each from a study alone. They are made within :func:`dso.reports.drawing.draw`.

Methods are told apart by the shapes of their points as well as by colour.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dso.evaluation.figure import BLUE, GREY, RED
from dso.evaluation.intervals import Estimate
from dso.evaluation.study import Method, Study
from dso.reports.digest import FIGURES, Digest, figures_of, over_seeds
from dso.reports.tables import by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = 7.4  # inches; a page shows them at 680 pixels or more, so that 10.5 points are 14 pixels or more
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5C00", "#000000")  # Okabe and Ito, and a brown
MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8")
MOST_CONTEXTS = 40
PANEL = 3.6  # inches, of a plot without its legend
TALLEST = 20.0  # inches, while it is not known what a legend needs
LEGEND = 34  # characters of a line of it
SMALL = 3  # plots beside each other
BEYOND = 5  # an axis of KL ends at so many times the largest KL that validation chose


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method's line looks."""

    color: str
    marker: str
    style: str
    width: float
    order: int


def looks(methods: Sequence[Method]) -> dict[str, Look]:
    """A look for each method by its name: ours thick and blue, ablations dashed, the null grey."""
    found: dict[str, Look] = {}
    others = 0
    for method in methods:
        if method.kind == "ours" and not any(look.color == BLUE for look in found.values()):
            found[method.name] = Look(color=BLUE, marker="o", style="-", width=3.0, order=5)
        elif method.kind == "null":
            found[method.name] = Look(color=GREY, marker="", style=":", width=1.5, order=1)
        else:
            color, marker = COLOURS[others % len(COLOURS)], MARKERS[others % len(MARKERS)]
            style = "--" if method.kind == "ablation" else "-"
            found[method.name] = Look(color=color, marker=marker, style=style, width=1.3, order=3)
            others += 1
    return found


def new_figure(height: float) -> Figure:
    """A figure of the page's width."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(WIDE, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.05))


def curve(study: Study, method: Method) -> list[dict[str, Estimate]]:
    """The method's figures by rising scale, with ``scale`` among them: over the seeds that measured that scale, of the
    scales that all of them measured; of a method whose seeds share none, each seed's own."""
    scales = [[point.result.scale for point in trial.points] for trial in method.trials if trial.points]
    shared = sorted(set(scales[0]).intersection(*scales[1:])) if scales else []
    rows = []
    for scale in shared or sorted({scale for own in scales for scale in own}):
        points = [p for trial in method.trials for p in trial.points if p.result.scale == scale]
        each = [figures_of(point, study.base) for point in points]
        rows.append(
            {name: over_seeds([f[name] for f in each]) for name in FIGURES} | {"scale": Estimate(scale, scale, scale)}
        )
    return rows


def pareto(study: Study, digests: Sequence[Digest], bias: str) -> Figure:
    """Bias against what it costs, a curve a method along its scale; the null as a band."""
    costs = [cost for cost in ("neutral_kl", "accuracy") if _measured(study, cost)] or ["kl"]
    figure = new_figure(TALLEST)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    styles = looks(study.methods)
    for axes, cost in zip(panels, costs, strict=True):
        _pareto_panel(axes, study, digests, styles, bias, cost)
    panels[0].set_ylabel(f"{FIGURES[bias].title} (less is fairer)")
    panels[0].set_ylim(bottom=0)
    entries, names = panels[0].get_legend_handles_labels()
    labels = [textwrap.fill(name, LEGEND) for name in names]  # two columns of them have to fit the figure
    legend = figure.legend(entries, labels, loc="outside lower center", ncols=2, columnspacing=1.5, handlelength=2.2)
    figure.draw_without_rendering()  # what the legend needs is known then, and is not taken from the panels
    figure.set_figheight(PANEL + legend.get_window_extent().height / figure.dpi)
    return figure


def _measured(study: Study, name: str) -> bool:
    points = (point for method in study.methods for trial in method.trials for point in trial.points)
    return any(not math.isnan(figures_of(point, study.base)[name].value) for point in points)


def _pareto_panel(
    axes: Axes, study: Study, digests: Sequence[Digest], styles: dict[str, Look], bias: str, cost: str
) -> None:
    base = figures_of(study.base, study.base)
    start = 0.0 if cost in ("neutral_kl", "kl") else base[cost].value
    if cost == "accuracy":
        axes.set_xlabel("accuracy, unambiguous (more is better)")
    else:
        axes.set_xlabel(f"{FIGURES[cost].title} in nats (less is better)")
    axes.axhline(base[bias].value, color=GREY, lw=0.8, ls=":")
    for digest in digests:
        look = styles[digest.method.name]
        rows = [row for row in curve(study, digest.method) if not math.isnan(row[cost].value + row[bias].value)]
        if digest.method.kind == "null":
            _band(axes, digest, rows, start, base[bias].value, bias, cost)
            continue
        x, y = [start, *(row[cost].value for row in rows)], [base[bias].value, *(row[bias].value for row in rows)]
        title = digest.method.title if digest.figures else f"{digest.method.title} ({digest.trouble.split(':')[0]})"
        axes.plot(
            x, y, color=look.color, ls=look.style, lw=look.width, marker=look.marker, ms=5, markevery=slice(1, None),
            zorder=look.order, alpha=1 if digest.figures else 0.4, label=title,
        )  # fmt: skip
        if digest.figures:
            _chosen(axes, digest.figures[cost], digest.figures[bias], look)
    axes.plot([start], [base[bias].value], "*", color="black", ms=13, zorder=6, label="Base model")
    if cost != "accuracy":
        shown = [digest for digest in digests if digest.figures and digest.method.kind != "null"]
        _end(axes, [digest.figures[cost].value for digest in shown])


def _end(axes: Axes, chosen: Sequence[float]) -> None:
    """Ends an axis of KL near what validation chose, as a curve that explodes would press all others flat."""
    end = BEYOND * max((value for value in chosen if not math.isnan(value)), default=0.0)
    if 0 < end < axes.get_xlim()[1]:
        axes.set_xlim(-0.05 * end, end)
        axes.set_xlabel(f"{axes.get_xlabel()}, up to {end:.2g}")


def _chosen(axes: Axes, x: Estimate, y: Estimate, look: Look) -> None:
    """The point that validation chose, with its intervals."""
    if math.isnan(x.value + y.value):
        return
    axes.errorbar(
        [x.value], [y.value], xerr=_reach(x), yerr=_reach(y), color=look.color, marker=look.marker, ms=9, mec="white",
        mew=0.8, lw=0.9, capsize=2, zorder=look.order + 1,
    )  # fmt: skip


def _reach(estimate: Estimate) -> list[list[float]]:
    ends = (estimate.value - estimate.low, estimate.high - estimate.value)
    return [[0.0 if math.isnan(end) else max(end, 0.0)] for end in ends]


def _band(
    axes: Axes, digest: Digest, rows: Sequence[dict[str, Estimate]], x0: float, y0: float, bias: str, cost: str
) -> None:
    """The null: from the lowest to the highest draw along the scale."""
    if not rows:
        return
    spread = [
        [p.result.bias for t in digest.method.trials for p in t.points if p.result.scale == r["scale"].value]
        for r in rows
    ]
    values = [[(b.probability if bias == "bias" else b.log_odds).bias.value for b in biases] for biases in spread]
    ends = sorted(
        [(x0, y0, y0), *((row[cost].value, min(own), max(own)) for row, own in zip(rows, values, strict=True))]
    )
    x, low, high = zip(*ends, strict=True)
    axes.fill_between(x, low, high, color=GREY, alpha=0.3, lw=0, zorder=1, label=f"{digest.method.title} (range)")


def curves(study: Study, digests: Sequence[Digest]) -> Figure:
    """Bias and order effect along the scale, a small plot a method."""
    shown = [(digest, rows) for digest in digests if (rows := curve(study, digest.method))]
    lines = math.ceil(len(shown) / SMALL)
    figure = new_figure(0.7 + 1.75 * lines)
    panels = figure.subplots(lines, SMALL, sharey=True, squeeze=False).flatten()
    base = figures_of(study.base, study.base)
    highest = [base["bias"], *(row["bias"] for _, rows in shown for row in rows)]
    for axes, (digest, rows) in zip(panels, shown, strict=False):
        _curve_panel(axes, digest, rows, base)
    panels[0].set_ylim(0, 1.1 * max([0.01, *(value for bias in highest for value in bias if not math.isnan(value))]))
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    entries, labels = panels[0].get_legend_handles_labels()
    figure.legend(entries, labels, loc="outside upper left", ncols=3)
    figure.supxlabel("scale (0: base model; a scale of one method is not that of another)", fontsize=10.5)
    return figure


def _curve_panel(axes: Axes, digest: Digest, rows: Sequence[dict[str, Estimate]], base: dict[str, Estimate]) -> None:
    x = [0.0, *(row["scale"].value for row in rows)]
    bias = [base["bias"], *(row["bias"] for row in rows)]
    ratio = base["bias"].value / base["log_odds"].value if base["log_odds"].value else math.nan
    odds = [ratio * value.value for value in (base["log_odds"], *(row["log_odds"] for row in rows))]
    axes.fill_between(x, [b.low for b in bias], [b.high for b in bias], color=BLUE, alpha=0.2, lw=0)
    axes.plot(x, [b.value for b in bias], "o-", color=BLUE, ms=4, lw=2, label="probability, 95% interval")
    axes.plot(x, odds, "s--", color=RED, ms=3.5, lw=1.3, label="log-odds, drawn from the same base")
    for scale in digest.scales:
        axes.axvline(scale, color=GREY, lw=1, ls=":", label="chosen scale" if scale == digest.scales[0] else None)
    axes.set_title(textwrap.fill(digest.method.title, 24), fontsize=10)
    axes.set_xlim(left=0)


def contexts(study: Study, digest: Digest) -> Figure:
    """The bias of each context before and after, the most biased ones first."""
    before, after = _before_and_after(study, digest)
    names = _most_biased(study)
    figure = new_figure(1.0 + 0.3 * len(names))
    axes = figure.subplots()
    place = list(range(len(names)))
    axes.barh([p - 0.2 for p in place], [before.context_bias[c] for c in names], 0.4, color=GREY, label="base model")
    steered = [after.context_bias.get(c, math.nan) for c in names]
    axes.barh([p + 0.2 for p in place], steered, 0.4, color=BLUE, label=f"steered, {_scale_of(digest)}")
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("bias in the context, noise included")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def preferences(study: Study, digest: Digest) -> Figure:
    """The share of each group in each context, less its fair share, base beside steered."""
    import numpy as np

    before, after = _before_and_after(study, digest)
    names, groups = _most_biased(study), list(before.target)
    figure = new_figure(1.4 + 0.3 * len(names))
    panels = figure.subplots(1, 2, sharey=True)
    image: Any = None
    for axes, report, title in zip(
        panels, (before, after), ("Base model", f"Steered, {_scale_of(digest)}"), strict=True
    ):
        share = np.array([[report.preferences[c].get(g, math.nan) for g in groups] for c in names])
        image = axes.imshow(share - [report.target[g] for g in groups], cmap="PuOr", vmin=-0.5, vmax=0.5, aspect="auto")
        axes.set_title(title)
        axes.set_xticks(range(len(groups)), groups, rotation=0 if len(groups) < 4 else 30)
        axes.set_yticks(range(len(names)), names)
        axes.grid(visible=False)
        for (row, column), value in np.ndenumerate(share):
            dark = abs(value - report.target[groups[column]]) > 0.32
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=9.5, color="white" if dark else "black"
            )
    figure.colorbar(
        image, ax=panels, location="bottom", shrink=0.6, aspect=40, label="share of the group less its fair share"
    )
    return figure


def sparsity(study: Study) -> Figure:
    """How much of each layer is steered, and how strongly."""
    layers = by_layer(study)
    names = ["other" if layer is None else f"{layer:g}" for layer in layers]
    figure = new_figure(4.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    place = range(len(names))
    top.bar(
        place, [e["nonzero"] / e["coefficients"] if e["coefficients"] else 0.0 for e in layers.values()], color=BLUE
    )
    top.set_ylim(0, 1)
    top.set_title("Share of coefficients that are not 0")
    bottom.bar(place, [e["norm"] for e in layers.values()], color=RED)
    bottom.set_title("Norm of the coefficients")
    every = max(1, math.ceil(len(names) / 20))
    bottom.set_xticks(list(place)[::every], names[::every])
    bottom.set_xlabel("layer")
    return figure


def _before_and_after(study: Study, digest: Digest) -> tuple[Any, Any]:
    after = digest.chosen[0].at_chosen
    assert after is not None  # a digest's chosen trials have their point
    return study.base.result.bias, after.result.bias


def _scale_of(digest: Digest) -> str:
    trial = digest.chosen[0]
    return f"scale {trial.chosen:g}, seed {trial.seed}"


def _most_biased(study: Study) -> list[str]:
    found = {c: v for c, v in study.base.result.bias.context_bias.items() if not math.isnan(v)}
    return sorted(found, key=lambda context: -found[context])[:MOST_CONTEXTS]


Drawn = tuple[str, str, str, Callable[[], "Figure"]]


def plots(study: Study, digests: Sequence[Digest], ours: Digest | None) -> Iterator[Drawn]:
    """Name, title, text and maker of every plot that the study has figures for."""
    numbers = "The table of all points has the numbers."
    yield (
        "pareto",
        "Bias against what it costs",
        "A line a method, from the base model (star) along its scale; the large point is the scale that validation "
        f"chose, with its intervals. Lower is fairer. The grey band is what random directions score. {numbers}",
        lambda: pareto(study, digests, "bias"),
    )
    if _measured(study, "log_odds"):
        yield (
            "pareto-log-odds",
            "Bias in log-odds against what it costs",
            "The same on the scale of log-odds, which answers that are merely undecided, or that follow the order of "
            f"the people, do not lower. {numbers}",
            lambda: pareto(study, digests, "log_odds"),
        )
    if any(trial.points for method in study.methods for trial in method.trials):
        text = f"How the bias of each method falls along its scale. {numbers}"
        yield "curves", "Bias along the scale", text, lambda: curves(study, digests)
    if ours is not None and ours.chosen and study.base.result.bias.context_bias:
        rest = len(study.base.result.bias.context_bias) - MOST_CONTEXTS
        left = f" {rest} less biased contexts are in the table alone." if rest > 0 else ""
        text = f"The most biased contexts of the base model first.{left} The table below has the numbers."
        yield "contexts", "Every context, before and after", text, lambda: contexts(study, ours)
        text = (
            f"The share of each group in each context; the fair share is white.{left} The table below has the numbers."
        )
        yield "preferences", "Who is preferred, before and after", text, lambda: preferences(study, ours)
    if study.sparsity:
        text = "How many coefficients of each layer are not 0, and their norm. The table below has the numbers."
        yield "sparsity", "What is steered, by layer", text, lambda: sparsity(study)
