"""The numbers of a spectral analysis written out in float64: a full SVD, loops, and draws from Haar frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def haar(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns drawn uniformly: QR of Gaussians, signs of R's diagonal made positive."""
    Q, R = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def share_between(ΔW: Tensor, U: Tensor, V: Tensor) -> float:
    """Σ_ij (u_i · ΔW v_j)² / Σ ΔW²."""
    held = sum(float(U[:, i] @ ΔW @ V[:, j]) ** 2 for i in range(U.shape[1]) for j in range(V.shape[1]))
    return held / float((ΔW**2).sum())


def matrix_numbers(W: Tensor, ΔW: Tensor, k: int, threshold: float = 0.5) -> dict[str, float]:
    """What does not rest on draws, of one head."""
    W, ΔW = W.double(), ΔW.double()
    m, n = W.shape
    U, σ, Vh = torch.linalg.svd(W, full_matrices=False)
    U2, σ2, Vh2 = torch.linalg.svd(W + ΔW, full_matrices=False)
    V, V2 = Vh.T, Vh2.T
    total = float((ΔW**2).sum())
    share = share_between(ΔW, U[:, :k], V[:, :k])
    left, right = float(((U[:, :k].T @ ΔW) ** 2).sum()) / total, float(((ΔW @ V[:, :k]) ** 2).sum()) / total
    shrink = float((ΔW * W).sum() / (W**2).sum())
    noise = torch.tensor([[4.0 ** math.floor(math.log2(abs(w))) if w else 0.0 for w in row] for row in W.tolist()])
    leverage = torch.outer((U[:, :k] ** 2).sum(1), (V[:, :k] ** 2).sum(1))

    def intruding(new: Tensor, old: Tensor) -> int:
        return sum(max(abs(float(new[:, i] @ old[:, j])) for j in range(old.shape[1])) < threshold for i in range(k))

    def turned(old: Tensor, new: Tensor) -> float:
        cosines = torch.linalg.svdvals(old[:, :k].T @ new[:, :k]).clamp(max=1)
        return float((1 - cosines**2).mean())

    return {
        "on_principal": share,
        "on_principal_relative": share * m * n / k**2,
        "left_relative": left * m / k,
        "right_relative": right * n / k,
        "coupling": share / (left * right),
        "on_principal_unshrunk": share_between(ΔW - shrink * W, U[:, :k], V[:, :k]) * m * n / k**2,
        "on_principal_rounding": float((noise.double() * leverage).sum() / noise.double().sum()) * m * n / k**2,
        "intruders": intruding(U2, U),
        "intruders_right": intruding(V2, V),
        "rotation_left": turned(U, U2),
        "rotation_right": turned(V, V2),
        "drift": float((σ2[:k] - σ[:k]).norm() / σ[:k].norm()),
        "delta_relative_norm": math.sqrt(total / float((W**2).sum())),
    }
