"""Inference-time intervention: the attention heads that tell stereotyped answers best are shifted.

Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023, arXiv
2306.03341, section 3. Of head i with output x_i (before the output layer W_o of its attention block),

    theta_i = mean(x_i of other answers) - mean(x_i of stereotyped answers), scaled to length 1    (mass mean shift)
    sigma_i = standard deviation of theta_i . x_i
    x_i'    = x_i + s sigma_i theta_i                      in the K heads with the most accurate probes, s their alpha

A constant shift before W_o is a constant offset behind it, so this is the operator ``bias`` at W_o, and exact:

    W_o (x + s shift) = W_o x + s W_o shift

Adapted: as all steerings here, it acts at every token, and validation chooses the direction. The paper shifts 48 of
1024 heads, about one in twenty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dso.baselines.activations import answered, collect
from dso.baselines.baseline import Baseline, Candidate, Task
from dso.baselines.fitted import DIRECTIONS, fitted
from dso.baselines.places import attention_outputs
from dso.baselines.probes import accuracy
from dso.steering.hosts import named_sites

SHARES = (0.05, 0.1, 0.2, 0.025)  # of all heads that are shifted


def propose(task: Task) -> Iterator[Candidate]:
    """The best heads, more and fewer of them, shifted in both directions."""
    model = task.backbone.model
    heads = attention_outputs(model)
    answers = answered(task)
    found = collect(task.backbone, answers.texts, tuple(heads), inputs=True)
    outputs = {site: values.unflatten(1, (heads[site], -1)).movedim(1, 0) for site, values in found.items()}
    right = {site: accuracy(x, ~answers.stereotyped, task.seed, answers.decisions) for site, x in outputs.items()}
    order = torch.cat(list(right.values())).argsort(descending=True, stable=True)
    for count in dict.fromkeys(max(1, round(share * len(order))) for share in SHARES):
        best = torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:count], True)
        chosen = dict(zip(heads, best.split(list(heads.values())), strict=True))
        shifts = {site: head_shift(outputs[site], answers.stereotyped, chosen[site]) for site in heads}
        for sign, label in DIRECTIONS:
            turned = {site: sign * shift for site, shift in shifts.items()}
            yield Candidate(f"{count} heads{label}", fitted(task, "bias", _behind(model, turned)))


def head_shift(outputs: Tensor, stereotyped: Tensor, chosen: Tensor) -> Tensor:
    """(H, d) of H heads' outputs (H, R, d): sigma theta in the chosen heads (H,), 0 in the others."""
    theta = outputs[:, ~stereotyped].mean(1) - outputs[:, stereotyped].mean(1)
    theta = theta / theta.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    sigma = torch.einsum("hrd,hd->hr", outputs, theta).std(1, unbiased=False)
    return sigma[:, None] * theta * chosen[:, None]


def _behind(model: nn.Module, shifts: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The shifts that are not 0, as offsets behind their output layers."""
    modules = named_sites(model)
    return {site: {"b": offset_behind(modules[site], shift.flatten())} for site, shift in shifts.items() if shift.any()}


@torch.no_grad()
def offset_behind(module: nn.Module, shift: Tensor) -> Tensor:
    """(d_out,) float32: what a linear layer makes of a constant shift (d_in,) of its input; asked of the layer itself,
    so that it holds for one that is quantised too."""
    weight = next(module.parameters())
    given = shift.to(weight.device, weight.dtype if weight.is_floating_point() else None)
    both = module(torch.stack([given, torch.zeros_like(given)])).float()
    return (both[0] - both[1]).cpu()


BASELINE = Baseline(
    name="iti",
    title="ITI",
    source="Li et al., NeurIPS 2023, section 3",
    propose=propose,
    scales=(1.0, 2.5, 5.0, 10.0),
)
