"""Time and memory: of a training step against a bare pass, and of a whole run."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from dso.files import write_text
from launch.config.schema import load_config
from launch.run.session import Session, open_session
from trainers.ppo import SteeringPPO


def step(arguments: argparse.Namespace) -> None:
    """Median seconds of one step of each estimator, and of a bare forward and backward pass of the same decisions.

    The bare pass scores the batch with the frozen model and no hook, and differentiates the same objective down to
    the embeddings: the least that any gradient through the model costs. Rounds alternate, as machines are noisy.
    """
    rows: dict[str, list[float]] = {}
    bare: dict[str, list[float]] = {}
    sessions: dict[str, Session] = {}
    callbacks: dict[str, BaseCallback] = {}
    for estimator in ("regression", "expected", "reinforce", "ppo"):
        one_epoch = ["train.ppo.n_epochs=1"] if estimator == "ppo" else []
        config = load_config(arguments.config, [f"train.estimator={estimator}", *one_epoch])
        sessions[estimator] = open_session(config)
        rows[estimator], bare[estimator] = [], []
        callbacks[estimator] = _prepare(sessions[estimator].trainer)
        sessions[estimator].handle.detach()
    for number in range(arguments.repeats + 1):
        for estimator, session in sessions.items():
            seconds = _timed(lambda s=session: _bare_pass(s))
            with session.steering.on(session.backbone.model) as handle:
                session.trainer.task.handle = handle
                session.trainer.task.reference(session.trainer.env.inner.indices)  # computed once a run, not a step
                stepped = _timed(lambda s=session, c=callbacks[estimator]: _one_step(s.trainer, c))
            if number:  # the first round warms caches up
                bare[estimator].append(seconds)
                rows[estimator].append(stepped)
    results = {
        name: {
            "step_s": median(rows[name]),
            "bare_s": median(bare[name]),
            "ratio": median(a / b for a, b in zip(rows[name], bare[name], strict=True)),
        }
        for name in rows
    }
    print("estimator   step (s)   bare forward+backward (s)   ratio")
    for name, row in results.items():
        print(f"{name:<11} {row['step_s']:8.2f}   {row['bare_s']:25.2f}   {row['ratio']:5.2f}")
    write_text(Path(arguments.results) / "step.json", json.dumps(results, indent=1) + "\n")


def run(arguments: argparse.Namespace) -> None:
    """Wall time and peak resident memory of ``dso train``, in a process of its own."""
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or made
        command = [sys.executable, "-m", "launch.cli", "train", arguments.config, f"run.output_dir={folder}", "--quiet"]
        started = time.monotonic()
        subprocess.run(command, check=True)
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(
        f"{arguments.config}: {seconds / 60:.1f} minutes, {peak:.2f} GB peak memory, {torch.get_num_threads()} threads"
    )
    record = {"config": arguments.config, "minutes": seconds / 60, "peak_gb": peak, "threads": torch.get_num_threads()}
    write_text(Path(arguments.results) / f"run-{arguments.config}.json", json.dumps(record, indent=1) + "\n")


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _bare_pass(session: Session) -> None:
    decisions = session.trainer.task.pick(session.trainer.env.inner.indices)
    embeddings = session.backbone.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, args, output: output.requires_grad_())
    try:
        scores = session.backbone.score(decisions, next_token=True)
        (scores.policy().exp()[:, 0].mean() + scores.next_token.exp().square().sum(-1).mean()).backward()
    finally:
        hook.remove()


def _prepare(trainer: SteeringPPO) -> BaseCallback:
    trainer.set_logger(Logger(None, []))
    return trainer._setup_learn(10**9, None)[1]


def _one_step(trainer: SteeringPPO, callback: BaseCallback) -> None:
    trainer.collect_rollouts(trainer.env, callback, trainer.rollout_buffer, 1)
    trainer.train()
