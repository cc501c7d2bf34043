"""Naive float64 oracles: loops, explicit projectors, explicit SVD. Nothing here comes from tl_asymmetry."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]


def float64(x: ArrayLike) -> Array:
    """A numpy copy in float64 of an array or a tensor, bf16 included."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    return np.array(x, dtype=np.float64)


# --- moments -------------------------------------------------------------------------------------------------------


def second_moment(rows: Array) -> Array:
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for row in rows:
        total += np.outer(row, row)
    return total / len(rows)


def covariance(rows: Array) -> Array:
    return second_moment(rows - rows.mean(axis=0))


def within_covariance(sequences: list[Array]) -> Array:
    """Second moment of rows about the mean of the sequence each belongs to; empty sequences have none."""
    return second_moment(np.concatenate([s - s.mean(axis=0) for s in sequences if len(s)]))


# --- subspaces and fractions ---------------------------------------------------------------------------------------


def energy_profile(delta: Array, basis: Array) -> Array:
    """‖q qᵀ ΔW‖² / ‖ΔW‖² for each column q, by explicit d × d projectors; the residual axis is the first."""
    total = (delta**2).sum()
    return np.array([(np.outer(q, q) @ delta).ravel() @ (np.outer(q, q) @ delta).ravel() / total for q in basis.T])


def subspace_fraction(delta: Array, basis: Array) -> float:
    projected = (basis @ basis.T) @ delta
    return (projected**2).sum() / (delta**2).sum()


def haar_basis(d: int, k: int, generator: np.random.Generator) -> Array:
    """Gram–Schmidt on Gaussian columns."""
    columns: list[Array] = []
    while len(columns) < k:
        v = generator.standard_normal(d)
        for _ in range(2):
            for q in columns:
                v = v - (q @ v) * q
        columns.append(v / np.sqrt(v @ v))
    return np.stack(columns, axis=1)


def haar_fractions(spectrum: Array, d: int, k: int, draws: int, generator: np.random.Generator) -> Array:
    """Fractions of a diagonal delta of that spectrum in random k-subspaces, by QR."""
    λ = np.zeros(d)
    λ[: len(spectrum)] = spectrum / spectrum.sum()
    fractions = np.empty(draws)
    for i in range(draws):
        Q, _ = np.linalg.qr(generator.standard_normal((d, k)))
        fractions[i] = λ @ (Q**2).sum(axis=1)
    return fractions


# --- significance --------------------------------------------------------------------------------------------------


def adjusted_p(p: list[float], yekutieli: bool) -> list[float]:
    """q_i = min over j with p_j ≥ p_i of p_j · n / rank_j, at most 1."""
    n = len(p)
    factor = sum(1 / i for i in range(1, n + 1)) if yekutieli else 1.0
    q = []
    for p_i in p:
        candidates = []
        for p_j in p:
            if p_j >= p_i:
                rank = sum(1 for p_m in p if p_m <= p_j)
                candidates.append(p_j * n * factor / rank)
        q.append(min(1.0, *candidates))
    return q


def log_jackknife(estimate: float, replicates: list[float], t: float, *, corrected: bool) -> tuple[float, float, float]:
    """Lower and upper end, and 1 where the bias is over one standard error."""
    g = len(replicates)
    logs = [np.log(r) for r in replicates]
    mean = sum(logs) / g
    variance = 0.0
    for value in logs:
        variance += (value - mean) ** 2
    variance *= (g - 1) / g
    bias = (g - 1) * (mean - np.log(estimate))
    centre = np.log(estimate) - (bias if corrected else 0)
    ends = (float(np.exp(centre + sign * t * variance**0.5)) for sign in (-1, 1))
    return (*ends, float(abs(bias) > variance**0.5))


def rotated_updates(C: Array, s: Array, draws: int, seed: int) -> list[Array]:
    """C^{1/2} G diag(s) with Haar-random G."""
    generator = np.random.default_rng(seed)
    λ, V = np.linalg.eigh(C)
    root = V @ np.diag(np.sqrt(np.maximum(λ, 0))) @ V.T
    return [root @ haar_basis(len(C), len(s), generator) @ np.diag(s) for _ in range(draws)]


def rotation_tail(h: Array, s: Array) -> float:
    """P(tr(H G S Gᵀ) ≥ 0) by Lugannani & Rice at the saddlepoint, every e_ij written out; h and s of length d."""
    d = len(h)
    e = np.outer(h - h.mean(), s - s.mean()).ravel() / np.sqrt((d - 1) * (d + 2))
    e = e / np.sqrt(2 * (e**2).sum())
    mean = h.sum() * s.sum() / d / np.sqrt(2 * ((h - h.mean()) ** 2).sum() * ((s - s.mean()) ** 2).sum()
                                           / ((d - 1) * (d + 2)))  # fmt: skip
    low, high = 0.5 / e.min(), 0.5 / e.max()
    for _ in range(300):
        t = (low + high) / 2
        if mean + (e / (1 - 2 * t * e) - e).sum() < 0:
            low = t
        else:
            high = t
    K = t * mean - 0.5 * (np.log1p(-2 * t * e) + 2 * t * e).sum()
    w, u = np.sign(t) * np.sqrt(-2 * K), t * np.sqrt((2 * (e / (1 - 2 * t * e)) ** 2).sum())
    return float(special.ndtr(-w) + np.exp(-0.5 * w**2) / np.sqrt(2 * np.pi) * (1 / u - 1 / w))


def cross_fitted(groups: list[Array], bases: list[Array], k: int, *, adam: bool) -> float:
    """Σ_g tr(Q_{−g}ᵀ S_g Q_{−g}) / Σ_g tr S_g from the groups' rows, one token at a time."""
    inside = total = 0.0
    for g, rows in enumerate(groups):
        rest = np.concatenate([other for i, other in enumerate(groups) if i != g])
        scale = 1 / np.sqrt((rest**2).sum(0)) if adam else np.ones(rows.shape[1])
        for a in rows:
            inside += ((bases[g][:, :k].T @ (scale * a)) ** 2).sum()
            total += ((scale * a) ** 2).sum()
    return float(inside / total)


def simes(p: list[float]) -> float:
    ordered = sorted(p)
    return min(1.0, min(len(p) * value / (i + 1) for i, value in enumerate(ordered)))


# --- spectra -------------------------------------------------------------------------------------------------------


def effective_rank(eigenvalues: Array) -> float:
    total, entropy = eigenvalues.sum(), 0.0
    for λ in eigenvalues:
        if λ > 0:
            entropy -= λ / total * np.log(λ / total)
    return float(np.exp(entropy))


def isoscore_star(points: Array) -> float:
    """IsoScore* with ζ = 0 (Rudman & Eickhoff 2023): steps of the published definition, in its order."""
    n = points.shape[1]
    variances = np.linalg.svd(covariance(points), compute_uv=False)  # principal components
    normalised = np.sqrt(n) * variances / np.sqrt((variances**2).sum())
    distance = np.sqrt(((normalised - np.ones(n)) ** 2).sum())
    defect = distance / np.sqrt(2 * (n - np.sqrt(n)))
    occupied = (n - defect**2 * (n - np.sqrt(n))) ** 2 / n**2
    return float((n * occupied - 1) / (n - 1))


# --- products ------------------------------------------------------------------------------------------------------


def product_change(X: Array, Y: Array, X_new: Array, Y_new: Array) -> Array:
    """X'Y'ᵀ − XYᵀ of one head, d × d."""
    return X_new @ Y_new.T - X @ Y.T
