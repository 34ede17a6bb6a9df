"""A steering as LoRA, exactly: what it adds to the weights of the linear layers that read a site.

Behind a norm whose output only linear layers read, slopes ``a`` at scale ``s`` are ``W diag(s a)`` added to the weight
``W`` (d_out, d) of each of them. With slopes at a set S of k coordinates only, that is a LoRA of rank k (Hu et al.,
arXiv 2106.09685):

    W x + s B A x        A (k, d) picks the coordinates: rows of the identity        B (d_out, k) = W[:, S] a_S

A low-rank operator is one of its own rank, A = V^T and B = W U. An offset ``b`` is a constant behind each layer,
``s W b``: a bias of B, which PEFT knows (``lora_bias``) and most engines do not.

All layers get the same rank, that of the site with most slopes, padded with zeros; so do those behind a site with none.
Engines scale by alpha / rank, many know one rank an adapter, and TGI skips a kind of layer that one block lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dso.errors import UserError
from dso.exports.norms import norm_form
from dso.exports.plan import shared_weights
from dso.exports.readers import Readers, readers
from dso.steering.fingerprint import require_same
from dso.steering.hosts import named_sites, unwrapped
from dso.steering.model import Steering
from dso.steering.operators import SteeringOperator
from dso.steering.sites import linear_width


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """What one linear layer gets at scale 1, in float32 on the CPU.

    Attributes:
        a: (rank, d_in).
        b: (d_out, rank).
        bias: (d_out,), of offsets; None where there are none.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """A steering as LoRA.

    Attributes:
        steering: what the adapter does, as a steering: the one that was asked for, less what is left out.
        layers: linear layer -> what it gets.
        rank: of every layer.
        transposed: whether the model stores these layers' weights as (in, out), as GPT-2 does.
        tied: whether one of these layers has the weight of another module.
        cut: how many slopes were set to zero to get there.
        left_out: site -> why it, or its offset, cannot be in the adapter.
    """

    steering: Steering
    layers: dict[str, LoraLayer]
    rank: int
    transposed: bool
    tied: bool = False
    cut: int = 0
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def offsets(self) -> bool:
        """Whether layers get a bias, which PEFT adds and most engines do not."""
        return any(layer.bias is not None for layer in self.layers.values())


@torch.no_grad()
def lora_plan(
    steering: Steering,
    model: nn.Module,
    *,
    rank: int | None = None,
    offsets: bool = True,
    tied_head: bool = False,
    allow_partial: bool = False,
    check: bool = True,
) -> LoraPlan:
    """A steering as LoRA of a model, which is run on a few tokens to see who reads which norm.

    Args:
        steering: at norms; nothing is changed in it.
        model: with its weights, not quantised.
        rank: keep the slopes of each site that do most, so many (:func:`strongest`); None keeps all.
        offsets: whether the adapter can hold offsets.
        tied_head: whether it may be of a head that has the weight of the embedding, which is exact where the head runs
            as a layer of its own and wrong where an adapter is merged into the weight.
        allow_partial: leave out what cannot be a LoRA, instead of refusing it.
        check: refuse a model of other weights than the ones that the steering was trained on.

    Raises:
        UserError: naming what cannot be a LoRA; if nothing is left; or if the operators' own rank is beyond ``rank``.
    """
    sites = steering.config.sites
    if check:
        require_same(steering.config.fingerprint, model, sites, f"the steering is for {steering.config.base_model!r}")
    found = readers(model, sites)
    modules, shared = named_sites(model), shared_weights(model)
    left_out = {site: why for site in sites if (why := _against(modules, site, found[site], shared, tied_head))}
    if left_out and not allow_partial:
        raise UserError(_refusal(left_out, len(sites)))
    kept = [site for site in sites if site not in left_out]
    if not offsets and (lost := [site for site in kept if _moved(steering, site, "b")]):
        if not allow_partial:
            raise UserError(
                f"{len(lost)} sites have an offset, which this format cannot hold ({lost[0]!r} is the first); "
                "--allow-partial leaves the offsets out"
            )
        left_out |= dict.fromkeys(lost, "its offset has no place")
    if not kept:
        raise UserError(f"no site can be a LoRA: {left_out[next(iter(left_out))]}")
    whole = part = restricted(steering, kept, offsets)
    linears = {site: found[site].linears for site in kept}
    if rank is not None:
        part = strongest(whole, model, linears, rank)
    plan = _planned(part, modules, linears)
    tied = any(name in shared for name in plan.layers)
    return replace(plan, tied=tied, cut=_slopes(whole) - _slopes(part), left_out=left_out)


def _against(modules: Mapping[str, Any], site: str, found: Readers, shared: Mapping[str, str], tied_head: bool) -> str:
    """Why what a site does cannot be a LoRA; empty where it can."""
    if linear_width(modules[site]):
        return "it is a linear layer itself, not a norm"
    if not found.sole:
        return found.reason
    for name in found.linears:
        if not isinstance(weight := modules[name].weight, Tensor) or not weight.is_floating_point():
            return f"the weight of {name}, which reads it, is quantised"
        if name in shared and not tied_head:
            other = shared[name].removesuffix(".weight")
            return f"{name}, which reads it, has the weight of {other}; --tied-head changes it all the same"
    return ""


def _refusal(left_out: Mapping[str, str], count: int) -> str:
    site, reason = next(iter(left_out.items()))
    others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
    return (
        f"{len(left_out)} of {count} sites cannot be a LoRA: {site!r} ({reason}){others}; "
        "--allow-partial leaves them out"
    )


def _slopes(steering: Steering) -> int:
    return sum(int(value.count_nonzero()) for key, value in steering.tensors().items() if key.endswith(".a"))


def _moved(steering: Steering, site: str, key: str) -> bool:
    values = dict(steering.operators[site].named_parameters())
    return key in values and bool(values[key].any())


def restricted(steering: Steering, sites: Sequence[str], offsets: bool = True) -> Steering:
    """A steering at some of its sites only, with its offsets or without; what was measured is not stated."""
    config = steering.config
    known = {site: config.fingerprint[site] for site in sites} if isinstance(config.fingerprint, Mapping) else {}
    part = Steering(
        replace(config, sites={site: config.sites[site] for site in sites}, fingerprint=known, scale_curve=())
    )
    tensors = {key: value for key, value in steering.tensors().items() if key.rpartition(".")[0] in part.config.sites}
    if not offsets:
        tensors |= {key: torch.zeros_like(value) for key, value in tensors.items() if key.endswith(".b")}
    part.load_tensors(tensors)
    return part.requires_grad_(False)


@torch.no_grad()
def strongest(steering: Steering, model: nn.Module, linears: Mapping[str, Sequence[str]], count: int) -> Steering:
    """A steering with at most ``count`` slopes a site, the others zero; offsets stay.

    Kept are those that move the layers behind a norm most, were all of its inputs of one size: by ``|a_i g_i|`` times
    the norm of column i of their weights, with the norm's own gain ``g``.

    Args:
        linears: site -> the linear layers that read it.

    Raises:
        UserError: if the operators are of a low rank beyond ``count``.
    """
    if (steering.config.rank or 0) > count:
        raise UserError(f"the operators have rank {steering.config.rank}; only slopes can be cut to {count} a site")
    part = restricted(steering, list(steering.config.sites))
    modules = named_sites(model)
    for site, operator in part.operators.items():
        slopes: Any = dict(operator.named_parameters()).get("a")
        if slopes is None or int(slopes.count_nonzero()) <= count:
            continue
        columns = sum(weight_of(modules[name]).square().sum(0) for name in linears[site])
        effect = slopes.abs() * gain_of(modules[site], slopes.numel()).abs() * torch.as_tensor(columns).sqrt()
        slopes[effect.argsort(descending=True, stable=True)[count:]] = 0
    return part


def gain_of(module: Any, width: int) -> Tensor:
    """What a norm multiplies its normed input with, (width,); ones where it has no weight or none that is known."""
    form = norm_form(module, width)
    if form is None or not form.weight:
        return torch.ones(width)
    return form.base + module.weight.detach().to("cpu", torch.float32)


def weight_of(module: Any) -> Tensor:
    """A linear layer's weight as (out, in), in float32 on the CPU."""
    weight = module.weight.detach()
    if weight.is_meta:
        weight = module._hf_hook.weights_map["weight"]  # where accelerate keeps what it has put off the device
    weight = weight.to("cpu", torch.float32)
    return weight.T if type(module).__name__ == "Conv1D" else weight


def _factors(operator: SteeringOperator) -> tuple[Tensor, Tensor, Tensor | None]:
    """A (k, d), U (d, k) and the offset of an operator, which is h + s (U A h + b) with the smallest k for slopes."""
    own = {key: value.detach().to("cpu", torch.float32) for key, value in operator.named_parameters()}
    offset = own["b"] if "b" in own and own["b"].any() else None
    if "u" in own:
        return own["v"].T.contiguous(), own["u"], offset
    slopes = own.get("a", torch.zeros(operator.width))
    chosen = slopes.nonzero().flatten()
    picks = torch.eye(operator.width)[chosen]
    return picks, picks.T * slopes[chosen], offset


def _planned(
    steering: Steering,
    modules: Mapping[str, nn.Module],
    linears: Mapping[str, Sequence[str]],
) -> LoraPlan:
    factors = {site: _factors(operator) for site, operator in steering.operators.items()}
    if not any(u.any() or offset is not None for _, u, offset in factors.values()):
        raise UserError("all coefficients that could be exported are zero; there is nothing to export")
    rank = max(1, *(len(a) for a, _, _ in factors.values()))
    biased = any(offset is not None for _, _, offset in factors.values())
    layers = {}
    for site, (a, u, offset) in factors.items():
        padded = torch.nn.functional.pad(a, (0, 0, 0, rank - len(a)))
        for name in linears[site]:
            weight = weight_of(modules[name])
            bias = weight @ (torch.zeros(weight.shape[1]) if offset is None else offset) if biased else None
            layers[name] = LoraLayer(padded, torch.nn.functional.pad(weight @ u, (0, rank - len(a))), bias)
    transposed = {type(modules[name]).__name__ == "Conv1D" for name in layers}
    if len(transposed) > 1:
        raise UserError("some of these layers store their weights as (in, out) and some do not; no adapter holds both")
    ordered = {name: layers[name] for name in modules if name in layers}
    return LoraPlan(steering, ordered, rank, transposed.pop())


def target_modules(layers: Mapping[str, object], model: nn.Module) -> list[str]:
    """The names by which an adapter's config states its layers: last segments where these name the same layers of the
    model, as engines expect, else full names."""
    names = named_sites(unwrapped(model))
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    meant = {name for name in names if name.rpartition(".")[2] in ends}
    return sorted(ends) if meant == {*layers} else list(layers)
