"""Measuring what a model says: the frequencies of its sampled answers in place of a policy over candidates.

Every decision is answered ``samples`` times; a :class:`dso.decisions.matching.Matcher` reads whom each answer names.
The frequencies over the candidates, with one more for "names none of them", stand where :mod:`dso.evaluation.bias`
expects probabilities, so bias and its intervals are those of candidate scoring. Sampling adds to the noise of a unit,
and is taken off with it. There are no log-odds: a frequency may be 0.

    accuracy      share of the answers that name the right candidate
    KL            nats a token, mean over the tokens of the answers
    answer mass   share of the answers that name a candidate; what is left is abstention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dso.decisions.decision import ABSTAIN, Candidate, DecisionError, DecisionSet
from dso.decisions.matching import Matcher
from dso.evaluation.bias import Estimate, accuracy
from dso.evaluation.evaluator import Measurement
from dso.models.backbone import Backbone
from dso.models.sampling import sample, token_kl
from dso.steering.handle import Handle, unsteered

NOBODY = "(none of them)"
KL_SAMPLES = 2  # answers of a decision whose KL is measured: each compares whole distributions at every token


@dataclass(frozen=True, slots=True)
class Answers:
    """What was said at one scale.

    Attributes:
        texts: for each decision its sampled answers.
        named: (N, S) int64, the index of the candidate that each answer names, -1 for none.
        measurement: the frequencies (N, K + 1), of the candidates of :attr:`AnswerEvaluator.decisions`.
    """

    texts: tuple[tuple[str, ...], ...]
    named: np.ndarray
    measurement: Measurement


class AnswerEvaluator:
    """Samples the answers to one decision set under a steering at any scale.

    Every portion of decisions has a seed of its own, the same at every scale, so what is sampled does not depend on how
    many processes share the work; torch's own generator is left where it was.

    Args:
        backbone: the model that ``handle`` is attached to.
        decisions: what is asked; :attr:`decisions` are the same with a candidate for "none of them".
        matcher: reads the answers.
        handle: the steering; None measures the base model only.
        samples: answers a decision.
        max_new_tokens: length limit of an answer.
        temperature: of the sampling.
        seed: of the sampling.
        progress: called with the number of answered decisions after each portion.
        rank, size, add: which of how many processes this is, and what adds up a tensor over them, where they share the
            work; every one of them gets the whole result.

    Raises:
        DecisionError: as :func:`check_answers`.
    """

    PORTION = 32

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        matcher: Matcher,
        handle: Handle | None = None,
        *,
        samples: int = 8,
        max_new_tokens: int = 16,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        rank: int = 0,
        size: int = 1,
        add: Callable[[Tensor], Tensor] | None = None,
    ):
        if samples < 1 or max_new_tokens < 1 or not temperature > 0:
            found = f"samples {samples}, max_new_tokens {max_new_tokens}, temperature {temperature}"
            raise ValueError(f"{found}: the first two must be at least 1, the last above 0")
        check_answers(decisions, matcher)
        self.backbone = backbone
        self.asked = decisions
        self.decisions = with_nobody(decisions)
        self.matcher = matcher
        self.handle = handle
        self.samples = samples
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.progress = progress
        self.rank, self.size, self.add = rank, size, add or (lambda values: values)
        self._prompts = [backbone.encode(decision).prompt for decision in decisions]
        self._order = sorted(range(len(decisions)), key=lambda index: self._prompts[index])

    def measure(self, scale: float = 1.0) -> Answers:
        """The set at one scale; every steering on the model has the scale afterwards that it had before."""
        if self.handle is None and scale:
            raise ValueError(f"scale {scale} needs a steering; without one there is only scale 0")
        # Tokens of the answers plus one, so that 0 is none.
        written = torch.zeros(len(self._prompts), self.samples, self.max_new_tokens, dtype=torch.long)
        kl = torch.zeros(len(self._prompts), dtype=torch.float64)
        starts = list(range(0, len(self._order), self.PORTION))
        with unsteered(self.backbone.model):
            if self.handle is not None:
                self.handle.scale = scale
            with torch.random.fork_rng(devices=_generators(self.backbone.device)):
                for number, start in enumerate(starts):
                    if number % self.size == self.rank:
                        torch.manual_seed(self.seed + number)
                        self._answer(self._order[start : start + self.PORTION], written, kl)
        return self._read(self.add(written).tolist(), self.add(kl).numpy())

    def _answer(self, rows: list[int], written: Tensor, kl: Tensor) -> None:
        """Fill in the answers and the KL of some decisions."""
        prompts = [self._prompts[row] for row in rows for _ in range(self.samples)]
        answers = sample(self.backbone, prompts, max_new_tokens=self.max_new_tokens, temperature=self.temperature)
        for place, answer in enumerate(answers):
            row, column = rows[place // self.samples], place % self.samples
            written[row, column, : len(answer)] = torch.tensor(answer) + 1
        if self.handle is not None and self.handle.scale:
            chosen = [place for place in range(len(prompts)) if place % self.samples < KL_SAMPLES]
            found = token_kl(
                self.backbone, self.handle, [prompts[place] for place in chosen], [answers[place] for place in chosen]
            )
            kl[rows] = torch.tensor(found, dtype=torch.float64).view(len(rows), -1).mean(1)
        if self.progress is not None:
            self.progress(len(rows))

    def _read(self, written: list[list[list[int]]], kl: np.ndarray) -> Answers:
        tokens = [[[token - 1 for token in answer if token] for answer in answers] for answers in written]
        decode = self.backbone.tokenizer.decode
        texts = tuple(tuple(decode(answer, skip_special_tokens=True) for answer in answers) for answers in tokens)
        named = np.full((len(texts), self.samples), -1)
        frequencies = np.zeros((len(texts), max(len(d.candidates) for d in self.decisions)))
        for row, (decision, answers) in enumerate(zip(self.asked, texts, strict=True)):
            for column, text in enumerate(answers):
                found = self.matcher.match(text, decision)
                named[row, column] = -1 if found is None else found
                frequencies[row, len(decision.candidates) if found is None else found] += 1 / self.samples
        return Answers(texts, named, Measurement(frequencies, (named >= 0).mean(1), kl))

    def accuracy(self, answers: Answers) -> Estimate:
        """Share of the answers to unambiguous decisions that name the right candidate; nan if there are none."""
        asked = [
            (replace(d, id=f"{d.id}#{n}", unit=d.unit or d.id), choice)
            for d, row in zip(self.decisions, answers.named, strict=True)
            for n, choice in enumerate(row)
            if not d.ambiguous
        ]
        if not asked:
            return Estimate(float("nan"), float("nan"), float("nan"))
        chosen = np.zeros((len(asked), max(len(d.candidates) for d, _ in asked)))
        for row, (decision, choice) in enumerate(asked):
            chosen[row, choice if choice >= 0 else len(decision.candidates) - 1] = 1.0
        decisions = DecisionSet(tuple(d for d, _ in asked), self.decisions.groups, self.decisions.name)
        return accuracy(chosen, decisions)


def check_answers(decisions: DecisionSet, matcher: Matcher) -> None:
    """Make sure that decisions can be asked and their answers be read; it takes no model.

    Raises:
        DecisionError: if one has images, or a candidate that no answer could name.
    """
    if seen := next((decision for decision in decisions if decision.images), None):
        raise DecisionError(f"decision {seen.id!r} has images; free-form answers are for text so far")
    matcher.check(decisions)


def with_nobody(decisions: DecisionSet) -> DecisionSet:
    """The decisions with one more candidate each, of the group ``abstain``: what an answer is that names nobody."""
    nobody = Candidate(text=NOBODY, group=ABSTAIN)
    asked = tuple(replace(decision, candidates=(*decision.candidates, nobody)) for decision in decisions)
    return DecisionSet(asked, decisions.groups, decisions.name)


def _generators(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
