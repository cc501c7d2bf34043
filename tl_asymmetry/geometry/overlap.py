"""How far two sets of directions span the same space, and how likely that is by chance."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tl_asymmetry.geometry.nulls import IsotropicNull, isotropic_variance


def overlap_by_chance(
    overlap: Float64[Tensor, " item"], directions: Int[Tensor, " item"], null: IsotropicNull
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, one-sided p and its method of overlaps ‖Q₁ᵀQ₂‖²/k, with a Haar-random space in the place of one of the two.

    Args:
        overlap: of each two sets.
        directions: k, how many each of them has; where there is none, or the whole space, nothing is tested.
        null: of the space that both lie in.

    Example:
        >>> z, p, _ = overlap_by_chance(torch.ones(1).double(), torch.tensor([2]), IsotropicNull(32, seed=0))
        >>> bool(z[0] > 10), bool(p[0] < 1e-10)
        (True, True)
    """
    z, p = (np.full(len(directions), np.nan) for _ in range(2))
    method = np.full(len(directions), "none", dtype=object)
    for k in sorted({int(v) for v in directions if 0 < v < null.d}):
        at = (directions == k).numpy()
        # ‖Q₁ᵀQ₂‖²/k is the fraction of the projector onto one space, of k equal eigenvalues, inside the other
        spectrum = torch.full((int(at.sum()), k), 1 / k, dtype=torch.float64)
        p[at], method[at] = null.tail(spectrum, k, overlap[at])
        spread = isotropic_variance(torch.full((1,), 1 / k, dtype=torch.float64), null.d, k).sqrt()
        z[at] = ((overlap[at] - k / null.d) / spread).numpy()
    return z, p, method
