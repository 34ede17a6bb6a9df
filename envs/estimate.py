"""The running estimate of how a policy prefers the groups in each context, and the reward that follows from it.

Two estimates stand behind one name each: a running mean for each context by itself, and the two-way layout of blocks
and contexts of :mod:`envs.preference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dso.rewards import equiprobability_reward, group_preference, logarithmic_pool
from envs.layout import Indices, Layout
from envs.preference import BlockedPreference
from envs.reward import RewardConfig


class PreferenceEstimate:
    """p_g(c) of the current policy, updated with every batch that it decides.

    Args:
        layout: the decision set.
        target: (G,) the fair distribution.
        config: which estimate, and how the reward looks at it.
        base_policy: indices of N decisions -> (N, K) probabilities of the base model; asked by ``controlled`` alone.
    """

    def __init__(
        self, layout: Layout, target: Tensor, config: RewardConfig, base_policy: Callable[[Sequence[int]], Tensor]
    ):
        self.layout = layout
        self.target = target
        self.config = config
        self._base_policy = base_policy
        self.forget()

    def forget(self) -> None:
        """Start anew, from the target."""
        self._running = self.target.expand(self.layout.n_contexts, -1).clone()
        self._seen = torch.zeros(self.layout.n_contexts, device=self.target.device)
        self._blocked = BlockedPreference(
            self.layout.n_contexts, self.target, self.config.decay, self.config.context_decay
        )
        self._started = self.config.estimate != "controlled"  # the controlled one fits the base model's layout first

    @property
    def preference(self) -> Tensor:
        """(C, G) the preference in each context; the target where nothing was seen."""
        return self._running if self.config.estimate == "context" else self._blocked.preference

    def update(self, policy: Tensor, indices: Indices) -> Tensor:
        """Take in how the policy decides N ambiguous decisions, (N, K) probabilities or choices; reward each group.

        Returns:
            (N, G) the reward of choosing each group.
        """
        index = self.layout.index(indices)
        pooled = self.pool(policy, index)
        observe = self._update_contexts if self.config.estimate == "context" else self._update_blocks
        return observe(pooled, index)

    def pool(self, policy: Tensor, indices: Indices) -> Tensor:
        """(N, K) probabilities; with ``logarithmic`` pooling, what the orders of each question say together."""
        if self.config.pooling == "linear":
            return policy
        index = self.layout.index(indices)
        questions = self.layout.questions[index].unique(return_inverse=True)[1]
        groups = self.layout.groups[index][:, : policy.shape[1]]
        return logarithmic_pool(policy.log(), groups, questions, len(self.target)).exp()

    def _update_contexts(self, policy: Tensor, index: Tensor) -> Tensor:
        """(N, G) rewards, after the batch has updated the running mean of each context."""
        contexts, groups = self.layout.contexts[index], self.layout.groups[index][:, : policy.shape[1]]
        batch, mass = group_preference(policy, groups, contexts, self.layout.n_contexts, self.target)
        batch = torch.where(mass[:, None] > 0, batch, self._running)  # where all abstain, nothing new is known
        # A context's first estimate replaces the target it starts from; later ones are blended in.
        weight = torch.where(self._seen > 0, 1 - self.config.decay, 1.0)[:, None]
        self._running = self._running + weight * (batch - self._running)
        self._seen += mass
        return self._fair(torch.lerp(self._running, batch, self.config.batch_weight))[contexts]

    def _update_blocks(self, policy: Tensor, index: Tensor) -> Tensor:
        """(N, G) rewards by :class:`envs.preference.BlockedPreference`."""
        self.start()
        shares, mass, block, context, cell = self._cells(policy, index)
        base = self._cells(self._pooled_base(index), index)[0] if self.config.estimate == "controlled" else None
        met = mass > 0
        if base is not None:
            base = base[met]
        local = shares.clone()
        local[met] = self._blocked.update(shares[met], block[met].unique(return_inverse=True)[1], context[met], base)
        preference = torch.lerp(self._blocked.preference[context], local, self.config.local_weight)[cell]
        preference = preference - (1 - self.config.common_weight) * self._blocked.level
        return torch.lerp(self._fair(preference), self._fair(shares)[cell], self.config.unit_weight)

    def start(self) -> None:
        """Measure what the first :meth:`update` needs. All processes call it together."""
        if self._started:
            return
        index = (self.layout.answers < 0).nonzero()[:, 0]
        shares, mass, block, context, _ = self._cells(self._pooled_base(index), index)
        met = mass > 0
        self._blocked.start_from(shares[met], block[met].unique(return_inverse=True)[1], context[met])
        self._started = True

    def _pooled_base(self, index: Tensor) -> Tensor:
        return self.pool(self._base_policy(index.tolist()), index)

    def _cells(self, policy: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Group shares (M, G) of the cells that N decisions fall into, their mass, block and context (M,); each
        decision's cell (N,)."""
        count = self.layout.n_contexts
        pairs, cell = (self.layout.blocks[index] * count + self.layout.contexts[index]).unique(return_inverse=True)
        groups = self.layout.groups[index][:, : policy.shape[1]]
        shares, mass = group_preference(policy, groups, cell, len(pairs), self.target)
        return shares, mass, pairs // count, pairs % count, cell

    def _fair(self, preference: Tensor) -> Tensor:
        config = self.config
        return equiprobability_reward(
            preference, self.target, form=config.form, width=config.width, dead_zone=config.dead_zone
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The running preferences, for checkpoints."""
        self.start()
        blocked = {f"blocked.{key}": value for key, value in self._blocked.state_dict().items()}
        return {"running": self._running.clone(), "seen": self._seen.clone(), **blocked}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        self._running, self._seen = state["running"].clone(), state["seen"].clone()
        self._blocked.load_state_dict(
            {k.removeprefix("blocked."): v for k, v in state.items() if k.startswith("blocked.")}
        )
        self._started = True
