"""What turns losses into steps: in this process, or by a DeepSpeed engine over several.

A step is learned from in parts (micro-batches). Each part's loss already has the weight that it has in the whole batch
of all processes, so gradients are added up, never averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from trainers.optimizer import Whitened
from trainers.parallel.ranks import World
from trainers.policy import SteeringPolicy

T = TypeVar("T")


class Learner:
    """One process.

    Args:
        policy: whose parameters are learned by its optimiser, a :class:`trainers.optimizer.Whitened`.
        max_norm: gradients beyond it are scaled down to it.
        parts: that a step is learned from in; more of them take less memory and an additional forward pass.
    """

    world: World = World()
    shared: bool = False  # whether the model is passed by a launcher's processes together

    def __init__(self, policy: SteeringPolicy, max_norm: float, parts: int = 1):
        self.policy = policy
        self.parts = parts
        self.optimizer: Whitened = policy.optimizer
        self.max_norm = max_norm
        # Under the index that torch's optimisers number them by.
        self.parameters: list[Tensor] = list(policy.parameters())
        self._prime()
        self.take_over()

    def pass_through(self, work: Callable[[], T]) -> T:
        """Run work that passes through the model; gradients may be taken by torch.autograd.grad, not by a step."""
        return work()

    def forward(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Run work whose outcome the next :meth:`backward` goes back from."""
        return work()

    def backward(self, loss: Tensor, *, first: bool, last: bool) -> None:
        """Add the gradient of one part of a step."""
        if first:
            self.optimizer.zero_grad()
        loss.backward()

    def step(self, *, usable: bool = True) -> tuple[float, bool]:
        """Take the step, if it is usable and the gradient is finite; the same in every process.

        Returns:
            the gradient's norm, and whether the step was taken.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm))
        taken = usable and bool(torch.isfinite(torch.tensor(norm)))
        if taken:
            self.optimizer.step()
        return norm, taken

    def take_over(self) -> None:
        """Go on from the policy's coefficients and step sizes as they are now, after they were changed outside."""
        self._fill("size", dict(enumerate(self.policy.step_sizes())))

    def optimizer_state(self) -> dict[str, Tensor]:
        """``<parameter's index>/<name>`` of everything that the optimiser remembers, whole, however it is divided."""
        return {
            f"{index}/{name}": value.clone()
            for index, parameter in enumerate(self.parameters)
            for name, value in self.optimizer.state[parameter].items()
            if name != "size"  # the policy has it
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`optimizer_state`, and :meth:`take_over`."""
        for name in dict.fromkeys(key.split("/")[1] for key in state):
            known = {index: f"{index}/{name}" for index in range(len(self.parameters))}
            self._fill(name, {index: state[key] for index, key in known.items() if key in state})
        self.take_over()

    def close(self) -> None:
        """Let go of what is held for learning; nothing can be learned after it."""

    def _prime(self) -> None:
        self.optimizer.priming = True
        self.optimizer.step()
        self.optimizer.priming = False

    def _fill(self, name: str, values: dict[int, Tensor]) -> None:
        """Set one entry of the optimiser's state, for the parameters of the given indices."""
        for index, value in values.items():
            self.optimizer.state[self.parameters[index]][name].copy_(value)
