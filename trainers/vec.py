"""The Gymnasium decision environment as the vectorised environment that Stable-Baselines3 expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from envs.vector import DecisionVectorEnv


class DecisionVecEnv(VecEnv):
    """Adapter: same batches, indices, actions and rewards; episodes of one step.

    Args:
        env: the Gymnasium vector environment.
    """

    def __init__(self, env: DecisionVectorEnv):
        self.inner = env
        self._actions = np.zeros(env.num_envs, dtype=np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def state_policy(self, policy: Tensor) -> Tensor:
        """See :meth:`envs.vector.DecisionVectorEnv.state_policy`."""
        return self.inner.state_policy(policy)

    def pass_over(self) -> np.ndarray:
        """The next batch's indices; nobody decides this one, so nothing is noted of it."""
        return self.inner.reset()[0]

    def reset(self) -> np.ndarray:
        seed = self._seeds[0]
        self._reset_seeds()
        return self.inner.reset(seed=seed)[0]

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = np.asarray(actions).reshape(-1)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        indices, rewards, terminated, truncated, _ = self.inner.step(self._actions)
        infos: list[dict[str, Any]] = [{"episode": {"r": float(r), "l": 1, "t": 0.0}} for r in rewards]
        return indices, rewards.astype(np.float32), terminated | truncated, infos

    def close(self) -> None:
        self.inner.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.inner, attr_name)] * len(self._indices(indices))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.inner, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        return [getattr(self.inner, method_name)(*args, **kwargs)] * len(self._indices(indices))

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * len(self._indices(indices))

    def _indices(self, indices: Any) -> Sequence[int]:
        return list(self._get_indices(indices))
