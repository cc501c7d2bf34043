"""Weights that point elsewhere than those they are held against, as those of two models do that were trained apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from tl_asymmetry.models.readers.base import Weights
from tl_asymmetry.notes import Notes

UNRELATED = 0.3
"""Median cosine of a head's weights before and after under which they may be of two trainings."""


def cosines_with_base(relative_norm: npt.ArrayLike, shrink: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """⟨W, W + ΔW⟩ / ‖W‖‖W + ΔW‖, from ‖ΔW‖/‖W‖ and s = ⟨ΔW, W⟩/‖W‖²; NaN where nothing is left of W + ΔW.

    Example:
        >>> cosines_with_base([0.0, 2**0.5], [0.0, -1.0]).tolist()  # the same, and others across them
        [1.0, 0.0]
    """
    r, s = (np.asarray(values, dtype=float) for values in (relative_norm, shrink))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (1 + s) / np.sqrt(1 + 2 * s + r**2)


def unrelated(cosines: Mapping[str, npt.ArrayLike]) -> list[str]:
    """The matrices whose median cosine over heads and layers is under `UNRELATED`; NaNs do not count.

    Example:
        >>> unrelated({"W_Q": [0.99, 0.98], "W_K": [0.01, 0.98, 0.02]})
        ['W_K']
    """
    found = {matrix: np.asarray(values, dtype=float) for matrix, values in cosines.items()}
    known = {matrix: values[np.isfinite(values)] for matrix, values in found.items()}
    return [matrix for matrix, values in known.items() if len(values) and np.median(values) < UNRELATED]


def strangers(matrices: Sequence[str], *, of: str = "", than: str = "the base's") -> str:
    """What the reader must know of them, in a sentence.

    Example:
        >>> strangers(["W_Q"], than="those of step 0")[:40]
        'W_Q point elsewhere than those of step 0'
    """
    return (
        f"{', '.join(matrices)}{of} point elsewhere than {than} (median cosine of a head's weights under "
        f"{UNRELATED:g}), as weights do that were not trained from these, or for so long that little of them is left: "
        "the difference holds both models' weights, and does not tell what training changed."
    )


def warn_of_strangers(base: Weights, aligned: Weights, notes: Notes) -> None:
    """The same of two models whose weights are at hand, as a warning where any matrix is concerned."""
    found: dict[str, list[float]] = {}
    for matrix in base.matrices:
        for layer in range(base.n_layers):
            W, V = (weights.weight(layer, matrix).detach().cpu().double().flatten(-2) for weights in (base, aligned))
            found.setdefault(matrix, []).extend(np.ravel(torch.cosine_similarity(W, V, dim=-1).numpy()))
    if unlike := unrelated(found):
        notes.warn(strangers(unlike))
