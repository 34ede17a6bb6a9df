"""Which weights of two models of one architecture to edit.

Lutz, Choenni, Strohmaier and Lauscher, Local Contrastive Editing of Gender Stereotypes, EMNLP 2024 (arXiv 2410.17739).
A *target* is compared with a *reference*:

    value-based   the k weights that both models keep and whose values differ most, |reference - target|
    mask-based    the weights that exactly one of the two keeps, when each is pruned by magnitude

Without pruning a model keeps all of its weights. Editable are the weights of the linear layers between the embeddings
and the head; embeddings, head, norms and biases stay as they are. Pruning is global: of all editable weights of a model
the share with the smallest magnitudes goes. *Places* are flat indices into a weight, ascending, by its dotted name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dso.errors import UserError
from dso.steering.hosts import plain_name, unwrapped

SHARE = 0.005  # of the editable weights, as published
SPARSITY = 0.3  # of the pruning behind masks

Places = dict[str, Tensor]
Masks = Mapping[str, Tensor]


class EditingError(UserError):
    """Models that cannot be compared, or a patch that cannot be used; the message says which and why."""


def editable(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the linear layers of a transformers model but for its head, by dotted name.

    Raises:
        EditingError: if there are none, or one is quantised or not loaded.
    """
    whole: Any = unwrapped(model)
    ends = {
        id(part.weight) for part in (whole.get_input_embeddings(), whole.get_output_embeddings()) if part is not None
    }
    found: dict[str, Tensor] = {}
    for name, module in whole.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or id(module.weight) in ends:
            continue
        weight = module.weight
        if weight.is_meta or not weight.is_floating_point() or not weight.numel():
            raise EditingError(
                f"the weight of {name!r} is quantised, divided or not loaded; load the model whole, in floats"
            )
        found[f"{plain_name(name)}.weight"] = weight
    if not found:
        raise EditingError("the model has no linear layer besides its head, so there is nothing to edit")
    return found


def pair(target: nn.Module, reference: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The editable weights of two models, by name.

    Raises:
        EditingError: if they are not of one architecture.
    """
    own, theirs = editable(target), editable(reference)
    if different := sorted({*own} ^ {*theirs}):
        where = "target" if different[0] in own else "reference"
        raise EditingError(f"the models are of two architectures: only the {where} has {different[0]!r}")
    for name, weight in own.items():
        if weight.shape != theirs[name].shape:
            shapes = f"{tuple(weight.shape)} in the target and {tuple(theirs[name].shape)} in the reference"
            raise EditingError(f"the models are of two architectures: {name!r} has shape {shapes}")
    return {name: (weight.detach(), theirs[name].detach()) for name, weight in own.items()}


@torch.no_grad()
def magnitude_masks(model: nn.Module, sparsity: float = SPARSITY) -> dict[str, Tensor]:
    """What a model keeps when the share ``sparsity`` of its editable weights is pruned by magnitude; bool, by name.

    It needs four bytes for each editable weight. Of weights of one magnitude at the limit, the first ones go.

    Raises:
        EditingError: if ``sparsity`` is not from 0 to below 1.
    """
    if not 0 <= sparsity < 1:
        raise EditingError(f"sparsity is {sparsity:g}, expected a share from 0 to below 1")
    weights = editable(model)
    sizes = torch.cat([weight.detach().abs().float().flatten().cpu() for weight in weights.values()])
    gone = torch.zeros(len(sizes), dtype=torch.bool)
    if number := int(sparsity * len(sizes)):
        limit = sizes.kthvalue(number).values
        gone = sizes < limit
        gone[(sizes == limit).nonzero()[: number - int(gone.sum()), 0]] = True
    parts = (~gone).split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def mask_based(target: Masks, reference: Masks) -> Places:
    """The places that exactly one of two models' masks keeps.

    Raises:
        EditingError: if there are none.
    """
    found = {name: (mask ^ reference[name]).flatten().nonzero()[:, 0] for name, mask in target.items()}
    return _some({name: places for name, places in found.items() if len(places)}, "both masks keep the same weights")


@torch.no_grad()
def value_based(
    target: nn.Module, reference: nn.Module, k: float = SHARE, masks: tuple[Masks, Masks] | None = None
) -> Places:
    """The places where two models differ most.

    Args:
        k: a share of the editable weights, or from 1 on a number of them; places without a difference are left out.
        masks: of the target and of the reference; only what both keep is looked at.

    Raises:
        EditingError: if the models are not of one architecture, do not differ, or ``k`` is not above 0.
    """
    weights = pair(target, reference)
    wanted = number_of(k, sum(weight.numel() for weight, _ in weights.values()))
    names, floor = list(weights), 0.0
    pool: tuple[Tensor, ...] = (torch.empty(0), *torch.empty(2, 0, dtype=torch.long))  # size, weight, place
    for which, (name, (own, theirs)) in enumerate(weights.items()):
        distance = (theirs.float() - own.float()).abs().flatten().cpu()
        if masks is not None:
            distance *= (masks[0][name] & masks[1][name]).flatten()
        index = (distance > floor).nonzero()[:, 0]
        found = distance[index], torch.full_like(index, which), index
        pool = tuple(torch.cat(parts) for parts in zip(pool, found, strict=True))
        if len(pool[0]) > 2 * wanted:  # not more than that is ever kept
            pool = _largest(pool, wanted)
            floor = float(pool[0].min())
    _, owners, indices = _largest(pool, wanted)
    found_by = {name: indices[owners == which].sort().values for which, name in enumerate(names)}
    return _some({name: places for name, places in found_by.items() if len(places)}, "the models do not differ")


def _largest(pool: tuple[Tensor, ...], wanted: int) -> tuple[Tensor, ...]:
    keep = pool[0].topk(min(wanted, len(pool[0]))).indices
    return tuple(part[keep] for part in pool)


def random_places(model: nn.Module, like: Places, seed: int = 0) -> Places:
    """As many places of each weight as ``like`` has there, drawn among all of that weight: what chance would find."""
    drawn, weights = torch.Generator().manual_seed(seed), editable(model)
    return {
        name: torch.randperm(weights[name].numel(), generator=drawn)[: len(places)].sort().values
        for name, places in like.items()
    }


def number_of(k: float, total: int) -> int:
    """How many weights ``k`` asks for: a share below 1, a number from 1 on.

    Raises:
        EditingError: if it is neither.
    """
    if not 0 < k <= total or (k >= 1 and k != int(k)):
        raise EditingError(f"k is {k:g}, expected a share below 1 or a whole number from 1 to {total}")
    return int(k) if k >= 1 else max(1, int(k * total))


def _some(places: Places, reason: str) -> Places:
    if not places:
        raise EditingError(f"nothing to edit: {reason}")
    return places
