"""A decision as token ids: what is run, and where its answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dso.models.vision import ImageInputs


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt and of its candidates, and what its images bring
    (:class:`dso.models.vision.ImageInputs`)."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    images: ImageInputs | None = field(default=None, compare=False)

    def sequences(self) -> list[tuple[int, ...]]:
        """What has to be run: the prompt with every candidate but its last token, which predicts nothing."""
        return [self.prompt + candidate[:-1] for candidate in self.candidates]

    def distinct_sequences(self) -> list[tuple[int, ...]]:
        """The sequences that no other one begins with: all that a causal model has to run."""
        rows: list[tuple[int, ...]] = []
        for sequence in sorted(self.sequences(), key=len, reverse=True):
            if not any(row[: len(sequence)] == sequence for row in rows):
                rows.append(sequence)
        return rows

    def answer_positions(self) -> dict[tuple[int, ...], float]:
        """What each answer position weighs, by the answer's tokens before it; ``()`` is the position behind the prompt.

        The positions of a candidate weigh alike and together as much as those of any other candidate. Candidates that
        begin alike share positions. The weights sum to 1.
        """
        weights: dict[tuple[int, ...], float] = {(): 0.0}
        for candidate in self.candidates:
            for place in range(len(candidate)):
                weights.setdefault(candidate[:place], 0.0)
                weights[candidate[:place]] += 1 / (len(self.candidates) * len(candidate))
        return weights


@dataclass(frozen=True, slots=True)
class Positions:
    """The M answer positions of N decisions: first the N positions behind the prompts, then each decision's later ones.

    Attributes:
        count: N.
        decision: (M - N,) int64, which decision each later position belongs to, ascending.
        weight: (M,) float32 (:meth:`Encoded.answer_positions`).
    """

    count: int
    decision: Tensor
    weight: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """(N,) the weighted mean over each decision's positions of values (M,)."""
        if len(values) == self.count:  # answers of one token
            return values
        weighted = values * self.weight.to(values.device)
        return weighted[: self.count].index_add(0, self.decision.to(values.device), weighted[self.count :])

    def split(self, table: Tensor) -> list[Tensor]:
        """Rows (M, ...) by decision: of each a tensor (m, ...), its first position first."""
        later = table[self.count :].split(torch.bincount(self.decision, minlength=self.count).tolist())
        first = table[: self.count].split(1)
        return [torch.cat([own, rest]) if len(rest) else own for own, rest in zip(first, later, strict=True)]


def answer_positions(encoded: Sequence[Encoded]) -> Positions:
    """The answer positions of decisions, in their order."""
    first, later, decision = [], [], []
    for number, e in enumerate(encoded):
        weights = list(e.answer_positions().values())
        first.append(weights[0])
        later += weights[1:]
        decision += [number] * (len(weights) - 1)
    return Positions(len(encoded), torch.tensor(decision, dtype=torch.long), torch.tensor(first + later))


def join_positions(tables: Sequence[Tensor]) -> Tensor:
    """Rows (M, ...) of what :meth:`Positions.split` took apart."""
    first = torch.stack([table[0] for table in tables])
    later = [table[1:] for table in tables if len(table) > 1]
    return torch.cat([first, *later]) if later else first
