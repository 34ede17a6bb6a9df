"""Which of a model's weights take over a steering at a fixed scale, and which sites have no place to go to.

    plan = plan_merge(steering, model, scale=0.4)
    plan.changes     # module -> Change: its new weight and bias from its old ones
    plan.left_out    # what cannot be merged, and why
    plan.switches    # what of the config has to be turned over for biases that are new

A slope goes into the norm's own weight, and an offset into its own bias, or else into the linear layers that read the
norm, if nobody else does. An operator behind a linear layer goes into that layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dso.errors import UserError
from dso.exports.maps import AffineMap, affine_map
from dso.exports.norms import NormForm, norm_form
from dso.exports.readers import Readers, readers
from dso.exports.slots import bias_switches
from dso.steering.hosts import named_sites, plain_name, unwrapped
from dso.steering.model import Steering
from dso.steering.sites import linear_width


class MergeError(UserError):
    """A steering that cannot be merged as asked; the message says why and what to do."""


@dataclass(slots=True)
class Change:
    """What becomes of one module's weight and bias.

    Attributes:
        form: of a norm; None for a linear layer.
        read: the map of the norm that a linear layer reads.
        own: the map behind the module itself.
        transposed: whether a linear layer's weight is stored as (in, out).
    """

    form: NormForm | None = None
    read: AffineMap | None = None
    own: AffineMap | None = None
    transposed: bool = False

    @property
    def makes_bias(self) -> bool:
        """Whether the module needs a bias from now on."""
        return any(part is not None and part.offset is not None for part in (self.read, self.own))

    @property
    def moves_weight(self) -> bool:
        """Whether the module's weight changes."""
        return any(part is not None and part.linear for part in (self.read, self.own))

    def apply(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The new weight and bias in float32, from the old ones on the CPU; None where there is none."""
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
        if self.form is not None:
            assert self.own is not None
            weight = None if weight is None else self.own.rows(self.form.base + weight) - self.form.base
            return weight, _shifted(self.own, bias)
        assert weight is not None
        weight = weight.T if self.transposed else weight
        if self.read is not None:
            if self.read.offset is not None:
                shift = weight @ self.read.offset
                bias = shift if bias is None else bias + shift
            weight = self.read.columns(weight)
        if self.own is not None:
            weight, bias = self.own.rows(weight), _shifted(self.own, bias)
        return (weight.T if self.transposed else weight).contiguous(), bias


def _shifted(own: AffineMap, bias: Tensor | None) -> Tensor | None:
    """D bias + c."""
    moved = None if bias is None else own.rows(bias)
    if own.offset is None:
        return moved
    return own.offset if moved is None else moved + own.offset


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of a steering that cannot be merged.

    Attributes:
        site: where.
        part: ``offset`` or ``operator`` (all of it).
        reason: one clause.
    """

    site: str
    part: str
    reason: str


@dataclass(slots=True)
class MergePlan:
    """See the module's docstring.

    Attributes:
        scale: of the steering.
        changes: module name -> what becomes of its parameters.
        switches: name in the text config to turn over -> the linear layers that get a bias by it; those without a
            change get zeros.
        left_out: what is not in ``changes``.
    """

    scale: float
    changes: dict[str, Change] = field(default_factory=dict)
    switches: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def new_biases(self) -> tuple[str, ...]:
        """The linear layers that get a bias by a switch."""
        return tuple(dict.fromkeys(name for owners in self.switches.values() for name in owners))


def plan_merge(
    steering: Steering, model: nn.Module, scale: float, inputs: Mapping[str, Tensor] | None = None
) -> MergePlan:
    """The plan for a steering at a scale; nothing is changed.

    Args:
        model: with its weights, which are run on a few tokens where a site's readers have to be known.
        inputs: of :func:`dso.exports.readers.readers`.
    """
    return _Planner(steering, model, scale, inputs).plan


class _Planner:
    def __init__(self, steering: Steering, model: nn.Module, scale: float, inputs: Mapping[str, Tensor] | None):
        self.plan = MergePlan(scale)
        self.model: Any = unwrapped(model)
        self.modules = named_sites(model)
        self.shared = shared_weights(self.model)
        maps = {site: affine_map(operator, scale) for site, operator in steering.operators.items()}
        moved = {site: own for site, own in maps.items() if own.linear or own.offset is not None}
        self.forms = {
            site: norm_form(self.modules[site], steering.config.sites[site])
            for site in moved
            if not linear_width(self.modules[site])
        }
        asking = [site for site in self.forms if self._needs_readers(site, moved[site])]
        self.readers: dict[str, Readers] = readers(model, asking, inputs) if asking else {}
        self.switches = self._switches(moved)
        for site, own in moved.items():
            (self._norm if site in self.forms else self._linear)(site, own)
        self._finish()

    def _needs_readers(self, site: str, own: AffineMap) -> bool:
        form = self.forms[site]
        if form is None or not form.weight or own.low_rank is not None:
            return own.linear or not (form and form.bias)
        return own.offset is not None and not form.bias

    def _switches(self, moved: Mapping[str, AffineMap]) -> dict[str, tuple[str, ...]]:
        """The switches for biases, looked for only where an offset needs one."""
        wanting = {
            name for site in self.readers for name in self.readers[site].linears if moved[site].offset is not None
        }
        wanting |= {site for site in moved if site not in self.forms and moved[site].offset is not None}
        if all(getattr(self.modules[name], "bias", None) is not None for name in wanting):
            return {}
        return bias_switches(self.model)

    def _norm(self, site: str, own: AffineMap) -> None:
        form = self.forms[site]
        if not self._needs_readers(site, own):
            self.plan.changes[site] = Change(form=form, own=own)
            return
        here, there = AffineMap(), own
        if form is not None and form.weight and own.low_rank is None:
            here, there = replace(own, offset=None), replace(own, diagonal=None)
        if reason := self._against_reading(site, there):
            self._leave(site, "operator" if there.linear else "offset", reason)
            there = AffineMap()
        elif there.offset is not None and (reason := self._without_slot(self.readers[site].linears)):
            self._leave(site, "offset", reason)
            there = replace(there, offset=None)
        if there.linear or there.offset is not None:
            for name in self.readers[site].linears:
                self._change(name).read = there
        if here.linear:
            self.plan.changes[site] = Change(form=form, own=here)

    def _against_reading(self, site: str, own: AffineMap) -> str:
        """Why the readers of a norm cannot take over its map; empty where they can."""
        found = self.readers[site]
        if not found.sole:
            return found.reason
        if own.linear and (tied := [name for name in found.linears if name in self.shared]):
            return f"the weight of {tied[0]}, which reads it, is also that of {self.shared[tied[0]]}"
        return ""

    def _without_slot(self, names: Sequence[str]) -> str:
        """Which of these linear layers can have no bias; empty where all can."""
        without = [name for name in names if not self._has_slot(name)]
        return f"{without[0]} has no bias, and the architecture no switch for one" if without else ""

    def _linear(self, site: str, own: AffineMap) -> None:
        if own.linear and site in self.shared:
            self._leave(site, "operator", f"its weight is also that of {self.shared[site]}")
            return
        if own.offset is not None and (reason := self._without_slot([site])):
            self._leave(site, "offset", reason)
            own = replace(own, offset=None)
        if own.linear or own.offset is not None:
            self._change(site).own = own

    def _has_slot(self, name: str) -> bool:
        own = getattr(self.modules[name], "bias", None) is not None
        return own or any(name in owners for owners in self.switches.values())

    def _change(self, name: str) -> Change:
        transposed = type(self.modules[name]).__name__ == "Conv1D"
        return self.plan.changes.setdefault(name, Change(transposed=transposed))

    def _leave(self, site: str, part: str, reason: str) -> None:
        self.plan.left_out.append(LeftOut(site, part, reason))

    def _finish(self) -> None:
        missing = {
            name
            for name, change in self.plan.changes.items()
            if change.makes_bias and getattr(self.modules[name], "bias", None) is None
        }
        self.plan.switches = {switch: owners for switch, owners in self.switches.items() if missing & {*owners}}


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Module -> the other parameter that its weight is, for weights that are used in two places."""
    places: dict[int, list[str]] = {}
    for name, value in unwrapped(model).named_parameters(remove_duplicate=False):
        places.setdefault(id(value), []).append(plain_name(name))
    pairs = [(name, other) for names in places.values() for name in names for other in names if other != name]
    return {name.removesuffix(".weight"): other for name, other in pairs}


@torch.no_grad()
def partial_steering(steering: Steering, left_out: list[LeftOut]) -> Steering:
    """The steering without what cannot be merged, to measure what leaving it out costs."""
    part = Steering(steering.config)
    part.load_tensors(steering.tensors())
    for entry in left_out:
        for name, value in part.operators[entry.site].named_parameters():
            if name == "b" or (entry.part == "operator" and name in ("a", "u")):
                value.zero_()
    return part.requires_grad_(False)
