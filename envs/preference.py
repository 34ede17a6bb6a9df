"""Estimating the current policy's group preference p_g(c) from a few decisions a step.

The sign of the reward decides everything, and a single decision says little about it: which of two people a model
prefers depends more on their names, their order and the template than on the context. A *block* asks about the same
people with the same template in several contexts, so what names and template do is common to its contexts. The blocked
estimator (ours) therefore takes the deviation from the target apart, as in a two-way layout without interaction,

    x[b,c] - t = m + u[b] + alpha[c]

m, common to all contexts, is a running mean over blocks; alpha, a context's own part, is a running mean of what remains
of x[b,c] after its block's mean, where u[b] has cancelled. The reward looks at t + m + alpha[c] and, because templates
differ in how much a context matters, in part at what remains in this very block, t + m + x[b,c] - mean_b(x - alpha).

People differ far more than contexts do, so m and alpha are noisy. How the base model decides in the same cells,
x0[b,c], is known, and so is its layout m0 + alpha0[c] over the whole training set, so x0 serves as a control variate
(Owen 2013, Monte Carlo theory, methods and examples, section 8.9). The running means then see

    x[b,c] - rho (x0[b,c] - t - m0 - alpha0[c])

which has the same mean and, with rho the running slope of the regression of one residual on the other, less variance.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BlockedPreference:
    """Running two-way estimate of the group preference of every context.

    Args:
        n_contexts: C.
        target: (G,) the fair distribution; the estimate before anything is seen.
        decay: weight of the past in the common part m, for each block.
        context_decay: weight of the past in a context's own part alpha, for each block with that context.
    """

    def __init__(self, n_contexts: int, target: Tensor, decay: float = 0.9, context_decay: float = 0.8):
        self.target = target
        self.decay = decay
        self.context_decay = context_decay
        self.common = torch.zeros_like(target)
        self.own = target.new_zeros(n_contexts, len(target))
        self.seen = target.new_zeros(n_contexts)
        self.blocks = target.new_zeros(())
        self.base = target.new_zeros(n_contexts, len(target))  # m0 + alpha0 of the base model
        self.level = torch.zeros_like(target)  # m0
        self.products = target.new_zeros(2)  # running sums of residual x base residual, and of its square

    @property
    def preference(self) -> Tensor:
        """(C, G) target + m + alpha."""
        return self.target + self.common + self.own

    def start_from(self, cells: Tensor, blocks: Tensor, contexts: Tensor, rounds: int = 50) -> None:
        """Begin at the base model's layout, fitted by alternating least squares to all M of its cells.

        Args:
            cells, blocks, contexts: as in :meth:`update`, of the base model on the whole training set.
            rounds: of the fit.
        """
        deviation, count, own = cells - self.target, int(blocks.max()) + 1, torch.zeros_like(self.own)
        for _ in range(rounds):
            means = _means(deviation - own[contexts], blocks, count)
            own = _means(deviation - means[blocks], contexts, len(own))
        met = torch.zeros_like(self.seen).index_add(0, contexts, torch.ones_like(deviation[:, 0]))
        self.own, self.common, self.seen = own, means.mean(0), met
        self.blocks = self.blocks + count
        self.base, self.level = self.common + own, self.common.clone()
        self.products = torch.ones_like(self.products)  # the base model is its own base

    @property
    def slope(self) -> Tensor:
        """rho."""
        return (self.products[0] / self.products[1].clamp(min=1e-12)).clamp(0.0, 1.0)

    def update(self, cells: Tensor, blocks: Tensor, contexts: Tensor, base: Tensor | None = None) -> Tensor:
        """Take in M cells, each the mean over the decisions of one block in one context.

        Args:
            cells: (M, G) group shares; each row sums to one.
            blocks: (M,) int64, 0 to B - 1.
            contexts: (M,) int64; each pair of block and context occurs once.
            base: (M, G) the base model's shares, as control variates; needs :meth:`start_from`.

        Returns:
            (M, G) the preference in each cell by this block's own evidence, in which people and template cancel.
        """
        if not len(cells):
            return cells
        deviation = cells - self.target
        steady = deviation if base is None else self._controlled(deviation, base - self.target, contexts)
        count = int(blocks.max()) + 1
        means = _means(steady - self.own[contexts], blocks, count)
        # Early on the running mean is the plain mean of all blocks so far.
        weight = torch.maximum(count / (self.blocks + count), 1 - self.decay ** torch.full_like(self.blocks, count))
        self.common = self.common + weight * (means.mean(0) - self.common)
        self.blocks = self.blocks + count
        local = self._within(deviation, blocks, contexts)
        error = self._within(steady, blocks, contexts) - self.own[contexts]
        met = self.seen.new_zeros(len(self.seen)).index_add(0, contexts, torch.ones_like(error[:, 0]))
        self.seen = self.seen + met
        share = torch.maximum(met / self.seen.clamp(min=1), 1 - self.context_decay**met)[:, None]
        self.own = self.own + share * _means(error, contexts, len(self.own))
        return self.target + self.common + local

    def _within(self, deviation: Tensor, blocks: Tensor, contexts: Tensor) -> Tensor:
        """(M, G) what remains of each cell after its block's own level."""
        count = int(blocks.max()) + 1
        sizes = torch.bincount(blocks, minlength=count)
        means = _means(deviation - self.own[contexts], blocks, count)
        # A block with a single context cannot tell its people from the context; it is compared with the common part.
        return deviation - torch.where(sizes[:, None] > 1, means, self.common)[blocks]

    def _controlled(self, deviation: Tensor, base: Tensor, contexts: Tensor) -> Tensor:
        """(M, G) deviations without what the base model's own residuals explain."""
        residual, known = deviation - self.common - self.own[contexts], base - self.base[contexts]
        seen = torch.stack([(residual * known).mean(), known.square().mean()])
        steady = deviation - self.slope * known  # the slope is of earlier batches, so that the mean stays what it is
        self.products = self.decay * self.products + (1 - self.decay) * seen
        return steady

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that :meth:`update` changes."""
        return {
            "common": self.common.clone(),
            "own": self.own.clone(),
            "seen": self.seen.clone(),
            "blocks": self.blocks.clone(),
            "base": self.base.clone(),
            "level": self.level.clone(),
            "products": self.products.clone(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        self.common, self.own = state["common"].clone(), state["own"].clone()
        self.seen, self.blocks = state["seen"].clone(), state["blocks"].clone()
        self.base, self.products = state["base"].clone(), state["products"].clone()
        self.level = state.get("level", torch.zeros_like(self.level)).clone()  # not in states of earlier versions


def _means(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(count, G) mean of the rows of each index, 0 where there is none."""
    total = values.new_zeros(count, values.shape[1]).index_add(0, index, values)
    return total / torch.bincount(index, minlength=count).clamp(min=1)[:, None]
