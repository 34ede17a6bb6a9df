"""Candidate log-probabilities and next-token distributions of encoded decisions, in few forward passes.

What is scored, and by which rule, is in :mod:`dso.models.scores`. Three layouts give the same numbers: packed prefix
trees (:mod:`dso.models.packing`), right-padded rows for architectures that take no token-to-token attention mask and
for decisions that are longer than a sliding window, which that mask does not know of, and single rows for architectures
whose answers change with what stands beside them (:mod:`dso.models.layout` tells which).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from dso.models.encoded import Encoded, answer_positions
from dso.models.forward import Run, run_packed, run_padded, run_single, run_with_images
from dso.models.packing import fill_rows, tree_size
from dso.models.scores import Scores, Scoring, log_stop

Layout = Literal["packed", "padded", "single"]


def score(
    model,
    encoded: Sequence[Encoded],
    *,
    layout: Layout,
    max_tokens: int,
    row_limit: int | None = None,
    next_token: bool = False,
    hidden: bool = False,
    scoring: Scoring | None = None,
) -> Scores:
    """Score N encoded decisions with a causal LM; gradients flow if the caller enables them.

    Args:
        layout: how decisions share a forward pass.
        max_tokens: tokens of one forward pass; a single larger decision still runs.
        row_limit: tokens that a packed row may have at most, such as the model's sliding window; a decision with more
            goes in padded rows.
        next_token: also return the log-probabilities of the whole vocabulary at the answer positions.
        hidden: also return the output layer's input behind the prompts.
        scoring: the rule of the policy.

    Raises:
        ValueError: if there are no decisions.
    """
    if not encoded:
        raise ValueError("no decisions to score")
    width = max(len(e.candidates) for e in encoded)
    parts: list[tuple[Tensor, Tensor | None, Tensor | None]] = []
    seen: list[int] = []
    for batch, how in passes(encoded, layout, max_tokens, row_limit):
        seen += batch
        parts.append(_score_batch(model, [encoded[index] for index in batch], width, how, next_token, hidden))
    device = parts[0][0].device
    order = torch.tensor(seen).argsort().to(device)
    lengths = torch.tensor([[*map(len, e.candidates), *[1] * (width - len(e.candidates))] for e in encoded])
    states = [part[2] for part in parts if part[2] is not None]
    return Scores(
        log_probs=torch.cat([part[0] for part in parts])[order],
        lengths=lengths.to(device),
        next_token=_in_order([part[1] for part in parts if part[1] is not None], encoded, seen),
        hidden=torch.cat(states)[order] if states else None,
        positions=answer_positions(encoded) if next_token else None,
        scoring=scoring or Scoring(),
    )


def _in_order(tables: Sequence[Tensor], encoded: Sequence[Encoded], seen: Sequence[int]) -> Tensor | None:
    """The passes' rows, which come decision by decision, in the order of :class:`dso.models.encoded.Positions`."""
    if not tables:
        return None
    starts, row = [0] * len(encoded), 0
    counts = [len(e.answer_positions()) for e in encoded]
    for index in seen:
        starts[index] = row
        row += counts[index]
    later = [start + place for start, count in zip(starts, counts, strict=True) for place in range(1, count)]
    return torch.cat(list(tables))[torch.tensor([*starts, *later]).to(tables[0].device)]


def token_logits(model, encoded: Sequence[Encoded], layout: Layout) -> tuple[list[list[int]], Tensor]:
    """One forward pass of :func:`passes`, for what has to be read token by token.

    Args:
        model: the model, or what a launcher wrapped it in.

    Returns:
        for each candidate of each decision the rows of the logits that predict its tokens, and the logits (M, V).
    """
    run = _run(model, encoded, layout, False)
    return run.reads, run.logits


def passes(
    encoded: Sequence[Encoded], layout: Layout, max_tokens: int, row_limit: int | None
) -> Iterator[tuple[list[int], Layout]]:
    """The indices of each forward pass, and its layout; images have passes of their own."""
    sequences = [e.sequences() for e in encoded]
    with_images: dict[int, list[tuple[int, ...]]] = {}
    alike: dict[object, dict[int, list[tuple[int, ...]]]] = {}
    for index, e in enumerate(encoded):
        if e.images is not None:
            with_images[index] = alike.setdefault(e.images.shapes, {})[index] = e.distinct_sequences()
    if layout == "single":
        for index in range(len(encoded)):
            yield [index], "single"
        return
    fits = [
        layout == "packed" and index not in with_images and (row_limit is None or tree_size(s) <= row_limit)
        for index, s in enumerate(sequences)
    ]
    packed = [index for index, fit in enumerate(fits) if fit]
    size = max_tokens if row_limit is None else min(max_tokens, row_limit)
    for row in fill_rows([sequences[index] for index in packed], size):
        yield [packed[number] for number in row], "packed"
    padded = {index: sequences[index] for index, fit in enumerate(fits) if not fit and index not in with_images}
    for items in (padded, *alike.values()):
        for batch in _padded_batches(items, max_tokens):
            yield batch, "padded"


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
    model, encoded: Sequence[Encoded], width: int, layout: Layout, next_token: bool, hidden: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities (n, width) of one pass, the distributions decision by decision, the states behind prompts."""
    run = _run(model, encoded, layout, hidden)
    log_probs = torch.log_softmax(run.logits.float(), dim=-1)
    cells: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    firsts: list[int] = []
    answers: list[int] = []
    stops: dict[int, Tensor] = {}
    reads_of = iter(run.reads)
    for number, e in enumerate(encoded):
        behind: dict[tuple[int, ...], int] = {}
        for column, candidate in enumerate(e.candidates):
            read = next(reads_of)
            behind |= {candidate[:place]: row for place, row in enumerate(read)}
            cells += [number * width + column] * len(candidate)
            rows += read
            targets += candidate
        firsts.append(behind[()])
        answers += [behind[beginning] for beginning in e.answer_positions()]
        for column, longer in _longer(e.candidates).items():
            stops[number * width + column] = log_stop(log_probs, behind, longer, e.candidates[column])
    device = log_probs.device
    at, row, target = torch.tensor([cells, rows, targets]).to(device)
    total = log_probs.new_zeros(len(encoded) * width).index_add(0, at, log_probs[row, target])
    absent = torch.ones_like(total, dtype=torch.bool).index_fill(0, at, False)
    if stops:
        total = total.index_add(0, torch.tensor(list(stops)).to(device), torch.stack(list(stops.values())))
    return (
        total.masked_fill(absent, -torch.inf).view(len(encoded), width),
        log_probs[torch.tensor(answers).to(device)] if next_token else None,
        run.states[torch.tensor(firsts).to(device)].detach().float() if run.states is not None else None,
    )


def _longer(candidates: Sequence[tuple[int, ...]]) -> dict[int, list[tuple[int, ...]]]:
    """For each candidate that begins others, what these go on with."""
    found = {
        column: [other[len(own) :] for other in candidates if len(other) > len(own) and other[: len(own)] == own]
        for column, own in enumerate(candidates)
    }
    return {column: tails for column, tails in found.items() if tails}


def _run(model, encoded: Sequence[Encoded], layout: Layout, hidden: bool) -> Run:
    """One forward pass over decisions that :func:`passes` put together."""
    if images := [e.images for e in encoded if e.images is not None]:
        return run_with_images(model, encoded, images, hidden)
    sequences = [sequence for e in encoded for sequence in e.sequences()]
    starts = [len(e.prompt) - 1 for e in encoded for _ in e.candidates]
    runs = {"packed": run_packed, "padded": run_padded, "single": run_single}
    return runs[layout](model, sequences, starts, hidden)
