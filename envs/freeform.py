"""The rewards of :mod:`envs.task` for free-form answers, as TRL's reward functions.

TRL calls ``f(prompts, completions, completion_ids, **columns)`` with the completions of one process and wants a number
for each, or None where the function has nothing to say. The column ``index`` of its data set is the decision's.

What a completion earns depends on how the answers of *all* processes were shared among the groups in its context. So
the processes gather whom each completion names, and each updates its own running preferences with the same answers in
the same order: they exchange nothing else and stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dso.decisions.matching import Matcher
from dso.evaluation.answers import check_answers
from envs.task import DecisionTask

Completion = str | Sequence[dict[str, str]]


class AnswerRewards:
    """Pays free-form answers as candidates are paid.

    An answer that names nobody shows no preference. To an ambiguous decision it earns what abstaining earns, to an
    unambiguous one what a wrong answer earns.

    Args:
        task: decisions, target, preference estimate and reward.
        matcher: finds whom a completion names.
        gather: (N, 2) int64 of this process -> those of all processes by rank; None for a single process.

    Raises:
        DecisionError: as :func:`dso.evaluation.answers.check_answers`.
    """

    def __init__(self, task: DecisionTask, matcher: Matcher, gather: Callable[[Tensor], Tensor] | None = None):
        check_answers(task.decisions, matcher)
        self.task = task
        self.matcher = matcher
        self.gather = gather or (lambda pairs: pairs)
        self.abstention = 0.0  # share of the last batch's answers that named nobody, in all processes

    def equiprobability(
        self, prompts: Sequence[Any], completions: Sequence[Completion], *, index: Sequence[int], **_: Any
    ) -> list[float | None]:
        """The equiprobability reward of answers to ambiguous decisions; takes in what was answered."""
        own = self._read(completions, index)
        everyone = self.gather(own)
        self.abstention = float((everyone[:, 1] < 0).float().mean())
        free = self.task.answers[everyone[:, 0]] < 0
        if not bool(free.any()):
            return [None] * len(own)
        asked, chosen = everyone[free].unbind(1)
        choice = torch.nn.functional.one_hot(chosen.clamp(min=0), self.task.n_candidates).float()
        rewards = self.task.observe(asked, choice * (chosen >= 0)[:, None])
        # All answers to a decision see one table of rewards, so any row of it will do.
        table = dict(zip(asked.tolist(), rewards.tolist(), strict=True))
        return [
            None if number not in table else self.task.reward.abstain if named < 0 else table[number][named]
            for number, named in own.tolist()
        ]

    def correctness(
        self, prompts: Sequence[Any], completions: Sequence[Completion], *, index: Sequence[int], **_: Any
    ) -> list[float | None]:
        """+1 for the right answer to an unambiguous decision, -1 for another."""
        found = self._read(completions, index)
        right = self.task.answers[found[:, 0]].tolist()
        return [
            None if answer < 0 else 1.0 if named == answer else -1.0
            for (_, named), answer in zip(found.tolist(), right, strict=True)
        ]

    def _read(self, completions: Sequence[Completion], indices: Sequence[int]) -> Tensor:
        """(N, 2) int64: the decision, and the candidate that its answer names, -1 for none."""
        rows = []
        for number, completion in zip(indices, completions, strict=True):
            named = self.matcher.match(_text(completion), self.task.decisions[number])
            rows.append((number, -1 if named is None else named))
        return torch.tensor(rows, device=self.task.groups.device)


def _text(completion: Completion) -> str:
    """What was said, of a conversation the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
