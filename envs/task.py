"""What both forms of the decision environment share: decisions as tensors, the reference, preferences, rewards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dso.decisions.decision import ABSTAIN, DecisionSet, check_target
from dso.models.backbone import Backbone
from dso.rewards import (
    ABSENT,
    ABSTAINS,
    candidate_rewards,
    equiprobability_reward,
    group_preference,
    logarithmic_pool,
)
from dso.steering.model import Handle
from envs.preference import BlockedPreference

ESTIMATES = ("context", "blocked", "controlled")
POOLINGS = ("linear", "logarithmic")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """How decisions are rewarded (:mod:`dso.rewards`) and how the policy's preference is estimated.

    Attributes:
        form, width, dead_zone, abstain: of the equiprobability reward.
        estimate: ``context`` (a running mean of each context by itself), ``blocked`` (names and templates cancel
            within blocks, :mod:`envs.preference`) or ``controlled`` (``blocked`` with the base model's decisions as
            control variates, for which all ambiguous decisions pass through it once).
        decay: weight of the past in a running preference, 0 (the batch alone) to below 1; of ``blocked`` in the part
            that all contexts have in common.
        context_decay: of ``blocked``, in a context's own part.
        batch_weight: of ``context``: share of the batch's own estimate in the preference that the reward sees.
        local_weight: of ``blocked``: share of this block's own evidence in a context's preference, as templates
            differ in how much a context matters.
        unit_weight: of ``blocked``: share of the reward that looks at the preference among the very people at hand
            instead of the context's. It evens out what a model prefers among names, which new names inherit.
        common_weight: of ``controlled``: share of what the base model prefers in all contexts alike that counts as
            bias. It is mostly which names a model likes better; 0 holds it where it is.
        pooling: of what one question's orders say: ``linear`` (their mean, so that an answer by the order alone is
            fair) or ``logarithmic`` (:func:`dso.rewards.logarithmic_pool`, in which the order cancels).
    """

    form: str = "smooth"
    width: float = 0.1
    dead_zone: float = 0.0
    abstain: float = -1.0
    estimate: str = "context"
    decay: float = 0.8
    context_decay: float = 0.8
    batch_weight: float = 0.3
    local_weight: float = 0.5
    unit_weight: float = 0.1
    common_weight: float = 1.0
    pooling: str = "linear"

    def __post_init__(self) -> None:
        if self.form not in ("sign", "smooth"):
            raise ValueError(f"reward form is {self.form!r}, expected sign or smooth")
        if self.width <= 0 or self.dead_zone < 0:
            raise ValueError(f"reward width {self.width} must be > 0 and dead_zone {self.dead_zone} >= 0")
        if self.estimate not in ESTIMATES:
            raise ValueError(f"preference estimate is {self.estimate!r}, expected one of {', '.join(ESTIMATES)}")
        if not 0 <= self.context_decay < 1 or not 0 <= self.unit_weight <= 1 or not 0 <= self.local_weight <= 1:
            raise ValueError(
                f"context_decay {self.context_decay} must be in [0, 1), local_weight {self.local_weight} and "
                f"unit_weight {self.unit_weight} in [0, 1]"
            )
        if not 0 <= self.common_weight <= 1 or (self.common_weight < 1 and self.estimate != "controlled"):
            raise ValueError(
                f"common_weight {self.common_weight} must be in [0, 1], and 1 unless the estimate is controlled"
            )
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}, expected one of {', '.join(POOLINGS)}")
        if not 0 <= self.decay < 1 or not 0 <= self.batch_weight <= 1:
            raise ValueError(f"decay {self.decay} must be in [0, 1) and batch_weight {self.batch_weight} in [0, 1]")


class Processes(Protocol):
    """Several processes, of which this is one."""

    rank: int
    size: int

    def all_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all of them."""


class DecisionTask:
    """A decision set with the backbone behind it; a *handle* is a decision's index in the set.

    Args:
        backbone: the model, steered or not by whoever holds a handle on it.
        decisions: what is decided.
        target: fair share of each group; uniform when None.
        reward: see :class:`RewardConfig`.
        handle: the steering on the backbone, so that the base model is one scale away; None if there is none.
        anchors: neutral texts whose next-token distribution should stay as it is.

    Attributes:
        world: the processes that observe the same decisions together; None for this one by itself.
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
        self.world: Processes | None = None
        self.anchors = tuple(anchors)
        self.decisions = decisions
        self.reward = reward or RewardConfig()
        device = backbone.device
        self.target = torch.tensor(check_target(target, decisions.groups), device=device)
        self.groups, self.contexts, self.answers = (t.to(device) for t in _as_tensors(decisions))
        self.n_contexts = len(decisions.contexts)
        self.blocks = _block_index(decisions).to(device)
        self._questions = _question_index(decisions, self.blocks.tolist()).to(device)
        self._reference: dict[int | str, Tensor] = {}
        self._own_policy: dict[int, Tensor] = {}  # of the base model, as it was passed here
        self._own_mass: dict[int, Tensor] = {}  # likewise
        self._base_policy: dict[int, Tensor] = {}  # the same in all processes
        self._together = {key: group for group in self._portions() for key in group}
        self.forget()

    def forget(self) -> None:
        """Start the running preferences anew."""
        self._running = self.target.expand(self.n_contexts, -1).clone()
        self._seen = torch.zeros(self.n_contexts, device=self.target.device)
        self._blocked = BlockedPreference(self.n_contexts, self.target, self.reward.decay, self.reward.context_decay)
        self._started = self.reward.estimate != "controlled"  # else the base model's layout is fitted first

    @property
    def n_candidates(self) -> int:
        """K, the largest number of candidates of a decision."""
        return self.groups.shape[1]

    def pick(self, handles: Sequence[int]) -> list:
        """The decisions behind handles."""
        return [self.decisions[int(handle)] for handle in handles]

    def reference(self, handles: Sequence[int]) -> Tensor:
        """(N, V) log-probabilities of the base model (scale 0) after the prompts, computed once and cached.

        They are computed in fixed portions of the set. What decisions share a forward pass decides how they are
        rounded, and a run that was resumed, which asks in another order, has to go on bit for bit.
        """

        return self._cached([int(h) for h in handles], self._score_base)

    def base_answer_mass(self, handles: Sequence[int]) -> Tensor:
        """(N,) probability that the base model gives to all candidates together.

        Of decisions whose :meth:`reference` is known: it is from that pass, and no other is made here.
        """
        return torch.stack([self._own_mass[int(h)] for h in handles]).to(self.backbone.device)

    def base_policy(self, handles: Sequence[int]) -> Tensor:
        """(N, K) probabilities of the base model over the candidates, from the pass that :meth:`reference` is of.

        Several processes ask for the same decisions, and each passes some of those that are not known yet.
        """
        keys = [int(h) for h in handles]
        if missing := [key for key in keys if key not in self._base_policy]:
            self._base_policy.update(self._passed_together(missing))
        rows = [self._base_policy[key] for key in keys]
        return torch.stack(rows).to(self.backbone.device) if rows else self.target.new_zeros(0, self.n_candidates)

    def _passed_together(self, handles: list[int]) -> dict[int, Tensor]:
        """The portions that decisions are in, by decision; the processes take turns at them."""
        portions = list(dict.fromkeys(tuple(self._together.get(handle, [handle])) for handle in handles))
        members = [handle for portion in portions for handle in portion]
        rank, size = (0, 1) if self.world is None else (self.world.rank, self.world.size)
        own = portions[rank::size]
        # Who has none passes another's: it would wait anyway, or, where the weights are divided, have to take part.
        for portion in own or [portions[rank % len(portions)]]:
            self._cached(portion[:1], self._score_base)
        mine = {handle for portion in own for handle in portion}
        nothing = torch.zeros(self.n_candidates)
        table = torch.stack([self._own_policy[handle] if handle in mine else nothing for handle in members])
        return dict(zip(members, table if self.world is None else self.world.all_sum(table), strict=True))

    def _score_base(self, handles: list[int]) -> Tensor:
        scores = self.backbone.score(self.pick(handles), next_token=True)
        policy = scores.policy().exp().cpu()
        policy = torch.nn.functional.pad(policy, (0, self.n_candidates - policy.shape[1]))
        self._own_policy.update(zip(handles, policy, strict=True))
        self._own_mass.update(zip(handles, scores.answer_mass().cpu(), strict=True))
        return scores.next_token

    def anchor_reference(self, texts: Sequence[str]) -> Tensor:
        """(N, V) the same after anchor texts."""
        return self._cached(list(texts), self.backbone.next_token)

    @torch.no_grad()
    def _cached(self, keys: list[Any], compute: Callable[[list[Any]], Tensor]) -> Tensor:
        for key in keys:
            if key not in self._reference:
                together = self._together.get(key, [key])
                with self.unsteered():
                    self._reference.update(zip(together, compute(together).cpu(), strict=True))
        return torch.stack([self._reference[key] for key in keys]).to(self.backbone.device)

    def _portions(self, size: int = 24) -> Iterator[list[Any]]:
        """Whole blocks up to so many decisions together, as they are drawn together, and as many anchors."""
        portion: list[int] = []
        members: dict[int, list[int]] = {}
        for handle, block in enumerate(self.blocks.tolist()):
            members.setdefault(block, []).append(handle)
        for handles in members.values():
            if portion and len(portion) + len(handles) > size:
                yield portion
                portion = []
            portion += handles
        yield portion
        anchors = list(dict.fromkeys(self.anchors))
        yield from (anchors[start : start + size] for start in range(0, len(anchors), size))

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
        return self._running if self.reward.estimate == "context" else self._blocked.preference

    @torch.no_grad()
    def observe(self, handles: Sequence[int], policy: Tensor) -> Tensor:
        """Take note of how the current policy decides and reward it.

        Args:
            handles: N decisions.
            policy: (N, K) probabilities, or one-hot choices where no probabilities are known; K may be less than the
                set's if none of the N has more candidates.

        Returns:
            (N, K) the reward of every candidate.
        """
        index = torch.as_tensor(np.asarray(handles), device=self.groups.device)
        groups, answers = self.groups[index], self.answers[index]
        needed = int((groups != ABSENT).sum(1).max())
        if policy.shape[0] != len(index) or not needed <= policy.shape[1] <= self.n_candidates:
            wanted = f"{(len(index), self.n_candidates)}: a row a decision, a column a candidate"
            raise ValueError(f"the policy has shape {tuple(policy.shape)}, expected {wanted}")
        groups = groups[:, : policy.shape[1]]
        free = answers < 0
        observe = self._observe_contexts if self.reward.estimate == "context" else self._observe_blocks
        fair = self.target.new_zeros(len(index), len(self.target))
        fair[free] = observe(self.pool(policy[free].float(), index[free]), index[free])
        return candidate_rewards(fair, groups, answers, self.reward.abstain)

    def pool(self, policy: Tensor, handles: Sequence[int] | Tensor) -> Tensor:
        """(N, K) probabilities of N decisions, pooled over each question's orders among them where the reward is."""
        if self.reward.pooling == "linear":
            return policy
        index = torch.as_tensor(handles, device=self.groups.device)
        questions = self._questions[index].unique(return_inverse=True)[1]
        groups = self.groups[index][:, : policy.shape[1]]
        return logarithmic_pool(policy.log(), groups, questions, len(self.target)).exp()

    def _observe_contexts(self, policy: Tensor, index: Tensor) -> Tensor:
        """(N, G) the reward of each group in each decision, after a batch has updated the running means."""
        contexts, groups = self.contexts[index], self.groups[index][:, : policy.shape[1]]
        batch, mass = group_preference(policy, groups, contexts, self.n_contexts, self.target)
        batch = torch.where(mass[:, None] > 0, batch, self._running)  # where all abstain, nothing new is known
        # A context's first estimate replaces the target it starts from; later ones are blended in.
        weight = torch.where(self._seen > 0, 1 - self.reward.decay, 1.0)[:, None]
        self._running = self._running + weight * (batch - self._running)
        self._seen += mass
        return self._fair(torch.lerp(self._running, batch, self.reward.batch_weight))[contexts]

    def _observe_blocks(self, policy: Tensor, index: Tensor) -> Tensor:
        """The same by :class:`envs.preference.BlockedPreference`."""
        self.start()
        shares, mass, block, context, cell = self._cells(policy, index)
        base = self._cells(self._pooled_base(index), index)[0] if self.reward.estimate == "controlled" else None
        met = mass > 0
        if base is not None:
            base = base[met]
        local = shares.clone()
        local[met] = self._blocked.update(shares[met], block[met].unique(return_inverse=True)[1], context[met], base)
        preference = torch.lerp(self._blocked.preference[context], local, self.reward.local_weight)[cell]
        preference = preference - (1 - self.reward.common_weight) * self._blocked.level
        return torch.lerp(self._fair(preference), self._fair(shares)[cell], self.reward.unit_weight)

    def start(self) -> None:
        """Find out beforehand what the first :meth:`observe` needs; to be called by all processes together."""
        if not self._started:
            self._start_from_base()

    def _start_from_base(self) -> None:
        index = (self.answers < 0).nonzero()[:, 0]
        shares, mass, block, context, _ = self._cells(self._pooled_base(index), index)
        met = mass > 0
        self._blocked.start_from(shares[met], block[met].unique(return_inverse=True)[1], context[met])
        self._started = True

    def _pooled_base(self, index: Tensor) -> Tensor:
        return self.pool(self.base_policy(index.tolist()), index)

    def _cells(self, policy: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Group shares (M, G) of the cells that N decisions fall into, their mass, block and context (M,); each
        decision's cell (N,)."""
        pairs, cell = (self.blocks[index] * self.n_contexts + self.contexts[index]).unique(return_inverse=True)
        groups = self.groups[index][:, : policy.shape[1]]
        shares, mass = group_preference(policy, groups, cell, len(pairs), self.target)
        return shares, mass, pairs // self.n_contexts, pairs % self.n_contexts, cell

    def _fair(self, preference: Tensor) -> Tensor:
        config = self.reward
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


def _block_index(decisions: DecisionSet) -> Tensor:
    """(N,) which block each decision belongs to: the same people in the same template."""
    keys = [(d.template, d.unit) if d.unit else (d.id,) for d in decisions]
    return _numbered(keys)


def _question_index(decisions: DecisionSet, blocks: Sequence[int]) -> Tensor:
    """(N,) which question each decision asks: a block's in one context, of the same groups; unambiguous ones have their
    own."""
    keys = [
        (block, d.context, *sorted(c.group for c in d.candidates)) if d.ambiguous else (d.id,)
        for block, d in zip(blocks, decisions, strict=True)
    ]
    return _numbered(keys)


def _numbered(keys: Iterable[Hashable]) -> Tensor:
    """(N,) int64: the number of each key, by first appearance."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


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
