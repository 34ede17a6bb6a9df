"""What both forms of the decision environment share: decisions as tensors, the reference, preferences, rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dso.backbone import Backbone
from dso.decisions import ABSTAIN, DecisionSet, check_target
from dso.rewards import ABSENT, ABSTAINS, candidate_rewards, equiprobability_reward, group_preference
from dso.steering import Handle


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """How decisions are rewarded (:mod:`dso.rewards`) and how the policy's preference is estimated.

    Attributes:
        form, width, dead_zone, abstain: of the equiprobability reward.
        decay: weight of the past in a context's running preference, 0 (the batch alone) to below 1.
        batch_weight: share of the batch's own estimate in the preference that the reward sees; the rest is the running one.
    """

    form: str = "smooth"
    width: float = 0.1
    dead_zone: float = 0.0
    abstain: float = -1.0
    decay: float = 0.8
    batch_weight: float = 0.3

    def __post_init__(self) -> None:
        if self.form not in ("sign", "smooth"):
            raise ValueError(f"reward form is {self.form!r}, expected sign or smooth")
        if self.width <= 0 or self.dead_zone < 0:
            raise ValueError(f"reward width {self.width} must be > 0 and dead_zone {self.dead_zone} >= 0")
        if not 0 <= self.decay < 1 or not 0 <= self.batch_weight <= 1:
            raise ValueError(f"decay {self.decay} must be in [0, 1) and batch_weight {self.batch_weight} in [0, 1]")


class DecisionTask:
    """A decision set with the backbone behind it; a *handle* is a decision's index in the set.

    Args:
        backbone: the model, steered or not by whoever holds a handle on it.
        decisions: what is decided.
        target: fair share of each group; uniform when None.
        reward: see :class:`RewardConfig`.
        handle: the steering on the backbone, so that the base model is one scale away; None if there is none.
        anchors: neutral texts whose next-token distribution should stay as it is.
    """

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        target: dict[str, float] | None = None,
        reward: RewardConfig | None = None,
        handle: Handle | None = None,
        anchors: Sequence[str] = (),
    ):
        self.backbone = backbone
        self.handle = handle
        self.anchors = tuple(anchors)
        self.decisions = decisions
        self.reward = reward or RewardConfig()
        device = backbone.device
        self.target = torch.tensor(check_target(target, decisions.groups), device=device)
        self.groups, self.contexts, self.answers = (t.to(device) for t in _as_tensors(decisions))
        self.n_contexts = len(decisions.contexts)
        self._running = self.target.expand(self.n_contexts, -1).clone()
        self._seen = torch.zeros(self.n_contexts, device=device)
        self._reference: dict[int | str, Tensor] = {}

    @property
    def n_candidates(self) -> int:
        """K, the largest number of candidates of a decision."""
        return self.groups.shape[1]

    def pick(self, handles: Sequence[int]) -> list:
        """The decisions behind handles."""
        return [self.decisions[int(handle)] for handle in handles]

    def reference(self, handles: Sequence[int]) -> Tensor:
        """(N, V) log-probabilities of the base model (scale 0) after the prompts, computed once a decision and cached."""
        return self._cached([int(h) for h in handles], lambda new: self.backbone.score(self.pick(new), next_token=True).next_token)

    def anchor_reference(self, texts: Sequence[str]) -> Tensor:
        """(N, V) the same after anchor texts."""
        return self._cached(list(texts), self.backbone.next_token)

    @torch.no_grad()
    def _cached(self, keys: list[Any], compute: Callable[[list[Any]], Tensor]) -> Tensor:
        if missing := [key for key in dict.fromkeys(keys) if key not in self._reference]:
            with self.unsteered():
                self._reference.update(zip(missing, compute(missing).cpu(), strict=True))
        return torch.stack([self._reference[key] for key in keys]).to(self.backbone.device)

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """The base model within the block: the attached steering, if any, at scale 0."""
        if self.handle is None:
            yield
            return
        scale = self.handle.scale
        self.handle.scale = 0.0
        try:
            yield
        finally:
            self.handle.scale = scale

    @property
    def preference(self) -> Tensor:
        """(C, G) running group preference of each context; the target where nothing was seen."""
        return self._running

    @torch.no_grad()
    def observe(self, handles: Sequence[int], policy: Tensor) -> Tensor:
        """Take note of how the current policy decides and reward it.

        Args:
            handles: N decisions.
            policy: (N, K) probabilities, or one-hot choices where no probabilities are known.

        Returns:
            (N, K) the reward of every candidate.
        """
        index = torch.as_tensor(np.asarray(handles), device=self.groups.device)
        groups, contexts, answers = self.groups[index], self.contexts[index], self.answers[index]
        free = answers < 0
        batch, counts = group_preference(policy[free].float(), groups[free], contexts[free], self.n_contexts, len(self.target))
        known = counts > 0
        # A context's first estimate replaces the target it starts from; later ones are blended in.
        weight = torch.where(self._seen > 0, 1 - self.reward.decay, 1.0)[:, None]
        self._running = torch.where(known[:, None], self._running + weight * (batch - self._running), self._running)
        self._seen += counts
        blended = self._running + self.reward.batch_weight * (batch - self._running)
        fair = equiprobability_reward(
            blended, self.target, form=self.reward.form, width=self.reward.width, dead_zone=self.reward.dead_zone
        )
        return candidate_rewards(fair[contexts], groups, answers, self.reward.abstain)

    def state_dict(self) -> dict[str, Tensor]:
        """The running preferences, for checkpoints."""
        return {"running": self._running.clone(), "seen": self._seen.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        self._running, self._seen = state["running"].clone(), state["seen"].clone()


def _as_tensors(decisions: DecisionSet) -> tuple[Tensor, Tensor, Tensor]:
    codes = {group: index for index, group in enumerate(decisions.groups)} | {ABSTAIN: ABSTAINS}
    places = {context: index for index, context in enumerate(decisions.contexts)}
    groups = torch.full((len(decisions), max(len(d.candidates) for d in decisions)), ABSENT)
    for row, decision in enumerate(decisions):
        for column, candidate in enumerate(decision.candidates):
            groups[row, column] = codes[candidate.group]
    contexts = torch.tensor([places[d.context] for d in decisions])
    answers = torch.tensor([-1 if d.answer is None else d.answer for d in decisions])
    return groups, contexts, answers
