"""Records are appended whole; a run that goes on has those that it had when its state was saved, and no others."""

from __future__ import annotations

import errno
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from trainers.tracking.jsonlines import JsonLines


def write(path: Path, *steps: int, size: int | None = None) -> int:
    """Write a record a step; the file's size then."""
    lines = JsonLines(path, size)
    for step in steps:
        lines.write({"b": torch.tensor(1.5), "a": np.float32(0.5), "n": math.inf}, {}, step)
    end = lines.sync()
    lines.close()
    return end


def records(*steps: int) -> str:
    return "".join(f'{{"step": {step}, "a": 0.5, "b": 1.5, "n": null}}\n' for step in steps)


def test_records_are_plain_json_in_a_fixed_order(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert write(path, 4) == len(records(4))
    assert write(path, 8, 8) == len(records(4, 8, 8))  # what is there stays
    assert path.read_text() == records(4, 8, 8)


def test_going_on_cuts_off_what_will_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    size = write(path, 4, 8)
    write(path, 12)
    path.write_text(path.read_text() + '{"step": 16, "a":')  # killed here
    assert write(path, 12, 16, size=size) == len(records(4, 8, 12, 16))
    assert path.read_text() == records(4, 8, 12, 16)
    assert write(path, size=0) == 0
    assert path.read_text() == ""


@pytest.mark.parametrize(("left", "kept"), [(None, ()), (0, ()), (10, ()), (60, (4,)), (len(records(4)), (4,))])
def test_records_that_someone_took_away_are_counted(tmp_path: Path, left: int | None, kept: tuple[int, ...]) -> None:
    path = tmp_path / "metrics.jsonl"
    size = write(path, 4, 8)
    if left is None:
        path.unlink()
    else:
        path.write_text(path.read_text()[:left])
    lines = JsonLines(path, size)
    assert lines.lost == size - len(records(*kept))
    lines.close()
    assert path.read_text() == records(*kept)  # no half record for the next to be written behind


def test_only_what_is_wanted_is_written(tmp_path: Path) -> None:
    path = tmp_path / "times.jsonl"
    lines = JsonLines(path, wanted=lambda key: key.startswith("time/"))
    lines.write({"time/fps": 3, "train/kl": 0.5}, {}, 4)
    lines.write({"train/kl": 0.5}, {}, 8)
    lines.close()
    assert path.read_text() == '{"step": 4, "time/fps": 3}\n'


def test_a_full_disk_names_the_file_and_leaves_what_can_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    size = write(path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))  # the kernel takes half a record
    try:
        with pytest.raises(OSError) as caught:
            write(path, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == records(4, 8)[: size + 20]
    write(path, 8, size=size)
    assert path.read_text() == records(4, 8)
