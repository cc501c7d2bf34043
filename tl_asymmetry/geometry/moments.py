"""Streaming first and second moments: what is left of the activations once they have passed a hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import exact_products, product_dtype


@checked
class StreamingMoments:
    """Mean, second moment and covariance of row vectors that arrive in batches.

    Rows are reduced as they come: a product in float32 (float64 for float64 rows), added up in float64 on the rows'
    device. Memory is d(d+1)/2 float64 numbers (the packed upper triangle) whatever the number of rows, a quarter more
    while they arrive. All rows are taken relative to the mean of the first batch (Chan, Golub & LeVeque 1983), so that
    neither the covariance nor the second moment loses digits to a large mean; the shift is undone in float64 on
    reading.

    Args:
        d: length of a row.
        sequences: also keep the between-sequence part, which `within_covariance` needs (twice the memory). `update`
            then takes `[batch, pos, d]`, one sequence for each index of `batch`.

    Example:
        >>> moments = StreamingMoments(2)
        >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> moments.second_moment.tolist(), moments.covariance.tolist(), moments.count
        ([[5.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]], 2)
    """

    def __init__(self, d: int, *, sequences: bool = False) -> None:
        if d < 1:
            raise ValueError(f"expected a positive row length d, got {d}; pass the width of the activations")
        self.d = d
        self.sequences = sequences
        self._sums: _Sums | None = None  # made by the first batch, on its device
        self._shift: Tensor | None = None

    def update(self, x: Float[Tensor, "*batch d"], mask: Bool[Tensor, "*batch"] | None = None) -> None:
        """Take in the rows of `x` where `mask` is true (all rows without a mask).

        Raises:
            ValueError: rows of another length, or a mask that does not fit.
        """
        if x.shape[-1] != self.d:
            raise ValueError(f"expected rows of length {self.d}, got {tuple(x.shape)}; pass [..., {self.d}]")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(f"expected a mask of shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        if self.sequences and x.ndim < 2:
            raise ValueError(f"expected [batch, pos, {self.d}] for per-sequence moments, got {tuple(x.shape)}")
        x = x.detach().to(product_dtype(x))
        if self._sums is None:
            self._sums = _Sums.empty(x, sequences=self.sequences, shift=self._shift)
        self._sums.add(x, mask)

    def beside(self) -> StreamingMoments:
        """None of these rows yet, taken relative to the same point: moments of one are added without moving either."""
        result = StreamingMoments(self.d, sequences=self.sequences)
        result._shift = self._shift if self._sums is None else self._sums.shift
        return result

    def merge(self, other: StreamingMoments) -> StreamingMoments:
        """Take in all that `other` has seen, and return self. `other` stays as it is; the order does not matter.

        Raises:
            ValueError: another row length, or only one of the two keeps per-sequence moments.
        """
        if (other.d, other.sequences) != (self.d, self.sequences):
            raise ValueError(f"expected moments like {self!r}, got {other!r}; pass moments of the same kind")
        mine, theirs = self._packed(), other._packed()
        if theirs is not None:
            self._sums = theirs.each(Tensor.clone) if mine is None else mine.plus(theirs)
        return self

    def without(self, other: StreamingMoments) -> StreamingMoments:
        """The moments of all rows but those of `other`, which must have been merged into self before (jackknife)."""
        result = StreamingMoments(self.d, sequences=self.sequences)
        sums, theirs = self._require_rows(), other._packed()
        result._sums = sums.each(Tensor.clone) if theirs is None else sums.plus(theirs, sign=-1)
        return result

    def pooled(self) -> StreamingMoments:
        """A copy that has forgotten which sequence a row came from."""
        result = StreamingMoments(self.d)
        sums = self._packed()
        result._sums = None if sums is None else replace(sums.each(Tensor.clone), between=None)
        return result

    def about(self, shift: Float64[Tensor, " d"]) -> StreamingMoments:
        """The same moments kept as sums about another point: sums about one point can be added entry by entry."""
        result = StreamingMoments(self.d, sequences=self.sequences)
        sums = self._packed()
        if sums is None:
            size = self.d * (self.d + 1) // 2
            gram, between = (torch.zeros(size, dtype=torch.float64, device=shift.device) for _ in range(2))
            zero = torch.zeros((), dtype=torch.float64, device=shift.device)
            result._sums = _Sums(shift, gram, torch.zeros_like(shift), zero, between if self.sequences else None)
        else:
            result._sums = sums.moved(shift)
        return result

    def cpu(self) -> StreamingMoments:
        """The same moments on CPU; those that are there already are shared, not copied."""
        result = StreamingMoments(self.d, sequences=self.sequences)
        sums = self._packed()
        result._sums = None if sums is None else sums.each(Tensor.cpu)
        return result

    @property
    def count(self) -> int:
        """Number of rows taken in."""
        return 0 if self._sums is None else int(self._sums.count.item())

    @property
    def mean_square(self) -> float:
        """Σ ‖x‖² / n d, the mean square of an entry; NaN or infinite where a square overflowed."""
        sums = self._require_rows()
        i = torch.arange(self.d, device=sums.gram.device)
        squares = sums.gram.index_select(0, i * self.d - i * (i - 1) // 2).sum() / sums.count
        return float((squares + sums.shift @ (2 * sums.total / sums.count + sums.shift)) / self.d)

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean row, float64."""
        sums = self._require_rows()
        return sums.shift + sums.total / sums.count

    @property
    def second_moment(self) -> Float[Tensor, "d d"]:
        """Uncentred second moment Σ x xᵀ / n, float64."""
        sums = self._require_rows()
        c = sums.shift
        h = sums.total / sums.count + c / 2
        # Σ (x − c + c)(x − c + c)ᵀ / n = Σ (x − c)(x − c)ᵀ / n + h cᵀ + c hᵀ
        return _unpack(sums.gram, self.d).div_(sums.count).addr_(h, c).addr_(c, h)

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Centred second moment Σ (x − x̄)(x − x̄)ᵀ / n (not n − 1), float64."""
        sums = self._require_rows()
        mean = sums.total / sums.count
        return _unpack(sums.gram, self.d) / sums.count - torch.outer(mean, mean)

    @property
    def within_covariance(self) -> Float[Tensor, "d d"]:
        """Second moment about each sequence's own mean, Σ_s Σ_t (x_t − x̄_s)(x_t − x̄_s)ᵀ / n, float64.

        Raises:
            ValueError: made without `sequences=True`.
        """
        sums = self._require_rows()
        if sums.between is None:
            raise ValueError("expected per-sequence moments, got plain ones; pass sequences=True to StreamingMoments")
        return _unpack(sums.gram - sums.between, self.d) / sums.count

    def state_dict(self) -> dict[str, Tensor]:
        """What `from_state` needs to make the same moments again: float64 tensors on CPU, their own copies."""
        sums = self._require_rows().each(Tensor.clone).each(Tensor.cpu)
        return {name: value for name, value in vars(sums).items() if isinstance(value, Tensor)}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> StreamingMoments:
        """The inverse of `state_dict`."""
        moments = cls(len(state["total"]), sequences="between" in state)
        parts = (state["shift"], state["gram"], state["total"], state["count"], state.get("between"))
        moments._sums = _Sums(*parts).each(Tensor.clone)
        return moments

    def __repr__(self) -> str:
        return f"StreamingMoments(d={self.d}, sequences={self.sequences})"

    def _packed(self) -> _Sums | None:
        """The sums, all of them in `gram`; None before the first batch."""
        if self._sums is not None:
            self._sums.pack()
        return self._sums

    def _require_rows(self) -> _Sums:
        sums = self._packed()
        if sums is None:
            raise ValueError("expected moments of at least one row, got none; call update first")
        return sums


@dataclass
class _Sums:
    """Float64 sums of rows taken relative to `shift`, on the device of the rows."""

    shift: Tensor
    """c `[d]`: the first batch's mean."""
    gram: Tensor
    """Packed upper triangle of Σ (x − c)(x − c)ᵀ."""
    total: Tensor
    """Σ (x − c) `[d]`."""
    count: Tensor
    """n, a scalar."""
    between: Tensor | None
    """Packed Σ_s n_s (x̄_s − c)(x̄_s − c)ᵀ over sequences s, if kept."""
    fixed: bool = False
    """Whether the shift was given."""
    blocks: list[Tensor] = field(default_factory=list)
    """What `gram` lacks yet, as blocks of rows from the diagonal on: packing takes as long as adding up a batch."""

    @classmethod
    def empty(cls, x: Tensor, *, sequences: bool, shift: Tensor | None = None) -> _Sums:
        """No rows yet, on the device of `x`; without a shift the first rows that count set it."""
        d, zero = x.shape[-1], torch.zeros((), dtype=torch.float64, device=x.device)
        packed = d * (d + 1) // 2
        return cls(
            shift=zero.new_zeros(d) if shift is None else shift.to(x.device),
            gram=zero.expand(packed),  # no memory before it is needed
            total=zero.new_zeros(d),
            count=zero.clone(),
            between=zero.new_zeros(packed) if sequences else None,
            fixed=shift is not None,
        )

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        counts = _counts(x, mask)
        if mask is not None:
            # where, not a product: a masked NaN must not survive. Not x[mask]: shapes stay static for fake tensors.
            x = torch.where(mask.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))
        if not self.fixed:  # whether any row has counted so far only the device knows: where, not if
            self.shift = torch.where(self.count > 0, self.shift, _rough_mean(x, counts))
        shift = self.shift.to(x.dtype)
        centred = x - shift if mask is None else torch.addcmul(x, counts.unsqueeze(-1).to(x.dtype), shift, value=-1)
        rows = centred.reshape(-1, x.shape[-1])
        blocks = _blocks(x.shape[-1])
        if not self.blocks:
            self.blocks = [self.gram.new_zeros(height, width) for height, width in blocks]
        with exact_products(x.device):
            for (height, width), sums in zip(blocks, self.blocks, strict=True):
                # narrow, not brackets: runs on fake tensors
                right = rows.narrow(1, x.shape[-1] - width, width)
                sums += right.narrow(1, 0, height).mT @ right
        self.count += counts.sum()
        if self.between is None:
            self.total += rows.sum(0)
        else:
            totals = centred.sum(-2).to(torch.float64).reshape(-1, x.shape[-1])
            means = totals / counts.sum(-1).reshape(-1, 1).clamp(min=1)
            self.between += _pack(means.mT @ totals)
            self.total += totals.sum(0)

    def pack(self) -> None:
        """Take what stands in blocks into `gram`."""
        if self.blocks:
            d = len(self.shift)
            whole = torch.cat([torch.nn.functional.pad(block, (d - block.shape[1], 0)) for block in self.blocks])
            self.gram, self.blocks = self.gram + _pack(whole), []

    def moved(self, shift: Tensor) -> _Sums:
        """The same rows relative to another shift, on its device: Σ (x − c + e)(x − c + e)ᵀ with e = c − shift."""
        here = self.each(lambda t: t.to(shift.device))
        e = here.shift - shift
        # s eᵀ + e sᵀ + n e eᵀ = h eᵀ + e hᵀ with h = s + n e / 2, on the packed triangle only.
        h = here.total + here.count * e / 2
        rows, columns = _triangle(len(e), e.device)
        h_rows, h_columns, e_rows, e_columns = (v.index_select(0, i) for v in (h, e) for i in (rows, columns))
        correction = h_rows * e_columns + e_rows * h_columns
        return _Sums(
            shift=shift,
            gram=here.gram + correction,
            total=here.total + here.count * e,
            count=here.count,
            between=None if here.between is None else here.between + correction,
        )

    def plus(self, other: _Sums, sign: int = 1) -> _Sums:
        """Both sums' rows, relative to this shift; with sign −1 this one's rows without the other's."""
        theirs = other if self._is_about(other.shift) else other.moved(self.shift)
        return _Sums(
            shift=self.shift,
            gram=self.gram + sign * theirs.gram,
            total=self.total + sign * theirs.total,
            count=self.count + sign * theirs.count,
            between=None if self.between is None or theirs.between is None else self.between + sign * theirs.between,
        )

    def _is_about(self, shift: Tensor) -> bool:
        """Whether this is the shift, as far as can be told without waiting for a device."""
        on_cpu = self.shift.device.type == shift.device.type == "cpu"
        return shift is self.shift or (on_cpu and torch.equal(shift, self.shift))

    def each(self, change: Callable[[Tensor], Tensor]) -> _Sums:
        """The same sums with `change` applied to every tensor."""
        between = None if self.between is None else change(self.between)
        return _Sums(change(self.shift), change(self.gram), change(self.total), change(self.count), between)


def _rough_mean(x: Tensor, counts: Tensor) -> Tensor:
    """The mean row, to a few digits, in numbers that float32 holds: `add` and `moved` then shift by the same."""
    weights = (counts / counts.sum().clamp(min=1)).reshape(-1).to(x.dtype)
    with exact_products(x.device):
        return (weights @ x.reshape(-1, x.shape[-1])).to(torch.float32).to(torch.float64)


def _counts(x: Tensor, mask: Tensor | None) -> Tensor:
    """1.0 for every row that counts, else 0.0; float64, the shape of x without its last axis."""
    if mask is None:
        return torch.ones(x.shape[:-1], dtype=torch.float64, device=x.device)
    return mask.to(dtype=torch.float64, device=x.device)


def _blocks(d: int) -> list[tuple[int, int]]:
    """Heights and widths of blocks of rows of a d × d matrix, from the diagonal on: a third less than the whole."""
    step = d if d < 256 else -(-d // 4)
    return [(min(step, d - i), d - i) for i in range(0, d, step)]


@lru_cache(maxsize=32)
def _triangle(d: int, device: torch.device) -> Int[Tensor, "2 packed"]:
    """Rows and columns of the upper triangle of a d × d matrix, in the order in which it is packed."""
    return torch.triu_indices(d, d, device=device)


@lru_cache(maxsize=32)
def _places(d: int, device: torch.device) -> Int[Tensor, "d d"]:
    """For each entry of a symmetric d × d matrix, where it stands in the packed triangle."""
    i = torch.arange(d, device=device)
    low, high = torch.minimum(i.unsqueeze(1), i), torch.maximum(i.unsqueeze(1), i)
    return low * d - low * (low - 1) // 2 + high - low


def _pack(symmetric: Float[Tensor, "d d"]) -> Float[Tensor, " packed"]:
    """The upper triangle as one float64 vector: half the memory of the matrix."""
    d = symmetric.shape[0]
    rows, columns = _triangle(d, symmetric.device)
    # index_select, not brackets: several times faster, and runs on fake tensors.
    return symmetric.reshape(-1).index_select(0, rows * d + columns).to(torch.float64)


def _unpack(packed: Float[Tensor, " packed"], d: int) -> Float[Tensor, "d d"]:
    """The symmetric matrix of which `packed` is the upper triangle."""
    return packed.index_select(0, _places(d, packed.device).reshape(-1)).reshape(d, d)
