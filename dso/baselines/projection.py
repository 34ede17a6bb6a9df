"""Projection: the directions in which answers of different groups differ are taken out of the residual stream.

Bolukbasi et al., "Man is to Computer Programmer as Woman is to Homemaker?", NeurIPS 2016, sections 5.1
and 6 (*neutralize*), as Liang et al. ("Towards Debiasing Sentence Representations", ACL 2020) carried it to sentences:

    D  = h(prompt + answer of group g) - mean over the question's groups
    Q  = the directions between the groups' means, one fewer than groups, then the principal directions of what is left
         of D, k in all
    h' = h - s Q Q^T h                      the operator ``low_rank``

behind decoder layers, with Q of each layer's own. The scale 1 removes the directions; k and the layers are tried.

Adapted: the first principal direction of D alone is the group's where answers are words such as *he* and *she*; between
names it may be how common they are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dso.baselines.activations import answered, collect
from dso.baselines.baseline import Baseline, Candidate, Task
from dso.baselines.fitted import fitted
from dso.baselines.places import decoder_layers, stretches


def propose(task: Task) -> Iterator[Candidate]:
    """One direction fewer than groups, then more, behind all layers and behind a part of them."""
    layers = decoder_layers(task.backbone.model)
    answers = answered(task)
    found = collect(task.backbone, answers.texts, layers)
    differences = {layer: answers.differences(values) for layer, values in found.items()}
    least = len(answers.groups.unique()) - 1
    for rank in (least, min(4 * least, *differences[layers[0]].shape)):
        for label, own in stretches(layers).items():
            directions = {layer: group_directions(differences[layer], answers.groups, rank) for layer in own}
            tensors = {layer: {"u": -q, "v": q, "b": torch.zeros(len(q))} for layer, q in directions.items()}
            yield Candidate(f"{label}, rank {rank}", fitted(task, "low_rank", tensors, rank))


def group_directions(differences: Tensor, groups: Tensor, rank: int) -> Tensor:
    """(d, rank) orthonormal: between the means of groups (R,), then the principal ones of differences (R, d)."""
    means = torch.stack([differences[groups == group].mean(0) for group in groups.unique()])
    between = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[: min(rank, len(means) - 1)]
    left = differences - differences @ between.T @ between
    others = torch.linalg.svd(left, full_matrices=False).Vh[: rank - len(between)]
    return torch.cat([between, others]).T.contiguous()


BASELINE = Baseline(
    name="projection",
    title="Projection",
    source="Bolukbasi et al., NeurIPS 2016, sections 5.1 and 6; Liang et al., ACL 2020",
    propose=propose,
    scales=(0.25, 0.5, 1.0, 1.5),
)
