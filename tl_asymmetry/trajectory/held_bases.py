"""One layer's bases made once and held: what a sweep over checkpoints compares all of them with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.plan import Plan


class HeldBases(LayerBases):
    """The bases of one layer as tensors: no moments behind them, cut after the last direction that is read.

    Args:
        layer: which layer.
        tensors: what `hold` made.
    """

    def __init__(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        self.layer = layer
        self.tensors = dict(tensors)

    def is_captured(self, name: str) -> bool:
        """Whether there are replicates of it."""
        return f"{name}/replicates" in self.tensors

    def subspace(self, name: str) -> Subspace:
        """The leading directions, one more than the largest rank where there is one, so that its eigengap shows."""
        return Subspace(self.tensors[f"{name}/basis"], self.tensors.get(f"{name}/eigenvalues"), name)

    def replicates(self, name: str, k: int) -> Iterator[Float[Tensor, "d_model k"]]:
        """The top k directions with one group of sequences left out, for each group."""
        for Q in self.tensors[f"{name}/replicates"]:
            yield Q[:, :k]

    def reference(self, point: str, name: str, k: int, *, within_sequences: bool) -> Float64[Tensor, " k"]:
        """As `LayerBases.reference`."""
        return self.tensors[_reference(point, name, within_sequences)][:k]


def hold(bases: LayerBases, plan: Plan, *, intervals: bool, softmax_centres_keys: bool) -> HeldBases:
    """All that a plan will ask of one layer's bases.

    Args:
        bases: with the moments behind them.
        plan: which subspaces, for which matrices, to which rank.
        intervals: hold replicates as well.
        softmax_centres_keys: whether W_K's gradient sees its input about each sequence's mean.
    """
    tensors: dict[str, Tensor] = {}
    for name in plan.subspaces:
        whole = bases.subspace(name)
        top = min(whole.rank, max(plan.ranks))
        cut = whole if whole.rank <= top + 1 else whole.truncate(top + 1)
        # A copy, so that the rest can go; what was cut before may be shared by all layers. In the layout that a file
        # gives back: products of the same numbers in another one differ in their last bits.
        tensors[f"{name}/basis"] = cut.basis.contiguous() if cut is whole else _copy(cut.basis)
        if cut.eigenvalues is not None:
            tensors[f"{name}/eigenvalues"] = cut.eigenvalues.clone()
        if intervals and bases.is_captured(name):
            tensors[f"{name}/replicates"] = torch.stack(list(bases.replicates(name, top)))
        for matrix in plan.matrices:
            if kind_of(matrix).reads and name in plan.targets[matrix]:
                within = matrix == "W_K" and softmax_centres_keys
                key = _reference(kind_of(matrix).point, name, within)
                tensors[key] = bases.reference(kind_of(matrix).point, name, top, within_sequences=within)
    return HeldBases(bases.layer, tensors)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _reference(point: str, name: str, within_sequences: bool) -> str:
    return f"{name}/reference/{point}/{'within' if within_sequences else 'all'}"
