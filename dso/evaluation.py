"""Running a decision set through the base and the steered model: policies, answer mass and KL.

Base and steered passes alternate over chunks of decisions, so that the base's next-token distributions need not be
kept; where a set is measured again and again (validation during training) they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dso.backbone import Backbone
from dso.decisions import DecisionSet
from dso.scoring import Scores
from dso.steering import Handle

CHUNK = 240


@dataclass(frozen=True, slots=True)
class Measurement:
    """A decision set at one scale.

    Attributes:
        policy: (N, K) probabilities over the candidates, 0 where there is none.
        answer_mass: (N,) probability that the candidates hold together.
        kl: (N,) KL(pi_s || pi_0) in nats of the next-token distribution after the prompt.
    """

    policy: np.ndarray
    answer_mass: np.ndarray
    kl: np.ndarray


class Evaluator:
    """Measures one decision set under a steering at any scale.

    Args:
        backbone: the model that ``handle`` is attached to.
        decisions: what to decide.
        handle: the steering; None measures the base model only.
        keep_reference: keep the base's distributions in memory (4 bytes x vocabulary a decision).
        length_normalised: see :meth:`dso.scoring.Scores.policy`.
        progress: called with the number of forward-passed decisions after each chunk.
    """

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        handle: Handle | None = None,
        *,
        keep_reference: bool = False,
        length_normalised: bool = False,
        progress: Callable[[int], None] | None = None,
    ):
        self.backbone = backbone
        self.decisions = decisions
        self.handle = handle
        self.length_normalised = length_normalised
        self.progress = progress
        order = sorted(range(len(decisions)), key=lambda i: backbone.encode(decisions[i]).prompt)
        self._chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
        self._kept: dict[int, Scores] | None = {} if keep_reference else None

    def measure(self, scale: float = 1.0) -> Measurement:
        """The set at one scale."""
        return self.curve([scale])[0]

    @torch.no_grad()
    def curve(self, scales: Sequence[float]) -> list[Measurement]:
        """The set at each of several scales; the handle's scale is the same afterwards as before."""
        if self.handle is None and any(scales):
            raise ValueError(f"scales {list(scales)} need a steering; without one there is only scale 0")
        before = self.handle.scale if self.handle else None
        collected: list[list[tuple[Tensor, ...]]] = [[] for _ in scales]
        try:
            for number, chunk in enumerate(self._chunks):
                base = self._base(number, chunk)
                for place, scale in enumerate(scales):
                    scores = base if scale == 0 else self._scores(chunk, scale)
                    kl = (scores.next_token.exp() * (scores.next_token - base.next_token)).sum(-1)
                    collected[place].append((scores.policy(self.length_normalised).exp(), scores.answer_mass(), kl))
        finally:
            if self.handle is not None:
                self.handle.scale = before
        back = np.argsort([index for chunk in self._chunks for index in chunk])
        return [Measurement(*(torch.cat(parts).cpu().numpy()[back] for parts in zip(*rows, strict=True))) for rows in collected]

    def _base(self, number: int, chunk: Sequence[int]) -> Scores:
        if self._kept is None:
            return self._scores(chunk, 0.0)
        if number not in self._kept:
            self._kept[number] = self._scores(chunk, 0.0)
        return self._kept[number]

    def _scores(self, chunk: Sequence[int], scale: float) -> Scores:
        if self.handle is not None:
            self.handle.scale = scale
        scores = self.backbone.score([self.decisions[i] for i in chunk], next_token=True)
        # Every chunk has to have the set's K columns for the parts to be joined.
        missing = max(len(d.candidates) for d in self.decisions) - scores.log_probs.shape[1]
        if missing:
            log_probs = torch.nn.functional.pad(scores.log_probs, (0, missing), value=-torch.inf)
            lengths = torch.nn.functional.pad(scores.lengths, (0, missing), value=1)
            scores = Scores(log_probs, lengths, scores.next_token)
        if self.progress is not None:
            self.progress(len(chunk))
        return scores
