"""One matrix held against one subspace, in every layer: the numbers all tables are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry.geometry.fraction import gram_energy
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.deltas import AnyDelta
from tl_asymmetry.settings import GradientMoments, PermutedGradients


@dataclass(frozen=True)
class Projection:
    """A matrix's delta in one layer against one ordered basis; float64 on CPU."""

    matrix: str
    """Name of the matrix."""
    subspace: str
    """Name of the subspace."""
    energies: Float64[Tensor, "head k"]
    """‖q_iᵀ ΔW_h‖² along each direction."""
    eigenvalues: Float64[Tensor, " k"]
    """Variance along each direction; NaN where the basis has none."""
    activation_reference: Float64[Tensor, " top"] | None
    """Share of the matrix's input variance in the leading 1 … top directions, top the largest rank in use; None for
    write matrices."""
    gradient_reference: Float64[Tensor, "head top"] | None
    """Share of the output gradient's variance in the leading 1 … top directions; None without gradients."""
    permuted: Float64[Tensor, "2 head top"] | None
    """Lower and upper end of the 95 % range of the fraction in the leading 1 … top directions over gradients with δ
    permuted within sequences; None for write matrices and without such draws."""
    replicates: Float64[Tensor, "group head rank"] | None
    """Energy in the leading `rank` directions with one group left out; None for a basis without replicates."""


def project(
    deltas: Sequence[AnyDelta],
    name: str,
    bases: LayerBases,
    ranks: Sequence[int],
    *,
    intervals: bool,
    softmax_centres_keys: bool,
    gradient: GradientMoments | None,
) -> list[Projection]:
    """Hold several matrices of one layer against one subspace; each replicate is made once for all of them.

    Args:
        deltas: of this layer.
        name: the subspace.
        bases: of this layer.
        ranks: ranks at which replicates are read.
        intervals: make replicates (for a captured subspace).
        softmax_centres_keys: whether W_K's gradient sees its input about each sequence's mean.
        gradient: covariances for write matrices' matched reference.
    """
    subspace = bases.subspace(name)
    top = min(subspace.rank, max(ranks))
    replicates: dict[str, list[Tensor]] = {}
    if intervals and bases.is_captured(name):
        read = torch.tensor(ranks) - 1
        for Q in bases.replicates(name, top):
            for delta in deltas:
                replicates.setdefault(delta.matrix, []).append(delta.energies(Q).cumsum(-1)[:, read])
    eigenvalues = torch.full((subspace.rank,), torch.nan, dtype=torch.float64)
    if subspace.eigenvalues is not None:
        eigenvalues = subspace.eigenvalues.double().cpu()
    projections = []
    for delta in deltas:
        activation_reference = gradient_reference = permuted = None
        if kind_of(delta.matrix).reads:
            centred = delta.matrix == "W_K" and softmax_centres_keys
            activation_reference = bases.reference(kind_of(delta.matrix).point, name, top, within_sequences=centred)
        energies = delta.energies(subspace.basis)
        if gradient is not None and kind_of(delta.matrix).writes:
            basis = subspace.basis[:, :top]
            gradient_reference = _gradient_reference(gradient, bases.layer, delta.matrix, basis, len(energies))
        if kind_of(delta.matrix).reads and isinstance(gradient, PermutedGradients):
            drawn = gradient.permuted_fractions(bases.layer, delta.matrix, subspace.basis[:, :top])
            if drawn is not None:
                ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
                permuted = drawn.double().cpu().quantile(ends, dim=0)
        projections.append(
            Projection(
                matrix=delta.matrix,
                subspace=name,
                energies=energies,
                eigenvalues=eigenvalues,
                activation_reference=activation_reference,
                gradient_reference=gradient_reference,
                permuted=permuted,
                replicates=torch.stack(replicates[delta.matrix]) if delta.matrix in replicates else None,
            )
        )
    return projections


def keys_reference_note(*, softmax_centres_keys: bool) -> str:
    """What the reader must know of the matched reference of W_K, which depends on the model's attention."""
    if softmax_centres_keys:
        return (
            "activation_matched on W_K rows uses the input's covariance within sequences: softmax ignores what all "
            "keys of a sequence share"
        )
    return (
        "activation_matched on W_K rows uses the uncentred input: with rotary positions, a query-key norm or a "
        "soft cap, softmax removes what all keys share only in part, so there the reference is an approximation"
    )


def _gradient_reference(gradient: GradientMoments, layer: int, matrix: str, basis: Tensor, heads: int) -> Tensor:
    rows = []
    for head in range(heads) if kind_of(matrix).point == "z" else [None]:
        Σ = gradient.gradient_moment(layer, matrix, head).double()
        rows.append(gram_energy(Σ, basis).cumsum(0) / Σ.trace())
    return torch.stack(rows)
