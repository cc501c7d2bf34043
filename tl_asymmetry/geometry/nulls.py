"""What a fraction would be by chance: a Haar-random subspace for one given delta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry._lazy import special
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.memory import batches
from tl_asymmetry.geometry.precision import exact_products, product_dtype
from tl_asymmetry.geometry.quadratic_form import fraction_tail_rank_one
from tl_asymmetry.geometry.saddlepoint import rotation_tails

HAAR_DRAWS = 20_000
# Largest disagreement of a Beta with the true law, in standard deviations at the 0.95 and 0.999 quantiles: 0.03 is a
# tenth of p at p = 0.001.
QUANTILE_TOLERANCE = 0.03
# Below this p the saddlepoint takes over: a Beta or 20,000 draws know nothing of so far a tail.
FAR = 0.01
# Permuted gradients of which a range is made, at least.
PERMUTATIONS = 199
_RANK_ONE = 1e-12
_GAUSSIANS_PER_POOL = 20_000_000
_BLOCK = 1024
# Heads at once, and numbers of their spectra.
_ITEMS, _NUMBERS = 4096, 1 << 22


Asked = tuple[Float[Tensor, "_item _r"], int, Float[Tensor, " _item"]]
"""Spectra of deltas, the rank of a subspace, and the fractions observed in it."""
Told = tuple[Float[np.ndarray, " _item"], Float[np.ndarray, " _item"], np.ndarray]
"""P(f ≥ fraction), P(f ≤ fraction), and how the first was found."""


@checked
def isotropic_null(
    delta: Float[Tensor, "*head rows columns"], k: int, *, residual_axis: int = -2
) -> tuple[float, Float[Tensor, "*head"]]:
    """Mean and variance of the fraction of ΔW in a Haar-random k-dimensional subspace, exactly.

    Mean k/d; variance 2k(d−k)(d·tr M² − 1) / (d²(d−1)(d+2)) with M = ΔW ΔWᵀ / ‖ΔW‖² (second moments of a Haar
    projection, Muirhead 1982, ch. 7).

    Args:
        delta: `[..., d_model, other]`, or `[..., other, d_model]` with residual_axis −1.
        k: rank of the subspace, 0 < k < d_model.
        residual_axis: −2, or −1 for W_O and W_out.

    Returns:
        The mean, a number, and the variance of each head, float64.

    Example:
        >>> mean, variance = isotropic_null(torch.eye(4), 1)  # a flat spectrum: every subspace has the same share
        >>> mean, variance.item()
        (0.25, 0.0)
    """
    if residual_axis not in (-1, -2):
        raise ValueError(f"expected residual_axis -2 (read) or -1 (write), got {residual_axis}; pass one of the two")
    d = delta.shape[residual_axis]
    _require_rank(k, d)
    ΔW = delta.to(product_dtype(delta))
    with exact_products(delta.device):
        # tr M² is the same for ΔW ΔWᵀ and ΔWᵀ ΔW: take the smaller.
        rows, columns = ΔW.shape[-2:]
        gram = (ΔW @ ΔW.mT if rows <= columns else ΔW.mT @ ΔW).to(torch.float64)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    purity = gram.square().sum((-2, -1)) / trace.square()
    return k / d, isotropic_variance(purity, d, k)


def isotropic_variance(purity: Float[Tensor, "*item"], d: int, k: int) -> Float[Tensor, "*item"]:
    """Variance of the fraction from tr M²; never below 0. A flat spectrum, tr M² = 1/d, has none."""
    excess = d * purity - 1
    # Rounding leaves ~1e-16 of a flat spectrum: nothing to be tested.
    excess = torch.where(excess < 1e-12, torch.zeros_like(excess), excess)
    return 2 * k * (d - k) * excess / (d**2 * (d - 1) * (d + 2))


class IsotropicNull:
    """p-values of fractions under Haar-random subspaces, for many deltas that share d.

    One-sided: the probability that a random k-subspace holds at least as much of this delta. k = 1 is exact
    (`fraction_tail_rank_one`), and so is a delta of rank 1 (a Beta law). Else the saddlepoint (`rotation_tails`), which
    has no floor, gives every tail below `FAR`; nearer to the middle a Beta law with the exact mean and variance is used
    where it is close enough to the truth, or `HAAR_DRAWS` seeded draws. Close enough is decided from the exact third
    and fourth moments (`fraction_cumulants`): a Cornish–Fisher correction of its 0.95 and 0.999 quantiles below
    `QUANTILE_TOLERANCE` standard deviations. Draws alone would not do as a judge: 20,000 of them leave 0.07 standard
    deviations of noise at the 0.999 quantile.

    Example:
        >>> null = IsotropicNull(64, seed=0)
        >>> p, method = null.tail(torch.tensor([[1.0, 0.0]]), 1, torch.tensor([0.5]))
        >>> round(p.item(), 12), method.tolist()
        (4.6e-11, ['exact'])
    """

    def __init__(self, d: int, *, seed: int) -> None:
        self.d = d
        self.seed = seed

    def tail(
        self, spectrum: Float[Tensor, "item r"], k: int, fraction: Float[Tensor, " item"]
    ) -> tuple[Float[np.ndarray, " item"], np.ndarray]:
        """P(f ≥ fraction) for each item, and how it was found; see `tails`."""
        above, _, method = self.tails(spectrum, k, fraction)
        return above, method

    def tails(self, spectrum: Float[Tensor, "item r"], k: int, fraction: Float[Tensor, " item"]) -> Told:
        """P(f ≥ fraction) and P(f ≤ fraction) for each item, and how the first was found.

        Args:
            spectrum: eigenvalues of ΔW ΔWᵀ, any scale; the d − r missing ones are 0.
            k: rank of the subspace.
            fraction: observed fractions; NaN where the delta is zero.

        Returns:
            Both, NaN where the spectrum is flat or the fraction NaN, and the method: "exact", "beta", "draws",
            "saddlepoint" or "none".
        """
        _require_rank(k, self.d)
        λ = spectrum.cpu().double().clamp(min=0)
        if λ.shape[-1] == 0:
            λ = λ.new_zeros(len(λ), 1)
        λ = λ / λ.sum(-1, keepdim=True)
        x = fraction.cpu().double()
        variance = isotropic_variance(λ.square().sum(-1), self.d, k)
        usable = x.isfinite() & (variance > 0)
        above, below = torch.full((2, len(x)), math.nan, dtype=torch.float64)
        method = np.full(len(x), "none", dtype=object)
        if k == 1:
            above[usable] = fraction_tail_rank_one(λ[usable], self.d, x[usable])
            method[usable.numpy()] = "exact"
            return above.numpy(), 1 - above.numpy(), method
        single = usable & (λ.amax(-1) > 1 - _RANK_ONE)
        close = torch.zeros_like(usable)
        close[usable] = beta_disagreement(λ[usable], self.d, k) <= QUANTILE_TOLERANCE
        f = x[usable].unsqueeze(-1)
        h = torch.cat([1 - f, -f], -1)
        copies = torch.tensor([[k, self.d - k]], dtype=torch.float64).expand(len(f), -1)
        above[usable], below[usable] = rotation_tails(h, copies, λ[usable], self.d)
        method[usable.numpy()] = "saddlepoint"
        middle = usable & (torch.minimum(above, below) >= FAR)
        by_beta, by_draws = (usable & single) | (middle & close), middle & ~close & ~single
        if bool(by_beta.any()):
            a, b = _beta_parameters(k / self.d, variance[by_beta].numpy())
            point = x[by_beta].numpy().clip(0, 1)
            above[by_beta] = torch.as_tensor(special.betaincc(a, b, point))
            below[by_beta] = torch.as_tensor(special.betainc(a, b, point))
            method[by_beta.numpy()] = "beta"
            method[single.numpy()] = "exact"
        if bool(by_draws.any()):
            above[by_draws], below[by_draws] = self._tails_by_draws(λ[by_draws], k, x[by_draws])
            method[by_draws.numpy()] = "draws"
        return above.numpy(), below.numpy(), method

    def tails_of(self, asked: Sequence[Asked]) -> list[Told]:
        """`tails` of each, those of one rank and one length of spectrum together: a call costs more than a head."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, (spectrum, k, _) in enumerate(asked):
            alike.setdefault((k, spectrum.shape[-1]), []).append(i)
        told: dict[int, Told] = {}
        for (k, length), places in alike.items():
            # As many as draws and spectra leave room for.
            most = min(_ITEMS, _NUMBERS // max(1, length))
            for batch in batches([len(asked[i][2]) for i in places], most):
                here = [places[i] for i in batch]
                spectra, _, fractions = zip(*(asked[i] for i in here), strict=True)
                answers = self.tails(torch.cat(spectra), k, torch.cat(fractions))
                ends = np.cumsum([len(of) for of in fractions])[:-1]
                told |= dict(zip(here, zip(*(np.split(x, ends) for x in answers), strict=True), strict=True))
        return [told[i] for i in range(len(asked))]

    def _tails_by_draws(self, λ: Tensor, k: int, x: Tensor) -> Tensor:
        reached = torch.zeros(2, len(x), dtype=torch.float64)
        for fractions in self.draws(λ, k):
            reached += torch.stack([(fractions >= x).sum(0), (fractions <= x).sum(0)])
        return (reached + 1) / (HAAR_DRAWS + 1)

    def draws(self, spectrum: Float[Tensor, "item r"], k: int) -> Iterator[Float[Tensor, "draw item"]]:
        """`HAAR_DRAWS` fractions of each item in random k-subspaces, in float64 blocks; all items see the same ones."""
        pool = haar_leverages(self.d, k, self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        λ = spectrum.double()
        left = HAAR_DRAWS
        # A coordinate permutation of a Haar subspace is one again: a pool smaller than HAAR_DRAWS is used repeatedly.
        while left > 0:
            order = torch.randperm(self.d, generator=generator)[: λ.shape[-1]]
            # The pool lies with its draws side by side: an entry of the order is one run of memory.
            for block in pool[:left].mT.split(_BLOCK, 1):
                yield (λ @ block.index_select(0, order).double()).mT
            left -= len(pool)


@lru_cache(maxsize=8)
def haar_leverages(d: int, k: int, seed: int) -> Float[Tensor, "draw d"]:
    """‖Qᵀe_i‖² for seeded Haar-random Q in R^{d×k}: what a fraction draws on, f = Σ λ_i ‖Qᵀe_i‖². Float32.

    As many draws as 2 · 10⁷ Gaussians allow (256 at least), at most `HAAR_DRAWS`.
    """
    if 2 * k > d:
        # The complement of a Haar subspace is one; the smaller of the two is well conditioned.
        return 1 - haar_leverages(d, d - k, seed)
    generator = torch.Generator().manual_seed(seed)
    count = min(HAAR_DRAWS, max(256, _GAUSSIANS_PER_POOL // (d * k)))
    pool = []
    chunk = max(1, 4_000_000 // (d * k))
    for start in range(0, count, chunk):
        Z = torch.randn(min(chunk, count - start), d, k, generator=generator)
        # ‖Qᵀe_i‖² = z_iᵀ (ZᵀZ)⁻¹ z_i: a k × k inverse, no QR of d × k. (A triangular solve is 100 times slower here.)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(Z.mT @ Z))
        pool.append(((Z @ inverse) * Z).sum(-1).mT)
    return torch.cat(pool, 1).mT


def fraction_cumulants(spectrum: Float[Tensor, "item r"], d: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Exact variance, skewness and excess kurtosis of tr(ΛP), P a Haar projection of rank k in R^d, tr Λ = 1.

    E[tr(ΛP)ⁿ] = Σ_κ C_κ(Λ) (k/2)_κ / (d/2)_κ over the partitions κ of n, with the zonal polynomials C_κ in power sums
    (James 1964, eqs. 22 and 126).
    """
    λ = spectrum.double()
    # Centred about the mean, so that a nearly flat spectrum keeps its digits: tr((Λ − I/d)P) = f − k/d.
    μ = λ - 1 / d
    missing = d - λ.shape[-1]
    s2, s3, s4 = (μ.pow(n).sum(-1) + missing * (-1 / d) ** n for n in (2, 3, 4))
    # With tr(Λ − I/d) = 0 only the terms free of the first power sum remain.
    r = {κ: _pochhammer_ratio(κ, d, k) for κ in ((2,), (1, 1), (3,), (2, 1), (1, 1, 1))}
    second = 2 / 3 * s2 * (r[2,] - r[1, 1])
    third = s3 * (8 / 15 * r[3,] - 6 / 5 * r[2, 1] + 2 / 3 * r[1, 1, 1])
    zonal4 = {
        (4,): (12 * s2**2 + 48 * s4) / 105,
        (3, 1): 20 * (-2 * s2**2 - 8 * s4) / 105,
        (2, 2): 14 * (7 * s2**2 - 2 * s4) / 105,
        (2, 1, 1): 56 * (-2 * s2**2 + 4 * s4) / 105,
        (1, 1, 1, 1): 14 * (3 * s2**2 - 6 * s4) / 105,
    }
    # A partition with more parts than d has no zonal polynomial in R^d.
    fourth = sum(c * _pochhammer_ratio(κ, d, k) for κ, c in zonal4.items() if len(κ) <= d)
    return second, third / second**1.5, fourth / second**2 - 3


def beta_disagreement(spectrum: Float[Tensor, "item r"], d: int, k: int) -> Float[Tensor, " item"]:
    """How far the moment-matched Beta's 0.95 and 0.999 quantiles are from the true ones, in standard deviations.

    Cornish & Fisher (1938) to fourth order, on the difference of the exact cumulants.
    """
    variance, skewness, kurtosis = fraction_cumulants(spectrum, d, k)
    a, b = (torch.as_tensor(v) for v in _beta_parameters(k / d, variance.numpy()))
    beta_skewness = 2 * (b - a) * (a + b + 1).sqrt() / ((a + b + 2) * (a * b).sqrt())
    beta_kurtosis = 6 * ((a - b) ** 2 * (a + b + 1) - a * b * (a + b + 2)) / (a * b * (a + b + 2) * (a + b + 3))
    worst = torch.zeros_like(variance)
    for z in (1.6449, 3.0902):
        quantile = [
            γ * (z**2 - 1) / 6 + κ * (z**3 - 3 * z) / 24 - γ**2 * (2 * z**3 - 5 * z) / 36
            for γ, κ in ((skewness, kurtosis), (beta_skewness, beta_kurtosis))
        ]
        worst = torch.maximum(worst, (quantile[0] - quantile[1]).abs())
    return worst


def order_range(drawn: Float[Tensor, draw * item], level: float = 0.95) -> tuple[Tensor, Tensor]:
    """The range that one more exchangeable draw falls into with probability `level`: order statistics at α(n + 1).

    At fewer than 2/(1 − level) − 1 draws there is none; quantiles of 40 draws cover 90 % where they say 95.

    Example:
        >>> low, high = order_range(torch.arange(1.0, 200.0))
        >>> low.item(), high.item()
        (5.0, 195.0)
    """
    n = len(drawn)
    at = math.floor((1 - level) / 2 * (n + 1) + 1e-9)
    if at < 1:
        raise ValueError(f"expected at least {math.ceil(2 / (1 - level)) - 1} draws, got {n}; pass more")
    ordered = drawn.sort(0).values
    return ordered[at - 1], ordered[n - at]


@checked
def adjusted_p(
    p: Float[np.ndarray, "*group test"],
    method: Literal["benjamini-hochberg", "benjamini-yekutieli"] = "benjamini-hochberg",
) -> Float[np.ndarray, "*group test"]:
    """False-discovery-rate q-values over the finite p-values of the last axis; NaN stays NaN and is not counted as a
    test.

    Benjamini & Hochberg (1995), or Benjamini & Yekutieli (2001), which holds under any dependence.

    Raises:
        ValueError: another method.

    Example:
        >>> adjusted_p(np.array([0.01, 0.04, np.nan])).tolist()
        [0.02, 0.04, nan]
    """
    methods = ("benjamini-hochberg", "benjamini-yekutieli")
    if not isinstance(method, str) or method not in methods:
        raise ValueError(f"expected a method of {list(methods)}, got {method!r}; pass one of them")
    p = np.asarray(p, dtype=float)
    # Not scipy's: its statistics take a second to import, and know one row of tests at a time.
    order = np.argsort(p, axis=-1)  # NaNs last
    place = np.arange(1, p.shape[-1] + 1)
    n = np.isfinite(p).sum(-1, keepdims=True)
    scaled = n * np.take_along_axis(p, order, -1) / place
    if method == "benjamini-yekutieli":
        scaled = scaled * np.where(place <= n, 1 / place, 0).sum(-1, keepdims=True)
    smallest = np.fmin.accumulate(scaled[..., ::-1], axis=-1)[..., ::-1]
    q = np.empty_like(smallest)
    np.put_along_axis(q, order, np.minimum(smallest, 1), -1)
    return np.where(np.isfinite(p), q, np.nan)


def _beta_parameters(mean: float, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = mean * (1 - mean) / variance - 1
    return mean * total, (1 - mean) * total


def _pochhammer_ratio(partition: tuple[int, ...], d: int, k: int) -> float:
    """(k/2)_κ / (d/2)_κ with (a)_κ = Π_i (a − i/2)(a − i/2 + 1) … (κ_i factors), i from 0."""
    ratio = 1.0
    for i, part in enumerate(partition):
        for j in range(part):
            ratio *= (k / 2 - i / 2 + j) / (d / 2 - i / 2 + j)
    return ratio


def _require_rank(k: int, d: int) -> None:
    if not 0 < k < d:
        raise ValueError(f"expected a rank above 0 and below {d}, got {k}; pass ranks that are proper subspaces")
