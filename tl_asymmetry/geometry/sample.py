"""A sample of rows whose size is fixed, whatever passes by: the rows with the smallest keys."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


class RowSample:
    """The rows with the `size` smallest keys, in the order of their keys, on CPU.

    Keys that belong to a row for itself (not to its place in a batch) make the sample independent of batches and order:
    with random keys it is a uniform sample without replacement (bottom-k, Cohen & Kaplan 2007).

    Example:
        >>> sample = RowSample(2)
        >>> sample.update(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([30, 10, 20]))
        >>> sample.rows.tolist()
        [[2.0], [3.0]]
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"expected size >= 1, got {size}; pass a positive number of rows")
        self.size = size
        self._rows: Tensor | None = None
        self._keys: Tensor | None = None

    def update(self, rows: Float[Tensor, "row d"], keys: Int[Tensor, " row"]) -> None:
        """Take in rows with their keys."""
        keys = keys.cpu()
        if self._keys is not None and len(self._keys) == self.size:
            candidates = keys <= self._keys[-1]
            rows, keys = rows[candidates.to(rows.device)], keys[candidates]
        rows = rows.detach().cpu()
        if self._rows is not None and self._keys is not None:
            rows, keys = torch.cat([self._rows, rows]), torch.cat([self._keys, keys])
        order = keys.argsort(stable=True)[: self.size]
        self._rows, self._keys = rows[order], keys[order]

    def merge(self, other: RowSample) -> RowSample:
        """Take in what another sample holds, and return self."""
        if other._rows is not None and other._keys is not None:
            self.update(other._rows, other._keys)
        return self

    @property
    def rows(self) -> Float[Tensor, "row d"]:
        """The rows kept so far.

        Raises:
            ValueError: none yet.
        """
        if self._rows is None:
            raise ValueError("expected a sample of at least one row, got none; call update first")
        return self._rows

    @property
    def keys(self) -> Int[Tensor, " row"]:
        """Their keys, ascending."""
        if self._keys is None:
            raise ValueError("expected a sample of at least one row, got none; call update first")
        return self._keys
