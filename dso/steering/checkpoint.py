"""The steering checkpoint: the one place that writes and reads it.

A folder with ``dso_config.json``, ``dso_model.safetensors`` (float32, keys ``<site>.<a|b|u|v>``) and ``README.md``. The
config states the SHA-256 of the tensors and of itself and is read only in the very bytes that were written, so that
damage is found before anything is used. Nothing on the load path is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from dso.errors import UserError
from dso.files import replace_folder, write_bytes, write_text

FORMAT_VERSION = 1
CONFIG_FILE = "dso_config.json"
TENSOR_FILE = "dso_model.safetensors"
CARD_FILE = "README.md"


class SteeringError(UserError):
    """A steering that cannot be read or does not fit the model; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringConfig:
    """What a checkpoint states.

    Attributes:
        operator, rank: kind of the operators (:mod:`dso.steering.operators`).
        sites: dotted module name -> width.
        fingerprint: of the base weights at the sites, "" to skip the check.
        base_model, revision: where the base model came from.
        groups, target: the groups that were made equiprobable and the fair distribution over them.
        scale_range: the scales that a user may set, 0 among them; evidence exists within it.
        scale_curve: measured rows, one a scale (:mod:`dso.evaluation.report`).

    Raises:
        SteeringError: if a field has the wrong type or cannot be used; the operator's kind and rank are checked where
            the operators are made.
    """

    operator: str = "affine"
    rank: int | None = None
    sites: dict[str, int]
    fingerprint: str = ""
    base_model: str = ""
    revision: str | None = None
    groups: tuple[str, ...] = ()
    target: tuple[float, ...] = ()
    scale_range: tuple[float, float] = (0.0, 1.0)
    scale_curve: tuple[dict, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("groups", "target", "scale_range", "scale_curve"):
            if not isinstance(getattr(self, name), list | tuple):
                raise SteeringError(f"{name} must be a list, found {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for fault in _faults(self):
            raise SteeringError(fault)


def _faults(config: SteeringConfig) -> Iterator[str]:
    if not isinstance(config.sites, dict) or not config.sites:
        yield f"a steering needs at least one site, found {config.sites!r}"
    elif bad := [site for site, width in config.sites.items() if type(width) is not int or width < 1]:
        yield f"site {bad[0]!r} has width {config.sites[bad[0]]!r}, expected a whole number from 1"
    for name in ("operator", "fingerprint", "base_model"):
        if not isinstance(getattr(config, name), str):
            yield f"{name} must be a string, found {getattr(config, name)!r}"
    if not isinstance(config.revision, str | None):
        yield f"revision must be a string or null, found {config.revision!r}"
    for name in ("target", "scale_range"):
        if not all(isinstance(n, int | float) and math.isfinite(n) for n in getattr(config, name)):
            yield f"{name} must be finite numbers, found {list(getattr(config, name))}"
    if config.target and len(config.target) != len(config.groups):
        yield f"{len(config.target)} shares in the target of {len(config.groups)} groups"
    if len(config.scale_range) != 2 or not config.scale_range[0] <= 0 <= config.scale_range[1]:
        yield f"scale_range is {list(config.scale_range)}, expected [low, high] with 0 between them"


def fingerprint(model: nn.Module, sites: Mapping[str, int]) -> str:
    """SHA-256 over names and weights of the steered modules.

    The weights are taken as float32: the same on every device, and in any dtype that holds the stored weights exactly.
    """
    digest = hashlib.sha256()
    for site in sorted(sites):
        digest.update(site.encode())
        for name, tensor in sorted(model.get_submodule(site).state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_checkpoint(folder: str | Path, config: SteeringConfig, tensors: Mapping[str, Tensor], card: str = "") -> None:
    """Write the folder; an existing one is replaced as a whole, and stands as it was after an error."""
    plain = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in tensors.items()}
    if bad := [key for key, value in plain.items() if not value.isfinite().all()]:
        raise SteeringError(f"{bad[0]!r} is not finite; nothing was saved")
    data = save_safetensors(plain)
    record = {"format_version": FORMAT_VERSION, **asdict(config), "tensors_sha256": hashlib.sha256(data).hexdigest()}
    text = _config_text(record | {"config_sha256": _config_digest(record)})
    with replace_folder(folder) as fresh:
        write_bytes(fresh / TENSOR_FILE, data)
        write_text(fresh / CONFIG_FILE, text)
        write_text(fresh / CARD_FILE, card)


def read_checkpoint(source: str | Path, revision: str | None = None) -> tuple[SteeringConfig, dict[str, Tensor]]:
    """Read and verify a checkpoint folder or Hub id.

    Raises:
        SteeringError: if a file is missing, damaged or of a newer format.
    """
    folder = _locate(source, revision)
    record = _read_config(folder / CONFIG_FILE)
    path = folder / TENSOR_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SteeringError(f"{path}: cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
        raise SteeringError(f"{path}: damaged (its SHA-256 is not the one in {CONFIG_FILE}); fetch it again")
    try:
        tensors = load_safetensors(data)
    except SafetensorError as error:
        raise SteeringError(f"{path}: not a safetensors file: {error}") from error
    if bad := [key for key, value in tensors.items() if value.dtype != torch.float32 or not value.isfinite().all()]:
        raise SteeringError(f"{path}: {bad[0]!r} is not of finite float32 numbers")
    try:
        config = SteeringConfig(**{f.name: record[f.name] for f in fields(SteeringConfig)})
    except SteeringError as error:
        raise SteeringError(f"{folder / CONFIG_FILE}: {error}") from error
    return config, tensors


def _locate(source: str | Path, revision: str | None) -> Path:
    folder = Path(source).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    name = str(source)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise SteeringError(f"{source}: no steering there (no {CONFIG_FILE})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[CONFIG_FILE, TENSOR_FILE, CARD_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SteeringError(f"{source}: no such folder, and not to be had from the Hub: {reason}") from error


def _read_config(path: Path) -> dict:
    try:
        text = path.read_bytes().decode("utf-8")
        record = json.loads(text)
    except OSError as error:
        raise SteeringError(f"{path}: cannot be read: {error.strerror}") from error
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
    if different := sorted(known ^ set(record)):
        where = "lacks the" if different[0] in known else "has the unknown"
        raise SteeringError(f"{path}: damaged or edited: it {where} key {different[0]!r}")
    # Other bytes with the same meaning (1E-5 for 1e-5) are no accident of writing either.
    if text != _config_text(record) or record.pop("config_sha256") != _config_digest(record):
        raise SteeringError(f"{path}: damaged or edited (its SHA-256 is not the one it states); fetch it again")
    return record


def _config_text(record: Mapping[str, object]) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _config_digest(record: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
