"""What training on free-form answers is made of, without TRL: how a step is divided and weighted, log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.encoded import Encoded
from dso.models.scoring import token_logits


def divide(decisions: int, num_generations: int, ranks: int, micro_batch: int | None) -> tuple[int, int]:
    """How the answers of a step are divided: those of one pass in one process, and the number of such passes.

    Raises:
        UserError: if they cannot be divided evenly among the processes, or among passes of ``micro_batch``.
    """
    answers = decisions * num_generations
    step = f"a step has {answers} answers ({decisions} decisions x num_generations {num_generations})"
    if answers % ranks:
        raise UserError(f"{step}, which {ranks} processes cannot share evenly; change either number")
    own = answers // ranks
    batch = micro_batch or own
    if own % batch:
        each = f", {own} in each of {ranks} processes" if ranks > 1 else ""
        raise UserError(f"{step}{each}, which a micro_batch of {batch} does not divide")
    return batch, own // batch


def reward_weights(ambiguous: int, unambiguous: int, weight: float) -> list[float]:
    """Of the two rewards: a mean over all decisions of a step is then that over the ambiguous ones plus ``weight``
    times that over the others."""
    total = ambiguous + unambiguous
    return [total / ambiguous, weight * total / unambiguous if unambiguous else 0.0]


def answer_log_probs(
    backbone: Backbone, model: Any, input_ids: Tensor, mask: Tensor, width: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of B answers' tokens, and the entropies there; the answers to one prompt share its pass.

    Args:
        model: the backbone's model, or what a launcher wrapped it in.
        input_ids, mask: (B, P + width) left-padded prompts, then right-padded answers.
        temperature: by which the logits are divided.

    Returns:
        (B, width) each, float32, 0 behind an answer's end; the entropies have no gradient.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    answers = []
    for row, (ids, real) in enumerate(zip(input_ids.tolist(), mask.bool().tolist(), strict=True)):
        prompt = tuple(token for token, there in zip(ids[:-width], real[:-width], strict=True) if there)
        answers.append(tuple(token for token, there in zip(ids[-width:], real[-width:], strict=True) if there))
        rows.setdefault(prompt, []).append(row)
    members = list(rows.values())
    encoded = [Encoded(prompt, tuple(answers[row] for row in group)) for prompt, group in rows.items()]
    log_probs = torch.zeros(len(answers), width, device=input_ids.device)
    entropies = torch.zeros_like(log_probs)
    for numbers, layout in backbone.passes(encoded):
        reads, logits = token_logits(model, [encoded[number] for number in numbers], layout)
        table = (logits.float() / temperature).log_softmax(-1)
        at = [(row, place) for number in numbers for row in members[number] for place in range(len(answers[row]))]
        where = tuple(torch.tensor(at, device=table.device).unbind(1))
        source = torch.tensor([place for read in reads for place in read], device=table.device)
        log_probs = log_probs.index_put(where, table[source, input_ids[where[0], where[1] - width]])
        with torch.no_grad():
            entropy = -(table.exp() * table.masked_fill(table.isneginf(), 0.0)).sum(-1)
            entropies = entropies.index_put(where, entropy[source])
    return log_probs, entropies
