"""A task for baselines on a tiny model: the wanted policy is even on ambiguous decisions, the base's on the others."""

from __future__ import annotations

import torch
from tiny import byte_tokenizer, small_set, tiny_llama

from dso.baselines.baseline import Task
from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone


def tiny_task(decisions: DecisionSet | None = None, seconds: float = 1.0, anchors: tuple[str, ...] = ()) -> Task:
    """40 decisions of the training split, or the given ones."""
    backbone = Backbone(tiny_llama(), byte_tokenizer(), "tiny")
    decisions = decisions or small_set(("train",))
    with torch.no_grad():
        base = backbone.score(decisions).policy()
    even = torch.full_like(base, 0.5).log()
    free = torch.tensor([d.ambiguous for d in decisions])
    fair = torch.where(free[:, None], even, base)
    return Task(
        backbone=backbone,
        decisions=decisions,
        base=base,
        fair=fair,
        target=(0.5, 0.5),
        anchors=anchors,
        seconds=seconds,
    )


class Clock:
    """A clock on which every look takes a second, so that a slow machine takes as many steps as a fast one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now
