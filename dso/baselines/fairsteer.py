"""FairSteer: a vector is added where a linear classifier sees a biased state, and nowhere else.

Li et al., "FairSteer: Inference Time Debiasing for LLMs with Dynamic Activation Steering", Findings of ACL 2025, arXiv
2504.14492, section 3. Behind one layer,

    h' = h + s [sigmoid(w . h + c) > 1/2] v

    w, c   logistic regression on the states behind prompts: biased or not      (biased activation detection)
    v      mean of h(prompt + other answer) - h(prompt + stereotyped answer)    (debiasing steering vector)

The layers are tried in the order of the classifier's accuracy on prompts that are held out, v in both directions.

Adapted: a prompt is *biased* where it is ambiguous and the base model gives the stereotyped group more than its fair
share. The others, unambiguous ones among them, are not, so that the gate stays shut where an answer is right. The gate
is asked at every token, as the paper asks it at every token that is generated. It is no affine map, so it has an
operator of its own, which no checkpoint knows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dso.baselines.activations import answered, biased, collect, prompts
from dso.baselines.baseline import Baseline, BaselineError, Candidate, Task
from dso.baselines.fitted import DIRECTIONS, OwnOperators
from dso.baselines.places import by_depth, decoder_layers
from dso.baselines.probes import accuracy, logistic
from dso.steering.operators import SteeringOperator

DEPTHS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class GatedOperator(SteeringOperator):
    """h + s b where w . h + c > 0, and h elsewhere."""

    kind = "gated"
    neutral = None

    def __init__(self, weight: Tensor, intercept: Tensor, offset: Tensor):
        super().__init__(len(offset))
        self.w, self.c, self.b = nn.Parameter(weight), nn.Parameter(intercept), nn.Parameter(offset)

    def terms(self, scale: Tensor | float) -> tuple[Tensor, ...]:
        return self.w, self.c, scale * self.b

    def steer(self, h: Tensor, *terms: Tensor) -> Tensor:
        w, c, offset = terms
        return torch.where(((h @ w + c) > 0).unsqueeze(-1), h + offset, h)

    def scaled(self, scale: float) -> dict[str, Tensor]:
        return {"w": self.w, "c": self.c, "b": self.b * scale}


def propose(task: Task) -> Iterator[Candidate]:
    """A gate and a vector behind each of eight layers, those with the best gates first."""
    every = decoder_layers(task.backbone.model)
    layers = by_depth(every, DEPTHS)
    indices, labels = biased(task)
    if len(labels.unique()) < 2:
        raise BaselineError("the base model is biased on every prompt or on none, so a gate has nothing to tell apart")
    states = collect(task.backbone, prompts(task, indices), layers)
    answers = answered(task)
    found = collect(task.backbone, answers.texts, layers)
    stacked = torch.stack([states[layer] for layer in layers])
    right = accuracy(stacked, labels, task.seed, torch.arange(len(labels)))
    weights, intercepts = logistic(stacked, labels)
    for place in right.argsort(descending=True, stable=True).tolist():
        layer = layers[place]
        vector = answers.pairs(found[layer]).mean(0)
        for sign, way in DIRECTIONS:
            gated = GatedOperator(weights[place], intercepts[place], sign * vector)
            label = f"layer {every.index(layer)}, gate right {right[place]:.0%}{way}"
            yield Candidate(label, OwnOperators(task, {layer: gated}))


BASELINE = Baseline(
    name="fairsteer",
    title="FairSteer",
    source="Li et al., Findings of ACL 2025, section 3",
    propose=propose,
    scales=(0.5, 1.0, 2.0, 4.0, 8.0),
)
