"""From projections to the tidy table of a pair: one row per layer × head × matrix × subspace × rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.geometry.nulls import IsotropicNull, adjusted_p, isotropic_variance
from tl_asymmetry.geometry.spectrum import effective_rank
from tl_asymmetry.names import ROUNDING_DOMINATED, ROUNDING_FLAGGED, SMALL_EIGENGAP, kind_of
from tl_asymmetry.pair.deltas import Delta, stacked
from tl_asymmetry.pair.projections import Projection
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


def pair_tables(
    deltas: Mapping[str, Sequence[Delta]],
    projections: Mapping[tuple[str, str], Sequence[Projection]],
    ranks: Sequence[int],
    *,
    d: int,
    headed: Mapping[str, bool],
    seed: int,
) -> PairTables:
    """All rows of `PairAnalysis.table` and of `PairAnalysis.nulls`.

    Args:
        deltas: by matrix, one for each layer.
        projections: by (matrix, subspace), one for each layer.
        ranks: ranks to read; those a subspace is too small for are left out for it.
        d: d_model.
        headed: whether a matrix has heads.
        seed: of the isotropic null's draws.
    """
    null = IsotropicNull(d, seed=seed)
    blocks = [
        _block(deltas[matrix], layers, column, k, d=d, headed=headed[matrix], null=null)
        for (matrix, _), layers in projections.items()
        for column, k in enumerate(ranks)
        if k <= layers[0].energies.shape[-1]
    ]
    order = {matrix: i for i, matrix in enumerate(deltas)}

    def ordered(parts: Iterable[pd.DataFrame], *further: str) -> pd.DataFrame:
        return pd.concat(parts, ignore_index=True).sort_values(
            ["matrix", "subspace", "layer", "head", "rank", *further],
            key=lambda c: c.map(order) if c.name == "matrix" else c,
            ignore_index=True,
            kind="stable",
        )

    table = ordered(block.table for block in blocks)
    nulls = ordered(block.nulls for block in blocks)
    return PairTables(table[list(PAIR_COLUMNS)], nulls[list(NULL_COLUMNS)])


def _block(
    deltas: Sequence[Delta],
    projections: Sequence[Projection],
    column: int,
    k: int,
    *,
    d: int,
    headed: bool,
    null: IsotropicNull,
) -> PairTables:
    """The rows of one matrix, subspace and rank."""
    first = projections[0]
    energy = stacked(deltas, "energy")
    layers, heads = energy.shape
    fraction = stacked(projections, "energies")[..., :k].sum(-1) / energy
    relative = fraction * d / k
    spectrum = stacked(deltas, "spectrum")
    share = spectrum / spectrum.sum(-1, keepdim=True)
    spread = isotropic_variance(share.square().sum(-1), d, k).sqrt()
    p, method = null.tail(spectrum.flatten(0, 1), k, fraction.flatten())
    activation = _wide(stacked(projections, "activation_reference")[:, k - 1], heads)
    gradient = stacked(projections, "gradient_reference")[..., k - 1]
    # [layer, end, head] → [end, layer, head]
    permuted = stacked(projections, "permuted")[..., k - 1].transpose(0, 1)
    low, high = _interval(projections, deltas, column, relative, d / k)
    eigengap = _wide(_eigengap(stacked(projections, "eigenvalues"), k), heads)
    ρ = stacked(deltas, "rounding")
    unrounded = torch.where(ρ <= ROUNDING_HOPELESS, (fraction - ρ * k / d) / (1 - ρ), torch.nan)
    base_energy = stacked(deltas, "base_energy")
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
        "eigengap": eigengap,
        "delta_norm": energy.sqrt(),
        "delta_relative_norm": (energy / base_energy).sqrt(),
        "delta_shrink": stacked(deltas, "shrink"),
        "delta_effective_rank": effective_rank(spectrum),
        "rounding_share": ρ,
        "fraction_unrounded": unrounded,
    }
    frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})
    frame["layer"] = pd.array(np.repeat(np.arange(layers), heads), dtype="Int64")
    frame["head"] = pd.array(np.tile(np.arange(heads), layers) if headed else [pd.NA] * layers, dtype="Int64")
    frame["matrix"] = first.matrix
    frame["pathway"] = kind_of(first.matrix).side
    frame["subspace"] = first.subspace
    frame["rank"] = k
    frame["isotropic_p"] = p
    frame["p_method"] = method
    frame["isotropic_q"] = adjusted_p(p)
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
    return PairTables(frame, _null_rows(frame, nulls))


def _null_rows(frame: pd.DataFrame, nulls: Mapping[str, Mapping[str, Tensor | np.ndarray | pd.Series]]) -> pd.DataFrame:
    """Rows of `PairAnalysis.nulls` for the rows of a block: where a null applies, which is where it expects something.

    Args:
        frame: rows of the table, one for each layer and head.
        nulls: by null, what there is of `expected, low, high, p, q`, each of as many numbers as there are rows.
    """
    keys = ["layer", "head", "matrix", "pathway", "subspace", "rank"]
    parts = []
    for null, given in nulls.items():
        part = frame[keys].assign(
            null=null, **{name: np.ravel(given[name]) if name in given else np.nan
                          for name in ("expected", "low", "high", "p", "q")},
        )  # fmt: skip
        part.insert(len(keys) + 2, "excess", frame["fraction"] / part["expected"])
        parts.append(part[part[["expected", "low"]].notna().any(axis=1)])
    return pd.concat(parts, ignore_index=True)


def _interval(
    projections: Sequence[Projection], deltas: Sequence[Delta], column: int, relative: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if projections[0].replicates is None:
        nan = torch.full_like(relative, torch.nan)
        return nan, nan
    # [layer, group, head] → [group, layer, head]
    energies = stacked(projections, "replicates")[..., column].transpose(0, 1)
    interval = log_jackknife_interval(relative, energies / stacked(deltas, "energy") * scale, corrected=True)
    return interval.low, interval.high


def _eigengap(eigenvalues: Tensor, k: int) -> Tensor:
    """(λ_k − λ_{k+1}) / λ_k for each layer; NaN for a basis that ends at k or has no eigenvalues."""
    if eigenvalues.shape[-1] <= k:
        return torch.full(eigenvalues.shape[:1], torch.nan, dtype=torch.float64)
    return 1 - eigenvalues[:, k] / eigenvalues[:, k - 1]


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
