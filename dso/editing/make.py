"""From two models to a patch, and where it sits."""

from __future__ import annotations

from collections import Counter

from torch import nn

from dso.editing.edit import edited_values, scale_range
from dso.editing.localise import SHARE, SPARSITY, EditingError, Places, magnitude_masks, mask_based, value_based
from dso.editing.patch import Patch
from dso.editing.storing import SUFFIX

METHODS = ("value", "mask")


def make_patch(
    target: nn.Module,
    reference: nn.Module,
    *,
    method: str = "value",
    edit: str = "extrapolate",
    k: float = SHARE,
    sparsity: float | None = None,
    base_model: str = "",
    revision: str | None = None,
    reference_model: str = "",
) -> Patch:
    """Localise where a target differs from a reference, and edit it there.

    Args:
        target: the model that the patch is for.
        reference: of the same architecture.
        method: ``value`` (the ``k`` weights that differ most) or ``mask`` (the weights that one of the pruned models
            keeps and the other does not, however many).
        edit: one of :data:`dso.editing.edit.EDITS`.
        k: a share of the editable weights, or a number of them; of the method ``value``.
        sparsity: share of the weights that is pruned to find masks: 0.3 for ``mask`` unless given; none for ``value``,
            which else looks only at what both keep.
        base_model, revision, reference_model: what the target and the reference are called.

    Raises:
        EditingError: if the models are not of one architecture, or differ nowhere, or an argument cannot be used.
    """
    if method not in METHODS:
        raise EditingError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    pruned = SPARSITY if sparsity is None and method == "mask" else sparsity
    masks = None if not pruned else (magnitude_masks(target, pruned), magnitude_masks(reference, pruned))
    if method == "mask" and masks is None:
        raise EditingError("method 'mask' compares what is left after pruning; its sparsity must be above 0")
    if edit == "switch" and method != "mask":
        raise EditingError("edit 'switch' takes over the reference's mask; localise with method 'mask'")
    places = mask_based(*masks) if method == "mask" and masks else value_based(target, reference, k, masks)
    values = edited_values(edit, target, reference, places, masks[1] if masks else None)
    about = {"method": method, "edit": edit, "reference": reference_model, "sparsity": f"{pruned or 0:g}"}
    return Patch.for_model(
        target, places, values, about, base_model=base_model, revision=revision, scale_range=scale_range(edit)
    )


def where(places: Places) -> tuple[Counter[int], Counter[str]]:
    """How many places each layer has, and each kind of linear layer (``q_proj``); -1 is outside of numbered layers."""
    layers: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    for name, index in places.items():
        *path, kind = name.removesuffix(SUFFIX).split(".")
        layers[next((int(part) for part in path if part.isdecimal()), -1)] += len(index)
        kinds[kind] += len(index)
    return layers, kinds
