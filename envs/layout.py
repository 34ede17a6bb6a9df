"""A decision set as tensors: who stands where, and which decisions belong together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dso.decisions.decision import ABSTAIN, DecisionSet
from dso.rewards import ABSENT, ABSTAINS

Indices = Sequence[int] | np.ndarray | Tensor
"""Decisions by their index in the set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """N decisions with K candidates at most.

    Attributes:
        groups: (N, K) int64 index of each candidate's group; ``ABSTAINS``, or ``ABSENT`` where there is no candidate.
        contexts: (N,) int64 index of the context, by first appearance.
        answers: (N,) int64 the right candidate, -1 for an ambiguous decision.
        templates: (N,) int64 index of the template, by first appearance; decisions without one share an index.
        blocks: (N,) int64 the block: the same people in the same template.
        questions: (N,) int64 the question: within a block, one context and one choice of groups; its decisions differ
            in the order of the people. An unambiguous decision is a question of its own.
        n_contexts: number of contexts. n_templates: number of templates.
    """

    groups: Tensor
    contexts: Tensor
    answers: Tensor
    templates: Tensor
    blocks: Tensor
    questions: Tensor
    n_contexts: int
    n_templates: int

    @classmethod
    def of(cls, decisions: DecisionSet, device: torch.device | str = "cpu") -> Layout:
        """Lay out a decision set."""
        codes = {group: index for index, group in enumerate(decisions.groups)} | {ABSTAIN: ABSTAINS}
        groups = torch.full((len(decisions), max(len(d.candidates) for d in decisions)), ABSENT)
        for row, decision in enumerate(decisions):
            for column, candidate in enumerate(decision.candidates):
                groups[row, column] = codes[candidate.group]
        answers = torch.tensor([-1 if d.answer is None else d.answer for d in decisions])
        contexts = _numbered(d.context for d in decisions)
        templates = _numbered(d.template for d in decisions)
        blocks = _numbered((d.template, d.unit) if d.unit else (d.id,) for d in decisions)
        questions = _numbered(
            (block, d.context, *sorted(c.group for c in d.candidates)) if d.ambiguous else (d.id,)
            for block, d in zip(blocks.tolist(), decisions, strict=True)
        )
        return cls(
            groups=groups.to(device),
            contexts=contexts.to(device),
            answers=answers.to(device),
            templates=templates.to(device),
            blocks=blocks.to(device),
            questions=questions.to(device),
            n_contexts=len(decisions.contexts),
            n_templates=len({d.template for d in decisions}),
        )

    def index(self, indices: Indices) -> Tensor:
        """(N,) int64 on the device of the tensors."""
        given = indices if isinstance(indices, Tensor) else torch.from_numpy(np.asarray(indices, dtype=np.int64))
        return given.to(self.groups.device)


def _numbered(keys: Iterable[Hashable]) -> Tensor:
    """(N,) int64: the number of each key, by first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
