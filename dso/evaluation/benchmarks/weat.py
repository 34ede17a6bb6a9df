"""WEAT (Caliskan, Bryson, Narayanan, Science 356, 2017) on a model's input embeddings.

With ``s(w) = mean over a in A of cos(w, a) - mean over b in B of cos(w, b)``, the targets X, Y and the attributes A, B:

    effect size = ( mean over X of s - mean over Y of s ) / standard deviation over X and Y of s         0 is fair
    p           = share of the equal divisions of X and Y together whose sum over X less that over Y is larger

The word lists are the paper's tests 6, 7, 8 (gender) and 10 (age), eight words each, so all 12,870 divisions are looked
at. A word of several tokens has the mean of their embeddings. **No steering moves input embeddings**, so base and
steered are alike unless the model itself was changed; the benchmark is about the base model.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np

from dso.evaluation.benchmarks.figures import Figure, figure
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.task import Benchmark, FigureTask, read_json
from dso.evaluation.twoway import Array, Part

LISTS = Path(__file__).with_name("weat.json")


class Weat(FigureTask[dict[str, Array]]):
    """Tests by name; an answer is the associations s of the targets, X before Y, (2n,)."""

    def __init__(self, tests: dict[str, dict[str, list[str]]]):
        self.tests = tests
        self.items = len(tests)
        self.asks = sum(len(words) for test in tests.values() for words in test.values())

    def ask(self, probe: Probe) -> dict[str, Array]:
        found = {}
        for name, test in self.tests.items():
            x, y, a, b = (_directions(probe, test[kind]) for kind in ("X", "Y", "A", "B"))
            targets = np.concatenate([x, y])
            found[name] = (targets @ a.T).mean(axis=1) - (targets @ b.T).mean(axis=1)
        return found

    def figures(self, answers: dict[str, Array]) -> list[Figure]:
        found = []
        for name, values in answers.items():
            p = np.array([permutation_p(values)])
            unknown = Part(p, np.full((1, 1), np.nan), 0.0)
            found += [effect_size(name, values), Figure(name=f"p, {name}", part=unknown, items=len(values))]
        return found


def _directions(probe: Probe, words: list[str]) -> Array:
    vectors = probe.embeddings(words)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def effect_size(name: str, values: Array) -> Figure:
    """Of associations (2n,), the first half X's; the standard deviation is the sample's."""
    first = np.repeat([1.0, 0.0], len(values) // 2)
    rows = np.stack([values * first, first, values * (1 - first), 1 - first, values**2], axis=1)

    def size(s: Array) -> Array:
        count = s[..., 1] + s[..., 3]
        mean = (s[..., 0] + s[..., 2]) / count
        spread = np.sqrt((s[..., 4] / count - mean**2) * count / (count - 1))
        return (s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3]) / spread

    return figure(f"effect size, {name}", rows, size, len(values), 0.0)


def permutation_p(values: Array) -> float:
    """The one-sided p of associations (2n,), the first half X's, over all divisions."""
    half = len(values) // 2
    sums = values[np.array(list(combinations(range(len(values)), half)))].sum(axis=1)
    return float((sums > values[:half].sum() + 1e-12).mean())  # the sum over Y is what is left


def _load(folder: Path, limit: int | None) -> Weat:
    return Weat(read_json(LISTS))


WEAT = Benchmark(name="weat", source="Caliskan et al., Science 356, 2017, tests 6, 7, 8 and 10", obtain="", load=_load)
