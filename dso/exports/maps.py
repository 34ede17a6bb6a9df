"""A site's transform at a fixed scale as an affine map, and what it makes of the weights before and behind it.

With ``D = diag(1 + s a)`` or ``I + s U V^T`` and ``c = s b``, a steered activation is ``D h + c``. So

    norm           y = n(x) (base + w) + bias      w' = (base + w)(1 + s a) - base      bias' = D bias + c
    linear         y = W x + bias                  W' = D W                             bias' = D bias + c
    its reader     z = W (D h + c) + bias          W' = W D                             bias' = bias + W c

All arithmetic is float32; weights of linear layers are (out, in) here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dso.steering.operators import SteeringOperator


@dataclass(frozen=True, slots=True)
class AffineMap:
    """h -> D h + c for activations of width d.

    Attributes:
        diagonal: (d,), of a diagonal D; None where it is the identity, or of low rank.
        low_rank: s U and V of shape (d, r), where D = I + (s U) V^T.
        offset: c of shape (d,); None where it is zero.
    """

    diagonal: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    offset: Tensor | None = None

    @property
    def linear(self) -> bool:
        """Whether D is something else than the identity."""
        return self.diagonal is not None or self.low_rank is not None

    def rows(self, value: Tensor) -> Tensor:
        """D value, for ``value`` of shape (d,) or (d, n)."""
        if self.diagonal is not None:
            return value * (self.diagonal if value.ndim == 1 else self.diagonal[:, None])
        if self.low_rank is not None:
            u, v = self.low_rank
            return value + u @ (v.T @ value)
        return value

    def columns(self, weight: Tensor) -> Tensor:
        """weight D, for ``weight`` of shape (n, d)."""
        if self.diagonal is not None:
            return weight * self.diagonal
        if self.low_rank is not None:
            u, v = self.low_rank
            return weight + (weight @ u) @ v.T
        return weight

    def inverse(self) -> AffineMap | None:
        """h -> D^-1 h - D^-1 c; None where D has none. Of low rank by Woodbury, D^-1 = I - s U (I + V^T s U)^-1 V^T."""
        diagonal = low_rank = None
        if self.diagonal is not None:
            if not self.diagonal.all():
                return None
            diagonal = 1 / self.diagonal
        if self.low_rank is not None:
            u, v = self.low_rank
            inner, singular = torch.linalg.inv_ex(torch.eye(u.shape[1]) + v.T @ u)
            if singular:
                return None
            low_rank = (-u @ inner, v)
        back = AffineMap(diagonal, low_rank)
        return back if self.offset is None else replace(back, offset=-back.rows(self.offset))


@torch.no_grad()
def affine_map(operator: SteeringOperator, scale: float) -> AffineMap:
    """The map of an operator at a scale; parts that do nothing are left out."""
    own = {name: value.detach().to("cpu", torch.float32) for name, value in operator.named_parameters()}
    moved = {name: value * scale for name, value in own.items()}
    slopes, offset = moved.get("a"), moved.get("b")
    low_rank = (moved["u"], own["v"]) if "u" in moved and moved["u"].any() else None
    return AffineMap(
        diagonal=1 + slopes if slopes is not None and slopes.any() else None,
        low_rank=low_rank,
        offset=offset if offset is not None and offset.any() else None,
    )
