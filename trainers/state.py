"""What a run needs to go on where it was: written and read in one place, without pickle.

``state.safetensors`` holds tensors (operators, optimiser moments, baselines, running preferences, torch's generator, the
best operators so far), ``state.json`` the rest (step, dual variable, sampler). Both are in one folder that is
replaced as a whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dso.files import replace_folder, write_text
from trainers.ppo import SteeringPPO

TENSORS = "state.safetensors"
FACTS = "state.json"


class StateError(ValueError):
    """A saved state that cannot be gone on from; the message says why."""


def save_state(folder: str | Path, model: SteeringPPO, extra_tensors: dict[str, Tensor], extra_facts: dict[str, Any]) -> None:
    """Write everything that :func:`load_state` restores, all or nothing."""
    tensors = {f"policy/{key}": value for key, value in model.policy.state_dict().items()}
    tensors |= {f"task/{key}": value for key, value in model.task.state_dict().items()}
    optimizer = model.policy.optimizer.state_dict()["state"]
    tensors |= {f"optimizer/{index}/{key}": value for index, entry in optimizer.items() for key, value in entry.items()}
    tensors |= {f"extra/{key}": value for key, value in extra_tensors.items()}
    tensors["rng/torch"] = torch.get_rng_state()
    facts = {
        "timesteps": model.num_timesteps,
        "updates": model._n_updates,
        "kl": model.kl.state_dict(),
        "sampler": model.env.inner.sampler.state_dict(),
        "handles": [int(handle) for handle in model.env.inner.handles],
        "extra": extra_facts,
    }
    with replace_folder(folder) as fresh:
        save_file({key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}, fresh / TENSORS)
        write_text(fresh / FACTS, json.dumps(facts))


def load_state(folder: str | Path, model: SteeringPPO) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Restore a model that was set up with the same config.

    Returns:
        the extra tensors and facts that were saved.

    Raises:
        StateError: if the state is missing, damaged, or of another set-up.
    """
    folder = Path(folder)
    try:
        tensors = load_file(folder / TENSORS)
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise StateError(f"{folder}: no usable state: {error}") from error
    device = model.device
    part = {name: _below(tensors, name, device) for name in ("policy", "task", "optimizer", "extra")}
    try:
        model.policy.load_state_dict(part["policy"])
    except RuntimeError as error:
        raise StateError(f"{folder}: the state is of another steering: {str(error).splitlines()[-1].strip()}") from error
    model.task.load_state_dict(part["task"])
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in part["optimizer"].items():
        index, name = key.split("/", 1)
        entries.setdefault(int(index), {})[name] = value.cpu() if name == "step" else value
    groups = model.policy.optimizer.state_dict()["param_groups"]
    model.policy.optimizer.load_state_dict({"state": entries, "param_groups": groups})
    torch.set_rng_state(tensors["rng/torch"])
    model.num_timesteps, model._n_updates = facts["timesteps"], facts["updates"]
    model.kl.load_state_dict(facts["kl"])
    handles = model.env.inner.restore(facts["sampler"], facts["handles"])
    model._last_obs, model._last_episode_starts = handles, np.ones(len(handles), dtype=bool)
    return part["extra"], facts["extra"]


def _below(tensors: dict[str, Tensor], name: str, device: torch.device) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value.to(device) for key, value in tensors.items() if key.startswith(f"{name}/")}
