"""A tangent analysis in words, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from tl_asymmetry.names import SIGNIFICANT
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.tangents.bases import METHOD

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_asymmetry.tangents.result import TangentAnalysis


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
        about = f"{str(gradient).capitalize()} gradients, {METHOD[str(method)]} basis of rank {k}"
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
            f"By token frequency at the last step ({METHOD[str(method)]}): median energy {energy.iloc[0]:.2f} for the "
            f"rarest tokens, {energy.iloc[-1]:.2f} for the most frequent."
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


def tangent_report(result: TangentAnalysis) -> Report:
    """Fill a `Report` from an analysis."""
    config = result.config
    return Report(
        title=result._title(),
        subtitle=result._facts(),
        summary="\n\n".join(result._headline()),
        notes=result.notes,
        figures=_figures(result),
        tables=[
            TableSection("Summary", result._summary_table(), "Medians over matrices, layers and steps.", "summary"),
            TableSection(
                "All rows", result.table, "One row per step, gradient, site, layer, head, method and rank.", "table"
            ),
            TableSection("Strata", result.strata, "Stratum 1 holds the rarest tokens.", "strata"),
            TableSection(
                "Frequency and distance", result.frequency, "Correlation over tokens, layer by layer.", "frequency"
            ),
            TableSection("Bases", result.bases, "How well each basis describes the early activations.", "bases"),
            TableSection("Checkpoints", result.checkpoints, "", "checkpoints"),
        ],
        methods=[
            ("Bases", f"{', '.join(METHOD[m] for m in config['methods'])}, rank "
             f"{', '.join(map(str, config['ranks']))}, fitted on steps {', '.join(map(str, config['basis_steps']))} of "
             f"{config['total_steps']}"),
            ("Controls", f"{config['draws']} random subspaces of equal rank for each basis, "
             + ("orthogonal to it" if config["control"] == "complement" else "anywhere (Haar)")),
            ("Loss", "masked-language-model loss on seeded masks" if config["kind"] == "encoder"
             else "next-token cross-entropy"),
            ("Strata", f"{config['strata']} of equal mass" if config["strata"] else "none"),
        ],
        definitions=TANGENT_DEFINITIONS,
        config=config,
    )  # fmt: skip


def _figures(result: TangentAnalysis) -> list[FigureSection]:
    families = [(g, m) for g in result.config["gradients"] for m in result.config["methods"]]
    energy: dict[str, go.Figure] = {}
    anisotropy: dict[str, go.Figure] = {}
    for gradient, method in families:
        name = f"{gradient} gradients, {METHOD[method]}"
        energy[name] = result.plot_energy(gradient, method=method)
        anisotropy[name] = result.plot_anisotropy(gradient, method=method)
    figures = [
        FigureSection(
            "Energy in early directions", energy,
            "Solid above dotted: more than the activations' own spectrum would give. Solid above the dashed line alone "
            "says only that gradients are not spread evenly.",
        ),
        FigureSection(
            "Anisotropy in early directions", anisotropy,
            "Above the dotted line of the same colour: the basis holds more of the anisotropy than a normal control.",
        ),
    ]  # fmt: skip
    if len(result.strata):
        strata = {METHOD[m]: result.plot_strata(method=m) for m in result.config["methods"]}
        figures.append(FigureSection("By token frequency", strata, "Drag the slider through training."))
    return figures


def _share(condition: pd.Series) -> str:
    return f"{int(condition.sum())} of {len(condition)}"
