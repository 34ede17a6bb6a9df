"""Steering operators: the transform of one site's activation, as pure functions and their modules.

With ``h`` of shape (..., d) and the inference-time coefficient ``s``:

    affine     h' = h + s * (a * h + b)            a, b of shape (d,)      (DSO, arXiv 2512.15926, section 3)
    scale      h' = h + s * a * h                  a of shape (d,)         (ours: merges into any norm's weight)
    bias       h' = h + s * b                      b of shape (d,)
    low_rank   h' = h + s * (U V^T h + b)          U, V of shape (d, r)

Every operator starts as the identity. Arithmetic is float32; the result has the dtype of ``h``.
``s`` is a scalar tensor, or a tensor that broadcasts against ``h`` (one value a batch row).

An operator works in two steps: :meth:`~SteeringOperator.terms` is what depends on ``s`` alone, so that it is computed
once a scale, and :meth:`~SteeringOperator.steer` is what each activation goes through.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dso.errors import UserError


class SteeringOperator(nn.Module):
    """One site's transform; subclasses define :meth:`terms`, :meth:`steer`, ``kind`` and ``neutral``.

    Args:
        width: d, the size of the activation's last dimension.
    """

    kind: str
    neutral: tuple[float, ...] | None  # terms with which steer gives h back to the bit; h + -0 is h, also where h is -0

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def terms(self, scale: Tensor | float) -> tuple[Tensor, ...]:
        """What :meth:`steer` needs of the coefficients at a scale."""
        raise TypeError(f"{type(self).__name__} defines no terms")

    def steer(self, h: Tensor, *terms: Tensor) -> Tensor:
        """The steered activation in float32, for ``h`` (..., width) in float32."""
        raise TypeError(f"{type(self).__name__} defines no steer")

    def scaled(self, scale: float) -> dict[str, Tensor]:
        """The coefficients, by name, of the operator that does at scale 1 what this one does at ``scale``."""
        return {name: value * scale for name, value in self.named_parameters()}

    def forward(self, h: Tensor, scale: Tensor | float) -> Tensor:
        """The steered activation, of the shape and dtype of ``h``."""
        return self.steer(h.float(), *self.terms(scale)).to(h.dtype)


class AffineOperator(SteeringOperator):
    """h + s * (a * h + b)."""

    kind = "affine"
    neutral = (1.0, -0.0)

    def __init__(self, width: int):
        super().__init__(width)
        self.a = nn.Parameter(torch.zeros(width))
        self.b = nn.Parameter(torch.zeros(width))

    def terms(self, scale: Tensor | float) -> tuple[Tensor, ...]:
        return 1 + scale * self.a, scale * self.b

    def steer(self, h: Tensor, *terms: Tensor) -> Tensor:
        slope, offset = terms
        return torch.addcmul(offset, h, slope)  # one pass over the activation


class ScaleOperator(SteeringOperator):
    """h + s * a * h."""

    kind = "scale"
    neutral = (1.0,)

    def __init__(self, width: int):
        super().__init__(width)
        self.a = nn.Parameter(torch.zeros(width))

    def terms(self, scale: Tensor | float) -> tuple[Tensor, ...]:
        return (1 + scale * self.a,)

    def steer(self, h: Tensor, *terms: Tensor) -> Tensor:
        return h * terms[0]


class BiasOperator(SteeringOperator):
    """h + s * b."""

    kind = "bias"
    neutral = (-0.0,)

    def __init__(self, width: int):
        super().__init__(width)
        self.b = nn.Parameter(torch.zeros(width))

    def terms(self, scale: Tensor | float) -> tuple[Tensor, ...]:
        return (scale * self.b,)

    def steer(self, h: Tensor, *terms: Tensor) -> Tensor:
        return h + terms[0]


class LowRankOperator(SteeringOperator):
    """h + s * (U V^T h + b); U starts at zero and V at random, so that the start is the identity and gradients flow."""

    kind = "low_rank"
    neutral = None

    def __init__(self, width: int, rank: int):
        super().__init__(width)
        if not isinstance(rank, int) or not 1 <= rank <= width:
            raise UserError(f"rank is {rank!r}, expected 1 to {width} (the site's width)")
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(width, rank) / width**0.5)
        self.b = nn.Parameter(torch.zeros(width))

    def terms(self, scale: Tensor | float) -> tuple[Tensor, ...]:
        return self.v, scale if isinstance(scale, Tensor) else torch.tensor(scale), self.u.T, scale * self.b

    def steer(self, h: Tensor, *terms: Tensor) -> Tensor:
        v, scale, u, offset = terms
        return h + (h @ v * scale) @ u + offset

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
