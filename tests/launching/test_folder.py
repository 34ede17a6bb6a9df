"""The folder of a run: what is never overwritten, who may write into it, and how a run ends when it cannot write."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import FILES, config_of, full_after, outcome, steps_of
from small_runs import contents

from dso.errors import UserError
from dso.steering.model import Steering
from launch.config.schema import TrainConfig, load_config
from launch.run.folder import Claim, RunError, check_folder, failing_together, keeping, on_main, prepare_folder
from launch.run.train import Result, train
from trainers.parallel.ranks import World
from trainers.ppo import SteeringPPO, TrainingDiverged
from trainers.state.saved import saved_states
from trainers.tracking.jsonlines import JsonLines


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[TrainConfig, Result]:
    """One run of six steps, whole; not to be written to."""
    config = config_of(tmp_path_factory.mktemp("run"), model_folder)
    return config, train(config, name="unused", quiet=True)


def refusal(config: TrainConfig, **options: Any) -> str:
    """The message of a run that is refused; nothing below its place is changed."""
    place = Path(config.run.output_dir)
    before = contents(place)
    with pytest.raises(UserError) as caught:
        train(config, name="x", quiet=True, **options)
    assert contents(place) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is there already


def test_an_existing_folder_is_left_alone(run: tuple[TrainConfig, Result]) -> None:
    message = "letters: exists; resume it with --resume, replace it with --overwrite"
    assert message in refusal(run[0])
    assert "give one of them" in refusal(run[0], resume=True, overwrite=True)


def test_another_config_is_offered_what_fits(run: tuple[TrainConfig, Result], tmp_path: Path) -> None:
    """--overwrite only where nothing is lost; the name of another folder everywhere."""
    other = run[0].model_copy(update={"train": run[0].train.model_copy(update={"max_steps": 7})})
    changed = "letters: was trained with another config: train.max_steps was 6 and is 7; "
    beside = "give the same one to resume it, or set run.run_name=... to start beside it"
    for options in ({}, {"resume": True}, {"resume": "auto"}):
        assert refusal(other, **options).endswith(changed + beside)
    folder = tmp_path / "letters"  # of a run that was killed before it had anything
    folder.mkdir()
    (folder / "config.yaml").write_bytes((run[1].folder / "config.yaml").read_bytes())
    idle = other.model_copy(update={"run": other.run.model_copy(update={"output_dir": str(tmp_path)})})
    for options in ({}, {"resume": "auto"}):
        ways = "nothing was learned there: replace it with --overwrite, or set run.run_name=..."
        assert refusal(idle, **options).endswith(changed + ways)


def test_overwrite_replaces_a_run_only_once_the_new_one_can_start(tmp_path: Path, model_folder: Path) -> None:
    first = train(config_of(tmp_path, model_folder, train__max_steps=1), name="x", quiet=True)
    broken = config_of(tmp_path, model_folder, model__name="./none")
    assert "model './none': no " in refusal(broken, overwrite=True)
    (first.folder / "left.txt").write_text("over")
    second = train(config_of(tmp_path, model_folder, train__max_steps=2), name="x", overwrite=True, quiet=True)
    kept = {"state/step-0.safetensors", "state/step-2.safetensors"}
    assert contents(second.folder).keys() == {name for name in FILES if not name.startswith("state/")} | kept
    assert steps_of(second.folder) == [20, 40]


@pytest.mark.parametrize("options", [{"overwrite": True}, {"resume": "auto"}])
def test_nothing_that_is_no_run_is_dropped(tmp_path: Path, model_folder: Path, options: dict[str, Any]) -> None:
    precious = tmp_path / "runs" / "letters"
    precious.mkdir(parents=True)
    (precious / "thesis.txt").write_text("years of work")
    assert "is no run (it has no config.yaml), so" in refusal(config_of(tmp_path, model_folder), **options)


def test_the_configs_name_is_the_folders_where_none_is_given(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, run__run_name=None, train__max_steps=1)
    assert train(config, name="other", quiet=True).folder == tmp_path / "runs" / "other"


# One process at a time


@contextmanager
def taken(folder: Path) -> Iterator[None]:
    """As if another process wrote into a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("options", [{"resume": True}, {"resume": "auto"}, {"overwrite": True}])
def test_a_folder_that_another_process_writes_into_is_left_to_it(
    run: tuple[TrainConfig, Result], options: dict[str, Any]
) -> None:
    config, result = run
    with taken(result.folder):
        assert f"{result.folder}: another process writes into it; " in refusal(config, **options)


def test_a_run_keeps_its_folder_to_itself_until_it_ends(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=1)
    real, refused = SteeringPPO.train, []

    def learns(self: SteeringPPO) -> None:
        with pytest.raises(RunError, match="another process writes into it"):
            train(config, name="x", overwrite=True, quiet=True)
        refused.append(True)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(SteeringPPO, "train", learns)
        result = train(config, name="x", quiet=True)
    assert refused
    with taken(result.folder):  # free again
        pass


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_began_in_the_folder_meanwhile_keeps_its_files(
    tmp_path: Path, model_folder: Path, overwrite: bool
) -> None:
    config, late = config_of(tmp_path, model_folder, train__max_steps=1), Claim()
    plan = check_folder(config, "x", False, overwrite, late)  # nothing is there yet
    with taken_by_a_run(plan.folder), pytest.raises(RunError, match="another process writes into it"):
        prepare_folder(plan, config, late)
    with pytest.raises(RunError, match="another run began in it meanwhile"):  # and has ended
        prepare_folder(plan, config, late)
    assert (plan.folder / "config.yaml").read_text() == "theirs"
    late.release()


@contextmanager
def taken_by_a_run(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("theirs")
    with taken(folder):
        yield


def test_a_running_run_is_never_said_to_be_overwritten(run: tuple[TrainConfig, Result]) -> None:
    with taken(run[1].folder):
        message = refusal(run[0])
    assert "another process writes into it" in message and "--overwrite" not in message


def test_a_folder_that_is_a_link_is_overwritten_where_it_leads(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=1)
    link, target = tmp_path / "runs" / "letters", tmp_path / "elsewhere"
    target.mkdir()
    link.parent.mkdir()
    link.symlink_to(target)
    train(config, name="x", overwrite=True, quiet=True)
    (target / "left.txt").write_text("over")
    train(config, name="x", overwrite=True, quiet=True)
    assert link.is_symlink() and (target / "report.md").is_file() and not (target / "left.txt").exists()


def test_a_tilde_is_the_home_folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = config_of(tmp_path, model_folder, run__output_dir="~/mine")
    assert check_folder(config, "x", False, False, Claim()).folder == tmp_path / "mine" / "letters"


# Places and disks


@pytest.mark.parametrize("place", ["{}/file/runs", "/proc/dso"])  # where not even root can write
def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    config = config_of(tmp_path, model_folder, run__output_dir=place.format(tmp_path))
    with pytest.raises(RunError, match="cannot be written.* choose another place with run.output_dir="):
        train(config, name="x")


def test_a_full_disk_is_seen_before_the_run(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3_000_000))
    assert "letters: only 3 MB free on its disk; a run needs 200" in refusal(config_of(tmp_path, model_folder))


def test_a_disk_that_is_nearly_full_ends_the_run_after_a_save(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[TrainConfig, Result]
) -> None:
    config = config_of(tmp_path, model_folder)
    real, free = SteeringPPO.train, [10**9]

    def fills(self: SteeringPPO) -> None:
        free[0] = 10**9 if self.steps_done < 3 else 19_000_000
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(SteeringPPO, "train", fills)
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
        with pytest.raises(RunError) as caught:
            train(config, name="x", quiet=True)
    folder = tmp_path / "runs" / "letters"
    assert str(caught.value) == (
        f"stopped after step 4, which is saved, as only 19.0 MB are free on the disk of {folder}; "
        "make room and go on with the same command and --resume"
    )
    assert saved_states(folder / "state")[0].name == "step-4.safetensors"
    assert outcome(train(config, name="x", resume=True, quiet=True).folder) == outcome(run[1].folder)


def test_a_disk_that_fills_up_ends_the_run_with_its_state_intact(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[TrainConfig, Result]
) -> None:
    config = config_of(tmp_path, model_folder)
    with monkeypatch.context() as patch:
        full_after(patch, 3)  # the config and the states at steps 0 and 2
        with pytest.raises(RunError) as caught:
            train(config, name="x", quiet=True)
    state = tmp_path / "runs" / "letters" / "state"
    assert str(caught.value).startswith(f"{state}/step-4.safetensors: No space left on device; ")
    assert str(caught.value).endswith("has what was done; go on with the same command and --resume")
    assert sorted(contents(state)) == ["step-0.safetensors", "step-2.safetensors"]
    result = train(config, name="x", resume=True, quiet=True)
    assert outcome(result.folder) == outcome(run[1].folder)


def test_records_that_do_not_fit_end_the_run_with_its_state_intact(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, run: tuple[TrainConfig, Result]
) -> None:
    config = config_of(tmp_path, model_folder)
    real = JsonLines.write

    def full(self: JsonLines, values: dict[str, Any], excluded: Any, step: int = 0) -> None:
        if step == 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        real(self, values, excluded, step)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", full)
        with pytest.raises(RunError, match="metrics.jsonl: No space left on device; .* --resume"):
            train(config, name="x", quiet=True)
    assert outcome(train(config, name="x", resume="auto", quiet=True).folder) == outcome(run[1].folder)


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, model_folder)
    full_after(monkeypatch, 1)
    with pytest.raises(RunError, match="No space left on device; nothing was kept"):
        train(config, name="x", quiet=True)
    assert not (tmp_path / "runs" / "letters").exists()


# Steps that cannot be taken


def test_training_that_diverges_keeps_its_last_good_state_and_its_best_steering(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, model_folder, run__save_steps=1)
    real = SteeringPPO.train

    def diverges(self: SteeringPPO) -> None:
        if self.steps_done > 4:
            raise TrainingDiverged("step 5: the loss is not finite; lower the learning rate")
        real(self)
        self.skipped_in_a_row = int(self.steps_done == 4)  # after which nothing is saved

    monkeypatch.setattr(SteeringPPO, "train", diverges)
    with pytest.raises(RunError) as caught:
        train(config, name="x", quiet=True)
    folder = tmp_path / "runs" / "letters"
    assert str(caught.value) == (
        "step 5: the loss is not finite; lower the learning rate; "
        f"the last good state is {folder}/state/step-3.safetensors; "
        f"the best steering so far, of step 4, is in {folder}/steering"
    )
    steering = Steering.from_pretrained(folder / "steering")
    assert any(value.any() for value in steering.tensors().values())


# Several processes


class Others(World):
    """The processes beside the main one, which was told what it broadcast."""

    rank, size = 1, 2

    def __init__(self, *told: Any) -> None:
        self.told = list(told)

    def broadcast_object(self, value: Any) -> Any:
        return self.told.pop(0)

    def require(self, error: UserError | None) -> None:
        if said := self.told.pop(0):
            raise UserError(said)


class Main(World):
    """The main process; notes what it broadcasts."""

    size = 2

    def __init__(self) -> None:
        self.said: list[Any] = []

    def broadcast_object(self, value: Any) -> Any:
        self.said.append(value)
        return value

    def require(self, error: UserError | None) -> None:
        self.said.append(error and str(error))
        super().require(error)


def test_the_main_process_works_and_all_know_the_result() -> None:
    main = Main()
    assert on_main(main, lambda: 7) == 7
    assert on_main(Others(*main.said), lambda: pytest.fail("not here")) == 7


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system", "runs"), UserError("no such thing")])
def test_what_the_main_process_cannot_do_ends_all_with_its_message(error: Exception) -> None:
    def fails() -> None:
        raise error

    main = Main()
    with pytest.raises(type(error)):
        on_main(main, fails)
    with pytest.raises(UserError) as caught:
        on_main(Others(*main.said), lambda: pytest.fail("not here"))
    assert str(caught.value) == str(error)
    with pytest.raises(UserError, match="^said$"), failing_together(Others("said")):
        pass


def test_the_config_says_how_often_to_save(tmp_path: Path, model_folder: Path) -> None:
    config_of(tmp_path, model_folder)
    with pytest.raises(UserError, match="run.save_steps: must be at least 1, found 0"):
        load_config(str(tmp_path / "own.yaml"), ["run.save_steps=0"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["host", "accelerator", "torch's CPU allocator"],
)
def test_running_out_of_memory_says_what_to_turn_down(tmp_path: Path, error: Exception) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step-3.safetensors").write_bytes(b"")
    said = r"^out of memory; turn down model.max_tokens, .* and --resume$"
    with pytest.raises(RunError, match=said) as raised, keeping(tmp_path, main=True):
        raise error
    assert raised.value.__cause__ is error and (tmp_path / "state" / "step-3.safetensors").exists()
    with pytest.raises(RuntimeError, match="a bug"), keeping(tmp_path, main=True):
        raise RuntimeError("a bug")
