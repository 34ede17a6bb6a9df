"""Decisions as tokens and pixels, for agents that look for themselves."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from dso.decisions.images import open_image
from envs.tokens import TokenObservation, task_of


class ImageObservation(gym.ObservationWrapper[dict[str, Any], int, int], gym.utils.RecordConstructorArgs):
    """An index expanded to what the model reads and sees, as the files show it, before any processor.

    A dictionary of ``tokens``, as :class:`envs.tokens.TokenObservation` gives them, and ``images`` (count, height,
    width, 3) uint8: the decision's images, filled up with zeros on the right and below to the largest of the set.

    Args:
        env: a :class:`envs.decision.DecisionEnv` over decisions of which at least one has images.

    Raises:
        ValueError: if none has.
    """

    def __init__(self, env: gym.Env[int, int]):
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)
        decisions = task_of(env).decisions
        self._tokens = TokenObservation(env)
        self._files = [decision.images for decision in decisions]
        count = max(map(len, self._files))
        if not count:
            raise ValueError(f"{decisions.name} has no images; TokenObservation is for text")
        sizes = {open_image(path).size for path in {path for files in self._files for path in files}}
        width, height = (max(side) for side in zip(*sizes, strict=True))
        self._shape = count, height, width, 3
        self.observation_space = spaces.Dict(
            {
                "tokens": self._tokens.observation_space,
                "images": spaces.Box(0, 255, self._shape, np.uint8),
            }
        )

    def observation(self, observation: int) -> dict[str, Any]:
        """The prompt and the pictures of the decision at an index."""
        images = np.zeros(self._shape, dtype=np.uint8)
        for number, path in enumerate(self._files[observation]):
            pixels = np.asarray(open_image(path))
            images[number, : pixels.shape[0], : pixels.shape[1]] = pixels
        return {"tokens": self._tokens.observation(observation), "images": images}
