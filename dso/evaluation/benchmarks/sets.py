"""Benchmarks that are decision sets, measured by this project's own figures of bias: WinoBias and SynthBias.

WinoBias is also scored as published (:mod:`dso.evaluation.benchmarks.coreference`). How the sentences of both become
decisions is in :mod:`dso.decisions.sets.winobias` and :mod:`dso.decisions.sets.synthbias`, what is measured in
:mod:`dso.evaluation.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dso.decisions.decision import DecisionSet
from dso.decisions.sets import synthbias, winobias
from dso.evaluation.benchmarks import coreference
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.task import Benchmark, Task, drawn, found_files
from dso.evaluation.comparison import Compared, compare
from dso.evaluation.evaluator import Measurement
from dso.evaluation.intervals import UNMEASURED
from dso.evaluation.twoway import Array

UNKNOWN_HERE = ("KL", "KL unambiguous")  # the base's distributions are not kept


class SetTask(Task[dict[str, Measurement]]):
    """Decision sets by name."""

    def __init__(self, sets: Mapping[str, DecisionSet], limit: int | None):
        self.sets = {name: _thinned(decisions, limit) for name, decisions in sets.items()}
        self.items = self.asks = sum(map(len, self.sets.values()))

    def ask(self, probe: Probe) -> dict[str, Measurement]:
        return {name: _measured(probe, decisions) for name, decisions in self.sets.items()}

    def compare(self, base: dict[str, Measurement], steered: dict[str, Measurement] | None) -> dict[str, Compared]:
        rows = {}
        for name, decisions in self.sets.items():
            for figure, row in compare(base[name], (steered or base)[name], decisions).items():
                if figure in UNKNOWN_HERE:
                    continue
                if steered is None:
                    row = Compared(first=row.first, second=UNMEASURED, difference=UNMEASURED)
                rows[f"{name}, {figure}"] = row
        return rows


class WinoBias(Task[tuple[dict[str, Measurement], Array]]):
    """The published measure, and behind it this project's bias on the same sentences, cut before the pronoun."""

    def __init__(self, sets: SetTask, resolved: coreference.Coreference):
        self.sets, self.resolved = sets, resolved
        self.items = self.asks = sets.items + resolved.items

    def ask(self, probe: Probe) -> tuple[dict[str, Measurement], Array]:
        return self.sets.ask(probe), self.resolved.ask(probe)

    def compare(
        self,
        base: tuple[dict[str, Measurement], Array],
        steered: tuple[dict[str, Measurement], Array] | None,
    ) -> dict[str, Compared]:
        published = self.resolved.compare(base[1], steered[1] if steered else None)
        return published | self.sets.compare(base[0], steered[0] if steered else None)


def _measured(probe: Probe, decisions: DecisionSet) -> Measurement:
    scores, lengths = probe.scores([(d.prompt, [c.text for c in d.candidates]) for d in decisions])
    weighed = scores / lengths if probe.backbone.scoring.length_normalised else scores
    shares = np.exp(weighed - weighed.max(axis=1, keepdims=True))
    unknown = np.full(len(scores), np.nan)
    return Measurement(shares / shares.sum(axis=1, keepdims=True), np.exp(scores).sum(axis=1), unknown)


def _thinned(decisions: DecisionSet, limit: int | None) -> DecisionSet:
    """With at most so many units; all decisions of one stay together."""
    kept = set(drawn(list(dict.fromkeys(d.unit or d.id for d in decisions)), limit))
    return DecisionSet(tuple(d for d in decisions if (d.unit or d.id) in kept), decisions.groups, decisions.name)


def _load_winobias(folder: Path, limit: int | None) -> Task:
    names = [f"{side}_stereotyped_{kind}.txt.test" for side in ("pro", "anti") for kind in winobias.TYPES]
    for name in (*names, *(f"{group}_occupations.txt" for group in winobias.GROUPS)):
        found_files(folder, name)
    sets = {kind: winobias.load(folder, split="test", types=kind) for kind in winobias.TYPES}
    return WinoBias(SetTask(sets, limit), coreference.load(folder, limit))


def _load_synthbias(folder: Path, limit: int | None) -> Task:
    return SetTask({file.stem: synthbias.load(file) for file in found_files(folder, "*.csv")}, limit)


WINOBIAS = Benchmark(
    name="winobias",
    source="Zhao et al., NAACL 2018, sections 2 and 5; bias as in DSO, arXiv 2512.15926",
    obtain="Take the folder WinoBias/wino/data of github.com/uclanlp/corefBias.",
    load=_load_winobias,
)
SYNTHBIAS = Benchmark(
    name="synthbias",
    source="Wang et al., ICML 2025, arXiv 2505.23996; bias as in DSO, arXiv 2512.15926",
    obtain="Take the CSV that the paper's authors release (apple/ml-synthbias on GitHub).",
    load=_load_synthbias,
)
