"""The steering checkpoint: the one place that writes and reads it.

A folder with ``dso_config.json``, ``dso_model.safetensors`` (float32, keys ``<site>.<a|b|u|v>``) and ``README.md``. The
config states the SHA-256 of the tensors and of itself and is read only in the very bytes that were written, so that
damage is found before anything is used. Nothing on the load path is unpickled, and nothing is allocated that the files
themselves do not hold: a file is opened only if it is a plain one, and read only if it is as large as the config says.
Format 2 states a digest of the base weights a site; format 1, one of all, is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dso.errors import UserError
from dso.files import as_path, replace_folder, stage, write_bytes
from dso.steering.config import TRAINED_AT, SteeringConfig, SteeringError
from dso.steering.hub import find_folder
from dso.steering.operators import coefficient_shapes

FORMAT_VERSION = 2
CONFIG_FILE = "dso_config.json"
TENSOR_FILE = "dso_model.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, TENSOR_FILE, CARD_FILE)
LARGEST = {CONFIG_FILE: 16 << 20, TENSOR_FILE: 4 << 30, CARD_FILE: 4 << 20}  # bytes; far above any steering's
HEADER = 8, 100 << 20  # bytes of a safetensors file before its numbers, at least and at most
LATER = ("scoring", "default_scale")  # what older checkpoints do not state


def write_checkpoint(folder: str | Path, config: SteeringConfig, tensors: Mapping[str, Tensor], card: str = "") -> None:
    """Write the three files into a folder; what else is in it stays, and after an error it is as it was.

    A folder that holds a steering and nothing else is replaced at once, so that a kill leaves the old one or the new
    one. Where other files are, the three are moved into their places one after the other, the config last; a kill in
    between leaves a checkpoint that is refused as damaged, never one that is read wrongly.

    Raises:
        SteeringError: if a coefficient is not finite, or the folder is something else than a folder.
    """
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
    if bad := [key for key, value in plain.items() if not value.isfinite().all()]:
        raise SteeringError(f"{bad[0]!r} is not finite; nothing was saved")
    place = as_path(folder)
    if place.exists() and not place.is_dir():
        raise SteeringError(f"{place}: is no folder; nothing was saved")
    data = save_safetensors(plain)
    stated = asdict(config)
    if config.default_scale == TRAINED_AT:  # which goes without saying, also to versions that do not know the key
        del stated["default_scale"]
    record = {"format_version": FORMAT_VERSION, **stated, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    text = _config_text(record | {"config_sha256": _config_digest(record)})
    contents = {TENSOR_FILE: data, CONFIG_FILE: text.encode(), CARD_FILE: card.encode()}
    if place.exists() and not _only_a_steering(place):
        with stage(place) as staged:
            for name, content in contents.items():
                write_bytes(staged / name, content)
            for name in (TENSOR_FILE, CARD_FILE, CONFIG_FILE):
                os.replace(staged / name, place / name)
        return
    with replace_folder(place) as fresh:
        for name, content in contents.items():
            write_bytes(fresh / name, content)


def _only_a_steering(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or (CONFIG_FILE in names and names <= {*FILES})


class Checkpoint(NamedTuple):
    """What a checkpoint holds: the config, the coefficients by key, and the card, "" where there is none."""

    config: SteeringConfig
    tensors: dict[str, Tensor]
    card: str


def read_checkpoint(source: str | Path, revision: str | None = None) -> Checkpoint:
    """Read and verify a checkpoint: a folder, a Hub id or a W&B artifact (:mod:`dso.steering.hub`).

    Raises:
        SteeringError: if a file is missing, damaged or of a newer format.
    """
    folder = find_folder(source, revision, FILES)
    record = _read_config(folder / CONFIG_FILE)
    path = folder / TENSOR_FILE
    data = _read(path, *_sizes(record, folder / CONFIG_FILE))
    if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
        raise SteeringError(f"{path}: damaged (its SHA-256 is not the one in {CONFIG_FILE}); fetch it again")
    try:
        config = SteeringConfig(**{f.name: record[f.name] for f in fields(SteeringConfig) if f.name in record})
    except SteeringError as error:
        raise SteeringError(f"{folder / CONFIG_FILE}: {error}") from error
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise SteeringError(f"{path}: not a safetensors file: {error}") from error
    if bad := [key for key, value in tensors.items() if value.dtype != torch.float32 or not value.isfinite().all()]:
        raise SteeringError(f"{path}: {bad[0]!r} is not of finite float32 numbers")
    _require_fitting(config, tensors, path)
    return Checkpoint(config, tensors, _read_card(folder / CARD_FILE))


def _read(path: Path, least: int, most: int) -> bytes:
    """The bytes of a plain file of a size within bounds; a pipe would be waited for, a device has no end."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise SteeringError(f"{path}: is no plain file")
            if not least <= about.st_size <= most:
                raise SteeringError(
                    f"{path}: damaged: it has {about.st_size} bytes, expected {least} to {most}; fetch it again"
                )
            return file.read(most)
    except OSError as error:
        raise SteeringError(f"{path}: cannot be read: {error.strerror}") from error


def _sizes(record: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """Bytes that the tensors' file has at least and at most, by what the config says of the sites."""
    sites, rank = record["sites"], record["rank"] or 0
    widths = sites.values() if isinstance(sites, dict) else ()
    if not all(type(number) is int for number in (rank, *widths)):
        return HEADER  # for which it is refused when the config is made
    vectors = 2 * rank + 1 if rank else 2 if record["operator"] == "affine" else 1
    if (size := 4 * vectors * sum(widths)) > LARGEST[TENSOR_FILE]:
        raise SteeringError(f"{path}: its sites ask for more than {LARGEST[TENSOR_FILE] >> 30} GiB of coefficients")
    return size + HEADER[0], size + HEADER[1]


def _read_card(path: Path) -> str:
    return _read(path, 0, LARGEST[CARD_FILE]).decode("utf-8", "replace") if path.exists() else ""


def _require_fitting(config: SteeringConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Hold what the config asks for against what is there, before anyone makes room for it."""
    try:
        shapes = {w: coefficient_shapes(config.operator, w, config.rank) for w in {*config.sites.values()}}
    except (UserError, RuntimeError, TypeError) as error:  # torch refuses shapes beyond its limits, too
        reason = str(error).splitlines()[0]
        raise SteeringError(f"{path.with_name(CONFIG_FILE)}: its operators cannot be made: {reason}") from error
    wanted = {f"{site}.{name}": shape for site, w in config.sites.items() for name, shape in shapes[w].items()}
    if different := sorted({*wanted} ^ {*tensors}):
        where = "lacks" if different[0] in wanted else "has the unknown"
        raise SteeringError(f"{path}: {where} {different[0]!r} ({len(different)} such keys)")
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise SteeringError(f"{path}: {key!r} has shape {tuple(tensors[key].shape)}, expected {shape}")


def _read_config(path: Path) -> dict:
    try:
        text = _read(path, 0, LARGEST[CONFIG_FILE]).decode("utf-8")
        record = json.loads(text)
        again = _config_text(record)
    except SteeringError:
        raise
    except (ValueError, RecursionError) as error:
        raise SteeringError(f"{path}: damaged, not valid JSON: {error}") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if type(version) is not int or version < 1:
        raise SteeringError(f"{path}: states no format_version")
    if version > FORMAT_VERSION:
        raise SteeringError(
            f"{path}: format {version} is newer than {FORMAT_VERSION}, the one this dso reads; upgrade dso"
        )
    known = {"format_version", *(f.name for f in fields(SteeringConfig)), "tensors_sha256", "config_sha256"}
    if different := sorted(known ^ {*record, *LATER}):
        where = "lacks the" if different[0] in known else "has the unknown"
        raise SteeringError(f"{path}: damaged or edited: it {where} key {different[0]!r}")
    # Other bytes with the same meaning (1E-5 for 1e-5) are no accident of writing either.
    if text != again or record.pop("config_sha256") != _config_digest(record):
        raise SteeringError(f"{path}: damaged or edited (its SHA-256 is not the one it states); fetch it again")
    return record


def _config_text(record: Mapping[str, object]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _config_digest(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
