"""Splits for a user's own decisions, by the scheme of the built-in sets.

Units (people), templates and contexts are each divided into disjoint parts; a decision's split follows from the parts
that its unit, template and context fall into:

==================  ============  ============  ==========
split               unit          template      context
==================  ============  ============  ==========
``train``           training      training      seen
``validation``      validation    validation    seen
``test``            test          test          seen
``test-units``      test          training      seen
``test-templates``  training      test          seen
``test-contexts``   test          test          held out
==================  ============  ============  ==========

Any other combination (a validation unit with a training template, say) would leak and is left out.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable
from dataclasses import replace

from dso.decisions import Decision, DecisionError, DecisionSet

_log = logging.getLogger(__name__)
# (part of the unit, part of the template, context is held out) -> split
_SPLITS = {
    ("train", "train", False): "train",
    ("validation", "validation", False): "validation",
    ("test", "test", False): "test",
    ("test", "train", False): "test-units",
    ("train", "test", False): "test-templates",
    ("test", "test", True): "test-contexts",
}


def hold_out(
    decisions: DecisionSet,
    *,
    contexts: float = 0.0,
    units: float = 0.2,
    templates: float = 0.2,
    validation: float = 0.1,
    seed: int = 0,
) -> DecisionSet:
    """Label the decisions with splits; the labels they had are replaced.

    Args:
        decisions: the set. A decision without a unit is a unit of its own.
        contexts: share of the contexts that is held out.
        units: share of the units that is kept for the test; 0 does not divide them.
        templates: share of the templates that is kept for the test; 0 does not divide them, nor is a single one.
        validation: share of the units and of the templates (where divided) that is kept for validation.
        seed: of the division.

    Returns:
        The set without the combinations that would leak; their number is logged.

    Raises:
        DecisionError: on a share outside [0, 1), if nothing is divided, or if no decision is left for ``train`` or
            for any test split.
    """
    for name, share in {"contexts": contexts, "units": units, "templates": templates, "validation": validation}.items():
        if not 0 <= share < 1:
            raise DecisionError(f"hold_out: {name} is {share!r}, expected a share in [0, 1)")
    rng = random.Random(seed)
    unit_part = _divide(rng, (_unit(d) for d in decisions), units, validation, "units")
    template_part = _divide(rng, (d.template for d in decisions), templates, validation, "templates")
    context_part = _divide(rng, decisions.contexts, contexts, 0.0, "contexts")
    if not (unit_part or template_part or context_part):
        raise DecisionError("hold_out: nothing is divided; give units, templates or contexts a share above 0")
    kept = []
    for decision in decisions:
        unit, template = unit_part.get(_unit(decision)), template_part.get(decision.template)
        held_out = context_part.get(decision.context) == "test"
        if unit is None and template is None:
            label = "test-contexts" if held_out else "train"
        else:
            # what is not divided goes along with what is
            label = _SPLITS.get((unit or template, template or unit, held_out))
        if label:
            kept.append(replace(decision, split=label))
    found = {decision.split for decision in kept}
    if "train" not in found or not any(split.startswith("test") for split in found):
        raise DecisionError(
            f"hold_out: of {len(decisions)} decisions none is left for {'a test' if 'train' in found else 'train'}; "
            "hold out less, or leave one of units and templates undivided"
        )
    if len(kept) < len(decisions):
        _log.warning(
            "%s: %d of %d decisions left out: they mix parts of different splits",
            decisions.name, len(decisions) - len(kept), len(decisions),
        )  # fmt: skip
    return DecisionSet(tuple(kept), decisions.groups, decisions.name)


def _unit(decision: Decision) -> str:
    return decision.unit or decision.id


def _divide(rng: random.Random, values: Iterable[str], test: float, validation: float, name: str) -> dict[str, str]:
    """Which part each value falls into; empty when they are not divided."""
    values = sorted(set(values))
    if test == 0 or len(values) == 1:
        return {}
    tests, validations = math.ceil(test * len(values)), math.ceil(validation * len(values))
    if tests + validations >= len(values):
        raise DecisionError(
            f"hold_out: {len(values)} {name} cannot be divided into {tests} for the test, {validations} for validation "
            "and some for training"
        )
    rng.shuffle(values)
    parts = ["test"] * tests + ["validation"] * validations
    return dict(zip(values, parts + ["train"] * (len(values) - len(parts)), strict=True))
