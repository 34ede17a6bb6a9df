"""One forward pass over token sequences, packed or padded, and what is read from it.

Every function returns for each sequence the rows of the logits from its start position on, the logits (M, V) of the M
positions that are read, and the output layer's input (M, d) there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dso.packing import pack


def run_packed(
    model, sequences: Sequence[Sequence[int]], starts: Sequence[int]
) -> tuple[list[list[int]], Tensor, Tensor]:
    """The sequences merged into one prefix tree (:mod:`dso.packing`)."""
    row = pack(sequences)
    mask, inner = row.attention_mask, _unwrapped(model)
    if inner.config.get_text_config()._attn_implementation == "eager":  # which adds its mask to the attention scores
        mask = torch.zeros(mask.shape, dtype=inner.dtype).masked_fill(~mask, torch.finfo(inner.dtype).min)
    keep = sorted({node for path, start in zip(row.paths, starts, strict=True) for node in path[start:]})
    place = {node: number for number, node in enumerate(keep)}
    device = _unwrapped(model).get_input_embeddings().weight.device
    logits, states = _forward(
        model,
        torch.tensor(keep, device=device),
        input_ids=row.input_ids.to(device),
        position_ids=row.position_ids.to(device),
        attention_mask=mask.to(device),
    )
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
    device = _unwrapped(model).get_input_embeddings().weight.device
    logits, states = _forward(
        model,
        torch.tensor(keep, device=device),
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
    )
    place = {column: number for number, column in enumerate(keep)}
    wanted: list[tuple[int, int]] = []
    reads = []
    for number, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        reads.append(list(range(len(wanted), len(wanted) + len(sequence) - start)))
        wanted += [(number, place[column]) for column in range(start, len(sequence))]
    rows, columns = torch.tensor(wanted, device=device).unbind(1)
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
