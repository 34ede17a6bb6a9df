"""One forward pass over token sequences, packed, padded or one by one, and what is read from it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dso.models.encoded import Encoded
from dso.models.packing import pack
from dso.models.vision import ImageInputs


@dataclass(frozen=True, slots=True)
class Run:
    """What a pass says.

    Attributes:
        reads: for each sequence the rows of ``logits`` from its start position on.
        logits: (M, V), of the positions that are read.
        states: (M, d) the output layer's input there, or None if it was not asked for.
    """

    reads: list[list[int]]
    logits: Tensor
    states: Tensor | None


def run_packed(model, sequences: Sequence[Sequence[int]], starts: Sequence[int], hidden: bool = False) -> Run:
    """The sequences merged into one prefix tree (:mod:`dso.models.packing`)."""
    row = pack(sequences)
    inputs = row.inputs(unwrapped(model))
    keep = sorted({node for path, start in zip(row.paths, starts, strict=True) for node in path[start:]})
    place = {node: number for number, node in enumerate(keep)}
    logits, states = _forward(model, keep, hidden, **inputs)
    reads = [[place[node] for node in path[start:]] for path, start in zip(row.paths, starts, strict=True)]
    return Run(reads, logits[0], None if states is None else states[0])


def run_padded(model, sequences: Sequence[Sequence[int]], starts: Sequence[int], hidden: bool = False) -> Run:
    """The sequences as right-padded rows."""
    longest = max(map(len, sequences))
    input_ids = torch.tensor([[*s, *([0] * (longest - len(s)))] for s in sequences])
    attention_mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    keep = sorted({column for s, start in zip(sequences, starts, strict=True) for column in range(start, len(s))})
    device = _device(model)
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    return _pick(*_forward(model, keep, hidden, **inputs), keep, list(enumerate(sequences)), starts)


def run_single(model, sequences: Sequence[Sequence[int]], starts: Sequence[int], hidden: bool = False) -> Run:
    """Each sequence in a pass of its own, without padding or mask."""
    reads: list[list[int]] = []
    tables: list[Tensor] = []
    states: list[Tensor] = []
    row = 0
    for sequence, start in zip(sequences, starts, strict=True):
        keep = list(range(start, len(sequence)))
        logits, state = _forward(model, keep, hidden, input_ids=torch.tensor([list(sequence)]).to(_device(model)))
        reads.append(list(range(row, row + len(keep))))
        row += len(keep)
        tables.append(logits[0])
        if state is not None:
            states.append(state[0])
    return Run(reads, torch.cat(tables), torch.cat(states) if states else None)


def run_with_images(model, encoded: Sequence[Encoded], images: Sequence[ImageInputs], hidden: bool = False) -> Run:
    """Prompts with their images as right-padded rows; the candidates of a prompt share its row as far as they can.

    Inputs with a value for each token are padded with zeros, like the mask. Images are not: the prompts of one pass
    have image tensors of equal shapes, as some models (Mllama) notice how a batch is filled up.
    """
    rows: list[tuple[int, ...]] = []
    places, merged = [], []
    for e, brought in zip(encoded, images, strict=True):
        own = e.distinct_sequences()
        for sequence in e.sequences():
            number = next(n for n, row in enumerate(own) if row[: len(sequence)] == sequence)
            places.append((len(rows) + number, sequence))
        rows += own
        merged += [(brought, len(row)) for row in own]
    starts = [len(e.prompt) - 1 for e in encoded for _ in e.candidates]
    keep = sorted({c for (_, s), start in zip(places, starts, strict=True) for c in range(start, len(s))})
    device, dtype = _device(model), unwrapped(model).dtype
    inputs = {
        "input_ids": _pad([torch.tensor([row]) for row in rows]),
        "attention_mask": _pad([torch.ones(1, len(row), dtype=torch.long) for row in rows]),
    }
    for name in merged[0][0].tokens:
        inputs[name] = _pad([brought.tokens[name][:, :length] for brought, length in merged])
    loaded = [brought.load() for brought, _ in merged]
    inputs |= {name: torch.cat([tensors[name] for tensors in loaded]) for name in loaded[0]}
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    return _pick(*_forward(model, keep, hidden, **inputs), keep, places, starts)


def _pad(rows: Sequence[Tensor]) -> Tensor:
    """Tensors (1, length, ...) as one (B, longest, ...), filled up with zeros behind."""
    longest = max(row.shape[1] for row in rows)
    return torch.cat(
        [torch.nn.functional.pad(row, [0, 0] * (row.ndim - 2) + [0, longest - row.shape[1]]) for row in rows]
    )


def _pick(
    logits: Tensor,
    states: Tensor | None,
    keep: Sequence[int],
    places: Sequence[tuple[int, Sequence[int]]],
    starts: Sequence[int],
) -> Run:
    """Of logits (B, len(keep), V) what each sequence reads: those of its row in the batch, from its start on."""
    place = {column: number for number, column in enumerate(keep)}
    wanted: list[tuple[int, int]] = []
    reads = []
    for (row, sequence), start in zip(places, starts, strict=True):
        reads.append(list(range(len(wanted), len(wanted) + len(sequence) - start)))
        wanted += [(row, place[column]) for column in range(start, len(sequence))]
    rows, columns = torch.tensor(wanted).to(logits.device).unbind(1)
    return Run(reads, logits[rows, columns], None if states is None else states[rows, columns])


def _forward(model, keep: Sequence[int], hidden: bool, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits (B, len(keep), V) and, if asked for, the output layer's input (B, len(keep), d) at the kept positions."""
    inner = unwrapped(model)
    kept = torch.tensor(keep).to(inputs["input_ids"].device)
    options = {"logits_to_keep": kept, "use_cache": False}
    known = {name: value for name, value in options.items() if takes(type(inner).forward, name)}
    caught: list[Tensor] = []
    own = threading.get_ident()  # the layer is that of all threads that score at the same time

    def catch(_: torch.nn.Module, args: tuple) -> None:
        if threading.get_ident() == own:
            caught.append(args[0])

    hook = inner.get_output_embeddings().register_forward_pre_hook(catch) if hidden else None
    try:
        logits = model(**inputs, **known).logits
    finally:
        if hook is not None:
            hook.remove()
    states = caught[0] if hidden else None
    if logits.shape[1] != len(keep):  # an architecture that knows no logits_to_keep
        logits, states = logits[:, kept], None if states is None else states[:, kept]
    return logits, states


@cache
def takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a class's ``forward`` takes an argument of that name."""
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _device(model) -> torch.device:
    return next(unwrapped(model).get_input_embeddings().parameters()).device


def unwrapped(model):
    """The model itself, where a launcher wrapped it to exchange gradients."""
    return getattr(model, "module", model)
