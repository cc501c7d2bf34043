"""Which software, which models, which weights: what a result must be able to say of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from tl_asymmetry.arguments import shown
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.geometry.rounding import coarser, storage_dtype
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.readers.base import Weights, WeightSource
from tl_asymmetry.models.readers.hub import public_name
from tl_asymmetry.models.view import ModelView

_PACKAGES = ("tl-asymmetry", "torch", "transformer-lens", "transformers", "numpy", "scipy", "pandas")
_LONGEST_LISTED = 400
_PIECE = 1 << 22


def versions() -> dict[str, str | None]:
    """Versions of this package and of those its numbers rest on; None where one is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def model_record(view: Weights, weights: str) -> dict[str, Any]:
    """Which model: name, kind, dtype, storage, device and `weights`, its `weights_hash`. JSON-ready."""
    return {
        "name": public_name(view.name),
        "kind": view.kind,
        "dtype": str(view.dtype),
        "storage": str(_storage(view)),
        "device": str(view.device),
        "weights_xxh3": weights,
    }


def pair_names(names: Sequence[str] | None) -> tuple[str, str] | None:
    """What a user calls the two models of a pair; None: what they call themselves.

    Raises:
        ValueError: anything else than two names.

    Example:
        >>> pair_names(["base", "dpo"])
        ('base', 'dpo')
    """
    if names is None:
        return None
    given = [names] if isinstance(names, str) or not isinstance(names, Sequence) else [*names]
    if len(given) != 2 or not all(isinstance(name, str) and name.strip() for name in given):
        raise ValueError(
            f"expected names of the two models, the base's and the aligned one's, got {shown(names)}; pass "
            "names=('base', 'dpo'), or leave it out"
        )
    return given[0], given[1]


def pair_record(
    base: Weights, aligned: Weights, hashes: Mapping[str, str], names: tuple[str, str] | None = None
) -> dict[str, Any]:
    """Which two models: the record of each, by its role; under these names, if there are any."""
    records = {"base": model_record(base, hashes["base"]), "aligned": model_record(aligned, hashes["aligned"])}
    for record, name in zip(records.values(), names or (), strict=False):
        record["name"] = name
    return records


def shape_record(view: Weights) -> dict[str, Any]:
    """A model's numbers of layers and heads, and its widths. JSON-ready."""
    return {
        "n_layers": view.n_layers,
        "d_model": view.d_model,
        "n_heads": view.n_heads,
        "n_kv_heads": view.n_kv_heads,
        "d_head": view.d_head,
        "d_mlp": view.d_mlp,
        "d_vocab": view.d_vocab,
    }


def described(**arguments: Any) -> dict[str, Any]:
    """Arguments as JSON can hold them: long ones by size and hash (XXH3), objects by class."""
    return {name: _described(value) for name, value in arguments.items()}


def _described(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return public_name(value)
    if isinstance(value, Subspace):
        return _described(value.basis)
    if isinstance(value, np.ndarray):
        return _described(value.tolist() if value.dtype.kind in "OSU" else torch.as_tensor(value))
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        return {"shape": list(value.shape), "xxh3": xxhash.xxh3_128_hexdigest(content)}
    if hasattr(value, "tolist"):  # a column of a table
        return _described(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): _described(entry) for name, entry in value.items()}
    if isinstance(value, Sequence):
        plain = [_described(entry) for entry in value]
        text = json.dumps(plain, ensure_ascii=False)
        if len(text) <= _LONGEST_LISTED:
            return plain
        return {"entries": len(plain), "xxh3": xxhash.xxh3_128_hexdigest(text.encode())}
    return type(value).__name__


def weights_hash(view: Weights, *, each: Callable[[str, Tensor], None] = lambda name, weight: None) -> str:
    """XXH3 (128 bit) of every parameter's name, shape, dtype and bytes: the same for the same weights on any device.

    Not cryptographic: it tells models apart and reads weights at the speed of memory, a tenth of SHA-256's time.

    Args:
        view: a model, or weights in files (an adapter's own tensors).
        each: called with every name and tensor as it passes, a scaled embedding as it lies.
    """
    tensors = []
    adapter = isinstance(view, WeightSource) and view.only_changes
    for name, weight, scale in view.unscaled_weights():
        each(name, weight)
        # Weights in files count as the float32 they would be loaded as, an adapter's as what they are.
        dtype = weight.dtype if isinstance(view, ModelView) or adapter else product_dtype(weight)
        digest = xxhash.xxh3_128(f"{name} {tuple(weight.shape)} {dtype}".encode())
        for piece in weight.reshape(-1).split(_PIECE):
            piece = piece if scale == 1 else piece * scale
            digest.update(piece.cpu().to(dtype).contiguous().view(torch.uint8).numpy().data)
        tensors.append(digest.hexdigest())
    # in no order: the two kinds of model list their parameters differently
    return xxhash.xxh3_128("".join(sorted(tensors)).encode()).hexdigest()


def _storage(view: Weights) -> torch.dtype:
    """The finest storage format among the matrices of the first layer that has any, or among an adapter's tensors."""
    if isinstance(view, WeightSource) and view.only_changes:
        tensors = (weight for _, weight in view.named_weights() if weight.ndim > 1)
    else:
        names = (*view.matrices, *view.irregular)
        layer = next(i for i in range(view.n_layers) if any(view.has(i, matrix) for matrix in names))
        tensors = (view.weight(layer, matrix) for matrix in names if view.has(layer, matrix))
    stored = [storage_dtype(weight) for weight in tensors]
    finest = stored[0]
    for dtype in stored[1:]:
        finest = dtype if coarser(finest, dtype) is finest else finest
    return finest


@cache  # read from files
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
