"""One layer's bases made once and held: what a sweep over checkpoints compares all of them with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.geometry.matched import LawAtRank, MatchedCovariance
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.bases import REFERENCES, LayerBases, References, crossed_replicates
from tl_asymmetry.pair.plan import Plan


class HeldBases(LayerBases):
    """The bases of one layer as tensors: no moments behind them, cut after the last direction that is read.

    Args:
        layer: which layer.
        tensors: what `hold` made.
        optimizer: whose references stand among them.
    """

    def __init__(self, layer: int, tensors: Mapping[str, Tensor], *, optimizer: str) -> None:
        self.layer = layer
        self.optimizer = optimizer
        self.tensors = dict(tensors)
        self._subspaces: dict[str, Subspace] = {}
        self._whitening: dict[str, MatchedCovariance] = {}
        self._laws: dict[tuple[int, str, tuple[int, ...]], list[dict[int, LawAtRank]]] = {}

    def is_captured(self, name: str) -> bool:
        """Whether there are replicates of it."""
        return f"{name}/replicates" in self.tensors

    def subspace(self, name: str) -> Subspace:
        """The leading directions, one more than the largest rank where there is one, so that its eigengap shows."""
        if name not in self._subspaces:
            basis, eigenvalues = self.tensors[f"{name}/basis"], self.tensors.get(f"{name}/eigenvalues")
            self._subspaces[name] = Subspace(basis, eigenvalues, name)
        return self._subspaces[name]

    def replicates(self, name: str, ranks: Sequence[int]) -> Iterator[Float[Tensor, "d_model k"]]:
        """The leading directions with one group of sequences left out, for each group."""
        for Q in self.tensors[f"{name}/replicates"]:
            yield Q[:, : max(ranks)]

    @property
    def groups(self) -> int:
        """None are left: references were cross-fitted before they were held."""
        return 0

    def cross(self, matrices: Iterable[str], name: str, group: int | None, basis: Float[Tensor, "d k"]) -> None:
        """Nothing is left to do."""

    def references(self, matrix: str, name: str, k: int, *, columns: int) -> References:
        """As `LayerBases.references`."""
        chosen, *rows = self.tensors[f"{name}/references/{matrix}"][:, :k]
        replicates = self.tensors.get(f"{name}/reference_replicates/{matrix}")
        return References(chosen, dict(zip(REFERENCES, rows, strict=True)), replicates)

    def weighted(self, matrix: str, head: int | None = None) -> None:
        """Nothing: gradients are made of each checkpoint, what read rows are held against comes from one model."""

    def matched(self, matrix: str, *, columns: int, head: int | None = None) -> MatchedCovariance | None:
        """As `LayerBases.matched`."""
        if matrix not in self._whitening and f"covariance/{matrix}" in self.tensors:
            C, mean = (self.tensors[f"{part}/{matrix}"] for part in ("covariance", "mean"))
            self._whitening[matrix] = MatchedCovariance.of(C, mean)
        return self._whitening.get(matrix)

    def adapter(
        self, matrix: str, adapter: Float[Tensor, "d r"], *, optimizer: str = "", head: int | None = None
    ) -> None:
        """None: an adapter's own reference needs its input's second moment, which is not held."""
        return


def hold(bases: LayerBases, plan: Plan, columns: Mapping[str, int], *, intervals: bool) -> HeldBases:
    """All that a plan will ask of one layer's bases.

    Args:
        bases: with the moments behind them.
        plan: which subspaces, for which matrices, to which rank.
        columns: of each whole matrix.
        intervals: hold replicates as well.
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
        reading = [matrix for matrix in plan.matrices if kind_of(matrix).reads and name in plan.targets[matrix]]
        if intervals:
            replicates = list(crossed_replicates(bases, reading, name, sorted({min(k, top) for k in plan.ranks})))
            if bases.is_captured(name):
                tensors[f"{name}/replicates"] = torch.stack(replicates)
        for matrix in reading:
            found = bases.references(matrix, name, top, columns=columns[matrix])
            rows = [found.chosen, *(found.expected[null] for null in REFERENCES)]
            tensors[f"{name}/references/{matrix}"] = torch.stack(rows)
            if found.replicates is not None:
                tensors[f"{name}/reference_replicates/{matrix}"] = found.replicates
    for matrix in plan.matrices:
        if kind_of(matrix).reads and (moments := bases.covariance(matrix, columns=columns[matrix])) is not None:
            tensors[f"covariance/{matrix}"], tensors[f"mean/{matrix}"] = moments
    return HeldBases(bases.layer, tensors, optimizer=bases.optimizer)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
