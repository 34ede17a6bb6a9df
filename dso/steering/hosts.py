"""The models that a steering meets: plain, compiled, wrapped by a launcher or an adapter, offloaded, quantised.

Sites keep the names that they have in the plain model. What wraps a whole model (``torch.compile``, a data-parallel
wrapper, PEFT) is looked through; what wraps a part of it leaves a segment in the dotted names that is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from dso.steering.config import SteeringError

PARALLEL = ("DataParallel", "DistributedDataParallel", "DeepSpeedEngine", "FullyShardedDataParallel")
SEGMENTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model inside whatever wraps it."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in PARALLEL:
            inner = model.module
        if inner is None and hasattr(model, "get_base_model"):  # a PeftModel
            inner = cast(Any, model).get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def plain_name(name: str) -> str:
    """A dotted name without the segments that wrappers of parts leave in it."""
    return ".".join(part for part in name.split(".") if part not in SEGMENTS)


def named_sites(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the plain model by the names that they have where nothing is wrapped."""
    return {plain_name(name): module for name, module in unwrapped(model).named_modules()}


def weights(site: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and values of a site's own base weights, in the order of their names.

    An adapter's additions are left out; offloaded weights are read from where accelerate keeps them.

    Raises:
        SteeringError: if they are on no device, or quantised, so that nothing can be compared.
    """
    module = getattr(module, "base_layer", module)  # PEFT keeps the layer that it adapts there
    hook = getattr(module, "_hf_hook", None)
    offloaded = getattr(hook, "weights_map", None)
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise SteeringError(f"module {site!r} is quantised, so its weights cannot be held against those trained on")
        if value.is_meta:
            if offloaded is None:
                raise SteeringError(f"the weights of module {site!r} are not loaded (they are on the meta device)")
            value = offloaded[name]
        yield name, value


def divided(parameters: Iterable[Any]) -> list[Any]:
    """Those that ZeRO-3 has divided among processes and that are not whole at the moment."""
    return [p for p in parameters if hasattr(p, "ds_id") and p.ds_status.name == "NOT_AVAILABLE"]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within the block the weights of a module that ZeRO-3 has divided are whole; for all processes together."""
    parts = divided(module.parameters())
    if parts:
        parts[0].all_gather(parts)
    try:
        yield
    finally:
        for parameter in parts:
            parameter.partition()


def forget_compiled() -> None:
    """Let every compiled function of this process be compiled anew.

    What was compiled before a hook was registered does not know of it, and keeps one that was taken off: TorchDynamo
    does not guard hooks (``skip_nnmodule_hook_guards``).
    """
    if "torch._dynamo.convert_frame" in sys.modules:  # nothing was compiled without it
        torch.compiler.reset()
