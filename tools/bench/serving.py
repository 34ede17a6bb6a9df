"""Tokens a second of ``dso serve``'s engine, against one answer after the other by transformers' generate."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import median

from dso.files import write_text
from dso.models.backbone import Backbone
from dso.serve.choosing import Sampling
from dso.serve.engine import Engine, Job, Piece
from dso.steering.handle import Handle
from dso.steering.model import Steering

COUPLES = (("Emily", "Michael"), ("Sarah", "David"), ("Mary", "John"), ("Lisa", "James"))
JOBS = ("doctor", "nurse", "engineer", "mechanic", "plumber", "secretary", "teacher", "judge")
PROMPTS = tuple(
    f"{one} and {other} work in the same building. One of them is a {job}. The {job} is named"
    for (one, other), job in product(COUPLES, JOBS)
)
SCALES = (0.0, 0.25, 0.5, 1.0)
Asked = Sequence[tuple[str, float]]
Clock = Callable[[], float]


def serve(arguments: argparse.Namespace) -> None:
    """Greedy answers to 32 prompts at four scales: one by one, and by the engine with 1, 8 and 32 rows.

    Rounds alternate, as machines are noisy, and medians are printed.
    """
    steering = Steering.from_pretrained(arguments.steering)
    backbone = Backbone.load(arguments.model or steering.config.base_model, scoring=steering.config.scoring)
    handle = steering.to(backbone.device).attach(backbone.model)
    asked = [(prompt, SCALES[number % len(SCALES)]) for number, prompt in enumerate(PROMPTS[: arguments.requests])]
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {}
    written = 0
    for _ in range(arguments.rounds):
        texts, passed = one_by_one(backbone, handle, asked, arguments.tokens, clock)
        seconds.setdefault("generate, one by one", []).append(passed)
        for rows in (1, 8, 32):
            made, passed, written = by_engine(backbone, handle, asked, arguments.tokens, rows, clock)
            seconds.setdefault(f"engine, {rows} rows", []).append(passed)
            same = sum(one == other for one, other in zip(texts, made, strict=True))
            print(f"{rows} rows: {same} of {len(asked)} answers are those of generate", flush=True)
    speeds = {name: written / median(values) for name, values in seconds.items()}
    print("                       tokens a second   ratio")
    for name, speed in speeds.items():
        print(f"{name:<22} {speed:15.1f}   {speed / speeds['generate, one by one']:5.2f}")
    write_text(Path(arguments.results) / "serve.json", json.dumps(speeds, indent=1) + "\n")


def one_by_one(backbone: Backbone, handle: Handle, asked: Asked, tokens: int, clock: Clock) -> tuple[list[str], float]:
    """The answers of ``generate``, and the seconds that they took."""
    texts, start = [], clock()
    for prompt, scale in asked:
        handle.scale = scale
        made = backbone.generate(prompt, max_new_tokens=tokens)
        assert isinstance(made, str)
        texts.append(made)
    return texts, clock() - start


def by_engine(
    backbone: Backbone, handle: Handle, asked: Asked, tokens: int, rows: int, clock: Clock
) -> tuple[list[str], float, int]:
    """The same by the engine with so many rows side by side, and the tokens that were written."""
    engine = Engine(backbone, handle, max_rows=rows)
    texts, counts, left = [""] * len(asked), [0] * len(asked), threading.Semaphore(0)

    def tell(number: int, piece: Piece) -> None:
        texts[number] += piece.text
        counts[number] += len(piece.tokens)
        if piece.finish:
            left.release()

    greedy = Sampling(0.0)
    start = clock()
    engine.submit([Job(prompt=backbone.tokens(p), scale=s, max_tokens=tokens, sampling=greedy) for p, s in asked], tell)
    for _ in asked:
        left.acquire()
    seconds = clock() - start
    engine.close()
    return texts, seconds, sum(counts)
