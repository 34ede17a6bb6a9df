"""What the tests of tracking share: servers on loopback that W&B is pointed at, and a reader of the files it writes."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import struct
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb  # the schema of what W&B writes; it ships no reader of its own

KEY = "0123456789" * 4
BLOCK = 32768  # of the log format of LevelDB, which .wandb files have after 7 bytes of their own


# Files


@dataclass
class Logged:
    """What a ``.wandb`` file holds.

    Attributes:
        config, summary: as W&B has them at the end.
        history: one mapping a logged row.
        metrics: the definitions, by name or pattern.
        artifacts: by name.
        stats: the first value of each system metric.
    """

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)
    run: Any = None
    exit_code: int | None = None

    def scalars(self, name: str) -> list[tuple[int, float]]:
        """The logged values of one name with their steps."""
        return [(row["train/global_step"], row[name]) for row in self.history if name in row]


def records(path: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: each fragment has a CRC-32, a length and a kind (1 whole, 4 last)."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    assert struct.unpack("<H", data[4:6]) == (0xBEE1,)
    at, whole = 7, b""
    while at + 7 <= len(data):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        crc, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + length]
        if len(part) < length:  # cut off where the writer was killed
            return
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == crc
        at, whole = at + 7 + length, whole + part
        if kind in (1, 4):
            record = pb.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def read(path: Path) -> Logged:
    """Everything that a ``.wandb`` file says."""
    found = Logged()
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            _update(found.config, record.run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "summary":
            _update(found.summary, record.summary.update)
        elif kind == "history":
            row: dict[str, Any] = {}
            _update(row, record.history.item)
            found.history.append(row)
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found.artifacts[record.artifact.name] = record.artifact
        elif kind == "stats":
            found.stats = {item.key: json.loads(item.value_json) for item in record.stats.item} | found.stats
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _update(target: dict[str, Any], items: Any) -> None:
    for item in items:
        *parents, last = list(item.nested_key) or [item.key]
        place = target
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)


def offline_runs(folder: Path) -> list[Path]:
    """The ``.wandb`` files of a training run's folder, oldest first."""
    return sorted(path for path in folder.glob("wandb/*run-*/*.wandb") if not path.parent.is_symlink())


def after_a_sample(call: Callable, root: Path) -> Callable:
    """The call, once a run below a folder has a sample of W&B's system metrics, for a minute at most.

    The sampler is a process of its own: on a busy machine six steps are over before it begins.
    """

    def waiting(*arguments: Any, **options: Any) -> Any:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if any(b"memory_percent" in path.read_bytes() for path in root.rglob("*.wandb")):
                break
            time.sleep(0.1)
        return call(*arguments, **options)

    return waiting


def table(path: Path, logged: Logged, key: str) -> dict[str, Any]:
    """A logged table, as ``{"columns", "data"}``."""
    (entry,) = (row[key] for row in logged.history if key in row)
    return json.loads((path.parent / "files" / entry["path"]).read_text(encoding="utf-8"))


# Processes


def services(home: Path) -> list[str]:
    """The processes of W&B's client that were started where a folder was the home, and still run."""
    found, mark = [], f"HOME={home}".encode()
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and mark in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return [name for name in found if "wandb-core" in name]


def gone(home: Path, seconds: float = 60.0) -> bool:
    """Whether none of :func:`services` runs any more, at the latest after some seconds."""
    until = time.monotonic() + seconds
    while services(home):
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


# Servers


class Server:
    """As much of W&B's server as its client needs, on loopback; ``behaviour`` may change at any time.

    Attributes:
        behaviour: ``well``, ``hang`` (never an answer) or ``fail`` (500).
        calls: what was asked, GraphQL operations by their name.
        history: the rows that were streamed.
        runs: the ids that were asked for.
        bodies: of everything that was sent.
    """

    def __init__(self, behaviour: str = "well") -> None:
        self.behaviour = behaviour
        self.calls: dict[str, int] = defaultdict(int)
        self.history: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.artifacts: list[dict[str, Any]] = []
        self.released = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        if operation == "UpsertBucket":
            self.runs.append(variables)
            project = {"id": "cHJvag==", "name": "dso", "entity": {"id": "ZW50", "name": "me"}}
            bucket = {
                "id": "aWQ=", "name": variables["name"], "displayName": "d", "description": "", "config": "{}",
                "sweepName": None, "historyLineCount": 0, "project": project,
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "aWQ=", "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":
            self.artifacts.append(variables)
            sequence = {"id": "c2Vx", "latestArtifact": {"id": "YXJ0", "versionIndex": 0}}
            artifact = {"id": "YXJ0", "state": "COMMITTED", "artifactSequence": sequence}
            return {"createArtifact": {"artifact": artifact}}
        if operation == "Viewer":
            viewer = {"id": "dXNlcg==", "entity": "me", "username": "me", "email": "", "flags": "{}"}
            return {"viewer": viewer | {"teams": {"edges": []}}}
        return {}


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve()

        do_POST = do_PUT = do_GET

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if server.behaviour == "hang":
                server.released.wait()
                self.close_connection = True
                return
            if server.behaviour == "fail":
                return self._send({}, 500)
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/graphql":
                asked = json.loads(body)
                operation = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                server.calls[operation[1]] += 1
                return self._send({"data": server.answer(operation[1], asked.get("variables") or {})})
            if self.path.endswith("/file_stream"):
                lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
                server.history += [json.loads(line) for line in lines]
            return self._send({})

        def _send(self, value: dict[str, Any], code: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # a client that was killed
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """The test's output is its own."""

    return Handler


@contextmanager
def serving(behaviour: str) -> Iterator[Server]:
    server = Server(behaviour)
    try:
        yield server
    finally:
        server.close()


def closed_port() -> str:
    """The address of a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def clean_environment(monkeypatch: Any, home: Path, **values: str) -> None:
    """Nothing of W&B in the environment but what is given, and an empty home."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home.mkdir(exist_ok=True)
    for name, value in {"HOME": str(home), "NETRC": str(home / "none"), **values}.items():
        monkeypatch.setenv(name, value)
