"""What the words of a report mean, whose meaning it is, and which papers to cite."""

from __future__ import annotations

from dataclasses import dataclass

from tl_asymmetry.names import FOUND
from tl_asymmetry.results.nulls import NULLS
from tl_asymmetry.results.sections import Definition


@dataclass(frozen=True)
class Citation:
    """A paper the software implements."""

    title: str
    """Its title."""
    arxiv: str
    """Its arXiv number."""
    used_for: str
    """What was taken from it."""


CITATIONS = (
    Citation(
        "Where pretraining writes and alignment reads", "2605.16600", "Read and write asymmetry of weight deltas.",
    ),
    Citation(
        "Revisiting anisotropy: the geometry of learning dynamics", "2604.08764",
        "Tangent proxies against normal controls.",
    ),
    Citation(
        "Gradient-direction sensitivity and linear centroids", "2604.25143", "Centroid response along directions."
    ),
)  # fmt: skip
"""The three papers. Their authors are left to arXiv rather than guessed."""

DEFINITIONS = (
    Definition(
        "The claim under study", "[paper]",
        "Alignment deltas concentrate in the read pathway (W_Q, W_K) along principal directions of the attention-input "
        "activations, and stay near isotropic in the write pathway (W_O, and W_2, here W_out) relative to the "
        "prediction subspace, which the unembedding defines.",
    ),
    Definition(
        "Delta (ΔW)", "[choice]",
        "Aligned weights minus base weights, subtracted and accumulated in float32. Its residual axis is the one of "
        "size d (d_model): the input of read matrices, the output of write matrices.",
    ),
    Definition(
        "Subspaces", "[choice]",
        "attn_in, mlp_in, resid_pre, resid_mid, resid_post: the leading eigenvectors of the uncentred second moment of "
        "that activation. prediction: the leading left singular vectors of the unembedding with the final norm's gain "
        "folded in and its mean over the vocabulary removed.",
    ),
    Definition(
        "Relative subspace fraction (relative)", "[choice]",
        "The share of the delta's squared norm that lies in a k-dimensional subspace, divided by k/d. 1 is what an "
        "isotropic delta has; d/k is the most there can be.",
    ),
    *(null.definition for null in NULLS.values()),
    Definition(
        "Excess", "[ours]",
        "Fraction divided by the reference. Near 1 the delta is as concentrated as its inputs alone explain, however "
        "far it is from isotropic.",
    ),
    Definition(
        "95 % interval", "[ours]",
        "Of relative, by leaving out one group of texts at a time. It covers which texts were sampled, not training "
        "seeds. There is none on prediction rows, which depend on weights alone, and it is unreliable where the "
        "eigengap is small.",
    ),
    Definition(
        "Eigengap", "[ours]",
        "The relative drop (λ_k − λ_{k+1}) / λ_k at the subspace's edge. Under 0.05 the edge is arbitrary, and the row "
        "is flagged.",
    ),
    Definition(
        "Verdict and its stability", "[ours]",
        f"A head counts as concentrated where {FOUND}. With sensitivity=True every other choice of the subspace (whose "
        "activations, centring, first position; whose unembedding, its mean, the final norm) is held against the same "
        "null, corrected as the analysis is with that choice in the place of its own; the verdict depends on the "
        "choice where it holds in some of them only.",
    ),
    Definition(
        "Marchenko–Pastur edge", "[ours]",
        "Where the spectrum of independent samples (tokens for activations, the longer axis of ΔW for a delta) would "
        "end, its scale fitted to the median eigenvalue. Descriptive: tokens and weights are dependent, so what lies "
        "above it is not thereby significant.",
    ),
    Definition(
        "Rounding share", "[ours]",
        "The share of the delta's squared norm that storing weights in bf16 or fp16 would explain by itself; 0 for "
        "float32. Rounding noise is near isotropic and hides structure: heads are marked from 0.1 and greyed from 0.5. "
        "fraction_unrounded is the fraction with that share taken out.",
    ),
    Definition(
        "Asymmetry index (log2_ratio)", "[choice]",
        "log2 of relative read (W_Q and W_K against their input) over relative write (W_O against prediction; per "
        "layer also W_out). 0 is no asymmetry. Chance need not be 0, since any gradient reads: log2_expected is the "
        "same ratio of the matched references and log2_excess the difference; both need gradients. The interval "
        "covers the read side only.",
    ),
)  # fmt: skip
"""Definitions every report of a pair carries."""
