"""The baselines, by name."""

from __future__ import annotations

from dso.baselines import (
    adapters,
    affine_editing,
    caa,
    debiasing,
    distillation,
    fairsteer,
    iti,
    leace,
    linear_act,
    projection,
    prompts,
    wring,
)
from dso.baselines.baseline import Baseline, BaselineError

BASELINES: tuple[Baseline, ...] = (
    prompts.BASELINE,
    debiasing.EXPLANATION,
    debiasing.REPROMPTING,
    caa.BASELINE,
    iti.BASELINE,
    linear_act.BASELINE,
    projection.BASELINE,
    leace.BASELINE,
    affine_editing.BASELINE,
    wring.BASELINE,
    fairsteer.BASELINE,
    distillation.BASELINE,
    adapters.LORA,
    adapters.LN_TUNING,
)


def find_baselines(names: tuple[str, ...] = ()) -> tuple[Baseline, ...]:
    """The baselines of some names, or all of them.

    Raises:
        BaselineError: naming the first name that is unknown.
    """
    known = {baseline.name: baseline for baseline in BASELINES}
    if unknown := [name for name in names if name not in known]:
        raise BaselineError(f"there is no baseline {unknown[0]!r}; known are {', '.join(known)}")
    return tuple(known[name] for name in names) if names else BASELINES
