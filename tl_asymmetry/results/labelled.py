"""Tables with named axes, for those who compute with xarray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tl_asymmetry._lazy import pd

_EMPTIEST = 8
"""A grid may have so many cells for each row of the table."""


def require_xarray() -> None:
    """Say what to install where it is missing.

    Raises:
        ImportError: xarray is not installed.
    """
    try:
        import xarray  # noqa: F401 - pandas' to_xarray needs it
    except ImportError as error:
        raise ImportError("expected xarray to be installed; pip install xarray") from error


def labelled(table: pd.DataFrame) -> Any:
    """A tidy table as an `xarray.Dataset`.

    Args:
        table: keys first.

    Returns:
        A Dataset over the first columns that tell all rows apart, without those that have one value: or over "row",
        where no columns do, or their grid would be mostly empty.

    Raises:
        ImportError: xarray is not installed.

    Example:
        >>> table = pd.DataFrame({"layer": [0, 0, 1, 1], "rank": [1, 4, 1, 4], "fraction": [0.1, 0.3, 0.2, 0.4]})
        >>> labelled(table)["fraction"].sel(layer=1, rank=4).item()
        0.4
    """
    require_xarray()
    plain = pd.DataFrame({name: _plain(column) for name, column in table.items()})
    axes = _axes(plain)
    cells = np.prod([plain[axis].nunique() for axis in axes], dtype=float)
    if not axes or cells > _EMPTIEST * len(plain):
        return plain.rename_axis("row").to_xarray()
    return plain.set_index(axes).to_xarray()


def _axes(table: pd.DataFrame) -> Sequence[str]:
    """The shortest list of leading columns without measured numbers that has no row twice."""
    axes: list[str] = []
    for name, column in table.items():
        if pd.api.types.is_float_dtype(column.dtype):
            continue
        axes.append(str(name))
        if not table.duplicated(axes).any():
            return [axis for axis in axes if table[axis].nunique() > 1] or axes[:1]
    return []


def _plain(column: pd.Series) -> pd.Series:
    """In types that numpy has: −1 for a missing integer, "" for a missing word."""
    if pd.api.types.is_bool_dtype(column.dtype):
        return column.astype(object) if column.isna().any() else column.astype(bool)
    if pd.api.types.is_integer_dtype(column.dtype):
        return column.fillna(-1).astype("int64")
    if pd.api.types.is_float_dtype(column.dtype):
        return column.astype("float64")
    return column.fillna("").astype(str)
