"""Estimating the current policy's group preference p_g(c) from few decisions a step.

The sign of the reward is everything, and a single decision says little about it: whom a model prefers of two people
depends more on their names, their order and the template than on the context. A *block* asks about the same people with
the same template in several contexts, so what names and template do is common to its contexts. The blocked estimator
(ours) therefore takes the deviation from the target apart, as in a two-way layout without interaction,

    x[b,c] - t = m + u[b] + alpha[c]

m, common to all contexts, is a running mean over blocks; alpha, a context's own share, is a running mean of what is
left of x[b,c] after its block's mean, from which u[b] has cancelled. What is rewarded is t + m + alpha[c], or, where
templates differ in how a context matters, in part what is left in this very block, t + m + x[b,c] - mean_b(x - alpha).
"""

from __future__ import annotations

import torch
from torch import Tensor


class BlockedPreference:
    """Running two-way estimate of the group preference of every context.

    Args:
        n_contexts: C.
        target: (G,) the fair distribution; the estimate before anything is seen.
        decay: weight of the past in the common part m, a block.
        context_decay: weight of the past in a context's own part alpha, a block that has the context.
    """

    def __init__(self, n_contexts: int, target: Tensor, decay: float = 0.9, context_decay: float = 0.8):
        self.target = target
        self.decay = decay
        self.context_decay = context_decay
        self.common = torch.zeros_like(target)
        self.own = target.new_zeros(n_contexts, len(target))
        self.seen = target.new_zeros(n_contexts)
        self.blocks = target.new_zeros(())

    @property
    def preference(self) -> Tensor:
        """(C, G) target + m + alpha."""
        return self.target + self.common + self.own

    def update(self, cells: Tensor, blocks: Tensor, contexts: Tensor) -> Tensor:
        """Take in M cells, the means over the decisions of one block in one context.

        Args:
            cells: (M, G) group shares; each row sums to one.
            blocks: (M,) int64, 0 to B - 1.
            contexts: (M,) int64; a pair of block and context comes once.

        Returns:
            (M, G) the preference in each cell by this block's own evidence, people and template cancelled.
        """
        if not len(cells):
            return cells
        deviation = cells - self.target
        count = int(blocks.max()) + 1
        sizes = deviation.new_zeros(count).index_add(0, blocks, torch.ones_like(deviation[:, 0]))
        rest = deviation - self.own[contexts]
        means = rest.new_zeros(count, rest.shape[1]).index_add(0, blocks, rest) / sizes[:, None]
        # Early on the running mean is the plain mean of all blocks so far.
        weight = torch.maximum(count / (self.blocks + count), 1 - self.decay ** torch.full_like(self.blocks, count))
        self.common = self.common + weight * (means.mean(0) - self.common)
        self.blocks = self.blocks + count
        # A block with a single context cannot tell its people from the context; it is held against the common part.
        reference = torch.where(sizes[:, None] > 1, means, self.common)[blocks]
        local = deviation - reference
        error = local - self.own[contexts]
        met = self.seen.new_zeros(len(self.seen)).index_add(0, contexts, torch.ones_like(error[:, 0]))
        total = self.own.new_zeros(self.own.shape).index_add(0, contexts, error)
        self.seen = self.seen + met
        share = torch.maximum(met / self.seen.clamp(min=1), 1 - self.context_decay**met)[:, None]
        self.own = self.own + share * total / met.clamp(min=1)[:, None]
        return self.target + self.common + local

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`update` changes."""
        return {
            "common": self.common.clone(),
            "own": self.own.clone(),
            "seen": self.seen.clone(),
            "blocks": self.blocks.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        self.common, self.own = state["common"].clone(), state["own"].clone()
        self.seen, self.blocks = state["seen"].clone(), state["blocks"].clone()
