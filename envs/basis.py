"""Low-dimensional bases of a steering's coefficients, for searches without gradients.

A basis is a mapping from keys of :meth:`dso.steering.model.Steering.tensors` to tensors of shape (m, ...): m
directions, each with a part in every tensor that it moves. With coefficients z of shape (m,) the steering is

    x = x_0 + radius * sum_j z_j basis_j

Both bases here are ours; the paper (DSO, arXiv 2512.15926) learns by gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone
from dso.models.encoded import Encoded
from dso.models.scoring import token_logits
from dso.rewards import group_shares
from dso.steering.model import Steering
from envs.task import DecisionTask

Basis = dict[str, Tensor]

ROWS = 16  # prompts of one forward pass
TINY = 1e-30
CONSTANT = 1e-9  # a variance below this share of the mean square is rounding


def random_basis(steering: Steering, m: int, seed: int = 0, step: float = 0.05) -> Basis:
    """m orthogonal Gaussian directions over all coefficients.

    Args:
        steering: the directions move its tensors.
        m: number of directions.
        seed: draws them.
        step: root-mean-square change of a coefficient along one direction at radius 1.

    Raises:
        ValueError: if m is not between 1 and the number of coefficients.
    """
    tensors = steering.tensors()
    sizes = [value.numel() for value in tensors.values()]
    if not 1 <= m <= sum(sizes):
        raise ValueError(f"a basis of {m} directions, expected 1 to {sum(sizes)}, the number of coefficients")
    drawn = torch.randn(sum(sizes), m, generator=torch.Generator().manual_seed(seed))
    directions = torch.linalg.qr(drawn).Q.T * (step * sum(sizes) ** 0.5)
    parts = zip(tensors.items(), directions.split(sizes, dim=1), strict=True)
    return {key: part.reshape(m, *value.shape).to(value) for (key, value), part in parts}


def group_basis(backbone: Backbone, steering: Steering, decisions: DecisionSet, m: int, step: float = 0.1) -> Basis:
    """Directions from the data, along which the preference for a group shows in the sites' outputs.

    With h a site's output at the answer position, p_g the probability of choosing group g there, and means,
    covariances and correlations over the ambiguous decisions, each of L contiguous runs of sites has

        shift_g     b = f c,  c = cov(h, p_g)                              towards group g; one if G = 2, else G
        contract    a = -f r,  b = f r mean(h),  r = sum_g corr(h, p_g)^2       affine operators only

    and f such that the output changes by ``step`` times its root mean square (but no neuron beyond its mean). A shift
    moves all contexts alike. A contraction pulls the neurons that tell the groups apart towards their mean, and
    with it the contexts towards each other. A site whose output is the same after every prompt (the first one, if all
    prompts end in the same token) stays as it is. Runs are taken from the last sites to the first, and L is as small
    as m directions allow; of the first run some may be left out. Names and positions cancel in the covariance if the
    decisions are counterbalanced.

    Args:
        backbone: the model as it is now, steered or not.
        steering: whose tensors are moved; its sites are read.
        decisions: at least two ambiguous ones whose preferences differ.
        m: number of directions.
        step: root-mean-square change of a site's output along one direction at radius 1, relative to the output's.

    Raises:
        ValueError: if m is below 1 or asks for more runs than there are sites, or all preferences are the same.
    """
    decisions = decisions.select(kind="ambiguous")
    preference = _group_probabilities(backbone, decisions)
    if len(decisions.groups) == 2:
        preference = preference[:, :1]  # the other group's is what is left
    moments = _moments(backbone, decisions, list(steering.config.sites), preference)
    tensors = steering.tensors()
    affine = steering.config.operator == "affine"
    kinds = preference.shape[1] + affine
    sites, runs = list(moments), -(-m // kinds)
    if not 1 <= runs <= len(sites):
        raise ValueError(f"a basis of {m} directions, expected 1 to {len(sites) * kinds} ({kinds} a run of sites)")
    basis = {key: torch.zeros(m, *value.shape) for key, value in tensors.items() if key.endswith((".a", ".b"))}
    for place, run in enumerate(reversed(np.array_split(np.array(sites, dtype=object), runs))):
        for number in range(place * kinds, min(m, (place + 1) * kinds)):
            kind = number - place * kinds
            for site in run:
                if kind < preference.shape[1]:
                    basis[f"{site}.b"][number] = moments[site].shift(kind, step)
                else:
                    basis[f"{site}.a"][number], basis[f"{site}.b"][number] = moments[site].contraction(step)
    return {key: value.to(tensors[key]) for key, value in basis.items()}


@dataclass(slots=True)
class _Moments:
    """A site's outputs (N, d) beside preferences (N, G): sums over N, and what is made of them."""

    count: int
    outputs: Tensor  # (d,) sum of h
    squares: Tensor  # (d,) sum of h^2
    products: Tensor  # (G, d) sum of (p - mean p) h
    spread: Tensor  # (G,) variance of p

    @property
    def size(self) -> Tensor:
        """The root mean square of the norm of h."""
        return (self.squares.sum() / self.count).sqrt()

    @property
    def variance(self) -> Tensor:
        """(d,) that of h; 0 where h is a constant but for rounding, as behind the last token of a common ending."""
        square = self.squares / self.count
        variance = square - (self.outputs / self.count) ** 2
        return torch.where(variance > CONSTANT * square, variance, 0.0)

    def shift(self, group: int, step: float) -> Tensor:
        direction = self.products[group] * (self.variance > 0)
        return direction * (step * self.size / direction.norm().clamp(min=TINY))

    def contraction(self, step: float) -> tuple[Tensor, Tensor]:
        variance = self.variance
        covariance = self.products / self.count * (variance > 0)
        explained = (covariance**2 / (variance * self.spread[:, None]).clamp(min=TINY)).sum(0)
        change = (explained**2 * variance).sum().sqrt()
        a = -explained * min(step * self.size / change.clamp(min=TINY), 1 / explained.max().clamp(min=TINY))
        return a, -a * self.outputs / self.count


@torch.no_grad()
def _group_probabilities(backbone: Backbone, decisions: DecisionSet) -> Tensor:
    """(N, G) float64 probabilities of choosing each group."""
    task = DecisionTask(backbone, decisions)
    policy = backbone.score(list(decisions)).policy().exp()
    return group_shares(policy, task.groups, len(decisions.groups)).cpu().double()


@torch.no_grad()
def _moments(
    backbone: Backbone, decisions: DecisionSet, sites: Sequence[str], preference: Tensor
) -> dict[str, _Moments]:
    centred = preference - preference.mean(0)
    spread = centred.square().mean(0)
    if not bool((spread > 1e-12).all()):
        raise ValueError(f"{decisions.name}: every decision prefers the groups alike, so there is no direction to find")
    moments: dict[str, _Moments] = {}
    for rows, outputs in _answer_outputs(backbone, decisions, sites):
        for site, h in outputs.items():
            sums = h.sum(0), h.square().sum(0), centred[rows].T @ h
            if (known := moments.get(site)) is None:
                moments[site] = _Moments(len(decisions), *sums, spread)
            else:
                known.outputs += sums[0]
                known.squares += sums[1]
                known.products += sums[2]
    return {site: moments[site] for site in sites}


def _answer_outputs(
    backbone: Backbone, decisions: DecisionSet, sites: Sequence[str]
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of decisions: their indices, and each site's outputs (batch, d) in float64 at the answer position."""
    encoded = [backbone.encode(decision) for decision in decisions]
    order = sorted((i for i, e in enumerate(encoded) if e.images is None), key=lambda i: len(encoded[i].prompt))
    batches = [order[start : start + ROWS] for start in range(0, len(order), ROWS)]
    batches += [[index] for index, e in enumerate(encoded) if e.images is not None]
    modules = dict(backbone.model.named_modules())
    for rows in batches:
        lengths = [len(encoded[row].prompt) for row in rows]
        caught: dict[str, Tensor] = {}
        hooks = [modules[site].register_forward_hook(_catch(caught, site, lengths)) for site in sites]
        try:
            _forward(backbone, [encoded[row] for row in rows])
        finally:
            for hook in hooks:
                hook.remove()
        yield rows, caught


def _forward(backbone: Backbone, encoded: Sequence[Encoded]) -> None:
    """One pass over right-padded prompts, or over one prompt with images."""
    if encoded[0].images is not None:
        token_logits(backbone.model, [replace(encoded[0], candidates=((0,),))], layout="padded")  # any one token
        return
    longest = max(len(e.prompt) for e in encoded)
    ids = torch.tensor([[*e.prompt, *[0] * (longest - len(e.prompt))] for e in encoded])
    mask = torch.arange(longest) < torch.tensor([len(e.prompt) for e in encoded])[:, None]
    inputs = {"input_ids": ids.to(backbone.device), "attention_mask": mask.long().to(backbone.device)}
    backbone.model(**inputs, use_cache=False, logits_to_keep=1)


def _catch(caught: dict[str, Tensor], site: str, lengths: Sequence[int]) -> Callable:
    def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        last = torch.tensor(lengths, device=output.device) - 1
        caught[site] = output[torch.arange(len(lengths), device=output.device), last].cpu().double()

    return hook
