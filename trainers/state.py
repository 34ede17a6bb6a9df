"""What a run needs to go on where it was: written and read in one place, without pickle.

One file, replaced at once, so that a run may be killed at any moment: its tensors are the operators, the optimiser's
moments, baselines, running preferences, the random generators and what the caller adds; its metadata holds the rest
as JSON (step, dual variable, sampler) and a SHA-256 of everything, by which damage is found.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dso.decisions import DecisionSet
from dso.errors import UserError
from dso.files import write_bytes
from trainers.ppo import SteeringPPO

STATE_FILE = "state.safetensors"
FORMAT = 1


class StateError(UserError):
    """A saved state that cannot be gone on from; the message says why."""


def has_state(folder: str | Path) -> bool:
    """Whether there is something to go on from."""
    return (Path(folder) / STATE_FILE).is_file()


def save_state(
    folder: str | Path, model: SteeringPPO, extra_tensors: Mapping[str, Tensor], extra_facts: Mapping[str, Any]
) -> None:
    """Write everything that :func:`load_state` restores, all or nothing."""
    tensors = {f"policy/{key}": value for key, value in model.policy.state_dict().items()}
    tensors |= {f"task/{key}": value for key, value in model.task.state_dict().items()}
    optimizer = model.policy.optimizer.state_dict()["state"]
    tensors |= {f"optimizer/{index}/{key}": value for index, entry in optimizer.items() for key, value in entry.items()}
    tensors |= {f"extra/{key}": value for key, value in extra_tensors.items()}
    random_tensors, random_facts = _random_state(model.device)
    tensors |= {f"random/{key}": value for key, value in random_tensors.items()}
    facts = {
        "setup": _setup(model),
        "timesteps": model.num_timesteps,
        "updates": model._n_updates,
        "kl": model.kl.state_dict(),
        "sampler": model.env.inner.sampler.state_dict(),
        "handles": [int(handle) for handle in model.env.inner.handles],
        "episodes": [episode["r"] for episode in model.ep_info_buffer or ()],
        "random": random_facts,
        "extra": dict(extra_facts),
    }
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    text = json.dumps(facts)
    write_bytes(Path(folder) / STATE_FILE, save(plain, {"facts": text, "sha256": _digest(plain, text)}))


def load_state(folder: str | Path, model: SteeringPPO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restore a model that was set up with the same config; it is untouched after an error.

    Returns:
        the extra tensors and facts that were saved.

    Raises:
        StateError: if the state is missing, damaged, or of another set-up.
    """
    path = Path(folder) / STATE_FILE
    tensors, facts = _read(path)
    for name, value in _setup(model).items():
        if facts["setup"].get(name) != value:
            raise StateError(f"{path}: saved with {name} {facts['setup'].get(name)}, now it is {value}")
    part = {name: _below(tensors, name) for name in ("policy", "task", "optimizer", "random", "extra")}
    for name, own in (("policy", model.policy.state_dict()), ("task", model.task.state_dict())):
        _require_same_shapes(path, part[name], own)
    model.policy.load_state_dict(part["policy"])
    model.task.load_state_dict({key: value.to(model.device) for key, value in part["task"].items()})
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in part["optimizer"].items():
        index, name = key.split("/", 1)
        entries.setdefault(int(index), {})[name] = value  # moved to the parameters' device where it has to be
    groups = model.policy.optimizer.state_dict()["param_groups"]
    model.policy.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    model.num_timesteps, model._n_updates = facts["timesteps"], facts["updates"]
    model.kl.load_state_dict(facts["kl"])
    handles = model.env.inner.restore(facts["sampler"], facts["handles"])
    model._last_obs, model._last_episode_starts = handles, np.ones(len(handles), dtype=bool)
    episodes = ({"r": reward, "l": 1, "t": 0.0} for reward in facts["episodes"])
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    _restore_random(part["random"], facts["random"], model.device)
    return {key: value.to(model.device) for key, value in part["extra"].items()}, facts["extra"]


def _setup(model: SteeringPPO) -> dict[str, Any]:
    """What has to be the same for a state to fit, under the names that messages call it by."""
    return {
        "format": FORMAT,
        "estimator": model.estimator,
        "KL constraint": type(model.kl).__name__,
        "decisions a step": model.env.num_envs,
        "decision set": _fingerprint(model.task.decisions),
    }


def _fingerprint(decisions: DecisionSet) -> str:
    digest = hashlib.sha256()
    for decision in decisions:
        digest.update(json.dumps(decision.to_json(), sort_keys=True).encode())
    return f"{decisions.name} ({len(decisions)} decisions, {digest.hexdigest()[:12]})"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it has no __iter__)
    except FileNotFoundError as error:
        raise StateError(f"{path}: no saved state there") from error
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path}: not a usable state: {error}") from error
    text = metadata.get("facts", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise StateError(f"{path}: damaged (its SHA-256 is not the one it states)")
    return tensors, json.loads(text)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for key in sorted(tensors):
        digest.update(f"{key} {tensors[key].dtype} {tuple(tensors[key].shape)}".encode())
        digest.update(tensors[key].numpy().tobytes())
    return digest.hexdigest()


def _require_same_shapes(path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    for key in sorted({*saved, *own}):
        found = [tuple(values[key].shape) if key in values else "absent" for values in (saved, own)]
        if found[0] != found[1]:
            raise StateError(f"{path}: of another steering or baseline: {key} was {found[0]}, now it is {found[1]}")


def _random_state(device: torch.device) -> tuple[dict[str, Tensor], list[Any]]:
    """torch's generators, which draw answers and anchors, and NumPy's, which shuffles PPO's minibatches."""
    kind, keys, *rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, [kind, *rest]


def _restore_random(tensors: Mapping[str, Tensor], facts: list[Any], device: torch.device) -> None:
    torch.set_rng_state(tensors["torch"])
    kind, *rest = facts
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _below(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
