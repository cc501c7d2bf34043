"""The largest eigenvalue of a symmetric operator that is only known by its products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operator = Callable[[Tensor], Tensor]
"""v ↦ M v for a symmetric M, both `[size]`."""


def largest_eigenvalue(
    operator: Operator, size: int, *, tolerance: float = 1e-3, most: int = 60, seed: int = 0
) -> tuple[float, float]:
    """λ_max of a positive semidefinite operator by the Lanczos method with full reorthogonalisation (Golub & Van Loan).

    Args:
        operator: M; products may come in any floating type, vectors are kept in float64.
        size: dimension.
        tolerance: relative residual ‖M y − θ y‖ / θ at which to stop.
        most: products at most.
        seed: of the first vector.

    Returns:
        The Ritz value θ, a lower bound of λ_max, and its relative residual: some eigenvalue lies within
        `residual · θ` of θ.

    Example:
        >>> spectrum = torch.linspace(0, 5, 100, dtype=torch.float64)
        >>> value, residual = largest_eigenvalue(lambda v: spectrum * v, 100, tolerance=1e-6)
        >>> round(value, 6)
        5.0
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(size, dtype=torch.float64, generator=generator)
    Q, α, β = [q / q.norm()], [], []
    value = residual = 0.0
    for _ in range(min(most, size)):
        w = operator(Q[-1]).double().cpu()
        α.append((Q[-1] @ w).item())
        for _ in range(2):  # twice is enough (Parlett 1980)
            for basis in Q:
                w = w - (basis @ w) * basis
        β.append(w.norm().item())
        T = torch.diag(torch.tensor(α, dtype=torch.float64))
        off = torch.tensor(β[:-1], dtype=torch.float64)
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
        λ, S = torch.linalg.eigh(T)
        value = λ[-1].item()
        if value <= 0:
            return 0.0, 0.0
        residual = β[-1] * S[-1, -1].abs().item() / value
        if residual <= tolerance or β[-1] <= 1e-12 * value:
            break
        Q.append(w / β[-1])
    return value, residual
