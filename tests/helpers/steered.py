"""A steering with random coefficients, and the logits of whatever it is on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dso import Steering

INPUT = torch.tensor([[5, 9, 33, 70, 12], [8, 8, 40, 2, 61]])


def moved(model: nn.Module, seed: int = 0, **facts) -> Steering:
    """A steering with random coefficients, as it is while it is trained."""
    steering = Steering.for_model(model, **facts)
    generator = torch.Generator().manual_seed(seed)
    for value in steering.tensors().values():
        value.data = 0.3 * torch.randn(value.shape, generator=generator)
    return steering


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = INPUT) -> Tensor:
    """(B, L, V) of a model as it is."""
    return model(ids).logits
