"""What arguments of several commands are read as."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def as_path(value: str) -> Path:
    """A path; `~` is the home folder, also where no shell has read it."""
    return Path(value).expanduser()


def as_model(value: str) -> str:
    """A hub name or a path, in which `~` is the home folder."""
    return str(Path(value).expanduser()) if value.startswith("~") else value


def named_model(value: str, kind: str, example: str, *, taken: Collection[str] = ()) -> tuple[str, str]:
    """Name and model of NAME=MODEL.

    Args:
        value: what was typed.
        kind: what they are called.
        example: what to type.
        taken: names that may not be used again.

    Raises:
        ValueError: one of the two is missing, or the name is taken.
    """
    name, separator, model = value.partition("=")
    if not (name and separator and model) or name in taken:
        raise ValueError(f"expected {kind}, got {value!r}; pass {example}")
    return name, as_model(model)
