"""Files that are there whole or not at all: written beside their place, flushed to the disk, renamed into it."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"
"""How the name of a file ends that is still being written; a process killed meanwhile leaves one behind."""

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def replace_file(target: Path, content: bytes) -> None:
    """Write a file in one step: whoever reads meanwhile, or after a crash, meets the old one or the new one.

    Args:
        target: a file or nothing yet; a link is replaced, not followed.
        content: all of it.

    Raises:
        ValueError: a folder, a device or a pipe in its place.
        OSError: no room (errno ENOSPC), or another failure of the disk; what was there before is untouched.
    """
    if target.exists() and not target.is_file():
        raise ValueError(f"expected the path of a file, got {str(target)!r}, which is none; pass another path")
    part = target.with_name(f".{secrets.token_hex(6)}{PART}")
    with room_for(f"{str(target)!r} ({len(content)} bytes)", target.parent):
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # new, so that it is nobody's link
            try:
                left = memoryview(content)
                while left:
                    left = left[os.write(fd, left) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.replace(part, target)
            _sync_folder(target.parent)
        finally:
            part.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if need be.

    Raises:
        ValueError: something else is in its place, or it cannot be made.
        OSError: no room (errno ENOSPC).
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"expected a folder, got {str(path)!r}, a link to nothing; pass another path")
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected a folder, got the file {str(path)!r}; pass another path")
    try:
        with room_for(f"the folder {str(path)!r}", path.parent):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise ValueError(
            f"expected a folder, got {str(path)!r}, which cannot be made ({error.strerror}); pass another path"
        ) from error


@contextmanager
def room_for(what: str, folder: Path) -> Iterator[None]:
    """Say of a full disk what it means here.

    Args:
        what: is written inside.
        folder: where, or where it is to be made.

    Raises:
        OSError: as it was raised inside, in these words if the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        raise OSError(
            error.errno,
            f"expected room for {what}, got a full disk ({shutil.disk_usage(place).free} bytes free); what was "
            "finished before is kept: make room and run again",
        ) from error


def _sync_folder(folder: Path) -> None:
    """A rename outlives a power cut only when the folder is on the disk; not every system can say so of a folder."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
