"""A spectral analysis in words."""

from __future__ import annotations

from collections.abc import Sequence

from tl_asymmetry._lazy import pd
from tl_asymmetry.models.strangers import strangers
from tl_asymmetry.names import FOUND, ROUNDING_DOMINATED, SIGNIFICANT
from tl_asymmetry.results.sections import Definition

SPECTRAL_DEFINITIONS = (
    Definition(
        "On-principal share (on_principal)", "[paper]",
        "W = U S Vᵀ of the base, per head for attention, per matrix for the MLP, in the orientation y = x W: left is "
        "the input side. The share of ‖ΔW‖² between the k leading left and the k leading right singular vectors. arXiv "
        "2511.08567 and 2606.07082 report that updates travel off the principals.",
    ),
    Definition(
        "Its chance (relative, p, q)", "[ours]",
        "A delta whose orientation has nothing to do with W has a mean share of k²/(mn), so a small share by itself "
        "says nothing: 95 % off-principal can be several times more on-principal than chance. Mean and variance are "
        "exact (independent Haar frames); p is from a product of two Beta laws with these moments, exact for a delta "
        "of rank 1. In simulations it is 0.89 to 1.05 times the truth at 0.05 and 0.69 to 1.5 times at 0.01; far "
        "below, it may be several times too small. Any training violates the null: rejection alone is no finding.",
    ),
    Definition(
        "One-sided shares and coupling", "[ours]",
        "left_relative and right_relative hold ΔW against one side's vectors, over k/m and k/n. coupling is the "
        "two-sided share over the product of the two one-sided ones: 1 says that the sides meet by chance, above 1 "
        "that ΔW takes leading directions of the input to leading directions of the output.",
    ),
    Definition(
        "Shrinkage and rounding", "[ours]",
        "Weight decay alone is on-principal: on_principal_unshrunk is of ΔW − sW, s = ⟨ΔW, W⟩/‖W‖². Storage noise is "
        "larger where W is: on_principal_rounding is what it alone would have. rounding_share is how much of ‖ΔW‖² "
        "it explains.",
    ),
    Definition(
        "Intruder dimensions", "[paper]",
        "Singular vectors among the k leading of the aligned weight whose largest |cos| with every one of the base's "
        "is below 0.5 (Shuttleworth et al. 2024, arXiv 2410.21228). nn.Linear stores Wᵀ: its left is right here. Near-"
        "degenerate singular values fake intruders; intruders_inside tells how much of them lies in the base's 2k "
        "leading directions all the same.",
    ),
    Definition(
        "Rotation and drift", "[paper]",
        "Mean sin² of the principal angles between the k leading subspaces of base and aligned, and the relative "
        "change of the k leading singular values (arXiv 2606.07082).",
    ),
    Definition(
        "Intruders and rotation by chance", "[ours]",
        "The same of W plus the delta turned at random on both sides: first-order perturbation where no pair "
        "of directions turns by more than sin² = 0.02, else the mean of 8 draws (of 1 where the "
        "shorter axis is longer than 256).",
    ),
    Definition(
        "Sparse, or just small? (changed_share, changed_expected)", "[ours]",
        "Share of the stored entries that differ (arXiv 2511.08567 and 2505.11711 report about 1 % in bf16), beside "
        "the share that a dense delta of the same norm, with entries of the law of those that moved where the format "
        "is finest, would have changed. Only what is missing to that is sparsity.",
    ),
)  # fmt: skip
"""What the words of a spectral analysis mean, and whose they are."""


def summary_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per matrix: medians over layers and heads, and how many heads are above chance."""
    lines = []
    for matrix, block in rows.groupby("matrix", sort=False):
        tested = block["on_principal_q"].notna()
        lines.append(
            {
                "matrix": matrix,
                "rank": int(block["rank"].iloc[0]),
                "on-principal": block["on_principal"].median(),
                "× chance": block["on_principal_relative"].median(),
                "above": f"{int((block['on_principal_q'] <= SIGNIFICANT).sum())}/{int(tested.sum())}",
                "left": block["left_relative"].median(),
                "right": block["right_relative"].median(),
                "coupling": block["coupling"].median(),
                "intruders": block["intruders"].sum() + block["intruders_right"].sum(),
                "by chance": block["intruders_expected"].sum() + block["intruders_right_expected"].sum(),
                "changed": block["changed_share"].median(),
                "if dense": block["changed_expected"].median(),
                "rounding": block["rounding_share"].median(),
            }
        )
    return pd.DataFrame(lines)


def headline(rows: pd.DataFrame, unlike: Sequence[str]) -> list[str]:
    """Sentences that count tests, never point estimates; of matrices of another training none."""
    if rows["on_principal"].isna().all():
        return ["Every delta is zero: nothing to be located."]
    sentences = [strangers(unlike)] if unlike else []
    for matrix, block in rows[~rows["matrix"].isin(unlike)].groupby("matrix", sort=False):
        tested = block[block["on_principal_q"].notna()]
        if tested.empty:
            continue
        above = int((tested["on_principal_q"] <= SIGNIFICANT).sum())
        off = 1 - tested["on_principal"]
        chance = 1 - (tested["on_principal"] / tested["on_principal_relative"]).median()
        sentences.append(
            f"{matrix}: {off.min():.1%} to {off.max():.1%} of the change is off the {int(block['rank'].iloc[0])} "
            f"leading directions of both sides, of one at random orientation {chance:.1%}; {above} of {len(tested)} "
            f"{'holds' if above == 1 else 'hold'} more on them than that ({FOUND})."
        )
    if rows["on_principal_q"].notna().any():
        sentences.append(
            "q is corrected within each matrix. Any training may turn a change towards what the weights already do: to "
            "be above a random orientation is by itself no finding."
        )
    rounded = int((rows["rounding_share"] >= ROUNDING_DOMINATED).sum())
    if rounded:
        sentences.append(f"In {rounded} of {len(rows)} storage explains at least half of the change.")
    return sentences
