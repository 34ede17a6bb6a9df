"""Tokens as text while they are being written: characters of several tokens, and texts at which a row ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TAIL = 6  # tokens of the prompt that decide whether the first word begins with a blank
HALF = "\ufffd"  # what a tokenizer writes for the bytes of an unfinished character
OPEN = 3  # bytes of a character that is not finished, at most


class TextWriter:
    """The text of one row, piece by piece.

    Args:
        tokenizer: of the model.
        prompt: its tokens.
        stops: texts at which the row ends; they are left out.

    Attributes:
        stopped: whether one of them was met.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-TAIL:])
        self._start = 0  # where decoding begins; what comes before is finished
        self._clean = len(self._tokens)  # where it may begin next
        self._out = len(self._decode(self._tokens))  # characters that are out, or held back
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that a further token brings; "" where more is needed to know it."""
        self._tokens.append(token)
        return self._through_stops(self._decoded(final=False), final=False)

    def end(self) -> str:
        """What was held back."""
        return self._through_stops(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        """The characters that no further token can change, and that are not out yet."""
        whole = self._decode(self._tokens[self._start :])
        unfinished = len(whole) - len(whole.rstrip(HALF))
        settled = len(whole) - (0 if final else min(unfinished, OPEN))
        piece = whole[self._out : settled]
        self._out = max(self._out, settled)
        if not unfinished:  # decoding goes on from the tokens before these, as a first word may lose its blank
            self._start, self._clean = self._clean, len(self._tokens)
            self._out = len(self._decode(self._tokens[self._start :]))
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _through_stops(self, piece: str, final: bool) -> str:
        """The piece up to the first stop, without an end that may turn out to begin one."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0 if final else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
