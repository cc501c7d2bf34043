"""Norms and ranks of deltas by themselves: no activations, no subspace, for an adapter no base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry.geometry.factored import factored_svd
from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.geometry.spectrum import effective_rank, stable_rank
from tl_asymmetry.names import kind_of

if TYPE_CHECKING:
    from tl_asymmetry.models.readers.base import Weights, WeightSource

DELTA_COLUMNS = (
    "layer", "matrix", "head", "delta_norm", "delta_relative_norm", "stable_rank", "effective_rank",
)  # fmt: skip
"""Columns of the table, in this order."""


def delta_table(source: WeightSource, base: Weights | None) -> pd.DataFrame:
    """See `WeightSource.table`."""
    rows = [
        (layer, matrix, head, *numbers)
        for layer in range(source.n_layers)
        for matrix in source.matrices
        for head, numbers in _of_heads(source, base, layer, matrix)
    ]
    table = pd.DataFrame(rows, columns=list(DELTA_COLUMNS))
    return table.astype({"layer": "Int64", "head": "Int64", **dict.fromkeys(DELTA_COLUMNS[3:], "float64")})


def _of_heads(
    source: WeightSource, base: Weights | None, layer: int, matrix: str
) -> list[tuple[int | None, tuple[float, ...]]]:
    factors = source.factors(layer, matrix)
    if factors is None:
        λ = _eigenvalues(source.delta(layer, matrix, base))
    else:
        λ = factored_svd(factors.residual.unsqueeze(0), factors.other)[1].square()
    norm = λ.sum(-1).sqrt()
    relative = torch.full_like(norm, torch.nan)
    if base is not None:
        W = base.weight(layer, matrix).detach()
        relative = norm / (W.unsqueeze(0) if W.ndim == 2 else W).double().flatten(1).norm(dim=-1).cpu()
    headed = kind_of(matrix).heads is not None
    columns = torch.stack([norm, relative, stable_rank(λ), effective_rank(λ)], -1).tolist()
    return [(head if headed else None, tuple(numbers)) for head, numbers in enumerate(columns)]


def _eigenvalues(delta: Tensor) -> Float64[Tensor, "head r"]:
    """Of ΔW ΔWᵀ, by the shorter side."""
    ΔW = (delta.unsqueeze(0) if delta.ndim == 2 else delta).cpu()
    ΔW = ΔW if ΔW.shape[-1] <= ΔW.shape[-2] else ΔW.mT
    with exact_products(ΔW.device):
        return torch.linalg.eigvalsh((ΔW.mT @ ΔW).double()).flip(-1).clamp(min=0)
