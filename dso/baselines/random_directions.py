"""The null: what a steering does whose directions are random, at the same sites, with the same norms.

A method that is no better than this one has found how far the model can be pushed, and nothing about bias. Its scale is
turned until it changes the answers as much as the steering that it stands beside (:func:`scale_of_kl`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from dso.baselines.fitted import SCALES
from dso.steering.model import Steering

ROUNDS = 12
TURNS = 10  # a factor of 1024, up or down


def random_like(steering: Steering, seed: int) -> Steering:
    """A steering of the same operators at the same sites: each coefficient Gaussian, and as long as there."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, value in steering.tensors().items():
        noise = torch.randn(value.shape, generator=generator)
        drawn[name] = noise * (value.detach().float().norm().cpu() / noise.norm())
    made = Steering(replace(steering.config, scale_range=SCALES, scale_curve=()))
    made.load_tensors(drawn)
    return made.requires_grad_(False).to(next(steering.parameters()).device)


def scale_of_kl(kl: Callable[[float], float], wanted: float, start: float = 1.0) -> float:
    """The scale at which a steering's KL to the base model is what is wanted, within 2%, or as near as it comes.

    It doubles or halves the scale until the KL lies between, then halves the interval of its logarithm.

    Args:
        kl: scale -> KL, which rises with the scale.
        wanted: above 0.
        start: the first scale that is tried, above 0.
    """
    low, high = start, start
    for _ in range(TURNS):
        if kl(high) >= wanted:
            break
        low, high = high, 2 * high
    else:
        return high
    for _ in range(TURNS if low == high else 0):
        low = low / 2
        if kl(low) <= wanted:
            break
        high = low
    middle = math.sqrt(low * high)
    for _ in range(ROUNDS):
        found = kl(middle)
        if abs(found - wanted) <= 0.02 * wanted:
            break
        low, high = (middle, high) if found < wanted else (low, middle)
        middle = math.sqrt(low * high)
    return middle
