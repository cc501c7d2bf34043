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

from tl_asymmetry.arguments import shown
from tl_asymmetry.geometry.memory import return_freed_memory
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.readers.base import WeightSource
from tl_asymmetry.models.readers.files import read_json
from tl_asymmetry.models.readers.hub import public_name

_ADAPTER = "adapter_config.json"
_STEP = re.compile(r"(?:^|[^a-z])(?:checkpoint|step|global_step|iter)[-_]?(\d+)$", re.IGNORECASE)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SAMPLES, _SAMPLE_BYTES = 64, 4096
# Bytes of a model that may lie about until Python collects what refers to itself.
_SMALL = 1 << 24


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
    source: Any = None
    """The model itself, or what `weights_from` reads; None where only `open` knows."""

    @property
    def weights(self) -> str | Path | Mapping[str, Any] | WeightSource | None:
        """What `weights_from` reads of it without a model; None where there is no such thing."""
        return self.source if isinstance(self.source, str | Path | Mapping | WeightSource) else None


def checkpoints_of(source: Any, *, base: Any = None, tokenizer: Any = None) -> Iterator[Checkpoint]:
    """Whatever a user passes as checkpoints, one after the other.

    Args:
        source: `Checkpoint`s, directories (their step is read from their name or their `trainer_state.json`), or pairs
            `(step, model)` as a mapping, list or generator, where the model may be a TransformerLens model, what
            `weights_from` reads (a directory, a name on the hub, an adapter, a file, a state dict), or a function
            without arguments that makes the model. A folder of such directories stands for these in the order of
            their steps.
        base: what the run started from, step 0, where it is not among them; of a run of adapters, by default the model
            that the first of them names.
        tokenizer: of directories without one.

    Raises:
        ValueError: none of these; a directory whose step cannot be told.

    Example:
        >>> from tl_asymmetry.demo import demo_model
        >>> pairs = {step: lambda: demo_model(f"step{step}") for step in (0, 50)}
        >>> [checkpoint.step for checkpoint in checkpoints_of(pairs)]
        [0, 50]
    """
    if isinstance(source, str | Path):
        source = run_folder(Path(source).expanduser())
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise ValueError(
            f"expected checkpoints as a list, got {type(source).__name__} {str(source)!r}; pass directories, "
            "pairs (step, model), or what pythia_checkpoints returns"
        )
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise ValueError(
            f"expected tokenizer as a tokenizer of transformers, got {shown(tokenizer)}; pass "
            "AutoTokenizer.from_pretrained(...), or leave it out"
        )
    several = not isinstance(source, Iterator)
    entries = iter(source.items() if isinstance(source, Mapping) else source)
    return _after_base((_one(entry, several, tokenizer) for entry in entries), base, tokenizer)


def run_folder(folder: Path) -> list[Path]:
    """The checkpoints that a training wrote into its output folder, in the order of their steps.

    Raises:
        ValueError: no such folder, or none in it.
    """
    found = (
        [child for child in folder.iterdir() if child.is_dir() and _STEP.search(child.name)] if folder.is_dir() else []
    )
    if not found:
        raise ValueError(
            f"expected a folder with directories named like checkpoint-500, got {str(folder)!r}; pass the output "
            "folder of a training, or a list of checkpoints"
        )
    return sorted(found, key=step_of)


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


def _after_base(checkpoints: Iterator[Checkpoint], base: Any, tokenizer: Any) -> Iterator[Checkpoint]:
    """The checkpoints behind the model that they started from, where that is given or named by an adapter."""
    first = next(checkpoints, None)
    if first is None:
        return
    if base is None and isinstance(first.source, str | Path):
        base = _named_base(Path(first.source))
    if base is not None:
        yield _one((0, base), True, tokenizer)
    yield first
    yield from checkpoints


def _named_base(folder: Path) -> str | None:
    """The model that an adapter says it was trained from."""
    file = folder / _ADAPTER
    return read_json(file).get("base_model_name_or_path") if file.is_file() else None


def _one(entry: Any, several: bool, tokenizer: Any) -> Checkpoint:
    if isinstance(entry, Checkpoint):
        return entry
    if isinstance(entry, str | Path):
        path = Path(entry)
        return _of_path(step_of(path), path, tokenizer)
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
        return _of_path(step, model, tokenizer)
    name = f"step {step}"
    if isinstance(model, Mapping | WeightSource):
        return Checkpoint(step, name, lambda: made_model(lambda: _refuse_to_run(name)), again=several, source=model)
    if callable(model) and not isinstance(model, nn.Module):
        return Checkpoint(step, name, lambda: made_model(model))
    return Checkpoint(step, name, lambda: _given(model), again=several, source=model)


def _of_path(step: int, path: str | Path, tokenizer: Any) -> Checkpoint:
    here = Path(path).expanduser()
    known = (lambda: _directory_fingerprint(here)) if here.is_dir() else None

    def make() -> Any:
        if (here / _ADAPTER).is_file() or here.is_file():
            _refuse_to_run(str(path))
        return open_model(path, tokenizer=tokenizer)

    return Checkpoint(step, public_name(path), lambda: made_model(make), known, source=path)


def _refuse_to_run(name: str) -> Any:
    raise ValueError(
        f"expected a model that can be run, got weights alone ({name}); pass base= or a whole model in front of them, "
        'and subspaces_from="base" without gradient='
    )


@contextmanager
def _given(model: Any) -> Iterator[Any]:
    yield model


@contextmanager
def made_model(make: Callable[[], Any]) -> Iterator[Any]:
    """A model made for this context: nothing of it is held afterwards, of a small one soon."""
    held = [make()]
    large = isinstance(held[0], nn.Module) and sum(weight.nbytes for weight in held[0].parameters()) > _SMALL
    try:
        yield held[0]
    finally:
        held.clear()
        if large:
            gc.collect()  # a model is full of reference cycles; the way through all objects takes 0.2 s
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
