"""Tensors in files, read one at a time: safetensors single or sharded, torch files without pickled code."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MODEL_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""What transformers calls a model's weights, in the order in which it looks for them."""

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls an adapter's."""

_STATE_KEYS = ("state_dict", "model", "module", "model_state_dict")
"""Where Lightning, training loops and DeepSpeed put the weights in what they save beside them."""

_WORDS = 240
"""Of another library's message are shown."""

_PIECE = 1 << 22
"""Entries of a tensor that are compared at once."""

_FOREIGN = (
    (("*.gguf",), "a GGUF file of llama.cpp", "the safetensors that it was made from"),
    (
        ("*.distcp", "*/*.distcp"),
        "shards of torch.distributed.checkpoint (FSDP)",
        "one file made of them (torch.distributed.checkpoint.format_utils.dcp_to_torch_save)",
    ),
    (
        ("*zero_pp_rank_*", "*/*zero_pp_rank_*"),
        "a DeepSpeed ZeRO checkpoint, spread over its processes",
        "the folder that its zero_to_fp32.py writes",
    ),
    (("tf_model.h5", "flax_model.msgpack"), "weights of TensorFlow or Flax", "safetensors of the same model"),
    (("optimizer.pt", "optimizer.bin"), "the state of an optimiser alone", "the folder with the model of that step"),
)
"""Files of others: patterns, what they are, and what would load."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and what it looks like; nothing of it has been read."""

    path: Path
    """Its file."""
    shape: tuple[int, ...]
    """Its shape."""


class TensorFiles(Mapping[str, Tensor]):
    """Tensors by name; looking one up reads it from its file, and nothing is kept.

    Headers are read and held against each other on opening, so that a truncated file, a missing shard and an index
    that lies are found before any work is done.

    Args:
        paths: the files.
        listed: what an index claims, tensor name → file name; None without an index.

    Raises:
        ValueError: a file that is not whole, a tensor in two files, an index that lists what is not there.
    """

    def __init__(self, paths: list[Path], listed: Mapping[str, str] | None = None) -> None:
        self.paths = tuple(paths)
        self._loaded: dict[Path, dict[str, Tensor]] = {}
        self._stored: dict[str, StoredTensor] = {}
        for path in paths:
            for name, shape in self._header(path):
                if name in self._stored:
                    raise ValueError(
                        f"expected every tensor in one file, got {name} in {self._stored[name].path.name} and in "
                        f"{path.name}; pass a folder with the files of one checkpoint"
                    )
                self._stored[name] = StoredTensor(path, shape)
        for name, file in (listed or {}).items():
            there = self._stored.get(name)
            if there is None or there.path.name != file:
                got = "no such tensor there" if there is None else f"the tensor in {there.path.name}"
                raise ValueError(
                    f"expected {name} in {file}, where the index lists it, got {got}; pass the folder downloaded again"
                )

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as it is stored, read now."""
        stored = self._stored[name]
        if stored.path in self._loaded:
            return self._loaded[stored.path][name]
        try:
            # Opened for each tensor: what a mapping has touched stays resident as long as it is open.
            with safe_open(stored.path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(stored.path, error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._stored[name].shape

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor in runs of rows, for comparisons that need not hold all of it."""
        stored = self._stored[name]
        rows = max(1, _PIECE * stored.shape[0] // max(1, math.prod(stored.shape))) if stored.shape else 0
        if stored.path in self._loaded or not rows:
            yield from self[name].split(rows) if rows else (self[name],)
            return
        with safe_open(stored.path, framework="pt") as file:
            part = file.get_slice(name)
            for row in range(0, stored.shape[0], rows):
                yield part[row : row + rows]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(path.stat().st_size for path in self.paths)

    def _header(self, path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - not a dict
                        yield name, tuple(file.get_slice(name).get_shape())
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from error
            return
        self._loaded[path] = _torch_file(path)
        for name, tensor in self._loaded[path].items():
            yield name, tuple(tensor.shape)


def open_files(where: Path, names: tuple[str, ...] = MODEL_FILES) -> TensorFiles:
    """The tensors of a file, or of a folder: of the first of these names that is there, else of its only file.

    Raises:
        ValueError: no weights there, or files that do not hold what they should.
    """
    there = where if where.is_file() else next((where / name for name in names if (where / name).is_file()), None)
    if there is not None:
        return _from_index(there) if there.name.endswith(".index.json") else TensorFiles([there])
    found = sorted(where.glob("*.safetensors"))
    if len(found) == 1:
        return TensorFiles(found)
    refuse_foreign(where)
    got = f"{len(found)} safetensors files without an index" if found else "none"
    raise ValueError(
        f"expected weights ({', '.join(names[:2])}) in {str(where)!r}, got {got}; pass a folder written "
        "by save_pretrained, or the file itself"
    )


def refuse_foreign(where: Path) -> None:
    """Say what a folder or file holds where that is something known that is no readable model.

    Raises:
        ValueError: it does.
    """
    if where.is_dir():
        steps = sorted((p.name for p in where.glob("checkpoint-*") if p.is_dir()), key=lambda n: (len(n), n))
        if steps:
            raise ValueError(
                f"expected one model in {str(where)!r}, got a folder of checkpoints ({steps[0]} to {steps[-1]}); pass "
                f"one of them ({str(where / steps[-1])!r})"
            )
    for patterns, what, instead in _FOREIGN:
        for pattern in patterns:
            there = next(where.glob(pattern), None) if where.is_dir() else where if where.match(pattern) else None
            if there is not None:
                raise ValueError(
                    f"expected weights as transformers or PEFT writes them, got {what} ({str(there)!r}); pass {instead}"
                )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ValueError: anything else, naming the file.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"expected JSON in {str(path)!r}, got {in_short(error)}; pass the file downloaded again"
        ) from error
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object in {str(path)!r}, got {type(document).__name__}; pass another file")
    return document


def _from_index(index: Path) -> TensorFiles:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"expected a weight_map in {str(index)!r}, got none; pass the index of a sharded checkpoint")
    for file in Counter(map(str, listed.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(
                f"expected plain file names in {str(index)!r}, got {file!r}; pass an index whose shards lie beside it"
            )
        if not (index.parent / file).is_file():
            raise ValueError(f"expected the shard {file} beside its index, got no such file; download it as well")
    return TensorFiles([index.parent / file for file in sorted(set(listed.values()))], listed)


def _torch_file(path: Path) -> dict[str, Tensor]:
    """A state dict saved by torch, mapped from disk where its format allows it; never with pickled code."""
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old format cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # whose own words tell how to run the file's code
        raise ValueError(
            f"expected a file of tensors, got {path.name} that is none, or holds Python objects, which may run code "
            f"and are never loaded; pass the state dict itself, saved as safetensors ({str(path)!r})"
        ) from error
    except Exception as error:
        raise _damaged(path, error) from error
    if isinstance(state, dict):
        inside = (state[key] for key in _STATE_KEYS if isinstance(state.get(key), dict))
        state = next(inside, state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"expected a state dict (names and tensors) in {str(path)!r}, got something else; pass the state dict "
            "itself, saved as safetensors"
        )
    return state


def in_short(error: Exception) -> str:
    """Another library's words in one line that leaves out their end, where advice is that is not for here."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:_WORDS]}{'…' if len(words) > _WORDS else ''}"


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"expected a whole file of tensors, got {path.name} that cannot be read ({in_short(error)}); pass the file "
        f"downloaded or copied again ({str(path)!r})"
    )
