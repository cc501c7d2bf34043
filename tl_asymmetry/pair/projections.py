"""One matrix held against one subspace, in every layer: the numbers all tables are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from tl_asymmetry.geometry.fraction import gram_energy
from tl_asymmetry.geometry.nulls import PERMUTATIONS, order_range
from tl_asymmetry.geometry.references import expected_fraction, input_covariance
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of, reads_latent
from tl_asymmetry.pair.bases import LayerBases, crossed_replicates
from tl_asymmetry.pair.deltas import AnyDelta, FactoredDelta
from tl_asymmetry.pair.reference_tests import reference_tails
from tl_asymmetry.settings import GradientMoments, PermutedGradients


@dataclass(frozen=True)
class Projection:
    """A matrix's delta in one layer against one ordered basis, or each expert's against its own; float64 on CPU."""

    matrix: str
    """Name of the matrix."""
    subspace: str
    """Name of the subspace."""
    energies: Float64[Tensor, "head k"]
    """‖q_iᵀ ΔW_h‖² along each direction."""
    eigenvalues: Float64[Tensor, "*expert k"]
    """Variance along each direction; NaN where the basis has none."""
    existing: int | Int[Tensor, " expert"]
    """Directions that exist: those with at least 1e-6 of the leading eigenvalue."""
    noise: Float64[Tensor, "head top"]
    """Fraction of storage noise in the leading 1 … top directions."""
    activation_reference: Float64[Tensor, "*of_head top"] | None
    """Fraction by chance in the leading 1 … top directions under the chosen optimiser, top the largest rank in use, one
    for all heads or one for each; None for write matrices."""
    gradient_reference: Float64[Tensor, "head top"] | None
    """Fraction by chance under the chosen optimiser on the output's own gradients; None without gradients."""
    permuted: Float64[Tensor, "3 head top"] | None
    """Mean, lower and upper end of the 95 % range of the fraction in the leading 1 … top directions over gradients with
    δ permuted within sequences; None for write matrices and without enough such draws."""
    replicates: Float64[Tensor, "group head rank"] | None
    """Energy in the leading `rank` directions with one group left out; None for a basis without replicates."""
    reference_replicates: Float64[Tensor, "*group_of_head top"] | None = None
    """`activation_reference` with one group left out."""
    references: Mapping[str, Float64[Tensor, "*of_head top"]] = field(default_factory=dict)
    """Fractions by chance of every null that the input gives, see `bases.REFERENCES`, "weighted" and "lora"."""
    tails: Float64[Tensor, "2 item rank"] | None = None
    """P(fraction ≥) and P(fraction ≤) under the chosen optimiser's reference, of every head, then of the heads pooled
    where there are several; None for write matrices."""
    unshrunk: Projection | None = None
    """Of ΔW − sW."""


def project(
    deltas: Sequence[AnyDelta],
    targets: Mapping[str, Sequence[str]],
    bases: LayerBases,
    ranks: Sequence[int],
    *,
    intervals: bool,
    gradient: GradientMoments | None,
) -> list[Projection]:
    """Hold the matrices of one layer against their subspaces.

    Args:
        deltas: of this layer.
        targets: for each matrix the names of the subspaces.
        bases: of this layer.
        ranks: ranks at which replicates are read and tests made.
        intervals: make replicates.
        gradient: covariances for write matrices' matched reference, and draws for read matrices.
    """
    names = dict.fromkeys(name for delta in deltas for name in targets[delta.matrix])
    held = {name: [delta for delta in deltas if name in targets[delta.matrix]] for name in names}
    projections = [
        projection
        for name, of in held.items()
        for projection in _against(of, name, bases, ranks, intervals=intervals, gradient=gradient)
    ]
    reading = [delta for delta in deltas if kind_of(delta.matrix).reads]
    twins = [delta.unshrunk for delta in reading if delta.unshrunk is not None]
    tails = reference_tails([(delta, targets[delta.matrix]) for delta in [*reading, *twins]], bases, ranks)
    of_delta = {delta.matrix: of for delta, of in zip(reading, tails, strict=False)}
    of_twin = {twin.matrix: of for twin, of in zip(twins, tails[len(reading) :], strict=True)}
    return [_tested(projection, of_delta, of_twin) for projection in projections]


def _tested(
    projection: Projection, of_delta: Mapping[str, Mapping[str, Tensor]], of_twin: Mapping[str, Mapping[str, Tensor]]
) -> Projection:
    """With its tails, and those of its twin without weight decay."""
    matrix, name, twin = projection.matrix, projection.subspace, projection.unshrunk
    if matrix not in of_delta:
        return projection
    if twin is not None:
        twin = replace(twin, tails=of_twin[matrix][name])
    return replace(projection, tails=of_delta[matrix][name], unshrunk=twin)


def _against(
    deltas: Sequence[AnyDelta],
    name: str,
    bases: LayerBases,
    ranks: Sequence[int],
    *,
    intervals: bool,
    gradient: GradientMoments | None,
) -> list[Projection]:
    """Several matrices against one subspace; each replicate is made once for all of them."""
    subspace = bases.subspace(name)
    top = min(subspace.rank, max(ranks))
    replicates: dict[str, list[Tensor]] = {}
    weighted = {delta.matrix: C for delta in deltas if (C := _weighted_covariances(delta, bases)) is not None}
    without: dict[str, list[Tensor]] = {matrix: [] for matrix in weighted}
    if intervals:
        read = torch.tensor([k for k in ranks if k <= top]) - 1
        there = sorted({min(k, top) for k in ranks})
        reading = [delta.matrix for delta in deltas if kind_of(delta.matrix).reads]
        for Q in crossed_replicates(bases, reading, name, there):
            for delta in deltas:
                replicates.setdefault(delta.matrix, []).append(delta.energies(Q).cumsum(-1)[:, read])
            for matrix, C in weighted.items():
                without[matrix].append(C.expected(Q))
    eigenvalues = torch.full((subspace.rank,), torch.nan, dtype=torch.float64)
    if subspace.eigenvalues is not None:
        eigenvalues = subspace.eigenvalues.double().cpu()
    projections = []
    leading = subspace.basis[:, :top]
    spread, existing = leading.double().cpu().square().cumsum(-1), subspace.existing
    for delta in deltas:
        energies = delta.energies(subspace.basis)
        gradient_reference = None
        if gradient is not None and kind_of(delta.matrix).writes:
            gradient_reference = _gradient_reference(gradient, bases, delta, leading)
        projection = Projection(
            matrix=delta.matrix,
            subspace=name,
            energies=energies,
            eigenvalues=eigenvalues,
            existing=existing,
            noise=delta.numbers.noise_rows @ spread,
            activation_reference=None,
            gradient_reference=gradient_reference,
            permuted=_permuted(gradient, bases.layer, delta.matrix, leading),
            replicates=torch.stack(replicates[delta.matrix]) if delta.matrix in replicates else None,
        )
        if kind_of(delta.matrix).reads:
            by_weight = None
            if (C := weighted.get(delta.matrix)) is not None:
                held = without[delta.matrix]
                by_weight = C.expected(leading), torch.stack(held) if held else None
            projection = _against_input(projection, delta, bases, leading, by_weight)
        if delta.unshrunk is not None:
            twin = replace(projection, energies=delta.unshrunk.energies(subspace.basis))
            projection = replace(projection, unshrunk=twin)
        projections.append(projection)
    return projections


def _against_input(
    projection: Projection,
    delta: AnyDelta,
    bases: LayerBases,
    basis: Tensor,
    weighted: tuple[Tensor, Tensor | None] | None,
) -> Projection:
    """A read matrix's references; that of the chosen optimiser on inputs weighted by gradients where there are any,
    and an adapter's own where there is one.

    The weighted reference is not cross-fitted, which makes it too high rather than too low on the texts of the
    subspace; its replicates are those of the directions alone.
    """
    found = bases.references(delta.matrix, projection.subspace, basis.shape[1], columns=delta.numbers.columns)
    references, chosen, replicates = dict(found.expected), found.chosen, found.replicates
    if weighted is not None:
        chosen, replicates = weighted
        references["weighted"] = chosen
    own = _of_adapter(delta, bases, basis) if isinstance(delta, FactoredDelta) else None
    if own is not None:
        if replicates is not None:
            replicates = replicates / chosen * own
        references["lora"] = chosen = own
    return replace(
        projection,
        activation_reference=chosen,
        references=references,
        reference_replicates=replicates,
    )


def _permuted(
    gradient: GradientMoments | None, layer: int, matrix: str, basis: Tensor
) -> Float64[Tensor, "3 head top"] | None:
    if not (kind_of(matrix).reads and isinstance(gradient, PermutedGradients)):
        return None
    drawn = gradient.permuted_fractions(layer, matrix, basis)
    if drawn is None or len(drawn) < PERMUTATIONS:
        return None
    return torch.stack([drawn.double().cpu().mean(0), *order_range(drawn.double().cpu())])


def notes_of_kinds(base: ModelView, matrices: Sequence[str]) -> Iterator[str]:
    """What the reader must know of some kinds of matrices: keys, experts, those that work on latents."""
    if "W_K" in matrices and base.key_shift_invariant:
        yield (
            "activation_matched on W_K rows uses the input's covariance within sequences, first positions included: "
            "softmax ignores what all keys of a sequence share"
        )
    elif "W_K" in matrices:
        yield (
            "activation_matched on W_K rows uses the uncentred input of all positions: with rotary positions, a "
            "query-key norm or a soft cap, softmax removes what all keys share only in part, so there it is an "
            "approximation"
        )
    if any(base.experts(matrix) for matrix in matrices):
        yield (
            "experts are held against what the whole layer reads; each learned from the tokens that were routed to it "
            'alone, so what training gives it by chance is known approximately (subspaces=[..., "expert_in"] holds '
            "each against its own inputs)"
        )
    if latent := [matrix for matrix in matrices if reads_latent(matrix)]:
        yield (
            f"latent attention: {', '.join(latent)} read latents, behind their norms, and are held against these and "
            "not against the stream: d is the latent's width there; circuits go through the products with the maps "
            "into the latents"
        )


@dataclass(frozen=True)
class _Weighted:
    """Left covariances by chance of a read matrix whose inputs are weighted by gradients."""

    matrices: Sequence[Float64[Tensor, "d d"]]
    """Of each head, or one for all of them."""
    shared: bool
    """Whether it is one for all."""

    def expected(self, basis: Float[Tensor, "d k"]) -> Float64[Tensor, "*head k"]:
        """Fractions in the leading 1 … k columns."""
        fractions = torch.stack([expected_fraction(C, basis) for C in self.matrices])
        return fractions[0] if self.shared else fractions


def _weighted_covariances(delta: AnyDelta, bases: LayerBases) -> _Weighted | None:
    """None without weights."""
    if kind_of(delta.matrix).writes or bases.weighted(delta.matrix) is None:
        return None
    heads = bases.own_heads(delta.matrix, len(delta.numbers.energy))
    return _Weighted(
        [
            input_covariance(bases.learned(delta.matrix, head)[0], bases.optimizer, columns=delta.numbers.columns)
            for head in heads or [None]
        ],
        shared=heads is None,
    )


def _of_adapter(delta: FactoredDelta, bases: LayerBases, basis: Tensor) -> Float64[Tensor, "*head top"] | None:
    """What an adapter's A makes of its inputs; of each head where heads have inputs of their own."""
    heads = bases.own_heads(delta.matrix, len(delta.numbers.energy))
    found = [bases.adapter(delta.matrix, delta.residual, head=head) for head in heads or [None]]
    rows = [
        gram_energy(own.covariance, own.frame.mT @ basis.to(own.frame)).cumsum(0).cpu() / own.covariance.trace().cpu()
        for own in found
        if own is not None
    ]
    if not rows:
        return None
    return rows[0] if heads is None else torch.stack(rows)


def _gradient_reference(gradient: GradientMoments, bases: LayerBases, delta: AnyDelta, basis: Tensor) -> Tensor:
    """Of a write matrix: what the optimiser makes of Σ_δ, as `_against_input` of Σ_a. Experts have one in common."""
    heads = len(delta.numbers.energy)
    rows = []
    for head in range(heads) if kind_of(delta.matrix).point == "z" else [None]:
        Σ = gradient.gradient_moment(bases.layer, delta.matrix, head)
        C = input_covariance(Σ, bases.optimizer, columns=delta.numbers.columns)
        rows.append(expected_fraction(C, basis))
    return torch.stack(rows).expand(heads, -1)
