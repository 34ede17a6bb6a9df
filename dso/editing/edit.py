"""What the weights that were localised become.

Lutz et al., Local Contrastive Editing of Gender Stereotypes, EMNLP 2024 (arXiv 2410.17739). Each edit gives the weights
their values at scale 1; at scale ``alpha`` they are

    target + alpha (value - target)

so that 0 is the target bit for bit, and 1 the values themselves:

    interpolate   the reference's values; alpha from 0 to 1
    extrapolate   the reference's values; any alpha: below 0 away from the reference, above 1 beyond it
    prune         0
    switch        what the weights are under the reference's mask: 0 where only the target keeps them, else their own
"""

from __future__ import annotations

from torch import Tensor, nn

from dso.editing.localise import EditingError, Masks, Places, pair

EDITS = ("interpolate", "extrapolate", "prune", "switch")
ANY = (-1000.0, 1000.0)  # alphas; no weight means anything beyond


def edited_values(
    edit: str, target: nn.Module, reference: nn.Module, places: Places, mask: Masks | None = None
) -> dict[str, Tensor]:
    """The values of places at scale 1, float32, by the weight's name.

    Args:
        edit: one of :data:`EDITS`.
        mask: the reference's, for ``switch``.

    Raises:
        EditingError: if the edit is none of them, the models are not of one architecture, or ``switch`` has no mask.
    """
    if edit not in EDITS:
        raise EditingError(f"unknown edit {edit!r}; known are {', '.join(EDITS)}")
    if edit == "switch" and mask is None:
        raise EditingError("switch takes over the reference's mask, and there is none; localise with method 'mask'")
    weights, found = pair(target, reference), {}
    for name, index in places.items():
        own, theirs = (weight.flatten()[index.to(weight.device)].float().cpu() for weight in weights[name])
        if edit == "prune":
            found[name] = own.new_zeros(own.shape)
        elif mask is not None and edit == "switch":
            found[name] = own * mask[name].flatten()[index]
        else:
            found[name] = theirs
    return found


def scale_range(edit: str) -> tuple[float, float]:
    """The alphas that an edit is defined for."""
    return ANY if edit == "extrapolate" else (0.0, 1.0)


def at_scale(target: Tensor, value: Tensor, alpha: float) -> Tensor:
    """The weights at scale ``alpha``, in the dtype of ``target``; exactly ``target`` at 0 and ``value`` at 1."""
    return target.float().lerp(value, alpha).to(target.dtype)
