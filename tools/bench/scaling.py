"""Training steps of 1, 2, ... processes: decisions a second, time and bytes of exchanges, memory of a step.

Every measurement is made by processes of its own (:func:`work`), which a launcher starts where they are several. What
is said of exchanges is counted at torch.distributed, below DeepSpeed: bytes are those that one process hands over,
seconds include waiting for the others. Measurements that are compared take turns, in several rounds, as what else the
machine does changes with time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any

import torch
from stable_baselines3.common.logger import Logger

from dso.errors import UserError
from dso.files import write_text
from launch.cluster.processes import leave, open_world
from launch.config.schema import load_config
from launch.run.session import Session, open_session
from trainers.state.saved import save_state

EXCHANGES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_single", "reduce_scatter",
    "reduce_scatter_tensor", "reduce_scatter_single",
)  # fmt: skip


def scaling(arguments: argparse.Namespace) -> None:
    """Measure each number of processes, and one process with gradient checkpointing, and print a table."""
    counts = [int(part) for part in arguments.processes.split(",")]
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // max(counts))
    variants = [(count, False) for count in counts] + [(1, True)]
    rounds: list[list[dict[str, Any]]] = []
    for _ in range(arguments.rounds):
        rounds.append([_measured(arguments, *variant, threads) for variant in variants])
    rows = [merged(list(found)) for found in zip(*rounds, strict=True)]
    print(table(rows))
    record = {"config": arguments.config, "overrides": arguments.overrides, "deepspeed": arguments.deepspeed}
    record |= {"threads": threads, "rounds": arguments.rounds, "rows": rows}
    write_text(Path(arguments.results) / "scaling.json", json.dumps(record, indent=1) + "\n")


def merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of those that were measured alike in several rounds: the median step, the largest memory."""
    steps = [second for row in found for second in row["seconds"]]
    return found[0] | {
        "seconds": steps,
        "step_s": median(steps),
        "decisions_per_s": found[0]["decisions"] / median(steps),
        "exchange_share": median(share for row in found for share in row["shares"]),
        "shares": [share for row in found for share in row["shares"]],
        "step_bytes": max(row["step_bytes"] for row in found),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A fixed-width table; speed-ups are against the first row."""
    lines = [
        f"{'processes':<17}{'decisions/s':>13}{'speed-up':>10}{'step (s)':>10}{'exchanging':>12}"
        f"  {'bytes a step (gradients alone)':>30}{'memory of a step':>18}"
    ]
    for row in rows:
        name = f"{row['processes']}" + (", checkpointed" if row["checkpointed"] else "")
        exchanged = f"{row['bytes']:,.0f} ({row['gradient_bytes']:,})" if row["processes"] > 1 else "nothing"
        lines.append(
            f"{name:<17}{row['decisions_per_s']:13.2f}{row['decisions_per_s'] / rows[0]['decisions_per_s']:10.2f}"
            f"{row['step_s']:10.2f}{row['exchange_share']:12.1%}  {exchanged:>30}"
            f"{row['step_bytes'] / 1e6:15.0f} MB"
        )
    saved = f"state {rows[0]['state_bytes']:,} bytes, steering {rows[0]['steering_bytes']:,}"
    return "\n".join([*lines, f"on disk: {saved}, the model {rows[0]['model_bytes']:,}"])


def _measured(arguments: argparse.Namespace, count: int, checkpointed: bool, threads: int) -> dict[str, Any]:
    """What the first of ``count`` processes measures."""
    overrides = [f"train.gradient_checkpointing={str(checkpointed).lower()}"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        words = ["--steps", str(arguments.steps), "--out", str(out), arguments.config, *overrides, *arguments.overrides]
        start = [sys.executable, "-m", "tools.bench.scaling"]
        if count > 1:
            launcher = Path(sys.executable).with_name("deepspeed")
            start = [str(launcher), "--num_gpus", str(count), "--no_local_rank", "--module", start[-1]]
            words = ["--deepspeed", arguments.deepspeed, *words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([*start, *words], capture_output=True, text=True, env=environment)
        if done.returncode or not out.exists():
            raise UserError(f"{count} processes could not be measured:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
        return json.loads(out.read_text()) | {"checkpointed": checkpointed}


@dataclass(slots=True)
class Exchanges:
    """What was exchanged since the last :meth:`reset`.

    Attributes:
        seconds: in exchanges, waiting for others included.
        sizes: bytes that this process handed over, by kind of exchange.
    """

    seconds: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)
    _inside: bool = False

    def count(self) -> None:
        """Count torch.distributed's exchanges from here on, each one waited for.

        To be called before DeepSpeed is imported, which takes hold of them.
        """
        import torch.distributed as dist

        for name in EXCHANGES:
            if hasattr(dist, name):
                setattr(dist, name, self._wrapped(name, getattr(dist, name)))

    def reset(self) -> tuple[float, dict[str, int]]:
        """Begin anew; returns seconds and sizes."""
        seen = self.seconds, self.sizes
        self.seconds, self.sizes = 0.0, {}
        return seen

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            outermost, started = not self._inside, time.perf_counter()
            self._inside = True
            try:
                handle = function(*args, **kwargs)
                if handle is not None and hasattr(handle, "wait"):
                    handle.wait()
                _synchronize()
            finally:
                self._inside = not outermost
            if outermost:  # some are made of others
                self.seconds += time.perf_counter() - started
                self.sizes[name] = self.sizes.get(name, 0) + _handed_over(name, args, kwargs)
            return handle

        return call


def _handed_over(name: str, args: tuple, kwargs: dict[str, Any]) -> int:
    """Bytes of the tensors that a process puts into an exchange."""
    given = [*args, *kwargs.values()]
    gathers = name.startswith(("all_gather", "reduce_scatter"))  # their first argument takes what comes back
    own = given[1] if gathers and len(given) > 1 else given[0]
    return sum(t.numel() * t.element_size() for t in (own if isinstance(own, list | tuple) else [own]))


def work(arguments: argparse.Namespace) -> None:
    """Take some steps as one of the processes; the first writes what was measured."""
    config = load_config(arguments.config, arguments.overrides)
    exchanges = Exchanges()
    exchanges.count()
    world, settings = open_world(config, arguments.deepspeed)
    session = open_session(config, world, settings)
    trainer = session.trainer
    trainer.set_logger(Logger(None, []))
    callback = trainer._setup_learn(10**9, None)[1]
    seconds, seen, memory = [], [], []
    for _ in range(arguments.steps + 1):
        # References are computed once a run, not once a step.
        trainer.learner.pass_through(lambda: trainer.task.reference(trainer._last_obs))
        world.barrier()
        exchanges.reset()
        started = time.perf_counter()
        with peak_memory(memory):
            trainer.collect_rollouts(trainer.env, callback, trainer.rollout_buffer, 1)
            trainer.train()
            _synchronize()
        seconds.append(time.perf_counter() - started)
        seen.append(exchanges.reset())
    sizes = _on_disk(session)
    if world.is_main:  # the first step warmed caches up
        write_text(Path(arguments.out), json.dumps(_row(session, seconds[1:], seen[1:], memory[1:]) | sizes))
    world.close()


def _on_disk(session: Session) -> dict[str, int]:
    """Bytes of what a run saves to go on from, of the steering it yields, and of the model's weights."""
    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder) / "state", session.trainer, {}, {})
        session.steering.save_pretrained(Path(folder) / "steering")
        state, steering = (  # the first process alone writes a state
            sum(path.stat().st_size for path in Path(folder).glob(f"{name}/*")) for name in ("state", "steering")
        )
    weights = session.backbone.model.parameters()
    model = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in weights)  # whole, where divided
    return {"state_bytes": state, "steering_bytes": steering, "model_bytes": model}


def _row(
    session: Session, seconds: list[float], seen: list[tuple[float, dict[str, int]]], memory: list[int]
) -> dict[str, Any]:
    trainer = session.trainer
    kinds = sorted({kind for _, sizes in seen for kind in sizes})
    return {
        "processes": trainer.world.size,
        "decisions": trainer.env.num_envs,
        "seconds": seconds,
        "shares": [spent / second for (spent, _), second in zip(seen, seconds, strict=True)],
        "bytes": median(sum(sizes.values()) for _, sizes in seen),
        "bytes_by_kind": {kind: median(sizes.get(kind, 0) for _, sizes in seen) for kind in kinds},
        "gradient_bytes": sum(p.numel() * p.element_size() for p in trainer.policy.parameters()),
        "step_bytes": max(memory),
        "device": str(session.backbone.device),
    }


@contextmanager
def peak_memory(found: list[int]) -> Iterator[None]:
    """Append the bytes by which memory grew within the block at most: the accelerator's, or else the process's own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    over, before = threading.Event(), _resident()
    seen = [before]

    def watch() -> None:
        while not over.wait(0.002):
            seen.append(_resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        found.append(max(seen) - before)


def _resident() -> int:
    """Bytes of main memory that this process occupies."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Be one of the processes."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.scaling")
    parser.add_argument("--deepspeed")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    work(parser.parse_args())


if __name__ == "__main__":
    main()
    leave(0)
