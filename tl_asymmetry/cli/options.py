"""What arguments of several commands are read as."""

from __future__ import annotations

from pathlib import Path


def as_path(value: str) -> Path:
    """A path; `~` is the home folder, also where no shell has read it."""
    return Path(value).expanduser()


def as_model(value: str) -> str:
    """A hub name or a path, in which `~` is the home folder."""
    return str(Path(value).expanduser()) if value.startswith("~") else value
