"""The null: what a steering does whose directions are random, at the same sites, with the same norms.

A method that is no better than this one has found how far the model can be pushed, and nothing about bias. Its scale is
turned until it changes the answers as much as the steering that it stands beside.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dso.baselines.fitted import SCALES
from dso.steering.model import Steering


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
