"""Changes of what has no head and no subspace: biases, norm gains, embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.fraction import total
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.readers.base import Weights, WeightSource
from tl_asymmetry.models.view import ModelView, Parameters

OTHER_COLUMNS = ("layer", "parameter", "base_norm", "delta_norm", "delta_relative_norm", "delta_shrink")
"""Columns of the table of other changes, in this order."""


_PIECE = 1 << 18


def other_changes(base: ModelView, aligned: Weights) -> pd.DataFrame:
    """One row per parameter that is no matrix of the main table: norms and the shrink component of its change.

    `layer` is NA for what belongs to no block. Of two vocabularies only the rows that both have count.
    """
    ours, theirs = _headless(base, aligned)
    unchanged = ours if _only_changes(aligned) else {}
    rows = [
        _row(name, ours.unscaled(name), (theirs if name in theirs else ours).unscaled(name))
        for name in ours
        if name in theirs or name in unchanged
    ]
    return pd.DataFrame(rows, columns=list(OTHER_COLUMNS)).astype({"layer": "Int64"})


def unmatched_parameters(base: ModelView, aligned: Weights) -> Iterator[str]:
    """Names of the parameters that only one of the two models has."""
    ours, theirs = (set(names) for names in _headless(base, aligned))
    yield from sorted(theirs - ours if _only_changes(aligned) else ours ^ theirs)


def _headless(base: ModelView, aligned: Weights) -> tuple[Parameters, Parameters]:
    untied = base.tied != aligned.tied  # one of the two may have learned an unembedding of its own
    return base.headless(include_tied=untied), aligned.headless(include_tied=untied)


def _only_changes(aligned: Weights) -> bool:
    return isinstance(aligned, WeightSource) and aligned.only_changes


def _row(
    name: str, ours: tuple[Tensor, float], theirs: tuple[Tensor, float]
) -> tuple[int | None, str, float, float, float, float]:
    (base, scale), (aligned, other_scale) = ours, theirs
    common = tuple(slice(0, min(sizes)) for sizes in zip(base.shape, aligned.shape, strict=True))
    base, aligned = base[common], aligned[common]
    dtype = product_dtype(base, aligned)
    base_energy = energy = inner = 0.0
    # In pieces that stay in the processor's cache: an embedding is the largest tensor of a small model.
    for W, W_aligned in _pieces(base, aligned):
        W = W.to(dtype)
        W_aligned = W_aligned.to(W)
        ΔW = (W_aligned if other_scale == scale else W_aligned * (other_scale / scale)) - W
        base_energy += total(W.square(), axes=W.ndim).item()
        energy += total(ΔW.square(), axes=W.ndim).item()
        inner += total(W * ΔW, axes=W.ndim).item()
    relative, shrink = ((energy / base_energy) ** 0.5, inner / base_energy) if base_energy else (float("nan"),) * 2
    block = re.match(r"blocks\.(\d+)\.", name)
    layer = int(block[1]) if block else None
    return layer, name, scale * base_energy**0.5, scale * energy**0.5, relative, shrink


def _pieces(base: Tensor, aligned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two tensors cut alike across the axis along which the first lies furthest apart: no copy, whatever its layout."""
    if base.numel() <= _PIECE:
        return iter([(base, aligned)])
    axis = max(range(base.ndim), key=base.stride)
    rows = max(1, _PIECE * base.shape[axis] // base.numel())
    return zip(base.split(rows, axis), aligned.split(rows, axis), strict=True)
