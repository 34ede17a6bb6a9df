"""Splits for a user's own decisions, by the scheme of the built-in sets.

Units (people), templates and contexts are each divided into disjoint parts; a decision's split follows from the parts
that its unit, template and context are in:

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

Any other combination (a validation unit with a training template, say) would leak, and is left out with a warning.
Where every template belongs to one unit, as a sentence that is written for two people does, templates follow their
units: each unit is whole in one split, and nothing is left out. A split can be cut down to so many decisions of each
kind (``keep``); published recipes train on a few hundred.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import replace

from dso.decisions.decision import Decision, DecisionError, DecisionSet

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
    keep: Mapping[str, int] | None = None,
    seed: int = 0,
) -> DecisionSet:
    """Label the decisions with splits; the labels they had are replaced.

    Args:
        decisions: the set. A decision without a unit is a unit of its own.
        contexts: share of the contexts that is held out.
        units: share of the units that is kept for the test; 0 does not divide them.
        templates: share of the templates that is kept for the test; 0 does not divide them. A single template is not
            divided, nor are templates that each belong to one unit while units are divided.
        validation: share of the units, and of the templates if they are divided, that is kept for validation.
        keep: split -> how many ambiguous decisions it keeps at most, and as many unambiguous ones: whole units, drawn
            at random, spread as evenly over the contexts as possible.
        seed: of the division and the draw.

    Returns:
        The set without the combinations that would leak; a warning says how many decisions that leaves out.

    Raises:
        DecisionError: on a share outside [0, 1), if nothing is divided, if no decision is left for ``train`` or for
            any test split, or if ``keep`` names an unknown split or leaves one without decisions.
    """
    for name, share in {"contexts": contexts, "units": units, "templates": templates, "validation": validation}.items():
        if not 0 <= share < 1:
            raise DecisionError(f"hold_out: {name} is {share!r}, expected a share in [0, 1)")
    rng = random.Random(seed)
    unit_part = _divide(rng, (_unit(d) for d in decisions), units, validation, "units")
    nested = bool(unit_part) and _each_in_one_unit(decisions)
    template_part = _divide(rng, (d.template for d in decisions), 0.0 if nested else templates, validation, "templates")
    context_part = _divide(rng, decisions.contexts, contexts, 0.0, "contexts")
    if not (unit_part or template_part or context_part):
        raise DecisionError("hold_out: nothing is divided; give units, templates or contexts a share above 0")
    kept = []
    for decision in decisions:
        unit, template = unit_part.get(_unit(decision)), template_part.get(decision.template)
        held_out = context_part.get(decision.context) == "test"
        # What is not divided follows what is.
        part, other = unit or template, template or unit
        if part is None or other is None:
            label = "test-contexts" if held_out else "train"
        else:
            label = _SPLITS.get((part, other, held_out), "")
        if label:
            kept.append(replace(decision, split=label))
    found = {decision.split for decision in kept}
    if "train" not in found or not any(split.startswith("test") for split in found):
        raise DecisionError(
            f"hold_out: of {len(decisions)} decisions none is left for {'a test' if 'train' in found else 'train'}; "
            "hold out less, or divide only one of units and templates"
        )
    if len(kept) < len(decisions):
        _log.warning(
            "%s: %d of %d decisions are left out, because they combine parts of different splits",
            decisions.name, len(decisions) - len(kept), len(decisions),
        )  # fmt: skip
    return DecisionSet(tuple(_cut(kept, keep or {}, seed)), decisions.groups, decisions.name)


def _cut(decisions: list[Decision], keep: Mapping[str, int], seed: int) -> list[Decision]:
    """At most ``keep[split]`` decisions of each kind in a split."""
    splits = sorted({decision.split for decision in decisions})
    for split, most in keep.items():
        if split not in splits:
            raise DecisionError(f"hold_out: keep names the split {split!r}; there are {', '.join(splits)}")
        if not isinstance(most, int) or most < 1:
            raise DecisionError(f"hold_out: keep of {split!r} is {most!r}, expected a whole number of at least 1")
    units: dict[tuple[str, str], dict[str, list[Decision]]] = {}  # (split, kind) -> unit -> its decisions
    for decision in decisions:
        units.setdefault((decision.split, decision.kind), {}).setdefault(_unit(decision), []).append(decision)
    chosen: set[str] = set()
    for (split, kind), members in units.items():
        most = keep.get(split, len(decisions))
        drawn = _draw(random.Random(f"{seed} {split} {kind}"), members, most)
        if not drawn:
            smallest = min(map(len, members.values()))
            raise DecisionError(f"hold_out: keep of {split!r} is {most}, but its smallest unit has {smallest}")
        chosen.update(decision.id for decision in drawn)
    return [decision for decision in decisions if decision.id in chosen]


def _draw(rng: random.Random, units: Mapping[str, list[Decision]], most: int) -> list[Decision]:
    """Whole units of together at most so many decisions, from each context in turn."""
    by_context: dict[str, list[list[Decision]]] = {}
    for members in units.values():
        by_context.setdefault(members[0].context, []).append(members)
    for queue in by_context.values():
        rng.shuffle(queue)
    queues = list(by_context.values())
    rng.shuffle(queues)  # the last round may not reach all contexts
    drawn: list[Decision] = []
    while queues:
        for queue in queues:
            members = queue.pop()
            if len(drawn) + len(members) <= most:
                drawn += members
        queues = [queue for queue in queues if queue]
    return drawn


def _each_in_one_unit(decisions: DecisionSet) -> bool:
    """Whether every template belongs to one unit."""
    pairs = {(decision.template, _unit(decision)) for decision in decisions}
    return len(pairs) == len({template for template, _ in pairs})


def _unit(decision: Decision) -> str:
    return decision.unit or decision.id


def _divide(rng: random.Random, values: Iterable[str], test: float, validation: float, name: str) -> dict[str, str]:
    """Which part each value is in; empty if the values are not divided."""
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
