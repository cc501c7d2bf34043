"""How much each head's verdict depends on choices: every fraction, held against chance under every variant."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from tl_asymmetry.geometry.nulls import IsotropicNull, adjusted_p
from tl_asymmetry.names import SIGNIFICANT

STABILITY_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "matrix": "W_Q … W_out",
    "subspace": "the subspace whose variants are compared",
    "rank": "k",
    "relative": "of the analysis itself, from its table",
    "isotropic_q": "of the analysis itself",
    "variants": "how many variants there are, the analysis's own among them",
    "low": "smallest relative over the variants",
    "median": "median relative over the variants",
    "high": "largest relative over the variants",
    "low_variant": "the variant that gives the smallest",
    "high_variant": "the variant that gives the largest",
    "significant": "share of the variants in which q < 0.05, each corrected over its own layers and heads",
    "verdict": '"concentrated" (q < 0.05 in all variants), "not" (in none), "depends", "none" (no test)',
}
"""Columns of `PairAnalysis.stability()`, in this order, and what they mean."""

_CHOICES = ("activations", "centered", "first_position", "fold_norm")
_KEYS = ["layer", "head"]


def stability_table(
    variants: pd.DataFrame,
    table: pd.DataFrame,
    spectra: Mapping[str, Float[np.ndarray, "layer head r"]],
    *,
    d: int,
    seed: int,
) -> pd.DataFrame:
    """One row per layer × head × matrix × subspace × rank, over all variants of the subspace.

    The isotropic null belongs to the delta, not to the subspace, so every variant is held against the same law.

    Args:
        variants: `PairAnalysis.sensitivity()`.
        table: `PairAnalysis.table`.
        spectra: eigenvalues of ΔW ΔWᵀ, by matrix.
        d: d_model.
        seed: of the null's draws.
    """
    null = IsotropicNull(d, seed=seed)
    blocks = []
    for (matrix, subspace, rank), rows in variants.groupby(["matrix", "subspace", "rank"], sort=False):
        k = int(str(rank))
        # groupby keeps the rows' order: layers and heads within each variant.
        by_variant = [block for _, block in rows.groupby(list(_CHOICES), sort=False)]
        fraction = np.stack([block["fraction"].to_numpy(float) for block in by_variant])
        relative = np.stack([block["relative"].to_numpy(float) for block in by_variant])
        spectrum = torch.from_numpy(spectra[str(matrix)]).flatten(0, 1).repeat(len(by_variant), 1)
        p, _ = null.tail(spectrum, k, torch.from_numpy(fraction.ravel()))
        q = np.stack([adjusted_p(each) for each in p.reshape(fraction.shape)])
        known = np.isfinite(q).all(0)
        share = np.where(known, (q < SIGNIFICANT).mean(0), np.nan)
        names = np.array([_name(block.iloc[0]) for block in by_variant])
        finite = np.isfinite(relative).all(0)
        blocks.append(
            by_variant[0][_KEYS].assign(
                matrix=str(matrix),
                subspace=str(subspace),
                rank=k,
                variants=len(by_variant),
                low=relative.min(0),
                median=np.median(relative, axis=0),
                high=relative.max(0),
                low_variant=np.where(finite, names[np.nan_to_num(relative).argmin(0)], ""),
                high_variant=np.where(finite, names[np.nan_to_num(relative).argmax(0)], ""),
                significant=share,
                verdict=np.select([~known, share == 1, share == 0], ["none", "concentrated", "not"], "depends"),
            )
        )
    found = pd.concat(blocks, ignore_index=True)
    own = table[[*_KEYS, "matrix", "subspace", "rank", "relative", "isotropic_q"]]
    merged = found.merge(own, on=[*_KEYS, "matrix", "subspace", "rank"], how="left", validate="one_to_one")
    return merged[list(STABILITY_COLUMNS)]


def _name(row: pd.Series) -> str:
    """A variant in words."""
    center = "centred" if row["centered"] else "uncentred"
    if row["fold_norm"] != "-":
        folded = "final norm folded" if row["fold_norm"] == "folded" else "final norm not folded"
        return f"{row['activations']} unembedding, {center}, {folded}"
    return f"{row['activations']} activations, {center}, first position {row['first_position']}"
