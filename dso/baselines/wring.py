"""WRING: what tells the groups apart is turned to where all groups are alike, instead of being removed.

Gerych et al., "WRING Out The Bias: A Rotation-Based Alternative To Projection Debiasing", ICLR 2026. With the groups'
directions as the columns of A (d, G), linearly independent, P = A (A^T A)^-1 A^T and w = A (A^T A)^-1 1, scaled to
length 1,

    v' = v - P v + |P v| w

keeps the length of v, and A^T v' = |P v| A^T w is the same for every group. :func:`wring_embeddings` does that to the
embeddings of a CLIP-style model, as published.

Adapted, to hidden states: A has the mean activation of each group's answers behind a layer, scaled to length 1, and the
change is turned,

    h' = h + s (|V^T h| w + U V^T h)        V an orthonormal basis of A's columns, U = -V

so that lengths are kept at scale 0 and 1, and shrink a little between. It is no affine map, so it has an operator of
its own, which no checkpoint knows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dso.baselines.activations import answered, collect
from dso.baselines.baseline import Baseline, BaselineError, Candidate, Task
from dso.baselines.fitted import OwnOperators
from dso.baselines.places import decoder_layers, stretches
from dso.steering.operators import SteeringOperator


class WringOperator(SteeringOperator):
    """h + s (|V^T h| w + U V^T h)."""

    kind = "wring"
    neutral = None

    def __init__(self, directions: Tensor):
        super().__init__(len(directions))
        basis, w = rotation(directions)
        self.u, self.v, self.w = nn.Parameter(-basis), nn.Parameter(basis), nn.Parameter(w)

    def terms(self, scale: Tensor | float) -> tuple[Tensor, ...]:
        return self.v, scale if isinstance(scale, Tensor) else torch.tensor(scale), self.u.T, self.w

    def steer(self, h: Tensor, *terms: Tensor) -> Tensor:
        v, scale, u, w = terms
        inside = h @ v
        return h + scale * (inside.norm(dim=-1, keepdim=True) * w + inside @ u)

    def scaled(self, scale: float) -> dict[str, Tensor]:
        return super().scaled(scale) | {"v": self.v}


def rotation(directions: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis (d, G) of the groups' directions (d, G), and w (d,).

    Raises:
        BaselineError: if the directions depend on each other.
    """
    basis, triangle = torch.linalg.qr(directions.double())
    if triangle.diagonal().abs().min() < 1e-6 * triangle.abs().max():
        raise BaselineError("the groups' directions depend on each other, so no direction is equally near to them all")
    ones = torch.ones(len(triangle), 1, dtype=torch.float64, device=directions.device)
    inside = torch.linalg.solve_triangular(triangle.T, ones, upper=False)  # A (A^T A)^-1 1 = basis R^-T 1
    w = (basis @ inside).squeeze(1)
    return basis.float(), (w / w.norm()).float()


def wring_embeddings(v: Tensor, directions: Tensor) -> Tensor:
    """Embeddings (..., d) that keep their length and are equally similar to all groups' directions (d, G).

    Raises:
        BaselineError: if the directions depend on each other.
    """
    basis, w = rotation(directions)
    inside = v.float() @ basis
    return (v - inside @ basis.T + inside.norm(dim=-1, keepdim=True) * w).to(v.dtype)


def propose(task: Task) -> Iterator[Candidate]:
    """All layers, then a part of them."""
    layers = decoder_layers(task.backbone.model)
    answers = answered(task)
    found = collect(task.backbone, answers.texts, layers)
    for label, own in stretches(layers).items():
        directions = {layer: nn.functional.normalize(answers.group_means(found[layer]), dim=1).T for layer in own}
        yield Candidate(label, OwnOperators(task, {layer: WringOperator(a) for layer, a in directions.items()}))


BASELINE = Baseline(
    name="wring",
    title="WRING",
    source="Gerych et al., ICLR 2026",
    propose=propose,
    scales=(0.25, 0.5, 1.0, 1.5),
)
