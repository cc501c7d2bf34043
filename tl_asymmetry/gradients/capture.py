"""One forward and one backward pass for each batch: inputs and gradients become second moments, and are gone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.geometry.memory import return_freed_memory
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.precision import exact_products, product_dtype
from tl_asymmetry.geometry.side_moments import HeadMoments, SketchedMoments, sketch_matrix
from tl_asymmetry.models.backward import Outer, outer_products
from tl_asymmetry.models.capture import group_numbers
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import MATRICES, kind_of
from tl_asymmetry.training.batches import Batch, PreferenceBatch, TokenBatch
from tl_asymmetry.training.objectives import Objective

Moments = StreamingMoments | HeadMoments | SketchedMoments
Input = tuple[str, int]
"""A point at which inputs of matrices are seen, and a layer."""
Part = tuple[int, str]
"""A group of sequences and the name of a forward pass ("" where passes are not told apart)."""

INPUT_AXIS = {kind.point: kind.input_axis for kind in MATRICES.values()}
"""On which axis the inputs at a point lie."""


@dataclass
class PartMoments:
    """Moments of one group of sequences in one kind of pass."""

    inputs: dict[Input, Moments] = field(default_factory=dict)
    """Of a, by point and layer, over the tokens at which any matrix that reads there has a gradient."""
    gradients: dict[Outer, Moments] = field(default_factory=dict)
    """Of δ, by layer and matrix, over the tokens at which it is not zero."""
    weighted: dict[Outer, StreamingMoments] = field(default_factory=dict)
    """Of ‖δ‖ a, of read matrices; taken over into a total when the group is finished."""


@dataclass(frozen=True)
class Captured:
    """All that is left of the inputs and gradients."""

    parts: dict[Part, PartMoments]
    """Moments by group and pass; on CPU."""
    passes: tuple[str, ...]
    """Names of the passes that are told apart, in their order; empty if none are."""
    squared_norms: dict[Outer, Tensor]
    """‖Σ_t a_t δ_tᵀ‖² `[heads]`, `[1]` without heads; float64 on CPU. Estimated from the sketch where a side lies on a
    sketched axis."""
    products: dict[Outer, Tensor]
    """Σ_t ‖a_t‖² ‖δ_t‖², of the same shape."""
    permuted: dict[Outer, Tensor]
    """Σ_t a_t δ_π(t)ᵀ of read matrices, `[draw, heads, d_model, other]` on CPU, π a permutation of the tokens of each
    sequence; `other` is sketched where full moments of the d_mlp axis were not asked for."""
    weighted: dict[Outer, StreamingMoments]
    """Of ‖δ_t‖ a_t of read matrices, all heads' δ together, over all groups and passes; on CPU."""
    losses: list[float]
    """The objective's value for each batch."""
    terms: int
    """Terms of all batches together."""


def capture_gradients(
    view: ModelView,
    objective: Objective[Any],
    batches: Sequence[Batch],
    matrices: Sequence[str],
    *,
    groups: int,
    halves: bool,
    full_mlp: bool,
    permutations: int,
    seed: int,
    progress: bool,
) -> Captured:
    """Run every batch forward and backward and reduce both sides of every gradient as they pass.

    What is differentiated is the loss times its number of terms: the sum over tokens, pairs or sequences, whose
    gradients do not depend on how an additive objective's data are cut into batches.

    Raises:
        ValueError: a loss or gradient that is not finite, naming the batch.
    """
    sites = [(layer, matrix) for layer in range(view.n_layers) for matrix in matrices]
    collector = _Collector(view, matrices, full_mlp=full_mlp, permutations=permutations, seed=seed)
    segments = _segments(batches, groups)
    lowest = [min(group for group, _ in segment) for segment in segments]
    still_open = [*accumulate(reversed(lowest), min)][::-1] + [groups]
    losses, terms, first_row = [], 0, 0
    bar = tqdm(total=sum(map(len, batches)), desc="gradients", unit="seq", disable=not progress)
    with bar, view.evaluating():
        for number, batch in enumerate(batches):
            collector.begin(segments[number], first_row, objective.passes if halves else None)
            with outer_products(view, sites, collector.read) as backward:
                loss = objective(view, batch.to(view.device))
                value = float(loss.detach())
                if not -torch.inf < value < torch.inf:
                    raise ValueError(
                        f"expected a finite loss, got {value} for batch {number}; pass data without that batch, or a "
                        "model in a wider dtype"
                    )
                count = objective.count(batch)
                backward.run(loss * count)
                del loss  # and with it the graph
            collector.end(number)
            losses.append(value)
            terms += count
            first_row += len(batch)
            bar.update(len(batch))
            # A finished group leaves the device: only one group's moments are ever held there.
            collector.settle(before=still_open[number + 1])
    collector.settle(before=groups)
    return_freed_memory()
    return collector.captured(tuple(dict.fromkeys(objective.passes)) if halves else (), losses, terms)


class _Collector:
    """Takes a and δ of one batch after the other; what `outer_products` reads into."""

    def __init__(
        self, view: ModelView, matrices: Sequence[str], *, full_mlp: bool, permutations: int, seed: int
    ) -> None:
        sketched = not full_mlp and view.d_mlp is not None
        self._test = sketch_matrix(view.d_mlp or 0, seed).to(view.device) if sketched else None
        self._readers = {point: sum(kind_of(m).point == point for m in matrices) for point in INPUT_AXIS}
        self._parts: dict[Part, PartMoments] = {}
        self._cross: dict[Outer, Tensor] = {}
        self._products: dict[Outer, Tensor] = {}
        self._permuted: dict[Outer, Tensor] = {}
        self._weighted: dict[Outer, StreamingMoments] = {}
        self._begun_before: dict[tuple[str, Outer | Input], StreamingMoments] = {}
        self._permutations, self._seed = permutations, seed
        # Σ_t δ_t = 0 over every sequence then: no δ is independent of the others, and ‖δ_t‖² is no weight.
        self._keys_cancel = view.key_shift_invariant
        self._settled = 0

    def begin(self, segments: Sequence[tuple[int, Tensor]], first_row: int, names: Sequence[str] | None) -> None:
        """Announce a batch: which of its rows belong to which group, and what its passes are called."""
        self._segments, self._first_row, self._names = segments, first_row, names
        self._waiting: dict[tuple[int, Input], tuple[Tensor, Tensor, int]] = {}
        self._keys: dict[int, Tensor] = {}

    def read(self, index: int, site: Outer, a: Tensor, δ: Tensor) -> None:
        """Reduce one batch of one matrix."""
        layer, matrix = site
        a, δ = a.to(product_dtype(a)), δ.to(product_dtype(δ))
        counted = (δ != 0).flatten(2).any(-1)
        narrow = self._narrowed(δ, kind_of(matrix).output_axis)
        for group, rows in self._segments:
            held = self._part(group, index).gradients
            if site not in held:
                held[site] = self._begun("gradient", site, kind_of(matrix).output_axis, δ)
            _update(held[site], δ[rows], counted[rows], narrow[rows])
        if kind_of(matrix).reads and not (matrix == "W_K" and self._keys_cancel):
            sized = a * δ.flatten(2).norm(dim=-1, keepdim=True)
            for group, rows in self._segments:
                weighted = self._part(group, index).weighted
                if site not in weighted:
                    weighted[site] = self._begun("weighted", site, "residual", a)  # type: ignore[assignment]
                weighted[site].update(sized[rows], counted[rows])
        narrow_a = self._narrowed(a, INPUT_AXIS[kind_of(matrix).point])
        self._multiply(site, index, a, δ, narrow_a, narrow, counted)
        self._wait(index, (kind_of(matrix).point, layer), a, counted)

    def end(self, number: int) -> None:
        """Close a batch: take the inputs of which not every reader had a gradient, and see that all was finite."""
        for (index, site), (a, counted, _) in self._waiting.items():
            self._take_input(index, site, a, counted)
        self._waiting.clear()
        if self._products and not bool(torch.stack([p.sum() for p in self._products.values()]).isfinite().all()):
            raise ValueError(
                f"expected finite gradients, got NaN or infinity for batch {number}; pass data without that batch, or "
                "a model in a wider dtype"
            )

    def settle(self, *, before: int) -> None:
        """Bring the moments of finished groups to the CPU."""
        for (group, _), part in self._parts.items():
            if self._settled <= group < before:
                part.inputs = {key: moments.cpu() for key, moments in part.inputs.items()}
                part.gradients = {key: moments.cpu() for key, moments in part.gradients.items()}
                for site, moments in part.weighted.items():
                    self._weighted.setdefault(site, StreamingMoments(moments.d)).merge(moments.cpu())
                part.weighted.clear()
        self._settled = max(before, self._settled)

    def captured(self, passes: tuple[str, ...], losses: list[float], terms: int) -> Captured:
        """What is left of it all."""
        columns = {site: self._columns(site[1]) for site in self._cross}
        return Captured(
            parts=self._parts,
            passes=passes,
            squared_norms={
                site: cross.double().square().sum((-2, -1)).cpu() / columns[site] for site, cross in self._cross.items()
            },
            products={site: products.cpu() for site, products in self._products.items()},
            permuted={site: drawn.cpu() for site, drawn in self._permuted.items()},
            weighted=self._weighted,
            losses=losses,
            terms=terms,
        )

    # -- moments -------------------------------------------------------------------------------------------------

    def _part(self, group: int, index: int) -> PartMoments:
        name = "" if self._names is None else self._names[index]
        return self._parts.setdefault((group, name), PartMoments())

    def _begun(self, what: str, site: Outer | Input, axis: str, x: Tensor) -> Moments:
        """Moments without rows; of one thing in all groups about one point, so that they are added up as they are."""
        if axis == "head":
            return HeadMoments(x.shape[-2], x.shape[-1])
        if axis == "mlp" and self._test is not None:
            return SketchedMoments(self._test)
        earlier = self._begun_before.get((what, site))
        moments = StreamingMoments(x.shape[-1]) if earlier is None else earlier.beside()
        self._begun_before[what, site] = moments if earlier is None else earlier.beside()
        return moments

    def _wait(self, index: int, site: Input, a: Tensor, counted: Tensor) -> None:
        """Take an input once the gradients of all matrices that read it are there, with the tokens of any of them."""
        _, union, left = self._waiting.pop((index, site), (a, counted, self._readers[site[0]]))
        if left > 1:
            self._waiting[index, site] = (a, union | counted, left - 1)
        else:
            self._take_input(index, site, a, union | counted)

    def _take_input(self, index: int, site: Input, a: Tensor, counted: Tensor) -> None:
        axis = INPUT_AXIS[site[0]]
        narrow = self._narrowed(a, axis)
        for group, rows in self._segments:
            held = self._part(group, index).inputs
            if site not in held:
                held[site] = self._begun("input", site, axis, a)
            _update(held[site], a[rows], counted[rows], narrow[rows])

    # -- products of the two sides -------------------------------------------------------------------------------

    def _narrowed(self, x: Tensor, axis: str) -> Tensor:
        """`x` times the test matrix on a sketched axis, else `x` itself."""
        if axis != "mlp" or self._test is None:
            return x
        with exact_products(x.device):
            return x @ self._test.to(x)

    def _columns(self, matrix: str) -> int:
        """By how much the squared norm of a sketched cross moment is too large."""
        axes = (kind_of(matrix).output_axis, INPUT_AXIS[kind_of(matrix).point])
        return self._test.shape[1] if self._test is not None and "mlp" in axes else 1

    def _multiply(
        self, site: Outer, index: int, a: Tensor, δ: Tensor, narrow_a: Tensor, narrow: Tensor, counted: Tensor
    ) -> None:
        product = _product(narrow_a, narrow)
        sizes = _squares(a) * _squares(δ)
        self._add(self._cross, site, product)
        self._add(self._products, site, sizes.sum((0, 1), dtype=torch.float64).reshape(-1))
        if self._permutations and kind_of(site[1]).reads:
            orders = self._orders(index, counted)
            self._add(self._permuted, site, torch.stack([_product(a, _reordered(narrow, order)) for order in orders]))

    def _orders(self, index: int, counted: Tensor) -> Tensor:
        """For each draw the position whose δ a position gets, `[draw, batch, pos]`: a permutation of the counted ones.

        The random keys belong to a sequence's place in the data and to the pass, not to the batch it comes in.
        """
        if index not in self._keys:
            width = counted.shape[1]
            rows = [
                torch.rand(width, self._permutations, dtype=torch.float64, generator=_generator(self._seed, row, index))
                for row in range(self._first_row, self._first_row + len(counted))
            ]
            self._keys[index] = torch.stack(rows).permute(2, 0, 1).to(counted.device)
        # Counted positions first, once in their own order and once in that of the keys.
        late = (~counted).double() * 2
        place = late.argsort(dim=-1, stable=True).expand(self._permutations, -1, -1)
        drawn = (self._keys[index] + late).argsort(dim=-1, stable=True)
        drawn = torch.where(counted.gather(-1, place[0]), drawn, place)
        return torch.empty_like(drawn).scatter_(-1, place, drawn)

    def _add(self, sums: dict[Outer, Tensor], site: Outer, value: Tensor) -> None:
        if site in sums:
            sums[site] += value
        else:
            sums[site] = value


def _update(moments: Moments, x: Tensor, counted: Tensor, narrow: Tensor) -> None:
    if isinstance(moments, SketchedMoments):
        moments.update(x, counted, seen=narrow)
    else:
        moments.update(x, counted)


def _product(a: Tensor, δ: Tensor) -> Tensor:
    """Σ_t a_t δ_tᵀ for each head, `[heads, rows, columns]`; one head where neither side has any."""
    if a.ndim == 3 and δ.ndim == 4:  # a is shared: one product for all heads
        return _product(a, δ.flatten(2))[0].unflatten(1, δ.shape[2:]).transpose(0, 1)
    if a.ndim == 4:
        return _product(a.flatten(2), δ)[0].unflatten(0, a.shape[2:])
    with exact_products(a.device):
        return (a.flatten(0, 1).mT @ δ.flatten(0, 1)).unsqueeze(0)


def _squares(x: Tensor) -> Tensor:
    """‖x_t‖² `[batch, pos, heads]`, one head where there is none."""
    squares = x.square().sum(-1)
    return squares if x.ndim == 4 else squares.unsqueeze(-1)


def _reordered(δ: Tensor, order: Tensor) -> Tensor:
    index = order.reshape(*order.shape, *([1] * (δ.ndim - 2))).expand(δ.shape)
    return δ.gather(1, index)


def _generator(seed: int, row: int, index: int) -> torch.Generator:
    # hashed: torch's generator listens to the lowest 32 bits of its seed only
    digest = hashlib.sha256(f"{seed}:{row}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def _segments(batches: Sequence[Batch], groups: int) -> list[list[tuple[int, Tensor]]]:
    """For each batch which of its rows belong to which group: groups of whole sequences, balanced by token.

    The groups are made over all rows, so they do not depend on how the rows are cut into batches.
    """
    group_of = group_numbers(rows_of(batches), groups)
    segments, row = [], 0
    for batch in batches:
        mine = torch.tensor(group_of[row : row + len(batch)])
        row += len(batch)
        segments.append([(int(g), (mine == g).nonzero().flatten()) for g in mine.unique()])
    return segments


def rows_of(batches: Sequence[Batch]) -> list[Tensor]:
    """The token ids of every row, in order; of a pair both halves'."""

    def of(batch: TokenBatch) -> list[Tensor]:
        return [tokens[:n].cpu() for tokens, n in zip(batch.tokens, batch.lengths.tolist(), strict=True)]

    found: list[Tensor] = []
    for batch in batches:
        if isinstance(batch, PreferenceBatch):
            found += map(torch.cat, zip(of(batch.chosen), of(batch.rejected), strict=True))
        else:
            found += of(batch)
    return found
