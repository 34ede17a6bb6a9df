"""What a benchmark asks of a model, as the model is now: likelihoods of texts, scores of answers, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dso.decisions.decision import Candidate, Decision
from dso.evaluation.twoway import Array
from dso.models.backbone import Backbone
from dso.models.prompts import Prompt

CHUNK = 120
Asked = tuple[Prompt, Sequence[str]]  # a prompt and the answers to it


class Probe:
    """A backbone as benchmarks see it.

    Args:
        backbone: the model, with whatever is attached to it.
        progress: called with the number of prompts or texts that were done.
        rewrite: what asks another question in a question's place.
    """

    def __init__(
        self,
        backbone: Backbone,
        progress: Callable[[int], None] | None = None,
        rewrite: Callable[[Decision], Decision] | None = None,
    ):
        self.backbone = backbone
        self.progress = progress or (lambda _: None)
        self.rewrite = rewrite or (lambda decision: decision)

    @torch.no_grad()
    def scores(self, asked: Sequence[Asked]) -> tuple[Array, Array]:
        """log p(answer | prompt), summed over the answer's tokens, and the numbers of tokens.

        Returns:
            (N, K) each; -inf and 1 where a prompt has fewer than K answers.
        """
        width = max((len(answers) for _, answers in asked), default=0)
        scores, lengths = np.full((len(asked), width), -np.inf), np.ones((len(asked), width))
        order = sorted(
            range(len(asked)), key=lambda place: str(asked[place][0])
        )  # prompts that begin alike side by side
        for start in range(0, len(order), CHUNK):
            places = order[start : start + CHUNK]
            decisions = [self.rewrite(_decision(str(place), *asked[place])) for place in places]
            found = self.backbone.score(decisions, keep=False)
            scores[places, : found.log_probs.shape[1]] = found.log_probs.double().cpu().numpy()
            lengths[places, : found.lengths.shape[1]] = found.lengths.cpu().numpy()
            self.progress(len(places))
        return scores, lengths

    @torch.no_grad()
    def likelihoods(self, texts: Sequence[str], start: bool = True) -> tuple[Array, Array]:
        """log p(text), summed over its tokens, and how many these are, (N,) each.

        Args:
            start: as lm-evaluation-harness has it: every token counts, the first one behind the token that begins a
                text. Without it the first token only stands before the others.
        """
        sums, lengths = np.zeros(len(texts)), np.zeros(len(texts))
        for begin in range(0, len(texts), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            found = self.backbone.likelihood(texts[chunk], start)
            sums[chunk] = found.log_probs[:, 0].double().cpu().numpy()
            lengths[chunk] = found.lengths[:, 0].cpu().numpy()
            self.progress(len(texts[chunk]))
        return sums, lengths

    @torch.no_grad()
    def embeddings(self, words: Sequence[str]) -> NDArray[np.float64]:
        """(N, d) input embeddings of words inside a text; of a word of several tokens the mean."""
        table = self.backbone.model.get_input_embeddings()
        tokenizer, device = self.backbone.tokenizer, self.backbone.device
        rows = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
        found = [table(torch.tensor([row], device=device))[0].mean(0).double().cpu().numpy() for row in rows]
        self.progress(len(words))
        return np.stack(found)


def _decision(name: str, prompt: Prompt, answers: Sequence[str]) -> Decision:
    candidates = tuple(Candidate(text=text, group=str(place)) for place, text in enumerate(answers))
    said = prompt if isinstance(prompt, str) else tuple(prompt)
    return Decision(id=name, context="benchmark", kind="ambiguous", prompt=said, candidates=candidates)
