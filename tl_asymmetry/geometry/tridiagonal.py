"""The leading eigenvectors of a symmetric matrix from its tridiagonal form: none is made that is not wanted."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from tl_asymmetry._lazy import lapack

# Less than this is no matter beside float32's own rounding.
_ORTHONORMAL = 1e-6


def leading_eigenvectors(symmetric: Float32[Tensor, "d d"], k: int) -> Float32[Tensor, "d k"] | None:
    """The k eigenvectors of the largest eigenvalues, the largest first; their signs are as they come.

    A float32 matrix on CPU is brought to tridiagonal form in float32, which is solved in float64: each vector by
    itself, by the twisted factorization (Parlett & Dhillon 1997), orthogonal to the others because it is accurate. A
    third less time than LAPACK's divide and conquer takes for all d of them, and with smaller errors.

    Returns:
        None where some of them are not orthogonal, as in clusters closer than float64 tells apart: solve in full.

    Example:
        >>> rotated = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).Q
        >>> found = leading_eigenvectors(rotated * torch.arange(40, 0, -1) @ rotated.mT, 3)
        >>> bool((found.mT @ rotated[:, :3]).diagonal().abs().min() > 1 - 1e-6)
        True
    """
    d = len(symmetric)
    lwork = int(lapack.ssytrd_lwork(d, lower=1)[0])
    # A symmetric matrix is its own transpose: LAPACK's order of entries, without a copy.
    reflectors, diagonal, off, scales, _ = lapack.ssytrd(symmetric.numpy().T, lower=1, lwork=lwork)
    found = _of_tridiagonal(diagonal.astype(np.float64), off.astype(np.float64), k)
    if found is None:
        return None
    vectors = torch.from_numpy(found).float()
    # The first axis is left alone by all reflections.
    vectors[1:] = torch.ormqr(torch.from_numpy(reflectors)[1:, :-1], torch.from_numpy(scales), vectors[1:])
    return vectors


def _of_tridiagonal(diagonal: Float64[np.ndarray, " d"], off: Float64[np.ndarray, " e"], k: int) -> np.ndarray | None:
    """`[d, k]`; None where they are not orthonormal."""
    λ, failed = lapack.dsterf(diagonal, off)
    if failed:
        return None
    shifted = diagonal[:, None] - λ[: -k - 1 : -1]
    with np.errstate(all="ignore"):  # what becomes of a zero pivot is seen below
        # Pivots of T − λ from the first row down, and from the last one up, all λ at once.
        down, up = _pivots(shifted, off), _pivots(shifted[::-1], off[::-1])[::-1]
        twist = np.abs(down + up - shifted).argmin(0)
        # From 1 at the twist, where the pivots meet, each entry is a multiple of its neighbour.
        row, ratio = np.arange(len(off))[:, None], -off[:, None]
        z = np.ones_like(shifted)
        z[:-1] *= np.where(row < twist, ratio / down[:-1], 1.0)[::-1].cumprod(0)[::-1]
        z[1:] *= np.where(row >= twist, ratio / up[1:], 1.0).cumprod(0)
        z /= np.linalg.norm(z, axis=0)
    return z if np.abs(z.T @ z - np.eye(k)).max() <= _ORTHONORMAL else None


def _pivots(shifted: Float64[np.ndarray, "d k"], off: Float64[np.ndarray, " e"]) -> Float64[np.ndarray, "d k"]:
    """Of the factorization without exchanges of each column's tridiagonal matrix."""
    pivots, squares = shifted.copy(), off**2
    for i, square in enumerate(squares.tolist(), 1):
        pivots[i] -= square / pivots[i - 1]
    return pivots
