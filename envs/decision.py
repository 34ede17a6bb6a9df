"""DecisionEnv: one decision an episode, the answer as the action, the model's forward pass behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone
from dso.rewards import ABSENT
from dso.steering.model import Handle
from envs.sampler import BlockSampler
from envs.task import DecisionTask, RewardConfig


class DecisionEnv(gym.Env):
    """Decide for someone, and be paid for deciding alike for all groups.

    ## Description
    Each episode is one decision of a set: a prompt with K candidate answers. The model's own policy is the softmax over
    the candidates' log-probabilities, given in ``info["policy"]``; an agent is free to answer otherwise.

    ## Action Space
    ``Discrete(K)``: the candidate that is chosen. Where a decision has fewer than K, ``info["action_mask"]`` says which
    there are; choosing one that is not there earns -1 and shows no preference.

    ## Observation Space
    ``Discrete(N)``: a *handle*, the decision's index in the set. Prompts stay in the backbone's cache;
    :class:`TokenObservation` expands handles for agents that want to read.

    ## Rewards
    Ambiguous: the equiprobability reward of the chosen candidate's group, given how the answers so far were shared
    among the groups in that context. Unambiguous: +1 for the right candidate, -1 for another.

    ## Starting State
    A decision drawn at random, or ``options={"handle": i}``. With a seed, the answers so far are forgotten.

    ## Episode End
    After one step.

    ## Info
    ``id``, ``context``, ``kind``; ``policy`` (K,) of the model as it was at the reset; ``reference_log_probs`` (K,) of
    the base model; ``action_mask`` (K,). Where there is no candidate they are 0, -inf and 0.

    Args:
        backbone, decisions, target, reward, handle: see :class:`envs.task.DecisionTask`.
    """

    metadata = {"render_modes": []}

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
        super().reset(seed=seed)
        if seed is not None:
            self.task.forget()
        chosen = (options or {}).get("handle")
        handle = int(self.np_random.integers(len(self.task.decisions))) if chosen is None else int(chosen)
        if not 0 <= handle < len(self.task.decisions):
            raise ValueError(f"handle is {handle}, expected 0 to {len(self.task.decisions) - 1}")
        self._current, self._facts = handle, self._measure(handle)
        return handle, self._info()

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        if self._current is None:
            raise gym.error.ResetNeeded("there is no decision yet: call reset() before step()")
        if not 0 <= int(action) < self.task.n_candidates:
            raise ValueError(f"action is {action}, expected 0 to {self.task.n_candidates - 1}")
        rewards = self.task.observe([self._current], _one_hot(self.task, [action]))
        paid = _pay(self.task, [self._current], rewards, [action])
        return self._current, float(paid[0]), True, False, self._info()

    def _info(self) -> dict[str, Any]:
        """The facts as objects that the caller may keep and change."""
        return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in self._facts.items()}

    @torch.no_grad()
    def _measure(self, handle: int) -> dict[str, Any]:
        decision = self.task.decisions[handle]
        scores = self.task.backbone.score([decision])
        with self.task.unsteered():
            reference = scores if self.task.handle is None else self.task.backbone.score([decision])
        absent = self.task.n_candidates - len(decision.candidates)
        return {
            "id": decision.id,
            "context": decision.context,
            "kind": decision.kind,
            "policy": np.pad(scores.policy()[0].exp().cpu().numpy(), (0, absent)),
            "reference_log_probs": np.pad(reference.log_probs[0].cpu().numpy(), (0, absent), constant_values=-np.inf),
            "action_mask": np.pad(np.ones(len(decision.candidates), np.int8), (0, absent)),
        }


class DecisionVectorEnv(VectorEnv):
    """A batch of decisions a step: :class:`DecisionEnv` with blocks that cancel name and position effects.

    Observations are (num_envs,) handles, actions (num_envs,) candidates. Every episode ends after its step and the next
    batch is returned at once (``SAME_STEP``); ``info["final_obs"]`` has the handles that were decided. Rewards come
    from the probabilities that the agent stated for this batch through :meth:`state_policy`; where it stated none, from
    the choices themselves. A candidate that is not there earns -1. A reset with a seed starts anew: the same batches
    follow, and the answers so far are forgotten.

    Args:
        task: decisions, backbone and rewards.
        ambiguous, unambiguous: decisions of each kind a batch.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, task: DecisionTask, ambiguous: int, unambiguous: int = 0, seed: int = 0):
        self.task = task
        self.sampler = BlockSampler(task.decisions, ambiguous, unambiguous, seed)
        self.num_envs = self.sampler.size
        self.single_observation_space = spaces.Discrete(len(task.decisions))
        self.single_action_space = spaces.Discrete(task.n_candidates)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.handles = np.zeros(self.num_envs, dtype=np.int64)
        self._stated: torch.Tensor | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            super().reset(seed=seed)
            self.sampler.seed(seed)
            self.task.forget()
        self._next_batch()
        return self.handles.copy(), {}

    def state_policy(self, policy: torch.Tensor) -> torch.Tensor:
        """Say with which probabilities (num_envs, K) this batch is decided; returns every candidate's reward."""
        self._stated = self.task.observe(self.handles, policy.detach())
        return self._stated

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.min() < 0 or actions.max() >= self.task.n_candidates:
            wanted = f"{self.num_envs} candidates from 0 to {self.task.n_candidates - 1}"
            raise ValueError(f"actions are {actions.tolist()}, expected {wanted}")
        rewards = self.state_policy(_one_hot(self.task, actions)) if self._stated is None else self._stated
        paid = _pay(self.task, self.handles, rewards, actions)
        over, decided = np.ones(self.num_envs, dtype=bool), self.handles
        self._next_batch()
        return self.handles.copy(), paid, over, np.zeros_like(over), {"final_obs": decided, "_final_obs": over.copy()}

    def restore(self, sampler: dict[str, Any], handles: list[int]) -> np.ndarray:
        """Go on with a batch and a sampler state that were taken earlier; returns the batch's handles."""
        self.sampler.load_state_dict(sampler)
        self.handles, self._stated = np.array(handles, dtype=np.int64), None
        return self.handles.copy()

    def _next_batch(self) -> None:
        self.handles = self.sampler.draw()
        self._stated = None


class TokenObservation(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """Handles expanded to what the model reads: (length,) prompt tokens, right-padded with -1.

    Args:
        env: a :class:`DecisionEnv`.
    """

    def __init__(self, env: gym.Env):
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        task = env.unwrapped.task
        self._prompts = [np.array(task.backbone.encode(d).prompt, dtype=np.int64) for d in task.decisions]
        size = task.backbone.model.get_input_embeddings().num_embeddings
        self.observation_space = spaces.Box(-1, size - 1, (max(map(len, self._prompts)),), np.int64)

    def observation(self, observation: int) -> np.ndarray:
        tokens = np.full(self.observation_space.shape, -1, dtype=np.int64)
        tokens[: len(self._prompts[observation])] = self._prompts[observation]
        return tokens


Indices = Sequence[int] | np.ndarray


def _one_hot(task: DecisionTask, actions: Indices) -> torch.Tensor:
    chosen = torch.as_tensor(np.asarray(actions), device=task.groups.device).long()
    return torch.nn.functional.one_hot(chosen, task.n_candidates).float()


def _pay(task: DecisionTask, handles: Indices, rewards: torch.Tensor, actions: Indices) -> np.ndarray:
    """(N,) the chosen candidates' rewards; the worst there is, -1, where there is no such candidate."""
    chosen = _one_hot(task, actions)
    paid = (torch.nn.functional.pad(rewards, (0, task.n_candidates - rewards.shape[1])) * chosen).sum(1)
    index = torch.as_tensor(np.asarray(handles), device=task.groups.device)
    absent = (chosen.bool() & (task.groups[index] == ABSENT)).any(1)
    return paid.masked_fill(absent, -1.0).cpu().numpy().astype(np.float64)


def make_vector(
    num_envs: int,
    backbone: Backbone,
    decisions: DecisionSet,
    *,
    unambiguous: int = 0,
    target: dict[str, float] | None = None,
    reward: RewardConfig | None = None,
    handle: Handle | None = None,
    seed: int = 0,
) -> DecisionVectorEnv:
    """What ``gymnasium.make_vec("dso/Decision-v0", ...)`` makes: ``num_envs`` decisions a step, some unambiguous."""
    task = DecisionTask(backbone, decisions, target, reward, handle)
    return DecisionVectorEnv(task, num_envs - unambiguous, unambiguous, seed)
