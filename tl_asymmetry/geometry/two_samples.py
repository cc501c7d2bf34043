"""Do two groups of runs differ by more than runs of one group do among themselves?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tl_asymmetry._lazy import special
from tl_asymmetry.names import SIGNIFICANT


class Separation(NamedTuple):
    """How far apart two means are, with the spread inside each group as the yardstick."""

    low: Float[np.ndarray, " item"]
    """Lower end of the 95 % interval of mean(a) − mean(b)."""
    high: Float[np.ndarray, " item"]
    """Upper end."""
    p: Float[np.ndarray, " item"]
    """Two-sided probability of means so far apart where both groups have one mean."""


def separation(a: Float[np.ndarray, "run_a item"], b: Float[np.ndarray, "run_b item"]) -> Separation:
    """Welch's t (1947) between two groups of runs, each with a spread of its own; NaN where a group has one run.

    Degrees of freedom are Satterthwaite's for groups of one size (size at 0.05, three runs each: 0.035 where both
    spread alike, 0.056 where one spreads four times as far). Between groups of different sizes that approximation
    fails (0.10, and 0.022 at a nominal 0.001, with two runs that spread four times as far as five others), so there
    they are the smaller group's, which never rejects too often (Mickey & Brown 1966).

    Example:
        >>> found = separation(np.array([[1.0], [1.2], [1.1]]), np.array([[0.0], [0.1], [0.2]]))
        >>> bool(found.p < 0.001), bool(found.low < 1.0 < found.high)
        (True, True)
    """
    counts = len(a), len(b)
    difference = a.mean(0) - b.mean(0)
    if min(counts) < 2:
        nothing = np.full(difference.shape, np.nan)
        return Separation(nothing, nothing, nothing)
    v = [x.var(0, ddof=1) / len(x) for x in (a, b)]
    error = np.sqrt(v[0] + v[1])
    df = np.full(difference.shape, min(counts) - 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        if counts[0] == counts[1]:
            df = (v[0] + v[1]) ** 2 / sum(x**2 / (n - 1) for x, n in zip(v, counts, strict=True))
        p = 2 * special.stdtr(df, -np.abs(difference) / error)
    half = special.stdtrit(df, 1 - SIGNIFICANT / 2) * error
    return Separation(difference - half, difference + half, p)
