"""Deltas by chance of a head's own norm and spectrum, and one direction of known size planted in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.hierarchy import hierarchy
from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.names import SIGNIFICANT

Family = TypeVar("Family")

_SMALL_P = 1e-12


def by_chance(
    spectrum: Float[Tensor, "head r"],
    rows: int,
    columns: int,
    generator: torch.Generator,
    root: Float64[Tensor, "rows rows"] | None = None,
) -> Float64[Tensor, "head rows columns"]:
    """Unit-norm deltas G √S Vᵀ, or C^{1/2} G √S Vᵀ, with Haar-random frames G and V.

    Args:
        spectrum: S, squared singular values of each head's delta, or of C^{-1/2} times it.
        rows: of a delta, the residual axis.
        columns: of a delta.
        generator: of the frames.
        root: a factor of C; None: the identity, which makes the deltas isotropic.
    """
    heads, r = len(spectrum), min(rows, columns, spectrum.shape[1])
    G, V = (
        torch.linalg.qr(torch.randn(heads, n, r, generator=generator, dtype=torch.float64)).Q for n in (rows, columns)
    )
    left = G * spectrum[:, :r].double().sqrt().unsqueeze(1)
    if root is not None:
        left = root.cpu() @ left
    delta = left @ V.mT
    return delta / torch.linalg.matrix_norm(delta, keepdim=True)


def planted(
    background: Float64[Tensor, "head rows columns"],
    residual: Float64[Tensor, "head rows"],
    other: Float64[Tensor, "head columns"],
    share: float,
) -> Float64[Tensor, "head rows columns"]:
    """√(1 − share) of a background and √share of the outer product of two unit vectors, at unit norm."""
    mark = residual.unsqueeze(-1) * other.unsqueeze(-2)
    delta = (1 - share) ** 0.5 * background + share**0.5 * mark
    return delta / torch.linalg.matrix_norm(delta, keepdim=True)


def directions_within(
    basis: Float[Tensor, "rows k"], count: int, generator: torch.Generator
) -> Float64[Tensor, "count rows"]:
    """Random unit vectors in the span of an orthonormal basis."""
    inside = torch.randn(count, basis.shape[1], generator=generator, dtype=torch.float64)
    with exact_products(basis.device):
        return torch.nn.functional.normalize(inside, dim=-1) @ basis.double().cpu().mT


def lone_threshold(tested: Mapping[Family, Bool[np.ndarray, "layer head"]], family: Family, layer: int) -> float:
    """The largest p at which the hierarchy calls one head of a layer where every other test has p = 1.

    q is proportional to a lone p for as long as it is called, so that one run of the hierarchy gives it.

    Args:
        tested: which heads are tested, by family.
        family: where the one head is.
        layer: of it.

    Example:
        >>> tested = {"W_Q": np.ones((4, 4), bool), "W_O": np.ones((4, 4), bool)}
        >>> round(0.05 / lone_threshold(tested, "W_Q", 0))  # 2 families, 4 layers, 4 heads, pooled or not
        64
    """
    heads = {name: np.where(mask, 1.0, np.nan) for name, mask in tested.items()}
    pooled = {name: np.where(mask.any(1) & (mask.shape[1] > 1), 1.0, np.nan) for name, mask in tested.items()}
    head = int(tested[family][layer].argmax())
    heads[family][layer, head] = _SMALL_P
    return SIGNIFICANT * _SMALL_P / float(hierarchy(heads, pooled).head_q[family][layer, head])
