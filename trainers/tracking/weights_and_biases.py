"""A run in Weights & Biases, told by a thread of its own: training never waits for it and never fails with it.

W&B's client writes every row to a file in the run's folder and sends it from a process of its own, so a call takes
about a millisecond whatever the server does. What can take long are its beginning, its tables and artifacts, and its
end. They happen in the thread, and :meth:`WandbTracker.close` waits for the thread a bounded time. If the server does
not let the run begin, does not take a table, or does not take the rest in time, the whole run is written into an
offline run instead, from its first record on.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.logger import KVWriter

from dso.evaluation.report import ScalePoint
from dso.files import write_text
from trainers.tracking.base import Tracker
from trainers.tracking.records import SAMPLE_COLUMNS, curve_records, scalars, without_credentials

if TYPE_CHECKING:
    import wandb

    Record = Callable[[wandb.Run], object]

ID_FILE = "wandb.json"
AXES = ("train/*", "eval/*", "rollout/*", "time/*", "selected/*")
SLACK = 60.0  # seconds beyond the server's time, for what a busy machine needs to write the run to its own disk
PATIENCE = 4.0  # seconds of waiting that nobody needs to be told of
QUIET = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}  # no reports to W&B's makers


class WandbTracker(Tracker):
    """A W&B run; :meth:`outputs` begins it.

    Args:
        folder: of the training run; W&B keeps to ``wandb`` in it.
        config: what the run was told, as plain values.
        mode: ``auto``, ``online`` or ``offline``.
        timeout: seconds that the server has to let the run begin, and again to take the rest when it ends.
        say: told how the run is kept.
        warn: told what went wrong.
        init: further arguments of ``wandb.init``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        config: Mapping[str, Any],
        mode: str,
        timeout: float,
        say: Callable[[str], None],
        warn: Callable[[str], None],
        **init: Any,
    ):
        self._name = folder.name
        self._mode = mode
        self._timeout = timeout
        self._say = say
        self._warn = warn
        self._init = {
            "dir": str(folder.resolve()),
            "id": run_id(folder),
            "name": folder.name,
            "config": without_credentials(config),
            **init,
        }
        self._run: wandb.Run | None = None
        self._closed = False
        self._metadata: dict[str, float] = {}
        self._news: SimpleQueue[Record | int] = SimpleQueue()  # records, then the exit code
        self._records: list[Record] = []  # what an offline run begins with
        self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)

    def outputs(self, decisions: int, metrics: Path | None = None) -> list[KVWriter]:
        lines = [] if metrics is None else metrics.read_text(encoding="utf-8").splitlines()
        # The server knows them; an offline run holds the whole history, so that sending the last one is enough.
        self._records = [_log(scalars(json.loads(line), decisions)) for line in lines]
        self._thread.start()
        return [ScalarWriter(lambda values: self._news.put(_log(values)), decisions)]

    def selected(self, row: Mapping[str, float | None]) -> None:
        self._metadata = {name: value for name, value in row.items() if value is not None and math.isfinite(value)}
        values = {f"selected/{name}": value for name, value in self._metadata.items()}
        self._news.put(_log({"train/global_step": self._metadata["step"], **values}))

    def results(self, points: Sequence[ScalePoint], samples: Sequence[Sequence[Any]], steering: Path) -> None:
        curve = curve_records(points)
        self._news.put(_table("curve/points", curve.columns, curve.rows))
        for chart in curve.charts:
            self._news.put(_chart(chart.key, chart.title, chart.rows))
        self._news.put(lambda run: run.summary.update(curve.summary))
        if samples:
            self._news.put(_table("samples", SAMPLE_COLUMNS, samples))
        name = re.sub(r"[^\w.-]", "-", f"steering-{self._name}")[:128]
        self._news.put(_artifact(name, steering.resolve(), self._metadata))

    def close(self, code: int = 0) -> None:
        if self._closed or not self._thread.is_alive():
            return
        self._closed = True
        self._news.put(code)
        # Whoever stopped a run, or has to mend it, is not kept waiting for what follows a server's silence.
        longest = 2 * self._timeout + SLACK if code == 0 else self._timeout + 2 * PATIENCE
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(f"waiting for W&B, {longest:.0f} seconds at most")
            self._thread.join(longest - PATIENCE)
        if self._thread.is_alive():
            self._warn(f"W&B: did not end within {longest:.0f} s; what it has is in {self._init['dir']}/wandb")

    # In the thread

    def _serve(self) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        if reason := _failure(self._begin):
            self._go_offline(reason)
        while callable(record := self._news.get()):
            self._records.append(record)
            self._tell(record)
        self._end(record)
        _failure(_leave)

    def _begin(self) -> None:
        mode = own_mode() if self._mode == "auto" else self._mode
        if mode == "online" and not has_key():  # else W&B would ask for one
            return self._go_offline("" if self._mode == "auto" else "there is no API key")
        if mode == "offline":
            return self._go_offline()
        self._run = self._open(mode)
        self._say(f"W&B: {self._run.url or f'{mode}, as its own settings say'}")

    def _open(self, mode: Any) -> wandb.Run:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # a remote's address may hold a password
            x_disable_meta=without_credentials(sys.argv) != sys.argv,  # it has the command line
            x_transaction_log_flush_interval=2.0,  # seconds: what is lost at most where everything is killed
            init_timeout=self._timeout,
            finish_timeout=self._timeout,
            finish_timeout_raises=True,
        )
        run = wandb.init(mode=mode, resume="allow", reinit="create_new", settings=settings, **self._init)
        run.define_metric("train/global_step")
        for pattern in AXES:
            run.define_metric(pattern, step_metric="train/global_step")
        return run

    def _tell(self, record: Record) -> None:
        run = self._run
        if run is None or not (reason := _failure(lambda: record(run))):
            return
        if run.offline:
            self._warn(f"W&B refused a record: {reason}")
        else:
            self._go_offline(reason)

    def _go_offline(self, reason: str = "") -> None:
        """Begin an offline run with all that was told so far, in place of one that failed for a reason."""

        def begin() -> None:
            if reason:
                _leave()  # that run: W&B's process takes an id once
            self._run = self._open("offline")

        self._run = None
        if failure := _failure(begin):
            return self._warn(f"W&B: {reason or failure}; this run is not tracked")
        if reason:
            self._warn(f"W&B: {reason}; the run is kept offline, send it later with: wandb sync {self._folder}")
        else:
            self._say(f"W&B: offline run, to be sent with: wandb sync {self._folder}")
        for record in self._records:
            self._tell(record)

    def _end(self, code: int) -> None:
        if not (reason := self._finish(code)) or self._run is None:
            return
        if self._run.offline:
            return self._warn(f"W&B: {reason}; what there is can be sent with: wandb sync {self._folder}")
        self._go_offline(reason)  # its file lacks the artifacts that the server did not take
        self._end(code)

    def _finish(self, code: int) -> str:
        run = self._run
        return "" if run is None else _failure(lambda: run.finish(exit_code=code))

    @property
    def _folder(self) -> str:
        """What W&B keeps of the run; ``wandb sync`` sends it."""
        return "" if self._run is None else str(Path(self._run.settings.sync_dir).resolve())


class ScalarWriter(KVWriter):
    """SB3 logger output: hands the finite numbers of each record on.

    Args:
        put: takes them.
        decisions: of one step.
    """

    def __init__(self, put: Callable[[dict[str, float]], None], decisions: int):
        self._put = put
        self._decisions = decisions

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self._put(scalars({"step": step, **key_values}, self._decisions))

    def close(self) -> None:
        """Nothing is held here."""


def run_id(folder: Path) -> str:
    """The id under which W&B knows the run of a folder: the one it was given before, that of a sweep, or a new one."""
    path = folder / ID_FILE
    given = os.environ.get("WANDB_RUN_ID")
    if given is None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))["id"]
    own = given or secrets.token_hex(4)
    write_text(path, json.dumps({"id": own}) + "\n")
    return own


def _leave() -> None:
    """End W&B's process, which writes to the disk what it still holds."""
    import wandb

    wandb.teardown()


def own_mode() -> str:
    """The mode that W&B's environment or settings state."""
    import wandb

    return wandb.setup().settings.mode


def has_key() -> bool:
    """Whether W&B has credentials for its server, without asking anyone."""
    import wandb

    return wandb.login(prompt=False, verify=False)


def _log(values: Mapping[str, Any]) -> Record:
    return lambda run: run.log(dict(values))


def _table(key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Record:
    return lambda run: run.log({key: _wandb_table(columns, rows)})


def _chart(key: str, title: str, rows: Sequence[Sequence[Any]]) -> Record:
    def log(run: wandb.Run) -> None:
        import wandb

        x, y, stroke = columns = ("scale", "value", "measure")
        run.log({key: wandb.plot.line(_wandb_table(columns, rows), x, y, stroke=stroke, title=title)})

    return log


def _wandb_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> wandb.Table:
    import wandb

    return wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)


def _artifact(name: str, folder: Path, metadata: Mapping[str, Any]) -> Record:
    def log(run: wandb.Run) -> None:
        import wandb

        artifact = wandb.Artifact(name, type="steering", metadata=dict(metadata))
        # The folder stays as it is, so nothing is copied: neither for the upload nor into a cache.
        artifact.add_dir(str(folder), policy="immutable", skip_cache=True)
        run.log_artifact(artifact, aliases=["best", "latest"])

    return log


def _failure(work: Callable[[], object]) -> str:
    """Why some work of W&B's failed, in one line; empty if it did not. Whatever W&B raises, training goes on."""
    try:
        work()
    except Exception as error:  # noqa: BLE001
        return " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ""
