"""Where the baselines read and steer: behind decoder layers, and at the layers that read the attention heads."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from dso.baselines.baseline import BaselineError
from dso.steering.hosts import plain_name, unwrapped
from dso.steering.sites import language_backbone, linear_width

OUTPUT = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention|mixer)\.(.*\.)?(o_proj|out_proj|dense|c_proj|wo)$")


def decoder_layers(model: nn.Module) -> tuple[str, ...]:
    """The dotted names of the decoder layers; what one gives is the residual stream behind it.

    Raises:
        BaselineError: if the model has no list of them.
    """
    plain: Any = unwrapped(model)
    prefix, _ = language_backbone(plain)
    count = int(plain.config.get_text_config().num_hidden_layers)
    for name, module in plain.named_modules():
        if name.startswith(prefix) and isinstance(module, nn.ModuleList) and len(module) == count:
            return tuple(plain_name(f"{name}.{number}") for number in range(count))
    raise BaselineError(
        f"{type(plain).__name__} has no list of {count} decoder layers, so there is no residual stream to steer"
    )


def by_depth(layers: tuple[str, ...], depths: tuple[float, ...]) -> tuple[str, ...]:
    """The layers at some depths, each a share of all layers; each layer once, in the order of the depths."""
    last = len(layers) - 1
    return tuple(dict.fromkeys(layers[min(last, int(depth * len(layers)))] for depth in depths))


def stretches(layers: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """What of the layers methods that act behind many of them are tried on."""
    third = len(layers) // 3
    return {"all layers": layers, "middle third": layers[third : 2 * third or 1], "last third": layers[-third or -1 :]}


def attention_outputs(model: nn.Module) -> dict[str, int]:
    """The linear layers that read the attention heads' outputs: dotted name -> how many heads there are.

    Raises:
        BaselineError: if a decoder layer has none, or its input is not the heads' outputs side by side.
    """
    plain: Any = unwrapped(model)
    heads = int(getattr(plain.config.get_text_config(), "num_attention_heads", 0))
    modules = {plain_name(name): module for name, module in plain.named_modules()}
    layers = tuple(f"{layer}." for layer in decoder_layers(model))
    found = [n for n, m in modules.items() if n.startswith(layers) and linear_width(m) and OUTPUT.search(n)]
    if not heads or not found or any(_inputs(modules[name]) % heads for name in found):
        raise BaselineError(
            f"{type(plain).__name__} has no attention output layers that read its heads side by side, so there are no "
            "heads to steer"
        )
    return dict.fromkeys(found, heads)


def _inputs(module: nn.Module) -> int:
    """Number of inputs of a linear layer."""
    width = getattr(module, "in_features", None) or getattr(module, "nx", None)
    if width is None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        width = weight.shape[0]
    return int(width)
