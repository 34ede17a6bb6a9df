"""The Stable-Baselines3 policy whose action distribution is the steered model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn
from torch.distributions import Categorical

from dso.steering.model import Steering
from envs.layout import Indices
from envs.task import DecisionTask
from trainers.optimizer import SteeringAdam, Whitened

BASELINES = ("context", "value", "none")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a batch of N decisions is decided.

    Attributes:
        log_policy: (N, K) log pi, -inf where there is no candidate.
        next_token: (M, V) log-probabilities at the answer positions, the N after the prompts first, or None if not
            asked for.
        values: (N,) baseline of each decision's reward.
        answer_mass: (N,) probability of all candidates together.
    """

    log_policy: Tensor
    next_token: Tensor | None
    values: Tensor
    answer_mass: Tensor


class SteeringPolicy(ActorCriticPolicy):
    """pi(k | index) of the steered backbone; only the operators and the value head are parameters.

    Args:
        task: decisions and backbone; kept out of the module tree, so that no backbone weight is ever saved or moved.
        steering: the operators, attached to the backbone by the caller.
        baseline: ``context`` (running mean reward of the decision's context), ``value`` (a linear head on the output
            layer's input) or ``none``.
        optimizer_class, optimizer_kwargs: a :class:`trainers.optimizer.Whitened` optimiser and what it takes; Adam with
            SB3's epsilon, 1e-5, by default.
    """

    task: DecisionTask
    value_head: nn.Linear | None
    context_values: Tensor
    whitening: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        task: DecisionTask,
        steering: Steering,
        baseline: str = "context",
        use_sde: bool = False,
        optimizer_class: type[Whitened] = SteeringAdam,
        optimizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        if baseline not in BASELINES:
            raise ValueError(f"baseline is {baseline!r}, expected one of {', '.join(BASELINES)}")
        if not issubclass(optimizer_class, Whitened):
            raise ValueError(f"optimizer_class is {optimizer_class}, expected one with trainers.optimizer.Whitened")
        self._wiring = (task, steering, baseline)  # read by _build, before nn.Module accepts submodules
        kwargs |= {"optimizer_class": optimizer_class, "optimizer_kwargs": optimizer_kwargs or {"eps": 1e-5}}
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[], use_sde=use_sde, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        task, self.steering, self.baseline = self._wiring
        self.__dict__["task"] = task
        self.value_head = None
        if self.baseline == "value":
            self.value_head = nn.Linear(task.backbone.model.get_output_embeddings().in_features, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
        rows = task.n_contexts if self.baseline == "context" else 0
        self.register_buffer("context_values", torch.zeros(rows, 2))  # ambiguous, unambiguous
        self.register_buffer("whitening", torch.ones(sum(p.numel() for p in self.steering.parameters())))
        # The steering is a group of its own, as a penalty is on it alone.
        groups = [{"params": list(module.parameters())} for module in (self.steering, self.value_head) if module]
        make: Any = self.optimizer_class  # torch's base class has no learning rate, all of its optimisers have
        self.optimizer: Whitened = make(groups, lr=lr_schedule(1), **self.optimizer_kwargs)

    def step_sizes(self) -> list[Tensor]:
        """For each tensor of the steering how far a unit step of the optimiser goes (:mod:`trainers.fisher`)."""
        tensors = list(self.steering.parameters())
        parts = self.whitening.split([p.numel() for p in tensors])
        return [part.view(p.shape) for part, p in zip(parts, tensors, strict=True)]

    def set_step_sizes(self, sizes: list[Tensor]) -> None:
        """Set :meth:`step_sizes`; they are saved with the policy."""
        self.whitening.copy_(torch.cat([size.flatten() for size in sizes]))

    def decide(self, indices: Indices, *, next_token: bool = False) -> Outcome:
        """Run the steered model on a batch of decisions, by their indices."""
        index = torch.as_tensor(indices).reshape(-1).long().cpu()
        scores = self.task.backbone.score(
            self.task.pick(index), next_token=next_token, hidden=self.value_head is not None
        )
        return Outcome(
            scores.policy(),
            scores.next_token,
            self._values(index, scores.hidden),
            scores.answer_mass(),
        )

    def _values(self, index: Tensor, hidden: Tensor | None) -> Tensor:
        if self.value_head is not None:
            if hidden is None:
                raise ValueError("the value head reads the output layer's input")
            return self.value_head(hidden.float())[:, 0]
        if self.baseline == "context":
            index = index.to(self.context_values.device)
            return self.context_values[self.task.contexts[index], (self.task.answers[index] >= 0).long()]
        return torch.zeros(len(index), device=self.task.groups.device)

    @torch.no_grad()
    def update_baseline(self, indices: Indices, rewards: Tensor, decay: float = 0.8) -> None:
        """Move the contexts' running mean rewards towards a batch's."""
        if self.baseline != "context":
            return
        index = torch.as_tensor(indices).reshape(-1).long().to(self.context_values.device)
        cells = self.task.contexts[index] * 2 + (self.task.answers[index] >= 0).long()
        total = torch.zeros(self.context_values.numel(), device=cells.device)
        counts = total.index_add(0, cells, torch.ones_like(rewards))
        means = total.index_add(0, cells, rewards) / counts.clamp(min=1)
        flat = self.context_values.view(-1)
        flat.copy_(torch.where(counts > 0, flat + (1 - decay) * (means - flat), flat))

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """SB3's rollout call: actions (N,), values (N,) and log-probabilities (N,)."""
        outcome = self.decide(_indices(obs))
        actions = choose(outcome.log_policy, deterministic)
        return actions, outcome.values, outcome.log_policy.gather(1, actions[:, None])[:, 0]

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """SB3's training call: values (N,), log-probabilities (N,) and entropies (N,)."""
        outcome = self.decide(_indices(obs))
        chosen = outcome.log_policy.gather(1, actions.long().view(-1, 1))[:, 0]
        return outcome.values, chosen, Categorical(logits=outcome.log_policy).entropy()

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        """Zeros: every episode ends with its step, so what follows has no value, and a forward pass is saved."""
        return torch.zeros(len(_indices(obs)), device=self.task.groups.device)

    def get_distribution(self, obs: PyTorchObs) -> CategoricalDistribution:
        """The distribution over candidates."""
        log_policy = self.decide(_indices(obs)).log_policy
        return CategoricalDistribution(log_policy.shape[1]).proba_distribution(log_policy)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        return choose(self.decide(_indices(observation)).log_policy, deterministic)


def _indices(observation: PyTorchObs) -> Tensor:
    """The indices that SB3 passes on; the environment's observations are no dictionaries."""
    if isinstance(observation, dict):
        raise TypeError("expected the decisions' indices, found a dictionary of observations")
    return observation


def choose(log_policy: Tensor, deterministic: bool = False) -> Tensor:
    """(N,) candidates: sampled, or the most probable."""
    return log_policy.argmax(-1) if deterministic else Categorical(logits=log_policy).sample()
