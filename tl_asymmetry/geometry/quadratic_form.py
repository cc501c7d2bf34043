"""Exact tail of a weighted sum of chi-squares: the null distribution of a rank-1 subspace fraction."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Nodes of the trapezoid rule at once, and numbers at once: what stays in a core's own cache.
_NODES, _GRID = 32, 1 << 16


def fraction_tail_rank_one(
    spectrum: Float[Tensor, "item r"], d: int, fraction: Float[Tensor, " item"]
) -> Float[Tensor, " item"]:
    """P(f ≥ x) for f = Σ λ_i g_i² / Σ g_j², g Gaussian in R^d: the fraction in one Haar-random direction.

    f ≥ x where Y = Σ (λ_i − x) g_i² ≥ 0. P(Y > 0) is the Fourier inversion of Imhof (1961), taken along the vertical
    line through the saddlepoint (Rice 1980) instead of the imaginary axis, so that p keeps its relative digits far out
    in the tail, with a sinh substitution, on which the trapezoid rule converges geometrically.

    Args:
        spectrum: eigenvalues of ΔW ΔWᵀ, each row summing to 1, r ≤ d of them (the rest are 0).
        d: dimension.
        fraction: observed x.

    Returns:
        Float64 probabilities; NaN where x is NaN.
    """
    λ = spectrum.double()
    x = fraction.double()
    smallest = λ.amin(-1) if λ.shape[-1] == d else torch.zeros_like(x)
    possible = (x < λ.amax(-1)) & (x > smallest)
    # Where x is out of reach the answer is 0 or 1; put a harmless x there, so that all items go through together.
    # (Below 1e-100 the squares of `_tail` overflow, and p is 1.)
    inside = torch.where(possible, x.clamp(min=1e-100), (smallest + λ.amax(-1)) / 2)
    # Most terms equal −x: the integrand turns as exp(−i d x u) until it dies at u ~ 1/(x √d): small steps for large d.
    step = min(0.05, 1.3 / math.sqrt(d))
    a = torch.cat([λ, λ.new_zeros(len(λ), int(d > λ.shape[-1]))], -1) - inside.unsqueeze(-1)
    m = torch.ones_like(a)
    m[:, λ.shape[-1] :] = d - λ.shape[-1]
    s = _saddlepoint(a, m)
    at_once = max(1, _GRID // (_NODES * a.shape[-1]))
    p = torch.cat([_tail(*part, step=step) for part in zip(*(x.split(at_once) for x in (a, m, s)), strict=True)])
    p = torch.where(possible, p, (x <= smallest).double())
    return torch.where(x.isnan() | λ.isnan().any(-1), math.nan, p)


def _tail(a: Tensor, m: Tensor, s: Tensor, *, step: float) -> Tensor:
    """P(Σ a_i χ²_{m_i} > 0) for rows of a `[item, r]` with entries of both signs, from the saddlepoint of each."""
    lower, upper = _poles(a)
    curvature = (2 * m * (a / (1 - 2 * a * s.unsqueeze(-1))).square()).sum(-1)
    width = curvature.rsqrt()
    # The pole at 0 must stay off the line: near the mean take a line to the right of it, which is as good.
    near = s.abs() < 0.5 * width
    c = torch.where(near, torch.minimum(0.5 * width, upper / 2), s)
    distance = torch.minimum(c.abs(), torch.where(c > 0, upper - c, c - lower))
    scale = torch.minimum(distance, width)

    # On the line z = c + iu every factor is (1 − 2ac)(1 − i g u): real arithmetic, no branch of a logarithm.
    positive = 1 - 2 * a * c.unsqueeze(-1)
    g = 2 * a / positive
    total = 0.5 * step * scale / c  # the node u = 0
    last = int(14 / step)
    for first in range(1, last, _NODES):
        angles = [node * step for node in range(first, min(first + _NODES, last))]
        sinh, cosh = (torch.tensor([f(x) for x in angles], dtype=a.dtype).unsqueeze(-1) for f in (math.sinh, math.cosh))
        u = scale * sinh
        gu = g * u.unsqueeze(-1)
        size = torch.exp(-0.25 * (m * torch.log1p(gu.square())).sum(-1)) * step * scale * cosh
        phase = 0.5 * (m * torch.atan(gu)).sum(-1)
        # Re exp(i phase) / (c + iu), added up node by node: where it ends does not hang on the pieces.
        terms = size * (c * torch.cos(phase) + u * torch.sin(phase)) / (c.square() + u.square())
        totals = torch.cat([total.unsqueeze(0), terms]).cumsum(0)[1:]
        died = (size <= 1e-17 * totals.abs() * u).all(-1)
        total = totals[int(died.int().argmax()) if bool(died.any()) else -1]
        if bool(died.any()):
            break
    level = torch.exp(-0.5 * (m * torch.log(positive)).sum(-1))
    integral = level * total / math.pi
    # Left of the pole the same integral is −P(Y < 0).
    return torch.where(c > 0, integral, 1 + integral).clamp(0, 1)


def _poles(a: Tensor) -> tuple[Tensor, Tensor]:
    """The moment generating function of Y exists between these two."""
    return 1 / (2 * a.amin(-1)), 1 / (2 * a.amax(-1))


def _saddlepoint(a: Tensor, m: Tensor) -> Tensor:
    """Root of the increasing K'(s) = Σ m_i a_i / (1 − 2 a_i s), by bisection: safe next to both poles."""
    low, high = _poles(a)
    for _ in range(60):
        s = (low + high) / 2
        slope = (m * a / (1 - 2 * a * s.unsqueeze(-1))).sum(-1)
        low, high = torch.where(slope < 0, s, low), torch.where(slope < 0, high, s)
    return (low + high) / 2
