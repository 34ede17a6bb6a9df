"""Linear-AcT: each unit of a site is moved by the linear map that transports one set of activations to another.

Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations", ICLR 2025, arXiv 2410.23054,
section 3. Of one unit with N samples x of the source and y of the target, each sorted and less its mean,

    w = sum_i x_(i) y_(i) / sum_i x_(i)^2        b = mean(y) - w mean(x)        T(h) = w h + b

which is the least-squares fit of the optimal transport in one dimension. Turned to s it is h + s (T(h) - h), the
operator ``affine`` (:mod:`dso.steering.act`). Maps are fitted one after another, each with all maps before it in place
("sequential iterative maps"), at every norm of the model's width.

Source are stereotyped answers, target the same questions' other answers.

Adapted: the paper pools activations over a text; these texts differ in their answers alone, so they are read there. Its
strength goes from 0 to 1, where stereotyped answers become counter-stereotyped; fair is what lies between.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dso.baselines.activations import Answered, Change, answered, collect, in_order
from dso.baselines.baseline import Baseline, Candidate, Task
from dso.baselines.fitted import facts
from dso.steering.act import from_linear_act
from dso.steering.sites import resolve_sites

DECISIONS = 64  # in one pass, for maps that are fitted one after another

Maps = dict[str, tuple[Tensor, Tensor]]


def propose(task: Task) -> Iterator[Candidate]:
    """Maps at all norms, fitted one after another, then all at once."""
    backbone = task.backbone
    sites = tuple(resolve_sites(backbone.model))
    answers = answered(task, DECISIONS)
    if all(text.images is None for text in answers.texts):
        yield Candidate("one after another", _steering(task, _one_after_another(task, answers, sites)))
    answers = answered(task)
    found = collect(backbone, answers.texts, sites)
    sources, targets = answers.matched()
    at_once = {site: transport(values[sources], values[targets]) for site, values in found.items()}
    yield Candidate("all at once", _steering(task, at_once))


def _one_after_another(task: Task, answers: Answered, sites: tuple[str, ...]) -> Maps:
    maps: Maps = {}
    sources, targets = answers.matched()

    def rule(site: str, last: Tensor) -> Change:
        w, b = maps[site] = transport(last[sources], last[targets])
        moved = answers.stereotyped.to(last.device)[:, None, None]  # the target stays the base model's
        return lambda values: torch.where(moved, w * values + b, values)

    in_order(task.backbone, answers.texts, sites, rule)
    return maps


def _steering(task: Task, maps: Maps):
    made = from_linear_act(task.backbone.model, {s: (w.cpu(), b.cpu()) for s, (w, b) in maps.items()}, **facts(task))
    return made.requires_grad_(False).to(task.backbone.device)


def transport(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """w and b, each (d,), of the map of each unit, from N samples of source and target, (N, d) each."""
    middle, wanted = source.mean(0), target.mean(0)
    x, y = (source - middle).sort(0).values, (target - wanted).sort(0).values
    spread = (x * x).sum(0)
    w = torch.where(spread > 1e-12, (x * y).sum(0) / spread.clamp(min=1e-12), torch.ones_like(spread))
    return w, wanted - w * middle


BASELINE = Baseline(
    name="linear-act",
    title="Linear-AcT",
    source="Rodriguez et al., ICLR 2025, section 3",
    propose=propose,
    scales=(0.1, 0.25, 0.5, 1.0),
)
