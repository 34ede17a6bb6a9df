"""What leaving parts of a steering out costs, measured: for commands that write it in a form that cannot hold all."""

from __future__ import annotations

from collections.abc import Sequence

from dso.decisions.decision import DecisionSet
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.report import ScalePoint, decimal_text, fixed_rows, interval_text
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.run.measure import cut_points

HEAD = ("", "scale", "bias [95%]", "log-odds [95%]", "order", "accuracy [95%]", "mass", "KL", "KL unamb.")


def cost_table(
    backbone: Backbone, decisions: DecisionSet, steering: Steering, part: Steering, scales: Sequence[float], name: str
) -> str:
    """The base model, the steering with hooks and a part of it, called ``name``, on the same decisions."""
    target = steering.config.target_for(decisions.groups)
    model = backbone.model
    with steering.on(model, 0.0, check=False) as whole, part.on(model, 0.0, check=False) as rest:
        settings = [(None, 0.0), *((handle, scale) for scale in scales for handle in (whole, rest))]
        measured = Evaluator(backbone, decisions, whole).settings(settings)
    points = cut_points([scale for _, scale in settings], measured, decisions, target, bootstrap=1000)
    names = ["base", *["with hooks", name] * len(scales)]
    rows = [HEAD, *((who, f"{p.scale:g}", *_cells(p)) for who, p in zip(names, points, strict=True))]
    return f"On {len(decisions)} decisions:\n{fixed_rows(rows)}"


def _cells(point: ScalePoint) -> tuple[str, ...]:
    return (
        interval_text(point.bias.bias),
        interval_text(point.bias.log_odds.bias),
        decimal_text(point.bias.order_effect, 2),
        interval_text(point.accuracy),
        decimal_text(point.answer_mass),
        decimal_text(point.kl),
        decimal_text(point.kl_unambiguous),
    )
