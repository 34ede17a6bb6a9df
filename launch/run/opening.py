"""How a run begins and ends: its processes, its folder, its objects and its tracker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from launch.cluster.processes import open_world
from launch.config.schema import TrainConfig
from launch.run.folder import (
    Claim,
    Plan,
    Resume,
    Stopped,
    check_folder,
    failing_together,
    keeping,
    on_main,
    prepare_folder,
)  # fmt: skip
from launch.run.session import Session, fingerprints, open_decisions, open_run_tracker, open_session
from trainers.parallel.ranks import World
from trainers.stopping import OrderlyStop, Preempted
from trainers.tracking.base import Tracker
from trainers.tracking.tracker import check_tracker


class Start(NamedTuple):
    """A run whose folder no other process has meanwhile; nothing of it is changed, and no model is open yet.

    Attributes:
        plan: its folder, and the state that it goes on from.
        claim: of the folder.
        stop: who hears of signals.
        world: the processes that run together.
        deepspeed: its configuration, if there is one.
    """

    plan: Plan
    claim: Claim
    stop: OrderlyStop
    world: World
    deepspeed: dict[str, Any] | None


@contextmanager
def claimed(
    config: TrainConfig,
    *,
    name: str,
    resume: Resume = False,
    overwrite: bool = False,
    deepspeed: str | None = None,
) -> Iterator[Start]:
    """What a run begins with; see :func:`launch.run.train.train`.

    Raises:
        UserError: if the config or the folder cannot be used; an existing run is as it was then.
        Stopped: on Ctrl-C and SIGTERM.
    """
    check_tracker(config.run.report_to)
    claim = Claim()

    def planned() -> Plan:
        plan = check_folder(config, name, resume, overwrite, claim)
        if plan.saved is not None:
            plan.saved.require(fingerprints(config, open_decisions(config)))
        return plan

    try:
        with _deterministic(config.train.full_determinism), OrderlyStop() as stop:
            world, settings = open_world(config, deepspeed)
            yield Start(on_main(world, planned), claim, stop, world, settings)
            world.close()  # not after an error: other processes may still be at it
    except Preempted as error:
        raise Stopped("stopped by SIGTERM; nothing was changed", preempted=True) from error
    finally:
        claim.release()


@contextmanager
def opened(config: TrainConfig, start: Start, quiet: bool = False) -> Iterator[tuple[Session, Tracker]]:
    """The objects of a run, and who else hears of it; its folder is ready.

    Raises:
        UserError: if the config names what cannot be used; an existing run is as it was then.
        Stopped: on Ctrl-C and SIGTERM; what was learned is kept.
    """
    plan, world = start.plan, start.world
    with failing_together(world):  # before the folder is touched, as most mistakes show here
        session = open_session(config, world, start.deepspeed)
    on_main(world, lambda: prepare_folder(plan, config, start.claim))
    with keeping(plan.folder, world.is_main), open_run_tracker(config, plan.folder, world, quiet) as tracker:
        yield session, tracker


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Within the block operations that have no deterministic form on this device are refused."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
