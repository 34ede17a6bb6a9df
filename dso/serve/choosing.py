"""The next token of each row: the likeliest one, or one that is drawn.

A row draws one number a token from a generator of its own, and takes the token at which the cumulative probability
passes it. So what is drawn depends on the row's seed and logits, and not on who is written beside it. Log-probabilities
are the steered model's own, before temperature and nucleus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a row's tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the likeliest tokens that together have this probability (nucleus sampling, Holtzman et al.
            2020).
        seed: the same seed draws the same; None draws anew each time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> torch.Generator:
        """A generator that starts at the seed."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(logits: Tensor, how: Sequence[Sampling], generators: Sequence[torch.Generator]) -> list[int]:
    """One token for each of B rows of logits (B, V)."""
    chosen = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(how) if sampling.temperature > 0]
    if drawn:
        temperatures = torch.tensor([[how[row].temperature] for row in drawn], dtype=torch.float64)
        shares = torch.tensor([[how[row].top_p] for row in drawn], dtype=torch.float64)
        numbers = torch.stack([torch.rand(1, generator=generators[row], dtype=torch.float64) for row in drawn])
        device = logits.device
        raw = logits[drawn].double()
        # The largest is 0 before it is divided, so that a small temperature gives no infinity.
        probabilities = ((raw - raw.amax(-1, keepdim=True)) / temperatures.to(device)).softmax(-1)
        if bool((shares < 1).any()):
            probabilities = nucleus(probabilities, shares.to(device))
        total = probabilities.cumsum(-1)
        places = torch.searchsorted(total, numbers.to(device) * total[:, -1:], right=True)
        chosen[drawn] = places[:, 0].clamp(max=logits.shape[-1] - 1)
    return chosen.tolist()


def nucleus(probabilities: Tensor, shares: Tensor) -> Tensor:
    """Probabilities (B, V) with 0 for what is not among the likeliest that reach a share (B, 1); the first one is."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ranked.cumsum(-1) - ranked >= shares
    outside[:, 0] = False
    return torch.zeros_like(probabilities).scatter(-1, order, ranked.masked_fill(outside, 0.0))


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token with its log-probability, None for a prompt's first, and the likeliest tokens in its place."""

    token: int
    log_prob: float | None
    likeliest: tuple[tuple[int, float], ...] = ()


def token_scores(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenScore]:
    """Of tokens at n places with logits (n, V), each with the ``count`` likeliest in its place."""
    table = logits.log_softmax(-1)
    own = table.gather(1, torch.tensor(tokens, device=table.device)[:, None])[:, 0].tolist()
    if not count:
        return [TokenScore(token, value) for token, value in zip(tokens, own, strict=True)]
    values, ids = (part.tolist() for part in table.topk(count, dim=-1))
    return [
        TokenScore(token, value, tuple(zip(best, theirs, strict=True)))
        for token, value, best, theirs in zip(tokens, own, ids, values, strict=True)
    ]
