"""A tangent analysis in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl_asymmetry._lazy import pd
from tl_asymmetry.names import BASIS_METHODS, SIGNIFICANT
from tl_asymmetry.results.sections import Definition

TANGENT_DEFINITIONS = (
    Definition(
        "The claim under study", "[paper]",
        "Low-rank directions taken from activations during training (tangent proxies) capture unusually large gradient "
        "energy and a larger share of gradient anisotropy than normal controls of equal rank, in encoders and "
        "decoders; the effect is early and tied to token frequency.",
    ),
    Definition(
        "Basis (Q_T)", "[choice]",
        "Orthonormal directions of the activations at one place of one layer, fitted on the checkpoints of the "
        "first part of training, pooled, and fixed from then on. PCA: leading eigenvectors of the uncentred second "
        "moment. semi-NMF: the span of D in A ≈ Z D, Z ≥ 0. A weight gradient is held against a basis of the "
        "matrix's own input, a per-token gradient against a basis of the block output.",
    ),
    Definition(
        "Weight and activation gradients", "[choice]",
        "weight: ∂L/∂W of the matrices that read the residual stream, L the mean loss over all predicted tokens, "
        "its rows along the matrix's outputs. activation: for each token the gradient of the summed loss in the "
        "block output; tokens without a gradient are left out.",
    ),
    Definition(
        "Energy, normal controls, ratio, p", "[choice]",
        "energy = ‖G Q‖²/‖G‖². The paper compares with normal controls of equal rank; that these are 20 random "
        "subspaces orthogonal to the basis is reported second-hand, and the formulas are ours: ratio is over their "
        "mean energy, p = (1 + number of controls with at least the energy) / (1 + controls).",
    ),
    Definition(
        "Size of the test (size)", "[ours]",
        "How often a basis drawn at random would get p ≤ 0.05 for the energy of a gradient of this spectrum, by "
        "simulation. Controls from the orthogonal complement are not exchangeable with a random basis, so this is not "
        '0.05. control="haar" draws them from everywhere: there p is exact.',
    ),
    Definition(
        "Spectrum-aware null (spectrum_expected, excess)", "[ours]",
        "The share of the activations' own energy that lies in the basis at that step; for a PCA basis of those same "
        "activations it is the sum of the r leading eigenvalues over the sum of all. A weight gradient is a sum of "
        "outer products of inputs and upstream gradients: were these independent of each other, of mean zero and "
        "uncorrelated between tokens, its expected energy would be this. Upstream gradients that tokens have in common "
        "add the inputs' mean, a leading direction, and lift excess (energy over it) above 1 without more. For "
        "activation gradients it is a reference only: nothing says that a gradient should lie as its activation does.",
    ),
    Definition(
        "Anisotropy share (ΔIso)", "[choice]",
        "Isotropy of the gradients' covariance without the basis, less that with it; isotropy is (PR − 1)/(d − 1) "
        "with the participation ratio PR, equal to IsoScore* without shrinkage. Positive: the anisotropy sat in the "
        "basis. Of an isotropic gradient any r of d directions take −r/(d − 1), so controls are mostly below 0.",
    ),
    Definition(
        "Strata and distance", "[choice]",
        "Tokens by how often they occur, cut into strata of equal mass; per stratum the energy of its per-token "
        "gradients in the basis and the mean distance of its block outputs from their centroid. Pearson: "
        "correlation over tokens of log-frequency and that distance, interval by leaving out groups of sequences.",
    ),
)  # fmt: skip
"""What the words of a tangent analysis mean, and whose they are."""


def summary_table(table: pd.DataFrame, rank: int) -> pd.DataFrame:
    """One row per kind of gradient, method and phase at one rank: medians over whole matrices, layers and steps."""
    rows = []
    whole = table[table["head"].isna() & (table["rank"] == rank)]
    for (gradient, method, phase), block in whole.groupby(["gradient", "method", "phase"], sort=False):
        rows.append(
            {
                "gradient": gradient,
                "method": method,
                "phase": phase,
                "energy": block["energy"].median(),
                "normal": block["normal_energy"].median(),
                "ratio": block["ratio"].median(),
                "p≤0.05": _share(block["p"] <= SIGNIFICANT),
                "size": block["size"].median(),
                "spectrum": block["spectrum_expected"].median(),
                "excess": block["excess"].median(),
                "ΔIso": block["anisotropy"].median(),
                "normal ΔIso": block["normal_anisotropy"].median(),
                "ΔIso p≤0.05": _share(block["anisotropy_p"] <= SIGNIFICANT),
            }
        )
    return pd.DataFrame(rows)


def headline(
    table: pd.DataFrame, strata: pd.DataFrame, frequency: pd.DataFrame, config: Mapping[str, Any]
) -> list[str]:
    """Sentences on what the tables show at the shown rank, each beside what it must be measured against."""
    k = config["shown_rank"]
    whole = table[table["head"].isna() & (table["rank"] == k)]
    if whole["energy"].isna().all():
        return ["Every gradient is zero: nothing to be located."]
    sentences = []
    for (gradient, method), block in whole.groupby(["gradient", "method"], sort=False):
        about = f"{str(gradient).capitalize()} gradients, {BASIS_METHODS[str(method)]} basis of rank {k}"
        sentences.append(
            f"{about}: median energy {block['energy'].median():.2f}, {block['ratio'].median():.1f} times the controls' "
            f"(p ≤ {SIGNIFICANT} in {_share(block['p'] <= SIGNIFICANT)}, where a random basis would have it in "
            f"{block['size'].median():.0%}). The activations' own spectrum would give "
            f"{block['spectrum_expected'].median():.2f}: median excess {block['excess'].median():.2f}, above 1 in "
            f"{_share(block['excess'] > 1)}."
        )
        sentences.append(
            f"{about}: isotropy changes by {block['anisotropy'].median():+.3f} (median) when the basis is taken "
            f"out, by {block['normal_anisotropy'].median():+.3f} when a control is; p ≤ {SIGNIFICANT} in "
            f"{_share(block['anisotropy_p'] <= SIGNIFICANT)}."
        )
        phases = {str(phase): rows for phase, rows in block.groupby("phase")}
        if {"early", "late"} <= phases.keys():
            sentences.append(
                f"{about}: energy {phases['early']['energy'].median():.2f} early and "
                f"{phases['late']['energy'].median():.2f} late, excess {phases['early']['excess'].median():.2f} and "
                f"{phases['late']['excess'].median():.2f}."
            )
    last = strata[(strata["rank"] == k) & (strata["step"] == strata["step"].max())] if len(strata) else strata
    for method, block in last.groupby("method", sort=False):
        energy = block.groupby("stratum")["energy"].median()
        sentences.append(
            f"By token frequency at the last step ({BASIS_METHODS[str(method)]}): median energy {energy.iloc[0]:.2f} "
            f"for the rarest tokens, {energy.iloc[-1]:.2f} for the most frequent."
        )
    if len(frequency):
        end = frequency[frequency["step"] == frequency["step"].max()]
        known = end["ci_low"].notna()
        apart = ((end["ci_low"] > 0) | (end["ci_high"] < 0))[known]
        sentences.append(
            f"Log-frequency and distance to the centroid at the last step: Pearson {end['pearson'].min():+.2f} to "
            f"{end['pearson'].max():+.2f} over layers, intervals without 0 in {_share(apart)}."
        )
    return sentences


def _share(condition: pd.Series) -> str:
    return f"{int(condition.sum())} of {len(condition)}"
