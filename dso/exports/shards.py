"""A checkpoint's safetensors files: read by name, written again one tensor at a time.

Only files that hold something new are written; the others are copied. At no time is more than one tensor in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dso.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
WIDTHS = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1,
}  # fmt: skip
Make = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Added:
    """A vector that a checkpoint did not have: it lies in the file of the key ``beside`` and has its dtype."""

    beside: str
    length: int
    make: Make


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: its key, its dtype as safetensors calls it, its shape, and what gives its values."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    make: Make


class Shards:
    """The weights of a folder.

    Attributes:
        header: key -> its entry in the file's header (``dtype``, ``shape``).
        place: key -> the name of its file.

    Raises:
        UserError: if the folder has no safetensors, or lacks one that its index names.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            files = sorted({*json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()})
        else:
            files = [SINGLE]
        self.header: dict[str, dict[str, Any]] = {}
        self.place: dict[str, str] = {}
        for file in files:
            if not (folder / file).is_file():
                raise UserError(
                    f"{folder}: no {file}, and only safetensors can be merged into; load the model with transformers "
                    "and save it with save_pretrained first"
                )
            for key, entry in read_header(folder / file).items():
                self.header[key] = entry
                self.place[key] = file

    def tensor(self, key: str) -> Tensor:
        """A tensor, mapped into memory."""
        with safe_open(self.folder / self.place[key], framework="pt") as file:
            return file.get_tensor(key)

    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have.

        Raises:
            UserError: if it is none of float32, bfloat16 and float16 (as in a quantised checkpoint).
        """
        sizes: dict[str, int] = {}
        for entry in self.header.values():
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + _count(entry["shape"])
        most = max(sizes, key=lambda name: sizes[name])
        if most not in DTYPES:
            raise UserError(
                f"{self.folder}: most weights are {most}, which cannot be merged into; take the plain model"
            )
        return DTYPES[most]

    def size(self, dtype: torch.dtype) -> int:
        """Bytes of all weights in a dtype; what is no plain float keeps its own."""
        counts = ((entry, _count(entry["shape"])) for entry in self.header.values())
        return sum(n * (dtype.itemsize if e["dtype"] in DTYPES else WIDTHS.get(e["dtype"], 1)) for e, n in counts)

    def key_of(self, name: str, value: Tensor) -> str:
        """The key of a model's parameter: its name, or the key of the same ending and values where files are older.

        Raises:
            UserError: if there is none, or several.
        """
        if name in self.header:
            return name
        shared = {key: _shared_ending(key, name) for key in self.header}
        longest = max(shared.values())
        same = [key for key, length in shared.items() if length == longest and self._holds(key, value)]
        if longest < 2 or len(same) != 1:
            raise UserError(
                f"{self.folder}: {name} is not in its files under a name that is known; load the model with "
                "transformers and save it with save_pretrained first"
            )
        return same[0]

    def _holds(self, key: str, value: Tensor) -> bool:
        if tuple(self.header[key]["shape"]) != tuple(value.shape):
            return False
        return torch.equal(self.tensor(key).to(value.dtype), value)

    def write(
        self,
        out: Path,
        changed: Mapping[str, Make],
        added: Mapping[str, Added],
        dtype: torch.dtype | None = None,
        dropped: Collection[str] = (),
    ) -> None:
        """Write all files into a folder.

        Args:
            out: the folder.
            changed: key -> its new values, in any dtype.
            added: key -> what is new.
            dtype: of all weights; None keeps each weight's own.
            dropped: keys that are not written.
        """
        for file in sorted({*self.place.values()}):
            entries = [
                Entry(key, self._dtype_of(key, dtype), tuple(self.header[key]["shape"]), self._make(key, changed))
                for key, place in self.place.items()
                if place == file and key not in dropped
            ]
            new = [
                Entry(key, self._dtype_of(one.beside, dtype), (one.length,), one.make)
                for key, one in added.items()
                if self.place[one.beside] == file
            ]
            fewer = any(self.place[key] == file for key in dropped)
            moved = fewer or any(e.key in changed or e.dtype != self.header[e.key]["dtype"] for e in entries)
            if new or moved:
                write_tensors(out / file, [*entries, *new])
            else:
                shutil.copyfile(self.folder / file, out / file)
        if (self.folder / INDEX).is_file():
            self._write_index(out, added, dropped)

    def _dtype_of(self, key: str, dtype: torch.dtype | None) -> str:
        own: str = self.header[key]["dtype"]
        return NAMES[dtype] if dtype is not None and own in DTYPES else own

    def _make(self, key: str, changed: Mapping[str, Make]) -> Make:
        return changed.get(key) or (lambda: self.tensor(key))

    def _write_index(self, out: Path, added: Mapping[str, Added], dropped: Collection[str]) -> None:
        index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        files = index["weight_map"] | {key: self.place[one.beside] for key, one in added.items()}
        index["weight_map"] = {key: file for key, file in files.items() if key not in dropped}
        total = 0
        for file in {*index["weight_map"].values()}:
            entries = read_header(out / file).values()
            total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)
        index["metadata"] = (index.get("metadata") or {}) | {"total_size": total}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> ``dtype``, ``shape`` and ``data_offsets`` of a safetensors file, which is checked as a whole.

    Raises:
        SafetensorError: if the file is damaged.
    """
    with safe_open(path, framework="pt"):  # checks lengths and offsets
        pass
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {key: entry for key, entry in header.items() if key != "__metadata__"}


def write_tensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write a safetensors file: eight bytes of length, the header as JSON, the tensors' bytes one after the other.

    Each tensor is asked for once. Wide dtypes come first, so that all lie at multiples of their width.
    """
    entries = sorted(entries, key=lambda e: (-WIDTHS[e.dtype], e.key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + _count(entry.shape) * WIDTHS[entry.dtype]
        header[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.write(_bytes(entry))


def _bytes(entry: Entry) -> memoryview:
    value = entry.make()
    value = value.to(DTYPES.get(entry.dtype, value.dtype)).contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().data


def _count(shape: Iterable[int]) -> int:
    return int(torch.Size(shape).numel())


def _shared_ending(one: str, other: str) -> int:
    """Number of dotted parts with which two names end alike."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    count = 0
    for mine, yours in pairs:
        if mine != yours:
            break
        count += 1
    return count
