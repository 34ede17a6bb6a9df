"""The optimiser of a steering: a step on whitened coefficients, then the proximal step of the L1 penalty.

Both are elementwise. With D a coefficient's step size (:mod:`trainers.fisher`), lambda the penalty, and rate what the
optimiser multiplied the averaged gradient by (:func:`trainers.constraints.step_sizes`),

    z = x / D,   z <- the optimiser's step with gradient D g,   x <- soft_threshold(D z, rate D^2 lambda)

so a slice of the coefficients can be updated without the others. ZeRO needs that: it flattens the parameters, gives
each process an optimiser over its own slice, and undoes what anyone else writes into the parameters after the step.
This is therefore done inside ``step()``: D is the entry ``size`` of the optimiser's state, which ZeRO divides as it
does the moments, and lambda is the setting ``penalty`` of a parameter group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trainers.constraints import soft_threshold, step_sizes
from trainers.fisher import whitened_step


class Whitened(torch.optim.Optimizer):
    """Mixed into an optimiser, before it.

    Attributes:
        hold: steps leave everything as it is.
        priming: steps only make the state that the first one would find, so that it can be filled in.
    """

    hold: bool = False
    priming: bool = False

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no closures
        """One step; what has no gradient stays as it is.

        Raises:
            ValueError: if there is a closure; gradients have to be there.
        """
        if closure is not None:
            raise ValueError("closures are not supported")
        if self.hold:
            return
        if self.priming:
            self._prime()
            return
        moved = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        sizes = {p: self.state[p]["size"] for p in moved}
        whitened_step(super().step, list(sizes), list(sizes.values()))
        for parameter, rate in step_sizes(self):
            if penalty := moved.get(parameter, {}).get("penalty", 0.0):
                soft_threshold([parameter], rate * sizes[parameter].square() * penalty)

    @torch.no_grad()
    def _prime(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [(p.clone(), p.grad) for p in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        super().step()
        for parameter, (value, grad) in zip(parameters, before, strict=True):
            parameter.copy_(value)
            parameter.grad = grad
            for entry in self.state[parameter].values():
                if isinstance(entry, torch.Tensor):  # the moments too, which a weight decay has moved
                    entry.zero_()
            self.state[parameter]["size"] = torch.ones_like(parameter)


class SteeringAdam(Whitened, torch.optim.Adam):
    """Adam, so."""
