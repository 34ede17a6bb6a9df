"""The hooks of an attached steering: one at each site, and two on the whole model that watch its key-value caches.

What a site's operator needs at a scale is computed once and kept until the scale, a coefficient, the device or the
number of rows changes. Not in training, where coefficients change all the time, and not in a compiler's trace, where
the scale is an input of the graph, so that a change of it compiles nothing.

Keys and values keep the scale of the pass that made them. So a cache is told the scale of each steering that it is
begun at, in an attribute that goes with its copies, and a pass that would go on at another scale is refused. One that
was told nothing is the base model's; who puts a cache together from keys and values says what they are (:func:`say`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dso.steering.config import SteeringError
from dso.steering.operators import SteeringOperator

BEGUN = "_dso_begun"  # the attribute of a cache: a steering's key -> the scales that it was begun at
CACHES = ("past_key_values", "cache_params")  # what transformers calls them

Scales = tuple[float, ...]  # one number, or one a batch row


class Turned(Protocol):
    """What hooks need of their handle."""

    key: str
    numbers: Scales
    coefficient: Tensor
    off: bool


class Hook:
    """A hook that does nothing in a copy or a pickle of the model: that is the base model."""

    def __init__(self, handle: Turned):
        self.handle = handle

    def __deepcopy__(self, memo: dict) -> Any:
        return left_out

    def __reduce__(self) -> Any:
        return _left_out, ()


def left_out(module: nn.Module, args: tuple, other: object) -> None:
    """What stands for a steering's hook in a copy of the model."""


def _left_out() -> Any:
    return left_out


# ---------------------------------------------------------------- sites


class SiteHook(Hook):
    """The forward hook of one site."""

    def __init__(self, handle: Turned, site: str, operator: SteeringOperator):
        super().__init__(handle)
        self.site = site
        self.operator = operator
        self._scale: Tensor | None = None  # that the terms were computed for
        self._state: tuple = ()
        self._terms: tuple[Tensor, ...] = ()
        self._base: Tensor | None = None  # the rows of scale 0, where the terms do not see to them

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self.handle.off:
            return None
        scale = self.handle.coefficient
        if not isinstance(output, Tensor):
            raise SteeringError(f"site {self.site!r} gives a {type(output).__name__}, expected one tensor")
        if torch.compiler.is_compiling() or (state := self._frozen(output)) is None:
            return self._anew(output, scale)
        if scale is not self._scale or state != self._state:
            self._keep(output, scale, state)
        steered = self.operator.steer(output.float(), *self._terms).to(output.dtype)
        return steered if self._base is None else torch.where(self._base, output, steered)

    def _anew(self, output: Tensor, scale: Tensor) -> Tensor:
        if next(self.operator.parameters()).device != output.device:
            self.operator.to(output.device)
        if not scale.ndim:  # one number on the CPU goes with tensors of any device, without a transfer
            return self.operator(output, scale)
        rows = self._rows(output, scale.to(output.device))
        return torch.where(rows == 0, output, self.operator(output, rows))

    def _frozen(self, output: Tensor) -> tuple | None:
        """What the kept terms depend on besides the scale; None where coefficients may change unseen."""
        state: list[object] = [output.device, output.shape[0], output.ndim]
        for value in self.operator._parameters.values():
            assert value is not None
            if value.requires_grad or value.is_inference():
                return None
            state += (value.data_ptr(), value._version)
        return tuple(state)

    def _keep(self, output: Tensor, scale: Tensor, state: tuple) -> None:
        with torch.no_grad(), torch.inference_mode(False):  # a tensor made in inference mode could not be trained with
            own = next(self.operator.parameters()).device
            given = self._rows(output, scale.to(own)) if scale.ndim else scale
            terms, base = self.operator.terms(given), None
            if scale.ndim and 0 in self.handle.numbers:
                zero = given == 0
                if self.operator.neutral is None:
                    base = zero.to(output.device)
                else:  # once a scale instead of once a pass
                    terms = tuple(t.where(~zero, n) for t, n in zip(terms, self.operator.neutral, strict=True))
            terms = tuple(term.to(output.device) for term in terms)
        self._terms, self._base, self._state, self._scale = terms, base, state, scale

    def _rows(self, output: Tensor, scale: Tensor) -> Tensor:
        copies = output.shape[0] // scale.shape[0]  # not divmod, at which TorchDynamo breaks the graph
        if copies * scale.shape[0] != output.shape[0] or not copies:
            raise SteeringError(f"{scale.shape[0]} scales for a batch of {output.shape[0]} at site {self.site!r}")
        return scale.repeat_interleave(copies).view(-1, *[1] * (output.ndim - 1))


# ---------------------------------------------------------------- caches


class BeforePass(Hook):
    """Refuses a pass that would go on with a cache at another scale than it was begun at."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        for name in CACHES:
            cache = kwargs.get(name)
            begun, where = getattr(cache, BEGUN, None), ""
            if begun is None:
                if not hasattr(cache, "get_seq_length") or _empty(cache):
                    continue
                begun, where = {}, " or in a pass that nobody watched"  # before anything was attached, most likely
            then, now = begun.get(self.handle.key, (0.0,)), self.handle.numbers
            if then is now or _same(then, now):
                continue
            if _empty(cache):  # it was reset, to be used again
                delattr(cache, BEGUN)
                continue
            raise SteeringError(
                f"this key-value cache was begun at scale {_text(then)}{where}, and the scale is {_text(now)} now: "
                f"start a new cache ({name}=None), or set the scale back"
            )


class AfterPass(Hook):
    """Tells a cache the scale that it was begun at."""

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        for name in CACHES:
            cache = getattr(output, name, None)
            if cache is None or isinstance(cache, tuple | list):  # neither takes an attribute
                continue
            begun = getattr(cache, BEGUN, None)
            if begun is None:
                setattr(cache, BEGUN, begun := {})
            begun[self.handle.key] = self.handle.numbers


class WatchedCall:
    """What stands for a model's compiled call (``model.compile()``), in whose trace the two hooks above do nothing."""

    def __init__(self, module: nn.Module, call: Any):
        self.module = module
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for before in [*self.module._forward_pre_hooks.values()]:
            if isinstance(before, BeforePass):
                before(self.module, args, kwargs)
        output = self.call(*args, **kwargs)
        for after in [*self.module._forward_hooks.values()]:
            if isinstance(after, AfterPass):
                after(self.module, args, output)
        return output


def watch_compiled(module: nn.Module) -> None:
    """Let what ``module.compile()`` made be watched as long as a steering is on the module."""
    call: Any = module._compiled_call_impl
    wanted = any(isinstance(hook, BeforePass) for hook in module._forward_pre_hooks.values())
    if wanted and call is not None and not isinstance(call, WatchedCall):
        module._compiled_call_impl = WatchedCall(module, call)
    elif not wanted and isinstance(call, WatchedCall):
        module._compiled_call_impl = call.call


def say(cache: Any, handle: Turned) -> None:
    """Tell a cache that was put together by hand that its rows are of the scales that a handle has now."""
    setattr(cache, BEGUN, {handle.key: handle.numbers})


def _same(then: Scales, now: Scales) -> bool:
    """Whether the rows have the scales that they had; rows that were taken out or put in cannot be told apart."""
    if 1 in (len(then), len(now)):
        return len({*then, *now}) == 1
    return then == now or len(then) != len(now)


def _empty(cache: Any) -> bool:
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0


def _text(scales: Scales) -> str:
    return ", ".join(f"{scale:g}" for scale in scales[:4]) + (", ..." if len(scales) > 4 else "")
