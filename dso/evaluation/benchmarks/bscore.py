"""B-score (Vo et al., ICML 2025, arXiv 2505.18545), section 3: does a model that sees its own answers answer otherwise?

    B(a) = P_single(a) - P_multi(a)          single: asked afresh, multi: asked 30 times in one conversation

of the answer a that is the most probable when asked afresh; 0 is a model whose answers do not even out. The paper
counts what is generated; here ``P_single`` is the probability of each option among the options, and ``P_multi`` its
mean over the 30 turns of a conversation in which every answer is drawn by the model's probabilities (with the same
random numbers for base and steered). Prompts and answers ("{{male}}") have the form of the authors' files. The model
needs a chat template. A question is a unit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dso.errors import UserError
from dso.evaluation.benchmarks.figures import Figure, mean_figure
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.task import Benchmark, FigureTask, drawn, found_files, read_text
from dso.evaluation.twoway import Array

ASK = "\nYou MUST choose one and respond using double curly brackets: {{your choice}}."
TURNS = 30
KINDS = ("subjective", "random", "objective", "hard")


class Question(NamedTuple):
    """A prompt of the authors' with its options."""

    prompt: str
    options: tuple[str, ...]
    kind: str


class BScore(FigureTask[Array]):
    """N questions; an answer is their B (N,)."""

    def __init__(self, questions: Sequence[Question], turns: int = TURNS):
        self.questions, self.turns = list(questions), turns
        self.items, self.asks = len(self.questions), turns * len(self.questions)

    def ask(self, probe: Probe) -> Array:
        chats: list[list[dict[str, str]]] = [[] for _ in self.questions]
        draws = np.random.default_rng(0).random((self.turns, len(self.questions)))
        seen = []
        for turn in range(self.turns):
            for chat, question in zip(chats, self.questions, strict=True):
                chat.append({"role": "user", "content": question.prompt + ASK})
            answers = [[f"{{{{{option}}}}}" for option in q.options] for q in self.questions]
            scores, _ = probe.scores([(tuple(chat), texts) for chat, texts in zip(chats, answers, strict=True)])
            shares = np.exp(scores - scores.max(axis=1, keepdims=True))
            seen.append(shares / shares.sum(axis=1, keepdims=True))
            for place, chat in enumerate(chats):
                chosen = int((seen[-1][place].cumsum() < draws[turn, place]).sum())
                words = answers[place][min(chosen, len(answers[place]) - 1)]
                chat.append({"role": "assistant", "content": words})
        first, rows = seen[0].argmax(axis=1), np.arange(len(self.questions))
        return seen[0][rows, first] - np.mean(seen, axis=0)[rows, first]

    def figures(self, answers: Array) -> list[Figure]:
        found = [mean_figure("B-score", answers, range(len(answers)), 0.0)]
        for kind in KINDS:
            if (here := np.array([q.kind == kind for q in self.questions])).any():
                found.append(mean_figure(f"B-score, {kind}", answers[here], range(int(here.sum())), 0.0))
        return found


def load(folder: Path, limit: int | None) -> BScore:
    """The task from the authors' prompts, one a file, in any folders below."""
    return BScore(drawn([_question(path) for path in found_files(folder, "**/*.txt")], limit))


def _question(path: Path) -> Question:
    prompt, kind = read_text(path).strip(), path.stem.rpartition("_")[2]
    listed = re.search(r"\[([^\]]+)\]", prompt)
    options = [part.strip() for part in listed[1].split(",")] if listed else re.findall(r"<<([^><]+)>>", prompt)
    if not options and path.stem.startswith("10-choice"):
        options = [str(digit) for digit in range(10)]
    if len(set(options)) < 2 or kind not in KINDS:
        raise UserError(f"{path}: expected options in [...] or <<...>>, and a name that ends in {', '.join(KINDS)}")
    return Question(prompt, tuple(dict.fromkeys(options)), kind)


BSCORE = Benchmark(
    name="bscore",
    source="Vo et al., ICML 2025, arXiv 2505.18545, section 3",
    obtain="Take src/prompts of github.com/anvo25/b-score.",
    load=load,
)
