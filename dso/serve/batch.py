"""Rows that are written side by side: one pass of the model gives every row its next token.

Each row has a scale of its own. Rows join at any time and leave at any time, so that a place is free the moment its row
has ended. A row is padded on the left, its positions count its own tokens only, and no other row sees it; so its
logits are those that it would get alone, but for the rounding of floating point.

Every layer keeps the keys and values of all tokens, also where the model looks back through a window only: the window
is in the mask, and as a row's tokens stand side by side, its width in columns is its width in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.forward import takes
from dso.steering.handle import Handle

Tokens = Sequence[int]
States = list[tuple[Tensor, Tensor]]


class Batch:
    """The rows that are being written.

    Args:
        backbone: the model.
        handle: the steering on it; nobody else may turn it while there are rows.
    """

    def __init__(self, backbone: Backbone, handle: Handle):
        self.model = backbone.model
        self.device = backbone.device
        self.handle = handle
        self.alone = backbone.company != "any" or not keeps_only_states(self.model)
        self._forbidden = backbone.vision.forbidden if backbone.vision else []
        self._empty()

    def _empty(self) -> None:
        self._scales: list[float] = []
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)

    def __len__(self) -> int:
        return len(self._scales)

    @torch.no_grad()
    def join(self, prompts: Sequence[Tokens], scales: Sequence[float], read: int = 1) -> Tensor:
        """Take rows in, behind those that are there.

        Args:
            prompts: token ids, none empty.
            scales: of each.
            read: logits that are wanted, of the last so many tokens.

        Returns:
            (n, read, V) float32 logits behind the prompts' last tokens.
        """
        if self.alone and len(self) + len(prompts) > 1:
            raise ValueError("this model writes one row at a time")
        different = list(dict.fromkeys(zip(map(tuple, prompts), scales, strict=True)))
        number = {row: place for place, row in enumerate(different)}
        copies = [number[tuple(prompt), scale] for prompt, scale in zip(prompts, scales, strict=True)]
        longest = max(map(len, prompts))
        ids = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt, _ in different])
        mask = torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt, _ in different])
        mask = mask.to(self.device)
        cache = None if self.alone else new_cache([])
        logits, cache = self._pass(ids.to(self.device), mask, cache, [scale for _, scale in different], read)
        self._add(cache, mask, copies)
        self._scales += scales
        return logits[copies]

    def _add(self, cache: Any, mask: Tensor, copies: list[int]) -> None:
        """Put the states of new rows behind those of the old ones, all padded to one length."""
        if self.alone:
            self._cache, self._mask = cache, mask
            return
        index = torch.tensor(copies, device=self.device)
        new = [tuple(part[index] for part in layer) for layer in states_of(cache)]
        mask = mask[index]
        if len(self):
            length = max(self._mask.shape[1], mask.shape[1])
            old = states_of(self._cache)
            new = [
                tuple(torch.cat([_longer(part, length, -2) for part in pair]) for pair in zip(*layers, strict=True))
                for layers in zip(old, new, strict=True)
            ]
            mask = torch.cat([_longer(self._mask, length, -1), _longer(mask, length, -1)])
        self._cache, self._mask = new_cache(new), mask

    @torch.no_grad()
    def step(self, tokens: Tokens) -> Tensor:
        """Go on with one token in each row.

        Returns:
            (B, V) float32 logits behind them.
        """
        ids = torch.tensor(tokens, device=self.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        logits, self._cache = self._pass(ids, self._mask, self._cache, self._scales, 1)
        return logits[:, 0]

    def keep(self, rows: Sequence[int]) -> None:
        """Let all rows leave but these, which keep their order."""
        if len(rows) == len(self):
            return
        if not rows:
            self._empty()
            return
        index = torch.tensor(rows, device=self.device)
        mask = self._mask[index]
        start = int(mask.argmax(1).min())  # columns before it are padding in every row that stays
        states = [tuple(part[index, :, start:] for part in layer) for layer in states_of(self._cache)]
        self._cache, self._mask = new_cache(states), mask[:, start:]
        self._scales = [self._scales[row] for row in rows]

    def _pass(self, ids: Tensor, mask: Tensor, cache: Any, scales: Sequence[float], read: int) -> tuple[Tensor, Any]:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        forward = type(self.model).forward
        if takes(forward, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if takes(forward, "logits_to_keep"):
            inputs["logits_to_keep"] = read
        self.handle.scale = torch.tensor(scales) if len(set(scales)) > 1 else scales[0]
        output = self.model(**inputs)
        logits = output.logits[:, -read:].float()
        if self._forbidden:
            logits[..., self._forbidden] = -torch.inf
        return logits, output.past_key_values


def keeps_only_states(model: Any) -> bool:
    """Whether all that a model keeps of earlier tokens is their keys and values.

    Raises:
        UserError: if it keeps nothing of the kind.
    """
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    ids = torch.tensor([[1]], device=next(model.get_input_embeddings().parameters()).device)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    if not isinstance(getattr(output, "past_key_values", None), Cache):
        raise UserError(f"{type(model).__name__} cannot be served: it has no cache of keys and values to go on from")
    layers = DynamicCache(config=model.config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def new_cache(states: Sequence[tuple[Tensor, ...]]) -> Any:
    """A cache of keys and values (B, H, L, D), by layer."""
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(states):
        cache.update(keys, values, number)
    return cache


def states_of(cache: Any) -> list[tuple[Tensor, ...]]:
    """Keys and values (B, H, L, D), by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _longer(part: Tensor, length: int, axis: int) -> Tensor:
    """A tensor filled up with zeros in front, along its last axis or the one before."""
    missing = length - part.shape[axis]
    return pad(part, (missing, 0) if axis == -1 else (0, 0, missing, 0))
