"""One forward and one backward pass for each batch: inputs and gradients become second moments, and are gone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
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
from tl_asymmetry.names import kind_of
from tl_asymmetry.training.batches import Batch, PreferenceBatch, TokenBatch
from tl_asymmetry.training.objectives import Objective

Moments = StreamingMoments | HeadMoments | SketchedMoments
Input = tuple[str, int]
"""A point at which inputs of matrices are seen, and a layer."""
Weighing = tuple[int, str, int | None]
"""A layer, a read matrix, and the head whose gradients weigh its inputs; None: all heads together."""
Part = tuple[int, str]
"""A group of sequences and the name of a forward pass ("" where passes are not told apart)."""


@dataclass(frozen=True)
class Measured:
    """How one matrix of one layer is measured."""

    point: str
    """Where its input is seen; of experts a name of their own, since each sees the tokens that are routed to it."""
    heads: int | None
    """Heads that it is split into."""
    experts: int | None
    """Experts that have one each."""


def measured_at(view: ModelView, layer: int, matrix: str) -> Measured:
    """How a matrix that a layer has is measured."""
    unit, point = view.unit(layer, matrix), kind_of(matrix).point
    count = len(view.weight(layer, matrix)) if unit else None
    return Measured(f"{matrix} of experts", None, count) if unit == "expert" else Measured(point, count, None)


@dataclass
class PartMoments:
    """Moments of one group of sequences in one kind of pass."""

    inputs: dict[Input, Moments] = field(default_factory=dict)
    """Of a, by point and layer, over the tokens at which any matrix that reads there has a gradient."""
    gradients: dict[Outer, Moments] = field(default_factory=dict)
    """Of δ, by layer and matrix, over the tokens at which it is not zero."""
    weighted: dict[Weighing, StreamingMoments] = field(default_factory=dict)
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
    sequence; `other` is sketched where full moments of wide axes were not asked for. None of experts."""
    weighted: dict[Weighing, StreamingMoments]
    """Of ‖δ_t‖ a_t of read matrices, all heads' δ together and, where asked for, each head's; over all groups and
    passes; on CPU."""
    routed: dict[Outer, dict[str, Tensor]]
    """Of each expert `[expert]`, float64 on CPU: "tokens" that it has a gradient at, and the sums over them of "inputs"
    ‖a_t‖² and "gradients" ‖δ_t‖²."""
    losses: list[float]
    """The objective's value for each batch."""
    terms: int
    """Terms of all batches together."""


def capture_gradients(
    view: ModelView,
    objective: Objective[Any],
    batches: Sequence[Batch],
    measured: Mapping[Outer, Measured],
    *,
    groups: int,
    halves: bool,
    full_mlp: bool,
    permutations: int,
    head_weights: bool,
    seed: int,
    progress: bool,
) -> Captured:
    """Run every batch forward and backward and reduce both sides of every gradient as they pass.

    What is differentiated is the loss times its number of terms: the sum over tokens, pairs or sequences, whose
    gradients do not depend on how an additive objective's data are cut into batches.

    Raises:
        ValueError: a loss or gradient that is not finite, naming the batch.
    """
    collector = _Collector(
        view, measured, full_mlp=full_mlp, permutations=permutations, head_weights=head_weights, seed=seed
    )
    segments = _segments(batches, groups)
    lowest = [min(group for group, _ in segment) for segment in segments]
    still_open = [*accumulate(reversed(lowest), min)][::-1] + [groups]
    losses, terms, first_row = [], 0, 0
    bar = tqdm(total=sum(map(len, batches)), desc="gradients", unit="seq", disable=not progress)
    with bar, view.evaluating():
        for number, batch in enumerate(batches):
            collector.begin(segments[number], first_row, objective.passes if halves else None)
            with outer_products(view, list(measured), collector.read, collector.read_expert) as backward:
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
        self,
        view: ModelView,
        measured: Mapping[Outer, Measured],
        *,
        full_mlp: bool,
        permutations: int,
        head_weights: bool,
        seed: int,
    ) -> None:
        self._measured, self._full, self._device = measured, full_mlp, view.device
        self._head_weights = head_weights
        self._tests: dict[int, Tensor] = {}
        self._readers = Counter((how.point, layer) for (layer, _), how in measured.items() if how.experts is None)
        self._routed: dict[Outer, dict[str, Tensor]] = {}
        self._experts: dict[Outer, Tensor] = {}
        self._parts: dict[Part, PartMoments] = {}
        self._cross: dict[Outer, Tensor] = {}
        self._products: dict[Outer, Tensor] = {}
        self._permuted: dict[Outer, Tensor] = {}
        self._weighted: dict[Weighing, StreamingMoments] = {}
        self._begun_before: dict[tuple[str, Outer | Input | Weighing], StreamingMoments] = {}
        self._permutations, self._seed = permutations, seed
        # Σ_t δ_t = 0 over every sequence then: no δ is independent of the others, and ‖δ_t‖² is no weight.
        self._keys_cancel = view.key_shift_invariant
        self._settled = 0

    def begin(self, segments: Sequence[tuple[int, Tensor]], first_row: int, names: Sequence[str] | None) -> None:
        """Announce a batch: which of its rows belong to which group, and what its passes are called."""
        self._segments, self._first_row, self._names = segments, first_row, names
        self._waiting: dict[tuple[int, Input], tuple[Tensor, Tensor, int, str]] = {}
        self._keys: dict[int, Tensor] = {}

    def read(self, index: int, site: Outer, a: Tensor, δ: Tensor) -> None:
        """Reduce one batch of one matrix."""
        layer, matrix = site
        a, δ = a.to(product_dtype(a)), δ.to(product_dtype(δ))
        counted = (δ != 0).flatten(2).any(-1)
        narrow = self._narrowed(δ, kind_of(matrix).output_axis)
        for group, rows in self._segments:
            held = self._part(group, index).gradients
            self._take(held, "gradient", site, kind_of(matrix).output_axis, δ[rows], counted[rows], narrow[rows])
        if kind_of(matrix).reads and not (matrix == "W_K" and self._keys_cancel):
            self._weigh(site, index, a, δ, counted)
        narrow_a = self._narrowed(a, kind_of(matrix).input_axis)
        self._multiply(site, index, a, δ, narrow_a, narrow, counted)
        self._wait(index, (kind_of(matrix).point, layer), a, counted, kind_of(matrix).input_axis)

    def read_expert(self, index: int, site: Outer, expert: int, a: Tensor, δ: Tensor, row: Tensor) -> None:
        """Reduce what one expert's matrix had of a batch: tokens `[token, …]`, and the batch's row of each."""
        (layer, matrix), count = site, self._measured[site].experts or 0
        a, δ = a.to(product_dtype(a)), δ.to(product_dtype(δ))
        counted = (δ != 0).any(-1)
        axes = kind_of(matrix).input_axis, kind_of(matrix).output_axis
        narrow_a, narrow = self._narrowed(a, axes[0]), self._narrowed(δ, axes[1])
        sized = a * δ.norm(dim=-1, keepdim=True)
        for group, rows in self._segments:
            mine = counted & torch.isin(row, rows.to(row.device))
            part = self._part(group, index)
            self._take(part.inputs, "input", (self._measured[site].point, layer), axes[0], a, mine, narrow_a)
            self._take(part.gradients, "gradient", site, axes[1], δ, mine, narrow)
            if kind_of(matrix).reads:
                self._take(part.weighted, "weighted", (layer, matrix, None), "residual", sized, mine, sized)
        squares = a.square().sum(-1, dtype=torch.float64), δ.square().sum(-1, dtype=torch.float64)
        sums = {
            "tokens": counted.sum(), "inputs": (squares[0] * counted).sum(), "gradients": squares[1].sum(),
            "products": (squares[0] * squares[1]).sum(),
        }  # fmt: skip
        held_sums = self._routed.setdefault(
            site, {name: torch.zeros(count, dtype=torch.float64, device=a.device) for name in sums}
        )
        for name, value in sums.items():
            held_sums[name][expert] += value
        product = _product(narrow_a.unsqueeze(0), narrow.unsqueeze(0))[0]
        if site not in self._experts:
            self._experts[site] = product.new_zeros(count, *product.shape)
        self._experts[site][expert] += product

    def end(self, number: int) -> None:
        """Close a batch: take the inputs of which not every reader had a gradient, and see that all was finite."""
        for (index, site), (a, counted, _, axis) in self._waiting.items():
            self._take_input(index, site, a, counted, axis)
        self._waiting.clear()
        products = [*self._products.values(), *(sums["products"] for sums in self._routed.values())]
        if products and not bool(torch.stack([p.sum() for p in products]).isfinite().all()):
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
                for weighing, moments in part.weighted.items():
                    self._weighted.setdefault(weighing, StreamingMoments(moments.d)).merge(moments.cpu())
                part.weighted.clear()
        self._settled = max(before, self._settled)

    def captured(self, passes: tuple[str, ...], losses: list[float], terms: int) -> Captured:
        """What is left of it all."""
        self._cross |= self._experts
        self._products |= {site: sums.pop("products") for site, sums in self._routed.items()}
        return Captured(
            parts=self._parts,
            passes=passes,
            squared_norms={
                site: cross.double().square().sum((-2, -1)).cpu() / self._columns(site[1], cross)
                for site, cross in self._cross.items()
            },
            products={site: products.cpu() for site, products in self._products.items()},
            permuted={site: drawn.cpu() for site, drawn in self._permuted.items()},
            weighted=self._weighted,
            routed={site: {name: sum_.cpu() for name, sum_ in sums.items()} for site, sums in self._routed.items()},
            losses=losses,
            terms=terms,
        )

    # -- moments -------------------------------------------------------------------------------------------------

    def _part(self, group: int, index: int) -> PartMoments:
        name = "" if self._names is None else self._names[index]
        return self._parts.setdefault((group, name), PartMoments())

    def _begun(self, what: str, site: Outer | Input | Weighing, axis: str, x: Tensor) -> Moments:
        """Moments without rows; of one thing in all groups about one point, so that they are added up as they are."""
        if axis == "head":
            return HeadMoments(x.shape[-2], x.shape[-1])
        if self._is_sketched(axis):
            return SketchedMoments(self._test(x.shape[-1]))
        earlier = self._begun_before.get((what, site))
        moments = StreamingMoments(x.shape[-1]) if earlier is None else earlier.beside()
        self._begun_before[what, site] = moments if earlier is None else earlier.beside()
        return moments

    def _wait(self, index: int, site: Input, a: Tensor, counted: Tensor, axis: str) -> None:
        """Take an input once the gradients of all matrices that read it are there, with the tokens of any of them."""
        _, union, left, _ = self._waiting.pop((index, site), (a, counted, self._readers[site], axis))
        if left > 1:
            self._waiting[index, site] = (a, union | counted, left - 1, axis)
        else:
            self._take_input(index, site, a, union | counted, axis)

    def _take_input(self, index: int, site: Input, a: Tensor, counted: Tensor, axis: str) -> None:
        narrow = self._narrowed(a, axis)
        for group, rows in self._segments:
            held = self._part(group, index).inputs
            self._take(held, "input", site, axis, a[rows], counted[rows], narrow[rows])

    def _weigh(self, site: Outer, index: int, a: Tensor, δ: Tensor, counted: Tensor) -> None:
        """Take inputs times the norms of their gradients: of all heads together, and of each where they are told apart.

        All count the same tokens, so that the heads' second moments add up to that of all.
        """
        sizes: dict[int | None, Tensor] = {None: δ.flatten(2).norm(dim=-1)}
        if δ.ndim == 4 and self._head_weights:
            sizes |= enumerate(δ.norm(dim=-1).unbind(-1))
        for head, size in sizes.items():
            sized = a * size.unsqueeze(-1)
            for group, rows in self._segments:
                weighted = self._part(group, index).weighted
                self._take(weighted, "weighted", (*site, head), "residual", sized[rows], counted[rows], sized[rows])

    def _take(
        self, held: dict[Any, Any], what: str, key: Any, axis: str, x: Tensor, counted: Tensor, narrow: Tensor
    ) -> None:
        if key not in held:
            held[key] = self._begun(what, key, axis, x)
        if isinstance(held[key], SketchedMoments):
            held[key].update(x, counted, seen=narrow)
        else:
            held[key].update(x, counted)

    # -- products of the two sides -------------------------------------------------------------------------------

    def _is_sketched(self, axis: str) -> bool:
        """Whether an axis is neither the stream's nor a head's: there is no bound to its width."""
        return not self._full and axis not in ("residual", "head")

    def _test(self, width: int) -> Tensor:
        if width not in self._tests:
            self._tests[width] = sketch_matrix(width, self._seed).to(self._device)
        return self._tests[width]

    def _narrowed(self, x: Tensor, axis: str) -> Tensor:
        """`x` times the test matrix on a sketched axis, else `x` itself."""
        if not self._is_sketched(axis):
            return x
        with exact_products(x.device):
            return x @ self._test(x.shape[-1]).to(x)

    def _columns(self, matrix: str, cross: Tensor) -> int:
        """By how much the squared norm of a sketched cross moment is too large."""
        axes = (kind_of(matrix).input_axis, cross.shape[-2]), (kind_of(matrix).output_axis, cross.shape[-1])
        return next((columns for axis, columns in axes if self._is_sketched(axis)), 1)

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
