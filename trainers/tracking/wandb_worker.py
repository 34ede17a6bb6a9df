"""The process that speaks to Weights & Biases: whatever W&B does, it does not happen in the process that trains.

:mod:`trainers.tracking.wandb_relay` starts this file. One JSON object a line comes in: first what :func:`start`
takes, then
records (:data:`RECORDS`), then ``{"finish": exit code}``. Out goes a line ``{"mode": mode}`` before the run is opened,
``{"ready": facts}`` after that, ``{"told": true}`` when W&B has all records and ``{"done": reason}`` when it has
finished, where the reason is empty if all is well. ``{"failed": reason}`` instead is the last word. What W&B prints
ends in the log that stderr is. Nothing is ever asked: stdin is no terminal.

When the other end closes the pipe, or is gone, the run is finished as failed.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

NICE = 5  # training comes first
LOOK = 5.0  # seconds between looks at whether the parent is still there
SPARE = 60.0  # seconds that an orphan has beyond what W&B may take to finish
GONE = 255  # the exit code of a run whose process left without a word
AXES = ("train/*", "eval/*", "rollout/*", "time/*", "selected/*")


def main() -> int:
    """Serve one run; the exit code is 0 once its last answer was given."""
    parent = os.getppid()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like an answer
    os.nice(NICE)
    messages = _messages(0, parent)
    setup = next(messages)
    threading.Thread(target=_end_with, args=(parent, setup["timeout"] + SPARE), daemon=True).start()
    import wandb

    def answer(**values: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # what an orphan was told already is still to be logged
            print(json.dumps(values), file=answers)

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, trace)
        answer(failed=_one_line(error))

    sys.excepthook = fail
    mode = setup["mode"] if setup["mode"] != "auto" else own_mode()
    answer(mode=mode)
    run = start(**setup | {"mode": mode})
    answer(ready={"folder": str(Path(run.settings.sync_dir).resolve()), "url": run.url})
    code, refused = serve(run, messages)
    answer(told=True)
    try:
        run.finish(exit_code=code)
    except TimeoutError:
        refused.append("not everything was sent in time")
    answer(done="; ".join(dict.fromkeys(refused)))
    wandb.teardown()
    return 0


def own_mode() -> str:
    """The mode that W&B's environment or settings state; ``offline`` where that would need a key and there is none."""
    import wandb

    settings = wandb.setup().settings
    return "offline" if settings.mode == "online" and not has_key(settings.base_url) else settings.mode


def start(*, mode: str, folder: str, config: dict[str, Any], timeout: float, process: int, init: dict[str, Any]) -> Any:
    """Open the run.

    Args:
        mode: ``online`` or ``offline``.
        folder: that of the training run; W&B keeps to ``wandb`` in it.
        timeout: seconds that the server has to let the run begin, and again to take the rest when it ends.
        process: whose CPU, memory and accelerators are measured.
        init: further arguments of ``wandb.init``.
    """
    import wandb

    wanted = {
        "silent": True,
        "console": "off",
        "disable_git": True,  # a remote's address may hold a password
        "save_code": False,
        "program": "dso train",
        "init_timeout": timeout,
        "finish_timeout": timeout,
        "finish_timeout_raises": True,
        "stop_fn": _ignore,  # the stop button would interrupt this process, not the one that trains
        "x_stats_pid": process,
        "x_transaction_log_flush_interval": 2.0,  # seconds: what is lost at most if this process is killed
    }
    known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    run = wandb.init(dir=folder, config=config, mode=mode, resume="allow", reinit="create_new", settings=known, **init)
    run.define_metric("train/global_step")
    for pattern in AXES:
        run.define_metric(pattern, step_metric="train/global_step")
    return run


def serve(run: Any, messages: Iterator[dict[str, Any]]) -> tuple[int, list[str]]:
    """Log what comes in until the run is to be finished; the exit code to finish it with, and what was refused."""
    refused: list[str] = []
    for message in messages:
        ((kind, value),) = message.items()
        if kind == "finish":
            return value, refused
        try:
            RECORDS[kind](run, value)
        except (TypeError, ValueError, FileNotFoundError) as error:
            if run.settings.mode != "offline":  # it may be the server's fault, so everything is to be kept offline
                raise
            refused.append(f"{kind} was refused: {_one_line(error)}")
            print(refused[-1], file=sys.stderr)
    return GONE, refused


def has_key(base_url: str) -> bool:
    """Whether W&B will find credentials for its server without asking."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).hostname or ""
    for name in [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]:
        try:
            found = netrc.netrc(os.path.expanduser(name)).hosts.get(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return True
    return False


def _log(run: Any, values: dict[str, float]) -> None:
    run.log(values)


def _summary(run: Any, values: dict[str, Any]) -> None:
    run.summary.update(values)


def _table(run: Any, table: dict[str, Any]) -> None:
    run.log({table["key"]: _wandb_table(table)})


def _line(run: Any, line: dict[str, Any]) -> None:
    import wandb

    chart = wandb.plot.line(_wandb_table(line), line["x"], line["y"], stroke=line["stroke"], title=line["title"])
    run.log({line["key"]: chart})


def _artifact(run: Any, wanted: dict[str, Any]) -> None:
    import wandb

    artifact = wandb.Artifact(wanted["name"], type=wanted["type"], metadata=wanted["metadata"])
    # The folder stays as it is, so nothing is copied: neither for the upload nor into a cache.
    artifact.add_dir(wanted["folder"], policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=wanted["aliases"])


RECORDS = {"log": _log, "summary": _summary, "table": _table, "line": _line, "artifact": _artifact}


def _wandb_table(table: dict[str, Any]) -> Any:
    import wandb

    return wandb.Table(columns=table["columns"], data=table["rows"], allow_mixed_types=True)


def _messages(pipe: int, parent: int) -> Iterator[dict[str, Any]]:
    """The messages until the pipe ends, or the parent does while another process still holds the pipe open."""
    lines: queue.Queue[bytes | None] = queue.Queue(maxsize=64)

    def read() -> None:
        rest = b""
        while chunk := os.read(pipe, 65536):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=LOOK)
        except queue.Empty:
            if os.getppid() != parent:
                return
            continue
        if line is None:
            return
        yield json.loads(line)


def _end_with(parent: int, seconds: float) -> None:
    """End this process, hung or not, some time after its parent did."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    time.sleep(seconds)
    os._exit(1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _ignore() -> None:
    pass


if __name__ == "__main__":
    raise SystemExit(main())
