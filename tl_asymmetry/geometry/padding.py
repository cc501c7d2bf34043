"""One tensor of what several layers have, where some lack it or have it smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor


def padded_stack(
    parts: Sequence[Shaped[Tensor, ...] | None], *, beyond: float = math.nan
) -> Shaped[Tensor, "part ..."]:
    """Stack tensors of one number of dimensions, each in a corner of a tensor as large as the largest.

    What a part lacks is NaN, as is all of a part that is None.

    Args:
        parts: the tensors.
        beyond: what stands beyond a part's own end on the last axis: 0 for a spectrum.

    Raises:
        ValueError: no part at all, or different numbers of dimensions.

    Example:
        >>> padded_stack([torch.ones(2, 1), None, torch.ones(1, 2)], beyond=0.0).tolist()
        [[[1.0, 0.0], [1.0, 0.0]], [[nan, nan], [nan, nan]], [[1.0, 1.0], [nan, nan]]]
    """
    there = [part for part in parts if part is not None]
    if not there or len({part.ndim for part in there}) > 1:
        got = [part.ndim for part in there]
        raise ValueError(f"expected tensors of one number of dimensions, got {got}; pass some such")
    if len(there) == len(parts) and len({part.shape for part in there}) == 1:
        return torch.stack(there)
    shape = tuple(max(sizes) for sizes in zip(*(part.shape for part in there), strict=True))
    wide = torch.full((len(parts), *shape), torch.nan, dtype=there[0].dtype)
    for i, part in enumerate(parts):
        if part is not None:
            corner: tuple[slice, ...] = tuple(slice(size) for size in part.shape)
            wide[i][corner[:-1]] = beyond
            wide[i][corner] = part
    return wide
