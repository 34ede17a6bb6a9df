"""Saving training on free-form answers so that it goes on bit for bit.

A state is a file as in :mod:`trainers.state.saved`: the operators, Adam's moments and step sizes, the running
preferences, the random generators of every process, the price of KL, and what the caller adds. Which decisions a step
asks follows from the seed and the step's number. transformers' own checkpoints are not used: they hold the whole model,
and know neither the preferences nor the price.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor

from dso.decisions.decision import DecisionSet
from dso.steering.model import Steering
from trainers.grpo import SteeredAnswers
from trainers.state.saved import (
    SavedState,
    StateError,
    below,
    fingerprint,
    made_with,
    random_state,
    restore_random,
    write_state,
)


def setup(training: DecisionSet, steering: Steering) -> dict[str, Any]:
    """What has to be the same for a state to fit, under the names that messages call it by."""
    return {"decision set": fingerprint(training), "base weights": steering.config.base_id}


def require_setup(saved: SavedState, now: Mapping[str, Any]) -> None:
    """Refuse a state of other decisions or another model.

    Raises:
        StateError: naming what is not as it was.
    """
    if changed := saved.changes("setup", now):
        raise StateError(f"{saved.path}: saved with another set-up: {changed}")


def save_state(
    folder: str | Path, trainer: SteeredAnswers, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write what :func:`load_state` restores, all or nothing; to be called by all processes after the same step.

    Args:
        folder: of the states.
        trainer: whose step has ended.
        tensors, facts: what the caller adds.

    Raises:
        OSError: where it cannot be written; what was saved before is whole then.
    """
    task = trainer.task.state_dict()  # which may ask the base model, in all processes
    generators = gather_object([random_state(trainer.task.backbone.device)])
    if not trainer.is_world_process_zero():
        return
    step = trainer.state.global_step
    parts: dict[str, Mapping[str, Tensor]] = {
        "steering": trainer.steering.tensors(),
        "task": task,
        "optimizer": _optimizer(trainer),
        "extra": tensors,
        **{f"random/{rank}": found for rank, (found, _) in enumerate(generators)},
    }
    stated = {
        "step": step,
        "setup": setup(trainer.task.decisions, trainer.steering),
        "made_with": _made_with(trainer),
        "tokens": trainer.state.num_input_tokens_seen,
        "kl": trainer.kl.state_dict(),
        "random": [said for _, said in generators],
        "extra": dict(facts),
    }
    write_state(folder, step, parts, stated)


def load_state(saved: SavedState, trainer: SteeredAnswers) -> str:
    """Restore a trainer that was begun at the state's step; for all processes.

    Returns:
        what is not as it was and may change the last bits of a result; empty if nothing is known.

    Raises:
        StateError: if the state is of other decisions or another model.
    """
    facts, device = saved.facts, trainer.task.backbone.device
    require_setup(saved, setup(trainer.task.decisions, trainer.steering))
    trainer.steering.load_tensors({key: value.to(device) for key, value in below(saved.tensors, "steering").items()})
    trainer.task.load_state_dict({key: value.to(device) for key, value in below(saved.tensors, "task").items()})
    own = below(saved.tensors, "optimizer")
    for number, parameter in enumerate(trainer.steering.parameters()):
        entries = trainer.own_optimizer.state[parameter]
        for key, value in below(own, str(number)).items():
            entries[key].copy_(value)
    trainer.kl.load_state_dict(facts["kl"])
    trainer.beta = trainer.kl.coefficient
    trainer.tokens = facts["tokens"]
    rank = trainer.accelerator.process_index
    if rank < len(facts["random"]):
        tensors = below(saved.tensors, f"random/{rank}")
        trainer.random = lambda: restore_random(tensors, facts["random"][rank], device)
    return saved.changes("made_with", _made_with(trainer))


def _optimizer(trainer: SteeredAnswers) -> dict[str, Tensor]:
    """Of each parameter, by its number, what the optimiser keeps."""
    return {
        f"{number}/{key}": value
        for number, parameter in enumerate(trainer.steering.parameters())
        for key, value in trainer.own_optimizer.state[parameter].items()
    }


def _made_with(trainer: SteeredAnswers) -> dict[str, Any]:
    return made_with(trainer.task.backbone.device, trainer.accelerator.num_processes)
