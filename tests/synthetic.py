"""Synthetic result tables with the columns of `PairAnalysis.table` and `.asymmetry`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tl_asymmetry.names import kind_of

D_MODEL = 64
LAYERS = 4
HEADS = 4
RANKS = (1, 4, 16)
SUBSPACES = {
    "W_Q": ("attn_in", "prediction"), "W_K": ("attn_in", "prediction"), "W_V": ("attn_in", "prediction"),
    "W_O": ("resid_mid", "prediction"), "W_in": ("mlp_in", "prediction"), "W_out": ("resid_post", "prediction"),
}  # fmt: skip


def make_table(
    seed: int = 0, *, kv_heads: int = HEADS, layers: int = LAYERS, heads: int = HEADS, d: int = D_MODEL,
    ranks: tuple[int, ...] = RANKS, gradients: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """A table as `analyze_pair` gives it: NaN intervals on prediction rows, NaN references on write rows."""
    rng = np.random.default_rng(seed)
    rows = []
    for matrix, subspaces in SUBSPACES.items():
        count = {"W_K": kv_heads, "W_V": kv_heads, "W_in": None, "W_out": None}.get(matrix, heads)
        for layer in range(layers):
            for head in [pd.NA] if count is None else range(count):
                share = float(np.clip(rng.beta(0.6, 6), 0, 0.95))
                if (layer, head) == (1, 0) if count is not None else False:
                    share = 0.7
                if (layer, head) == (2, 1) if count is not None else False:
                    share = 0.2
                norm = float(10 ** rng.uniform(-4, -2.5))
                for subspace in subspaces:
                    strength = rng.normal(1.5 if kind_of(matrix).reads and subspace != "prediction" else 0.1, 0.8)
                    for k in ranks:
                        relative = float(np.clip(2 ** (strength * (1 - np.log(k) / np.log(d))), 0.05, d / k))
                        fraction = relative * k / d
                        matched = np.nan
                        if kind_of(matrix).reads:
                            matched = min(0.9, fraction * float(2 ** rng.normal(0.2, 0.5)))
                        z = float((relative - 1) * np.sqrt(k) * 3)
                        by_weights = subspace == "prediction"
                        unrounded = np.nan if share > 0.9 else (fraction - share * k / d) / (1 - share)
                        gap = float(rng.uniform(0.01, 0.5))
                        flags = ["eigengap"] if gap < 0.05 else []
                        flags += ["rounding_dominated"] if share >= 0.5 else ["rounding"] if share >= 0.1 else []
                        matched_write = (
                            float(rng.uniform(1, 3)) * k / d if gradients and kind_of(matrix).writes else np.nan
                        )
                        rows.append(
                            {
                                "layer": layer, "head": head, "matrix": matrix,
                                "pathway": kind_of(matrix).side, "subspace": subspace, "rank": k,
                                "fraction": fraction, "relative": relative, "isotropic_z": z,
                                "isotropic_p": float(np.exp(-max(z, 0))), "p_method": "imhof" if k == 1 else "beta",
                                "isotropic_q": float(min(1, 2 * np.exp(-max(z, 0)))), "activation_matched": matched,
                                "excess": fraction / matched, "gradient_matched": matched_write,
                                "gradient_excess": fraction / matched_write,
                                "ci_low": np.nan if by_weights else relative * 0.9,
                                "ci_high": np.nan if by_weights else relative * 1.12,
                                "eigengap": gap, "delta_norm": norm * 30, "delta_relative_norm": norm,
                                "delta_effective_rank": float(rng.uniform(2, 16)), "rounding_share": share,
                                "fraction_unrounded": unrounded, "delta_shrink": float(rng.normal(0, 1e-4)),
                                "flags": ",".join(flags),
                            }
                        )  # fmt: skip
    table = pd.DataFrame(rows)
    table["head"] = table["head"].astype("Int64")
    return table


def make_asymmetry(table: pd.DataFrame, *, expected: bool = False) -> pd.DataFrame:
    """The index of a table: W_Q against its input over W_O against prediction."""
    read = table[(table["matrix"] == "W_Q") & (table["subspace"] == "attn_in")].set_index(["layer", "head", "rank"])
    write = table[(table["matrix"] == "W_O") & (table["subspace"] == "prediction")].set_index(["layer", "head", "rank"])
    both = pd.DataFrame({"read": read["relative"], "write": write["relative"]}).reset_index()
    whole = both.groupby(["layer", "rank"], as_index=False)[["read", "write"]].mean()
    whole["head"] = pd.NA
    both = pd.concat([both, whole.astype({"head": "Int64"})], ignore_index=True)
    both["log2_ratio"] = np.log2(both["read"] / both["write"])
    both["log2_expected"] = 0.7 if expected else np.nan
    both["log2_excess"] = both["log2_ratio"] - both["log2_expected"]
    both["ci_low"], both["ci_high"] = both["log2_ratio"] - 0.2, both["log2_ratio"] + 0.25
    return both[
        ["layer", "head", "rank", "read", "write", "log2_ratio", "log2_expected", "log2_excess", "ci_low", "ci_high"]
    ]
