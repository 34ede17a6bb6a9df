"""Candidate log-probabilities and next-token distributions of encoded decisions, in few forward passes.

``log p(candidate | prompt)`` is the sum over the candidate's tokens. The policy over the K candidates is

    pi(k | x) = softmax_k log p(candidate_k | prompt)

and the answer mass is ``sum_k p(candidate_k | prompt)``. Two layouts give the same numbers: packed prefix
trees (:mod:`dso.models.packing`), and right-padded rows for architectures that take no token-to-token attention mask
and for decisions that are longer than a sliding window, which that mask does not know of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dso.models.forward import distinct_rows, run_packed, run_padded, run_with_images
from dso.models.packing import fill_rows, tree_size

if TYPE_CHECKING:
    from dso.models.vision import ImageInputs


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of N decisions with at most K candidates.

    Attributes:
        log_probs: (N, K) float32, log p(candidate | prompt); -inf where a decision has fewer candidates.
        lengths: (N, K) int64, tokens of each candidate (1 where there is none).
        next_token: (N, V) float32 log-probabilities of the token after the prompt, or None.
        hidden: (N, d) float32 input of the output layer at that token, without gradient, or None.
    """

    log_probs: Tensor
    lengths: Tensor
    next_token: Tensor | None = None
    hidden: Tensor | None = None

    def policy(self, length_normalised: bool = False) -> Tensor:
        """log pi of shape (N, K): log-softmax over the candidates (of the mean per token if normalised)."""
        scores = self.log_probs / self.lengths if length_normalised else self.log_probs
        return torch.log_softmax(scores, dim=-1)

    def answer_mass(self) -> Tensor:
        """(N,) probability that all candidates hold together."""
        return self.log_probs.exp().sum(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(N,) KL(p || q) in nats of rows of log-probabilities (N, V); what p rules out (-inf) adds nothing."""
    difference = (log_p - log_q).masked_fill(
        log_p == -torch.inf, 0.0
    )  # -inf less -inf is no number, nor is its gradient
    return (log_p.exp() * difference).sum(-1)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt and of its candidates, and what its images bring
    (:class:`dso.models.vision.ImageInputs`)."""

    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    images: ImageInputs | None = field(default=None, compare=False)

    def sequences(self) -> list[tuple[int, ...]]:
        """What has to be run: the prompt with every candidate but its last token, which predicts nothing."""
        return [self.prompt + candidate[:-1] for candidate in self.candidates]


def score(
    model,
    encoded: Sequence[Encoded],
    *,
    packing: bool,
    max_tokens: int,
    row_limit: int | None = None,
    next_token: bool = False,
    hidden: bool = False,
) -> Scores:
    """Score N encoded decisions with a causal LM; gradients flow if the caller enables them.

    Args:
        packing: prefix-tree rows (True) or padded rows (False).
        max_tokens: tokens of one forward pass; a single larger decision still runs.
        row_limit: tokens that a packed row may have at most, such as the model's sliding window; a decision with more
            goes in padded rows.
        next_token: also return the log-probabilities of the whole vocabulary after the prompt.
        hidden: also return the output layer's input there.

    Raises:
        ValueError: if there are no decisions.
    """
    if not encoded:
        raise ValueError("no decisions to score")
    width = max(len(e.candidates) for e in encoded)
    parts: list[Scores] = []
    seen: list[int] = []
    for batch, packed in passes(encoded, packing, max_tokens, row_limit):
        seen += batch
        parts.append(_score_batch(model, [encoded[index] for index in batch], width, packed, next_token, hidden))
    order = torch.tensor(seen, device=parts[0].log_probs.device).argsort()
    joined = {}
    for name in (f.name for f in fields(Scores)):
        values = [getattr(part, name) for part in parts]
        joined[name] = None if values[0] is None else torch.cat(values)[order]
    return Scores(**joined)


def token_logits(model, encoded: Sequence[Encoded], packed: bool) -> tuple[list[list[int]], Tensor]:
    """One forward pass of :func:`passes`, for what has to be read token by token.

    Args:
        model: the model, or what a launcher wrapped it in.

    Returns:
        for each candidate of each decision the rows of the logits that predict its tokens, and the logits (M, V).
    """
    reads, logits, _ = _run(model, encoded, packed)
    return reads, logits


def passes(
    encoded: Sequence[Encoded], packing: bool, max_tokens: int, row_limit: int | None
) -> Iterator[tuple[list[int], bool]]:
    """The indices of each forward pass, and whether they are packed in it; images have passes of their own."""
    sequences = [e.sequences() for e in encoded]
    with_images: dict[int, list[tuple[int, ...]]] = {}
    alike: dict[object, dict[int, list[tuple[int, ...]]]] = {}
    for index, e in enumerate(encoded):
        if e.images is not None:
            with_images[index] = alike.setdefault(e.images.shapes, {})[index] = distinct_rows(e)
    fits = [
        packing and index not in with_images and (row_limit is None or tree_size(s) <= row_limit)
        for index, s in enumerate(sequences)
    ]
    packed = [index for index, fit in enumerate(fits) if fit]
    size = max_tokens if row_limit is None else min(max_tokens, row_limit)
    for row in fill_rows([sequences[index] for index in packed], size):
        yield [packed[number] for number in row], True
    padded = {index: sequences[index] for index, fit in enumerate(fits) if not fit and index not in with_images}
    for items in (padded, *alike.values()):
        for batch in _padded_batches(items, max_tokens):
            yield batch, False


def _padded_batches(items: Mapping[int, Sequence[Sequence[int]]], max_tokens: int) -> Iterator[list[int]]:
    sizes = {index: max(map(len, sequences)) for index, sequences in items.items()}
    batch: list[int] = []
    rows = 0
    for index in sorted(items, key=sizes.__getitem__):
        added = len(items[index])
        if batch and (rows + added) * sizes[index] > max_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += added
    if batch:
        yield batch


def _score_batch(
    model, encoded: Sequence[Encoded], width: int, packing: bool, next_token: bool, hidden: bool
) -> Scores:
    reads, logits, states = _run(model, encoded, packing)
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    answers, cells, rows, targets = [], [], [], []
    lengths = torch.ones(len(encoded), width, dtype=torch.long)
    reads_of = iter(reads)
    for number, e in enumerate(encoded):
        for column, candidate in enumerate(e.candidates):
            read = next(reads_of)
            if column == 0:
                answers.append(read[0])
            lengths[number, column] = len(candidate)
            cells += [number * width + column] * len(candidate)
            rows += read
            targets += candidate
    device = log_probs.device
    at = torch.tensor(cells, device=device)
    total = log_probs.new_zeros(len(encoded) * width).index_add(0, at, log_probs[rows, targets])
    absent = torch.ones_like(total, dtype=torch.bool).index_fill(0, at, False)
    return Scores(
        log_probs=total.masked_fill(absent, -torch.inf).view(len(encoded), width),
        lengths=lengths.to(device),
        next_token=log_probs[answers] if next_token else None,
        hidden=states[answers].detach().float() if hidden else None,
    )


def _run(model, encoded: Sequence[Encoded], packed: bool) -> tuple[list[list[int]], Tensor, Tensor]:
    """One forward pass over decisions that :func:`passes` put together; returns as
    :func:`dso.models.forward.run_packed`."""
    if encoded[0].images is not None:
        return run_with_images(model, encoded)
    sequences = [sequence for e in encoded for sequence in e.sequences()]
    starts = [len(e.prompt) - 1 for e in encoded for _ in e.candidates]
    return (run_packed if packed else run_padded)(model, sequences, starts)
