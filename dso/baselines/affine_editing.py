"""Affine concept editing: what tells the groups apart is set to the midpoint between them.

Karvonen and Marks, "Robustly Improving LLM Fairness in Realistic Settings via Interpretability", arXiv 2506.10922,
with the authors' code, after Marshall et al., "Refusal in LLMs is an Affine Function", arXiv 2411.09003. Behind every
layer, with mu_A and mu_B the mean activations of two groups and sigma the standard deviation of each unit,

    u  = (mu_A - mu_B) / sigma, scaled to length 1
    h' = h - s u (u . h - m)              m = u . (mu_A + mu_B) / 2

the operator ``low_rank`` with U = -u, V = u and b = m u. For more than two groups, u becomes an orthonormal basis of
all (mu_g - mean) / sigma, and m the mean of the groups' coordinates in it.

Adapted: the paper averages over the tokens of a prompt about one person; these prompts are about people of all groups,
so activations are read at the answer, which names one of them. Directions are those of the base model, as there.
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
    """All layers, as published, then a part of them."""
    layers = decoder_layers(task.backbone.model)
    answers = answered(task)
    found = collect(task.backbone, answers.texts, layers)
    rank = len(answers.groups.unique()) - 1
    edits = {layer: edit(values, answers.groups) for layer, values in found.items()}
    for label, own in stretches(layers).items():
        yield Candidate(label, fitted(task, "low_rank", {layer: edits[layer] for layer in own}, rank))


def edit(x: Tensor, groups: Tensor) -> dict[str, Tensor]:
    """u and v (d, G - 1) and b (d,), from activations (R, d) and the group of each (R,)."""
    means = torch.stack([x[groups == group].mean(0) for group in groups.unique()])
    spread = (x.var(0, unbiased=False) + 1e-4).sqrt()  # the authors' floor
    directions = torch.linalg.svd((means - means.mean(0)) / spread, full_matrices=False).Vh[: len(means) - 1].T
    return {"u": -directions, "v": directions.contiguous(), "b": directions @ (directions.T @ means.mean(0))}


BASELINE = Baseline(
    name="affine-editing",
    title="Affine concept editing",
    source="Karvonen and Marks, arXiv 2506.10922; Marshall et al., arXiv 2411.09003",
    propose=propose,
    scales=(0.25, 0.5, 1.0, 1.5),
)
