"""The engine: one thread that owns the model, a queue, and the batch of rows that is being written.

Between two steps of the batch, rows that have ended or were given up leave it, and those that wait join it, first come,
first served. transformers' own continuous batching lays all requests into one row of tokens and shares cached blocks
by their tokens alone, so it can carry no scale of each row; hence this one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dso.models.backbone import Backbone
from dso.models.sampling import CACHE_BYTES, end_tokens, token_bytes
from dso.serve.batch import Batch
from dso.serve.choosing import Sampling, TokenScore, choose, token_scores
from dso.serve.text import TextWriter
from dso.steering.handle import Handle

log = logging.getLogger("dso.serve")
PREFILL = 4096  # tokens of prompts that join in one pass; a longer one joins by itself


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The engine was closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One answer that is asked for.

    Attributes:
        prompt: token ids, at least one.
        scale: of the steering.
        max_tokens: to be written; 0 with ``echo`` only.
        stops: texts that end the answer.
        likeliest: how many of the likeliest tokens are told at each place; None for no log-probabilities.
        echo: tell the prompt's log-probabilities too.
    """

    prompt: tuple[int, ...]
    scale: float
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    likeliest: int | None = None
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """What a row tells whoever asked.

    Attributes:
        text: that is new.
        tokens: that were written.
        scores: of them, and with ``echo`` first of the prompt's; none unless they were asked for.
        finish: why the row has ended: ``stop``, ``length`` or ``error``; None while it goes on.
        error: what went wrong.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    scores: tuple[TokenScore, ...] = ()
    finish: str | None = None
    error: Exception | None = None


class Row:
    """A job in the queue or in the batch."""

    def __init__(self, job: Job, tell: Callable[[Piece], None], tokenizer: Any):
        self.job = job
        self.tell = tell
        self.given_up = False
        self.last = job.prompt[-1]
        self.written = 0
        self.generator = job.sampling.generator()
        self.writer = TextWriter(tokenizer, job.prompt, job.stops)

    def take(self, token: int, score: Sequence[TokenScore], stop: Sequence[int]) -> Piece:
        """Go on with a token, and what is to be told of it."""
        self.last = token
        self.written += 1
        ended = token in stop
        text = "" if ended else self.writer.add(token)
        finish = "stop" if ended or self.writer.stopped else "length" if self.written >= self.job.max_tokens else None
        if finish:
            text += self.writer.end()
        return Piece(text, (token,), tuple(score), "stop" if self.writer.stopped else finish)


class Task:
    """Something else that needs the model."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function
        self.future: Future = Future()

    def run(self) -> None:
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.function())
            except Exception as error:  # noqa: BLE001  (whoever asked hears of it)
                self.future.set_exception(error)


class Engine:
    """Writes answers, many at a time.

    Args:
        backbone: the model.
        handle: the steering on it, which belongs to the engine until it is closed.
        max_rows: answers that are written side by side.
        max_queue: answers that may wait.
    """

    def __init__(self, backbone: Backbone, handle: Handle, *, max_rows: int = 32, max_queue: int = 512):
        self.backbone = backbone
        self.handle = handle
        self._batch = Batch(backbone, handle)
        self.max_rows = 1 if self._batch.alone else max_rows
        self.max_queue = max_queue
        self._stop = end_tokens(backbone)
        self._room = CACHE_BYTES // token_bytes(backbone.model)  # tokens whose keys and values may be kept
        self._rows: list[Row] = []
        self._waiting: deque[Row | Task] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="dso-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Answers and tasks in the queue."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def submit(self, jobs: Sequence[Job], tell: Callable[[int, Piece], None]) -> list[Row]:
        """Ask for answers; all of them are taken, or none.

        Args:
            tell: is called, in the engine's thread, with a job's number and what its row tells. The last piece has
                ``finish``.

        Raises:
            QueueFull, Closed: if they cannot be taken.
        """
        rows = [Row(job, partial(tell, number), self.backbone.tokenizer) for number, job in enumerate(jobs)]
        self._enter(rows)
        return rows

    def run(self, function: Callable[[], Any]) -> Future:
        """Call a function with the model at rest, in the engine's thread, after those that wait.

        It may turn the handle. Raises as :meth:`submit`.
        """
        task = Task(function)
        self._enter([task])
        return task.future

    def _enter(self, items: Sequence[Row | Task]) -> None:
        with self._changed:
            if self._closing:
                raise Closed
            if len(self._waiting) + len(items) > self.max_queue:
                raise QueueFull
            self._waiting.extend(items)
            self._changed.notify()

    def give_up(self, rows: Sequence[Row]) -> None:
        """Free the places of rows that nobody waits for any more."""
        with self._changed:
            for row in rows:
                row.given_up = True
            self._waiting = deque(item for item in self._waiting if not (isinstance(item, Row) and item.given_up))
            self._changed.notify()

    def close(self) -> None:
        """End the thread; whoever still waits is told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    # ------------------------------------------------------------ the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._rows or self._closing):
                    self._changed.wait()
                if self._closing:
                    break
            self._leave()
            try:
                self._admit()
                if self._rows:
                    self._step()
            except Exception as error:
                log.exception("a step failed; the answers in it are lost")
                self._fail(self._rows, error)
                self._leave()
        self._fail([*self._rows, *(item for item in self._waiting if isinstance(item, Row))], Closed())
        for item in self._waiting:
            if isinstance(item, Task):
                item.future.cancel()

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        for row in rows:
            self._tell(row, Piece(finish="error", error=error))

    def _leave(self) -> None:
        stay = [number for number, row in enumerate(self._rows) if not row.given_up]
        self._batch.keep(stay)
        self._rows = [self._rows[number] for number in stay]

    def _admit(self) -> None:
        """Let rows join that there is room for, and run the tasks between them."""
        joining: list[Row] = []
        while (item := self._next(joining)) is not None:
            if isinstance(item, Task):
                item.run()
            else:
                joining.append(item)
        if joining:
            self._join(joining)

    def _next(self, joining: Sequence[Row]) -> Row | Task | None:
        with self._changed:
            if not self._waiting:
                return None
            item = self._waiting[0]
            if isinstance(item, Row) and not self._fits(item, joining):
                return None
            return self._waiting.popleft()

    def _fits(self, row: Row, joining: Sequence[Row]) -> bool:
        there = [*self._rows, *joining]
        longest = max(len(other.job.prompt) + other.job.max_tokens for other in [*there, row])
        prompts = [len(other.job.prompt) for other in [*joining, row]]
        if joining and (row.job.echo or joining[0].job.echo or max(prompts) * len(prompts) > PREFILL):
            return False
        return not there or (len(there) < self.max_rows and longest * (len(there) + 1) <= self._room)

    def _join(self, rows: list[Row]) -> None:
        """Read the prompts of rows, and choose their first tokens."""
        read = len(rows[0].job.prompt) if rows[0].job.echo else 1
        try:
            logits = self._batch.join([row.job.prompt for row in rows], [row.job.scale for row in rows], read)
        except Exception as error:
            log.exception("prompts could not be read; those who run already go on")
            self._fail(rows, error)
            return
        self._rows += rows
        if rows[0].job.echo:
            self._tell_prompt(rows[0], logits[0])
        self._choose(rows, logits[:, -1])

    def _tell_prompt(self, row: Row, logits: Tensor) -> None:
        first, *rest = row.job.prompt
        scores: tuple[TokenScore, ...] = ()
        if row.job.likeliest is not None:
            scores = (TokenScore(first, None), *token_scores(logits[:-1], rest, row.job.likeliest))
        self._tell(row, Piece(scores=scores, finish="length" if row.job.max_tokens == 0 else None))

    def _step(self) -> None:
        self._choose(self._rows, self._batch.step([row.last for row in self._rows]))

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose the next tokens of rows that go on, and tell them."""
        places = [place for place, row in enumerate(rows) if not row.given_up]
        if not places:
            return
        going = [rows[place] for place in places]
        tokens = choose(logits[places], [row.job.sampling for row in going], [row.generator for row in going])
        for place, row, token in zip(places, going, tokens, strict=True):
            count = row.job.likeliest
            scores = [] if count is None else token_scores(logits[place : place + 1], [token], count)
            piece = row.take(token, scores, self._stop)
            self._tell(row, piece)

    def _tell(self, row: Row, piece: Piece) -> None:
        if piece.finish:
            row.given_up = True
        row.tell(piece)
