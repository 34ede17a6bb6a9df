"""Publishing and fetching a steering: the Hub's own client against a server on loopback, and W&B's artifacts."""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_llama

from dso import Steering
from dso.steering.config import SteeringError

CONFIG, TENSORS, CARD = "dso_config.json", "dso_model.safetensors", "README.md"


@pytest.fixture
def steering() -> Steering:
    made = Steering.for_model(tiny_llama(), groups=("female", "male"), base_model="owner/base")
    for value in made.tensors().values():
        value.data = torch.randn(value.shape)
    return made


# ---------------------------------------------------------------- the Hub


class Hub:
    """As much of the Hub as its client needs to publish and fetch a repository, on loopback.

    Attributes:
        repositories: branch -> file -> content, by name.
        asked: method and path of each request.
        refuse: answer everything with 403.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.refuse = False
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(f"{method} {path}")
        if self.refuse:
            return 403, {"X-Error-Message": "no right to write here"}, b"{}"
        if path == "/api/validate-yaml":  # of a card's front matter
            return 200, {}, b'{"errors": [], "warnings": []}'
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            there = name in self.repositories
            self.repositories.setdefault(name, {"main": {}})
            return 409 if there else 200, {}, json.dumps({"url": f"{self.url}/{name}"}).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self.repositories[found[1]].setdefault(found[2], {})
            return 200, {}, b"{}"
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {}, json.dumps({"files": files}).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[found[1]][found[2]][line["value"]["path"]] = content
            answer = {"commitOid": "c" * 40, "commitUrl": f"{self.url}/{found[1]}/commit/{'c' * 40}"}
            return 200, {}, json.dumps(answer).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            files = self._branch(found[1], found[2]).items()
            rows = [{"type": "file", "path": f, "size": len(data), "oid": _tag(data)} for f, data in files]
            return 200, {}, json.dumps(rows).encode()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._about(found[1], found[2] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            content = self._branch(found[1], found[2])[found[3]]
            return 200, {"ETag": f'"{_tag(content)}"', "X-Repo-Commit": found[2]}, content
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def _branch(self, name: str, commit: str) -> dict[str, bytes]:
        return next(files for branch, files in self.repositories[name].items() if _commit(branch) == commit)

    def _about(self, name: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        branches = self.repositories.get(name)
        if branches is None or revision not in branches:
            code = "RepoNotFound" if branches is None else "RevisionNotFound"
            return 404, {"X-Error-Code": code, "X-Error-Message": "not there"}, b"{}"
        about = {"id": name, "sha": _commit(revision), "siblings": [{"rfilename": file} for file in branches[revision]]}
        return 200, {}, json.dumps(about | {"private": False, "tags": [], "downloads": 0, "likes": 0}).encode()


def _tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _commit(branch: str) -> str:
    return hashlib.sha1(branch.encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = hub.answer(self.command, self.path.partition("?")[0], body)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_POST = do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """The test's output is its own."""

    return Handler


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_of-a-test")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.close()


def test_a_steering_goes_to_the_hub_and_comes_back(hub, steering, monkeypatch):
    from huggingface_hub import constants

    place = steering.push_to_hub("me/mine", card="# Mine\n", private=True)
    assert place == f"{hub.url}/me/mine"
    assert sorted(hub.repositories["me/mine"]["main"]) == sorted([CONFIG, TENSORS, CARD])
    again = Steering.from_pretrained("me/mine")
    assert again.config == steering.config and again.card == "# Mine\n"
    assert all(torch.equal(value, steering.tensors()[key]) for key, value in again.tensors().items())
    assert again.push_to_hub("me/mine", revision="v2") == place  # with the card that it came with
    assert hub.repositories["me/mine"]["v2"] == hub.repositories["me/mine"]["main"]
    assert Steering.from_pretrained("me/mine", revision="v2").key == again.key
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert Steering.from_pretrained("me/mine").config == steering.config
    assert len(hub.asked) == asked  # what was fetched is at hand without a network
    with pytest.raises(SteeringError, match="me/mine: not uploaded: .*offline"):
        again.push_to_hub("me/mine")


def test_what_the_hub_refuses_is_one_line(hub, steering):
    with pytest.raises(SteeringError, match="me/mine: a steering is published with a card"):
        steering.push_to_hub("me/mine")
    assert hub.asked == []
    hub.refuse = True
    with pytest.raises(SteeringError, match="me/mine: not uploaded: .*403") as caught:
        steering.push_to_hub("me/mine", card="# Mine")
    assert "\n" not in str(caught.value)
    hub.refuse = False
    with pytest.raises(SteeringError, match="me/other: no such folder, and not to be had from the Hub: .*404"):
        Steering.from_pretrained("me/other")
    with pytest.raises(SteeringError, match="not uploaded: .*repo"):
        steering.push_to_hub("a/b/c", card="# Mine")


def test_a_card_goes_where_its_steering_goes(steering, tmp_path):
    steering.save_pretrained(tmp_path / "a", "# Mine\n")
    Steering.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / CARD).read_text() == "# Mine\n"
    Steering.from_pretrained(tmp_path / "b").save_pretrained(tmp_path / "b", "")
    assert (tmp_path / "b" / CARD).read_text() == ""


# ---------------------------------------------------------------- Weights & Biases


class Entry:
    """A file of an artifact, as wandb's ArtifactManifestEntry has it."""

    def __init__(self, name: str, source: Path, ref: str | None = None):
        self.name, self.source, self.ref, self.size = name, source, ref, source.stat().st_size

    def download(self, root: str | None = None) -> str:
        (Path(root or ".") / self.name).write_bytes(self.source.read_bytes())
        return str(Path(root or ".") / self.name)


@pytest.fixture
def artifacts(steering, tmp_path, monkeypatch) -> dict[str, Any]:
    """Artifacts by their full name; asked for as W&B's own interface is, which is looked at here."""
    import wandb
    from wandb.sdk.artifacts.artifact import Artifact
    from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry

    steering.save_pretrained(tmp_path / "logged", "# Mine\n")
    (tmp_path / "logged" / "evil.pkl").write_bytes(b"never fetched")
    kept: dict[str, Any] = {}

    def logged(**refs: str) -> Any:
        entries = {path.name: Entry(path.name, path, refs.get(path.stem)) for path in (tmp_path / "logged").iterdir()}
        return SimpleNamespace(
            name="steering-mine:v3", digest="0123/..", manifest=SimpleNamespace(entries=entries), get_entry=entries.get
        )

    kept["me/dso/steering-mine:v3"] = logged()
    kept["me/dso/linked:v0"] = logged(dso_model="file:///etc/passwd")
    kept["me/dso/other:v0"] = logged()
    del kept["me/dso/other:v0"].manifest.entries[CONFIG]
    kept["me/dso/linked:v0"].digest, kept["me/dso/other:v0"].digest = "linked", "other"
    real = inspect.signature(wandb.Api.artifact)
    assert {"manifest", "get_entry", "digest", "name"} <= set(dir(Artifact))
    assert {"ref", "size"} <= set(inspect.signature(ArtifactManifestEntry).parameters)
    assert "root" in inspect.signature(ArtifactManifestEntry.download).parameters

    class Api:
        def artifact(self, *args: Any, **kwargs: Any) -> Any:
            name = real.bind(self, *args, **kwargs).arguments["name"]
            if name not in kept:
                raise wandb.errors.CommError(f"artifact {name!r} not found\nin a project")
            return kept[name]

    monkeypatch.setattr(wandb, "Api", Api)
    monkeypatch.setenv("DSO_CACHE", str(tmp_path / "cache"))
    return kept


def test_a_steering_is_loaded_from_an_artifact(artifacts, steering, tmp_path):
    again = Steering.from_pretrained("wandb:me/dso/steering-mine:v3")
    assert again.config == steering.config and again.card == "# Mine\n"
    (place,) = (tmp_path / "cache" / "artifacts").iterdir()
    assert sorted(path.name for path in place.iterdir()) == sorted([CONFIG, TENSORS, CARD])
    artifacts["me/dso/steering-mine:v3"].get_entry = None
    assert Steering.from_pretrained("wandb:me/dso/steering-mine:v3").key == again.key  # kept, not fetched again


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wandb:steering-mine", "expected wandb:entity/project/name:version"),
        ("wandb:a/b/c/d:v1", "expected wandb:entity/project/name:version"),
        ("wandb:me/dso/no-such:v0", "not to be had from Weights & Biases: artifact 'me/dso/no-such:v0' not found$"),
        ("wandb:me/dso/other:v0", "no steering there .no dso_config.json"),
        ("wandb:me/dso/linked:v0", "dso_model.safetensors is a reference to file:///etc/passwd, expected the file"),
    ],
)
def test_an_artifact_that_is_no_steering(artifacts, tmp_path, source, message):
    with pytest.raises(SteeringError, match=message):
        Steering.from_pretrained(source)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_wandb_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SteeringError, match=r"wandb is not installed \(pip install wandb\)"):
        Steering.from_pretrained("wandb:me/dso/steering-mine:v3")
