"""What one step is given: pictures, and questions laid out so that a picture is computed once for all of them.

A row is a prefix (the first token and the picture) with branches, one a question with its answer. A branch attends to
the prefix and to itself, and its positions go on behind the prefix, so each is computed as if it stood alone.
Every scene is seen mirrored in half of the steps, with left and right exchanged in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dso.decisions.sets.drawing import draw
from tools.embedded_vlm.corpus import DESCRIBE, SIDES, example
from tools.embedded_vlm.model import IMAGE_TOKENS, MEAN, STD
from tools.embedded_vlm.sight import labels

PREFIX = 1 + IMAGE_TOKENS  # tokens before a question
IGNORED = -100
Ids = tuple[int, ...]
Branches = list[tuple[Ids, Ids]]


class Corpus:
    """The drawn corpus, with its questions as token ids.

    Args:
        scenes: how many.
        seed: of the examples.
        tokenizer: of the model.

    Attributes:
        labels: (N, 2, A) what people look like.
    """

    def __init__(self, scenes: int, seed: int, tokenizer: Any):
        examples = [example(number, seed) for number in range(scenes)]
        self._tokenizer, self._ids = tokenizer, {}
        self._pixels = np.stack([np.asarray(draw(e.scene)) for e in examples])
        self.labels = labels([e.scene for e in examples])
        self._roles = [[self._pair(*pair) for pair in e.roles] for e in examples]
        self._looks = [[self._pair(*pair) for pair in e.looks] for e in examples]
        self._captions = [self._pair(DESCRIBE, e.caption) for e in examples]
        self.sides = torch.tensor(self._words(" ".join(SIDES)))
        self._turn = np.arange(len(tokenizer))
        self._turn[self.sides] = self.sides.flip(0)
        self._mean, self._std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self._pixels)

    def _words(self, text: str) -> Ids:
        if text not in self._ids:
            self._ids[text] = tuple(self._tokenizer(text, add_special_tokens=False).input_ids)
        return self._ids[text]

    def _pair(self, question: str, answer: str) -> tuple[Ids, Ids]:
        return self._words(question), (*self._words(answer), self._tokenizer.eos_token_id)

    def pixels(self, rows: np.ndarray, mirrored: np.ndarray) -> Tensor:
        """(B, 3, S, S) pictures as the model's image processor makes them."""
        chosen = self._pixels[rows]
        chosen[mirrored] = chosen[mirrored, :, ::-1]
        return (torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255 - self._mean) / self._std

    def branches(
        self, rng: np.random.Generator, row: int, mirrored: bool, roles: int, looks: int, caption: bool
    ) -> Branches:
        """Some questions about a scene; with ``caption`` that instead of looks.

        Only then an answer's end is to be predicted too: that is soon learned.
        """
        picked = _some(rng, self._roles[row], roles)
        picked += [self._captions[row]] if caption else _some(rng, self._looks[row], looks)
        if not caption:
            picked = [(question, answer[:-1]) for question, answer in picked]
        if mirrored:
            picked = [tuple(tuple(self._turn[list(part)].tolist()) for part in pair) for pair in picked]
        return picked


def _some(rng: np.random.Generator, items: Sequence, count: int) -> list:
    return [items[index] for index in rng.permutation(len(items))[:count]]


def lay_out(branches: Sequence[Branches]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of a prefix and branches.

    Args:
        branches: of each of B rows, (question, answer) token ids.

    Returns:
        of T tokens behind the prefix: ids (B, T), targets (B, T) with :data:`IGNORED` where nothing is predicted,
        positions (B, PREFIX + T) and who attends to whom (B, 1, PREFIX + T, PREFIX + T), bool.
    """
    longest = max(sum(len(q) + len(a) - 1 for q, a in row) for row in branches)
    ids = np.zeros((len(branches), longest), dtype=np.int64)
    targets = np.full_like(ids, IGNORED)
    positions = np.tile(np.arange(PREFIX + longest), (len(branches), 1))
    owner = np.zeros_like(positions)  # 0 is the prefix
    owner[:, PREFIX:] = -1
    for number, row in enumerate(branches):
        place = 0
        for branch, (question, answer) in enumerate(row, 1):
            tokens = question + answer
            end = place + len(tokens) - 1
            ids[number, place:end] = tokens[:-1]
            targets[number, place + len(question) - 1 : end] = answer
            positions[number, PREFIX + place : PREFIX + end] = np.arange(PREFIX, PREFIX + len(tokens) - 1)
            owner[number, PREFIX + place : PREFIX + end] = branch
            place = end
    seen = (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
    seen &= np.tri(PREFIX + longest, dtype=bool)
    return tuple(torch.from_numpy(array) for array in (ids, targets, positions, seen[:, None]))


def answer_logits(model: Any, patches: Tensor, branches: Sequence[Branches]) -> tuple[Tensor, Tensor]:
    """Logits (M, V) and targets (M,) of all answers' tokens of a batch.

    Args:
        patches: (B, P, d) the tower's output for the pictures.
    """
    ids, targets, positions, mask = lay_out(branches)
    inner = model.model
    embed = inner.get_input_embeddings()
    start = embed(torch.full((len(ids), 1), model.config.get_text_config().bos_token_id))
    states = inner.language_model(
        inputs_embeds=torch.cat([start, inner.multi_modal_projector(patches), embed(ids)], dim=1),
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    asked = targets != IGNORED
    return model.lm_head(states[:, PREFIX:][asked]), targets[asked]
