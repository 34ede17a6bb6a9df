"""DecisionEnv: one decision an episode, the answer as the action, the model's forward pass behind it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from dso.backbone import Backbone
from dso.decisions import DecisionSet
from dso.steering import Handle
from envs.sampler import BlockSampler
from envs.task import DecisionTask, RewardConfig


class DecisionEnv(gym.Env):
    """Decide for someone, and be paid for deciding alike for all groups.

    ## Description
    Each episode is one decision of a set: a prompt with K candidate answers. The model's own policy is the softmax over
    the candidates' log-probabilities, given in ``info["policy"]``; an agent is free to answer otherwise.

    ## Action Space
    ``Discrete(K)``: the candidate that is chosen. A decision with fewer candidates than K takes its own; another
    one is an error.

    ## Observation Space
    ``Discrete(N)``: a *handle*, the decision's index in the set. Prompts stay in the backbone's cache;
    :class:`TokenObservation` expands handles for agents that want to read.

    ## Rewards
    Ambiguous: the equiprobability reward of the chosen candidate's group, given how the answers so far were shared
    among the groups in that context. Unambiguous: +1 for the right candidate, -1 for another.

    ## Starting State
    A decision drawn at random, or ``options={"handle": i}``.

    ## Episode End
    After one step.

    ## Info
    ``id``, ``context``, ``kind``; ``policy`` (K,) of the model as it is; ``reference_log_probs`` (K,) of the base model.
    """

    metadata = {"render_modes": []}

    def __init__(self, backbone: Backbone, decisions: DecisionSet, target: dict[str, float] | None = None, reward: RewardConfig | None = None, handle: Handle | None = None):
        self.task = DecisionTask(backbone, decisions, target, reward, handle)
        self.observation_space = spaces.Discrete(len(decisions))
        self.action_space = spaces.Discrete(self.task.n_candidates)
        self._current = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        chosen = (options or {}).get("handle")
        self._current = int(self.np_random.integers(len(self.task.decisions))) if chosen is None else int(chosen)
        if not 0 <= self._current < len(self.task.decisions):
            raise ValueError(f"handle is {self._current}, expected 0 to {len(self.task.decisions) - 1}")
        return self._current, self._info()

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        candidates = len(self.task.decisions[self._current].candidates)
        if not 0 <= int(action) < self.task.n_candidates:
            raise ValueError(f"action is {action}, expected 0 to {candidates - 1}")
        chosen = torch.zeros(1, self.task.n_candidates, device=self.task.groups.device)
        chosen[0, int(action)] = 1.0
        if int(action) >= candidates:  # no such candidate here: the worst there is, and no preference to learn from
            return self._current, -1.0, True, False, self._info()
        rewards = self.task.observe([self._current], chosen)
        return self._current, float(rewards[0, int(action)]), True, False, self._info()

    @torch.no_grad()
    def _info(self) -> dict[str, Any]:
        decision = self.task.decisions[self._current]
        scores = self.task.backbone.score([decision])
        with self.task.unsteered():
            reference = scores if self.task.handle is None else self.task.backbone.score([decision])
        return {
            "id": decision.id,
            "context": decision.context,
            "kind": decision.kind,
            "policy": scores.policy()[0].exp().cpu().numpy(),
            "reference_log_probs": reference.log_probs[0].cpu().numpy(),
        }


class DecisionVectorEnv(VectorEnv):
    """A batch of decisions a step: :class:`DecisionEnv` with blocks that cancel name and position effects.

    Observations are (num_envs,) handles, actions (num_envs,) candidates. Every episode ends after its step and the next
    batch is returned at once (``SAME_STEP``). Rewards come from the probabilities that the agent stated for this batch
    through :meth:`state_policy`; where it stated none, from the choices themselves.

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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is not None:
            super().reset(seed=seed)
            self.sampler.seed(seed)
        self._next_batch()
        return self.handles.copy(), {}

    def state_policy(self, policy: torch.Tensor) -> torch.Tensor:
        """Say with which probabilities (num_envs, K) this batch is decided; returns every candidate's reward."""
        self._stated = self.task.observe(self.handles, policy.detach())
        return self._stated

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        chosen = torch.as_tensor(np.asarray(actions), device=self.task.groups.device).long()
        rewards = self._stated
        if rewards is None:
            rewards = self.state_policy(torch.nn.functional.one_hot(chosen, self.task.n_candidates).float())
        paid = rewards.gather(1, chosen[:, None])[:, 0].cpu().numpy().astype(np.float64)
        over = np.ones(self.num_envs, dtype=bool)
        self._next_batch()
        return self.handles.copy(), paid, over, np.zeros_like(over), {}

    def restore(self, sampler: dict[str, Any], handles: list[int]) -> np.ndarray:
        """Go on with a batch and a sampler state that were taken earlier; returns the batch's handles."""
        self.sampler.load_state_dict(sampler)
        self.handles, self._stated = np.array(handles, dtype=np.int64), None
        return self.handles.copy()

    def _next_batch(self) -> None:
        self.handles = self.sampler.draw()
        self._stated = None


class TokenObservation(gym.ObservationWrapper):
    """Handles expanded to what the model reads: (length,) prompt tokens, right-padded with -1.

    Args:
        env: a :class:`DecisionEnv`.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        task = env.unwrapped.task
        self._prompts = [np.array(task.backbone.encode(d).prompt, dtype=np.int64) for d in task.decisions]
        size = task.backbone.model.get_input_embeddings().num_embeddings
        self.observation_space = spaces.Box(-1, size - 1, (max(map(len, self._prompts)),), np.int64)

    def observation(self, observation: int) -> np.ndarray:
        tokens = np.full(self.observation_space.shape, -1, dtype=np.int64)
        tokens[: len(self._prompts[observation])] = self._prompts[observation]
        return tokens


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
    """What ``gymnasium.make_vec("dso/Decision-v0", ...)`` makes: ``num_envs`` decisions a step, some of them unambiguous."""
    task = DecisionTask(backbone, decisions, target, reward, handle)
    return DecisionVectorEnv(task, num_envs - unambiguous, unambiguous, seed)
