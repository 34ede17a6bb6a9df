"""How a run begins and ends, whichever trainer is behind it: its processes, its folder, its objects and its tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

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
from launch.run.session import open_run_tracker
from trainers.parallel.ranks import World
from trainers.stopping import OrderlyStop, Preempted
from trainers.tracking.base import Tracker
from trainers.tracking.tracker import check_tracker

S = TypeVar("S")
Settings = dict[str, Any] | None  # DeepSpeed's
OpenWorld = Callable[[TrainConfig, str | None], tuple[World, Settings]]
OpenSession = Callable[[TrainConfig, World, Settings], S]


class Run(NamedTuple, Generic[S]):
    """What a run works with.

    Attributes:
        session: the objects that its config names.
        plan: its folder, and the state that it goes on from.
        stop: who hears of signals.
        tracker: who else hears of the run.
        world: the processes that run together.
    """

    session: S
    plan: Plan
    stop: OrderlyStop
    tracker: Tracker
    world: World


@contextmanager
def opened(
    config: TrainConfig,
    open_world: OpenWorld,
    open_session: OpenSession[S],
    *,
    name: str,
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
    deepspeed: str | None = None,
) -> Iterator[Run[S]]:
    """The objects of a run and its folder, which no other process has meanwhile.

    Args:
        open_world, open_session: of the trainer that the config names.
        name: of the run's folder where the config names none.
        resume: go on from the folder's last saved state; "auto" starts the run if there is none.
        overwrite: drop an existing run of that name.
        quiet: print nothing but the result.
        deepspeed: path of DeepSpeed's configuration, for runs of a launcher.

    Raises:
        UserError: if the config or the folder cannot be used; an existing run is as it was then.
        Stopped: on Ctrl-C and SIGTERM; what was learned is kept.
    """
    check_tracker(config.run.report_to)
    claim = Claim()

    try:
        with OrderlyStop() as stop:
            world, settings = open_world(config, deepspeed)
            plan = on_main(world, lambda: check_folder(config, name, resume, overwrite, claim))
            with failing_together(world):  # before the folder is touched, as most mistakes show here
                session = open_session(config, world, settings)
            on_main(world, lambda: prepare_folder(plan, config, claim))
            with keeping(plan.folder, world.is_main), open_run_tracker(config, plan.folder, world, quiet) as tracker:
                yield Run(session, plan, stop, tracker, world)
            world.close()  # not after an error: other processes may still be at it
    except Preempted as error:
        raise Stopped("stopped by SIGTERM; nothing was changed", preempted=True) from error
    finally:
        claim.release()
