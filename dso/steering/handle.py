"""A steering on a model: the hooks, the scale that turns them, and who is attached.

    attached(model)      the handles on a model, in the order in which they were attached
    unsteered(model)     the base model within a block, whoever is attached
    detach_all(model)    takes them all off

The hooks know their handle, so one that was lost is found again. A copy or a pickle of a steered model is the base
model: a hook is not copied, something that does nothing stands in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.hosts import forget_compiled, unwrapped
from dso.steering.operators import SteeringOperator


class Attachable(Protocol):
    """What a handle needs of a steering."""

    config: SteeringConfig

    @property
    def operators(self) -> dict[str, SteeringOperator]: ...


class Handle:
    """A steering attached to a model; :attr:`scale` may be set at any time.

    The scale lives in a tensor, so that a compiled model need not be recompiled when it changes.

    Args:
        steering: the operators.
        modules: the model's modules by site.
        scale: see :attr:`scale`.
    """

    def __init__(self, steering: Attachable, modules: Mapping[str, nn.Module], scale: float | Tensor):
        self.steering = steering
        # In the precision of the scale itself, so that a bound such as 1.2 can be set.
        self._limits = torch.tensor(steering.config.scale_range, dtype=torch.float32).tolist()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self.scale = scale
        try:
            for site, operator in steering.operators.items():
                self._hooks.append(modules[site].register_forward_hook(SiteHook(self, site, operator)))
        except BaseException:
            self.detach()
            raise
        forget_compiled()

    @property
    def scale(self) -> float | Tensor:
        """The coefficient s: a float, or a tensor of shape (batch,).

        A batch of n times as many rows is that of ``generate`` with beams or with several sequences a prompt: row i has
        the scale of prompt i // n.
        """
        return self._stated if isinstance(self._stated, float) else self._stated.clone()

    @scale.setter
    def scale(self, value: float | Tensor) -> None:
        try:  # a copy: what the caller does to its tensor afterwards would pass by the checks
            with torch.inference_mode(False):  # a tensor made within inference mode could not be trained with
                scale = torch.as_tensor(value).detach().to(torch.float32, copy=True)
                scale = scale if scale.ndim else scale.cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SteeringError(f"scale is {value!r}, expected a number or one value a batch row") from error
        low, high = self._limits
        if scale.ndim > 1 or not scale.numel():
            raise SteeringError(f"scale has shape {tuple(scale.shape)}, expected a number or one value a batch row")
        for number in scale.flatten().tolist():
            if not math.isfinite(number) or not low <= number <= high:
                raise SteeringError(
                    f"scale is {number:g}, expected a number from {low:g} to {high:g}, the range this steering states"
                )
        self._scale = scale
        self._stated = scale if scale.ndim else float(value)
        self._off = not bool(scale.any())

    def detach(self) -> None:
        """Take the hooks off; doing it twice is harmless."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            forget_compiled()


class SiteHook:
    """The forward hook of one site."""

    def __init__(self, handle: Handle, site: str, operator: SteeringOperator):
        self.handle = handle
        self.site = site
        self.operator = operator

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.handle._off:
            return None
        if not isinstance(output, Tensor):
            raise SteeringError(f"site {self.site!r} gives a {type(output).__name__}, expected one tensor")
        if next(self.operator.parameters()).device != output.device:
            self.operator.to(output.device)
        scale = self.handle._scale
        if not scale.ndim:  # one number on the CPU goes with tensors of any device, without a transfer
            return self.operator(output, scale)
        copies, rest = divmod(output.shape[0], scale.shape[0])
        if rest or not copies:
            raise SteeringError(f"{scale.shape[0]} scales for a batch of {output.shape[0]} at site {self.site!r}")
        rows = scale.to(output.device).repeat_interleave(copies).view(-1, *[1] * (output.ndim - 1))
        return torch.where(rows == 0, output, self.operator(output, rows))

    def __deepcopy__(self, memo: dict) -> Any:
        return left_out

    def __reduce__(self) -> Any:
        return _left_out, ()


def left_out(module: nn.Module, args: tuple, output: Tensor) -> None:
    """What stands for a steering's hook in a copy of the model."""


def _left_out() -> Any:
    return left_out


def attached(model: nn.Module) -> list[Handle]:
    """The handles of the steerings on a model, or on what it wraps."""
    hooks = (hook for module in unwrapped(model).modules() for hook in module._forward_hooks.values())
    return list(dict.fromkeys(hook.handle for hook in hooks if isinstance(hook, SiteHook)))


@contextmanager
def unsteered(model: nn.Module) -> Iterator[None]:
    """The base model within the block: every steering on it at scale 0, and at its own scale again afterwards."""
    scales = {handle: handle.scale for handle in attached(model)}
    try:
        for handle in scales:
            handle.scale = 0.0
        yield
    finally:
        for handle, scale in scales.items():
            handle.scale = scale


def detach_all(model: nn.Module) -> None:
    """Take every steering off a model."""
    for handle in attached(model):
        handle.detach()
