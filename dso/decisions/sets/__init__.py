"""The built-in decision sets, and the loaders of published sets and of your own.

=============  ========================================================  ==============================
name           what is decided                                           groups
=============  ========================================================  ==============================
``roles``      which of several people is the nurse, the engineer, ...   gender, or gender x race
``pronouns``   he, she or they after "The nurse said that"               he, she, they
``winobias``   the same in the sentences of WinoBias (files: ``path``)   female, male
``synthbias``  which occupation a pronoun of SynthBias refers to         pro, anti
``bbq``        who of two people a question is about, or nobody          the category's own
=============  ========================================================  ==============================

``winogenerated`` and ``winogender`` are unseen tests of ``pronouns``: he, she or they in their sentences.

For vision-language models, ``scenes``: which of two drawn people is the nurse (female, male) or works in the office
(lighter, darker). And which of two pictured people is the nurse, the engineer, ... (files: ``path``):
``socialcounterfactuals`` (gender, race or physical appearance) and ``genderbias-vl`` (female, male).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from dso.decisions import holdout
from dso.decisions.decision import DecisionError, DecisionSet
from dso.decisions.jsonl import read_jsonl
from dso.decisions.sets import (
    bbq,
    genderbias_vl,
    pronouns,
    roles,
    scenes,
    socialcounterfactuals,
    synthbias,
    winobias,
    winogender,
    winogenerated,
)

SETS: dict[str, Callable[..., DecisionSet]] = {
    "roles": roles.build,
    "pronouns": pronouns.build,
    "winobias": winobias.load,
    "synthbias": synthbias.load,
    "winogenerated": winogenerated.load,
    "winogender": winogender.load,
    "bbq": bbq.load,
    "scenes": scenes.build,
    "socialcounterfactuals": socialcounterfactuals.load,
    "genderbias-vl": genderbias_vl.load,
}


def load_decisions(name: str | Path, *, hold_out: Mapping[str, float] | None = None, **options: object) -> DecisionSet:
    """Build or read a decision set.

    Args:
        name: one of :data:`SETS`, or the path of a ``.jsonl`` file.
        hold_out: keyword arguments of :func:`dso.decisions.holdout.hold_out`, to label the splits again (``{}`` for its
            defaults); meant for sets that come without splits.
        options: keyword arguments of the set's builder, or of :func:`dso.decisions.jsonl.read_jsonl`.

    Raises:
        DecisionError: on an unknown name or option (naming the known ones), or a set that cannot be used.
    """
    decisions = _load(name, options)
    if hold_out is None:
        return decisions
    return _call(f"{name}: hold_out", holdout.hold_out, {**hold_out, "decisions": decisions})


def _load(name: str | Path, options: dict[str, object]) -> DecisionSet:
    if str(name).endswith(".jsonl"):
        return _call(str(name), read_jsonl, {"path": name, **options})
    if name not in SETS:
        near = difflib.get_close_matches(str(name), SETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise DecisionError(f"unknown decision set {str(name)!r}{hint}. Known are {', '.join(SETS)}, or a .jsonl file")
    return _call(str(name), SETS[str(name)], options)


def _call(name: str, build: Callable[..., DecisionSet], options: dict[str, object]) -> DecisionSet:
    parameters = inspect.signature(build).parameters
    if unknown := [option for option in options if option not in parameters]:
        near = difflib.get_close_matches(unknown[0], parameters, n=1)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise DecisionError(f"{name}: unknown option {unknown[0]!r}{hint}. Known are {', '.join(parameters)}")
    needed = [p.name for p in parameters.values() if p.default is p.empty]
    if missing := [option for option in needed if option not in options]:
        raise DecisionError(f"{name}: give the option {missing[0]!r}")
    return build(**options)
