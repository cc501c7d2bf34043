"""Is more of a change in a subspace than what training gives on these inputs: the tests of a layer, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from tl_asymmetry.geometry.hierarchy import of_layers
from tl_asymmetry.geometry.matched import Asked, MatchedCovariance, laws_at, matched_tails
from tl_asymmetry.names import SIGNIFICANT
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.deltas import AnyDelta, FactoredDelta, LiveDelta, of_unit

Tails = Float64[Tensor, "2 _item _rank"]
"""P(fraction ≥) and P(fraction ≤) of every head, then of the heads pooled where there are several."""
Wanted = Mapping[str, Bool[Tensor, "_item _rank"]]
"""Which of these are asked for, by subspace."""


def reference_tails(
    asked: Sequence[tuple[AnyDelta, Sequence[str]]], bases: LayerBases, ranks: Sequence[int]
) -> list[dict[str, Tails]]:
    """Tails under the chosen optimiser's reference: the larger of with and without the mean input.

    An adapter's change is tested within what its A reads, where it lies by construction. One step of Adam, or gradients
    that persist, leave less than its reference, down to the sign limit: what is below the one must be below the other,
    which is asked only where the layer could be found to be below at all, and of those that could.
    Storage noise lies elsewhere than inputs do: a fraction is above, or below, if it is so with and without that.
    Where gradients weigh the inputs, each head is held against its own inputs' weights if they were kept, and the heads
    pooled against those of all heads; as nothing is told to be below these, that limit is not asked.

    Args:
        asked: deltas of read matrices, each with the subspaces that it is held against.
        bases: of their layer.
        ranks: at which; NaN at those that a subspace is too small for.

    Returns:
        For each delta, by subspace.
    """
    tails = [{name: _nothing(delta, ranks) for name in names} for delta, names in asked]
    everything = [
        (delta, {name: none[0].isnan() for name, none in of.items()})
        for (delta, _), of in zip(asked, tails, strict=True)
    ]
    for trial, p in _answered(everything, bases, ranks, persistent=False):
        _fold(p, trial, ranks, tails[trial.delta][trial.name])
    if bases.optimizer != "adam":
        return tails
    below = [
        (delta, {} if bases.weighted(delta.matrix) else _below(of)) for (delta, _), of in zip(asked, tails, strict=True)
    ]
    for trial, p in _answered(below, bases, ranks, persistent=True):
        _fold(p[1:], trial, ranks, tails[trial.delta][trial.name][1:])
    return tails


@dataclass(frozen=True)
class _Trial:
    """One delta in one subspace at one rank, with or without the mean input."""

    delta: int
    """Its place among those asked."""
    name: str
    """Of the subspace."""
    rank: int
    """k."""
    items: Int[Tensor, " item"]
    """Places of its items."""
    asked: Asked
    """These items; a second time with storage noise where there is some."""


def _answered(
    asked: Sequence[tuple[AnyDelta, Wanted]], bases: LayerBases, ranks: Sequence[int], *, persistent: bool
) -> Iterator[tuple[_Trial, Tensor]]:
    trials = [
        trial
        for i, (delta, wanted) in enumerate(asked)
        if wanted
        for trial in _trials(i, delta, wanted, bases, ranks, persistent=persistent)
    ]
    return zip(trials, matched_tails([trial.asked for trial in trials]), strict=True)


def _trials(
    place: int, delta: AnyDelta, wanted: Wanted, bases: LayerBases, ranks: Sequence[int], *, persistent: bool
) -> Iterator[_Trial]:
    heads = bases.own_heads(delta.matrix, len(delta.numbers.energy)) or range(0)
    for head in heads:
        own = {name: of[head : head + 1] for name, of in wanted.items()}
        for trial in _against(place, of_unit(delta, head), own, bases, ranks, head=head, persistent=persistent):
            yield replace(trial, items=trial.items + head)
    together = {name: of & (torch.arange(len(of)) >= len(heads)).unsqueeze(-1) for name, of in wanted.items()}
    yield from _against(place, delta, together, bases, ranks, persistent=persistent)


def _against(
    place: int,
    delta: AnyDelta,
    wanted: Wanted,
    bases: LayerBases,
    ranks: Sequence[int],
    *,
    head: int | None = None,
    persistent: bool,
) -> Iterator[_Trial]:
    """Against one covariance: of the inputs of all heads, or of this one's."""
    directions = {name: bases.subspace(name).basis[:, : max(ranks)] for name in wanted}
    if isinstance(delta, FactoredDelta):
        # Without factors the adapter leaves the matrix alone: nothing to test.
        limit = "sign" if persistent else ""
        reads = delta.residual.shape[1]
        own = bases.adapter(delta.matrix, delta.residual, optimizer=limit, head=head) if reads else None
        if own is None:
            return
        frame, covariance = own.frame.to(delta.residual), MatchedCovariance.of(own.covariance, own.mean)
        delta = LiveDelta(delta.numbers, (frame.mT @ delta.residual) @ delta.other.mT, None)
        directions = {name: frame.mT @ basis.to(frame) for name, basis in directions.items()}
        laws = {name: laws_at(covariance, basis, bases.existing(name, ranks)) for name, basis in directions.items()}
    else:
        found = bases.matched(delta.matrix, columns=delta.numbers.columns, head=head)
        if found is None:
            return
        covariance = found.persistent if persistent else found
        laws = {name: bases.laws(covariance, name, ranks) for name in wanted}
    solved = torch.stack([of.any(-1) for of in wanted.values()]).any(0)
    row = solved.cumsum(0) - 1
    spectra = _whitened_spectra(covariance, delta, solved)
    for name, versions in _held(delta, directions, covariance.mean).items():
        items = {k: of.nonzero().flatten() for k, of in zip(ranks, wanted[name].unbind(-1), strict=True)}
        for of, spectrum, held in zip(laws[name], spectra, versions, strict=True):
            for k, law in of.items():
                told = [fraction[items[k]] for fraction in held.fractions(k, law.expected)]
                if len(items[k]):
                    rows = row[items[k]].repeat(len(told))
                    yield _Trial(place, name, k, items[k], (law, spectrum[rows], torch.cat(told)))


def _whitened_spectra(
    covariance: MatchedCovariance, delta: LiveDelta, only: Bool[Tensor, " item"]
) -> list[Float64[Tensor, "item r"]]:
    if delta.gram is not None:
        return covariance.whitened_gram_spectra(delta.gram, pooled=True, only=only)
    heads = len(delta.numbers.energy)
    change = delta.flat.unflatten(1, (heads, -1)).transpose(0, 1)
    return covariance.whitened_spectra(change, pooled=True, only=only)


@dataclass(frozen=True)
class _Held:
    """What a subspace holds of a delta."""

    inside: Float64[Tensor, "item k"]
    """Energy in the leading 1 … k directions."""
    energy: Float64[Tensor, " item"]
    """Of the whole."""
    stored: tuple[Float64[Tensor, "item k"], Float64[Tensor, " item"]] | None
    """Both of storage noise; None where there is none."""

    def fractions(self, k: int, expected: float) -> list[Float64[Tensor, " item"]]:
        """As it is, and as if storage noise were what is expected."""
        fraction = self.inside[:, k - 1] / self.energy
        if self.stored is None:
            return [fraction]
        inside, energy = self.stored
        return [fraction, fraction + (energy * expected - inside[:, k - 1]) / self.energy]


def _held(delta: LiveDelta, directions: Mapping[str, Tensor], mean: Tensor | None) -> dict[str, list[_Held]]:
    """By each basis as it is; then by what it and the delta are without the mean input."""
    total = delta.numbers.energy
    noise = delta.numbers.rounding.nan_to_num() * total
    rows = noise.unsqueeze(-1) * delta.numbers.noise_rows if bool((noise > 0).any()) else None

    def with_pooled(*sums: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat([x, x.sum(0, keepdim=True)]) if len(total) > 1 else x for x in sums)

    def held(basis: Tensor, energy: Tensor, kept: Tensor) -> _Held:
        inside, whole = with_pooled(delta.energies(basis).cumsum(-1), energy)
        if rows is None:
            return _Held(inside, whole, None)
        within, noisy = with_pooled(rows @ basis.to(rows).square().cumsum(-1), rows @ kept)
        return _Held(inside, whole, (within, noisy))

    found = {
        name: [held(basis, total, torch.ones(len(basis), dtype=torch.float64))] for name, basis in directions.items()
    }
    if mean is not None:
        μ = mean.cpu()
        rest, kept = total - delta.energies(μ.unsqueeze(-1))[:, 0], 1 - μ.square()
        for name, basis in directions.items():
            freed = basis.cpu() - torch.outer(μ, μ @ basis.to(μ))
            found[name].append(held(freed, rest, kept))
    return found


def _nothing(delta: AnyDelta, ranks: Sequence[int]) -> Tails:
    heads = len(delta.numbers.energy)
    return torch.full((2, heads + (heads > 1), len(ranks)), torch.nan, dtype=torch.float64)


def _fold(p: Float64[Tensor, "side _told"], trial: _Trial, ranks: Sequence[int], tails: Tensor) -> None:
    """Put the larger of what was known at a rank and what is told now into `tails`."""
    at = ranks.index(trial.rank)
    known = tails[:, trial.items, at]
    tails[:, trial.items, at] = reduce(torch.fmax, p.split(known.shape[1], 1), known)


def _below(tails: Mapping[str, Tails]) -> Wanted:
    """What could be found below, by subspace: nothing of a layer whose own p is larger than the level, nor an item
    whose p is."""
    return {name: known[1] <= SIGNIFICANT for name, known in tails.items() if _some_below(known)}


def _some_below(tails: Tails) -> bool:
    """Whether the hierarchy could call something below: never where the layer's own p is larger than the level."""
    p = tails[1].mT.numpy()
    layer_p = of_layers(p, np.full(len(p), np.nan)) if p.shape[1] == 1 else of_layers(p[:, :-1], p[:, -1])
    return bool((layer_p <= SIGNIFICANT).any())
