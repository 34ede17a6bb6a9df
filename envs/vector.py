"""DecisionVectorEnv: a batch of decisions a step, in blocks in which names and positions cancel."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from dso.decisions.decision import DecisionSet
from dso.decisions.sampler import BlockSampler
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from envs.decision import facts, one_hot, pay
from envs.reward import RewardConfig
from envs.spec import SharedSpec
from envs.task import DecisionTask


class DecisionVectorEnv(SharedSpec, VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """:class:`envs.decision.DecisionEnv` in batches.

    Observations are (num_envs,) indices of decisions, actions (num_envs,) candidates. Every episode ends after its step
    and the next batch comes with it (``SAME_STEP``). Infos are those of Gymnasium's own vector form: what
    :class:`envs.decision.DecisionEnv` says of each decision, stacked, each key with its mask; of the batch that was
    decided under ``final_obs`` and ``final_info``. Rewards follow from the probabilities that the agent states for this
    batch through :meth:`state_policy`, or, if it states none, from the choices themselves. A candidate that does not
    exist earns -1. A reset with a seed starts anew: the same batches follow, and the answers so far are forgotten.

    Args:
        task: decisions, backbone and rewards.
        ambiguous, unambiguous: decisions of each kind in a batch.
        seed: of the batches; None draws one at random.
        infos: whether infos describe the decisions, which costs a forward pass a batch. A trainer that passes the
            batch through the model itself does without.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(
        self,
        task: DecisionTask,
        ambiguous: int,
        unambiguous: int = 0,
        seed: int | None = None,
        infos: bool = True,
    ):
        self.task = task
        self.sampler = BlockSampler(task.decisions, ambiguous, unambiguous, seed)
        self.num_envs = self.sampler.size
        self.single_observation_space = spaces.Discrete(len(task.decisions))
        self.single_action_space = spaces.Discrete(task.n_candidates)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.indices = np.zeros(self.num_envs, dtype=np.int64)
        self._infos = infos
        self._facts: list[dict[str, Any]] = []
        self._stated: torch.Tensor | None = None

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The next batch; with a seed, the first batch of that seed."""
        if isinstance(seed, list):
            raise ValueError(f"seed is {seed}, expected one number: the decisions of a batch are drawn together")
        if seed is not None:
            super().reset(seed=seed)
            self.sampler.seed(seed)
            self.task.forget()
        self._next_batch()
        return self.indices.copy(), self._stacked()

    def state_policy(self, policy: torch.Tensor) -> torch.Tensor:
        """Say with which probabilities (num_envs, K) this batch is decided; returns every candidate's reward."""
        self._stated = self.task.observe(self.indices, policy.detach())
        return self._stated

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Decide the batch, be paid, and get the next one."""
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.min() < 0 or actions.max() >= self.task.n_candidates:
            wanted = f"{self.num_envs} candidates from 0 to {self.task.n_candidates - 1}"
            raise ValueError(f"actions are {actions.tolist()}, expected {wanted}")
        rewards = self.state_policy(one_hot(self.task, actions)) if self._stated is None else self._stated
        paid = pay(self.task, self.indices, rewards, actions)
        over, decided, known = np.ones(self.num_envs, dtype=bool), self.indices, self._stacked()
        self._next_batch()
        final: dict[str, Any] = {"final_obs": decided, "_final_obs": over.copy()}
        if known:
            final |= {"final_info": known, "_final_info": over.copy()}
        return self.indices.copy(), paid, over, np.zeros_like(over), self._stacked() | final

    def restore(self, sampler: dict[str, Any], indices: list[int]) -> np.ndarray:
        """Continue with a batch and a sampler state that were taken earlier; returns the batch's indices."""
        self.sampler.load_state_dict(sampler)
        self._set_batch(np.array(indices, dtype=np.int64))
        return self.indices.copy()

    def _next_batch(self) -> None:
        self._set_batch(self.sampler.draw())

    def _set_batch(self, indices: np.ndarray) -> None:
        self.indices, self._stated = indices, None
        self._facts = facts(self.task, indices) if self._infos else []

    def _stacked(self) -> dict[str, Any]:
        """The facts as Gymnasium stacks them: arrays that the caller may keep and change."""
        infos: dict[str, Any] = {}
        for row, known in enumerate(self._facts):
            infos = self._add_info(infos, known, row)
        return infos


def make_vector(
    num_envs: int,
    backbone: Backbone,
    decisions: DecisionSet,
    *,
    unambiguous: int = 0,
    target: dict[str, float] | None = None,
    reward: RewardConfig | None = None,
    handle: Handle | None = None,
    seed: int | None = None,
) -> DecisionVectorEnv:
    """What ``gymnasium.make_vec("dso/Decision-v0", ...)`` makes: ``num_envs`` decisions a step, some unambiguous."""
    task = DecisionTask(backbone, decisions, target, reward, handle)
    return DecisionVectorEnv(task, num_envs - unambiguous, unambiguous, seed)
