"""A reader sees the old content or the new one, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from dso import files
from dso.files import check_writable, replace_folder, write_bytes, write_text


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


@contextmanager
def largest_file(size: int):
    """Let the kernel itself refuse what is written beyond ``size`` bytes (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_write_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "gr\u00fc\u00dfe\n")
    assert path.read_bytes() == b"gr\xc3\xbc\xc3\x9fe\n"
    write_bytes(path, b"new")
    assert contents(tmp_path) == {"a/b/file.txt": b"new"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt()], ids=["no space", "Ctrl-C"])
def test_error_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    monkeypatch.setattr(files.os, step, fail_with(error))
    with pytest.raises(type(error)):
        write_bytes(path, b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_disk_full_in_the_middle_of_the_bytes(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with largest_file(4096), pytest.raises(OSError) as caught:
        write_bytes(path, b"x" * 100_000)
    assert caught.value.errno == errno.EFBIG
    assert contents(tmp_path) == {"file": b"old"}


def test_disk_full_for_a_new_file_leaves_nothing(tmp_path):
    with largest_file(4096), pytest.raises(OSError):
        write_bytes(tmp_path / "file", b"x" * 100_000)
    assert not list(tmp_path.iterdir())


def test_folder_takes_the_place_of_the_old_one(tmp_path):
    target = tmp_path / "deep" / "steering"
    with replace_folder(target) as fresh:
        (fresh / "gone").write_text("1")
    assert contents(tmp_path) == {"deep/steering/gone": b"1"}
    with replace_folder(target) as fresh:
        assert fresh.parent == target.parent  # one file system: the rename is at once
        (fresh / "kept").write_text("2")
        assert contents(target) == {"gone": b"1"}
    assert contents(tmp_path) == {"deep/steering/kept": b"2"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [NO_SPACE, KeyboardInterrupt(), ValueError("bad")], ids=["no space", "Ctrl-C", "bug"])
@pytest.mark.parametrize("existed", [True, False])
def test_error_while_filling_leaves_the_old_folder_alone(tmp_path, error, existed):
    target = tmp_path / "steering"
    if existed:
        target.mkdir()
        (target / "file").write_bytes(b"old")
    with pytest.raises(type(error)), replace_folder(target) as fresh:
        (fresh / "file").write_bytes(b"half")
        raise error
    assert contents(tmp_path) == ({"steering/file": b"old"} if existed else {})
    assert [p.name for p in tmp_path.iterdir()] == (["steering"] if existed else [])


def test_disk_full_while_filling(tmp_path):
    target = tmp_path / "steering"
    target.mkdir()
    (target / "file").write_bytes(b"old")
    with largest_file(4096), pytest.raises(OSError), replace_folder(target) as fresh:
        write_bytes(fresh / "small", b"fits")
        write_bytes(fresh / "file", b"x" * 100_000)
    assert contents(tmp_path) == {"steering/file": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["steering"]


@pytest.mark.parametrize("failing", [1, 2])
def test_error_in_a_rename_puts_the_old_folder_back(tmp_path, monkeypatch, failing):
    target = tmp_path / "steering"
    target.mkdir()
    (target / "file").write_bytes(b"old")
    real, calls = os.replace, []

    def flaky(source, destination):
        calls.append(destination)
        if len(calls) == failing:
            raise NO_SPACE
        real(source, destination)

    monkeypatch.setattr(files.os, "replace", flaky)
    with pytest.raises(OSError, match="No space left"), replace_folder(target) as fresh:
        (fresh / "file").write_bytes(b"new")
    assert contents(tmp_path) == {"steering/file": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["steering"]


# ---------------------------------------------------------------- what the place is


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "file").read_text() == "new"
    with replace_folder(tmp_path / "folder") as fresh:
        write_text(fresh / "other", "x")
    assert (tmp_path / "folder").is_symlink() and [p.name for p in (tmp_path / "real").iterdir()] == ["other"]


def test_what_is_no_plain_file_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(tmp_path / "pipe", b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write_bytes("/dev/null", b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("old")
    check_writable(None, tmp_path / "file", tmp_path / "new" / "deeper" / "file", "/dev/null")
    assert contents(tmp_path) == {"file": b"old"}  # nothing was made for it
    for place, error in ((tmp_path, IsADirectoryError), (tmp_path / "file" / "x" / "y", NotADirectoryError)):
        with pytest.raises(error) as caught:
            check_writable(tmp_path / "file", place)
        assert caught.value.filename == str(place)
        with pytest.raises(error):
            write_text(place, "new")
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    with pytest.raises(PermissionError, match=f"{tmp_path}/new"):
        check_writable(tmp_path / "new")
    check_writable("/dev/null")  # its folder need not be


def test_what_reads_our_output_reads_it_from_a_pipe():
    code = "from dso.files import check_writable, write_text; check_writable(p := '/dev/stdout'); write_text(p, 'x')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("x", "")


def test_the_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_text("~/kept/file", "x")
    assert (tmp_path / "kept" / "file").read_text() == "x"


@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_the_umask_is_kept(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "x")
        with replace_folder(tmp_path / "folder") as fresh:
            write_text(fresh / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~mask
    (tmp_path / "file").chmod(0o640)
    write_text(tmp_path / "file", "y")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
