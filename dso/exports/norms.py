"""What a norm does with its weight, found by running it rather than by the name of its class.

With ``n(x)`` the normed input, the output of every norm that merges is

    y = n(x) * (base + weight) + bias

with base 0 (LayerNorm, RMSNorm of Llama) or 1 (RMSNorm of Gemma), with or without a bias. Some norms have no weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class NormForm:
    """How a norm's output depends on its parameters.

    Attributes:
        weight: whether there is one; without it, ``y = n(x) + bias``.
        base: what is added to the weight before it multiplies: 0 or 1; 1 where there is no weight.
        bias: whether there is one.
    """

    weight: bool
    base: float
    bias: bool


def norm_form(module: nn.Module, width: int) -> NormForm | None:
    """The form of a norm; None where it is none of those that are known, so that nothing can be said about it.

    The module's forward is run in float32 on a small random input, with weights and biases of the probe's own; the
    module is left as it is, and its hooks and whatever an offloading library has put around it are not called.

    Args:
        module: the module of a site. An affine dependence on the weight is all that is asked of it.
        width: size of its last dimension.
    """
    own = {name for name, value in module._parameters.items() if value is not None}
    if own - {"weight", "bias"} or any(True for _ in module.children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x, gain, shift = torch.randn(3, width, generator=generator)
    zero, one = torch.zeros(width), torch.ones(width)
    try:
        if "weight" not in own:
            plain = _run(module, own, x, one, zero)
            fits = _close(_run(module, own, x, one, shift), plain + shift * ("bias" in own))
            return NormForm(weight=False, base=1.0, bias="bias" in own) if fits else None
        at_zero = _run(module, own, x, zero, zero)
        normed = _run(module, own, x, one, zero) - at_zero
        base = next((base for base in (0.0, 1.0) if _close(at_zero, base * normed)), None)
        if base is None or not normed.abs().max() > TOLERANCE:
            return None
        wanted = normed * (base + gain) + shift * ("bias" in own)
        fits = _close(_run(module, own, x, gain, shift), wanted)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):  # its forward wants something else
        return None
    return NormForm(weight=True, base=base, bias="bias" in own) if fits else None


@torch.no_grad()
def _run(module: nn.Module, own: set[str], x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The output of the module's class for ``x`` of shape (width,), with these parameters where it has them."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("forward", None)  # an offloading library's
    values = {"weight": weight, "bias": bias}
    twin._parameters = {name: nn.Parameter(values[name]) if name in own else None for name in module._parameters}
    output = type(module).forward(twin, x[None, None])
    if not isinstance(output, Tensor) or output.shape != (1, 1, x.numel()):
        raise TypeError("no tensor of the input's shape")
    return output[0, 0]


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * (1 + other.abs().max()))
