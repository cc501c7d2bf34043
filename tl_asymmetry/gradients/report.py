"""A gradient covariance in words."""

from __future__ import annotations

from tl_asymmetry._lazy import pd
from tl_asymmetry.results.sections import Definition

DEFINITIONS = (
    Definition(
        "The two sides", "[choice]",
        "A weight gradient is a sum of outer products over tokens, ∂L/∂W = Σ a δᵀ: a is what the matrix multiplies, δ "
        "the gradient of the loss at its product. δ of W_Q, W_K and W_V is taken before any query-key norm and rotary "
        "positions, δ of W_O at the attention's output before any norm (the heads have it in common), δ of W_in and "
        "W_gate at the pre-activation, δ of W_out at the MLP's output. An expert has the tokens that are routed to it; "
        "the weight that the router gave it there is part of δ.",
    ),
    Definition(
        "Second moments and their scale", "[choice]",
        "Uncentred and per token, over the tokens at which there is a gradient. The loss is summed over its terms "
        "(tokens, pairs, sequences), so that δ does not depend on the size of a batch; the batch still matters to "
        "objectives whose rows meet in it (InfoNCE) or that add means over different things.",
    ),
    Definition(
        "Effective rank, participation ratio, stable rank", "[choice]",
        "exp(entropy(λ/Σλ)), (Σλ)²/Σλ² and Σλ/λ_max of a second moment's eigenvalues: 1 for a single direction, the "
        "dimension for a flat spectrum.",
    ),
    Definition(
        "Marchenko–Pastur edge and spikes", "[ours]",
        "How large an eigenvalue independent tokens of the bulk's variance would reach. Tokens of a text depend on "
        "each other, so the number of eigenvalues above it describes and does not test.",
    ),
    Definition(
        "Coherence", "[ours]",
        "‖Σ a δᵀ‖² / Σ ‖a‖²‖δ‖². 1 if the outer products of different tokens are orthogonal on average: then the "
        "gradient is as large as its two sides explain. More where tokens push the same way, less where they cancel.",
    ),
)  # fmt: skip


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per matrix and side: medians over layers and heads."""
    rows = []
    for (matrix, side), block in table[table["half"] == "all"].groupby(["matrix", "side"], sort=False):
        median = block.select_dtypes("number").astype("float64").median()
        rows.append(
            {
                "matrix": matrix, "side": side, "axis": block["axis"].iloc[0], "dimension": int(median["dimension"]),
                "tokens": int(median["tokens"]), "effective_rank": median["effective_rank"],
                "participation_ratio": median["participation_ratio"], "stable_rank": median["stable_rank"],
                "top_energy": median["top_energy"], "rank": int(median["rank"]),
                "prediction_relative": median["prediction_relative"], "spikes": median["spikes"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def headline(table: pd.DataFrame, gradients: pd.DataFrame) -> list[str]:
    """Sentences on what the table shows."""
    rows = table[(table["half"] == "all") & table["effective_rank"].notna()]
    if rows.empty:
        return ["No gradient reached any of the matrices."]
    sentences = []
    inputs = rows[(rows["side"] == "input") & (rows["axis"] == "residual")]
    if len(inputs):
        share = (inputs["effective_rank"] / inputs["dimension"]).median()
        sentences.append(
            f"Inputs of read matrices: median effective rank {inputs['effective_rank'].median():.1f} "
            f"({share:.0%} of the dimension)."
        )
    written = rows[(rows["side"] == "gradient") & (rows["axis"] == "residual")]
    if len(written):
        share = (written["effective_rank"] / written["dimension"]).median()
        predicting = (
            f"; in the leading prediction directions they have {written['prediction_relative'].median():.2f} times the "
            "energy of an isotropic gradient"
            if written["prediction_relative"].notna().any()
            else ""
        )
        sentences.append(
            f"Gradients at what write matrices write: median effective rank {written['effective_rank'].median():.1f} "
            f"({share:.0%} of the dimension){predicting}."
        )
    coherent = gradients["coherence"].median()
    sentences.append(
        f"Coherence: a gradient's squared norm is {coherent:.2g} times that of its tokens' outer products added up as "
        "if they were orthogonal (median)."
    )
    return sentences
