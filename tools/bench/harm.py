"""What a steering costs where nothing should move: a capability task and the perplexity of neutral text."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.errors import UserError
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.neutral import NeutralTexts, neutral_texts
from dso.evaluation.report import fixed_rows
from dso.files import write_text
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from dso.steering.model import Steering
from launch.commands.common import quieten

LETTERS = "ABCDE"
Question = tuple[str, list[str], int]  # the text, its options, the place of the right one
ROWS = 16  # texts of a pass


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
    """ARC-Easy and neutral text under steerings, against the base model on the same questions."""
    quieten()
    questions = arc(Path(arguments.arc))[: arguments.limit]
    steerings = [Steering.from_pretrained(folder) for folder in arguments.steerings]
    backbone = Backbone.load(steerings[0].config.base_model)
    handles = [steering.to(backbone.device).attach(backbone.model, 0.0) for steering in steerings]
    costs = _measure(backbone, questions, handles, arguments.scale)
    records = [
        {"steering": name, **compared(costs[0], cost)}
        for name, cost in zip(["base", *arguments.steerings], costs, strict=True)
    ]
    result = {"questions": len(questions), "scale": arguments.scale, "rows": records}
    write_text(Path(arguments.results) / "harm.json", json.dumps(result, indent=1) + "\n")
    header = ("steering", "ARC-Easy", "change in points [95%]", "perplexity", "change [95%]", "neutral KL")
    print(fixed_rows([header, *(_cells(record) for record in records)]))


def arc(path: Path) -> list[Question]:
    """Questions with their options and the right one's place, from the published CSV without a header.

    Raises:
        UserError: naming the line that is none.
    """
    found = []
    with open(path, encoding="utf-8", newline="") as lines:
        for number, (question, *options, letter) in enumerate(csv.reader(lines), 1):
            kept = [option for option in options if option.strip()]
            if letter not in LETTERS[: len(kept)]:
                raise UserError(f"{path}, line {number}: the answer is {letter!r}, expected one of {len(kept)} letters")
            found.append((question, kept, LETTERS.index(letter)))
    return found


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
        f"{record['accuracy']:.3f}",
        "{:+.2f} [{:+.2f}, {:+.2f}]".format(*points),
        f"{record['perplexity']:.2f}",
        "{:+.2f}% [{:+.2f}, {:+.2f}]".format(*change),
        f"{record['neutral_kl']:.4f}",
    )


def _measure(backbone: Backbone, questions: Sequence[Question], handles: Sequence[Handle], scale: float) -> list[Cost]:
    """The base model's cost, then that of each steering, whose handle is at 0, at a scale."""
    decisions = DecisionSet(tuple(_decisions(questions)), ("right", "wrong"), "arc")
    settings = [(None, 0.0), *((handle, scale) for handle in handles)]
    answers = np.array([answer for _, _, answer in questions])
    texts = [f"{text} {options[answer]}" for text, options, answer in questions]
    neutral, costs = NeutralTexts(backbone, neutral_texts()), []
    for (handle, own), measured in zip(settings, Evaluator(backbone, decisions).settings(settings), strict=True):
        if handle is not None:
            handle.scale = own
        costs.append(Cost(measured.policy.argmax(1) == answers, *_likelihood(backbone, texts), neutral.kl()))
        if handle is not None:
            handle.scale = 0.0
    return costs


def _decisions(questions: Sequence[Question]) -> Iterator[Decision]:
    for number, (text, options, answer) in enumerate(questions):
        places = enumerate(options)
        yield Decision(
            id=str(number),
            context="arc",
            kind="unambiguous",
            prompt=f"Question: {text}\nAnswer:",
            candidates=tuple(Candidate(text=f" {o}", group="right" if k == answer else "wrong") for k, o in places),
            answer=answer,
        )


@torch.no_grad()
def _likelihood(backbone: Backbone, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = backbone.tokenizer
    nll, tokens = [], []
    for start in range(0, len(texts), ROWS):
        rows = [tokenizer(text).input_ids for text in texts[start : start + ROWS]]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=backbone.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=backbone.device)
        logits = backbone.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        own = logits.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
        nll.append(-own.sum(1).cpu().double().numpy())
        tokens.append(mask[:, 1:].sum(1).cpu().numpy())
    return np.concatenate(nll), np.concatenate(tokens)
