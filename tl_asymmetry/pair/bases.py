"""The ordered bases that one layer's deltas are held against, and their delete-one-group replicates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.matched import LawAtRank, MatchedCovariance, laws_at
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.nearby import nearby_directions, rounded_directions, worth_iterating
from tl_asymmetry.geometry.references import (
    AdapterCovariance,
    CrossFit,
    added_up,
    correlation,
    expected_fraction,
    input_covariance,
    inverse_size,
)
from tl_asymmetry.geometry.subspace import Subspace, leading_directions, principal_subspace
from tl_asymmetry.models.capture import Site, first_of, means_of, merged
from tl_asymmetry.names import KEYS_AND_VALUES, ROUTING, expert_input, kind_of
from tl_asymmetry.results.nulls import OF_INPUTS
from tl_asymmetry.settings import GradientMoments, WeightedInputs

_NOTHING_LEFT = 1e-6


@dataclass(frozen=True)
class Reading:
    """Which tokens' inputs a matrix learns from."""

    point: str
    """Where they are seen."""
    positions: Literal["counted", "all", "within"]
    """Those that count; all; all, about each sequence's mean (keys, where softmax ignores what they share)."""

    @classmethod
    def of(cls, matrix: str, *, softmax_centres_keys: bool) -> Reading:
        """Of a read matrix. Keys and values have a gradient at the first position too, whatever the subspaces do."""
        if matrix == "W_K" and softmax_centres_keys:
            return cls(kind_of(matrix).point, "within")
        return cls(kind_of(matrix).point, "all" if matrix in KEYS_AND_VALUES else "counted")


@dataclass(frozen=True)
class Routed:
    """What a layer's router gave its experts, over the tokens that count."""

    tokens: Float64[Tensor, " expert"]
    """Tokens that each was given."""
    weight: Float64[Tensor, " expert"]
    """Mean of the weights that its outputs were multiplied by, over these tokens; NaN without any."""


REFERENCES = ("sgd", "adam", *OF_INPUTS, "muon")
"""Nulls that the input's covariance gives, in the order in which they are made."""


@dataclass(frozen=True)
class References:
    """What a delta of one input holds by chance in the leading 1 … k directions of one subspace."""

    chosen: Float64[Tensor, " k"]
    """Of the chosen optimiser."""
    expected: Mapping[str, Float64[Tensor, " k"]]
    """By null, see `REFERENCES`."""
    replicates: Float64[Tensor, "group k"] | None
    """Of the chosen optimiser's, with one group of sequences left out; None without groups."""


class LayerBases:
    """The bases of one layer, each made when it is first asked for.

    Args:
        layer: which layer.
        groups: captured moments per group of sequences.
        given: subspaces that do not come from activations, by name, one for each layer.
        centered: principal directions of the covariance instead of the uncentred second moment.
        exact: float64 in replicates too (for float64 models, whose tables agree to 1e-10).
        softmax_centres_keys: whether W_K's gradient sees its input about each sequence's mean.
        optimizer: whose reference is made with replicates, and tested.
        gradient: where it weighs the inputs of read matrices, what is tested is weighted so.
    """

    def __init__(
        self,
        layer: int,
        groups: Sequence[Mapping[Site, StreamingMoments]],
        given: Mapping[str, Sequence[Subspace]],
        *,
        centered: bool,
        exact: bool,
        softmax_centres_keys: bool,
        optimizer: str,
        gradient: GradientMoments | None = None,
    ) -> None:
        self.layer = layer
        self._groups = groups
        self._given = given
        self._centered = centered
        self._exact = exact
        self._totals: dict[str, StreamingMoments] = {}
        self._subspaces: dict[str, Subspace] = {}
        self.softmax_centres_keys = softmax_centres_keys
        self.optimizer = optimizer
        self._fits: dict[tuple[Reading, str], CrossFit] = {}
        self._inputs: dict[Reading, InputSums] = {}
        self._moments: dict[Reading, Tensor] = {}
        self._references: dict[tuple[Reading, str, int, int], References] = {}
        self._muon: dict[tuple[Reading, int], Tensor] = {}
        self._matched: dict[tuple[Reading, int, str, int | None], MatchedCovariance | None] = {}
        self._laws: dict[tuple[int, str, tuple[int, ...]], list[dict[int, LawAtRank]]] = {}
        self._gradient = gradient
        self._weighted: dict[tuple[str, int | None], tuple[Tensor, Tensor] | None] = {}

    def is_captured(self, name: str) -> bool:
        """Whether the subspace comes from activations, so that other texts would have given another one."""
        return name not in self._given

    def has(self, name: str) -> bool:
        """Whether there is a subspace of that name: a model that predicts nothing has no prediction directions."""
        return name in self._given or any((name, self.layer) in group for group in self._groups)

    def subspace(self, name: str) -> Subspace:
        """The ordered basis of that name, float64 on CPU."""
        if name in self._given:
            return self._given[name][self.layer]
        if name not in self._subspaces:
            self._subspaces[name] = principal_subspace(self.total(name), centered=self._centered, name=name)
        return self._subspaces[name]

    def total(self, point: str) -> StreamingMoments:
        """Moments at a hook point over all groups."""
        if point not in self._totals:
            parts = [group[point, self.layer] for group in self._groups]
            self._totals[point] = parts[0] if len(parts) == 1 else merged(parts)
        return self._totals[point]

    def routed(self) -> Routed | None:
        """What the layer's router gave each expert; None without a mixture whose routing was seen."""
        if (ROUTING, self.layer) not in self._groups[0]:
            return None
        seen = self.total(ROUTING)
        tokens, weights = (seen.count * seen.mean).chunk(2)
        tokens = tokens.round()
        return Routed(tokens, weights / tokens.masked_fill(tokens == 0, torch.nan))

    def of_expert(self, expert: int, point: str) -> LayerBases | None:
        """The bases of an expert's own inputs, as if they were all that passes a point; None where it has none."""
        name = expert_input(expert)
        if not any((name, self.layer) in group and group[name, self.layer].count for group in self._groups):
            return None
        groups = [{(point, self.layer): group[name, self.layer]} for group in self._groups]
        return LayerBases(
            self.layer, groups, {}, centered=self._centered, exact=self._exact,
            softmax_centres_keys=self.softmax_centres_keys, optimizer=self.optimizer,
        )  # fmt: skip

    def left_without_any_group(self, point: str) -> int:
        """The fewest tokens that are left at a point when one group of sequences is left out."""
        counts = [group[point, self.layer].count for group in self._groups]
        return sum(counts) - max(counts)

    def replicates(self, name: str, ranks: Sequence[int]) -> Iterator[Float[Tensor, "d_model k"]]:
        """The leading directions with one group of sequences left out, for each group: as many as the largest rank.

        At the ranks their span is that of a full eigensolve, or certified to be close to it beside how far the group
        turns it.
        """
        whole, k = self.subspace(name), max(ranks)
        nearby = not self._exact and worth_iterating(whole.d, k)
        everything = self.total(name)
        n, mean, moment = everything.count, everything.mean, everything.second_moment
        sums = n * moment
        for left_out in (group[name, self.layer] for group in self._groups):
            m = left_out.count
            rest = moment if m == 0 else torch.sub(sums, left_out.second_moment, alpha=m).div_(n - m)
            if self._centered:
                rest_mean = mean if m == 0 else (n * mean - m * left_out.mean) / (n - m)
                rest = rest - torch.outer(rest_mean, rest_mean)
            found = nearby_directions(rest, whole, ranks) if nearby else None
            if found is None:
                nearby = False  # spectra of the others are as flat
                found = None if self._exact else rounded_directions(rest, whole, k)
            yield leading_directions(rest, k) if found is None else found

    def input_sums(self, reading: Reading) -> InputSums:
        """Σ a aᵀ of a matrix's input over each group of sequences; NaN where nothing varies within sequences."""
        if reading not in self._inputs:
            self._inputs[reading] = InputSums(self._groups, self.layer, reading)
        return self._inputs[reading]

    def input_moment(self, reading: Reading) -> Float64[Tensor, "d d"]:
        """Σ a aᵀ over all groups."""
        if reading not in self._moments:
            self._moments[reading] = added_up(self.input_sums(reading))
        return self._moments[reading]

    def input_mean(self, reading: Reading) -> Float64[Tensor, " d"]:
        """Mean input, up to its length; zero for inputs about their sequence's mean."""
        counted = self.total(reading.point)
        if reading.positions == "within":
            return torch.zeros_like(counted.mean)
        total = counted.count * counted.mean
        first = first_of(reading.point)
        if reading.positions == "all" and (first, self.layer) in self._groups[0]:
            total = total + self.total(first).count * self.total(first).mean
        return total

    def reading(self, matrix: str) -> Reading:
        """Which tokens' inputs a read matrix learns from."""
        return Reading.of(matrix, softmax_centres_keys=self.softmax_centres_keys)

    @property
    def groups(self) -> int:
        """Groups of sequences."""
        return len(self._groups)

    def cross(self, matrices: Iterable[str], name: str, group: int | None, basis: Float[Tensor, "d k"]) -> None:
        """Take in the directions fitted without one group, or (None) without any, for the references of read matrices;
        once for each input."""
        for reading in dict.fromkeys(self.reading(matrix) for matrix in matrices):
            key = reading, name
            if key not in self._fits:
                replicated = "adam" if self.optimizer == "adam" else "sgd"
                self._fits[key] = CrossFit(self.input_sums(reading), (replicated,), self.input_moment(reading))
            if group is None:
                self._fits[key].add_all(basis)
            else:
                self._fits[key].add(group, basis)

    def references(self, matrix: str, name: str, k: int, *, columns: int) -> References:
        """References of a matrix in the leading 1 … k directions, cross-fitted where `cross` was called for all groups.

        Those of `OF_INPUTS` and "muon" are in-sample, times what cross-fitting makes of "adam" and of "sgd".

        Args:
            matrix: a read matrix.
            name: the subspace at hand.
            k: how far to go.
            columns: of the whole matrix, which Muon's reference depends on.
        """
        reading = self.reading(matrix)
        key = reading, name, k, columns  # gate and in, keys and values may share one input
        if key not in self._references:
            self._references[key] = self._made_references(*key)
        return self._references[key]

    def _made_references(self, reading: Reading, name: str, k: int, columns: int) -> References:
        Q = self.subspace(name).basis[:, :k]
        Σ = self.input_moment(reading)
        if bool(Σ.isnan().any()):
            nothing = torch.full((k,), torch.nan, dtype=torch.float64)
            of_groups = nothing.expand(self.groups, -1) if (reading, name) in self._fits else None
            return References(nothing, dict.fromkeys(REFERENCES, nothing), of_groups)
        in_sample = {"sgd": expected_fraction(Σ, Q), "adam": expected_fraction(correlation(Σ), Q)}
        in_sample |= {null: expected_fraction(covariance(Σ), Q) for null, covariance in OF_INPUTS.items()}
        # With as many columns as rows Muon leaves nothing of Σ, nor of its sampling.
        flat = columns >= len(Σ)
        in_sample["muon"] = (
            torch.arange(1, k + 1, dtype=torch.float64) / len(Σ)
            if flat
            else expected_fraction(self._orthogonalized(reading, columns), Q)
        )
        fit = self._fits.get((reading, name))
        if fit is None:
            return References(in_sample[self.optimizer], in_sample, None)
        crossed = {null: fit.expected(null) for null in ("sgd", "adam")}
        crossed |= {null: in_sample[null] * crossed["adam"] / in_sample["adam"] for null in OF_INPUTS}
        crossed["muon"] = in_sample["muon"] * (1 if flat else crossed["sgd"] / in_sample["sgd"])
        if self.optimizer != "muon":
            return References(crossed[self.optimizer], crossed, fit.replicates(self.optimizer))
        sampled = (fit.replicates("sgd") / in_sample["sgd"]).pow(0 if flat else 1)
        return References(crossed["muon"], crossed, in_sample["muon"] * sampled)

    def _orthogonalized(self, reading: Reading, columns: int) -> Float64[Tensor, "d d"]:
        """Muon's left covariance: an eigensolve where there are fewer columns than rows, one for all subspaces."""
        if (reading, columns) not in self._muon:
            self._muon[reading, columns] = input_covariance(self.input_moment(reading), "muon", columns=columns)
        return self._muon[reading, columns]

    def weighted(
        self, matrix: str, head: int | None = None
    ) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, " d"]] | None:
        """Second moment and mean of a read matrix's inputs weighted by its gradients, or by one head's; None without
        such gradients."""
        if (matrix, head) not in self._weighted:
            given = self._gradient
            found = given.weighted_input(self.layer, matrix, head) if isinstance(given, WeightedInputs) else None
            if found is not None:
                device = self.input_moment(self.reading(matrix)).device
                found = found[0].to(device), found[1].to(device)
            self._weighted[matrix, head] = found
        return self._weighted[matrix, head]

    def own_heads(self, matrix: str, heads: int) -> range | None:
        """The heads of a read matrix where each has a reference of its own; None where they share one."""
        return range(heads) if heads > 1 and self.weighted(matrix, 0) is not None else None

    def learned(self, matrix: str, head: int | None = None) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, " d"]]:
        """Second moment and mean of what a read matrix, or a head, learns from, weighted where there are gradients."""
        reading = self.reading(matrix)
        return self.weighted(matrix, head) or (self.input_moment(reading), self.input_mean(reading))

    def covariance(
        self, matrix: str, *, columns: int, head: int | None = None
    ) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, " d"]] | None:
        """Left covariance of an update by chance and the mean input, scaled alike; None where none varies."""
        Σ, mean = self.learned(matrix, head)
        if bool(Σ.isnan().any()) or not bool(Σ.trace() > 0):
            return None
        if self.optimizer == "adam":
            mean = inverse_size(Σ.diagonal()) * mean
        if self.optimizer == "muon" and self.weighted(matrix) is None:
            return self._orthogonalized(self.reading(matrix), columns), mean
        return input_covariance(Σ, self.optimizer, columns=columns), mean

    def matched(self, matrix: str, *, columns: int, head: int | None = None) -> MatchedCovariance | None:
        """What a matrix's deltas, or a head's, are whitened with, by the chosen optimiser; None where its input does
        not vary."""
        own = "" if self.weighted(matrix) is None else matrix
        key = self.reading(matrix), columns if self.optimizer == "muon" else 0, own, head
        if key not in self._matched:
            found = self.covariance(matrix, columns=columns, head=head)
            self._matched[key] = None if found is None else MatchedCovariance.of(*found)
        return self._matched[key]

    def laws(self, covariance: MatchedCovariance, name: str, ranks: Sequence[int]) -> list[dict[int, LawAtRank]]:
        """Of fractions in a subspace at those ranks that it has: under a covariance of `matched`; then without the
        mean input. Made once for all deltas that share the covariance."""
        key = id(covariance), name, tuple(ranks)
        if key not in self._laws:
            self._laws[key] = laws_at(covariance, self.subspace(name).basis, self.existing(name, ranks))
        return self._laws[key]

    def existing(self, name: str, ranks: Sequence[int]) -> list[int]:
        """Those of some ranks that a subspace has, as a proper part of what it lies in."""
        whole = self.subspace(name)
        most = min(whole.existing, whole.d - 1)
        return [k for k in ranks if k <= most]

    def adapter(
        self, matrix: str, adapter: Float[Tensor, "d r"], *, optimizer: str = "", head: int | None = None
    ) -> AdapterCovariance | None:
        """The same for an adapter's change, in coordinates of what its A reads; under another optimizer if given."""
        Σ, mean = self.learned(matrix, head)
        if bool(Σ.isnan().any()):
            return None
        return AdapterCovariance.of(adapter, Σ, mean, optimizer or self.optimizer)


class InputSums(Sequence[Float64[Tensor, "d d"]]):
    """Σ a aᵀ of one input over each group of sequences; made when it is read, since those of all groups and inputs
    would be the larger part of what a layer holds. The last one is kept.

    Args:
        groups: captured moments per group of sequences.
        layer: which layer.
        reading: which input, and which of its tokens.
    """

    def __init__(self, groups: Sequence[Mapping[Site, StreamingMoments]], layer: int, reading: Reading) -> None:
        self._groups, self._layer, self._point = groups, layer, reading.point
        first, means = first_of(reading.point), means_of(reading.point)
        others = reading.positions != "counted" and (first, layer) in groups[0]
        self._added = (reading.point, first) if others else (reading.point,)
        self._means = means if reading.positions == "within" else None
        self._held: tuple[int, Tensor] | None = None
        # With one token in each sequence nothing varies within them, and what is left is rounding.
        self._varies = self._means is None or self._size(self._added) - self._size([means]) > (
            _NOTHING_LEFT * self._size(self._added)
        )

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, group: Any) -> Any:
        if self._held is None or self._held[0] != group:
            self._held = group, self._made(self._groups[group])
        return self._held[1]

    def _made(self, group: Mapping[Site, StreamingMoments]) -> Tensor:
        point, *more = self._added
        S = _sum(group, point, self._layer)
        for other in more:
            S += _sum(group, other, self._layer)
        if self._means is not None:
            S -= _sum(group, self._means, self._layer)
        return S if self._varies else torch.full_like(S, torch.nan)

    def _size(self, points: Sequence[str]) -> float:
        """Σ ‖x‖² over all groups."""
        there = [group[point, self._layer] for group in self._groups for point in points]
        return sum(moments.count * moments.d * moments.mean_square for moments in there if moments.count)


def crossed_replicates(
    bases: LayerBases, reading: Sequence[str], name: str, ranks: Sequence[int]
) -> Iterator[Float[Tensor, "d_model k"]]:
    """`LayerBases.replicates`, each also taken in for the references of the read matrices; none of a subspace that does
    not come from activations, whose directions are taken in as they are."""
    if not bases.is_captured(name):
        bases.cross(reading, name, None, bases.subspace(name).basis[:, : max(ranks)])
        return
    for group, Q in enumerate(bases.replicates(name, ranks)):
        bases.cross(reading, name, group, Q)
        yield Q


def _sum(group: Mapping[Site, StreamingMoments], point: str, layer: int) -> Tensor:
    """Σ x xᵀ, zero where there was no row."""
    moments = group[point, layer]
    if moments.count == 0:
        return torch.zeros(moments.d, moments.d, dtype=torch.float64)
    return moments.second_moment.mul_(moments.count)
