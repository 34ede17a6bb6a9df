"""Steerings to export, and what they do by hooks."""

from __future__ import annotations

import torch

from dso.steering.model import Steering

INPUT = "model.layers.0.input_layernorm"
QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
IDS = torch.arange(3, 19)[None]


def slopes(**chosen: float) -> torch.Tensor:
    """16 slopes, zero but for those at ``c<place>``."""
    found = torch.zeros(16)
    for place, value in chosen.items():
        found[int(place[1:])] = value
    return found


def steering_of(model: torch.nn.Module, sites: list[str], kind: str = "scale", **values: torch.Tensor) -> Steering:
    """A steering with these coefficients at every site."""
    steering = Steering.for_model(model, operator=kind, sites=sites)
    with torch.no_grad():
        for key, value in steering.tensors().items():
            if (name := key.rpartition(".")[2]) in values:
                value.copy_(values[name])
    return steering


def moved(model: torch.nn.Module, operator: str, slopes: int = 16) -> Steering:
    """A steering of the default sites far from the identity, with this many slopes a site."""
    steering = Steering.for_model(model, operator=operator, rank=3 if operator == "low_rank" else None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in steering.tensors().items():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
            if key.endswith(".a"):
                value[torch.randperm(len(value), generator=generator)[slopes:]] = 0
    return steering


@torch.no_grad()
def hooked(model: torch.nn.Module, steering: Steering, scale: float) -> torch.Tensor:
    """The logits of :data:`IDS` under a steering."""
    with steering.on(model, scale):
        return model(IDS).logits
