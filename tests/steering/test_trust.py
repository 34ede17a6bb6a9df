"""A checkpoint of unknown origin: refused, or equal to what was written; never a crash, a flood or a file elsewhere."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accidents import edited, sign
from safetensors.torch import save
from tiny import small_set, tiny_llama

from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.model import Steering

CONFIG, TENSORS, CARD = "dso_config.json", "dso_model.safetensors", "README.md"
EDITS = 1000


@pytest.fixture
def steering() -> Steering:
    made = Steering(SteeringConfig(sites={"model.norm": 4, "model.layers.0.norm": 4}, groups=("female", "male")))
    for value in made.tensors().values():
        value.data = torch.randn(value.shape)
    return made


@pytest.fixture
def folder(steering, tmp_path) -> Path:
    steering.save_pretrained(tmp_path / "inside" / "steering", "# card\n")
    return tmp_path / "inside" / "steering"


def peak() -> int:
    """Most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_thousand_accidents_are_refused_or_change_nothing(folder, steering):
    drawn, before, started, refused = random.Random(5), peak(), time.process_time(), 0
    whole = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS)}
    for _ in range(EDITS):
        name = drawn.choice([CONFIG, TENSORS])
        (folder / name).write_bytes(edited(whole[name], drawn))
        try:
            again = Steering.from_pretrained(folder)
        except SteeringError as error:
            assert name in str(error) and len(str(error).splitlines()) == 1
            refused += 1
        else:
            assert again.config == steering.config
            assert all(torch.equal(value, steering.tensors()[key]) for key, value in again.tensors().items())
        (folder / name).write_bytes(whole[name])
    assert refused > 0.9 * EDITS
    assert peak() - before < 64 << 20
    assert time.process_time() - started < 60
    assert sorted(path.name for path in folder.iterdir()) == sorted([CARD, CONFIG, TENSORS])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_harm_that_is_signed_is_refused_or_finite_numbers(folder):
    drawn, before = random.Random(6), peak()
    data, config = (folder / TENSORS).read_bytes(), (folder / CONFIG).read_bytes()
    odd = [
        None,
        True,
        -1,
        2**63,
        10**400,
        1e308,
        "",
        "\0",
        "../x",
        [],
        [[]],
        {},
        {"a": {}},
        [{"a": [1]}],
        "affine" * 99,
    ]
    for number in range(300):
        (folder / TENSORS).write_bytes(edited(data, drawn) if number % 2 else data)
        (folder / CONFIG).write_bytes(config)
        key = drawn.choice([key for key in json.loads(config) if not key.endswith("sha256")])
        sign(folder / CONFIG, folder / TENSORS, **({} if number % 2 else {key: drawn.choice(odd)}))
        try:
            again = Steering.from_pretrained(folder)
        except SteeringError:
            continue
        assert all(value.isfinite().all() and value.shape == (4,) for value in again.tensors().values())
    assert peak() - before < 64 << 20


def test_nesting_is_no_way_in(folder):
    for depth in (50, 300, 900):
        nested: object = 1
        for _ in range(depth):
            nested = [nested]
        record = json.loads((folder / CONFIG).read_text("utf-8"))
        (folder / CONFIG).write_text(json.dumps(record | {"scale_curve": nested}), "utf-8")
        with pytest.raises(SteeringError, match=CONFIG):
            Steering.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../../outside", "/outside", "a/../../b", "C:\\x", "a\nb"])
def test_a_name_of_a_site_is_no_place(tmp_path, name):
    config = SteeringConfig(sites={name: 2})
    made = Steering(config)
    made.save_pretrained(tmp_path / "a" / "b" / "steering")
    again = Steering.from_pretrained(tmp_path / "a" / "b" / "steering")
    again.save_pretrained(tmp_path / "a" / "b" / "again")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(f"a/b/{place}/{file}" for place in ("steering", "again") for file in (CONFIG, TENSORS, CARD))
    with pytest.raises(SteeringError, match="the model has no module"):
        again.attach(tiny_llama())


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "nowhere", "itself", "huge"])
def test_what_is_no_file_is_not_waited_for(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":  # with nothing on the disk
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        path.symlink_to({"device": "/dev/zero", "nowhere": "nothing", "itself": name}[kind])
    before, started = peak(), time.process_time()
    with pytest.raises(SteeringError):
        Steering.from_pretrained(folder)
    assert peak() - before < 64 << 20 and time.process_time() - started < 5


def test_a_linked_file_is_read_as_the_hub_keeps_them(folder, steering):
    for name in (CONFIG, TENSORS, CARD):
        (folder.parent / f"blob-{name}").write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(f"../blob-{name}")
    assert Steering.from_pretrained(folder).config == steering.config


def test_a_few_bytes_cannot_ask_for_gigabytes(folder):
    header = json.dumps({"model.norm.a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    before = peak()
    for data in (
        (2**62).to_bytes(8, "little") + bytes(64),
        len(header).to_bytes(8, "little") + header,
        save({"model.norm.a": torch.zeros(4)})[:-1],
    ):
        (folder / TENSORS).write_bytes(data + bytes(max(0, 512 - len(data))))
        sign(folder / CONFIG, folder / TENSORS)
        with pytest.raises(SteeringError, match="not a safetensors file|damaged"):
            Steering.from_pretrained(folder)
    assert peak() - before < 64 << 20


# ---------------------------------------------------------------- no network

ALONE = """
import socket

def refuse(*args, **kwargs):
    raise SystemExit(f"a connection was wanted: {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
socket.create_connection = socket.socket.sendto = refuse

from dso import Backbone, Steering, read_jsonl
from dso.evaluation.evaluator import Evaluator

backbone = Backbone.load("model")
steering = Steering.from_pretrained("steering")
with steering.on(backbone.model, 0.5) as handle:
    print("said", repr(backbone.generate("The doctor is named", max_new_tokens=4)))
    evaluator = Evaluator(backbone, read_jsonl("set.jsonl"), handle)
    print("points", len(evaluator.curve([0.0, 0.5])))
"""


def test_nothing_is_asked_of_a_network(tmp_path, model_folder):
    (tmp_path / "model").symlink_to(model_folder)
    small_set(("test",)).write_jsonl(tmp_path / "set.jsonl")
    Steering.for_model(tiny_llama(), groups=("female", "male")).save_pretrained(tmp_path / "steering")
    own = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=tmp_path, env=own | {"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "points 2"
