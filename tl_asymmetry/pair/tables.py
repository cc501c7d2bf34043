"""From projections to the tidy table of a pair: one row per layer × head × matrix × subspace × rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.geometry.nulls import IsotropicNull, adjusted_p, isotropic_variance
from tl_asymmetry.geometry.spectrum import effective_rank
from tl_asymmetry.names import ROUNDING_DOMINATED, ROUNDING_FLAGGED, SMALL_EIGENGAP, kind_of
from tl_asymmetry.pair.numbers import Measurements
from tl_asymmetry.results.nulls import NULL_COLUMNS

PAIR_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "matrix": "W_Q … W_out",
    "pathway": '"read" (d_model is the input) or "write" (d_model is the output)',
    "subspace": "name of the subspace the delta is held against",
    "rank": "k, the number of leading directions",
    "fraction": "share of the delta's squared norm in them, 0 to 1",
    "relative": "fraction · d/k; 1 is isotropic, d/k the most there can be",
    "isotropic_z": "standard deviations above the mean over Haar-random subspaces; NaN for a flat spectrum",
    "isotropic_p": "one-sided probability of a fraction this large in a Haar-random subspace",
    "p_method": '"exact", "beta", "draws", or "none" where p is NaN',
    "isotropic_q": "Benjamini–Hochberg over all layers and heads of this matrix, subspace and rank",
    "activation_matched": "read: share of the matrix's own input variance in the same directions; write: NaN",
    "excess": "fraction / activation_matched",
    "gradient_matched": "write, with gradients: share of the output gradient's variance; else NaN",
    "gradient_excess": "fraction / gradient_matched",
    "ci_low": "lower end of the 95 % interval of relative over texts; NaN where the subspace needs no texts",
    "ci_high": "upper end",
    "eigengap": "(λ_k − λ_{k+1}) / λ_k of the subspace's spectrum",
    "delta_norm": "‖ΔW‖",
    "delta_relative_norm": "‖ΔW‖ / ‖W_base‖",
    "delta_shrink": "⟨ΔW, W_base⟩ / ‖W_base‖²",
    "delta_effective_rank": "exp(entropy) of the normalised eigenvalues of ΔW ΔWᵀ",
    "rounding_share": "share of ‖ΔW‖² that storage in bf16 or fp16 explains by itself",
    "fraction_unrounded": "fraction corrected for it; NaN above a share of 0.9",
    "flags": '"eigengap" (under 0.05), "rounding" (share from 0.1), "rounding_dominated" (from 0.5), comma-joined',
}
"""Columns of a pair's table, in this order, and what they mean."""

ROUNDING_HOPELESS = 0.9


class PairTables(NamedTuple):
    """The two tables of a pair's fractions."""

    table: pd.DataFrame
    """`PairAnalysis.table`."""
    nulls: pd.DataFrame
    """`PairAnalysis.nulls`."""


def pair_tables(numbers: Measurements, *, seed: int) -> PairTables:
    """All rows of `PairAnalysis.table` and of `PairAnalysis.nulls`; q is adjusted within each run of layers.

    Args:
        numbers: of one run of layers, or of several that the labels of their places tell apart, in that order.
        seed: of the isotropic null's draws.
    """
    null = IsotropicNull(numbers.layout.d, seed=seed)
    blocks = [
        _block(numbers, matrix, subspace, column, null=null)
        for matrix, subspace in numbers.held
        for column, rank in enumerate(numbers.ranks_of(matrix, subspace))
        if rank in numbers.layout.measured[subspace]
    ]
    order = {matrix: i for i, matrix in enumerate(numbers.deltas)}

    def ordered(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(parts, ignore_index=True).sort_values(
            ["run", "matrix", "subspace", "layer", "head", "rank"],
            key=lambda c: c.map(order) if c.name == "matrix" else c,
            ignore_index=True,
            kind="stable",
        )

    table = ordered(block.table for block in blocks)
    nulls = ordered(block.nulls for block in blocks)
    return PairTables(table[[*numbers.labels, *PAIR_COLUMNS]], nulls[[*numbers.labels, *NULL_COLUMNS]])


def _block(numbers: Measurements, matrix: str, subspace: str, column: int, *, null: IsotropicNull) -> PairTables:
    """The rows of one matrix, subspace and rank."""
    d, k = numbers.layout.d, numbers.layout.ranks[column]
    delta, held = numbers.deltas[matrix], numbers.held[matrix, subspace]
    heads = delta.energy.shape[1]
    fraction = held.inside[..., column] / delta.energy
    relative = fraction * d / k
    share = delta.spectrum / delta.spectrum.sum(-1, keepdim=True)
    spread = isotropic_variance(share.square().sum(-1), d, k).sqrt()
    p, method = null.tail(delta.spectrum.flatten(0, 1), k, fraction.flatten())
    nan = torch.full_like(fraction, torch.nan)
    activation = nan if held.activation is None else _wide(held.activation[:, column], heads)
    gradient = nan if held.gradient is None else held.gradient[..., column]
    # [place, end, head] → [end, place, head]
    permuted = (nan, nan) if held.permuted is None else held.permuted[..., column].transpose(0, 1)
    low, high = nan, nan
    if held.replicates is not None:  # [place, group, head] → [group, place, head]
        replicates = held.replicates[..., column].transpose(0, 1)
        interval = log_jackknife_interval(relative, replicates / delta.energy * (d / k), corrected=True)
        low, high = interval.low, interval.high
    λ = held.eigenvalues[:, column]
    ρ = delta.rounding
    unrounded = torch.where(ρ <= ROUNDING_HOPELESS, (fraction - ρ * k / d) / (1 - ρ), torch.nan)
    columns = {
        "fraction": fraction,
        "relative": relative,
        # A flat spectrum has no spread, and nothing to be compared.
        "isotropic_z": torch.where(spread > 0, (fraction - k / d) / spread, torch.nan),
        "activation_matched": activation,
        "excess": fraction / activation,
        "gradient_matched": gradient,
        "gradient_excess": fraction / gradient,
        "ci_low": low,
        "ci_high": high,
        "eigengap": _wide(1 - λ[:, 1] / λ[:, 0], heads),
        "delta_norm": delta.energy.sqrt(),
        "delta_relative_norm": (delta.energy / delta.base_energy).sqrt(),
        "delta_shrink": delta.shrink,
        "delta_effective_rank": effective_rank(delta.spectrum),
        "rounding_share": ρ,
        "fraction_unrounded": unrounded,
    }
    frame = numbers.rows(heads, headed=numbers.layout.headed[matrix])
    keys = frame.assign(matrix=matrix, pathway=kind_of(matrix).side, subspace=subspace, rank=k)
    frame = keys.assign(**{name: value.flatten().numpy() for name, value in columns.items()})
    frame["isotropic_p"] = p
    frame["p_method"] = method
    frame["isotropic_q"] = frame.groupby("run")["isotropic_p"].transform(
        lambda together: adjusted_p(together.to_numpy())
    )
    frame["flags"] = _flags(frame)
    nulls: dict[str, dict[str, Tensor | np.ndarray | pd.Series]] = {
        "isotropic": {
            "expected": torch.full_like(fraction, k / d), "low": low, "high": high,
            "p": p, "q": frame["isotropic_q"],
        },
        "sgd": {"expected": activation},
        "gradient": {"expected": gradient},
        "permutation": {"low": fraction / permuted[1], "high": fraction / permuted[0]},
    }  # fmt: skip
    return PairTables(frame, _null_rows(keys, frame["fraction"], nulls))


def _null_rows(
    keys: pd.DataFrame, fraction: pd.Series, nulls: Mapping[str, Mapping[str, Tensor | np.ndarray | pd.Series]]
) -> pd.DataFrame:
    """Rows of `PairAnalysis.nulls` for the rows of a block: where a null applies, which is where it expects something.

    Args:
        keys: what tells the rows of the table apart, one for each layer and head.
        fraction: their fractions.
        nulls: by null, what there is of `expected, low, high, p, q`, each of as many numbers as there are rows.
    """
    parts = []
    for null, given in nulls.items():
        part = keys.assign(
            null=null, **{name: np.ravel(given[name]) if name in given else np.nan
                          for name in ("expected", "low", "high", "p", "q")},
        )  # fmt: skip
        part.insert(keys.shape[1] + 2, "excess", fraction / part["expected"])
        parts.append(part[part[["expected", "low"]].notna().any(axis=1)])
    return pd.concat(parts, ignore_index=True)


def _flags(frame: pd.DataFrame) -> list[str]:
    conditions = {
        "eigengap": frame["eigengap"] < SMALL_EIGENGAP,
        "rounding": frame["rounding_share"] >= ROUNDING_FLAGGED,
        "rounding_dominated": frame["rounding_share"] >= ROUNDING_DOMINATED,
    }
    names = np.array(list(conditions))
    return [",".join(names[row]) for row in np.stack(list(conditions.values()), axis=1)]


def _wide(per_layer: Tensor, heads: int) -> Tensor:
    return per_layer.unsqueeze(-1).expand(-1, heads)
