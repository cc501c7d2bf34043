"""Many tests that belong together: families, layers in them, heads in these, each entered through the one above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from tl_asymmetry.geometry.nulls import adjusted_p
from tl_asymmetry.geometry.padding import padded_stack
from tl_asymmetry.names import SIGNIFICANT

Family = TypeVar("Family")


@dataclass(frozen=True)
class Tree(Generic[Family]):
    """p and q of every node. q ≤ 0.05 says: found, at a false-discovery rate of 5 %."""

    family_p: Mapping[Family, float]
    """Simes over the family's layers."""
    family_q: Mapping[Family, float]
    """Benjamini–Hochberg over families."""
    layer_p: Mapping[Family, Float[np.ndarray, " layer"]]
    """Of the heads pooled or of Simes over the heads, whichever is smaller, doubled."""
    layer_q: Mapping[Family, Float[np.ndarray, " layer"]]
    head_q: Mapping[Family, Float[np.ndarray, "layer head"]]


def simes(p: Float[np.ndarray, "*group test"]) -> Float[np.ndarray, "*group"]:
    """min_i n p_(i) / i over the last axis (Simes 1986): a p of "none of these is true". NaNs are no tests.

    Exact for independent tests, conservative under positive dependence; under any other it needs a factor Σ 1/i.

    Example:
        >>> simes(np.array([[0.01, 0.5, np.nan], [np.nan, np.nan, np.nan]])).tolist()
        [0.02, nan]
    """
    ordered = np.sort(p, axis=-1)  # NaNs last
    n = np.isfinite(p).sum(-1, keepdims=True)
    candidates = n * ordered / np.arange(1, p.shape[-1] + 1)
    found = np.where(np.isfinite(candidates), candidates, np.inf).min(-1)
    return np.where(np.isfinite(found), np.minimum(found, 1), np.nan)


def of_layers(
    heads: Float[np.ndarray, "*layer head"], pooled: Float[np.ndarray, "*layer"]
) -> Float[np.ndarray, "*layer"]:
    """p of each layer: Simes over its heads or that of the heads pooled, the smaller one doubled."""
    own = simes(heads)
    together = np.where(np.isfinite(pooled), pooled, np.inf)
    both = np.minimum(1, 2 * np.minimum(own, together))
    several = np.isfinite(heads).sum(-1) > 1
    return np.where(several & np.isfinite(pooled), both, own)


def hierarchy(
    heads: Mapping[Family, Float[np.ndarray, "layer head"]],
    pooled: Mapping[Family, Float[np.ndarray, " layer"]],
    *,
    level: float = SIGNIFICANT,
) -> Tree[Family]:
    """Benjamini–Hochberg over families, then over the layers of those selected, then over the heads of these.

    Inside, the level is `level` times the share selected above (Benjamini & Bogomolov 2014): the false-discovery rate
    over families and the expected mean false-discovery proportion over selected families stay at `level`. Where a
    level offers one test only (the one "head" of an MLP matrix) it is passed through.

    Args:
        heads: p of every head, by family; NaN where there is no test.
        pooled: p of each layer's heads pooled into one delta; all NaN to leave it to the heads.
        level: at which the shares selected are taken; q below it means found.
    """
    families = list(heads)
    p, together = (
        padded_stack([torch.from_numpy(of[family]) for family in families]).numpy() for of in (heads, pooled)
    )
    layer_p = of_layers(p, together)
    family_p = simes(layer_p)
    family_q = adjusted_p(family_p)
    share = _selected_share(family_q, level)
    layer_q = _inside(adjusted_p(layer_p), share, family_q[:, None])
    within = share * _selected_share(layer_q, level)
    head_q = _inside(adjusted_p(p), within[:, None, None], layer_q[..., None])
    return Tree(
        dict(zip(families, family_p.tolist(), strict=True)),
        dict(zip(families, family_q.tolist(), strict=True)),
        *(_by_family(every, heads) for every in (layer_p, layer_q, head_q)),
    )


def _by_family(
    every: NDArray[np.floating], heads: Mapping[Family, NDArray[np.floating]]
) -> dict[Family, NDArray[np.floating]]:
    """As many layers and heads of each as it has."""
    return {
        family: of[tuple(slice(size) for size in p.shape[: of.ndim])]
        for of, (family, p) in zip(every, heads.items(), strict=True)
    }


def _selected_share(q: Float[np.ndarray, "*group test"], level: float) -> Float[np.ndarray, "*group"]:
    """Share of the tests that are selected; of at least one, so that what is not selected has a q too."""
    tested = np.isfinite(q).sum(-1)
    return np.where(tested > 0, np.maximum(1, (q <= level).sum(-1)) / np.maximum(1, tested), 1.0)


def _inside(q: NDArray[np.floating], share: NDArray[np.floating], above: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.where(np.isfinite(q), np.minimum(1, np.maximum(q / share, above)), np.nan)
