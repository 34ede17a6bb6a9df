"""What both forms of the decision environment share: the decisions, the base model's answers, and their rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from dso.decisions.decision import Decision, DecisionSet, check_target
from dso.models.backbone import Backbone
from dso.models.encoded import Positions, join_positions
from dso.models.scores import Scores
from dso.rewards import ABSENT, candidate_rewards
from dso.steering.handle import Handle, unsteered
from envs.association import ORDER, forgive_blocks, without_association
from envs.estimate import PreferenceEstimate
from envs.layout import Indices, Layout
from envs.reward import RewardConfig


class Processes(Protocol):
    """Several processes, of which this is one."""

    rank: int
    size: int

    def all_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all of them."""


class DecisionTask:
    """A decision set with the backbone behind it; a decision goes by its index in the set.

    Args:
        backbone: the model, steered or not by whoever holds a handle on it.
        decisions: what is decided.
        target: fair share of each group; uniform when None.
        reward: see :class:`envs.reward.RewardConfig`.
        handle: the steering on the backbone, so that the base model is one scale away; None if there is none.
        anchors: neutral texts in which every token should stay as likely as it is.

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
        self.layout = Layout.of(decisions, device)
        self.groups, self.contexts, self.answers = self.layout.groups, self.layout.contexts, self.layout.answers
        self.blocks, self.n_contexts = self.layout.blocks, self.layout.n_contexts
        self.estimate = PreferenceEstimate(self.layout, self.target, self.reward, self.base_policy)
        self._reference: dict[int | str, Tensor] = {}
        self._own_policy: dict[int, Tensor] = {}  # of the base model, as it was passed here
        self._own_mass: dict[int, Tensor] = {}  # likewise
        self._base_policy: dict[int, Tensor] = {}  # the same in all processes
        self._wanted: Tensor | None = None
        self._together = {key: group for group in self._portions() for key in group}

    def forget(self) -> None:
        """Start the running preferences anew."""
        self.estimate.forget()

    @property
    def n_candidates(self) -> int:
        """K, the largest number of candidates of a decision."""
        return self.groups.shape[1]

    def pick(self, indices: Indices) -> list[Decision]:
        """The decisions at these indices."""
        return [self.decisions[int(index)] for index in indices]

    def positions(self, indices: Indices) -> Positions:
        """The answer positions of decisions, as the rows of their distributions stand."""
        return self.backbone.positions(self.pick(indices))

    def reference(self, indices: Indices) -> Tensor:
        """(M, V) log-probabilities of the base model (scale 0) at the answer positions (:meth:`positions`), computed
        once and cached.

        They are computed in fixed portions of the set: which decisions share a forward pass decides how they round,
        and a resumed run, which asks in another order, has to continue bit for bit.
        """
        return self._cached([int(i) for i in indices], self._score_base)

    def base_answer_mass(self, indices: Indices) -> Tensor:
        """(N,) probability that the base model gives to all candidates together.

        Only for decisions whose :meth:`reference` is known: it comes from that pass, and no other is made here.
        """
        return torch.stack([self._own_mass[int(i)] for i in indices]).to(self.backbone.device)

    def base_policy(self, indices: Indices) -> Tensor:
        """(N, K) probabilities of the base model over the candidates, from the pass that :meth:`reference` is of.

        Several processes ask for the same decisions, and each passes some of those that are not known yet.
        """
        keys = [int(i) for i in indices]
        if missing := [key for key in keys if key not in self._base_policy]:
            self._base_policy.update(self._passed_together(missing))
        rows = [self._base_policy[key] for key in keys]
        return torch.stack(rows).to(self.backbone.device) if rows else self.target.new_zeros(0, self.n_candidates)

    def _passed_together(self, indices: list[int]) -> dict[int, Tensor]:
        """Base policies of the whole portions that these decisions are in; the processes divide the portions."""
        portions = list(dict.fromkeys(tuple(self._together.get(index, [index])) for index in indices))
        members = [index for portion in portions for index in portion]
        rank, size = (0, 1) if self.world is None else (self.world.rank, self.world.size)
        own = portions[rank::size]
        # A process without a portion passes another's: it would wait anyway, and has to take part where the weights
        # are divided.
        for portion in own or [portions[rank % len(portions)]]:
            self._cached(list(portion[:1]), self._score_base)
        mine = {index for portion in own for index in portion}
        nothing = torch.zeros(self.n_candidates)
        table = torch.stack([self._own_policy[index] if index in mine else nothing for index in members])
        return dict(zip(members, table if self.world is None else self.world.all_sum(table), strict=True))

    def _score_base(self, indices: list[int]) -> list[Tensor]:
        scores = self.backbone.score(self.pick(indices), next_token=True)
        policy = scores.policy().exp().cpu()
        policy = torch.nn.functional.pad(policy, (0, self.n_candidates - policy.shape[1]))
        self._own_policy.update(zip(indices, policy, strict=True))
        self._own_mass.update(zip(indices, scores.answer_mass().cpu(), strict=True))
        return scores.next_token_by_decision("cpu")

    def anchor_reference(self, texts: Sequence[str]) -> Tensor:
        """(M, V) the same behind every token of anchor texts."""
        return self._cached(list(texts), lambda own: self._read(own).next_token_by_decision("cpu"))

    def anchor_kl(self, texts: Sequence[str], reference: Tensor) -> Tensor:
        """(N,) KL in nats to the :meth:`anchor_reference` (M, V) of the same texts, mean over their tokens."""
        return self._read(texts).kl(reference)

    def _read(self, texts: Sequence[str]) -> Scores:
        return self.backbone.likelihood(texts, start=False, next_token=True)

    @torch.no_grad()
    def _cached(self, keys: list[Any], compute: Callable[[list[Any]], list[Tensor]]) -> Tensor:
        device = self.backbone.device
        for key in keys:
            if key not in self._reference:
                together = self._together.get(key, [key])
                with self.unsteered():
                    rows = compute(together)
                # They come back to the device at every step: from pinned memory without waiting.
                kept = [row.pin_memory() for row in rows] if device.type == "cuda" else rows
                self._reference.update(zip(together, kept, strict=True))
        return join_positions([self._reference[key].to(device, non_blocking=True) for key in keys])

    def _portions(self, size: int = 24) -> Iterator[list[Any]]:
        """Whole blocks, as they are drawn together, up to ``size`` decisions; then ``size`` anchors at a time."""
        portion: list[int] = []
        members: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks.tolist()):
            members.setdefault(block, []).append(index)
        for indices in members.values():
            if portion and len(portion) + len(indices) > size:
                yield portion
                portion = []
            portion += indices
        yield portion
        anchors = list(dict.fromkeys(self.anchors))
        yield from (anchors[start : start + size] for start in range(0, len(anchors), size))

    def unsteered(self) -> AbstractContextManager[None]:
        """The base model within the block: every steering on it at scale 0."""
        return unsteered(self.backbone.model)

    @property
    def preference(self) -> Tensor:
        """(C, G) running group preference of each context; the target where nothing was seen."""
        return self.estimate.preference

    @torch.no_grad()
    def observe(self, indices: Indices, policy: Tensor) -> Tensor:
        """Take in how the current policy decides, and reward it.

        Args:
            indices: N decisions.
            policy: (N, K) probabilities, or one-hot choices where no probabilities are known; K may be less than the
                set's if none of the N has more candidates.

        Returns:
            (N, K) the reward of every candidate.

        Raises:
            ValueError: if the policy's shape does not fit the decisions.
        """
        index = self.layout.index(indices)
        groups, answers = self.groups[index], self.answers[index]
        needed = int((groups != ABSENT).sum(1).max())
        if policy.shape[0] != len(index) or not needed <= policy.shape[1] <= self.n_candidates:
            wanted = f"{(len(index), self.n_candidates)}: a row for each decision, a column for each candidate"
            raise ValueError(f"the policy has shape {tuple(policy.shape)}, expected {wanted}")
        free = answers < 0
        fair = self.target.new_zeros(len(index), len(self.target))
        fair[free] = self.estimate.update(policy[free].float(), index[free])
        return candidate_rewards(fair, groups[:, : policy.shape[1]], answers, self.reward.abstain)

    def ambiguous(self, indices: Indices) -> Tensor:
        """(N,) which of N decisions have no right answer."""
        return self.answers[self.layout.index(indices)] < 0

    def pool(self, policy: Tensor, indices: Indices) -> Tensor:
        """(N, K) probabilities of N decisions; where the reward pools, what each question's orders say together."""
        return self.estimate.pool(policy, indices)

    def start(self) -> None:
        """Measure what the first :meth:`observe` needs. All processes call it together."""
        self.estimate.start()

    def start_wanted(self) -> Tensor:
        """(N, K) of all decisions what :meth:`wanted` gives: how the base model decides is measured once, by all
        processes together.
        """
        if self._wanted is not None:
            return self._wanted
        index = (self.answers < 0).nonzero()[:, 0]
        base = self.base_policy(index.tolist())
        base = base.clamp(min=torch.finfo(base.dtype).tiny).log().masked_fill(self.groups[index] == ABSENT, -torch.inf)
        weight = self.reward.common_weight
        self._wanted = base.new_zeros(len(self.answers), self.n_candidates)
        self._wanted[index] = without_association(base, index, self.layout, self.target.to(base), weight, ORDER)
        return self._wanted

    def wanted(self, indices: Indices, log_policy: Tensor) -> Tensor:
        """(N, K) what a step on these decisions learns towards: log-probabilities of the base model without its
        association (:mod:`envs.association`), nearer to the policy by 1 - ``block_weight`` of each block's mean error;
        0 for unambiguous decisions, -inf where there is no candidate.

        Args:
            indices: N decisions.
            log_policy: (N, K) as the policy is now.
        """
        index = self.layout.index(indices)
        wanted = self.start_wanted()[index][:, : log_policy.shape[1]]
        free = self.ambiguous(index)
        groups, weight = len(self.target), self.reward.block_weight
        wanted[free] = forgive_blocks(wanted[free], log_policy[free], index[free], self.layout, groups, weight)
        return wanted

    def state_dict(self) -> dict[str, Tensor]:
        """The running preferences, and the policy that is wanted if it was asked for, for checkpoints."""
        wanted = {} if self._wanted is None else {"wanted": self._wanted.clone()}
        return self.estimate.state_dict() | wanted

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        self.estimate.load_state_dict(state)
        self._wanted = state["wanted"].clone() if "wanted" in state else None
