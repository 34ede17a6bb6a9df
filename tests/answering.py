"""What the tests of written answers share: a tiny model that speaks in letters, decisions about what it says."""

from __future__ import annotations

from typing import Any

import torch
from conftest import byte_tokenizer, tiny_llama
from training import letters_set

from dso.backbone import Backbone
from dso.decisions import DecisionSet
from dso.matching import Matcher
from dso.steering import Steering
from envs.task import DecisionTask, RewardConfig
from trainers.constraints import FixedKL, KLBudget

LETTERS = Matcher(whole_words=False)  # the letters stand among others
TOKENS = 3  # of an answer


def speaking_model(seed: int = 0) -> torch.nn.Module:
    """A tiny model whose answers are not all different."""
    model = tiny_llama(seed)
    with torch.no_grad():
        model.model.norm.weight.mul_(3.0)
    return model


def speaking_backbone(seed: int = 0) -> Backbone:
    return Backbone(speaking_model(seed), byte_tokenizer(), "tiny")


@torch.no_grad()
def spoken_letters(backbone: Backbone) -> dict[str, str]:
    """The two capital letters that the model says most, the likelier one for the women."""
    decisions = letters_set(facts=False)
    said = backbone.score(list(decisions), next_token=True).next_token.exp().mean(0)
    capitals = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    order = sorted(capitals, key=lambda letter: -float(said[backbone.tokenizer(letter).input_ids[0]]))
    return {"female": order[0], "male": order[1]}


def spoken_set(backbone: Backbone, **options: Any) -> DecisionSet:
    """:func:`training.letters_set` about the letters that the model says."""
    return letters_set(letters=spoken_letters(backbone), **options)


def answer_task(
    backbone: Backbone | None = None, *, facts: bool = True, **reward: Any
) -> tuple[DecisionTask, Steering]:
    """A task over the speaking model with a steering attached; the preference is the batch's unless said otherwise."""
    backbone = backbone or speaking_backbone()
    torch.manual_seed(0)
    steering = Steering.for_model(backbone.model)
    config = RewardConfig(
        **{"form": "smooth", "width": 0.5, "estimate": "context", "decay": 0.0, "batch_weight": 1.0, **reward}
    )
    return DecisionTask(
        backbone, spoken_set(backbone, facts=facts), None, config, steering.attach(backbone.model)
    ), steering


def answer_trainer(kind: Any, task: DecisionTask, steering: Steering, **options: Any) -> Any:
    """A trainer of :mod:`trainers.grpo`; what a test depends on is given here or by the test."""
    kl: KLBudget | FixedKL = options.pop("kl", FixedKL(0.0))
    rate = options.pop("rate", lambda left: 0.01)
    defaults = {"steps": 1, "ambiguous": 16, "unambiguous": 4, "num_generations": 4, "max_completion_length": TOKENS}
    return kind(task, steering, LETTERS, kl, rate, **{**defaults, **options})
