"""The engine: what fails takes nobody else along, and its queue and memory have bounds."""

from __future__ import annotations

import queue
import time

import pytest
import torch
from serving import tiny_engine, wait_until

from dso.models.sampling import token_bytes
from dso.serve import engine as engines
from dso.serve.choosing import Sampling
from dso.serve.engine import Closed, Engine, Job, Piece, QueueFull


def job(prompt: str = "The nurse", tokens: int = 4, **options) -> Job:
    return Job(prompt=tuple(prompt.encode()), scale=1.0, max_tokens=tokens, sampling=Sampling(0.0), **options)


def told(engine: Engine, *jobs: Job) -> queue.Queue:
    """What rows tell."""
    pieces: queue.Queue[tuple[int, Piece]] = queue.Queue()
    engine.submit(jobs, lambda number, piece: pieces.put((number, piece)))
    return pieces


def ends(pieces: queue.Queue, count: int) -> list[str]:
    """How so many rows ended, by number."""
    found: dict[int, str] = {}
    while len(found) < count:
        number, piece = pieces.get(timeout=120)
        if piece.finish:
            found[number] = piece.finish
    return [found[number] for number in sorted(found)]


@pytest.fixture
def engine():
    engine = tiny_engine(max_rows=4, max_queue=8)
    yield engine
    engine.close()


def test_a_prompt_that_cannot_be_read_takes_nobody_along(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    running = told(engine, job(tokens=300))
    running.get(timeout=120)
    real = engine._batch.join

    def join(prompts, scales, read=1):
        if len(prompts[0]) == 3:
            raise RuntimeError("out of memory")
        return real(prompts, scales, read)

    monkeypatch.setattr(engine._batch, "join", join)
    assert ends(told(engine, job("abc")), 1) == ["error"]
    assert ends(told(engine, job("abcd")), 1) == ["length"]
    assert ends(running, 1) == ["length"]


def test_a_step_that_fails_tells_its_rows_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._batch, "step", lambda tokens: torch.zeros(0)[1])
        assert ends(told(engine, job(), job("other")), 2) == ["error", "error"]
    wait_until(lambda: engine.running == 0)
    assert ends(told(engine, job()), 1) == ["length"]
    with pytest.raises(ZeroDivisionError):
        engine.run(lambda: 1 / 0).result()
    assert engine.run(lambda: 7).result() == 7


def test_requests_are_taken_whole_or_not_at_all(engine: Engine) -> None:
    pieces = told(engine, job(tokens=200))
    pieces.get(timeout=120)
    with pytest.raises(QueueFull):
        told(engine, *[job()] * 9)
    assert engine.waiting == 0
    assert ends(told(engine, *[job()] * 8), 8) == ["length"] * 8


def test_rows_wait_where_their_keys_and_values_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    long, short = job(tokens=100), job(tokens=4)
    engine = tiny_engine(max_rows=4)
    # Room for two rows of the longer one's length.
    engine._room = 2 * (len(long.prompt) + 100) + 1
    pieces = told(engine, long, short, short, short)
    most = 0
    while engine.running or engine.waiting:
        most = max(most, engine.running)
        time.sleep(0.001)
    assert most == 2
    assert ends(pieces, 4) == ["length"] * 4
    engine._room = 1  # a row by itself is always taken
    assert ends(told(engine, long), 1) == ["length"]
    engine.close()
    assert engines.CACHE_BYTES == 2_000_000_000
    assert token_bytes(engine.backbone.model) == 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads, width, bytes


def test_who_waits_when_it_is_closed_is_told(engine: Engine) -> None:
    pieces = told(engine, *[job(tokens=400)] * 6)
    pieces.get(timeout=120)
    task = engine.run(lambda: 7)
    engine.close()
    assert task.cancelled()
    assert ends(pieces, 6) == ["error"] * 6
    for ask in (lambda: told(engine, job()), lambda: engine.run(lambda: 7)):
        with pytest.raises(Closed):
            ask()
    assert not engine.alive
