"""Files of unknown origin: a JSON record that states its own SHA-256, and the tensors that it speaks of.

Nothing is unpickled, and nothing is allocated that the files themselves do not hold: a file is opened only if it is a
plain one, and read only if its size is within the bounds that are given. A record is read only in the very bytes that
were written, so that damage is found before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from dso.files import replace_folder, stage, write_bytes
from dso.steering.config import SteeringError

HEADER = 8, 100 << 20  # bytes of a safetensors file before its numbers, at least and at most
LARGEST_RECORD = 16 << 20  # bytes; far above any
DIGEST = "config_sha256"


def record_text(record: Mapping[str, object]) -> str:
    """The text of a record's file, with its digest."""
    return _text({**record, DIGEST: _digest(record)})


def read_record(path: Path, version: int, known: Collection[str], later: Collection[str] = ()) -> dict[str, Any]:
    """The record of a file, without its digest.

    Args:
        version: the newest ``format_version`` that is read.
        known: the record's keys besides ``format_version`` and the digest.
        later: those of them that older records lack.

    Raises:
        SteeringError: if it is damaged, edited, or of a newer format.
    """
    try:
        text = read_plain(path, 0, LARGEST_RECORD).decode("utf-8")
        record = json.loads(text)
        again = _text(record)
    except SteeringError:
        raise
    except (ValueError, RecursionError) as error:
        raise SteeringError(f"{path}: damaged, not valid JSON: {error}") from error
    found = record.get("format_version") if isinstance(record, dict) else None
    if type(found) is not int or found < 1:
        raise SteeringError(f"{path}: states no format_version")
    if found > version:
        raise SteeringError(f"{path}: format {found} is newer than {version}, the one this dso reads; upgrade dso")
    keys = {"format_version", *known, DIGEST}
    if different := sorted(keys ^ {*record, *later}):
        where = "lacks the" if different[0] in keys else "has the unknown"
        raise SteeringError(f"{path}: damaged or edited: it {where} key {different[0]!r}")
    # Other bytes with the same meaning (1E-5 for 1e-5) are no accident of writing either.
    if text != again or record.pop(DIGEST) != _digest(record):
        raise SteeringError(f"{path}: damaged or edited (its SHA-256 is not the one it states); fetch it again")
    return record


def read_plain(path: Path, least: int, most: int) -> bytes:
    """The bytes of a plain file of a size within bounds; a pipe would be waited for, a device has no end.

    Raises:
        SteeringError: if it is no such file, or cannot be read.
    """
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


def read_tensors(path: Path, size: int, digest: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        size: bytes of its numbers.
        digest: its SHA-256.

    Raises:
        SteeringError: if it is of another size, damaged, or no such file.
    """
    data = read_plain(path, size + HEADER[0], size + HEADER[1])
    if hashlib.sha256(data).hexdigest() != digest:
        raise SteeringError(f"{path}: damaged (its SHA-256 is not the one that is stated); fetch it again")
    try:
        return load_safetensors(data)
    except SafetensorError as error:
        raise SteeringError(f"{path}: not a safetensors file: {error}") from error


def require_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of something else than finite float32 numbers.

    Raises:
        SteeringError: naming the first one.
    """
    if bad := [key for key, value in tensors.items() if value.dtype != torch.float32 or not value.isfinite().all()]:
        raise SteeringError(f"{path}: {bad[0]!r} is not of finite float32 numbers")


def write_files(place: Path, contents: Mapping[str, bytes], last: str) -> None:
    """Write files into a folder; what else is in it stays, and after an error it is as it was.

    A folder that holds nothing but such files is replaced at once, so that a kill leaves the old one or the new one.
    Where other files are, each is moved into its place, the one named ``last`` after the others; a kill in between
    leaves what is refused as damaged, never what is read wrongly.

    Raises:
        SteeringError: if the folder is something else than a folder.
    """
    if place.exists() and not place.is_dir():
        raise SteeringError(f"{place}: is no folder; nothing was saved")
    names = {path.name for path in place.iterdir()} if place.exists() else set()
    if not names or (last in names and names <= {*contents}):
        with replace_folder(place) as fresh:
            for name, content in contents.items():
                write_bytes(fresh / name, content)
        return
    with stage(place) as staged:
        for name, content in contents.items():
            write_bytes(staged / name, content)
        for name in sorted(contents, key=lambda name: name == last):
            os.replace(staged / name, place / name)


def _text(record: object) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _digest(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
