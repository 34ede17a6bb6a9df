"""Decisions as the tokens that the model reads, for agents that read for themselves."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from envs.decision import DecisionEnv
from envs.task import DecisionTask


class TokenObservation(gym.ObservationWrapper[np.ndarray, int, int], gym.utils.RecordConstructorArgs):
    """An index expanded to what the model reads: (length,) int64 prompt tokens, padded on the right with -1.

    Args:
        env: a :class:`envs.decision.DecisionEnv`.
    """

    def __init__(self, env: gym.Env[int, int]):
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        task = task_of(env)
        self._prompts = [np.array(task.backbone.encode(d).prompt, dtype=np.int64) for d in task.decisions]
        size = task.backbone.model.get_input_embeddings().num_embeddings
        self._length = max(map(len, self._prompts))
        self.observation_space = spaces.Box(-1, size - 1, (self._length,), np.int64)

    def observation(self, observation: int) -> np.ndarray:
        """The prompt of the decision at an index."""
        tokens = np.full(self._length, -1, dtype=np.int64)
        tokens[: len(self._prompts[observation])] = self._prompts[observation]
        return tokens


def task_of(env: gym.Env[Any, Any]) -> DecisionTask:
    """The task of a decision environment.

    Raises:
        TypeError: if the environment is another one.
    """
    inner = env.unwrapped
    if not isinstance(inner, DecisionEnv):
        raise TypeError(f"expected a DecisionEnv, found {type(inner).__name__}")
    return inner.task
