"""Where a model's architecture has room for a bias that its checkpoint does not have.

Architectures switch biases on in their config (``attention_bias``, ``mlp_bias``). Which linear layers a switch gives
one is found by building the model anew without weights; a switch that changes anything else is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dso.steering.sites import linear_width


def bias_switches(model: Any) -> dict[str, tuple[str, ...]]:
    """Switches of a model's (text) config -> the linear layers that would get a bias if they were turned over."""
    config = model.config.get_text_config()
    names = [name for name, value in config.to_dict().items() if "bias" in name and isinstance(value, bool)]
    base = _parameters(model, {})
    found = {}
    for name in names:
        try:
            switched = _parameters(model, {name: not getattr(config, name)})
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError):  # a combination it does not know
            continue
        added = switched.keys() - base.keys()
        same = base.keys() <= switched.keys() and all(switched[key] == shape for key, shape in base.items())
        owners = {key.removesuffix(".bias") for key in added if key.endswith(".bias")}
        if added and same and len(owners) == len(added) and owners <= _linear_names(model):
            found[name] = tuple(key for key, _ in model.named_modules() if key in owners)
    return found


def switched_config(config: Any, switches: Iterable[str]) -> Any:
    """A copy of a model's config with these switches of its text part turned over."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name in switches:
        setattr(text, name, not getattr(text, name))
    return config


def _parameters(model: Any, changes: dict[str, bool]) -> dict[str, torch.Size]:
    with torch.device("meta"):
        fresh: nn.Module = type(model)(switched_config(model.config, changes))
    return {name: value.shape for name, value in fresh.named_parameters()}


def _linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if linear_width(module)}
