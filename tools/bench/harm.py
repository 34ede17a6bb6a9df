"""What a steering costs where nothing should move: a capability task, and the perplexity of its texts and of prose.

The prose is from the language reference that every Python carries (``help("assignment")``): paragraphs about no person,
none of which is an anchor text.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from pydoc_data.topics import topics

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
        prose_nll, prose_tokens: (P,) the same of paragraphs.
        neutral_kl: mean KL to the base model after the shipped neutral texts.
    """

    right: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    prose_nll: np.ndarray
    prose_tokens: np.ndarray
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
    header = (
        "steering",
        "scale",
        "ARC-Easy",
        "change in points [95%]",
        "perplexity [95%]",
        "of prose [95%]",
        "neutral KL",
    )
    print(fixed_rows([header, *(_cells(record) for record in records)]))


def prose() -> list[str]:
    """Paragraphs of Python's own language reference that are sentences: no lists, grammar or code."""
    parts = [" ".join(part.split()) for name in sorted(topics) for part in re.split(r"\n\s*\n", topics[name])]
    return [part for part in dict.fromkeys(parts) if _is_prose(part)]


def _is_prose(text: str) -> bool:
    words = sum(letter.isalpha() or letter in " ,." for letter in text)
    return len(text) >= 240 and text[0].isupper() and text[-1] == "." and words > 0.96 * len(text)


def compared(base: Cost, cost: Cost) -> dict[str, object]:
    """Accuracy and perplexities, and their changes with normal intervals over the texts, which both read."""
    gained = cost.right.astype(float) - base.right
    mean, half = gained.mean(), 1.96 * gained.std(ddof=1) / math.sqrt(len(gained))
    return {
        "accuracy": float(cost.right.mean()),
        "points": [100 * float(x) for x in (mean, mean - half, mean + half)],
        "perplexity": perplexity(cost.nll, cost.tokens),
        "perplexity_change": change(base.nll, cost.nll, cost.tokens),
        "prose_perplexity": perplexity(cost.prose_nll, cost.prose_tokens),
        "prose_change": change(base.prose_nll, cost.prose_nll, cost.prose_tokens),
        "neutral_kl": cost.neutral_kl,
    }


def perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of a token."""
    return math.exp(nll.sum() / tokens.sum())


def change(before: np.ndarray, after: np.ndarray, tokens: np.ndarray) -> list[float]:
    """The relative change of the perplexity of N texts, by nats (N,) over so many tokens (N,), with its interval."""
    ratio = (after - before).sum() / tokens.sum()
    # The log of a ratio of perplexities is a mean over tokens of differences: texts are its clusters.
    error = math.sqrt(((after - before - ratio * tokens) ** 2).sum()) / tokens.sum()
    return [math.expm1(x) for x in (ratio, ratio - 1.96 * error, ratio + 1.96 * error)]


def _cells(record: dict) -> tuple[str, ...]:
    changes = ([100 * x for x in record[name]] for name in ("perplexity_change", "prose_change"))
    return (
        record["steering"],
        f"{record['scale']:g}",
        f"{record['accuracy']:.3f}",
        "{:+.2f} [{:+.2f}, {:+.2f}]".format(*record["points"]),
        *("{:+.2f}% [{:+.2f}, {:+.2f}]".format(*ends) for ends in changes),
        f"{record['neutral_kl']:.4f}",
    )


def _measure(backbone: Backbone, task: Arc, settings: Iterable[tuple[Handle, float]]) -> list[Cost]:
    """The base model's cost, then that of each steering, whose handle is at 0, at its scale."""
    probe, neutral, paragraphs = Probe(backbone), NeutralTexts(backbone, neutral_texts()), prose()

    def cost() -> Cost:
        sums, tokens = probe.likelihoods(paragraphs, start=False)
        return Cost(*task.ask(probe), -sums, tokens, neutral.kl())

    costs = [cost()]
    for handle, scale in settings:
        handle.scale = scale
        costs.append(cost())
        handle.scale = 0.0
    return costs
