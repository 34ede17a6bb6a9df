"""Keys and values of prompts that were read, for prompts that begin alike.

They belong to the scale at which they were made: a prompt at another scale shares nothing.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from dso.models.tokens import common_prefix

States = list[tuple[Tensor, ...]]  # keys and values (1, H, P, D), by layer
ROOM = 500_000_000  # bytes
SHORTEST = 16  # tokens below which reading them again in a group costs less


class Prefixes:
    """The prompts that were read last.

    Args:
        room: bytes of keys and values that are kept.
    """

    def __init__(self, room: int = ROOM):
        self._room = room
        self._size = 0
        self._kept: OrderedDict[tuple[float, tuple[int, ...]], States] = OrderedDict()

    def find(self, prompt: tuple[int, ...], scale: float) -> States | None:
        """What is known of a prompt's beginning, all but its last token at most."""
        best, length = None, SHORTEST - 1
        for key in self._kept:
            if key[0] == scale and (shared := min(common_prefix(key[1], prompt), len(prompt) - 1)) > length:
                best, length = key, shared
        if best is None:
            return None
        self._kept.move_to_end(best)
        return [tuple(part[:, :, :length] for part in layer) for layer in self._kept[best]]

    def keep(self, prompt: tuple[int, ...], scale: float, states: States) -> None:
        """Keep the states of a whole prompt; those that were used longest ago make room."""
        size = sum(part.nbytes for layer in states for part in layer)
        if len(prompt) <= SHORTEST or size > self._room or (scale, prompt) in self._kept:
            return
        # Copies, as a slice would keep the whole batch alive that it was read in.
        self._kept[scale, prompt] = [tuple(part.clone() for part in layer) for layer in states]
        self._size += size
        while self._size > self._room:
            _, oldest = self._kept.popitem(last=False)
            self._size -= sum(part.nbytes for layer in oldest for part in layer)
