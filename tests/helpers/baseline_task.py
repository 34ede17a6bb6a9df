"""A task for baselines on a tiny model: what its training split says, and what the base model says to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from tiny import byte_tokenizer, small_set, tiny_llama
from torch import Tensor, nn

from dso.baselines.baseline import Task
from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone
from dso.models.encoded import Encoded


@torch.no_grad()
def tiny_task(backbone: Backbone | None = None, decisions: DecisionSet | None = None, seed: int = 0) -> Task:
    """The training split of ``small_set`` on ``tiny_llama``, or others; what is fair is left as the base has it."""
    backbone = backbone or Backbone(tiny_llama(), byte_tokenizer(), "tiny")
    decisions = decisions or small_set(("train",))
    base = backbone.score(list(decisions)).policy()
    target = (1 / len(decisions.groups),) * len(decisions.groups)
    return Task(backbone=backbone, decisions=decisions, base=base, fair=base, target=target, seed=seed)


@torch.no_grad()
def last_states(model: nn.Module, texts: Sequence[Encoded], sites: Sequence[str]) -> dict[str, Tensor]:
    """Site -> (R, d): what a model as it is gives at the last token of each text, one pass a text."""
    caught: dict[str, list[Tensor]] = {site: [] for site in sites}
    modules = [model.get_submodule(site) for site in sites]
    hooks = [
        module.register_forward_hook(lambda m, args, output, own=own: own.append(output[0, -1]))
        for module, own in zip(modules, caught.values(), strict=True)
    ]
    for text in texts:
        model(torch.tensor([text.prompt]))
    for hook in hooks:
        hook.remove()
    return {site: torch.stack(own) for site, own in caught.items()}


def without_stereotypes(decisions: DecisionSet) -> DecisionSet:
    """The same decisions, in contexts of which nobody says what they are stereotyped with."""
    return DecisionSet(tuple(replace(d, stereotype=None) for d in decisions), decisions.groups, decisions.name)
