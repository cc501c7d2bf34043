"""The singular value decomposition of the last W rows of a stream, at the price of one row of products a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.geometry.sketch import RowSketch
from tl_asymmetry.geometry.subspace import ordered_eigh

_COLUMNS = {"cpu": 1 << 14}
"""Columns of the ring widened to float64 at a time: 20 rows of them stay in a core's cache."""
_LONGEST = 20_000
"""Rows of a window: its Gram matrix is kept whole."""
_COLUMNS_ELSEWHERE = 1 << 20
"""On a GPU, where each piece costs a launch."""


@checked
class RollingSVD:
    """Leading singular values and right singular vectors of the last `window` rows, uncentred.

    Kept are the rows in a ring and their W × W Gram matrix G. A new row replaces the oldest one and changes one row
    and one column of G: W inner products, accumulated in float64, so nothing drifts however long the stream. G's
    eigenvectors U are the left singular vectors, σ = √λ, and `V = rowsᵀ U / σ` is made only when it is asked for.

    The ring is kept in `dtype`. Products are taken with the new row as it came, before it is rounded; older rows
    have been rounded once. With rows of the ring's own type G is exact; else each entry is off by at most
    eps(dtype) ‖a‖ ‖b‖, and G may miss positive semidefiniteness by as much.

    Args:
        window: rows kept, W.
        rank: how many directions are wanted, at most W.
        dtype: of the ring; memory is `window · parameters` numbers of it.
        sketch: keep sketches of that many numbers instead of rows (`RowSketch`), for rows too long to keep W of:
            singular values then carry a relative error of about √(2 / sketch), and right vectors cannot be had.
        seed: of the sketch.

    Raises:
        ValueError: window < rank, rank < 1, or a dtype that is not of floating point.

    Example:
        >>> svd = RollingSVD(window=4, rank=2)
        >>> for row in torch.eye(8)[:6] * torch.tensor([1.0, 1, 1, 5, 1, 7, 1, 1]):
        ...     svd.update(row)
        >>> svd.singular_values.tolist(), svd.right_singular_vectors.abs().argmax(1).tolist()
        ([7.0, 5.0], [5, 3])
    """

    def __init__(
        self,
        window: int,
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        sketch: int | None = None,
        seed: int = 0,
    ) -> None:
        if rank < 1:
            raise ValueError(f"expected rank >= 1, got {rank}; pass how many directions to keep")
        if window < rank:
            raise ValueError(f"expected window >= rank = {rank}, got {window}; pass a longer window or a smaller rank")
        if window > _LONGEST:
            raise ValueError(f"expected a window of at most {_LONGEST:,} rows, got {window}; pass a shorter one")
        if not dtype.is_floating_point:
            raise ValueError(f"expected a floating-point dtype, got {dtype}; pass torch.float32")
        self.window, self.rank, self.dtype = window, rank, dtype
        self.sketch = None if sketch is None else RowSketch(sketch, seed=seed)
        self.rows_seen = 0
        self._length: int | None = None
        self._ring: Tensor | None = None
        self._gram = torch.zeros(window, window, dtype=torch.float64)

    @property
    def rows_held(self) -> int:
        """Rows in the window now."""
        return min(self.rows_seen, self.window)

    @property
    def full(self) -> bool:
        """Whether the window is full."""
        return self.rows_seen >= self.window

    def update(self, row: Float[Tensor, " parameters"]) -> None:
        """Take in a row; the oldest leaves when the window is full.

        Raises:
            ValueError: a row of another length or device than those before, or one with NaN or infinity.
        """
        row = row.detach()
        if self._length is not None and len(row) != self._length:
            raise ValueError(f"expected a row of {self._length} numbers, got {len(row)}; pass rows of one stream")
        kept = row if self.sketch is None else self.sketch(row)
        if self._ring is None:
            self._length = len(row)
            self._ring = torch.zeros(self.window, len(kept), dtype=self.dtype, device=row.device)
        if kept.device != self._ring.device:
            raise ValueError(f"expected rows on {self._ring.device}, got {kept.device}; pass rows of one device")
        at = self.rows_seen % self.window
        products = _products(self._ring, kept)  # the old row at `at` is still in the ring: its product is replaced
        products[at] = _square(kept)
        if not bool(torch.isfinite(products).all()):
            raise ValueError("expected finite rows, got NaN or infinity; pass rows before training diverged")
        self._ring[at] = kept
        self._gram[at, :] = products
        self._gram[:, at] = products
        self.rows_seen += 1

    @property
    def gram(self) -> Float[Tensor, "held held"]:
        """Gram matrix of the rows held, the oldest first (float64, CPU)."""
        order = self._order()
        return self._gram[order][:, order]

    @property
    def singular_values(self) -> Float[Tensor, " found"]:
        """σ_1 ≥ … of the rows held (float64, CPU): `rank` of them, fewer where the rows have a smaller rank."""
        return self._decomposition()[0]

    @property
    def left_vectors(self) -> Float[Tensor, "held found"]:
        """Left singular vectors as columns (float64, CPU); entry i belongs to the i-th oldest row."""
        return self._decomposition()[1]

    @property
    def right_singular_vectors(self) -> Float[Tensor, "found parameters"]:
        """Right singular vectors as orthonormal rows, on the device of the rows (float32; float64 for such a ring).

        Raises:
            ValueError: under a sketch, which cannot give them.
        """
        if self.sketch is not None:
            raise ValueError(
                "expected a ring of rows for right vectors, got sketches; combine rows of your own with "
                "left_vectors / singular_values, or pass sketch=None"
            )
        if self._ring is None:
            return torch.zeros(0, 0)
        σ, U = self._decomposition()
        ring = self._ring
        weights = torch.zeros(self.window, len(σ), dtype=torch.float64)
        weights[self._order()] = U / σ
        weights = weights.to(ring.device)
        V = torch.empty(len(σ), ring.shape[1], dtype=product_dtype(ring), device=ring.device)
        for columns, out in zip(_pieces(ring), _pieces(V), strict=True):
            out.copy_(weights.mT @ columns.double())
        return _orthonormal_rows(V)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a continued stream needs, as tensors."""
        ring = torch.zeros(0) if self._ring is None else self._ring
        counts = torch.tensor([self.rows_seen, -1 if self._length is None else self._length])
        return {"ring": ring.clone(), "gram": self._gram.clone(), "counts": counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue where `state_dict` was taken, bit for bit.

        Raises:
            ValueError: the state of another window.
        """
        if state["gram"].shape != self._gram.shape:
            raise ValueError(
                f"expected the state of a window of {self.window}, got {len(state['gram'])}; pass the same window"
            )
        self.rows_seen, length = state["counts"].tolist()
        self._length = None if length < 0 else length
        self._ring = None if length < 0 else state["ring"].clone()
        self._gram = state["gram"].clone()

    def _order(self) -> Tensor:
        """Places in the ring, the oldest row first."""
        if not self.full:
            return torch.arange(self.rows_seen)
        return (torch.arange(self.window) + self.rows_seen) % self.window

    def _decomposition(self) -> tuple[Tensor, Tensor]:
        if self.rows_held == 0:
            return torch.zeros(0, dtype=torch.float64), torch.zeros(0, 0, dtype=torch.float64)
        λ, U = ordered_eigh(self.gram)
        λ, U = λ[: self.rank].clamp(min=0), U[:, : self.rank]
        # What rounding of the ring leaves of a vanishing σ: eps · σ_1, or √eps64 · σ_1 in an exact Gram.
        floor = max(1e-7, 4 * torch.finfo(self.dtype).eps)
        found = int((λ.sqrt() > floor * λ[0].sqrt()).sum())
        return λ[:found].sqrt(), U[:, :found]


@checked
class RollingSVDs:
    """One `RollingSVD` for each stream (updates, gradient, a task's gradient) and parameter block, made as they come.

    Gram matrices of blocks add up, so the decomposition of whole rows follows from those of the blocks without a
    concatenated copy: `joint_singular_values`.

    Args:
        window, rank, dtype, sketch, seed: as in `RollingSVD`.

    Example:
        >>> streams = RollingSVDs(window=4, rank=2)
        >>> streams.update("gradient", {"W_Q": torch.tensor([3.0, 0.0]), "W_K": torch.tensor([4.0])})
        >>> streams["gradient", "W_Q"].singular_values.tolist(), streams.joint_singular_values("gradient").tolist()
        ([3.0], [5.0])
    """

    def __init__(
        self,
        window: int,
        rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        sketch: int | None = None,
        seed: int = 0,
    ) -> None:
        self._new = lambda: RollingSVD(window, rank, dtype=dtype, sketch=sketch, seed=seed)
        self._new()  # refuses bad arguments now rather than at the first row
        self._parts: dict[tuple[str, str], RollingSVD] = {}

    def update(self, stream: str, blocks: Mapping[str, Tensor]) -> None:
        """Take in one step of a stream: a tensor of any shape for each block."""
        for block, row in blocks.items():
            self._parts.setdefault((stream, block), self._new()).update(row.reshape(-1))

    def __getitem__(self, key: tuple[str, str]) -> RollingSVD:
        """The decomposition of one (stream, block)."""
        if key not in self._parts:
            known = ", ".join(f"{s}/{b}" for s, b in self._parts) or "nothing yet"
            raise ValueError(f"expected a stream and block that were updated, got {key!r}; pass one of {known}")
        return self._parts[key]

    def joint_singular_values(self, stream: str) -> Float[Tensor, " found"]:
        """Singular values of the stream's whole rows, all blocks side by side (float64, CPU).

        Raises:
            ValueError: no such stream, or blocks that were not updated together.
        """
        parts = [part for (name, _), part in self._parts.items() if name == stream]
        if not parts or len({part.rows_seen for part in parts}) > 1:
            raise ValueError(f"expected blocks of {stream!r} updated together, got none or uneven; pass every block")
        joint = RollingSVD(parts[0].window, parts[0].rank, dtype=parts[0].dtype)
        joint.rows_seen = parts[0].rows_seen
        joint._gram = torch.stack([part._gram for part in parts]).sum(0)
        return joint.singular_values


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """A row, or rows, in pieces of columns."""
    return rows.split(_COLUMNS.get(rows.device.type, _COLUMNS_ELSEWHERE), -1)


def _products(ring: Tensor, row: Tensor) -> Tensor:
    """⟨each row of the ring, row⟩ in float64, on CPU: widened piece by piece, so that no float64 copy is held."""
    total = torch.zeros(len(ring), dtype=torch.float64, device=ring.device)
    for columns, piece in zip(_pieces(ring), _pieces(row), strict=True):
        total += columns.double() @ piece.double()
    return total.cpu()


def _square(row: Tensor) -> Tensor:
    return sum((piece.double().square().sum() for piece in _pieces(row)), torch.zeros(())).cpu()


def _orthonormal_rows(V: Tensor) -> Tensor:
    """Rows made orthonormal in their order, the span of the first k kept: V ← L⁻¹ V with V Vᵀ = L Lᵀ.

    Vectors of small σ come out of `rowsᵀ U / σ` with errors of eps (σ_1/σ)²; a projector needs better.
    """
    gram = torch.zeros(len(V), len(V), dtype=torch.float64, device=V.device)
    for columns in _pieces(V):
        wide = columns.double()
        gram += wide @ wide.mT
    inverse = torch.linalg.solve_triangular(
        torch.linalg.cholesky(gram), torch.eye(len(V), dtype=torch.float64, device=V.device), upper=False
    )
    for columns in _pieces(V):
        columns.copy_(inverse @ columns.double())
    return V
