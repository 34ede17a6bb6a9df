"""The folder of a patch: the one place that writes and reads it.

``dso_patch.json``, ``dso_patch.safetensors`` (``<weight>.indices``, int32, ascending, into the flat weight, and
``<weight>.values``, float32) and ``README.md``, read with the care of a steering's checkpoint
(:mod:`dso.steering.signed`): the record states how many places each weight has, and the tensors' file is read only if
it is as large as that.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dso.editing.localise import Places
from dso.files import as_path
from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.hub import find_folder
from dso.steering.signed import read_plain, read_record, read_tensors, record_text, require_finite, write_files

FORMAT_VERSION = 1
CONFIG_FILE = "dso_patch.json"
TENSOR_FILE = "dso_patch.safetensors"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, TENSOR_FILE, CARD_FILE)
KIND = "patch"  # in place of an operator's
SUFFIX = ".weight"
BYTES = 8  # of a place with its value
MOST_PLACES, MOST_CARD = (4 << 30) // BYTES, 4 << 20


class Stored(NamedTuple):
    """What a patch's files hold besides its card; the attributes of :class:`dso.editing.patch.Patch`."""

    config: SteeringConfig
    shapes: dict[str, tuple[int, ...]]
    places: Places
    values: dict[str, Tensor]
    about: dict[str, str]


def write_patch(folder: str | Path, stored: Stored, card: str = "") -> None:
    """Write the three files into a folder, as :func:`dso.steering.signed.write_files` does.

    Raises:
        SteeringError: if a value is not finite, or the folder is something else than a folder.
    """
    if bad := [name for name, value in stored.values.items() if not value.isfinite().all()]:
        raise SteeringError(f"{bad[0]!r} is not finite; nothing was saved")
    tensors = {f"{name}.indices": index.to(torch.int32).contiguous() for name, index in stored.places.items()}
    tensors |= {f"{name}.values": value.float().contiguous() for name, value in stored.values.items()}
    data = save_safetensors(tensors)
    weights = {name: {"shape": shape, "number": len(stored.places[name])} for name, shape in stored.shapes.items()}
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(stored.config)}
    record |= {"weights": weights, "about": stored.about, "tensors_sha256": hashlib.sha256(data).hexdigest()}
    contents = {TENSOR_FILE: data, CARD_FILE: card.encode(), CONFIG_FILE: record_text(record).encode()}
    write_files(as_path(folder), contents, CONFIG_FILE)


def read_patch(source: str | Path, revision: str | None = None) -> tuple[Stored, str, str]:
    """What is stored, the card, and a key that is the same however often the patch is loaded.

    Raises:
        SteeringError: if there is none, or it is damaged, or of a newer format.
    """
    folder = find_folder(source, revision, FILES)
    where, path, card = (folder / name for name in FILES)
    stated = [f.name for f in fields(SteeringConfig)]
    record = read_record(where, FORMAT_VERSION, (*stated, "weights", "about", "tensors_sha256"))
    numbers, shapes = _weights(record["weights"], where)
    try:
        config = SteeringConfig(**{name: record[name] for name in stated})
    except SteeringError as error:
        raise SteeringError(f"{where}: {error}") from error
    if config.operator != KIND or {*config.sites} != {name.removesuffix(SUFFIX) for name in shapes}:
        raise SteeringError(f"{where}: its sites are not the layers of its weights")
    tensors = read_tensors(path, BYTES * sum(numbers.values()), record["tensors_sha256"])
    wanted = {f"{name}.{part}" for name in shapes for part in ("indices", "values")}
    if different := sorted(wanted ^ {*tensors}):
        raise SteeringError(f"{path}: lacks, or has the unknown {different[0]!r} ({len(different)} such keys)")
    values = {name: tensors[f"{name}.values"] for name in shapes}
    require_finite(values, path)
    places = {}
    for name, shape in shapes.items():
        places[name] = _places(tensors[f"{name}.indices"], values[name], numbers[name], shape, f"{path}: {name!r}")
    text = read_plain(card, 0, MOST_CARD).decode("utf-8", "replace") if card.exists() else ""
    about = {str(key): str(value) for key, value in dict(record["about"]).items()}
    return Stored(config, shapes, places, values, about), text, record["tensors_sha256"][:16]


def _weights(record: Any, where: Path) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Numbers of places and shapes, by the weight's name, of what a record says of them."""
    numbers: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, about in (record if isinstance(record, dict) else {}).items():
        if not isinstance(about, dict) or {*about} != {"shape", "number"} or not isinstance(about["shape"], list):
            raise SteeringError(f"{where}: {name!r} states no shape and number of places")
        number, shape = about["number"], tuple(about["shape"])
        if not all(type(n) is int and 0 < n < 2**31 for n in (number, *shape)) or len(shape) != 2:
            raise SteeringError(f"{where}: {name!r} has shape {list(shape)} and {number!r} places, which no weight has")
        numbers[name], shapes[name] = number, shape
    if not 0 < sum(numbers.values()) <= MOST_PLACES:
        raise SteeringError(f"{where}: asks for {sum(numbers.values())} places, expected 1 to {MOST_PLACES}")
    return numbers, shapes


def _places(index: Tensor, values: Tensor, number: int, shape: tuple[int, ...], where: str) -> Tensor:
    if index.dtype != torch.int32 or tuple(index.shape) != (number,) or tuple(values.shape) != (number,):
        raise SteeringError(f"{where} has not {number} places of int32 with a value each")
    index = index.long()
    if index[0] < 0 or index[-1] >= shape[0] * shape[1] or not (index[1:] > index[:-1]).all():
        raise SteeringError(f"{where} has places outside of its shape {list(shape)}, or not in ascending order")
    return index
