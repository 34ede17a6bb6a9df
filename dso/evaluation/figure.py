"""The picture of a steering: bias, accuracy and KL against the scale, as one PNG. Needs matplotlib (``dso[train]``)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dso.evaluation.report import ScalePoint, by_scale
from dso.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GREEN, RED, GREY = "#0072B2", "#007A5A", "#C44E00", "#6B6B6B"  # told apart with any colour vision
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture everywhere
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.2,
    "lines.markersize": 5,
}


def scale_figure(
    points: Sequence[ScalePoint], path: str | Path, kl_budget: float | None = None, title: str = ""
) -> None:
    """Draw the points into a PNG, written at once; no display is needed.

    Raises:
        ImportError: if matplotlib is missing; the message names the extra that has it.
        ValueError: if there are no points.
    """
    ordered = by_scale(points)
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("the picture needs matplotlib; install it with: pip install 'dso[train]'") from error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.7), dpi=170, layout=ConstrainedLayoutEngine(w_pad=0.08, wspace=0.04))
        left, middle, right = figure.subplots(1, 3)
        _draw_bias(left, ordered)
        _draw_accuracy(middle, ordered)
        _draw_kl(right, ordered, kl_budget)
        for axes in (left, middle, right):
            axes.set_xlabel("scale (0: base model)")
            axes.set_xlim(*_limits([point.scale for point in ordered]))
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13)
        data = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
    write_bytes(path, data.getvalue())


def _draw_bias(axes: Axes, points: Sequence[ScalePoint]) -> None:
    scales = [p.scale for p in points]
    found = [p.bias.probability.bias for p in points]
    odds = [p.bias.log_odds.bias.value for p in points]
    order = [p.bias.order_effect for p in points]
    high = [e.high for e in found]
    axes.fill_between(scales, [e.low for e in found], high, color=BLUE, alpha=0.2, lw=0)
    axes.plot(scales, [e.value for e in found], "o-", color=BLUE, clip_on=False, label="probability, 95% interval")
    axes.plot(scales, odds, "s--", color=BLUE, lw=1.3, ms=4, clip_on=False, label="log-odds")
    axes.plot(scales, order, ":", color=GREY, lw=2, label="order effect")
    axes.set_title("Bias and order effect")
    axes.set_ylabel("distance from the target")
    top = max([0.01, *(value for value in (*high, *odds, *order) if not math.isnan(value))])
    # Room above the curves, so that the legend covers none of them.
    axes.set_ylim(0, top * 1.42)
    axes.legend(loc="upper right")


def _draw_accuracy(axes: Axes, points: Sequence[ScalePoint]) -> None:
    axes.set_title("Unambiguous accuracy")
    axes.set_ylabel("share of right answers")
    known = [point for point in points if not math.isnan(point.accuracy.value)]
    if not known:
        axes.set_ylim(0, 1)
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=GREY, transform=axes.transAxes)
        return
    scales, estimates = [p.scale for p in known], [p.accuracy for p in known]
    axes.fill_between(scales, [e.low for e in estimates], [e.high for e in estimates], color=GREEN, alpha=0.2, lw=0)
    axes.plot(scales, [e.value for e in estimates], "o-", color=GREEN, clip_on=False)
    axes.set_ylim(max(0.0, min(min(e.low for e in estimates) - 0.05, 0.7)), 1.01)


def _draw_kl(axes: Axes, points: Sequence[ScalePoint], budget: float | None) -> None:
    values = [p.kl for p in points]
    axes.plot([p.scale for p in points], values, "o-", color=RED, clip_on=False)
    axes.set_title("Distance from the base model")
    axes.set_ylabel("KL at the answer (nats)")
    top = max([1e-3, *(value for value in (*values, budget or 0.0) if not math.isnan(value))])
    axes.set_ylim(0, top * 1.18)
    if budget is not None:
        axes.axhline(budget, color=GREY, ls="--", lw=1.5)
        axes.annotate(
            f"budget {budget:g}", (0, budget), xycoords=("axes fraction", "data"), xytext=(6, 4),
            textcoords="offset points", color=GREY, fontsize=9.5,
        )  # fmt: skip


def _limits(scales: Sequence[float]) -> tuple[float, float]:
    low, high = min(0.0, *scales), max(1.0, *scales)
    margin = 0.03 * (high - low)
    return low - margin, high + margin
