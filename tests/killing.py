"""Kills training runs at random moments and lets them go on: a program, so that runs are forked and start at once.

    python tests/killing.py CONFIG KILLS SEED

Everything is imported once; each run is a fork of this process. A run is killed either at a call of a Python or C
function, chosen among those of one phase (a step, an evaluation, a save), or once it has used so much CPU time,
wherever it is then. Prints one JSON object a kill.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from running import outcome

import launch.train
from dso.evaluation import Evaluator
from launch.config import TrainConfig, load_config
from launch.learn import Keeper
from trainers.ppo import SteeringPPO

PHASES: dict[str, tuple[Callable[..., Any], ...]] = {
    "save": (Keeper.save,),
    "evaluation": (Evaluator.settings,),
    "step": (SteeringPPO.collect_rollouts, SteeringPPO.train),
}
CODES = {function.__code__: phase for phase, functions in PHASES.items() for function in functions}


class Watch:
    """Counts the calls of each phase as a profile function; kills this process at one of them if told to.

    Args:
        phase, call: where to kill: at the so manieth call within that phase.
        notes: a file that is told so before.
    """

    def __init__(self, phase: str = "", call: int = 0, notes: Path | None = None):
        self.calls = dict.fromkeys((*PHASES, "other"), 0)
        self._within = ["other"]
        self._kill = phase, call, notes

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if frame.f_code in CODES and event in ("call", "return"):
            self._within.append(CODES[frame.f_code]) if event == "call" else self._within.pop()
        now = self._within[-1]
        self.calls[now] += 1
        phase, call, notes = self._kill
        if now == phase and self.calls[now] == call:
            notes.write_text(f"{phase} {call}")
            os.kill(os.getpid(), signal.SIGKILL)


def run(config: TrainConfig, name: str) -> None:
    """A run from its beginning or from where it was killed; without its picture, which would take most of the time."""
    launch.train.scale_figure = lambda *_, **__: None
    launch.train.train(replace(config, run=replace(config.run, name=name)), name=name, resume="auto", quiet=True)


def whole(config: TrainConfig, notes: Path) -> None:
    """The run that is not killed; notes its CPU time."""
    started = time.process_time()
    run(config, "whole")
    notes.write_text(json.dumps({"time": time.process_time() - started}))


def survey(config: TrainConfig, notes: Path) -> None:
    """The same once more; notes how many calls each phase has, too."""
    watch = Watch()
    sys.setprofile(watch)
    run(config, "survey")
    sys.setprofile(None)
    notes.write_text(json.dumps(json.loads(notes.read_text()) | watch.calls))


def killed_at(phase: str, call: int, config: TrainConfig, name: str, notes: Path) -> None:
    sys.setprofile(Watch(phase, call, notes))
    run(config, name)


def killed_after(seconds: float, config: TrainConfig, name: str, notes: Path) -> None:
    """A run that is killed wherever it is when it has used so much CPU time."""
    until = time.process_time() + seconds

    def wait() -> None:
        while time.process_time() < until:
            time.sleep(0.0005)
        notes.write_text(f"after {seconds:.3f} s")
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
    run(config, name)


def killed_writing(size: int, config: TrainConfig, name: str, notes: Path) -> None:
    """A run that the kernel kills when it has written so many bytes of the state at step 3."""
    real = SteeringPPO.train

    def train(self: SteeringPPO) -> None:
        real(self)
        if self.steps_done == 3:
            notes.write_text(f"{size} bytes written")
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    SteeringPPO.train = train
    run(config, name)


def files(folder: Path) -> dict[str, int]:
    """The size of every file."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def forked(work: Callable[..., None], *arguments: Any) -> int:
    """Do it in a process of its own; how that ended, as os.waitstatus_to_exitcode says it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException:  # noqa: BLE001  (the parent's code must not run on in the child, whatever it was)
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(config: TrainConfig, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    folder, rng = Path(config.run.folder), random.Random(seed)
    notes = folder.parent / "notes"
    if forked(whole, config, notes) or forked(survey, config, notes):
        raise SystemExit("the run that is not killed failed")
    known, wanted = json.loads(notes.read_text()), outcome(folder / "whole")
    for number in range(kills + 1):
        name, kind = f"killed-{number}", (*PHASES, "time")[number % 4] if number < kills else "half"
        notes.write_text("not killed")
        if kind == "half":
            ended = forked(killed_writing, 10_000, config, name, notes)
        elif kind == "time":
            ended = forked(killed_after, rng.uniform(0, 0.8 * known[kind]), config, name, notes)
        else:
            ended = forked(killed_at, kind, rng.randint(1, int(0.95 * known[kind])), config, name, notes)
        left = files(folder / name)
        again = forked(run, config, name)
        found = outcome(folder / name) if again == 0 else {}
        differs = [key for key in wanted if found.get(key) != wanted[key]]
        result = {"kind": kind, "moment": notes.read_text(), "ended": ended, "left": left}
        print(json.dumps(result | {"again": again, "differs": differs, "files": files(folder / name)}), flush=True)


if __name__ == "__main__":
    main(load_config(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
