"""Hands records to a process that speaks to W&B, without ever making the caller wait before :meth:`Relay.close`.

Records go into a bounded memory; a thread starts the process (:mod:`trainers.tracking.wandb_worker`) and writes them
to it. If
that cannot reach its server, or stops working, a second one keeps everything in an offline run, which starts with what
the memory still holds. Closing takes at most ``timeout + SLACK + 2 * LOCAL`` seconds, and nearly always a few: a server
that does not answer is given up after ``timeout``, usually long before training ends. After an error or on request it
takes at most ``timeout`` seconds. Then what is left is killed; W&B's own service ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("wandb_worker.py")
LOG = "worker.log"
KEPT = 10_000  # records
BEGIN = 300.0  # seconds until the process has imported W&B, if training goes on for so long
LOCAL = 60.0  # seconds that a busy machine may take for anything else that needs no server
STUCK = 30.0  # seconds without reading after which the process counts as hung
SLACK = 5.0  # seconds beyond a server's time, so that W&B itself gives up before it is killed
PATIENCE = 2.0  # seconds of waiting that nobody needs to be told of


class Worker:
    """The process, its pipes and its folder for sockets and temporary files.

    Args:
        setup: what :func:`trainers.tracking.wandb_worker.start` takes.
    """

    def __init__(self, setup: Mapping[str, Any]):
        home = Path(setup["folder"]) / "wandb"
        home.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.mkdtemp(prefix="dso-wandb-")  # not in the run: a socket's path must be short
        with (home / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                stderr=log,
                env=environment(home, self._scratch),
                start_new_session=True,  # Ctrl-C is for the process that trains
            )
        os.set_blocking(self.process.stdin.fileno(), False)
        self.mode = setup["mode"]
        self.facts: dict[str, str] = {}
        self.send(setup, LOCAL)

    def send(self, message: Mapping[str, Any], seconds: float) -> None:
        """Write one message.

        Raises:
            OSError: if the process is gone, or did not read for so long.
        """
        rest, pipe = json.dumps(message).encode() + b"\n", self.process.stdin.fileno()
        while rest:
            if not _ready(pipe, select.POLLOUT, seconds):
                raise TimeoutError(f"nothing was read for {seconds:.0f} s")
            rest = rest[os.write(pipe, rest) :]

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer; empty if there is none in time, or the process ended without one."""
        if not _ready(self.process.stdout.fileno(), select.POLLIN, seconds):
            return {}
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else {}

    def leave(self, seconds: float) -> None:
        """Give the process some time to end by itself, then end it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what was not read is not to be written again
                stream.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def kill(self) -> None:
        """End the process now."""
        self.process.kill()
        self.process.wait()


class Relay:
    """The records of one run on their way to W&B.

    Args:
        setup: what :func:`trainers.tracking.wandb_worker.start` takes; ``mode`` is the one to begin with.
        say: told how the run is kept.
        warn: told, once, what went wrong.
    """

    def __init__(self, setup: Mapping[str, Any], say: Callable[[str], None], warn: Callable[[str], None]):
        self.setup = dict(setup)
        self.timeout = float(setup["timeout"])
        self._say, self._warn = say, warn
        self._records: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._count = 0  # of all records that there ever were
        self._lost = 0
        self._code: int | None = None
        self._given_up = False
        self._news = threading.Condition()
        self._worker: Worker | None = None
        self._earlier: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)

    def begin(self, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """Start; ``earlier`` records, of before a resume, are known to the server, so only offline runs get them."""
        self._earlier = list(earlier)
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        """Add a record; the oldest one is dropped where the memory is full."""
        with self._news:
            self._records.append(record)
            self._count += 1
            self._news.notify()

    def close(self, code: int) -> None:
        """Finish the run, within the bound that the module states; a second call does nothing."""
        if self._thread.ident is None or self._code is not None:
            return
        with self._news:
            self._code = code
            self._news.notify()
        # A run that ended early may be killed soon, so it does not begin anew with keeping things offline.
        online, local = (self.timeout + SLACK + LOCAL, LOCAL) if code == 0 else (self.timeout, 0.0)
        try:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._say(f"waiting for W&B, {online + local:.0f} seconds at most")
                self._thread.join(online - PATIENCE)
            if self._thread.is_alive() and not self._is_offline():
                self._given_up = not local
                self._stop_worker()
            self._thread.join(local)
        finally:
            self._given_up = True
            if self._thread.is_alive():
                self._stop_worker()
                self._thread.join(PATIENCE)

    # In the thread

    def _work(self) -> None:
        wanted = self.setup["mode"]
        reason = self._serve(wanted, "")
        if reason and not self._is_offline() and not self._given_up:
            reason = self._serve("offline", reason)
        if reason:
            self._warn(f"W&B: {reason}; what it was told until then is all it has ({self._home() / LOG} says more)")

    def _serve(self, mode: str, before: str) -> str:
        """Tell one worker everything there is until the run is closed; the reason if that failed.

        Args:
            before: why there is no other worker any more.
        """
        try:
            self._worker = worker = Worker(self.setup | {"mode": mode})
        except OSError as error:
            return f"its process could not be started: {error}"
        done = False
        try:
            if self._given_up:  # meanwhile, and nobody will stop this one
                return "there was no time left"
            if reason := self._open(worker):
                return reason
            self._tell_where(before)
            self._relay(worker)
            answer = worker.answer(self._patience(worker))
            if "told" not in answer:
                return answer.get("failed", "its process ended early, or hangs")
            answer = worker.answer(self._patience(worker))
            done = "done" in answer
            self._complain(answer.get("done", "not everything was sent in time"))
        except OSError as error:
            return worker.answer(0).get("failed") or f"its process does not go on: {error}"
        finally:
            worker.leave(PATIENCE if done else 0.0)
        return ""

    def _open(self, worker: Worker) -> str:
        """Wait until the run is open; the reason if it is not."""
        answer = worker.answer(BEGIN)
        if "mode" not in answer:
            return answer.get("failed", "its process did not begin in time")
        worker.mode = answer["mode"]
        answer = worker.answer(self._patience(worker))
        if "ready" not in answer:
            return answer.get("failed", "its server did not answer in time")
        worker.facts = answer["ready"]
        return ""

    def _patience(self, worker: Worker) -> float:
        return LOCAL if worker.mode == "offline" else self.timeout + SLACK

    def _relay(self, worker: Worker) -> None:
        """Send what there is and what comes, until the run is closed."""
        told, code, batch = 0, None, self._earlier if self._is_offline() else []
        while True:
            for record in batch:
                worker.send(record, STUCK)
            if code is not None:
                break
            told, code, batch = self._next(told)
        worker.send({"finish": code}, STUCK)

    def _next(self, told: int) -> tuple[int, int | None, list[dict[str, Any]]]:
        """Wait for more than the first ``told`` records, or the end; the count, the exit code, and those records."""
        with self._news:
            self._news.wait_for(lambda: self._count > told or self._code is not None)
            oldest = self._count - len(self._records)
            self._lost += max(0, oldest - told)
            return self._count, self._code, list(islice(self._records, max(0, told - oldest), None))

    def _tell_where(self, before: str) -> None:
        facts, reason = self._worker.facts, before.rstrip(".")
        if not self._is_offline():
            self._say(f"W&B: {facts['url'] or f'{self._worker.mode}, as its own settings say'}")
        elif reason:
            self._warn(f"W&B: {reason}; the run is kept offline, send it later with: wandb sync {facts['folder']}")
        else:
            self._say(f"W&B: offline run, to be sent with: wandb sync {facts['folder']}")

    def _complain(self, reason: str) -> None:
        if self._lost:
            reason = "; ".join(filter(None, [reason, f"the first {self._lost} records were dropped"]))
        if reason:
            self._warn(f"W&B: {reason}; what is missing there is here: wandb sync {self._worker.facts['folder']}")

    def _is_offline(self) -> bool:
        return self._worker is not None and self._worker.mode == "offline"

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()

    def _home(self) -> Path:
        return Path(self.setup["folder"]) / "wandb"


def _ready(descriptor: int, event: int, seconds: float) -> bool:
    """Whether a pipe can be written to or read from in time, or is closed."""
    poll = select.poll()  # select() itself knows no descriptors from 1024 on
    poll.register(descriptor, event)
    return bool(poll.poll(1000 * seconds))


def environment(home: Path, scratch: str) -> dict[str, str]:
    """This process's environment with all that W&B writes directed to the run's folder, and nothing sent elsewhere."""
    places = {
        "WANDB_DIR": str(home.parent),
        "WANDB_CACHE_DIR": str(home / "cache"),
        "WANDB_DATA_DIR": str(home / "data"),
        "WANDB_ARTIFACT_DIR": str(home / "artifacts"),
        "TMPDIR": scratch,
    }
    quiet = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return own | places | quiet
