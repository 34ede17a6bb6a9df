"""Rows that are written side by side: one pass of the model gives every row its next token.

Each row has a scale of its own. Rows join at any time and leave at any time, so that a place is free the moment its row
has ended. A row is padded on the left, its positions count its own tokens only, and no other row sees it; so its logits
are those that it would get alone, but for the rounding of floating point.

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
from dso.serve.prefixes import Prefixes, States
from dso.steering.handle import Handle
from dso.steering.hooks import say

Tokens = Sequence[int]
Asked = tuple[tuple[int, ...], float]  # a prompt and its scale


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
        handle.scale = 0.0  # what is found out about the model is the base model's
        self.alone = backbone.company != "any" or not keeps_only_states(self.model)
        self._prefixes = Prefixes()
        self._turned: tuple[Tensor | None, tuple[float, ...]] = (None, ())
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
        logits = self._join_alone(different[0], read) if self.alone else self._join(different, copies, read)
        self._scales += scales
        return logits[copies]

    def _join_alone(self, row: Asked, read: int) -> Tensor:
        ids = torch.tensor([row[0]], device=self.device)
        self._mask = torch.ones_like(ids)
        logits, self._cache = self._pass(ids, self._mask, None, [row[1]], range(len(row[0]) - read, len(row[0])))
        return logits

    def _join(self, different: Sequence[Asked], copies: Sequence[int], read: int) -> Tensor:
        """Read different prompts, and put their states behind those of the old rows, all padded to one length."""
        found = self._read(different, read)
        rows = [states_of(self._cache)] if len(self) else []
        rows += [found[copy][1] for copy in copies]
        masks = [self._mask] if len(self) else []
        masks += [torch.ones(1, len(different[copy][0]), dtype=torch.long, device=self.device) for copy in copies]
        self._cache = new_cache(side_by_side(rows))
        length = max(mask.shape[1] for mask in masks)
        self._mask = torch.cat([pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        return torch.cat([logits for logits, _ in found])

    def _read(self, different: Sequence[Asked], read: int) -> list[tuple[Tensor, States]]:
        """Logits (1, read, V) and states of each prompt, whose beginning is not read again where it is known.

        Prompts with such a beginning have a pass of their own, as they are shorter then.
        """
        known = [self._prefixes.find(*row) if read == 1 else None for row in different]
        found: dict[int, tuple[Tensor, States]] = {}
        for some in (
            [n for n, states in enumerate(known) if not states],
            [n for n, states in enumerate(known) if states],
        ):
            if some:
                made = self._read_together([different[n] for n in some], [known[n] for n in some], read)
                found |= dict(zip(some, made, strict=True))
        for number, row in enumerate(different):
            self._prefixes.keep(*row, found[number][1])
        return [found[number] for number in range(len(different))]

    def _read_together(
        self, rows: Sequence[Asked], known: Sequence[States | None], read: int
    ) -> list[tuple[Tensor, States]]:
        """One pass over what is new in each prompt: beginnings are padded on the left, the rest on the right."""
        sizes = [states[0][0].shape[2] if states else 0 for states in known]
        rests = [prompt[size:] for (prompt, _), size in zip(rows, sizes, strict=True)]
        start, longest = max(sizes), max(map(len, rests))
        ids = torch.tensor([[*rest, *[0] * (longest - len(rest))] for rest in rests], device=self.device)
        before = torch.tensor([[*[0] * (start - size), *[1] * size] for size in sizes], dtype=torch.long)
        behind = torch.tensor([[*[1] * len(rest), *[0] * (longest - len(rest))] for rest in rests])
        mask = torch.cat([before, behind], dim=1).to(self.device)
        columns = [range(len(rest) - read, len(rest)) for rest in rests]
        keep = sorted({column for own in columns for column in own})
        cache = new_cache(side_by_side([states for states in known if states]))
        logits, cache = self._pass(ids, mask, cache, [scale for _, scale in rows], keep)
        made = []
        for row, (size, rest) in enumerate(zip(sizes, rests, strict=True)):
            own = [
                tuple(p[row : row + 1, :, start - size : start + len(rest)] for p in layer)
                for layer in states_of(cache)
            ]
            made.append((logits[row : row + 1, [keep.index(column) for column in columns[row]]], own))
        return made

    @torch.no_grad()
    def step(self, tokens: Tokens) -> Tensor:
        """Go on with one token in each row.

        Returns:
            (B, V) float32 logits behind them.
        """
        ids = torch.tensor(tokens, device=self.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        logits, self._cache = self._pass(ids, self._mask, self._cache, self._scales, [0])
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

    def _pass(
        self, ids: Tensor, mask: Tensor, cache: Any, scales: Sequence[float], keep: Sequence[int]
    ) -> tuple[Tensor, Any]:
        """Logits (B, len(keep), V) at some columns of ids (B, L), and the cache with what they added."""
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
        forward = type(self.model).forward
        kept = torch.tensor(list(keep), device=self.device)
        if takes(forward, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if takes(forward, "logits_to_keep"):
            inputs["logits_to_keep"] = kept
        self._turn(scales)
        if cache is not None:
            say(cache, self.handle)
        output = self.model(**inputs)
        logits = output.logits.float()
        if logits.shape[1] != len(keep):  # an architecture that knows no logits_to_keep
            logits = logits[:, kept]
        if self._forbidden:
            logits[..., self._forbidden] = -torch.inf
        return logits, output.past_key_values

    def _turn(self, scales: Sequence[float]) -> None:
        """Set the handle, unless it stands there: what hooks compute for a scale they keep until it is set anew."""
        wanted = tuple(scales) if len(set(scales)) > 1 else (scales[0],)
        if self.handle.coefficient is not self._turned[0] or wanted != self._turned[1]:
            self.handle.scale = torch.tensor(wanted) if len(wanted) > 1 else wanted[0]
            self._turned = self.handle.coefficient, wanted


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


def states_of(cache: Any) -> States:
    """Keys and values (B, H, L, D), by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def side_by_side(rows: Sequence[States]) -> States:
    """States of several batches as those of one, padded with zeros on the left."""
    if not rows:
        return []
    length = max(states[0][0].shape[2] for states in rows)
    return [
        tuple(torch.cat([pad(p, (0, 0, length - p.shape[2], 0)) for p in parts]) for parts in zip(*layers, strict=True))
        for layers in zip(*rows, strict=True)
    ]
