"""Steps measured in KL instead of coefficients: a diagonal Fisher preconditioner (ours).

Operators sit at activations whose coordinates matter very unequally: a few outlier dimensions move the whole next-token
distribution. For small changes KL(pi_{x + d} || pi_x) = 1/2 d^T F d with the Fisher information of the next-token
distribution after the prompt (Amari 1998),

    F_i = E_x E_{y ~ p(.|x)} (d log p(y | x) / d x_i)^2

so the optimiser works on whitened coefficients z with x = D z, D_i = (F_i / mean F + damping)^(-1/2), where each
coordinate's step costs about the same KL. D is scaled so that a step of equal size in every z costs the KL of one of
equal size in every x: learning rates keep their meaning. F is estimated once, at the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Share:
    """Which of a batch's prompts are at hand, where a batch is divided among processes that share a seed.

    Attributes:
        rows: (n,) their places in the batch.
        count: N, prompts of the whole batch.
        add: adds up a tensor over the processes.
    """

    rows: Tensor
    count: int
    add: Callable[[Tensor], Tensor]

    def draw(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) tokens and signs: for each prompt those that :func:`draw` gives it in the whole batch."""
        # What torch.multinomial does for one draw a row (exponential races), with noise for all rows.
        noise = log_probs.new_empty(self.count, log_probs.shape[1]).exponential_()
        probabilities = torch.distributions.Categorical(logits=log_probs).probs
        tokens = (probabilities / noise[self.rows]).argmax(-1)
        return tokens, _signs(self.count, log_probs.device)[self.rows]


def draw(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """A token from each of N distributions (N, V), and random signs."""
    tokens = torch.distributions.Categorical(logits=log_probs).sample()
    return tokens, _signs(len(log_probs), log_probs.device)


def _signs(count: int, device: torch.device) -> Tensor:
    return torch.randint(0, 2, (count,), device=device) * 2 - 1


def fisher_diagonal(
    log_probs: Callable[[], Iterable[Tensor | tuple[Tensor, Share]]], parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Estimate the diagonal of F.

    Each batch of N prompts gives one draw: with tokens y_n from the model and random signs e_n, the squared gradient of
    ``sum_n e_n log p(y_n | x_n) / sqrt(N)`` has the mean of the squared gradients of the N prompts as its expectation.

    Args:
        log_probs: yields (N, V) log-probabilities with gradient, a batch at a time; or (n, V) with the
            :class:`Share` of a batch that they are.
        parameters: the coefficients.

    Returns:
        one tensor a parameter, of its shape.
    """
    total = [torch.zeros_like(p) for p in parameters]
    draws = 0
    for batch in log_probs():
        table, share = batch if isinstance(batch, tuple) else (batch, None)
        tokens, signs = draw(table.detach()) if share is None else share.draw(table.detach())
        count = len(table) if share is None else share.count
        drawn = (signs * table.gather(1, tokens[:, None])[:, 0]).sum() / count**0.5
        gradients = torch.autograd.grad(drawn, list(parameters), allow_unused=True)
        found = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]
        if share is not None:
            whole = share.add(torch.cat([g.flatten() for g in found]))
            found = [part.view(p.shape) for part, p in zip(whole.split([p.numel() for p in found]), found, strict=True)]
        for place, gradient in enumerate(found):
            total[place] += gradient.square()
        draws += 1
    if not draws:
        raise ValueError("no batches to estimate the Fisher information from")
    return [value / draws for value in total]


def whitening(fisher: Sequence[Tensor], damping: float) -> list[Tensor]:
    """D of the module's docstring; ones for a tensor that the distribution does not depend on yet."""
    mean = torch.cat([f.flatten() for f in fisher]).mean()
    if not mean > 0:
        return [torch.ones_like(f) for f in fisher]
    sizes = [(f / mean + damping).rsqrt() if bool(f.any()) else torch.ones_like(f) for f in fisher]
    nothing = fisher[0].new_zeros(())
    plain = sum((f.sum() for f in fisher), nothing)
    whitened = sum(((f * d.square()).sum() for f, d in zip(fisher, sizes, strict=True)), nothing)
    return [d * (plain / whitened).sqrt() for d in sizes]


def whitened_step(step: Callable[[], object], parameters: Sequence[Tensor], sizes: Sequence[Tensor]) -> None:
    """``step``, that of any optimiser, on z = x / D, carried over to x."""
    before = [p.detach().clone() for p in parameters]
    for parameter, size in zip(parameters, sizes, strict=True):
        if parameter.grad is not None:
            parameter.grad.mul_(size)
    step()
    with torch.no_grad():
        for parameter, old, size in zip(parameters, before, sizes, strict=True):
            parameter.copy_(old + size * (parameter - old))
