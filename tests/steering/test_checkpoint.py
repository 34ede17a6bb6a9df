"""The checkpoint: read as it was written, to the bit, or refused; what stood before stands after an error."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import shutil
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures import tiny, tokens
from safetensors.torch import save
from tiny import tiny_llama

from dso import files
from dso.steering import checkpoint, signed
from dso.steering.checkpoint import read_checkpoint, write_checkpoint
from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.fingerprint import fingerprint
from dso.steering.model import Steering

CONFIG, TENSORS, CARD = "dso_config.json", "dso_model.safetensors", "README.md"
FACTS = {
    "base_model": "owner/näme",
    "revision": "abc",
    "groups": ("female", "male"),
    "target": (0.5, 0.5),
    "scale_range": (0.0, 1.2),
    "scale_curve": ({"scale": 0.0, "bias": 0.3, "kl": 1e-05}, {"scale": 1.0, "bias": 0.01, "kl": None}),
}


@pytest.fixture(scope="module")
def steering() -> Steering:
    made = Steering.for_model(tiny_llama(), operator="low_rank", rank=2, **FACTS)
    generator = torch.Generator().manual_seed(0)
    for value in made.tensors().values():
        value.data = torch.randn(value.shape, generator=generator)
    return made


@pytest.fixture
def folder(steering, tmp_path) -> Path:
    steering.save_pretrained(tmp_path / "steering", "# card\n")
    return tmp_path / "steering"


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class Counting:
    """A function that counts its calls."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def rewrite(folder: Path, **changes) -> None:
    """A config with other values and a digest that fits: what a wrong writer would leave, not damage."""
    record = json.loads((folder / CONFIG).read_text("utf-8"))
    del record["config_sha256"]
    record |= changes
    record = {key: value for key, value in record.items() if value is not ...}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    text = json.dumps(record | {"config_sha256": digest}, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, "utf-8")


# ---------------------------------------------------------------- there and back


def test_what_is_read_is_what_was_written(steering, folder):
    again = Steering.from_pretrained(folder)
    assert again.config == steering.config
    assert list(again.config.sites) == list(steering.config.sites)
    assert again.config.scale_curve == FACTS["scale_curve"]
    assert list(again.tensors()) == list(steering.tensors())
    for key, value in steering.tensors().items():
        assert torch.equal(again.tensors()[key], value)
        assert not again.tensors()[key].requires_grad
    assert Steering.from_pretrained(str(folder)).config == steering.config


@torch.no_grad()
@pytest.mark.parametrize("operator", ["affine", "bias", "low_rank"])
@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "Gemma3"])
def test_a_loaded_steering_gives_equal_outputs(architecture, operator, tmp_path):
    model, ids = tiny(architecture), torch.tensor([tokens(6, 1)])
    made = Steering.for_model(model, operator=operator, rank=3 if operator == "low_rank" else None)
    for value in made.tensors().values():
        value.data = 0.2 * torch.randn(value.shape)
    made.save_pretrained(tmp_path / "s")
    with made.on(model, 0.5):
        wanted = model(ids).logits
    again = Steering.from_pretrained(tmp_path / "s")
    with again.on(tiny(architecture), 0.5) as handle:
        assert handle.scale == 0.5
        other = tiny(architecture)
    with again.on(other, 0.5):
        assert torch.equal(other(ids).logits, wanted)


def test_the_folder_by_hand(tmp_path):
    config = SteeringConfig(sites={"norm": 2}, base_model="m", groups=("a", "b"), target=(0.25, 0.75))
    tensors = {"norm.a": torch.tensor([1.0, 2.0], dtype=torch.float64), "norm.b": torch.tensor([0.5, -0.5])}
    write_checkpoint(tmp_path / "s", config, tensors, "card")
    assert sorted(contents(tmp_path / "s")) == [CARD, CONFIG, TENSORS]
    data = (tmp_path / "s" / TENSORS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert {key: header[key]["dtype"] for key in ("norm.a", "norm.b")} == {"norm.a": "F32", "norm.b": "F32"}
    assert sorted(torch.frombuffer(bytearray(data[8 + size :]), dtype=torch.float32).tolist()) == [-0.5, 0.5, 1.0, 2.0]
    record = json.loads((tmp_path / "s" / CONFIG).read_text())
    digest = record.pop("config_sha256")
    assert digest == hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    assert record == {
        "format_version": 2, "operator": "affine", "rank": None, "sites": {"norm": 2}, "fingerprint": {},
        "base_model": "m", "revision": None, "groups": ["a", "b"], "target": [0.25, 0.75],
        "scale_range": [0.0, 1.0], "scale_curve": [],
        "scoring": {"length_normalised": False, "date": "2024-07-26", "template": ""},
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    assert (tmp_path / "s" / CARD).read_text() == "card"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").iterdir()}
    assert modes == {0o644}


def test_nothing_is_unpickled(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, fail)
    assert Steering.from_pretrained(folder).config.rank == 2


def test_a_pickle_in_the_tensors_place_is_refused(folder):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(folder / "exploded"),)

    torch.save({"x": Bomb(), "y": torch.zeros(1000)}, folder / TENSORS)  # of a size that would do
    with pytest.raises(SteeringError, match="damaged"):
        Steering.from_pretrained(folder)
    rewrite(folder, tensors_sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())
    with pytest.raises(SteeringError, match="not a safetensors file"):
        Steering.from_pretrained(folder)
    assert not (folder / "exploded").exists()


def test_the_fingerprint_knows_weights_and_names():
    site, ones = "model.norm", b"\x80\x3f" * 16  # sixteen ones of bfloat16
    model = tiny_llama()
    digest = hashlib.sha256(site.encode() + b"weight" + ones).hexdigest()[:16]
    assert fingerprint(model, [site]) == {site: digest}
    assert fingerprint(model, ["model.layers.0.input_layernorm"])["model.layers.0.input_layernorm"] != digest
    model.model.norm.weight.data[5] = 1.5
    assert fingerprint(model, [site]) == {site: digest}  # .data goes past autograd's count of changes: read once
    with torch.no_grad():
        model.model.norm.weight[6] = 1.5
    assert fingerprint(model, [site]) != {site: digest}


@pytest.mark.parametrize("sites", [["norms"], ["attention"]])
def test_a_model_is_known_in_the_dtype_it_is_loaded_in(sites):
    """Weights that neither bfloat16 nor float16 holds exactly."""

    def loaded(dtype: torch.dtype):
        model = tiny_llama(seed=3)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.01 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        return model.to(dtype)

    for trained in (torch.float32, torch.bfloat16, torch.float16):
        steering = Steering.for_model(loaded(trained), sites=sites)
        for used in {torch.float32, trained, *([torch.bfloat16, torch.float16] if trained is torch.float32 else [])}:
            steering.attach(loaded(used)).detach()
    steering, other = Steering.for_model(loaded(torch.float32), sites=sites), loaded(torch.bfloat16)
    with torch.no_grad():
        next(iter(other.model.layers[1].self_attn.k_proj.parameters())).mul_(1.05)
        other.model.layers[1].input_layernorm.weight.mul_(1.05)
    with pytest.raises(SteeringError, match=r"weights of module 'model.layers.1.*check=False"):
        steering.attach(other)
    steering.attach(other, check=False).detach()


def test_a_checkpoint_of_format_1_still_fits_its_model(folder, steering):
    digest = hashlib.sha256()
    for site in sorted(steering.config.sites):
        digest.update(site.encode() + b"weight" + b"\x00\x00\x80\x3f" * 16)  # float32 ones
    rewrite(folder, format_version=1, fingerprint=digest.hexdigest())
    again = Steering.from_pretrained(folder)
    assert again.config.base_id == digest.hexdigest()[:16]
    again.attach(tiny_llama()).detach()
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight[0] = 2.0
    with pytest.raises(SteeringError, match="not the ones trained on"):
        again.attach(other)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_any_flipped_bit_is_found(folder, name):
    path = folder / name
    data = path.read_bytes()
    drawn = random.Random(0)
    places = {*range(24), *range(len(data) - 80, len(data)), *drawn.sample(range(len(data)), 250)}
    for place in sorted(places):
        changed = bytearray(data)
        changed[place] ^= 1 << drawn.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(SteeringError, match=r"dso_(config|model)\."):
            Steering.from_pretrained(folder)
    path.write_bytes(data)
    Steering.from_pretrained(folder)


def test_bits_all_over_a_small_config(tmp_path):
    config = SteeringConfig(operator="scale", sites={"n": 1}, scale_curve=({"kl": 1e-05},))
    write_checkpoint(tmp_path, config, {"n.a": torch.ones(1)})
    path = tmp_path / CONFIG
    data = path.read_bytes()
    read_checkpoint(tmp_path)
    for bit in range(0, 8 * len(data), 5):  # every byte, each in one or two of its bits
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(SteeringError):
            read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_any_truncation_is_found(folder, name):
    path = folder / name
    data = path.read_bytes()
    for size in {0, 1, 7, 8, 9, *range(0, len(data), 97), len(data) - 1}:
        path.write_bytes(data[:size])
        with pytest.raises(SteeringError, match=r"dso_(config|model)\."):
            Steering.from_pretrained(folder)
    path.write_bytes(data + b"\n")
    with pytest.raises(SteeringError):
        Steering.from_pretrained(folder)


def test_the_same_values_in_other_bytes_are_an_edit(folder):
    text = (folder / CONFIG).read_text("utf-8")
    for other in (text.replace("1e-05", "1E-05"), text.replace("\n", "\r\n"), json.dumps(json.loads(text))):
        assert other != text and json.loads(other) == json.loads(text)
        (folder / CONFIG).write_bytes(other.encode())
        with pytest.raises(SteeringError, match="damaged or edited"):
            Steering.from_pretrained(folder)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(SteeringError, match=name.replace(".", "[.]")):
        Steering.from_pretrained(folder)


def test_a_missing_card_does_no_harm(folder):
    whole = Steering.from_pretrained(folder)
    (folder / CARD).unlink()
    bare = Steering.from_pretrained(folder)
    assert bare.config == whole.config
    assert all(torch.equal(value, whole.tensors()[key]) for key, value in bare.tensors().items())


def test_tensors_of_another_steering_are_refused(folder, tmp_path):
    Steering.for_model(tiny_llama(), operator="low_rank", rank=2, **FACTS).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / TENSORS, folder / TENSORS)
    with pytest.raises(SteeringError, match=r"dso_model.safetensors: damaged \(its SHA-256"):
        Steering.from_pretrained(folder)


# ---------------------------------------------------------------- whole, but not to be used


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 3}, "format 3 is newer than 2, the one this dso reads; upgrade dso"),
        ({"format_version": ...}, "states no format_version"),
        ({"format_version": True}, "states no format_version"),
        ({"format_version": 0}, "states no format_version"),
        ({"colour": 1}, "has the unknown key 'colour'"),
        ({"operator": ...}, "lacks the key 'operator'"),
        ({"tensors_sha256": ...}, "lacks the key 'tensors_sha256'"),
        ({"sites": {}}, "needs at least one site"),
        ({"sites": ["model.norm"]}, "needs at least one site, found"),
        ({"sites": {"model.norm": "16"}}, "site 'model.norm' has width '16', expected a whole number"),
        (
            {"sites": {"model.norm": 16}, "fingerprint": {}},
            r"has the unknown 'model.layers.0.input_layernorm.b' \(12 such keys\)",
        ),
        ({"operator": "no-such"}, "operator kind is 'no-such', expected one of affine"),
        ({"operator": "affine"}, "'affine' with rank 2"),
        ({"rank": "2"}, "rank is '2', expected 1 to 16"),
        ({"rank": 3}, r"has shape \(16, 2\), expected \(16, 3\)"),
        ({"scale_range": [0.5, 1.0]}, r"scale_range is \[0.5, 1.0\], expected \[low, high\] with 0 between"),
        ({"scale_range": [0.0]}, "scale_range is"),
        ({"scale_range": [0.0, math.nan]}, "scale_range must be finite numbers"),
        ({"scale_range": 1}, "scale_range must be a list, found 1"),
        ({"target": [1.0]}, "1 shares in the target of 2 groups"),
        ({"base_model": None}, "base_model must be a string, found None"),
        ({"revision": 3}, "revision must be a string or null"),
        ({"scale_range": [0, 10**400]}, "scale_range must be finite numbers"),
        ({"groups": ["a", 2]}, "groups must be strings, found 2"),
        ({"scale_curve": [1.0]}, "scale_curve must be rows with names, found 1.0"),
    ],
)
def test_configs_that_cannot_be_used(folder, changes, message):
    rewrite(folder, **changes)
    with pytest.raises(SteeringError, match=message) as caught:
        Steering.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_no_numbers_are_not_read(folder, steering, value):
    tensors = {key: v.detach().clone() for key, v in steering.tensors().items()}
    tensors["model.norm.b"][3] = value
    (folder / TENSORS).write_bytes(save(tensors))
    rewrite(folder, tensors_sha256=hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest())
    with pytest.raises(SteeringError, match="'model.norm.b' is not of finite float32 numbers"):
        Steering.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", "{}", "{" * 100_000, "\xff"])
def test_what_is_no_config(folder, text):
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(SteeringError, match=CONFIG):
        Steering.from_pretrained(folder)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_not_written(folder, steering, value):
    before = contents(folder.parent)
    tensors = {key: v.detach().clone() for key, v in steering.tensors().items()}
    tensors["model.norm.b"][3] = value
    with pytest.raises(SteeringError, match="'model.norm.b' is not finite; nothing was saved"):
        write_checkpoint(folder, steering.config, tensors)
    with pytest.raises(SteeringError, match="nothing was saved"):
        write_checkpoint(folder.parent / "new", steering.config, tensors)
    assert contents(folder.parent) == before
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
@pytest.mark.parametrize("at", range(3), ids=["tensors", "config", "card"])
def test_an_error_while_writing_leaves_the_old_folder(folder, steering, monkeypatch, at, error):
    before = contents(folder.parent)
    left = [at]
    fsync = os.fsync

    def fail(descriptor):
        if not left[0]:
            raise error
        left[0] -= 1
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(type(error)):
        Steering.for_model(tiny_llama()).save_pretrained(folder, "new")
    monkeypatch.undo()
    assert contents(folder.parent) == before
    assert [path.name for path in folder.parent.iterdir()] == ["steering"]
    assert Steering.from_pretrained(folder).config == steering.config


def test_a_steering_is_replaced_as_a_whole(folder):
    Steering.for_model(tiny_llama()).save_pretrained(folder, "new")
    assert sorted(contents(folder)) == [CARD, CONFIG, TENSORS]
    assert Steering.from_pretrained(folder).config.operator == "affine"
    assert [path.name for path in folder.parent.iterdir()] == ["steering"]


@pytest.mark.parametrize("before", ["a model's", "a model's and a steering"])
def test_what_else_is_in_a_folder_stays(folder, steering, before):
    if before == "a model's":
        for name in (CARD, CONFIG, TENSORS):
            (folder / name).unlink()
    others = {"model.safetensors": b"weights", "tokenizer/vocab.txt": b"a", "notes.txt": b"mine"}
    for name, content in others.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    made = Steering.for_model(tiny_llama(), operator="bias")
    made.save_pretrained(folder, "new")
    found = contents(folder)
    assert sorted(found) == sorted([CARD, CONFIG, TENSORS, *others])
    assert {name: found[name] for name in others} == others
    assert found[CARD] == b"new"
    assert Steering.from_pretrained(folder).config == made.config


def test_a_file_is_no_place_for_a_steering(steering, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SteeringError, match="is no folder; nothing was saved"):
        steering.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# ---------------------------------------------------------------- small files that ask for much


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": {f"model.layers.{n}.norm": 2**26 for n in range(2)}},  # 1.3 GB, by 2,000 bytes
        {"sites": {f"model.layers.{n}.norm": 2**31 for n in range(4)}},
        {"sites": {"model.norm": 2**46}},
        {"sites": {"model.norm": 2**80}},
        {"sites": {"model.norm": 2**30}, "rank": 2**30},
    ],
)
def test_nothing_is_allocated_that_the_files_do_not_hold(folder, changes, monkeypatch):
    rewrite(folder, fingerprint={}, **changes)
    monkeypatch.setattr(signed, "load_safetensors", load := Counting(signed.load_safetensors))
    started = time.monotonic()
    with pytest.raises(SteeringError, match=r"ask for more than 4 GiB|damaged: it has \d+ bytes, expected"):
        Steering.from_pretrained(folder)
    assert time.monotonic() - started < 2 and load.calls == 0


# ---------------------------------------------------------------- where it is looked for


@pytest.mark.parametrize("name", ["/no/such/folder", "./x", "~/no-such-steering", "name", "a/b/c", "../a"])
def test_what_can_be_no_hub_id_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(SteeringError, match=r"no steering there \(no dso_config.json\)"):
        Steering.from_pretrained(name)


def test_a_folder_without_a_steering(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(SteeringError, match="no steering there"):
        Steering.from_pretrained("owner/name")


def test_the_hub_is_asked_for_the_three_files(folder, steering, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    again = Steering.from_pretrained("owner/steering", revision="v1")
    assert again.config == steering.config
    assert asked == [("owner/steering", {"revision": "v1", "allow_patterns": [CONFIG, TENSORS, CARD]})]


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach it\nand more lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    start = time.perf_counter()
    with pytest.raises(SteeringError) as caught:
        Steering.from_pretrained("owner/steering")
    assert str(caught.value) == "owner/steering: no such folder, and not to be had from the Hub: cannot reach it"
    assert time.perf_counter() - start < 5


def test_a_download_without_a_config_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(SteeringError, match="dso_config.json: cannot be read: No such file"):
        Steering.from_pretrained("owner/steering")


def test_the_format_is_the_one_of_these_tests():
    assert checkpoint.FORMAT_VERSION == 2
    assert (checkpoint.CONFIG_FILE, checkpoint.TENSOR_FILE, checkpoint.CARD_FILE) == (CONFIG, TENSORS, CARD)


def test_a_default_scale_is_stated_only_where_it_is_not_1(tmp_path: Path) -> None:
    config = SteeringConfig(sites={"norm": 2}, scale_range=(0.0, 2.0))
    Steering(config).save_pretrained(tmp_path / "plain")
    assert "default_scale" not in json.loads((tmp_path / "plain" / "dso_config.json").read_text())
    assert Steering.from_pretrained(tmp_path / "plain").config.default_scale == 1.0
    Steering(replace(config, default_scale=0.25)).save_pretrained(tmp_path / "set")
    assert Steering.from_pretrained(tmp_path / "set").config.default_scale == 0.25


@pytest.mark.parametrize("scale", [float("nan"), 2.5, -0.1, "1", True])
def test_a_default_scale_lies_within_the_range(scale: object) -> None:
    with pytest.raises(SteeringError, match="default_scale"):
        SteeringConfig(sites={"norm": 2}, scale_range=(0.0, 2.0), default_scale=scale)


def test_what_was_trained_towards_is_asked_of_the_same_groups_only():
    config = SteeringConfig(sites={"norm": 4}, groups=("a", "b"), target=(0.25, 0.75))
    assert config.target_for(("b", "a")) == {"a": 0.25, "b": 0.75}
    assert config.target_for(("a", "b", "c")) is None
