"""One number for the shape of a spectrum. Every function takes eigenvalues (σ² for a matrix) along the last axis."""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.subspace import existing_directions


@checked
def effective_rank(eigenvalues: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """exp(entropy(λ / Σλ)): between 1 and d (Roy & Vetterli 2007, on eigenvalues). NaN for an all-zero spectrum.

    Example:
        >>> effective_rank(torch.ones(4)).item()
        4.0
    """
    p = _shares(eigenvalues)
    return torch.exp(torch.special.entr(p).sum(-1))


@checked
def participation_ratio(eigenvalues: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """(Σλ)² / Σλ²: between 1 and d. NaN for an all-zero spectrum."""
    return 1 / _shares(eigenvalues).square().sum(-1)


@checked
def stable_rank(eigenvalues: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
    """Σλ / λ_max, for a matrix ‖W‖²_F / ‖W‖²_2 (Rudelson & Vershynin 2007). NaN for an all-zero spectrum."""
    return 1 / _shares(eigenvalues).amax(-1)


@checked
def isoscore(covariance: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
    """Isotropy (PR − 1) / (d − 1) in [0, 1]: 0 for one direction, 1 for a sphere.

    Equal to IsoScore* without shrinkage (Rudman & Eickhoff 2023), and no eigensolve is needed: PR = tr(C)² / tr(C²).

    Example:
        >>> isoscore(torch.eye(3)).item()
        1.0
    """
    d = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace.square() / covariance.square().sum((-2, -1)) - 1) / (d - 1)


@checked
def marchenko_pastur_edge(eigenvalues: Float[Tensor, " d"], samples: int) -> float:
    """Upper edge σ²(1 + √γ)² of the noise bulk of a sample second moment, γ = d / samples (Marchenko & Pastur 1967).

    σ² is fitted to the bulk: median positive eigenvalue / median of the law at γ. Samples of text are dependent, so
    the number of eigenvalues above the edge is descriptive, not a test.

    Args:
        eigenvalues: `[d]`, of a second moment (already divided by the number of samples).
        samples: number of samples n.

    Raises:
        ValueError: samples < 1, or no positive eigenvalue.
    """
    if eigenvalues.ndim != 1 or not len(eigenvalues):
        raise ValueError(f"expected eigenvalues [d], got {list(eigenvalues.shape)}; pass those of one moment")
    if samples < 1:
        raise ValueError(f"expected samples >= 1, got {samples}; pass the number of tokens behind the moment")
    # n samples have rank n, copies among them less: what float32 leaves beyond it would pull the median down.
    positive = eigenvalues.sort(descending=True).values[: min(samples, existing_directions(eigenvalues))]
    if not bool(eigenvalues.max() > 0):
        raise ValueError("expected at least one positive eigenvalue, got none; pass a second moment's eigenvalues")
    gamma = len(eigenvalues) / samples
    # quantile: of an even number, `median` takes the lower of the two in the middle
    variance = positive.quantile(0.5).item() / _marchenko_pastur_median(gamma)
    return variance * (1 + math.sqrt(gamma)) ** 2


def _shares(eigenvalues: Tensor) -> Tensor:
    # Eigensolvers return −1e-17 for 0: clamp, so that the entropy stays real.
    λ = eigenvalues.clamp(min=0)
    return λ / λ.sum(-1, keepdim=True)


@cache
def _marchenko_pastur_median(gamma: float) -> float:
    """Median of the law's continuous part for unit variance."""
    a, b = (1 - math.sqrt(gamma)) ** 2, (1 + math.sqrt(gamma)) ** 2
    θ = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    x = a + (b - a) * (1 - torch.cos(θ)) / 2
    # dx = (b − a)/2 sin θ dθ and √((b − x)(x − a)) = (b − a)/2 sin θ: the substitution removes both end singularities.
    density = torch.sin(θ).square() / x.clamp(min=1e-300)
    if gamma == 1:
        density[0] = 2 * density[1] - density[2]
    mass = torch.cumulative_trapezoid(density, θ)
    half = torch.searchsorted(mass, mass[-1] / 2)
    return x[half + 1].item()
