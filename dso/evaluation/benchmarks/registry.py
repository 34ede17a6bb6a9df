"""The benchmarks by name, and running one: the base model, then the steered one, on the same items."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dso.errors import UserError
from dso.evaluation.benchmarks.arc import ARC
from dso.evaluation.benchmarks.bbq import BBQ
from dso.evaluation.benchmarks.bscore import BSCORE
from dso.evaluation.benchmarks.crows_pairs import CROWS_PAIRS
from dso.evaluation.benchmarks.holisticbias import HOLISTICBIAS
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.sets import SYNTHBIAS, WINOBIAS
from dso.evaluation.benchmarks.stereoset import STEREOSET
from dso.evaluation.benchmarks.task import Benchmark, Task
from dso.evaluation.benchmarks.weat import WEAT
from dso.evaluation.benchmarks.winogender import WINOGENDER
from dso.evaluation.benchmarks.winogenerated import WINOGENERATED
from dso.evaluation.evaluator import Rewrites, check_scoring
from dso.models.backbone import Backbone
from dso.steering.handle import Turnable, unsteered

BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        WINOBIAS, CROWS_PAIRS, STEREOSET, BBQ, WINOGENDER, WINOGENERATED, HOLISTICBIAS, BSCORE, SYNTHBIAS, WEAT, ARC,
    )
}  # fmt: skip


class Measured(NamedTuple):
    """What both models said to a task; ``steered`` is None where there is no steering."""

    task: Task
    base: Any
    steered: Any


def named(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names, each once; all for ``all``.

    Raises:
        UserError: if there is none of a name.
    """
    if "all" in names:
        return list(BENCHMARKS.values())
    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            raise UserError(f"unknown benchmark {name!r}{hint}. Known are {', '.join(BENCHMARKS)}, or all")
    return [BENCHMARKS[name] for name in dict.fromkeys(names)]


def measure(
    task: Task,
    backbone: Backbone,
    handle: Turnable | None = None,
    scale: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Ask the base model, then the steered one. All steerings have the scale afterwards that they had before.

    Args:
        handle: what is on the model. One that rewrites questions rewrites those with answers, not whole texts.

    Raises:
        UserError: if the steering was trained with another rule of scoring, or an item cannot be asked.
    """
    check_scoring(backbone, handle)
    with unsteered(backbone.model):
        if handle is None:
            return Measured(task, task.ask(Probe(backbone, progress)), None)
        handle.scale = 0.0
        base = task.ask(Probe(backbone, progress))
        handle.scale = scale
        try:
            rewrite = handle.rewrite if isinstance(handle, Rewrites) else None
            return Measured(task, base, task.ask(Probe(backbone, progress, rewrite)))
        finally:
            handle.scale = 0.0
