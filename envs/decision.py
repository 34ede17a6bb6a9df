"""DecisionEnv: one decision an episode, the answer as the action, the model's forward pass behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone
from dso.rewards import ABSENT
from dso.steering.handle import Handle
from envs.layout import Indices
from envs.reward import RewardConfig
from envs.spec import SharedSpec
from envs.task import DecisionTask


class DecisionEnv(SharedSpec, gym.Env[Any, Any]):
    """Choose between people, and be paid for choosing all groups alike.

    ## Description
    Each episode is one decision of a set: a prompt with K candidate answers. The model's own policy is the softmax over
    the candidates' log-probabilities, given in ``info["policy"]``; an agent is free to answer otherwise.

    ## Action Space
    ``Discrete(K)``: the candidate that is chosen. Where a decision has fewer than K, ``info["action_mask"]`` says which
    ones exist; choosing one that does not earns -1 and shows no preference.

    ## Observation Space
    ``Discrete(N)``: the decision's index in the set. Prompts stay in the backbone's cache;
    :class:`envs.tokens.TokenObservation` expands an index to tokens for agents that want to read.

    ## Rewards
    Ambiguous: the equiprobability reward of the chosen candidate's group, given how the answers so far were shared
    among the groups in that context. Unambiguous: +1 for the right candidate, -1 for any other.

    ## Starting State
    A decision drawn at random, or ``options={"index": i}``. A seed also makes it forget the answers so far.

    ## Episode End
    After one step.

    ## Info
    ``id``, ``context``, ``kind``; ``policy`` (K,) of the model at the reset; ``reference_log_probs`` (K,) of the base
    model; ``action_mask`` (K,). Where there is no candidate they are 0, -inf and 0.

    Args:
        backbone, decisions, target, reward, handle: see :class:`envs.task.DecisionTask`.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        target: dict[str, float] | None = None,
        reward: RewardConfig | None = None,
        handle: Handle | None = None,
    ):
        self.task = DecisionTask(backbone, decisions, target, reward, handle)
        self.observation_space = spaces.Discrete(len(decisions))
        self.action_space = spaces.Discrete(self.task.n_candidates)
        self._current: int | None = None
        self._facts: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Draw a decision, or take the one that ``options["index"]`` names."""
        super().reset(seed=seed)
        if seed is not None:
            self.task.forget()
        size = len(self.task.decisions)
        chosen = (options or {}).get("index")
        index = int(self.np_random.integers(size)) if chosen is None else int(chosen)
        if not 0 <= index < size:
            raise ValueError(f"index is {index}, expected 0 to {size - 1}")
        (self._facts,) = facts(self.task, [index])
        self._current = index
        return index, self._info()

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Decide, be paid, and end the episode."""
        if self._current is None:
            raise gym.error.ResetNeeded("there is no decision yet: call reset() before step()")
        if not 0 <= int(action) < self.task.n_candidates:
            raise ValueError(f"action is {action}, expected 0 to {self.task.n_candidates - 1}")
        rewards = self.task.observe([self._current], one_hot(self.task, [action]))
        paid = pay(self.task, [self._current], rewards, [action])
        return self._current, float(paid[0]), True, False, self._info()

    def _info(self) -> dict[str, Any]:
        """The facts as objects that the caller may keep and change."""
        return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in self._facts.items()}


@torch.no_grad()
def facts(task: DecisionTask, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """What an info says of each decision, from one pass of the model as it is and one of the base model."""
    decisions = task.pick(indices)
    scores = task.backbone.score(decisions)
    with task.unsteered():
        reference = scores if task.handle is None else task.backbone.score(decisions)
    policy = scores.policy().exp().cpu().numpy()
    log_probs = reference.log_probs.cpu().numpy()
    found = []
    for row, decision in enumerate(decisions):
        count = len(decision.candidates)
        absent = task.n_candidates - count
        found.append(
            {
                "id": decision.id,
                "context": decision.context,
                "kind": decision.kind,
                "policy": np.pad(policy[row, :count], (0, absent)),
                "reference_log_probs": np.pad(log_probs[row, :count], (0, absent), constant_values=-np.inf),
                "action_mask": np.pad(np.ones(count, np.int8), (0, absent)),
            }
        )
    return found


def one_hot(task: DecisionTask, actions: Indices) -> torch.Tensor:
    """(N, K) the choices as a policy."""
    return torch.nn.functional.one_hot(task.layout.index(actions), task.n_candidates).float()


def pay(task: DecisionTask, indices: Indices, rewards: torch.Tensor, actions: Indices) -> np.ndarray:
    """(N,) float64 rewards of the chosen candidates; the worst there is, -1, where there is no such candidate."""
    chosen = one_hot(task, actions)
    paid = (torch.nn.functional.pad(rewards, (0, task.n_candidates - rewards.shape[1])) * chosen).sum(1)
    absent = (chosen.bool() & (task.groups[task.layout.index(indices)] == ABSENT)).any(1)
    return paid.masked_fill(absent, -1.0).cpu().numpy().astype(np.float64)
