"""A product of two thin matrices without ever multiplying them out."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.precision import exact_products


def factored_svd(
    left: Float[Tensor, "*#head d r"], right: Float[Tensor, "*#head e r"]
) -> tuple[Float64[Tensor, "*head d n"], Float64[Tensor, "*head n"], Float64[Tensor, "*head e n"]]:
    """Singular values of left rightᵀ and their vectors, n = min(d, e, r), from two thin QRs and one r × r SVD.

    Factors without columns (a product of zero) count as one column of zeros.

    Args:
        left: `[..., d, r]`.
        right: `[..., e, r]`; leading axes (heads) are broadcast against each other.

    Returns:
        U, σ (descending), V with left rightᵀ = U diag(σ) Vᵀ; float64 on the factors' device.

    Example:
        >>> U, σ, V = factored_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0], [0.0], [0.0]]))
        >>> round(σ.item(), 6)
        10.0
    """
    if left.shape[-1] == 0:
        left, right = (side.new_zeros(*side.shape[:-1], 1) for side in (left, right))
    Q_left, R_left = torch.linalg.qr(left.double())
    Q_right, R_right = torch.linalg.qr(right.double())
    with exact_products(left.device):
        core = R_left @ R_right.mT
        U, σ, Vt = torch.linalg.svd(core, full_matrices=False)
        return Q_left @ U, σ, Q_right @ Vt.mT


def factored_energy(
    left: Float[Tensor, "*#head d r"], right: Float[Tensor, "*#head e r"], basis: Float[Tensor, "d k"]
) -> Float64[Tensor, "*head k"]:
    """‖q_iᵀ left rightᵀ‖² = (q_iᵀ left) (rightᵀ right) (leftᵀ q_i) for each column of a basis. Float64."""
    with exact_products(left.device):
        S = right.double()
        projected = basis.to(left.device, torch.float64).mT @ left.double()
        return ((projected @ (S.mT @ S)) * projected).sum(-1).clamp(min=0)
