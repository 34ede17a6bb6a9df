"""What the fitted baselines give: a steering of this package, or operators of their own that are attached as one is."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dso.baselines.baseline import Task
from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.fingerprint import fingerprint, require_same
from dso.steering.handle import Handle
from dso.steering.hosts import named_sites
from dso.steering.model import Steering
from dso.steering.operators import SteeringOperator

SCALES = (-1000.0, 1000.0)  # whoever compares methods finds out how far each can be turned
# A vector is read behind an answer and added before one, so validation has to say in which direction it helps.
DIRECTIONS = ((1.0, ""), (-1.0, ", reversed"))


def facts(task: Task) -> dict[str, Any]:
    """What a steering states of what it was made for (:class:`~dso.steering.config.SteeringConfig`)."""
    backbone = task.backbone
    return {
        "base_model": backbone.name,
        "revision": backbone.revision,
        "groups": task.decisions.groups,
        "target": task.target,
        "scale_range": SCALES,
        "scoring": backbone.scoring,
    }


def fitted(task: Task, operator: str, tensors: Mapping[str, Mapping[str, Tensor]], rank: int | None = None) -> Steering:
    """A steering of one kind of operator, on the device of the task's model.

    Args:
        operator, rank: see :mod:`dso.steering.operators`.
        tensors: site -> the operator's coefficients by name, all of width d.
    """
    sites = {site: next(iter(own.values())).shape[0] for site, own in tensors.items()}
    known = fingerprint(task.backbone.model, sites)
    config = SteeringConfig(operator=operator, rank=rank, sites=sites, fingerprint=known, **facts(task))
    steering = Steering(config)
    steering.load_tensors({f"{site}.{name}": value for site, own in tensors.items() for name, value in own.items()})
    return steering.requires_grad_(False).to(task.backbone.device)


class OwnOperators:
    """Operators that no checkpoint knows, attached as a :class:`~dso.steering.model.Steering` is.

    Args:
        task: which the operators were fitted for.
        operators: by site.
    """

    def __init__(self, task: Task, operators: Mapping[str, SteeringOperator]):
        self.operators = {s: op.requires_grad_(False).to(task.backbone.device) for s, op in operators.items()}
        sites = {site: operator.width for site, operator in self.operators.items()}
        kind = next(iter(self.operators.values())).kind
        known = fingerprint(task.backbone.model, sites)
        self.config = SteeringConfig(operator=kind, sites=sites, fingerprint=known, **facts(task))
        self.key = secrets.token_hex(8)

    def attach(self, model: nn.Module, scale: float = 1.0) -> Handle:
        """Steer a model until the handle is detached.

        Raises:
            SteeringError: if the model lacks a site, or has other weights there.
        """
        modules = named_sites(model)
        if missing := [site for site in self.operators if site not in modules]:
            raise SteeringError(f"the model has no module {missing[0]!r}; it was made for {self.config.base_model}")
        require_same(self.config.fingerprint, model, self.operators, f"it was made for {self.config.base_model}")
        return Handle(self, model, modules, scale)
