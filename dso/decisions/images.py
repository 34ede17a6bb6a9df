"""Image files: which ones are accepted, how they are read, and a bounded cache of what was made of them.

An image is read as transformers' own loaders read it: turned upright by its EXIF orientation, then converted to RGB.
Each side has at least :data:`MIN_SIDE` pixels, because fewer show nothing; the whole has at most :data:`MAX_PIXELS`,
because more are a mistake that would take gigabytes before a processor shrinks them. The file's header is checked for
both before any pixel is decoded.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dso.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 8
MAX_PIXELS = 64_000_000
# What Pillow's decoders raise on files that are cut short or are not what their first bytes say.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


class ImageError(UserError):
    """An image that cannot be used; the message names the file and says why."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file as it was at one moment: once it changes, what is cached for it no longer counts.

    Attributes:
        path: as it was given.
        modified: time of the last change in nanoseconds.
        size: bytes.
    """

    path: str
    modified: int
    size: int


def find_image(path: str) -> ImageFile:
    """The file as it is now.

    Raises:
        ImageError: if there is none.
    """
    try:
        found = Path(path).stat()
    except (OSError, ValueError) as error:  # a path with a null byte is no path
        raise ImageError(f"image {path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return ImageFile(path, found.st_mtime_ns, found.st_size)


def open_image(path: str) -> Image:
    """An image in RGB, upright.

    Raises:
        ImageError: if it cannot be read, is damaged, or is smaller or larger than the limits above.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            _check_size(path, *file.size)
            return ImageOps.exif_transpose(file).convert("RGB")
    except ImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit lies above ours
        raise ImageError(f"image {path!r} is too large: at most {MAX_PIXELS // 10**6} million pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"image {path!r} is damaged, or no image: its format is not recognised") from error
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ImageError(f"image {path!r} cannot be read, or is damaged: {reason}") from error


def _check_size(path: str, width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"image {path!r} is {width} x {height} pixels, expected at least {MIN_SIDE} on each side")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"image {path!r} is {width} x {height} pixels, expected at most {MAX_PIXELS // 10**6} million; shrink it"
        )


class ImageMemory:
    """A cache of what was made of images, by the files of one prompt in order; the least recently used goes first.

    Args:
        limit: bytes of tensors to keep; an entry that is larger by itself is not kept.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._entries: OrderedDict[tuple[ImageFile, ...], tuple[dict[str, Any], int]] = OrderedDict()

    def get(self, files: tuple[ImageFile, ...]) -> dict[str, Any] | None:
        """What is kept for these files, or None."""
        if files not in self._entries:
            return None
        self._entries.move_to_end(files)
        return self._entries[files][0]

    def put(self, files: tuple[ImageFile, ...], values: dict[str, Any], size: int) -> None:
        """Keep what takes ``size`` bytes, and drop the oldest entries beyond the limit."""
        if files in self._entries:
            self.held -= self._entries.pop(files)[1]
        if size > self.limit:
            return
        self._entries[files] = values, size
        self.held += size
        while self.held > self.limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self.held -= freed


def find_images(paths: Sequence[str]) -> tuple[ImageFile, ...]:
    """:func:`find_image` of each path."""
    return tuple(find_image(path) for path in paths)
