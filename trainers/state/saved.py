"""What a run needs to go on where it was: written and read in one place, without pickle.

One file a saved step, ``step-N.safetensors``, renamed into its folder when it is whole; the one before stays until the
next is written, so that a run may be killed at any moment and goes on from the newest whole one. Its tensors are the
operators, the optimiser's moments, running preferences, the random generators and what the caller adds; its metadata
holds the rest as JSON (step, dual variable, sampler), the format, the version of dso and a SHA-256 of everything, by
which damage is found. What a trainer needs is the trainer's to say (:class:`trainers.trainer.Contents`).

All processes of a run hold the same state: the first writes it, all load what the first has read.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import dso
from dso.decisions.decision import DecisionSet
from dso.errors import UserError
from dso.files import require_room, sync_folder, write_bytes
from trainers.trainer import Contents, SteeringTrainer

FORMAT = 4
NAME = re.compile(r"step-(\d+)\.safetensors")


class StateError(UserError):
    """A saved state that cannot be gone on from; the message says why."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A whole state as it was read.

    Attributes:
        path: its file.
        tensors, facts: what the file holds.
        passed_over: why newer files were not taken, a line each.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    passed_over: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimiser steps that were done when it was saved."""
        return self.facts["step"]

    def differences(self, trainer: SteeringTrainer) -> str:
        """What is not as it was and may change the last bits of a result; empty if nothing is known."""
        saved, now = self.facts["made_with"], _made_with(trainer)
        return ", ".join(f"{key} {saved.get(key)} then and {now[key]} now" for key in now if saved.get(key) != now[key])

    def require(self, setup: Mapping[str, Any]) -> None:
        """Refuse a state that was saved with another set-up.

        Args:
            setup: what has to be the same, under the names that messages call it by.

        Raises:
            StateError: naming the first that is not.
        """
        saved = self.facts["setup"]
        for name, value in setup.items():
            if saved.get(name) != value:
                raise StateError(f"{self.path}: saved with {name} {saved.get(name)}, now it is {value}")


def saved_states(folder: str | Path) -> list[Path]:
    """The saved states of a folder, newest first."""
    found = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def has_state(folder: str | Path) -> bool:
    """Whether there is something to go on from."""
    return bool(saved_states(folder))


def save_state(
    folder: str | Path,
    trainer: SteeringTrainer,
    extra_tensors: Mapping[str, Tensor],
    extra_facts: Mapping[str, Any],
    setup: Mapping[str, Any] | None = None,
) -> None:
    """Write everything that :func:`load_state` restores, all or nothing, and remove the states that it makes needless.

    To be called by all processes.

    Args:
        folder: of the states.
        trainer: whose contents are saved.
        extra_tensors, extra_facts: the caller's own.
        setup: what has to be the same for the state to fit, such as the decisions, beside what the trainer says.

    Raises:
        OSError: where it cannot be written; what was saved before is whole then.
    """
    contents = trainer.contents()  # every process has a part of it
    if not trainer.world.is_main:
        return
    facts = {
        "step": trainer.steps_done,
        "setup": {**_setup(trainer), **(setup or {})},
        "made_with": _made_with(trainer),
        "trainer": contents.facts,
        "extra": dict(extra_facts),
    }
    parts = {**contents.parts, "extra": extra_tensors}
    data = _pack({f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}, facts)
    path = Path(folder) / f"step-{trainer.steps_done}.safetensors"
    require_room(path, len(data))
    write_bytes(path, data)
    sync_folder(path.parent)  # the new one is there before an old one goes
    others = [other for other in saved_states(folder) if other != path]
    # The last one before this step stays. Later ones are of a time that the run went back from, as they were damaged.
    before = [other for other in others if _step(other) < trainer.steps_done]
    for other in {*others} - {*before[:1]}:
        other.unlink(missing_ok=True)


def read_state(folder: str | Path) -> SavedState:
    """The newest whole state of a folder.

    Raises:
        StateError: if there is none, all are damaged, or it is of another version of dso.
    """
    paths, passed = saved_states(folder), []
    if not paths:
        raise StateError(f"{folder}: no saved state there")
    for path in paths:
        try:
            tensors, facts = _unpack(path, path.read_bytes())
        except StateError:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            passed.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            continue
        return SavedState(path, tensors, facts, tuple(passed))
    raise StateError(f"no saved state is usable: {'; '.join(passed)}")


def load_state(
    saved: SavedState, trainer: SteeringTrainer, setup: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restore a trainer that was set up with the same config; it is untouched after an error. For all processes.

    Args:
        saved: as it was read.
        trainer: to be restored.
        setup: as :func:`save_state` was given it.

    Returns:
        the extra tensors and facts that were saved.

    Raises:
        StateError: if the state is of another set-up.
    """
    saved.require({**_setup(trainer), **(setup or {})})
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)  # a part may be empty
    for key, value in saved.tensors.items():
        name, _, rest = key.partition("/")
        parts[name][rest] = value
    extra = {key: value.to(trainer.device) for key, value in parts.pop("extra", {}).items()}
    try:
        trainer.restore(Contents(parts, saved.facts["trainer"]))
    except ValueError as error:
        raise StateError(f"{saved.path}: {error}") from error
    return extra, saved.facts["extra"]


def fingerprint(decisions: DecisionSet) -> str:
    """A set's name, size and the beginning of the SHA-256 of what it asks."""
    digest = hashlib.sha256()
    for decision in decisions:
        digest.update(json.dumps(decision.to_json(), sort_keys=True).encode())
    return f"{decisions.name} ({len(decisions)} decisions, {digest.hexdigest()[:12]})"


def require_same_shapes(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not of the same names and shapes.

    Raises:
        ValueError: naming the first that is not.
    """
    for key in sorted({*saved, *own}):
        found = [tuple(values[key].shape) if key in values else "absent" for values in (saved, own)]
        if found[0] != found[1]:
            raise ValueError(f"of another steering or baseline: {key} was {found[0]}, now it is {found[1]}")


def _setup(trainer: SteeringTrainer) -> dict[str, Any]:
    """What has to be the same for a state to fit, under the names that messages call it by."""
    return {
        "estimator": trainer.estimator,
        "KL constraint": type(trainer.kl).__name__,
        "decisions a step": trainer.decisions_a_step,
        "base weights": trainer.steering.config.base_id,
    }


def _made_with(trainer: SteeringTrainer) -> dict[str, Any]:
    """What has to be the same for a run to go on bit for bit."""
    device = trainer.device
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "processes": trainer.world.size,
    }


def _pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    about = {"format": str(FORMAT), "version": dso.__version__, "facts": json.dumps(facts)}
    return save(plain, about | {"sha256": _digest(plain, about)})


def _unpack(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file's content.

    Raises:
        ValueError, SafetensorError: if the content is not whole.
        StateError: if it is of another version.
    """
    tensors = load(data)
    length = struct.unpack("<Q", data[:8])[0]  # safetensors: the header's size, the header as JSON, the tensors
    about = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    stated = about.pop("sha256", None)
    if about.get("format") == str(FORMAT) and stated != _digest(tensors, about):
        raise ValueError("damaged (its SHA-256 is not the one it states)")
    if (about.get("format"), about.get("version")) != (str(FORMAT), dso.__version__):
        raise StateError(
            f"{path}: saved by dso {about.get('version')} (state format {about.get('format')}), this is dso "
            f"{dso.__version__} (format {FORMAT}); go on with that version, or start anew with --overwrite"
        )
    return tensors, json.loads(about["facts"])


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    return int(match[1]) if match else -1
