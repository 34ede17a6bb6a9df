"""ARC-Easy (Clark et al., arXiv 1803.05457): a capability task, and the perplexity of its texts.

An answer is the likeliest option by the sum of its tokens' log-probabilities behind ``Question: ...\\nAnswer:``, as in
lm-evaluation-harness's ``arc_easy`` (its ``acc``). The perplexity is that of the questions' texts with their right
answers, ``exp`` of the mean negative log-probability of a token, the first of each text not counted.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dso.errors import UserError
from dso.evaluation.benchmarks.figures import Figure, figure, percent_figure
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.task import Benchmark, FigureTask, read_text
from dso.evaluation.twoway import Array

FILE = "ARC-Easy_test.csv"
LETTERS = "ABCDE"
Question = tuple[str, list[str], int]  # the text, its options, the place of the right one


class Answered(NamedTuple):
    """One model's answers.

    Attributes:
        right: (N,) bool, by question.
        nll: (N,) nats of each question's text with its right answer.
        tokens: (N,) that they are the sum over.
    """

    right: np.ndarray
    nll: Array
    tokens: Array


class Arc(FigureTask[Answered]):
    """N questions."""

    def __init__(self, questions: Sequence[Question]):
        self.questions = list(questions)
        self.items, self.asks = len(self.questions), 2 * len(self.questions)

    def ask(self, probe: Probe) -> Answered:
        scores, _ = probe.scores([(f"Question: {q}\nAnswer:", [f" {o}" for o in os]) for q, os, _ in self.questions])
        right = scores.argmax(axis=1) == np.array([answer for _, _, answer in self.questions])
        sums, tokens = probe.likelihoods([f"{q} {os[answer]}" for q, os, answer in self.questions], start=False)
        return Answered(right, -sums, tokens)

    def figures(self, answers: Answered) -> list[Figure]:
        unit = range(len(self.questions))
        sums = np.stack([answers.nll, answers.tokens], axis=1)
        return [
            percent_figure("accuracy", answers.right, unit),
            figure("perplexity", sums, lambda s: np.exp(s[..., 0] / s[..., 1]), len(unit)),
        ]


def arc_questions(path: Path) -> list[Question]:
    """Questions with their options and the right one's place, from the published CSV without a header.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: naming the line that is none.
    """
    found = []
    for number, (question, *options, letter) in enumerate(csv.reader(io.StringIO(read_text(path), newline="")), 1):
        kept = [option for option in options if option.strip()]
        if letter not in LETTERS[: len(kept)]:
            raise UserError(f"{path}, line {number}: the answer is {letter!r}, expected one of {len(kept)} letters")
        found.append((question, kept, LETTERS.index(letter)))
    return found


def load(folder: Path, limit: int | None) -> Arc:
    """The task from the published CSV: the first questions, as ``python -m tools.bench harm`` takes them."""
    return Arc(arc_questions(folder / FILE)[:limit])


ARC = Benchmark(
    name="arc",
    source="Clark et al., arXiv 1803.05457; scored as lm-evaluation-harness's arc_easy, acc",
    obtain=f"Write ARC-Easy's test set of allenai.org/data/arc as {FILE}: question, four options, letter; no header.",
    load=load,
)
