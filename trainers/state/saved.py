"""What a run needs to go on where it was: written and read in one place, without pickle.

One file a saved step, ``step-N.safetensors``, renamed into its folder when it is whole; the one before stays until the
next is written, so that a run may be killed at any moment and goes on from the newest whole one. Its tensors are the
operators, the optimiser's moments, baselines, running preferences, the random generators and what the caller adds; its
metadata holds the rest as JSON (step, dual variable, sampler), the format, the version of dso and a SHA-256 of
everything, by which damage is found.

All processes of a run hold the same state: the first writes it, all load what the first has read.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

import dso
from dso.decisions.decision import DecisionSet
from dso.errors import UserError
from dso.files import require_room, sync_folder, write_bytes
from trainers.ppo import SteeringPPO

FORMAT = 2
_FINGERPRINTS: WeakKeyDictionary[SteeringPPO, str] = WeakKeyDictionary()  # a state is saved often
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

    def differences(self, model: SteeringPPO) -> str:
        """What is not as it was and may change the last bits of a result; empty if nothing is known."""
        return self.changes("made_with", made_with(model.device, model.world.size))

    def changes(self, name: str, now: Mapping[str, Any]) -> str:
        """What of ``now`` is not as the facts called ``name`` have it, as a text."""
        saved = self.facts[name]
        return ", ".join(f"{key} {saved.get(key)} then and {now[key]} now" for key in now if saved.get(key) != now[key])


def saved_states(folder: str | Path) -> list[Path]:
    """The saved states of a folder, newest first."""
    found = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def has_state(folder: str | Path) -> bool:
    """Whether there is something to go on from."""
    return bool(saved_states(folder))


def save_state(
    folder: str | Path, model: SteeringPPO, extra_tensors: Mapping[str, Tensor], extra_facts: Mapping[str, Any]
) -> None:
    """Write everything that :func:`load_state` restores, all or nothing; to be called by all processes.

    Raises:
        OSError: where it cannot be written; what was saved before is whole then.
    """
    optimizer = model.optimizer_state()  # every process has a part of it
    task = model.learner.pass_through(model.task.state_dict)  # which may ask the base model
    if not model.world.is_main:
        return
    random_tensors, random_facts = random_state(model.device)
    parts: dict[str, Mapping[str, Tensor]] = {
        "policy": model.policy.state_dict(),
        "task": task,
        "optimizer": optimizer,
        "random": random_tensors,
        "extra": extra_tensors,
    }
    facts = {
        "step": model.steps_done,
        "setup": _setup(model),
        "made_with": made_with(model.device, model.world.size),
        "timesteps": model.num_timesteps,
        "updates": model._n_updates,
        "kl": model.kl.state_dict(),
        "mass_floor": model.mass_floor.state_dict(),
        "guard": model.guard_state(),
        "sampler": model.env.inner.sampler.state_dict(),
        "handles": [int(index) for index in model.env.inner.indices],
        "episodes": [episode["r"] for episode in model.ep_info_buffer or ()],
        "random": random_facts,
        "extra": dict(extra_facts),
    }
    write_state(folder, model.steps_done, parts, facts)


def write_state(
    folder: str | Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, Any]
) -> None:
    """Write the state after a step, all or nothing, and remove the ones that it makes needless.

    Args:
        folder: of the states.
        step: that was done.
        parts: tensors by the name of their part.
        facts: whatever else there is to know, as JSON; ``step`` is one of them.

    Raises:
        OSError: where it cannot be written; what was saved before is whole then.
    """
    data = _pack({f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}, facts)
    path = Path(folder) / f"step-{step}.safetensors"
    require_room(path, len(data))
    write_bytes(path, data)
    sync_folder(path.parent)  # the new one is there before an old one goes
    others = [other for other in saved_states(folder) if other != path]
    # The last one before this step stays. Later ones are of a time that the run went back from, as they were damaged.
    before = [other for other in others if _step(other) < step]
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


def load_state(saved: SavedState, model: SteeringPPO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restore a model that was set up with the same config; it is untouched after an error. For all processes.

    Returns:
        the extra tensors and facts that were saved.

    Raises:
        StateError: if the state is of another set-up.
    """
    facts = saved.facts
    for name, value in _setup(model).items():
        if facts["setup"].get(name) != value:
            raise StateError(f"{saved.path}: saved with {name} {facts['setup'].get(name)}, now it is {value}")
    part = {name: below(saved.tensors, name) for name in ("policy", "task", "optimizer", "random", "extra")}
    _require_same_shapes(saved.path, part["policy"], model.policy.state_dict())
    model.policy.load_state_dict(part["policy"])
    model.task.load_state_dict({key: value.to(model.device) for key, value in part["task"].items()})
    model.load_optimizer_state(part["optimizer"])
    model.num_timesteps, model._n_updates = facts["timesteps"], facts["updates"]
    model.kl.load_state_dict(facts["kl"])
    model.mass_floor.load_state_dict(facts["mass_floor"])
    model.load_guard_state(facts["guard"])
    indices = model.env.inner.restore(facts["sampler"], facts["handles"])
    model._last_obs, model._last_episode_starts = indices, np.ones(len(indices), dtype=bool)
    episodes = ({"r": reward, "l": 1, "t": 0.0} for reward in facts["episodes"])
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    restore_random(part["random"], facts["random"], model.device)
    return {key: value.to(model.device) for key, value in part["extra"].items()}, facts["extra"]


def _setup(model: SteeringPPO) -> dict[str, Any]:
    """What has to be the same for a state to fit, under the names that messages call it by."""
    return {
        "estimator": model.estimator,
        "KL constraint": type(model.kl).__name__,
        "decisions a step": model.env.num_envs,
        "decision set": _fingerprint(model),
        "base weights": model.policy.steering.config.base_id,
    }


def made_with(device: torch.device, processes: int) -> dict[str, Any]:
    """What has to be the same for a run to go on bit for bit."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": kind,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _fingerprint(model: SteeringPPO) -> str:
    if model not in _FINGERPRINTS:
        _FINGERPRINTS[model] = fingerprint(model.task.decisions)
    return _FINGERPRINTS[model]


def fingerprint(decisions: DecisionSet) -> str:
    """A set's name, size and the beginning of the SHA-256 of what it asks."""
    digest = hashlib.sha256()
    for decision in decisions:
        digest.update(json.dumps(decision.to_json(), sort_keys=True).encode())
    return f"{decisions.name} ({len(decisions)} decisions, {digest.hexdigest()[:12]})"


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


def _require_same_shapes(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for key in sorted({*saved, *own}):
        found = [tuple(values[key].shape) if key in values else "absent" for values in (saved, own)]
        if found[0] != found[1]:
            raise StateError(f"{path}: of another steering or baseline: {key} was {found[0]}, now it is {found[1]}")


def random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """torch's generators, which draw answers and anchors, NumPy's, which shuffles PPO's minibatches, and Python's."""
    kind, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, {"numpy": [kind, *rest], "python": [version, gauss]}


def restore_random(tensors: Mapping[str, Tensor], facts: Mapping[str, Any], device: torch.device) -> None:
    """Set the generators to what :func:`random_state` found."""
    torch.set_rng_state(tensors["torch"])
    kind, *rest = facts["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    version, gauss = facts["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _step(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part, without its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
