"""The folder of a run: who may write into it, what is gone on from, and what is said when a run ends early."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from dso.errors import UserError
from dso.files import as_path, check_writable, free_bytes, lock, sweep, write_text
from launch.config.schema import ConfigError, TrainConfig, changes, load_config, resolved_yaml
from trainers.parallel.ranks import RankLost, World
from trainers.state.saved import SavedState, has_state, read_state
from trainers.stopping import Preempted

T = TypeVar("T")
Resume = bool | Literal["auto"]

FREE_BYTES = 200_000_000  # what a run needs to start
LOW_BYTES = 20_000_000  # below this it saves and ends, while there still is room for what it says and keeps
RESULTS = ("validation.json", "steering", "curve.json", "curve.png", "report.md")

LESS_MEMORY = (
    "turn down model.max_tokens, raise train.gradient_accumulation_steps or set train.gradient_checkpointing=true, "
    "none of which changes the run"
)


class RunError(UserError):
    """A run folder that cannot be used or written; the message says why and what to do."""


class Stopped(Exception):
    """A run that ended early on request; the message says what was kept and how to go on.

    Attributes:
        preempted: it was SIGTERM that asked.
    """

    def __init__(self, message: str, preempted: bool = False):
        super().__init__(message)
        self.preempted = preempted


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a run is kept, and the state that it goes on from, None for a new one."""

    folder: Path
    saved: SavedState | None


@contextmanager
def failing_together(world: World) -> Iterator[None]:
    """Where one process cannot do what the block does, none goes on."""
    failed: OSError | UserError | None = None
    try:
        yield
    except (OSError, UserError) as error:
        failed = error
    try:
        world.require(None if failed is None else RunError(str(failed)))
    except UserError as told:
        raise (failed or told) from None


def on_main(world: World, work: Callable[[], T]) -> T:
    """Do something on the main process alone: its result, or why it could not be done, is every process's."""
    result: T | None = None
    with failing_together(world):
        if world.is_main:
            result = work()
    return cast(T, world.broadcast_object(result))


def check_folder(config: TrainConfig, name: str, resume: Resume, overwrite: bool, claim: Claim) -> Plan:
    """What a run would go on from; refused without a change to the disk if it cannot be kept there.

    A folder that is there is claimed before anything else is said of it.

    Raises:
        RunError: naming the folder and what to do.
        StateError: if what was saved cannot be gone on from.
    """
    folder = as_path(Path(config.run.output_dir) / (config.run.run_name or name))
    if resume and overwrite:
        raise RunError("--resume goes on with a run and --overwrite drops it; give one of them")
    if folder.is_dir():
        claim.take(folder)
    saved = None
    if has_state(folder / "state") and resume:
        _require_same_config(folder, config)
        saved = read_state(folder / "state")
    elif resume is True:
        way = "replace it with --overwrite" if folder.exists() else "leave --resume away to start"
        raise RunError(f"{folder}: nothing to resume, as no state was saved there; {way}")
    elif folder.exists() and not overwrite:
        _require_nothing_learned(folder, config, resume)
    elif folder.exists() and not _is_run(folder):
        raise RunError(f"{folder}: is no run (it has no config.yaml), so it is not overwritten; set run.run_name=...")
    try:
        check_writable(folder / "config.yaml")
    except OSError as error:
        raise RunError(f"{folder}: cannot be written; choose another place with run.output_dir=...") from error
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := free_bytes(place)) < FREE_BYTES:
        raise RunError(f"{folder}: only {free // 10**6} MB free on its disk; a run needs {FREE_BYTES // 10**6}")
    return Plan(folder, saved)


def _require_nothing_learned(folder: Path, config: TrainConfig, resume: Resume) -> None:
    """Whether a folder may be begun anew without being told to: if its run ended before it had anything to keep."""
    if not _is_run(folder):
        raise RunError(
            f"{folder}: is no run (it has no config.yaml), so nothing is started there; set run.run_name=..."
        )
    if not resume:
        if (folder / "config.yaml").exists():
            _require_same_config(folder, config)
        ways = "resume it with --resume, replace it" if has_state(folder / "state") else "replace it"
        raise RunError(f"{folder}: exists; {ways} with --overwrite, or set run.run_name=...")
    if results := _results(folder):
        reason = f"has results ({', '.join(results)}) but no state to go on from"
        raise RunError(f"{folder}: {reason}; replace it with --overwrite, or set run.run_name=...")
    if (folder / "config.yaml").exists():
        _require_same_config(folder, config)


def _results(folder: Path) -> list[str]:
    return [name for name in RESULTS if (folder / name).exists()]


def _is_run(folder: Path) -> bool:
    """A run's folder, or one that was killed as it was made."""
    if not folder.is_dir():
        return False
    ours = (path.name.startswith(".config.yaml.") for path in folder.iterdir())
    return (folder / "config.yaml").is_file() or all(ours)


def _require_same_config(folder: Path, config: TrainConfig) -> None:
    """A run goes on with the config that it began with, but for what does not change it."""
    try:
        before = load_config(str(folder / "config.yaml"))
    except ConfigError as error:
        raise RunError(f"{folder}: cannot be resumed, as its config is of no use here: {error}") from error
    if changed := changes(before, config):
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        ways = "give the same one to resume it, or set run.run_name=... to start beside it"
        if not has_state(folder / "state") and not _results(folder):
            ways = "nothing was learned there: replace it with --overwrite, or set run.run_name=..."
        raise RunError(f"{folder}: was trained with another config: {changed[0]}{more}; {ways}")


def prepare_folder(plan: Plan, config: TrainConfig, claim: Claim) -> None:
    """Make the folder of a new run, or tidy up the one that is gone on with; nothing goes before it is claimed.

    Raises:
        RunError: if it cannot be written, or another run has begun in it since :func:`check_folder`.
    """
    folder, checked = plan.folder, claim.held
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim.take(folder)
        if not checked and any(folder.iterdir()):
            raise RunError(f"{folder}: another run began in it meanwhile; set run.run_name=... to run beside it")
        if plan.saved is None:
            _empty(folder)
        for place in (folder, folder / "state"):
            sweep(place)
        write_text(folder / "config.yaml", resolved_yaml(config))
    except OSError as error:
        reason = f"cannot be written: {error.strerror}; choose another place with run.output_dir=..."
        raise RunError(f"{folder}: {reason}") from error


def _empty(folder: Path) -> None:
    """Drop what is in a run's folder; what shows that it is a run goes last, in case this is interrupted."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.yaml"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class Claim:
    """Keeps a second process from writing into a run's folder; the system lets go of it when this one dies."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether a folder is claimed."""
        return self._descriptor is not None

    def take(self, folder: Path) -> None:
        """Claim an existing folder in place of what was claimed before; one that is claimed stays so throughout.

        Raises:
            RunError: if another process has it.
        """
        if self._descriptor is not None and os.path.samestat(os.fstat(self._descriptor), os.stat(folder)):
            return
        self.release()
        self._descriptor = lock(folder)
        if self._descriptor is None:
            reason = "another process writes into it; wait for it or stop it, then give the same command"
            raise RunError(f"{folder}: {reason}")

    def release(self) -> None:
        """Let others in."""
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def going_on(folder: Path) -> str:
    """What of a run was kept, and how to go on."""
    if has_state(folder / "state"):
        return f"{folder} has what was done; go on with the same command and --resume"
    return "nothing was kept"


@contextmanager
def keeping(folder: Path, main: bool) -> Iterator[None]:
    """Where the block is left early, say what of the run was kept; a folder without anything learned is removed."""
    try:
        yield
    except BaseException as error:
        way = going_on(folder)
        if main and not has_state(folder / "state"):
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt | Preempted):
            raise Stopped(f"interrupted; {way}", preempted=isinstance(error, Preempted)) from error
        if isinstance(error, RankLost):
            raise RankLost(f"{error}; {way}") from error
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            raise RunError(f"{where}{error.strerror or error}; {way}") from error
        if _is_out_of_memory(error):
            raise RunError(f"out of memory; {LESS_MEMORY}. {way}") from error
        raise


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator, the host or torch's CPU allocator, which has no error of its own, had no room."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
