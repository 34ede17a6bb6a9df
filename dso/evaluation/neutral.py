"""What a steering does where nothing should move: the next token after neutral texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dso.errors import UserError
from dso.evaluation.benchmarks.figures import estimate_of, jackknife
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.intervals import Estimate
from dso.evaluation.twoway import Array
from dso.files import as_path
from dso.models.backbone import Backbone
from dso.models.scores import kl_divergence
from dso.steering.handle import Turnable, unsteered

SHIPPED = Path(__file__).with_name("neutral.txt")
ANCHORS = Path(__file__).with_name("anchors.txt")


class NeutralTexts:
    """Beginnings of sentences that are about no one, and how far a steered model goes on differently.

    Args:
        backbone: the model, with whatever steering is attached to it.
        texts: N of them.
    """

    def __init__(self, backbone: Backbone, texts: Sequence[str]):
        self.backbone = backbone
        self.texts = tuple(texts)
        self._base: torch.Tensor | None = None
        self._plain: tuple[Array, Array] | None = None

    @torch.no_grad()
    def kl(self, *more: Turnable) -> float:
        """Mean KL(steered || base) in nats of the next token after each text, with the operators as they are now.

        Args:
            more: of :func:`dso.steering.handle.unsteered`.
        """
        if self._base is None:
            with unsteered(self.backbone.model, *more):
                self._base = self.backbone.next_token(self.texts)
        return float(kl_divergence(self.backbone.next_token(self.texts), self._base).mean())

    def perplexity(self, *more: Turnable) -> Estimate:
        """The relative change of the perplexity by the operators as they are now; the texts are its units.

        Args:
            more: of :func:`dso.steering.handle.unsteered`.
        """
        if self._plain is None:
            with unsteered(self.backbone.model, *more):
                self._plain = Probe(self.backbone).likelihoods(self.texts)
        before, tokens = self._plain
        after = Probe(self.backbone).likelihoods(self.texts)[0]
        sums = np.stack([before - after, tokens], axis=1)
        return estimate_of(jackknife(sums, lambda s: np.expm1(s[..., 0] / s[..., 1])))


def neutral_texts(path: str | None = None) -> list[str]:
    """The texts of a file, one a line, or those that ship with the package.

    Raises:
        UserError: if the file cannot be read, or has no text in it.
    """
    return _lines(SHIPPED if path is None else as_path(path), "neutral texts")


def anchor_texts(path: str | None) -> list[str]:
    """Whole texts that training leaves as likely as they are: of a file, one a line, or ``shipped`` with the package.

    Without a path there are none. ``\\n`` in a line stands for a line break. None of them is a neutral text, so that
    those measure what training was not told of.

    Raises:
        UserError: if the file cannot be read, or has no text in it.
    """
    if path is None:
        return []
    lines = _lines(ANCHORS if path == "shipped" else as_path(path), "anchor texts")
    return [line.replace("\\n", "\n") for line in lines]


def _lines(place: Path, what: str) -> list[str]:
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: {what} cannot be read: {error}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise UserError(f"{place}: has no {what}; write one a line")
    return texts
