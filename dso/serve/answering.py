"""What the server says to a request: the JSON of OpenAI's completions and chat completions, whole or piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from dso.serve.asking import Asked
from dso.serve.choosing import TokenScore
from dso.serve.engine import Piece
from dso.serve.text import HALF


class Answer:
    """The answer to one request while it is being written.

    Args:
        asked: the request.
        model: what the server calls the steered model.
        tokenizer: of the model.
    """

    def __init__(self, asked: Asked, model: str, tokenizer: Any):
        self._asked = asked
        self._tokenizer = tokenizer
        self._texts = [""] * len(asked.jobs)
        self._scores: list[list[TokenScore]] = [[] for _ in asked.jobs]
        self._finish: list[str | None] = [None] * len(asked.jobs)
        self._offsets = [0] * len(asked.jobs)
        self._told = [False] * len(asked.jobs)
        self.written = 0
        self._head = {
            "id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def prompt_tokens(self) -> int:
        """Of all different prompts."""
        return sum(map(len, {job.prompt: job.prompt for job in self._asked.jobs}))

    @property
    def ended(self) -> bool:
        """Whether every answer is whole."""
        return None not in self._finish

    def add(self, number: int, piece: Piece) -> None:
        """Take in what a row tells."""
        self._texts[number] += piece.text
        self._scores[number] += piece.scores
        self._finish[number] = piece.finish
        self.written += len(piece.tokens)

    def whole(self) -> dict[str, Any]:
        """All of it."""
        choices = [self._choice(number, "message") for number in range(len(self._texts))]
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return self._head | {"object": kind, "choices": choices, "usage": self._usage()}

    def chunk(self, number: int) -> dict[str, Any] | None:
        """What one answer brought since its last chunk; None if that is nothing."""
        if not (self._texts[number] or self._scores[number] or self._finish[number]):
            return None
        made = self._chunk([self._choice(number, "delta")])
        self._texts[number], self._scores[number] = "", []
        return made

    def last_chunk(self) -> dict[str, Any] | None:
        """The counts of tokens, if they were asked for."""
        return self._chunk([]) | {"usage": self._usage()} if self._asked.usage else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._asked.chat else "text_completion"
        return self._head | {"object": kind, "choices": choices}

    def _usage(self) -> dict[str, int]:
        prompt = self.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self.written, "total_tokens": prompt + self.written}

    def _choice(self, number: int, message: str) -> dict[str, Any]:
        text, scores = self._texts[number], self._scores[number]
        wanted = self._asked.jobs[number].likeliest is not None
        choice: dict[str, Any] = {"index": number, "finish_reason": self._finish[number], "logprobs": None}
        first = not self._told[number]
        self._told[number] = True
        if self._asked.chat:
            role = {"role": "assistant"} if first else {}
            choice[message] = role | {"content": text}
            if wanted:
                choice["logprobs"] = {"content": [self._chat_score(score) for score in scores]}
            return choice
        choice["text"] = self._asked.echo[number] + text if self._asked.echo and first else text
        if wanted:
            choice["logprobs"] = self._scores_of(number, scores)
        return choice

    def _scores_of(self, number: int, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """Log-probabilities in the shape of completions."""
        tokens = [self._token(score.token) for score in scores]
        offsets = []
        for score in scores:
            offsets.append(self._offsets[number])
            self._offsets[number] += len(self._token_text(score.token))
        tops = [{self._token(token): value for token, value in score.likeliest} or None for score in scores]
        return {
            "tokens": tokens,
            "token_logprobs": [score.log_prob for score in scores],
            "top_logprobs": tops if any(tops) else None,
            "text_offset": offsets,
        }

    def _chat_score(self, score: TokenScore) -> dict[str, Any]:
        """Log-probabilities in the shape of chats."""
        tops = [self._entry(token, value) for token, value in score.likeliest]
        return self._entry(score.token, score.log_prob) | {"top_logprobs": tops}

    def _entry(self, token: int, log_prob: float | None) -> dict[str, Any]:
        text = self._token_text(token)
        known = None if HALF in text else list(text.encode())
        return {"token": self._token(token), "logprob": log_prob, "bytes": known}

    def _token_text(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        piece = self._tokenizer.convert_ids_to_tokens(token)
        return f" {text}" if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" ") else text

    def _token(self, token: int) -> str:
        """What log-probabilities call a token: its text, or the vocabulary's word where it is no whole character."""
        if self._asked.token_ids:
            return f"token_id:{token}"
        text = self._token_text(token)
        return text if text and HALF not in text else str(self._tokenizer.convert_ids_to_tokens(token))
