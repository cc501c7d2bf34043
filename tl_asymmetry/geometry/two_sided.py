"""How much of a delta lies between two frames, one on each side, and what chance gives: the two-sided share."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry._lazy import special
from tl_asymmetry.geometry.precision import exact_products

_NODES, _DEEPEST = 400, 120.0
_NO_SPREAD = 1e-15


def two_sided_share(
    delta: Float[Tensor, "*head m n"], left: Float[Tensor, "*head m k"], right: Float[Tensor, "*head n j"]
) -> Float64[Tensor, "*head"]:
    """‖Uᵀ ΔW V‖² / ‖ΔW‖² for orthonormal columns U, V: 0 to 1, float64; NaN for a zero delta.

    Example:
        >>> two_sided_share(torch.diag(torch.tensor([3.0, 4.0])), torch.eye(2)[:, :1], torch.eye(2)[:, :1]).item()
        0.36
    """
    with exact_products(delta.device):
        core = left.mT.double() @ delta.double() @ right.double()
    return core.square().sum((-2, -1)) / delta.double().square().sum((-2, -1))


def two_sided_moments(
    purity: Float64[Tensor, "*item"], m: int, n: int, k: int, j: int
) -> tuple[float, Float64[Tensor, "*item"]]:
    """Mean and variance of the two-sided share over independent Haar frames U (m × k) and V (n × j), exactly.

    Mean kj/(mn). A Haar projection P = UUᵀ has E[P_ab P_cd] = α δ_ab δ_cd + β (δ_ac δ_bd + δ_ad δ_bc) with
    β = k(m−k)/(m(m−1)(m+2)) and α = k²/m² − 2β/m; the share is tr(P ΔW P' ΔWᵀ), whose second moment contracts two
    of these: α_m α_n + 2 β_m β_n + 2 p₂ (α_m β_n + β_m α_n + β_m β_n), p₂ = tr (ΔWΔWᵀ)² / ‖ΔW‖⁴.

    Args:
        purity: p₂ of each delta, 1/rank for a flat spectrum, 1 for rank 1.
        m, n: length of the axes.
        k, j: columns of the frames, at most m and n.

    Raises:
        ValueError: a frame without columns, or with more than its axis is long.

    Example:
        >>> mean, variance = two_sided_moments(torch.ones(1, dtype=torch.float64), 64, 16, 4, 2)
        >>> mean, round(variance.item() ** 0.5, 4)
        (0.0078125, 0.0098)
    """
    for columns, axis in ((k, m), (j, n)):
        if not 0 < columns <= axis:
            raise ValueError(f"expected a frame of 1 to {axis} columns, got {columns}; pass such a rank")
    (α_m, β_m), (α_n, β_n) = _haar(m, k), _haar(n, j)
    mean = k * j / (m * n)
    second = α_m * α_n + 2 * β_m * β_n + 2 * purity * (α_m * β_n + β_m * α_n + β_m * β_n)
    return mean, (second - mean**2).clamp(min=0)


def two_sided_tail(
    share: Float64[Tensor, "*item"], purity: Float64[Tensor, "*item"], m: int, n: int, k: int, j: int
) -> Float64[Tensor, "*item"]:
    """P(share at least this large) over independent Haar frames.

    The share is a product: what U holds of ΔW, times what V holds of that. Both are taken as independent Beta
    variables, the first with its exact mean and variance, the second such that the product's are exact. That is the
    law itself for a delta of rank 1; else an estimate, which leaves the truth in the far tail (see the tests for how
    far). NaN where there is no variance (whole frames, a flat spectrum beside one) and for a zero delta.
    """
    mean, variance = two_sided_moments(purity, m, n, k, j)
    tested = (variance > 1e-14 * mean**2) & share.isfinite()
    p = torch.full_like(share, torch.nan)
    if bool(tested.any()):
        p[tested] = torch.as_tensor(_product_tail(share[tested].numpy(), purity[tested].numpy(), m, n, k, j))
    return p


def _product_tail(x: np.ndarray, purity: np.ndarray, m: int, n: int, k: int, j: int) -> np.ndarray:
    """P(A B ≥ x): E over A of P(B ≥ x/A), A at the quantiles 1 − e^{−t} so that far tails have their nodes too."""
    (α_m, β_m), right = _haar(m, k), j / n
    second_A = α_m + 2 * β_m * purity  # E of the one-sided share squared: a frame of the whole other axis
    mean, variance = two_sided_moments(torch.as_tensor(purity), m, n, k, j)
    spread_A = second_A - (k / m) ** 2
    spread_B = (variance.numpy() + mean**2) / second_A - right**2
    t, weight = _nodes()
    above = np.exp(-t)
    A = _quantile(above, k / m, spread_A)
    tail_B = _survival(x[:, None] / np.maximum(A, 1e-300), right, spread_B)
    return (tail_B * above * weight).sum(-1)


@cache  # an eigensolve of 400 × 400
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Legendre's nodes and weights between 0 and `_DEEPEST`."""
    t, weight = np.polynomial.legendre.leggauss(_NODES)
    return _DEEPEST * (t + 1) / 2, _DEEPEST * weight / 2


def _beta(mean: float, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = mean * (1 - mean) / spread - 1
    return mean * total, (1 - mean) * total


def _quantile(above: np.ndarray, mean: float, spread: np.ndarray) -> np.ndarray:
    """Where a Beta variable lies with that probability above it, [item, node]; its mean where it has no spread."""
    out = np.full((len(spread), len(above)), mean)
    free = spread > _NO_SPREAD
    a, b = _beta(mean, spread[free, None])
    out[free] = special.betainccinv(a, b, above)
    return out


def _survival(x: np.ndarray, mean: float, spread: np.ndarray) -> np.ndarray:
    out = (x <= mean).astype(float)
    free = spread > _NO_SPREAD
    a, b = _beta(mean, spread[free, None])
    out[free] = special.betaincc(a, b, x[free].clip(0, 1))
    return out


def _haar(m: int, k: int) -> tuple[float, float]:
    """α and β of a Haar projection of rank k in R^m; a whole axis has β = 0."""
    if m == 1:
        return 1.0, 0.0
    β = k * (m - k) / (m * (m - 1) * (m + 2))
    return k**2 / m**2 - 2 * β / m, β


def rounding_profile_between(
    weight: Float[Tensor, "*head m n"], left: Float[Tensor, "*head m k"], right: Float[Tensor, "*head n k"]
) -> Float64[Tensor, "*head k"]:
    """The expected two-sided share of storage noise alone, between the first 1, 2, … k columns of both frames.

    Independent errors, each in proportion to its entry's ulp: Σ_ij N_ij ‖U_i‖² ‖V_j‖² / Σ_ij N_ij with
    N_ij = 4^⌊log₂|W_ij|⌋, the same for bf16, fp16 and fp32. NaN for W = 0.
    """
    exponent = torch.frexp(weight.double()).exponent
    noise = torch.where(weight != 0, torch.ldexp(torch.ones_like(weight, dtype=torch.float64), 2 * exponent), 0.0)
    rows, columns = (side.double().square().cumsum(-1) for side in (left, right))
    with exact_products(weight.device):
        held = (rows * (noise @ columns)).sum(-2)
    total = noise.sum((-2, -1)).unsqueeze(-1)
    return torch.where(total > 0, held / total, math.nan)


def nested_sums(block: Float64[Tensor, "*head k k"]) -> Float64[Tensor, "*head k"]:
    """Sums over the leading 1 × 1, 2 × 2, … k × k corners.

    Example:
        >>> nested_sums(torch.ones(3, 3, dtype=torch.float64)).tolist()
        [1.0, 4.0, 9.0]
    """
    return block.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
