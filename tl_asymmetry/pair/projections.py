"""One matrix held against one subspace, in every layer: the numbers all tables are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry.geometry.fraction import gram_energy
from tl_asymmetry.geometry.matched import MatchedCovariance
from tl_asymmetry.geometry.nulls import PERMUTATIONS, order_range
from tl_asymmetry.geometry.references import expected_fraction, input_covariance
from tl_asymmetry.names import SIGNIFICANT, kind_of
from tl_asymmetry.pair.bases import LayerBases, crossed_replicates
from tl_asymmetry.pair.deltas import AnyDelta, FactoredDelta, LiveDelta
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
    existing: int
    """Directions that exist: those with at least 1e-6 of the leading eigenvalue."""
    noise: Float64[Tensor, "head top"]
    """Fraction of storage noise in the leading 1 … top directions."""
    activation_reference: Float64[Tensor, " top"] | None
    """Fraction by chance in the leading 1 … top directions under the chosen optimiser, top the largest rank in use;
    None for write matrices."""
    gradient_reference: Float64[Tensor, "head top"] | None
    """Fraction by chance under the chosen optimiser on the output's own gradients; None without gradients."""
    permuted: Float64[Tensor, "3 head top"] | None
    """Mean, lower and upper end of the 95 % range of the fraction in the leading 1 … top directions over gradients with
    δ permuted within sequences; None for write matrices and without enough such draws."""
    replicates: Float64[Tensor, "group head rank"] | None
    """Energy in the leading `rank` directions with one group left out; None for a basis without replicates."""
    reference_replicates: Float64[Tensor, "group top"] | None = None
    """`activation_reference` with one group left out."""
    references: Mapping[str, Float64[Tensor, " top"]] = field(default_factory=dict)
    """Fractions by chance of every null that the input gives, see `bases.REFERENCES`, "weighted" and "lora"."""
    tails: Float64[Tensor, "2 item rank"] | None = None
    """P(fraction ≥) and P(fraction ≤) under the chosen optimiser's reference, of every head, then of the heads pooled
    where there are several; None for write matrices."""
    unshrunk: Projection | None = None
    """Of ΔW − sW."""


def project(
    deltas: Sequence[AnyDelta],
    name: str,
    bases: LayerBases,
    ranks: Sequence[int],
    *,
    intervals: bool,
    gradient: GradientMoments | None,
) -> list[Projection]:
    """Hold several matrices of one layer against one subspace; each replicate is made once for all of them.

    Args:
        deltas: of this layer.
        name: the subspace.
        bases: of this layer.
        ranks: ranks at which replicates are read.
        intervals: make replicates.
        gradient: covariances for write matrices' matched reference, and draws for read matrices.
    """
    subspace = bases.subspace(name)
    top = min(subspace.rank, max(ranks))
    replicates: dict[str, list[Tensor]] = {}
    weighted = {delta.matrix: C for delta in deltas if (C := _weighted_covariance(delta, bases)) is not None}
    without: dict[str, list[Tensor]] = {matrix: [] for matrix in weighted}
    if intervals:
        read = torch.tensor([k for k in ranks if k <= top]) - 1
        there = sorted({min(k, top) for k in ranks})
        reading = [delta.matrix for delta in deltas if kind_of(delta.matrix).reads]
        for Q in crossed_replicates(bases, reading, name, there):
            for delta in deltas if bases.is_captured(name) else ():
                replicates.setdefault(delta.matrix, []).append(delta.energies(Q).cumsum(-1)[:, read])
            for matrix, C in weighted.items() if bases.is_captured(name) else ():
                without[matrix].append(expected_fraction(C, Q))
    eigenvalues = torch.full((subspace.rank,), torch.nan, dtype=torch.float64)
    if subspace.eigenvalues is not None:
        eigenvalues = subspace.eigenvalues.double().cpu()
    existing = [k for k in ranks if k <= subspace.existing]
    projections = []
    for delta in deltas:
        energies = delta.energies(subspace.basis)
        gradient_reference = None
        if gradient is not None and kind_of(delta.matrix).writes:
            basis = subspace.basis[:, :top]
            gradient_reference = _gradient_reference(gradient, bases, delta, basis)
        projection = Projection(
            matrix=delta.matrix,
            subspace=name,
            energies=energies,
            eigenvalues=eigenvalues,
            existing=subspace.existing,
            noise=delta.numbers.noise_rows @ subspace.basis[:, :top].double().cpu().square().cumsum(-1),
            activation_reference=None,
            gradient_reference=gradient_reference,
            permuted=_permuted(gradient, bases.layer, delta.matrix, subspace.basis[:, :top]),
            replicates=torch.stack(replicates[delta.matrix]) if delta.matrix in replicates else None,
        )
        if kind_of(delta.matrix).reads:
            by_weight = None
            if (C := weighted.get(delta.matrix)) is not None:
                held = without[delta.matrix]
                by_weight = expected_fraction(C, subspace.basis[:, :top]), torch.stack(held) if held else None
            projection = _against_input(projection, delta, bases, subspace.basis[:, :top], existing, ranks, by_weight)
        if delta.unshrunk is not None:
            twin = replace(projection, energies=delta.unshrunk.energies(subspace.basis))
            if kind_of(delta.matrix).reads:
                tails = reference_tails(delta.unshrunk, bases, subspace.basis[:, :top], existing, ranks)
                twin = replace(twin, tails=tails)
            projection = replace(projection, unshrunk=twin)
        projections.append(projection)
    return projections


def _against_input(
    projection: Projection, delta: AnyDelta, bases: LayerBases, basis: Tensor, existing: Sequence[int],
    ranks: Sequence[int], weighted: tuple[Tensor, Tensor | None] | None,
) -> Projection:  # fmt: skip
    """A read matrix's references, and the test against that of the chosen optimiser: on inputs weighted by gradients
    where there are any, and an adapter's own where there is one.

    The weighted reference is not cross-fitted, which makes it too high rather than too low on the texts of the
    subspace; its replicates are those of the directions alone.
    """
    found = bases.references(delta.matrix, projection.subspace, basis.shape[1], columns=delta.numbers.columns)
    references, chosen, replicates = dict(found.expected), found.chosen, found.replicates
    if weighted is not None:
        chosen, replicates = weighted
        references["weighted"] = chosen
    adapter = bases.adapter(delta.matrix, delta.residual) if isinstance(delta, FactoredDelta) else None
    if adapter is not None:
        inside = gram_energy(adapter.covariance, adapter.frame.mT @ basis.to(adapter.frame)).cumsum(0).cpu()
        own = inside / adapter.covariance.trace().cpu()
        if replicates is not None:
            replicates = replicates / chosen * own
        references["lora"] = chosen = own
    return replace(
        projection,
        activation_reference=chosen,
        references=references,
        reference_replicates=replicates,
        tails=reference_tails(delta, bases, basis, existing, ranks),
    )


def reference_tails(
    delta: AnyDelta, bases: LayerBases, basis: Tensor, existing: Sequence[int], ranks: Sequence[int]
) -> Float64[Tensor, "2 item rank"]:
    """P(fraction ≥) and P(fraction ≤) of every head and of the heads pooled: the larger of with and without the mean.

    An adapter's change is tested within what its A reads, where it lies by construction. One step of Adam, or gradients
    that persist, leave less than its reference, down to the sign limit: what is below the one must be below the other.
    Storage noise lies elsewhere than inputs do: a fraction is above, or below, if it is so with and without that.
    """
    heads = len(delta.numbers.energy)
    nothing = torch.full((2, heads + (heads > 1), len(ranks)), torch.nan, dtype=torch.float64)
    limited = bases.optimizer == "adam"
    if isinstance(delta, FactoredDelta):
        # Without factors the adapter leaves the matrix alone: nothing to test.
        own = bases.adapter(delta.matrix, delta.residual) if delta.residual.shape[1] else None
        if own is None:
            return nothing
        frame = own.frame.to(delta.residual)
        within = LiveDelta(delta.numbers, (frame.mT @ delta.residual) @ delta.other.mT, None)
        basis = frame.mT @ basis.to(frame)
        tails = _tails_under(MatchedCovariance.of(own.covariance, own.mean), within, basis, existing, nothing, ranks)
        if limited and _some_below(tails):
            own = bases.adapter(delta.matrix, delta.residual, optimizer="sign")
            assert own is not None
            limit = MatchedCovariance.of(own.covariance, own.mean)
            tails[1] = torch.fmax(tails[1], _tails_under(limit, within, basis, existing, nothing, ranks)[1])
        return tails
    covariance = bases.matched(delta.matrix, columns=delta.numbers.columns)
    if covariance is None:
        return nothing
    tails = _tails_under(covariance, delta, basis, existing, nothing, ranks)
    if limited and _some_below(tails):
        tails[1] = torch.fmax(tails[1], _tails_under(covariance.persistent, delta, basis, existing, nothing, ranks)[1])
    return tails


def _some_below(tails: Tensor) -> bool:
    return bool((tails[1] <= SIGNIFICANT).any())


def _tails_under(
    covariance: MatchedCovariance,
    delta: LiveDelta,
    basis: Tensor,
    existing: Sequence[int],
    nothing: Float64[Tensor, "2 item rank"],
    ranks: Sequence[int],
) -> Float64[Tensor, "2 item rank"]:
    tails, heads, total = nothing.clone(), len(delta.numbers.energy), delta.numbers.energy
    if delta.gram is not None:
        grams = delta.gram if heads == 1 else torch.cat([delta.gram, delta.gram.sum(0, keepdim=True)])
        spectra = covariance.whitened_gram_spectra(grams)
    else:
        spectra = covariance.whitened_spectra(delta.flat.unflatten(1, (heads, -1)).transpose(0, 1))
        if heads > 1:
            spectra = [
                _stacked_spectra(own, together)
                for own, together in zip(spectra, covariance.whitened_spectra(delta.flat.unsqueeze(0)), strict=True)
            ]
    freed, freed_total = basis, total
    # Energy of storage noise, by rows of ΔW; an adapter has none.
    stored = (delta.numbers.rounding.nan_to_num() * total).unsqueeze(-1) * delta.numbers.noise_rows
    noisy, stored_total = bool((stored > 0).any()), stored.sum(-1)
    for spectrum, law in zip(spectra, covariance.laws(basis), strict=True):
        sums = [delta.energies(freed).cumsum(-1), freed_total]
        if noisy:
            sums += [stored @ freed.to(stored).square().cumsum(-1), stored_total]
        if heads > 1:
            sums = [torch.cat([x, x.sum(0, keepdim=True)]) for x in sums]
        for k in existing:
            column, fraction = ranks.index(k), sums[0][:, k - 1] / sums[1]
            told = [fraction]
            if noisy:
                # As if storage noise were what is expected.
                told.append(fraction + (sums[3] * law.expected(k) - sums[2][:, k - 1]) / sums[1])
            found = law.tails(spectrum.repeat(len(told), 1), k, torch.cat(told))
            tails[..., column] = reduce(torch.fmax, found.tensor_split(len(told), 1), tails[..., column])
        if covariance.mean is not None:
            μ = covariance.mean.unsqueeze(-1).cpu()
            freed, freed_total = basis.cpu() - μ @ (μ.mT @ basis.to(μ)), total - delta.energies(μ)[:, 0]
            if noisy:
                stored_total = stored @ (1 - μ[:, 0].to(stored).square())
    return tails


def _stacked_spectra(heads: Float64[Tensor, "head r"], together: Float64[Tensor, "1 s"]) -> Float64[Tensor, "item s"]:
    wide = torch.zeros(len(heads), together.shape[1], dtype=heads.dtype)
    wide[:, : heads.shape[1]] = heads
    return torch.cat([wide, together])


def _permuted(
    gradient: GradientMoments | None, layer: int, matrix: str, basis: Tensor
) -> Float64[Tensor, "3 head top"] | None:
    if not (kind_of(matrix).reads and isinstance(gradient, PermutedGradients)):
        return None
    drawn = gradient.permuted_fractions(layer, matrix, basis)
    if drawn is None or len(drawn) < PERMUTATIONS:
        return None
    return torch.stack([drawn.double().cpu().mean(0), *order_range(drawn.double().cpu())])


def keys_reference_note(*, softmax_centres_keys: bool) -> str:
    """What the reader must know of the matched reference of W_K, which depends on the model's attention."""
    if softmax_centres_keys:
        return (
            "activation_matched on W_K rows uses the input's covariance within sequences, first positions included: "
            "softmax ignores what all keys of a sequence share"
        )
    return (
        "activation_matched on W_K rows uses the uncentred input of all positions: with rotary positions, a query-key "
        "norm or a soft cap, softmax removes what all keys share only in part, so there it is an approximation"
    )


def _weighted_covariance(delta: AnyDelta, bases: LayerBases) -> Float64[Tensor, "d d"] | None:
    """Left covariance by chance of a read matrix whose inputs are weighted by gradients; None without those."""
    if kind_of(delta.matrix).writes or (found := bases.weighted(delta.matrix)) is None:
        return None
    return input_covariance(found[0], bases.optimizer, columns=delta.numbers.columns)


def _gradient_reference(gradient: GradientMoments, bases: LayerBases, delta: AnyDelta, basis: Tensor) -> Tensor:
    """Of a write matrix: what the optimiser makes of Σ_δ, as `_against_input` of Σ_a."""
    heads = len(delta.numbers.energy)
    rows = []
    for head in range(heads) if kind_of(delta.matrix).point == "z" else [None]:
        Σ = gradient.gradient_moment(bases.layer, delta.matrix, head)
        C = input_covariance(Σ, bases.optimizer, columns=delta.numbers.columns)
        rows.append(expected_fraction(C, basis))
    return torch.stack(rows)
