"""Contrastive activation addition: one vector, added to the residual stream behind one layer.

Panickssery et al., "Steering Llama 2 via Contrastive Activation Addition", ACL 2024, arXiv 2312.06681, section 3:

    h' = h + s v        v = mean over decisions of [h(prompt + other answer) - h(prompt + stereotyped answer)]

with h the residual stream behind the layer at the answer's token. The layer is chosen on validation, and so is the
direction: the paper's multipliers are of both signs.

Adapted: the paper adds v at the tokens behind the prompt only; ours is added at every token, as every steering here is,
because the decision falls at the prompt's last token. With more than two groups, the other answers' mean is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

from dso.baselines.activations import answered, collect
from dso.baselines.baseline import Baseline, Candidate, Task
from dso.baselines.fitted import DIRECTIONS, fitted
from dso.baselines.places import by_depth, decoder_layers

DEPTHS = (0.4, 0.5, 0.3, 0.6, 0.7, 0.2, 0.8, 0.1)  # the paper's best layers are a little before the middle


def propose(task: Task) -> Iterator[Candidate]:
    """A vector behind each of eight layers, in both directions."""
    every = decoder_layers(task.backbone.model)
    layers = by_depth(every, DEPTHS)
    answers = answered(task)
    found = collect(task.backbone, answers.texts, layers)
    for layer in layers:
        vector = answers.pairs(found[layer]).mean(0)
        for sign, label in DIRECTIONS:
            yield Candidate(f"layer {every.index(layer)}{label}", fitted(task, "bias", {layer: {"b": sign * vector}}))


BASELINE = Baseline(
    name="caa",
    title="CAA",
    source="Panickssery et al., ACL 2024, section 3",
    propose=propose,
    scales=(0.5, 1.0, 2.0, 4.0),
)
