"""The parts of a merged folder: what is copied, what is edited, and the weights."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dso.errors import UserError
from dso.exports.plan import Change, MergeError, MergePlan
from dso.exports.probe import PROBE_FILE, read_probe
from dso.exports.shards import Added, Make, Shards
from dso.exports.slots import switched_config
from dso.files import as_path
from dso.models.loading import MODEL_FILES
from dso.steering.sites import linear_width

PARAMETERS = ("weight", "bias")
CONFIG = "config.json"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def require_ours(place: Path, source: Path) -> None:
    """Refuse a place where something else is than what an earlier merge has written.

    Raises:
        MergeError: naming what is there.
    """
    if place == as_path(source):
        raise MergeError(f"{place}: is the base model's own folder; choose another one")
    if place.exists() and not place.is_dir():
        raise MergeError(f"{place}: is no folder; choose another name")
    present = {entry.name for entry in os.scandir(place)} if place.is_dir() else set()
    known: set[str] = set()
    with suppress(UserError):
        known = {*read_probe(place).made.get("files", [])}
    if others := sorted(present - known):
        raise MergeError(f"{place}: has other files in it ({others[0]}); nothing was written; choose another folder")


def copy_rest(source: Path, fresh: Path, renamed: Mapping[str, str | None]) -> None:
    """Copy what is no weight, no config and no probe: tokenizer, processor, templates, licence, the model's card.

    Args:
        renamed: file -> its new name, or None for one that stays behind.
    """
    for path in sorted(source.iterdir()):
        wanted = any(fnmatch(path.name, pattern) for pattern in MODEL_FILES) and not path.name.endswith(WEIGHTS)
        name = renamed.get(path.name, path.name)
        if path.is_file() and wanted and name and path.name not in (PROBE_FILE, CONFIG):
            shutil.copyfile(path, fresh / name)


def write_config(source: Path, fresh: Path, config: Any, switches: tuple[str, ...], dtype: str) -> None:
    """The base's config as it is, but for switches of its text part and the dtype.

    It is edited as JSON, so that programs with an older transformers read what they know; where the result is not read
    as meant, transformers writes it anew.
    """
    from transformers import AutoConfig

    record = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    wanted = switched_config(config, switches)
    text = record.get("text_config")
    place = text if isinstance(text, dict) else record
    place |= {name: getattr(wanted.get_text_config(), name) for name in switches}
    for part in (record, *(value for value in record.values() if isinstance(value, dict))):
        part |= dict.fromkeys({"torch_dtype", "dtype"} & part.keys(), dtype)
    record["torch_dtype" if "torch_dtype" in record else "dtype"] = dtype
    (fresh / CONFIG).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    read = AutoConfig.from_pretrained(fresh).get_text_config()
    if any(getattr(read, name, None) != getattr(wanted.get_text_config(), name) for name in switches):
        wanted.dtype = dtype
        wanted.save_pretrained(fresh)


def write_weights(
    shards: Shards,
    fresh: Path,
    model: nn.Module,
    plan: MergePlan,
    target: torch.dtype,
    dropped: Collection[str] = (),
) -> None:
    """The weights with a plan's changes, computed from the files' own values.

    Args:
        dropped: modules that lose their bias.

    Raises:
        UserError: if a parameter is not to be found in the files.
    """
    changed: dict[str, Make] = {}
    added: dict[str, Added] = {}
    modules = dict(model.named_modules())
    for name in dict.fromkeys([*plan.changes, *plan.new_biases]):
        module, change = modules[name], plan.changes.get(name)
        own = {key: module._parameters.get(key) for key in PARAMETERS}
        keys = {key: shards.key_of(f"{name}.{key}", value) for key, value in own.items() if value is not None}
        if change is not None and change.moves_weight and "weight" in keys:
            changed[keys["weight"]] = partial(_new, shards, change, keys, "weight")
        if change is not None and "bias" in keys:
            changed[keys["bias"]] = partial(_new, shards, change, keys, "bias")
        if name in plan.new_biases:
            count = linear_width(module)
            make: Make = partial(torch.zeros, count)
            if change is not None and change.makes_bias:
                make = partial(_new, shards, change, keys, "bias")
            added[keys["weight"].removesuffix("weight") + "bias"] = Added(keys["weight"], count, make)
    lost = {shards.key_of(f"{name}.bias", modules[name]._parameters["bias"]) for name in dropped}
    shards.write(fresh, changed, added, target if target != shards.dtype() else None, lost)


def _new(shards: Shards, change: Change, keys: Mapping[str, str], wanted: str) -> Tensor:
    """A module's new weight or bias, from the files; ``keys`` are those of its old ones."""
    old = [shards.tensor(keys[key]) if key in keys else None for key in PARAMETERS]
    value = change.apply(*old)[PARAMETERS.index(wanted)]
    assert value is not None  # asked for where there is one only
    return value
