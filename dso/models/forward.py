"""One forward pass over token sequences, packed or padded, and what is read from it.

Every function returns for each sequence the rows of the logits from its start position on, the logits (M, V) of the M
positions that are read, and the output layer's input (M, d) there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dso.models.packing import pack

if TYPE_CHECKING:
    from dso.models.scoring import Encoded


def run_packed(
    model, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[list[list[int]], Tensor, Tensor]:
    """The sequences merged into one prefix tree (:mod:`dso.models.packing`)."""
    row = pack(sequences)
    inputs = row.inputs(_unwrapped(model))
    keep = sorted({node for path, start in zip(row.paths, starts, strict=True) for node in path[start:]})
    place = {node: number for number, node in enumerate(keep)}
    logits, states = _forward(model, torch.tensor(keep, device=inputs["input_ids"].device), **inputs)
    reads = [[place[node] for node in path[start:]] for path, start in zip(row.paths, starts, strict=True)]
    return reads, logits[0], states[0]


def run_padded(
    model, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[list[list[int]], Tensor, Tensor]:
    """The sequences as right-padded rows."""
    longest = max(map(len, sequences))
    input_ids = torch.tensor([[*s, *([0] * (longest - len(s)))] for s in sequences])
    attention_mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    keep = sorted({column for s, start in zip(sequences, starts, strict=True) for column in range(start, len(s))})
    device = next(_unwrapped(model).get_input_embeddings().parameters()).device
    logits, states = _forward(
        model,
        torch.tensor(keep, device=device),
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
    )
    return _pick(logits, states, keep, list(enumerate(sequences)), starts)


def run_with_images(model, encoded: Sequence[Encoded]) -> tuple[list[list[int]], Tensor, Tensor]:
    """Prompts with images as right-padded rows; the candidates of a prompt share its row as far as they can.

    Inputs with a value for each token are padded with zeros, like the mask. Images are not: the prompts of one pass
    have image tensors of equal shapes, as some models (Mllama) notice how a batch is filled up.
    """
    rows: list[tuple[int, ...]] = []
    places, merged = [], []
    for e in encoded:
        own = distinct_rows(e)
        for sequence in e.sequences():
            number = next(n for n, row in enumerate(own) if row[: len(sequence)] == sequence)
            places.append((len(rows) + number, sequence))
        rows += own
        merged += [(e.images, len(row)) for row in own]
    starts = [len(e.prompt) - 1 for e in encoded for _ in e.candidates]
    keep = sorted({c for (_, s), start in zip(places, starts, strict=True) for c in range(start, len(s))})
    inner = _unwrapped(model)
    device = next(inner.get_input_embeddings().parameters()).device
    inputs = {
        "input_ids": _pad([torch.tensor([row]) for row in rows]),
        "attention_mask": _pad([torch.ones(1, len(row), dtype=torch.long) for row in rows]),
    }
    for name in merged[0][0].tokens:
        inputs[name] = _pad([images.tokens[name][:, :length] for images, length in merged])
    loaded = [images.load() for images, _ in merged]
    inputs |= {name: torch.cat([tensors[name] for tensors in loaded]) for name in loaded[0]}
    inputs = {k: v.to(device, inner.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    logits, states = _forward(model, torch.tensor(keep, device=device), **inputs)
    return _pick(logits, states, keep, places, starts)


def distinct_rows(encoded: Encoded) -> list[tuple[int, ...]]:
    """The sequences of a decision that no other one begins with: what a causal model has to run."""
    rows: list[tuple[int, ...]] = []
    for sequence in sorted(encoded.sequences(), key=len, reverse=True):
        if not any(row[: len(sequence)] == sequence for row in rows):
            rows.append(sequence)
    return rows


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (1, length, ...) as one (B, longest, ...), filled up with zeros behind."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat(
        [torch.nn.functional.pad(row, [0, 0] * (row.ndim - 2) + [0, longest - row.shape[1]]) for row in rows]
    )


def _pick(
    logits: Tensor,
    states: Tensor,
    keep: Sequence[int],
    places: Sequence[tuple[int, Sequence[int]]],
    starts: Sequence[int],
) -> tuple[list[list[int]], Tensor, Tensor]:
    """Of logits (B, len(keep), V) what each sequence reads: those of its row in the batch, from its start on."""
    place = {column: number for number, column in enumerate(keep)}
    wanted: list[tuple[int, int]] = []
    reads = []
    for (row, sequence), start in zip(places, starts, strict=True):
        reads.append(list(range(len(wanted), len(wanted) + len(sequence) - start)))
        wanted += [(row, place[column]) for column in range(start, len(sequence))]
    rows, columns = torch.tensor(wanted, device=logits.device).unbind(1)
    return reads, logits[rows, columns], states[rows, columns]


def _forward(model, keep: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, len(keep), V) and the output layer's input (B, len(keep), d) at the kept positions."""
    caught: list[Tensor] = []
    hook = _unwrapped(model).get_output_embeddings().register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    finally:
        hook.remove()
    states = caught[0]
    if logits.shape[1] != len(keep):  # an architecture that knows no logits_to_keep
        logits, states = logits[:, keep], states[:, keep]
    return logits, states


def _unwrapped(model):
    """The model itself, where a launcher wrapped it to exchange gradients."""
    return getattr(model, "module", model)
