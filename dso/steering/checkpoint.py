"""The steering checkpoint: the one place that writes and reads it.

A folder with ``dso_config.json``, ``dso_model.safetensors`` (float32, keys ``<site>.<a|b|u|v>``) and ``README.md``. The
config states the SHA-256 of the tensors and of itself and is read only in the very bytes that were written, so that
damage is found before anything is used. Nothing on the load path is unpickled, and nothing is allocated that the files
themselves do not hold: a file is opened only if it is a plain one, and read only if it is as large as the config says.
Format 2 states a digest of the base weights a site; format 1, one of all, is still read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dso.errors import UserError, first_line
from dso.files import as_path
from dso.steering.config import TRAINED_AT, SteeringConfig, SteeringError
from dso.steering.hub import find_folder
from dso.steering.operators import coefficient_shapes
from dso.steering.signed import read_plain, read_record, read_tensors, record_text, require_finite, write_files

FORMAT_VERSION = 2
CONFIG_FILE = "dso_config.json"
TENSOR_FILE = "dso_model.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, TENSOR_FILE, CARD_FILE)
LARGEST = {TENSOR_FILE: 4 << 30, CARD_FILE: 4 << 20}  # bytes; far above any steering's
LATER = ("scoring", "default_scale")  # what older checkpoints do not state


def write_checkpoint(folder: str | Path, config: SteeringConfig, tensors: Mapping[str, Tensor], card: str = "") -> None:
    """Write the three files into a folder, as :func:`dso.steering.signed.write_files` does.

    Raises:
        SteeringError: if a coefficient is not finite, or the folder is something else than a folder.
    """
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
    if bad := [key for key, value in plain.items() if not value.isfinite().all()]:
        raise SteeringError(f"{bad[0]!r} is not finite; nothing was saved")
    data = save_safetensors(plain)
    stated = asdict(config)
    if config.default_scale == TRAINED_AT:  # which goes without saying, also to versions that do not know the key
        del stated["default_scale"]
    record = {"format_version": FORMAT_VERSION, **stated, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    contents = {TENSOR_FILE: data, CARD_FILE: card.encode(), CONFIG_FILE: record_text(record).encode()}
    write_files(as_path(folder), contents, CONFIG_FILE)


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
    known = (*(f.name for f in fields(SteeringConfig)), "tensors_sha256")
    record = read_record(folder / CONFIG_FILE, FORMAT_VERSION, known, LATER)
    path = folder / TENSOR_FILE
    tensors = read_tensors(path, _size(record, folder / CONFIG_FILE), record["tensors_sha256"])
    try:
        config = SteeringConfig(**{f.name: record[f.name] for f in fields(SteeringConfig) if f.name in record})
    except SteeringError as error:
        raise SteeringError(f"{folder / CONFIG_FILE}: {error}") from error
    require_finite(tensors, path)
    _require_fitting(config, tensors, path)
    return Checkpoint(config, tensors, _read_card(folder / CARD_FILE))


def _size(record: Mapping[str, Any], path: Path) -> int:
    """Bytes of the numbers in the tensors' file, by what the config says of the sites."""
    sites, rank = record["sites"], record["rank"] or 0
    widths = sites.values() if isinstance(sites, dict) else ()
    if not all(type(number) is int for number in (rank, *widths)):
        return 0  # for which it is refused when the config is made
    vectors = 2 * rank + 1 if rank else 2 if record["operator"] == "affine" else 1
    if (size := 4 * vectors * sum(widths)) > LARGEST[TENSOR_FILE]:
        raise SteeringError(f"{path}: its sites ask for more than {LARGEST[TENSOR_FILE] >> 30} GiB of coefficients")
    return size


def _read_card(path: Path) -> str:
    return read_plain(path, 0, LARGEST[CARD_FILE]).decode("utf-8", "replace") if path.exists() else ""


def _require_fitting(config: SteeringConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Hold what the config asks for against what is there, before anyone makes room for it."""
    try:
        shapes = {w: coefficient_shapes(config.operator, w, config.rank) for w in {*config.sites.values()}}
    except (UserError, RuntimeError, TypeError) as error:  # torch refuses shapes beyond its limits, too
        raise SteeringError(
            f"{path.with_name(CONFIG_FILE)}: its operators cannot be made: {first_line(error)}"
        ) from error
    wanted = {f"{site}.{name}": shape for site, w in config.sites.items() for name, shape in shapes[w].items()}
    if different := sorted({*wanted} ^ {*tensors}):
        where = "lacks" if different[0] in wanted else "has the unknown"
        raise SteeringError(f"{path}: {where} {different[0]!r} ({len(different)} such keys)")
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise SteeringError(f"{path}: {key!r} has shape {tuple(tensors[key].shape)}, expected {shape}")
