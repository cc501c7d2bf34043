"""The ordered bases that one layer's deltas are held against, and their delete-one-group replicates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.fraction import gram_energy
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.subspace import Subspace, leading_directions, principal_subspace
from tl_asymmetry.models.capture import Site, merged

# Replicates are solved in float32, at half the time, where that time counts: in models at least this wide …
_FLOAT32_WIDTH = 512
# … and where it does no harm. Above this ratio of the largest eigenvalue to the smallest one in use, float32 rounding
# (ε λ_1) would no longer be small beside the sampling error (λ_k / √tokens) that a replicate is there to show:
# intervals were 0.07 % off at 1e3, 4 % at 1e4.
_FLOAT32_RANGE = 3e3
_NOTHING_LEFT = 1e-6


class LayerBases:
    """The bases of one layer, each made when it is first asked for.

    Args:
        layer: which layer.
        groups: captured moments per group of sequences.
        given: subspaces that do not come from activations, by name, one for each layer.
        centered: principal directions of the covariance instead of the uncentred second moment.
        exact: float64 in replicates too (for float64 models, whose tables agree to 1e-10).
    """

    def __init__(
        self,
        layer: int,
        groups: Sequence[Mapping[Site, StreamingMoments]],
        given: Mapping[str, Sequence[Subspace]],
        *,
        centered: bool,
        exact: bool,
    ) -> None:
        self.layer = layer
        self._groups = groups
        self._given = given
        self._centered = centered
        self._exact = exact
        self._totals: dict[str, StreamingMoments] = {}
        self._subspaces: dict[str, Subspace] = {}
        self._references: dict[tuple[str, str, bool], Tensor] = {}

    def is_captured(self, name: str) -> bool:
        """Whether the subspace comes from activations, so that other texts would have given another one."""
        return name not in self._given

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

    def replicates(self, name: str, k: int) -> Iterator[Float[Tensor, "d_model k"]]:
        """The top k directions with one group of sequences left out, for each group."""
        eigenvalues = self.subspace(name).eigenvalues
        narrow = (
            not self._exact
            and eigenvalues is not None
            and len(eigenvalues) >= _FLOAT32_WIDTH
            and bool(eigenvalues[0] < _FLOAT32_RANGE * eigenvalues[k - 1])
        )
        everything = self.total(name)
        n, mean, moment = everything.count, everything.mean, everything.second_moment
        sums = n * moment
        for left_out in (group[name, self.layer] for group in self._groups):
            m = left_out.count
            rest = moment if m == 0 else torch.sub(sums, left_out.second_moment, alpha=m).div_(n - m)
            if self._centered:
                rest_mean = mean if m == 0 else (n * mean - m * left_out.mean) / (n - m)
                rest = rest - torch.outer(rest_mean, rest_mean)
            yield leading_directions(rest.float() if narrow else rest, k)

    def reference(self, point: str, name: str, k: int, *, within_sequences: bool) -> Float64[Tensor, " k"]:
        """tr(QᵀΣQ)/tr Σ for the leading 1 … k directions Q of a basis, Σ the uncentred second moment of an input.

        Args:
            point: hook point of that input.
            name: the subspace at hand.
            k: how far to go.
            within_sequences: take Σ about each sequence's mean instead: all W_K sees where softmax removes the mean.
        """
        key = point, name, within_sequences
        if key not in self._references:  # W_Q and W_V ask for the same one
            moments = self.total(point)
            Σ = moments.within_covariance if within_sequences else moments.second_moment
            # With one counted token in each sequence nothing varies within them, and what is left is rounding.
            if within_sequences and Σ.trace() <= _NOTHING_LEFT * moments.second_moment.trace():
                Σ = torch.full_like(Σ, torch.nan)
            self._references[key] = gram_energy(Σ, self.subspace(name).basis[:, :k]).cumsum(0) / Σ.trace()
        return self._references[key]
