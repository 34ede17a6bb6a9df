"""Linear probes: logistic regression with a ridge, by Newton's method, for many sets of activations at once."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 12
RIDGE = 1.0  # on standardised activations, beside a loss that is summed


def logistic(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, d) and intercepts (B,) of ``p(y = 1) = sigmoid(w h + c)``, for activations as they are.

    Args:
        x: (B, N, d) activations.
        y: (N,) bool.
    """
    mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True).clamp(min=1e-6)
    design = torch.cat([(x - mean) / spread, torch.ones_like(x[..., :1])], -1).double()
    ridge = torch.full((design.shape[-1],), RIDGE, dtype=torch.float64, device=x.device)
    ridge[-1] = 1e-6
    target = y.to(design).expand(design.shape[:2])
    found = design.new_zeros(design.shape[0], design.shape[-1])
    for _ in range(ROUNDS):
        p = torch.einsum("bnd,bd->bn", design, found).sigmoid()
        slope = torch.einsum("bnd,bn->bd", design, target - p) - ridge * found
        curvature = torch.einsum("bnd,bn,bne->bde", design, p * (1 - p), design) + ridge.diag()
        found = found + torch.linalg.solve(curvature, slope)
    weight = found[:, :-1].float() / spread[:, 0]
    return weight, found[:, -1].float() - (weight * mean[:, 0]).sum(-1)


def accuracy(x: Tensor, y: Tensor, seed: int, blocks: Tensor) -> Tensor:
    """(B,) share of a held-out fifth that a probe of the others gets right, half for each class.

    Args:
        x: (B, N, d) activations.
        y: (N,) bool.
        seed: draws the fifth.
        blocks: (N,) int64; what shares a number is held out together.
    """
    numbers = blocks.unique(return_inverse=True)[1]
    count = int(numbers.max()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = torch.isin(numbers, order[: max(1, count // 5)])
    weight, intercept = logistic(x[:, ~held], y[~held])
    right = ((torch.einsum("bnd,bd->bn", x[:, held], weight) + intercept[:, None]) > 0) == y[held]
    classes = [right[:, y[held] == value].float().mean(1) for value in (True, False) if (y[held] == value).any()]
    return torch.stack(classes).mean(0)
