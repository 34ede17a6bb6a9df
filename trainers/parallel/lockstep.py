"""Passes of several processes through one model, as the engine wants them and as divided weights need them.

Where ZeRO-3 divides a model's weights, every pass takes all processes: each has to send its part of each layer.
DeepSpeed leaves it to the program that all of them pass the same modules in the same order, as it records that order
and fetches weights ahead by it. Here they do not. Shares take unequal numbers of passes, a process with none of the
base model's passes sits next to one with some, and the base model passes no operators. So nothing is recorded or
fetched ahead, what is small stays whole (:class:`Kept`), and passes are taken in step (:class:`InStep`): then what is
exchanged hangs on nothing but the order of the model's own layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dso.errors import UserError
from trainers.parallel.ranks import World
from trainers.policy import SteeringPolicy

T = TypeVar("T")


class Whole(nn.Module):
    """All parameters under one roof, as the engine wants them; a pass is whatever ``work``, set before it, does.

    Args:
        policy: its backbone, operators and value head.
        in_step: the processes where each pass takes all of them.
    """

    work: Callable[[], Any]

    def __init__(self, policy: SteeringPolicy, in_step: InStep | None):
        super().__init__()
        self.backbone = policy.task.backbone.model
        self.steering = policy.steering
        self.value_head = policy.value_head
        self._in_step = in_step

    def forward(self) -> Any:
        return self.work()

    def in_step(self, work: Callable[[], T]) -> T:
        """Do work with as many passes as it takes the other processes."""
        result = work()
        if self._in_step is None:
            return result
        nothing = self._in_step.finish()
        if not nothing.requires_grad:
            return result
        # Gradients go back through idle passes too, in every process alike.
        held = (result[0] + nothing, *result[1:]) if isinstance(result, tuple) else cast(Tensor, result) + nothing
        return cast(T, held)


class InStep:
    """Passes through a model whose weights are divided.

    Before a pass every process says that it has one, and of which kind. One that has no more says so, and as long as
    others have, it makes an idle pass for each of theirs: of one token, or of its last images where theirs has some.

    Args:
        model: the backbone.
        world: the processes.
    """

    rank = property(lambda self: self._world.rank)
    size = property(lambda self: self._world.size)

    TEXT = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}

    def __init__(self, model: nn.Module, world: World):
        self._model = model
        self._world = world
        self._idle = False
        self._seen: dict[str, Any] | None = None  # the last inputs with more to them than tokens
        model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        if self._idle:
            return
        more = not set(inputs) <= self.TEXT
        if more:
            self._seen = inputs
        own = _Kind(more, torch.is_grad_enabled())
        self._require(_Kind.of(self._world.most(own.number)).more == more)

    @torch.no_grad()
    def all_sum(self, values: Tensor) -> Tensor:
        """:meth:`trainers.parallel.ranks.World.all_sum` amid work that passes, once nobody passes any more."""
        self.finish()
        return self._world.all_sum(values)

    def finish(self) -> Tensor:
        """Idle passes until nobody has another one; a zero that hangs on those that others take gradients of."""
        nothing = torch.zeros((), device=self._world.device)
        self._idle = True
        try:
            while number := self._world.most(0):
                kind = _Kind.of(number)
                self._require(not kind.more or self._seen is not None)
                with torch.set_grad_enabled(kind.graded and torch.is_grad_enabled()):
                    nothing = nothing + self._pass(kind)
        finally:
            self._idle = False
        return nothing

    def _pass(self, kind: _Kind) -> Tensor:
        one = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=self._world.device), "use_cache": False}
        inputs = self._seen if kind.more and self._seen is not None else one
        return 0.0 * self._model(**inputs).logits[..., 0].float().sum()

    def _require(self, alike: bool) -> None:
        if not alike:
            raise UserError(
                "prompts with and without images meet in one step, but ZeRO-3 has all processes pass the same layers; "
                "use stage 0, 1 or 2, or separate decision sets"
            )


class _Kind:
    """What sort of a pass: whether there is more to it than tokens, and whether gradients go back through it."""

    def __init__(self, more: bool, graded: bool):
        self.more, self.graded = more, graded
        self.number = 1 + 2 * more + graded  # 0 is no pass

    @classmethod
    def of(cls, number: int) -> _Kind:
        return cls(number > 2, number % 2 == 0)


class Kept:
    """Which of ZeRO-3's parameters are whole, and when: an engine's small ones always, others while a layer runs.

    DeepSpeed gathers a layer's weights before each of its passes and lets go of them after it. What it would gather
    ahead by the recorded order of earlier passes is left to the layers themselves.

    Args:
        offload: the engine's ``parameter_offload``.
    """

    HELD = -1  # DeepSpeed lets go of what no module uses; modules are numbered from 0

    def __init__(self, offload: Any):
        self._offload = offload
        self._small = list(offload.persistent_parameters)
        kept = {id(parameter) for parameter in self._small}
        self._others = [p for p in offload.module.parameters() if id(p) not in kept]
        # Called as a step's first pass begins; it would record from here on.
        offload.get_param_coordinator().reset_step = self.divide

    def hold(self) -> None:
        """Make the small parameters whole, which a step divides; to be called by all processes together."""
        if missing := [p for p in self._small if p.ds_status.name == "NOT_AVAILABLE"]:
            missing[0].all_gather(missing)
        for parameter in self._small:
            parameter.ds_active_sub_modules.add(self.HELD)

    def divide(self) -> None:
        """Let go of all others: a backward pass does not always, and where it did not differs among processes."""
        self._offload.release_backward_leftovers()
        for parameter in self._others:
            parameter.ds_active_sub_modules.clear()
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
