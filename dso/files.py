"""Writing files so that a reader never sees half of one: to a temporary name, then renamed.

What a killed process leaves has names that begin with a dot and end in ``.part``; :func:`sweep` tidies up after it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"
OLD = ".old" + PART


def cache_folder() -> Path:
    """Where what was fetched, converted or drawn is kept: ``$DSO_CACHE``, else ``~/.cache/dso``."""
    return Path(os.environ.get("DSO_CACHE") or Path.home() / ".cache" / "dso")


def as_path(path: str | Path) -> Path:
    """The path that a user means: ``~`` expanded, links followed."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _is_special(path: str | Path) -> bool:
    """Whether it is there and neither a plain file nor a folder: a device, a pipe."""
    place = Path(path).expanduser()
    return place.exists() and not place.is_file() and not place.is_dir()


def check_writable(*paths: str | Path | None) -> None:
    """That files can be written, asked before the work that fills them; None is a file that nobody wants.

    Raises:
        OSError: what writing the first of those that cannot be would end with, as far as the folder above it tells.
    """
    for path in paths:
        if path is None or _is_special(path):
            continue
        place = as_path(path)
        above = next(folder for folder in place.parents if folder.exists())
        reason = None
        if not above.is_dir():
            reason = errno.ENOTDIR
        elif place.is_dir():
            reason = errno.EISDIR
        elif not os.access(above, os.W_OK | os.X_OK):
            reason = errno.EACCES
        if reason is not None:
            raise OSError(reason, os.strerror(reason), str(place))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path`` at once: after an error the old content stands and nothing else is left.

    A link is followed. A file that is there keeps its permissions, a new one has those of the user's umask. What is no
    plain file (a device, a pipe) is written to.
    """
    if _is_special(path):
        # By the name that was given: what /dev/stdout leads to, where it is a pipe, is no name that can be opened.
        with open(Path(path).expanduser(), "wb") as special:
            special.write(data)
        return
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if path.exists():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None  # a write that fails on a full disk does not say where
        raise


def write_text(path: str | Path, text: str) -> None:
    """:func:`write_bytes` of the UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


@contextmanager
def stage(folder: Path) -> Iterator[Path]:
    """A new folder inside ``folder`` that is gone at the end, to fill before what it holds is moved into place."""
    staged = folder / f".staged.{secrets.token_hex(4)}{PART}"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Fill the yielded folder; it takes the place of ``path`` at the end, or vanishes on an error."""
    path = as_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    fresh.mkdir()
    old = fresh.with_name(fresh.name.removesuffix(PART) + OLD)
    try:
        yield fresh
        if path.exists():
            os.chmod(fresh, stat.S_IMODE(path.stat().st_mode))
            os.replace(path, old)
        os.replace(fresh, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: str | Path) -> None:
    """Remove what writes into a folder left when they were killed; a folder that was being replaced is put back."""
    for left in sorted(Path(folder).glob(f".*{PART}")):
        name = left.name[1:].removesuffix(OLD).removesuffix(PART).rpartition(".")[0]
        if not name:
            continue  # not one of ours
        place = left.with_name(name)
        if left.name.endswith(OLD) and left.is_dir() and not place.exists():
            os.replace(left, place)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink()


def lock(path: str | Path, *, wait: bool = False) -> int | None:
    """Lock a file or folder that is there; a descriptor that holds it until it is closed, None if another process does.

    On a network file system that has no locks nothing can be known, and it counts as locked.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        pass
    return descriptor


def sync_folder(folder: str | Path) -> None:
    """Let a rename in a folder outlast a power failure; file systems that cannot promise it are believed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_bytes(path: str | Path) -> int:
    """What may still be written where ``path`` is or would be."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def require_room(path: str | Path, size: int) -> None:
    """Refuse a write before it begins where the disk has no room for it.

    Raises:
        OSError: ENOSPC, naming the path.
    """
    if (free := free_bytes(path)) < size:
        reason = f"no space: {size / 1e6:.1f} MB are needed, {free / 1e6:.1f} MB are free"
        raise OSError(errno.ENOSPC, reason, str(path))
