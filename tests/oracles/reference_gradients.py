"""Naive float64 oracles of the gradient side: perturbations through TransformerLens's own hooks, loops over tokens.

Nothing here comes from tl_asymmetry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tests.oracles.reference import Array, float64

PRODUCTS = {"W_Q": "attn.hook_q", "W_K": "attn.hook_k", "W_V": "attn.hook_v", "W_O": "hook_attn_out",
            "W_in": "mlp.hook_pre", "W_out": "hook_mlp_out"}  # fmt: skip
"""Where TransformerLens shows the product of each matrix (in a model without gate or post-norms)."""
INPUTS = {"W_O": "attn.hook_z", "W_out": "mlp.hook_post"}


def upstream_gradients(
    model: Any, loss: Callable[[Callable[[torch.Tensor], torch.Tensor]], torch.Tensor], layer: int, matrix: str
) -> list[Array]:
    """δ of one matrix for every forward pass of `loss`: ∂ loss / ∂ ε, with ε added to the product by a hook."""
    added: list[torch.Tensor] = []

    def shift(y: torch.Tensor, hook: Any) -> torch.Tensor:
        added.append(torch.zeros_like(y, requires_grad=True))
        return y + added[-1]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.{PRODUCTS[matrix]}", shift)])

    total = loss(logits)
    return [float64(g) for g in torch.autograd.grad(total, added)]


def inputs(model: Any, tokens: torch.Tensor, layer: int, matrix: str) -> Array:
    """a of one matrix, `[batch, pos, ...]`: cached, or rebuilt from the normalised stream and the norm's own gain."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    if matrix in INPUTS:
        return float64(cache[f"blocks.{layer}.{INPUTS[matrix]}"])
    norm = "ln1" if matrix in ("W_Q", "W_K", "W_V") else "ln2"
    return float64(cache[f"blocks.{layer}.{norm}.hook_normalized"] * getattr(model.blocks[layer], norm).w
                   + getattr(model.blocks[layer], norm).b)  # fmt: skip


def summed_cross_entropy(tokens: torch.Tensor, mask: torch.Tensor) -> Callable[[Any], torch.Tensor]:
    """−Σ log p of the counted tokens, one at a time."""

    def loss(logits: Any) -> torch.Tensor:
        probabilities = logits(tokens).exp()
        total = torch.zeros((), dtype=probabilities.dtype)
        for i in range(len(tokens)):
            for t in range(1, tokens.shape[1]):
                if mask[i, t]:
                    p = probabilities[i, t - 1]
                    total = total - torch.log(p[tokens[i, t]] / p.sum())
        return total

    return loss


def moment_of_nonzero(rows: Array) -> tuple[Array, int]:
    """Σ x xᵀ / n over the rows that are not zero, and n."""
    total, n = np.zeros((rows.shape[1], rows.shape[1])), 0
    for row in rows:
        if any(row != 0):
            total += np.outer(row, row)
            n += 1
    return total / n, n


def cross_moment(a: Array, δ: Array) -> Array:
    """Σ_t a_t δ_tᵀ."""
    total = np.zeros((a.shape[1], δ.shape[1]))
    for x, y in zip(a, δ, strict=True):
        total += np.outer(x, y)
    return total


def marchenko_pastur_edge(eigenvalues: Array, n: int, draws: int = 40) -> float:
    """Edge of the law with σ² from the median of simulated spectra of independent Gaussian rows."""
    d, generator = len(eigenvalues), np.random.default_rng(0)
    medians = []
    for _ in range(draws):
        x = generator.standard_normal((n, d))
        λ = np.linalg.eigvalsh(x.T @ x / n)[::-1][: min(n, d)]
        medians.append(np.median(λ))
    positive = np.sort(eigenvalues)[::-1][: min(n, d)]
    return float(np.median(positive) / np.mean(medians) * (1 + (d / n) ** 0.5) ** 2)
