"""Gradient checkpointing of a frozen model's layers: activations are computed again in the backward pass, not kept.

transformers checkpoints a layer only in training mode, which would switch dropout on too. Here the model stays in
evaluation mode, so a step is the same with and without. Hooks inside a layer run again with it (steering included),
those on a layer itself do not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_layers(model: nn.Module) -> int:
    """Checkpoint every layer of a transformers model wherever a gradient is wanted; returns how many there are.

    Layers that are checkpointed already are left as they are.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if not isinstance(layer.forward, _Again):
            layer.forward = _Again(layer.forward)
    return len(layers)


class _Again:
    """A layer's forward that is run again in the backward pass."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        # Nothing is drawn in evaluation mode, so random states need not be kept for the second time.
        again = partial(self.forward, **kwargs)
        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)
