"""Endless batches of decisions that keep together what has to cancel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dso.decisions.decision import Decision, DecisionSet


class BlockSampler:
    """Batches of indices; the decisions of a block follow each other.

    A block is all ambiguous decisions of one template and one unit (the same people in every order and context), so
    that name and position effects cancel within a batch; unambiguous decisions that begin alike are one block, and a
    decision without a unit is a block of its own. Every block is drawn once before any is drawn again. Where a batch
    ends inside a block, the next one begins with the rest of it: choose a multiple of the block size for
    ``ambiguous``.

    Args:
        decisions: what to draw from.
        ambiguous: ambiguous decisions in a batch.
        unambiguous: unambiguous decisions in a batch.
        seed: of the order; None draws one at random.

    Raises:
        ValueError: if a batch is empty, or the set lacks a kind that is asked for.
    """

    def __init__(self, decisions: DecisionSet, ambiguous: int, unambiguous: int = 0, seed: int | None = None):
        if ambiguous < 0 or unambiguous < 0 or ambiguous + unambiguous < 1:
            raise ValueError(f"a batch of {ambiguous} ambiguous and {unambiguous} unambiguous decisions is empty")
        self.size = ambiguous + unambiguous
        self.counts = (ambiguous, unambiguous)
        self._counts = {kind: n for kind, n in (("ambiguous", ambiguous), ("unambiguous", unambiguous)) if n}
        self._blocks = {kind: _blocks(decisions, kind) for kind in self._counts}
        for kind, blocks in self._blocks.items():
            if not blocks:
                raise ValueError(
                    f"{decisions.name}: no {kind} decisions, so no batch can have {self._counts[kind]} of them"
                )
        self.seed(seed)

    def seed(self, seed: int | None) -> None:
        """Start anew from a seed."""
        self._rng = np.random.default_rng(seed)
        self._queues: dict[str, list[int]] = {kind: [] for kind in self._counts}

    def draw(self) -> np.ndarray:
        """(batch,) int64 indices, ambiguous decisions first."""
        batch: list[int] = []
        for kind, count in self._counts.items():
            queue = self._queues[kind]
            while len(queue) < count:
                for block in self._rng.permutation(len(self._blocks[kind])):
                    queue += self._blocks[kind][block]
            batch += queue[:count]
            del queue[:count]
        return np.array(batch, dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches to come, as plain JSON values."""
        queues = {kind: list(queue) for kind, queue in self._queues.items()}
        return {"rng": self._rng.bit_generator.state, "queues": queues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._rng.bit_generator.state = state["rng"]
        self._queues = {kind: list(queue) for kind, queue in state["queues"].items()}


def divide(blocks: Sequence[int], parts: int) -> list[np.ndarray]:
    """Divide a batch into parts of about the same size, blocks whole, because a block's prompts share their beginning.

    Blocks are halved only where there are fewer blocks than parts. The same batch is always divided the same way.

    Args:
        blocks: (N,) which block each decision of the batch is of.
        parts: number of parts.

    Returns:
        the positions of each part, rising; no part is empty.

    Raises:
        ValueError: if there are fewer decisions than parts.
    """
    if len(blocks) < parts:
        raise ValueError(f"{len(blocks)} decisions cannot be divided into {parts} parts")
    members: dict[int, list[int]] = {}
    for position, block in enumerate(blocks):
        members.setdefault(int(block), []).append(position)
    pieces = list(members.values())
    while len(pieces) < parts:
        largest = max(pieces, key=len)
        pieces.remove(largest)
        pieces += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    divided: list[list[int]] = [[] for _ in range(parts)]
    for piece in sorted(pieces, key=lambda piece: (-len(piece), piece)):
        min(divided, key=len).extend(piece)
    return [np.array(sorted(part), dtype=np.int64) for part in divided]


def _blocks(decisions: DecisionSet, kind: str) -> list[list[int]]:
    blocks: dict[tuple[str, ...], list[int]] = {}
    for index, decision in enumerate(decisions):
        if decision.kind == kind:
            blocks.setdefault(_block_key(decision), []).append(index)
    return list(blocks.values())


BEGINNING = 40  # characters: the first person and what is said of them


def _block_key(decision: Decision) -> tuple[str, ...]:
    if not decision.unit:
        return (decision.id,)
    if decision.ambiguous:
        return decision.template, decision.unit
    # The same facts and another question: the facts are computed once if both are in one batch.
    return decision.template, decision.unit, decision.text[:BEGINNING]
