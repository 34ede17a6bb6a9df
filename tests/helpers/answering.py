"""What the tests of free-form answers share: a tiny model that speaks in letters, decisions about what it says."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from small_runs import letters_set, replaced
from stable_baselines3.common.logger import KVWriter, Logger
from tiny import byte_tokenizer, tiny_llama

from dso.decisions.decision import DecisionSet
from dso.decisions.matching import Matcher
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from envs.reward import RewardConfig
from envs.task import DecisionTask
from trainers.constraints import FixedKL, KLBudget

LETTERS = Matcher(whole_words=False)  # the letters stand among others
TOKENS = 3  # of an answer


def speaking_backbone(seed: int = 0) -> Backbone:
    """A tiny model of which about half of the tokens that it says are A or H, A more often than H."""
    backbone = Backbone(tiny_llama(seed), byte_tokenizer(), "tiny")
    mean = backbone.score(list(spoken_set()), hidden=True).hidden.mean(0)
    across = torch.randn(len(mean), generator=torch.Generator().manual_seed(seed))
    across = torch.nn.functional.normalize(across - mean * (across @ mean) / mean.square().sum(), dim=0)
    rows = backbone.model.get_input_embeddings().weight  # the output layer's too
    with torch.no_grad():
        for letter, logit, side in (("A", 6.0, 1.0), ("H", 4.0, -1.0)):
            rows[backbone.tokenizer(letter).input_ids[0]] = logit * mean / mean.square().sum() + side * across
    return backbone


def spoken_set(**options: Any) -> DecisionSet:
    """:func:`small_runs.letters_set` about the letters that the model says."""
    return letters_set(letters={"female": "A", "male": "H"}, **options)


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
    return DecisionTask(backbone, spoken_set(facts=facts), None, config, steering.attach(backbone.model)), steering


def answer_trainer(kind: Any, task: DecisionTask, steering: Steering, **options: Any) -> Any:
    """A trainer of :mod:`trainers.grpo`; what a test depends on is given here or by the test.

    ``on_step`` is told of each step and what was recorded of it.
    """
    on_step = options.pop("on_step", None)
    kl: KLBudget | FixedKL = options.pop("kl", FixedKL(0.0))
    rate = options.pop("rate", lambda left: 0.01)
    defaults = {
        "max_grad_norm": 1e3,
        "steps": 1,
        "ambiguous": 16,
        "unambiguous": 4,
        "num_generations": 4,
        "max_completion_length": TOKENS,
        "output_dir": tempfile.gettempdir(),  # TRL would make a folder where the tests are started; nothing is written
    }
    trainer = kind(task, steering, LETTERS, kl, rate, **{**defaults, **options})
    if on_step is not None:
        trainer.set_logger(Logger(None, [Told(on_step, trainer.decisions_a_step)]))
    return trainer


class Told(KVWriter):
    """Tells of the records of training as they are written."""

    def __init__(self, on_step: Callable[[int, dict[str, float]], None], decisions: int):
        self.on_step, self.decisions = on_step, decisions

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.on_step(step // self.decisions, {key.partition("/")[2]: value for key, value in key_values.items()})

    def close(self) -> None:
        pass


def write_run(folder: Path, **changes: Any) -> Path:
    """A tiny model, decisions of three splits and a config of two steps; ``section__key`` replaces a value."""
    backbone = speaking_backbone()
    backbone.model.save_pretrained(folder / "model")
    backbone.tokenizer.save_pretrained(folder / "model")
    asked = [
        replace(decision, id=f"{split}/{decision.id}", split=split)
        for split in ("train", "validation", "test")
        for decision in spoken_set()
    ]
    DecisionSet(tuple(asked), ("female", "male"), "letters").write_jsonl(folder / "letters.jsonl")
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "model"), "device": "cpu"},
        "data": {"set": str(folder / "letters.jsonl")},
        "train": {
            "estimator": "grpo", "max_steps": 2, "ambiguous": 16, "unambiguous": 4,
            "optimizer": {"learning_rate": 0.01, "fisher_batches": 2},
            "freeform": {"num_generations": 4, "max_completion_length": TOKENS},
        },
        "matcher": {"whole_words": False},
        "constraints": {"kl_budget": 0.05, "max_accuracy_loss": 1.0},
        "evaluation": {"eval_steps": 2, "samples": 4},
        "run": {"output_dir": str(folder / "runs"), "run_name": "letters"},
    }  # fmt: skip
    replaced(values, changes)
    path = folder / "own.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path
