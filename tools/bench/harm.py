"""What a steering costs where nothing should move: a capability task and the perplexity of neutral text."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from dso.evaluation.benchmarks.arc import Arc, arc_questions
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.neutral import NeutralTexts, neutral_texts
from dso.evaluation.report import fixed_rows
from dso.files import as_path, write_text
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from dso.steering.model import Steering
from launch.commands.common import numbers, quieten


@dataclass(frozen=True, slots=True)
class Cost:
    """One model's figures.

    Attributes:
        right: (N,) bool, by question.
        nll: (N,) nats of each question's text with its right answer. tokens: (N,) that they are the sum over.
        neutral_kl: mean KL to the base model after the shipped neutral texts.
    """

    right: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    neutral_kl: float


def harm(arguments: argparse.Namespace) -> None:
    """ARC-Easy and neutral text under steerings at each scale, against the base model on the same questions."""
    quieten()
    questions = arc_questions(as_path(arguments.arc))[: arguments.limit]
    steerings = [Steering.from_pretrained(folder) for folder in arguments.steerings]
    backbone = Backbone.load(steerings[0].config.base_model)
    handles = [steering.to(backbone.device).attach(backbone.model, 0.0) for steering in steerings]
    scales = numbers(arguments.scale, "--scale")
    names = [("base", 0.0), *product(arguments.steerings, scales)]
    costs = _measure(backbone, Arc(questions), product(handles, scales))
    records = [
        {"steering": name, "scale": scale, **compared(costs[0], cost)}
        for (name, scale), cost in zip(names, costs, strict=True)
    ]
    result = {"questions": len(questions), "rows": records}
    write_text(Path(arguments.results) / "harm.json", json.dumps(result, indent=1) + "\n")
    header = ("steering", "scale", "ARC-Easy", "change in points [95%]", "perplexity", "change [95%]", "neutral KL")
    print(fixed_rows([header, *(_cells(record) for record in records)]))


def compared(base: Cost, cost: Cost) -> dict[str, object]:
    """Accuracy and perplexity, and their changes with normal intervals over the questions, which both answered."""
    gained = cost.right.astype(float) - base.right
    ratio = math.log(perplexity(cost) / perplexity(base))
    # The log of a ratio of perplexities is a mean over tokens of differences: questions are its clusters.
    spread = (cost.nll - base.nll) - ratio * cost.tokens
    error = math.sqrt((spread**2).sum()) / cost.tokens.sum()
    mean, half = gained.mean(), 1.96 * gained.std(ddof=1) / math.sqrt(len(gained))
    return {
        "accuracy": float(cost.right.mean()),
        "points": [100 * float(x) for x in (mean, mean - half, mean + half)],
        "perplexity": perplexity(cost),
        "perplexity_change": [math.expm1(x) for x in (ratio, ratio - 1.96 * error, ratio + 1.96 * error)],
        "neutral_kl": cost.neutral_kl,
    }


def perplexity(cost: Cost) -> float:
    """exp of the mean negative log-likelihood of a token."""
    return math.exp(cost.nll.sum() / cost.tokens.sum())


def _cells(record: dict) -> tuple[str, ...]:
    points, change = record["points"], [100 * x for x in record["perplexity_change"]]
    return (
        record["steering"],
        f"{record['scale']:g}",
        f"{record['accuracy']:.3f}",
        "{:+.2f} [{:+.2f}, {:+.2f}]".format(*points),
        f"{record['perplexity']:.2f}",
        "{:+.2f}% [{:+.2f}, {:+.2f}]".format(*change),
        f"{record['neutral_kl']:.4f}",
    )


def _measure(backbone: Backbone, task: Arc, settings: Iterable[tuple[Handle, float]]) -> list[Cost]:
    """The base model's cost, then that of each steering, whose handle is at 0, at its scale."""
    probe, neutral = Probe(backbone), NeutralTexts(backbone, neutral_texts())
    costs = [Cost(*task.ask(probe), neutral.kl())]
    for handle, scale in settings:
        handle.scale = scale
        costs.append(Cost(*task.ask(probe), neutral.kl()))
        handle.scale = 0.0
    return costs
