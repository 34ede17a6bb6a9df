"""A server of a tiny model on a free port, in a thread of its own."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import uvicorn
from tiny import byte_tokenizer, tiny_llama

from dso.models.backbone import Backbone
from dso.serve.app import bind, make_app
from dso.serve.asking import Limits
from dso.serve.engine import Engine
from dso.steering.model import Steering

MODEL = "tiny"


def strong_steering(model, operator: str = "affine") -> Steering:
    """A random steering that changes answers at scales of 0.25 already."""
    steering = Steering.for_model(model, operator=operator, scale_range=(0.0, 2.0))
    draw = torch.Generator().manual_seed(3)
    steering.load_tensors({key: 0.4 * torch.randn(v.shape, generator=draw) for key, v in steering.tensors().items()})
    return steering.requires_grad_(False)


def tiny_backbone() -> Backbone:
    return Backbone(tiny_llama(), byte_tokenizer(), MODEL)


def tiny_engine(**options) -> Engine:
    backbone = tiny_backbone()
    return Engine(backbone, strong_steering(backbone.model).attach(backbone.model, 1.0), **options)


@contextmanager
def served(engine: Engine, key: str | None = None, max_body: int = 100_000) -> Iterator[str]:
    """The address of a server; the engine is closed at the end."""
    limits = Limits(scale=1.0, scales=(0.0, 2.0), max_tokens=400, model=MODEL)
    app = make_app(engine, limits, key=key, max_body=max_body)
    socket = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def stop(server: subprocess.Popen, seconds: float) -> None:
    """End a server's process: asked to, and killed where it takes longer."""
    server.terminate()
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def wait_until(done, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
