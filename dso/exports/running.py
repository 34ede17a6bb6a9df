"""Running a model with other weights or in another dtype, without a second copy of it in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dso.exports.plan import MergePlan
from dso.steering.sites import linear_width


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block the model computes in a dtype; each module's own weights are converted while it runs.

    So a model whose files are mapped into memory needs no more room than its largest module.
    """
    kept: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def before(module: nn.Module, args: Any) -> None:
        kept[module] = dict(module._parameters)
        for name, value in kept[module].items():
            if value is not None and value.is_floating_point():
                module._parameters[name] = nn.Parameter(value.to(dtype), requires_grad=False)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if module in kept:
            module._parameters.update(kept.pop(module))

    own = [m for m in model.modules() if any(p is not None and p.dtype != dtype for p in m._parameters.values())]
    hooks = [module.register_forward_pre_hook(before) for module in own]
    hooks += [module.register_forward_hook(after, always_call=True) for module in own]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def with_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block these parameters stand in the model, also biases that it does not have."""
    kept: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    try:
        for name, value in values.items():
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            kept.append((module, key, module._parameters.get(key)))
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for module, key, old in kept:
            module._parameters[key] = old


def merged_parameters(plan: MergePlan, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that a plan changes or adds, by name, in float32."""
    found: dict[str, Tensor] = {}
    for name, change in plan.changes.items():
        module = model.get_submodule(name)
        old = {key: module._parameters.get(key) for key in ("weight", "bias")}
        new = dict(zip(old, change.apply(old["weight"], old["bias"]), strict=True))
        moved = {"weight": change.moves_weight, "bias": new["bias"] is not None}
        found |= {f"{name}.{key}": value.detach() for key, value in new.items() if value is not None and moved[key]}
    return found


def new_zeros(plan: MergePlan, model: nn.Module) -> dict[str, Tensor]:
    """The biases that a plan's switches bring, by name, as zeros: some have nothing to do."""
    return {f"{name}.bias": torch.zeros(linear_width(model.get_submodule(name))) for name in plan.new_biases}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (rows, tokens, vocabulary) in float32 after every token of ``ids`` (rows, tokens)."""
    output: Any = model(input_ids=ids)
    return output.logits.float()
