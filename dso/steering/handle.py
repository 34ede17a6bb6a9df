"""A steering on a model: the hooks, the scale that turns them, and who is attached.

    attached(model)      the handles on a model, in the order in which they were attached
    unsteered(model)     the base model within a block, whoever is attached
    detach_all(model)    takes them all off

The hooks (:mod:`dso.steering.hooks`) know their handle, so one that was lost is found again. A copy or a pickle of a
steered model is the base model.

Several steerings on a model act in the order in which they were attached: where they share a site, the second one
transforms what the first one gives, ``h'' = T2(T1(h))``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.hooks import AfterPass, BeforePass, Scales, SiteHook, watch_compiled
from dso.steering.hosts import forget_compiled, unwrapped
from dso.steering.operators import SteeringOperator


class Attachable(Protocol):
    """What a handle needs of a steering."""

    @property
    def config(self) -> SteeringConfig: ...

    @property
    def key(self) -> str: ...

    @property
    def operators(self) -> dict[str, SteeringOperator]: ...


class Turnable(Protocol):
    """What is on a model and can be turned, whatever put it there: :class:`Handle` is one."""

    @property
    def scale(self) -> float | Tensor:
        """The coefficient; 0 is the base model."""
        ...

    @scale.setter
    def scale(self, value: float) -> None: ...

    def detach(self) -> None:
        """Take it off."""
        ...


class Handle:
    """A steering attached to a model; :attr:`scale` may be set at any time.

    The scale lives in a tensor, so that a compiled model need not be recompiled when it changes.

    Args:
        steering: the operators.
        model: the whole model, or what wraps it.
        modules: the model's modules by site.
        scale: see :attr:`scale`.

    Attributes:
        off: whether the scale is 0 throughout.
        numbers: the scale as one number, or one a row.
        coefficient: the scale as a tensor.
    """

    def __init__(self, steering: Attachable, model: nn.Module, modules: Mapping[str, nn.Module], scale: float | Tensor):
        self.steering = steering
        self.key = steering.key
        # In the precision of the scale itself, so that a bound such as 1.2 can be set.
        self._limits = torch.tensor(steering.config.scale_range, dtype=torch.float32).tolist()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._whole = weakref.ref(unwrapped(model))
        self.coefficient = torch.tensor(0.0)
        self.numbers: Scales = (0.0,)
        self.scale = scale
        try:
            for site, operator in steering.operators.items():
                self._hooks.append(modules[site].register_forward_hook(SiteHook(self, site, operator)))
            for whole in dict.fromkeys((unwrapped(model), model)):  # outside of what torch.compile made of it, too
                self._hooks.append(whole.register_forward_pre_hook(BeforePass(self), with_kwargs=True))
                self._hooks.append(whole.register_forward_hook(AfterPass(self)))
        except BaseException:
            self.detach()
            raise
        self._watch()
        forget_compiled()

    @property
    def scale(self) -> float | Tensor:
        """The coefficient s: a float, or a tensor of shape (batch,).

        A batch of n times as many rows is that of ``generate`` with beams or with several sequences a prompt: row i has
        the scale of prompt i // n. A key-value cache keeps the scale that it was begun at: a pass that would go on
        with it at another one raises SteeringError.
        """
        return self._stated if isinstance(self._stated, float) else self._stated.clone()

    @scale.setter
    def scale(self, value: float | Tensor) -> None:
        self._turn(value)

    def _turn(self, value: float | Tensor) -> None:
        try:  # a copy: what the caller does to its tensor afterwards would pass by the checks
            with torch.inference_mode(False):  # a tensor made within inference mode could not be trained with
                scale = torch.as_tensor(value).detach().to(torch.float32, copy=True)
                scale = scale if scale.ndim else scale.cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise SteeringError(f"scale is {value!r}, expected a number or one value a batch row") from error
        low, high = self._limits
        if scale.ndim > 1 or not scale.numel():
            raise SteeringError(f"scale has shape {tuple(scale.shape)}, expected a number or one value a batch row")
        numbers = tuple(scale.flatten().tolist())
        for number in numbers:
            if not math.isfinite(number) or not low <= number <= high:
                raise SteeringError(
                    f"scale is {number:g}, expected a number from {low:g} to {high:g}, the range this steering states"
                )
        if scale.ndim != self.coefficient.ndim or numbers != self.numbers:  # hooks keep what they made of the same ones
            self.coefficient, self.numbers = scale, numbers
            self._watch()
        self._stated = scale if scale.ndim else float(value)
        self.off = not any(numbers)

    def detach(self) -> None:
        """Take the hooks off; doing it twice is harmless."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._watch()
            forget_compiled()

    def _watch(self) -> None:
        """Mind that the model may have been compiled since the steering was attached to it."""
        if (model := self._whole()) is not None:
            watch_compiled(model)


def attached(model: nn.Module) -> list[Handle]:
    """The handles of the steerings on a model, or on what it wraps."""
    hooks = (hook for module in unwrapped(model).modules() for hook in module._forward_hooks.values())
    handles = (getattr(hook, "handle", None) for hook in hooks)
    return list(dict.fromkeys(handle for handle in handles if isinstance(handle, Handle)))


@contextmanager
def unsteered(model: nn.Module, *more: Turnable) -> Iterator[None]:
    """The base model within the block: every steering on it at scale 0, and at its own scale again afterwards.

    Args:
        more: handles that are no :class:`Handle`, which a model cannot be asked for.
    """
    handles: list[Any] = list(dict.fromkeys([*attached(model), *more]))
    scales = [handle.scale for handle in handles]
    try:
        for handle in handles:
            handle.scale = 0.0
        yield
    finally:
        for handle, scale in zip(handles, scales, strict=True):
            handle.scale = scale


def detach_all(model: nn.Module) -> None:
    """Take every steering off a model."""
    for handle in attached(model):
        handle.detach()
