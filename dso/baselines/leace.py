"""LEACE: the least change of the residual stream after which no linear probe tells the groups apart.

Belrose et al., "LEACE: Perfect linear concept erasure in closed form", NeurIPS 2023, arXiv 2306.03819, section 4.
With X the activations, Z the group of the answer, one-hot, and W = Sigma_XX^(-1/2),

    r(x) = x - W^+ P W (x - E[X])        P = orthogonal projection onto the columns of W Sigma_XZ

so that Cov(r(X), Z) = 0: all groups have the same mean. Turned to s it is the operator ``low_rank`` with U = -W^+ Q,
V = W Q and b = -U V^T E[X], Q an orthonormal basis of those columns. Behind all layers it is the paper's *concept
scrubbing* (section 6): fitted layer after layer, each with all layers before it erased.

Adapted: erasers are also fitted at once, each to the base model, which for few samples is the milder form. There are
fewer samples than units, so Sigma_XX is shrunk towards a multiple of the identity (Ledoit and Wolf 2004, section 3.2),
as the authors' library shrinks it. The erasure stays exact: it needs W invertible, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dso.baselines.activations import Answered, Change, answered, collect, in_order
from dso.baselines.baseline import Baseline, Candidate, Task
from dso.baselines.fitted import fitted
from dso.baselines.places import by_depth, decoder_layers, stretches

DECISIONS = 64  # in one pass, for layers that are fitted one after another
DEPTHS = (0.5, 0.3, 0.7)

Coefficients = dict[str, Tensor]


def propose(task: Task) -> Iterator[Candidate]:
    """Erasure behind all layers, a part of them, and single ones, fitted at once; then scrubbing."""
    layers = decoder_layers(task.backbone.model)
    answers = answered(task)
    rank = len(answers.groups.unique()) - 1
    found = collect(task.backbone, answers.texts, layers)
    made = {layer: eraser(states, answers.groups) for layer, states in found.items()}
    single = {f"layer {layers.index(layer)}": (layer,) for layer in by_depth(layers, DEPTHS)}
    for label, own in (stretches(layers) | single).items():
        yield Candidate(label, fitted(task, "low_rank", {layer: made[layer] for layer in own}, rank))
    if all(text.images is None for text in answers.texts):
        answers = answered(task, DECISIONS)
        for label, own in stretches(layers).items():
            yield Candidate(f"{label}, scrubbed", fitted(task, "low_rank", _scrubbed(task, answers, own), rank))


def _scrubbed(task: Task, answers: Answered, layers: tuple[str, ...]) -> dict[str, Coefficients]:
    made: dict[str, Coefficients] = {}

    def rule(site: str, last: Tensor) -> Change:
        made[site] = own = eraser(last, answers.groups.to(last.device))
        return lambda values: values + (values @ own["v"]) @ own["u"].T + own["b"]

    in_order(task.backbone, answers.texts, layers, rule)
    return {site: {name: value.cpu() for name, value in own.items()} for site, own in made.items()}


def eraser(x: Tensor, groups: Tensor) -> Coefficients:
    """u and v (d, G - 1) and b (d,) of LEACE, from activations (R, d) and the group of each (R,)."""
    codes = groups.unique(return_inverse=True)[1]
    z = torch.nn.functional.one_hot(codes).double()
    mean = x.double().mean(0)
    centred, labels = x.double() - mean, z - z.mean(0)
    values, vectors, floor = _shrunk(centred)

    def power(matrix: Tensor, exponent: float) -> Tensor:
        """Sigma_XX to a power times a matrix: its eigenvalue is ``floor`` in every direction but ``vectors``."""
        own = (values**exponent - floor**exponent)[:, None] * (vectors.T @ matrix)
        return floor**exponent * matrix + vectors @ own

    basis, sizes, _ = torch.linalg.svd(power(centred.T @ labels / len(x), -0.5), full_matrices=False)
    basis = basis[:, : z.shape[1] - 1] * (sizes[: z.shape[1] - 1] > 1e-12)
    u, v = -power(basis, 0.5), power(basis, -0.5)
    return {"u": u.float(), "v": v.float(), "b": -(u @ (v.T @ mean)).float()}


def _shrunk(centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The shrunk covariance of (R, d): eigenvalues (r,), eigenvectors (d, r), the eigenvalue elsewhere."""
    count, width = centred.shape
    _, sizes, vectors = torch.linalg.svd(centred, full_matrices=False)
    values = sizes.square() / count
    level = values.sum() / width
    distance = values.square().sum() / width - level**2
    noise = (centred.square().sum(1).square().sum() / count - values.square().sum()) / (count * width)
    share = (noise / distance.clamp(min=1e-30)).clamp(1e-6, 1.0)
    return (1 - share) * values + share * level, vectors.T, share * level


BASELINE = Baseline(
    name="leace",
    title="LEACE",
    source="Belrose et al., NeurIPS 2023, sections 4 and 6",
    propose=propose,
    scales=(0.1, 0.25, 0.5, 1.0),
)
