"""Kills training runs at random moments and lets them go on: a program, so that runs are forked and start at once.

    python tests/helpers/killing.py CONFIG KILLS SEED [DEEPSPEED]

Everything is imported once; each run is a fork of this process, or two that train together if a configuration of
DeepSpeed is given. A process of it is killed either at a call of a Python or C function, chosen among those of one
phase (a step, an evaluation, a save, the time between the making of a temporary file and its renaming), or once it has
used so much CPU time, wherever it is then; in the last case once more as the run goes on. At last come one run that
dies in the middle of writing a state, and one of which one process gets SIGTERM. Prints, each as JSON after ``found``,
what each process is known to do, every kill, and how runs ended that are refused.

    deepspeed ... tests/helpers/killing.py --launched PHASE CALL RANK ARGUMENTS

does in a process of a real launcher what launch/train.py does with the arguments, but kills the one of that rank.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from running import outcome
from tqdm import tqdm

import launch.run.constants
import launch.run.report
import launch.run.train
import launch.train
from dso.errors import UserError
from dso.evaluation.answers import AnswerEvaluator
from dso.evaluation.evaluator import Evaluator
from dso.files import write_bytes
from launch.cli import main
from launch.config.schema import TrainConfig, load_config
from launch.exits import EXIT_INPUT, EXIT_PREEMPTED, EXIT_STOPPED
from launch.run.folder import Stopped
from launch.run.learn import Keeper
from launch.run.session import load_backbone
from trainers.ppo import SteeringPPO

PHASES: dict[str, tuple[Callable[..., Any], ...]] = {
    "save": (Keeper.save,),
    "evaluation": (Evaluator.settings, AnswerEvaluator.measure),
    "step": (SteeringPPO.collect_rollouts, SteeringPPO.train),
    "write": (),  # what write_bytes does once it has a temporary file
}
CODES = {function.__code__: phase for phase, functions in PHASES.items() for function in functions}
WRITES, BEGINS = write_bytes.__code__, os.open  # by which it makes its temporary file
PATIENCE = 600  # seconds after which a process that hangs says where, and ends; a run takes a few
HALF = 10_000  # bytes, less than a state and more than the records of these runs
Trick = Callable[[Path], None]  # what is done to a process before it runs; tells a file of what comes of it


class Watch:
    """Counts the calls of each phase as a profile function; kills this process at one of them if told to.

    Args:
        phase, call: where to kill: at the so manieth call within that phase.
        number: the signal.
        notes: a file that is told so before.
    """

    def __init__(self, phase: str = "", call: int = 0, number: int = signal.SIGKILL, notes: Path | None = None):
        self.calls = dict.fromkeys((*PHASES, "other"), 0)
        self._within = ["other"]
        self._kill = phase, call, number, notes

    def __call__(self, frame: FrameType, event: str, done: Any) -> None:
        code = frame.f_code
        if event == "c_return" and done is BEGINS and code is WRITES:
            self._within[-1] = "write"
        elif event == "return" and (code in CODES or code is WRITES):
            self._within.pop()
        elif event == "call" and (code in CODES or code is WRITES):
            self._within.append(CODES.get(code, self._within[-1]))
        now = self._within[-1]
        self.calls[now] += 1
        phase, call, number, notes = self._kill
        if now == phase and self.calls[now] == call:
            if notes is not None:
                notes.write_text(f"{phase} {call}")
            os.kill(os.getpid(), number)


def kill_at(phase: str, call: int, notes: Path | None = None, number: int = signal.SIGKILL) -> None:
    sys.setprofile(Watch(phase, call, number, notes))


def kill_after(seconds: float, notes: Path) -> None:
    """Have this process killed wherever it is when it has used so much CPU time more, or as it ends before that."""
    until = time.process_time() + seconds

    def end(_: int) -> None:
        notes.write_text(f"after {seconds:.3f} s")
        os.kill(os.getpid(), signal.SIGKILL)

    def wait() -> None:
        while time.process_time() < until:
            time.sleep(0.0005)
        end(0)

    os._exit = end
    threading.Thread(target=wait, daemon=True).start()


def kill_writing(notes: Path) -> None:
    """Have the kernel kill this process when it has written a part of the state at step 3."""
    real = Keeper.save

    def save(self: Keeper) -> None:
        if self.session.trainer.steps_done == 3:
            notes.write_text(f"{HALF} bytes written")
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, HALF))
        real(self)

    Keeper.save = save


def survey(notes: Path) -> None:
    """Have this process tell its CPU time, a multiple of what it takes unwatched, and the calls of each phase."""
    watch, real, started = Watch(), os._exit, time.process_time()

    def tell(code: int) -> None:
        sys.setprofile(None)
        notes.write_text(json.dumps({"time": time.process_time() - started, **watch.calls}))
        real(code)

    os._exit = tell
    sys.setprofile(watch)


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of one config, each in processes of its own.

    Attributes:
        deepspeed: for runs of two processes.
        notes: the file that tricks tell.
    """

    config: TrainConfig
    deepspeed: str | None
    notes: Path

    @property
    def size(self) -> int:
        return 1 if self.deepspeed is None else 2

    def go(self, name: str, trick: Trick | None = None, victim: int = 0) -> list[int]:
        """Start a run, or go on with it; how its processes ended, as os.waitstatus_to_exitcode says it."""
        sys.stdout.flush()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(self.size):
            child = os.fork()
            if child == 0:
                self._be(rank, port, name, trick if rank == victim else None)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    def _be(self, rank: int, port: int, name: str, trick: Trick | None) -> None:
        """Be a process of a run; never returns."""
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        code = 1
        try:
            if self.size > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(self.size))
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            if trick is not None:
                trick(self.notes)
            config = with_run(self.config, run_name=name)
            launch.run.train.train(config, name=name, resume="auto", quiet=True, deepspeed=self.deepspeed)
            code = 0
        except Stopped as stop:
            code = EXIT_PREEMPTED if stop.preempted else EXIT_STOPPED
        except UserError as error:
            print(f"process {rank}: {error}", file=sys.stderr)
            code = EXIT_INPUT
        except BaseException:  # noqa: BLE001  (what runs on in the parent must not run on in the child)
            traceback.print_exc()
        finally:
            os._exit(code)

    def files(self, name: str) -> dict[str, int]:
        """The size of every file of a run."""
        folder = Path(self.config.run.output_dir) / name
        found = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): path.stat().st_size for path in found}

    def outcome(self, name: str) -> dict[str, Any]:
        return outcome(Path(self.config.run.output_dir) / name)


def with_run(config: TrainConfig, **values: Any) -> TrainConfig:
    """A config that is kept elsewhere."""
    return config.model_copy(update={"run": config.run.model_copy(update=values)})


def say(found: Any) -> None:
    print("found", json.dumps(found), flush=True)  # libraries print too


def kill(runs: Runs, kills: int, seed: int) -> None:
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    tqdm.set_lock(threading.RLock())  # its own is shared by forks: one killed while it holds it would stop all others
    launch.run.report.scale_figure = lambda *_, **__: None  # it would take most of the time
    load_backbone(runs.config)  # what transformers compiles once a process is there in all
    gc.freeze()  # else each run looks through all that was imported
    rng = random.Random(seed)
    known = []
    for victim in range(runs.size):
        if any(runs.go(f"whole-{victim}", survey, victim)):
            raise SystemExit("a run that is not killed failed")
        known.append(json.loads(runs.notes.read_text()))
    say(known)
    wanted = runs.outcome("whole-0")
    kinds = [(*PHASES, "time")[number % 5] for number in range(kills)]
    for number, kind in enumerate([*kinds, "half", "term"]):
        name, victim = f"killed-{number}", 0 if kind in ("half", "write") else rng.randrange(runs.size)
        runs.notes.write_text("not killed")
        if kind == "half":
            trick: Trick = kill_writing
        elif kind == "term":
            trick = partial(kill_at, "step", known[victim]["step"] // 2, number=signal.SIGTERM)
        elif kind == "time":
            trick = partial(kill_after, rng.uniform(0, 0.25 * known[victim][kind]))
        else:
            trick = partial(kill_at, kind, rng.randint(1, int(0.95 * known[victim][kind])))
        ended = runs.go(name, trick, victim)
        result = {"kind": kind, "victim": victim, "moment": runs.notes.read_text(), "ended": ended}
        result["left"] = runs.files(name)
        if kind == "time":
            runs.go(name, partial(kill_after, rng.uniform(0, 0.2 * known[victim][kind])), victim)
        again = runs.go(name)
        found = {} if any(again) else runs.outcome(name)
        differs = [key for key in wanted if found.get(key) != wanted[key]]
        say(result | {"again": again, "differs": differs, "files": runs.files(name)})
        if any(again):
            raise SystemExit(f"a run did not go on: {result | {'again': again}}")


def refused(runs: Runs) -> dict[str, list[int]]:
    """How runs end that are refused before anything is loaded: by the first process, and all have to hear of it."""
    unwritable = with_run(runs.config, output_dir="/proc/dso")
    other = runs.config.model_copy(update={"train": runs.config.train.model_copy(update={"seed": 7})})
    return {
        "unwritable": replace(runs, config=unwritable).go("letters"),
        "another config": replace(runs, config=other).go("whole-0"),
    }


def launched(phase: str, call: str, rank: str, *arguments: str) -> int:
    if os.environ["RANK"] == rank:
        kill_at(phase, int(call))
    return main(launch.train.script_arguments(arguments))


if __name__ == "__main__":
    launch.run.constants.RESAMPLES = 2  # of the intervals, in all runs alike: they are not what is tested
    at = next((place for place, word in enumerate(sys.argv) if word == "--launched"), None)
    if at is not None:  # the launcher puts an option of its own before
        raise SystemExit(launched(*sys.argv[at + 1 :]))
    given = load_config(sys.argv[1])
    if len(sys.argv) > 4:
        # Before the forks, as it takes seconds: DeepSpeed, and what an engine makes it import.
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    if given.freeform:
        from trainers.grpo import GRPOTrainer, RLOOTrainer

        CODES |= {kind.training_step.__code__: "step" for kind in (GRPOTrainer, RLOOTrainer)}
    found = Runs(given, sys.argv[4] if len(sys.argv) > 4 else None, Path(given.run.output_dir).parent / "notes")
    kill(found, int(sys.argv[2]), int(sys.argv[3]))
    say(refused(found))
