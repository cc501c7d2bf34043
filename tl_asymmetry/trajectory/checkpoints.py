"""The checkpoints of a run, each opened when its turn comes and let go after it."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from tl_asymmetry.geometry.memory import return_freed_memory
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.readers.hub import public_name

_STEP = re.compile(r"(?:^|[^a-z])(?:checkpoint|step|global_step|iter)[-_]?(\d+)$", re.IGNORECASE)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run, not opened yet."""

    step: int
    """Its training step."""
    name: str
    """What messages and tables call it."""
    open: Callable[[], AbstractContextManager[Any]]
    """Gives the TransformerLens model for as long as the context lasts."""
    fingerprint: Callable[[], str] | None = None
    """Tells without opening it whether these are the weights of an earlier run; None: only the model can tell."""
    again: bool = True
    """Whether it can be opened another time; a generator's cannot."""


def checkpoints_of(source: Any) -> Iterator[Checkpoint]:
    """Whatever a user passes as checkpoints, one after the other.

    Args:
        source: `Checkpoint`s, directories (their step is read from their name or their `trainer_state.json`), or pairs
            `(step, model)` as a mapping, list or generator, where the model may be a TransformerLens model, a
            directory, a name on the hub, or a function without arguments that makes the model.

    Raises:
        ValueError: none of these; a directory whose step cannot be told.

    Example:
        >>> from tl_asymmetry.demo import demo_model
        >>> pairs = {step: lambda: demo_model(f"step{step}") for step in (0, 50)}
        >>> [checkpoint.step for checkpoint in checkpoints_of(pairs)]
        [0, 50]
    """
    if isinstance(source, str | bytes | Path) or not isinstance(source, Iterable):
        raise ValueError(
            f"expected checkpoints as a list, got {type(source).__name__} {str(source)!r}; pass directories, "
            "pairs (step, model), or what pythia_checkpoints returns"
        )
    entries = iter(source.items() if isinstance(source, Mapping) else source)
    several = not isinstance(source, Iterator)
    return (_one(entry, several) for entry in entries)


def step_of(directory: Path) -> int:
    """The step of a checkpoint directory: `checkpoint-500`, `step500`, or its trainer_state.json's global_step.

    Raises:
        ValueError: neither tells.
    """
    state = directory / "trainer_state.json"
    if state.is_file():
        try:
            return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"expected global_step in {state}, got {error}; pass pairs (step, directory)") from error
    found = _STEP.search(directory.name)
    if found is None:
        raise ValueError(
            f"expected a directory named like checkpoint-500 or step500, got {str(directory)!r}; pass pairs (step, "
            "directory)"
        )
    return int(found[1])


def _one(entry: Any, several: bool) -> Checkpoint:
    if isinstance(entry, Checkpoint):
        return entry
    if isinstance(entry, str | Path):
        path = Path(entry)
        return _of_path(step_of(path), path)
    if not isinstance(entry, tuple | list) or len(entry) != 2 or isinstance(entry[0], bool):
        raise ValueError(
            f"expected a directory or a pair (step, model), got {type(entry).__name__}; pass one of the two"
        )
    step, model = entry
    try:
        step = int(step)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a whole number as a step, got {entry[0]!r}; pass (step, model)") from error
    if isinstance(model, str | Path):
        return _of_path(step, model)
    if callable(model) and not isinstance(model, nn.Module):
        return Checkpoint(step, f"step {step}", lambda: made_model(model))
    return Checkpoint(step, f"step {step}", lambda: _given(model), again=several)


def _of_path(step: int, path: str | Path) -> Checkpoint:
    here = Path(path)
    known = (lambda: _directory_fingerprint(here)) if here.is_dir() else None
    return Checkpoint(step, public_name(path), lambda: made_model(lambda: open_model(path)), known)


@contextmanager
def _given(model: Any) -> Iterator[Any]:
    yield model


@contextmanager
def made_model(make: Callable[[], Any]) -> Iterator[Any]:
    """A model made for this context: nothing of it is held afterwards."""
    held = [make()]
    try:
        yield held[0]
    finally:
        held.clear()
        gc.collect()  # a model is full of reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return_freed_memory()


def _directory_fingerprint(directory: Path) -> str:
    """Names and sizes of the weight files, and 64 evenly spaced blocks of each: two checkpoints differ in all of them.

    Reads a quarter of a megabyte of each file, whatever its size. It tells the checkpoints of a run apart; it is no
    proof against a file edited by hand.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(p for p in directory.iterdir() if p.suffix in _WEIGHTS):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(min(i * (size // _SAMPLES), max(size - _SAMPLE_BYTES, 0)), os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
