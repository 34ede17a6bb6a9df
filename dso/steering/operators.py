"""Steering operators: the transform of one site's activation, as pure functions and their modules.

With ``h`` of shape (..., d) and the inference-time coefficient ``s``:

    affine     h' = h + s * (a * h + b)            a, b of shape (d,)      (DSO, arXiv 2512.15926, section 3)
    scale      h' = h + s * a * h                  a of shape (d,)         (ours: merges into any norm's weight)
    bias       h' = h + s * b                      b of shape (d,)
    low_rank   h' = h + s * (U V^T h + b)          U, V of shape (d, r)

Every operator starts as the identity. Arithmetic is float32; the result has the dtype of ``h``.
``s`` is a scalar tensor, or a tensor that broadcasts against ``h`` (one value a batch row).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dso.errors import UserError


def affine(h: Tensor, a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """h + scale * (a * h + b), as one fused multiply-add over the activation."""
    return torch.addcmul((scale * b).to(h.dtype), h, 1 + scale * a)


def low_rank(h: Tensor, u: Tensor, v: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    """h + scale * (U V^T h + b)."""
    return h + scale * (h @ v @ u.T + b)


class SteeringOperator(nn.Module):
    """One site's transform; subclasses define :meth:`transform` and ``kind``.

    Args:
        width: d, the size of the activation's last dimension.
    """

    kind: str

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def transform(self, h: Tensor, scale: Tensor | float) -> Tensor:
        """The steered activation in float32, for ``h`` (..., width) in float32."""
        raise TypeError(f"{type(self).__name__} defines no transform")

    def scaled(self, scale: float) -> dict[str, Tensor]:
        """The coefficients, by name, of the operator that does at scale 1 what this one does at ``scale``."""
        return {name: value * scale for name, value in self.named_parameters()}

    def forward(self, h: Tensor, scale: Tensor | float) -> Tensor:
        """The steered activation, of the shape and dtype of ``h``."""
        return self.transform(h.float(), scale).to(h.dtype)


class AffineOperator(SteeringOperator):
    """h + s * (a * h + b)."""

    kind = "affine"

    def __init__(self, width: int):
        super().__init__(width)
        self.a = nn.Parameter(torch.zeros(width))
        self.b = nn.Parameter(torch.zeros(width))

    def transform(self, h: Tensor, scale: Tensor | float) -> Tensor:
        return affine(h, self.a, self.b, scale)


class ScaleOperator(SteeringOperator):
    """h + s * a * h."""

    kind = "scale"

    def __init__(self, width: int):
        super().__init__(width)
        self.a = nn.Parameter(torch.zeros(width))

    def transform(self, h: Tensor, scale: Tensor | float) -> Tensor:
        return h * (1 + scale * self.a)


class BiasOperator(SteeringOperator):
    """h + s * b."""

    kind = "bias"

    def __init__(self, width: int):
        super().__init__(width)
        self.b = nn.Parameter(torch.zeros(width))

    def transform(self, h: Tensor, scale: Tensor | float) -> Tensor:
        return h + scale * self.b


class LowRankOperator(SteeringOperator):
    """h + s * (U V^T h + b); U starts at zero and V at random, so that the start is the identity and gradients flow."""

    kind = "low_rank"

    def __init__(self, width: int, rank: int):
        super().__init__(width)
        if not isinstance(rank, int) or not 1 <= rank <= width:
            raise UserError(f"rank is {rank!r}, expected 1 to {width} (the site's width)")
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(width, rank) / width**0.5)
        self.b = nn.Parameter(torch.zeros(width))

    def transform(self, h: Tensor, scale: Tensor | float) -> Tensor:
        return low_rank(h, self.u, self.v, self.b, scale)

    def scaled(self, scale: float) -> dict[str, Tensor]:
        return super().scaled(scale) | {"v": self.v}  # U V^T is scaled once


_CLASSES: dict[str, type[SteeringOperator]] = {
    kind.kind: kind for kind in (AffineOperator, ScaleOperator, BiasOperator, LowRankOperator)
}
KINDS = tuple(_CLASSES)


def make_operator(kind: str, width: int, rank: int | None = None) -> SteeringOperator:
    """An operator by its name.

    Raises:
        UserError: if the kind is unknown, or a rank is missing or not wanted.
    """
    if kind not in KINDS:
        raise UserError(f"operator kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if (kind == "low_rank") != (rank is not None):
        raise UserError(f"operator {kind!r} with rank {rank}: low_rank needs a rank, the others take none")
    return _CLASSES[kind](width) if rank is None else LowRankOperator(width, rank)


def coefficient_shapes(kind: str, width: int, rank: int | None = None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the coefficients that :func:`make_operator` would allocate.

    Raises:
        UserError: as :func:`make_operator`.
    """
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in make_operator(kind, width, rank).named_parameters()}
