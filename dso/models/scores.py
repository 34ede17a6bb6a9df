"""What scoring says, and the rule by which it is said.

``log p(candidate | prompt)`` is the sum over the candidate's tokens. Candidates exclude one another: where the tokens
of one begin another's, the shorter one has the probability that the answer does not go on to a longer one,

    p(Sam) = p(" Sam") (1 - p("ira" | " Sam"))    beside " Samira",

so the answer mass ``sum_k p(candidate_k | prompt)`` is a probability. The policy over the K candidates is

    pi(k | x) = softmax_k log p(candidate_k | prompt)

with ``log p / tokens`` in place of ``log p`` under length normalisation. The KL to the base model is taken at every
answer position, on the whole next-token distribution, and averaged: each candidate weighs alike, and so does each token
of a candidate. Where all candidates have one token it is the KL behind the prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime

import torch
from torch import Tensor

from dso.errors import UserError
from dso.models.encoded import Positions

DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How decisions are scored; saved with a steering, and used by whoever measures it.

    Attributes:
        length_normalised: divide candidates' log-probabilities by their token counts.
        date: what chat templates that print today's date print, as YYYY-MM-DD. The default is the date that Llama 3's
            own template falls back to.
        template: digest of the chat template; "" where there is none, or it is not known.

    Raises:
        UserError: if a field has the wrong type, or the date is none.
    """

    length_normalised: bool = False
    date: str = "2024-07-26"
    template: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.length_normalised, bool):
            raise UserError(f"length_normalised is {self.length_normalised!r}, expected true or false")
        if not isinstance(self.template, str):
            raise UserError(f"template is {self.template!r}, expected a string")
        try:
            known = isinstance(self.date, str) and DATE.fullmatch(self.date) and datetime.fromisoformat(self.date)
        except ValueError:
            known = None
        if not known:
            raise UserError(f"date is {self.date!r}, expected YYYY-MM-DD")

    def difference(self, other: Scoring) -> str | None:
        """Why what is scored by this rule cannot stand beside what is scored by another; None if it can."""
        for name in ("length_normalised", "date", "template"):
            own, theirs = getattr(self, name), getattr(other, name)
            if own != theirs and (name != "template" or (own and theirs)):
                return f"{name} is {own!r} there and {theirs!r}"
        return None


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of N decisions with at most K candidates.

    Attributes:
        log_probs: (N, K) float32, log p(candidate | prompt); -inf where a decision has fewer candidates.
        lengths: (N, K) int64, tokens of each candidate (1 where there is none).
        next_token: (M, V) float32 log-probabilities at the M answer positions, the N behind the prompts first
            (:class:`dso.models.encoded.Positions`); or None.
        hidden: (N, d) float32 input of the output layer behind the prompts, without gradient, or None.
        positions: of ``next_token``, or None.
        scoring: the rule of :meth:`policy`.
    """

    log_probs: Tensor
    lengths: Tensor
    next_token: Tensor | None = None
    hidden: Tensor | None = None
    positions: Positions | None = None
    scoring: Scoring = field(default_factory=Scoring)

    def policy(self) -> Tensor:
        """log pi of shape (N, K): log-softmax over the candidates (of the mean per token if normalised)."""
        scores = self.log_probs / self.lengths if self.scoring.length_normalised else self.log_probs
        return torch.log_softmax(scores, dim=-1)

    def answer_mass(self) -> Tensor:
        """(N,) probability that all candidates hold together, at most 1."""
        return self.log_probs.exp().sum(-1)

    def next_token_by_decision(self, device: torch.device | str) -> list[Tensor]:
        """``next_token`` on a device and taken apart: of each decision (m, V), the one behind its prompt first.

        Raises:
            ValueError: if it was not asked for.
        """
        table, positions = self.asked()
        return positions.split(table.to(device))

    def kl(self, reference: Tensor) -> Tensor:
        """(N,) KL in nats to a reference (M, V) for the same decisions, mean over the answer positions.

        Raises:
            ValueError: if these scores have no next-token distributions.
        """
        table, positions = self.asked()
        return positions.mean(kl_divergence(table, reference))

    def asked(self) -> tuple[Tensor, Positions]:
        """``next_token`` and ``positions``.

        Raises:
            ValueError: if they were not asked for.
        """
        if self.next_token is None or self.positions is None:
            raise ValueError("there are no next-token distributions; score with next_token=True")
        return self.next_token, self.positions


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N,) KL(p || q) in nats of rows of log-probabilities (N, V); what p rules out (-inf) adds nothing."""
    difference = (log_p - log_q).masked_fill(
        log_p == -torch.inf, 0.0
    )  # -inf less -inf is no number, nor is its gradient
    return (log_p.exp() * difference).sum(-1)


def log_stop(log_probs: Tensor, rows: dict[tuple[int, ...], int], tails: list[tuple[int, ...]], at: tuple) -> Tensor:
    """Log-probability that an answer goes on from ``at`` in no way that begins with one of ``tails``.

    It is the sum over the tokens that leave the tails' tree, so that it is exact, and its gradient finite, where
    1 - p(tails) would be rounded to 0.

    Args:
        log_probs: (R, V).
        rows: the row of the distribution behind each answer's beginning.
        tails: tokens, none empty.
        at: the answer's beginning.
    """
    nexts: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in tails:
        nexts.setdefault(first, []).append(tuple(rest))
    row = log_probs[rows[at]]
    terms = [row.index_fill(0, torch.tensor(list(nexts), device=row.device), -torch.inf).logsumexp(0)]
    terms += [
        row[token] + log_stop(log_probs, rows, rests, (*at, token)) for token, rests in nexts.items() if () not in rests
    ]
    return torch.stack(terms).logsumexp(0)
