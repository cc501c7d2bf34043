"""Changes of what has no head and no subspace: biases, norm gains, embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import pandas as pd
from torch import Tensor

from tl_asymmetry.geometry.fraction import total
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.readers.base import Weights, WeightSource
from tl_asymmetry.models.view import ModelView

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
        _row(name, ours[name], theirs[name] if name in theirs else ours[name])
        for name in ours
        if name in theirs or name in unchanged
    ]
    return pd.DataFrame(rows, columns=list(OTHER_COLUMNS)).astype({"layer": "Int64"})


def unmatched_parameters(base: ModelView, aligned: Weights) -> Iterator[str]:
    """Names of the parameters that only one of the two models has."""
    ours, theirs = (set(names) for names in _headless(base, aligned))
    yield from sorted(theirs - ours if _only_changes(aligned) else ours ^ theirs)


def _headless(base: ModelView, aligned: Weights) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    untied = base.tied != aligned.tied  # one of the two may have learned an unembedding of its own
    return base.headless(include_tied=untied), aligned.headless(include_tied=untied)


def _only_changes(aligned: Weights) -> bool:
    return isinstance(aligned, WeightSource) and aligned.only_changes


def _row(name: str, base: Tensor, aligned: Tensor) -> tuple[int | None, str, float, float, float, float]:
    common = tuple(slice(0, min(sizes)) for sizes in zip(base.shape, aligned.shape, strict=True))
    base, aligned = base[common], aligned.to(base.device)[common]
    dtype = product_dtype(base, aligned)
    base_energy = energy = inner = 0.0
    # In pieces that stay in the processor's cache: an embedding is the largest tensor of a small model.
    for W, W_aligned in zip(base.reshape(-1).split(_PIECE), aligned.reshape(-1).split(_PIECE), strict=True):
        W = W.to(dtype)
        ΔW = W_aligned.to(dtype) - W
        base_energy += total(W.square()).item()
        energy += total(ΔW.square()).item()
        inner += total(W * ΔW).item()
    relative, shrink = ((energy / base_energy) ** 0.5, inner / base_energy) if base_energy else (float("nan"),) * 2
    block = re.match(r"blocks\.(\d+)\.", name)
    return (int(block[1]) if block else None, name, base_energy**0.5, energy**0.5, relative, shrink)
