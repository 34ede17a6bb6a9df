"""Gymnasium environments around a frozen model: a decision goes in, an equiprobability reward comes out.

Importing the package registers ``dso/Decision-v0`` and ``dso/SteeringSearch-v0``.
"""

from __future__ import annotations

import gymnasium as gym

gym.register("dso/Decision-v0", entry_point="envs.decision:DecisionEnv", vector_entry_point="envs.vector:make_vector")
gym.register("dso/SteeringSearch-v0", entry_point="envs.search:SteeringSearchEnv")
