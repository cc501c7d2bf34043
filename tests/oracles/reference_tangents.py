"""Naive float64 oracles of the tangent analysis: explicit projectors, loops, the published IsoScore* of points."""

from __future__ import annotations

import numpy as np
from scipy import stats

from tests.oracles.reference import Array, isoscore_star


def energy(rows: Array, basis: Array) -> float:
    """‖G Q Qᵀ‖² / ‖G‖² with the projector written out."""
    return float(((rows @ (basis @ basis.T)) ** 2).sum() / (rows**2).sum())


def anisotropy(rows: Array, basis: Array) -> float:
    """IsoScore* of the points with the basis taken out, less that of the points."""
    left = rows @ (np.eye(rows.shape[1]) - basis @ basis.T)
    return isoscore_star(left) - isoscore_star(rows)


def semi_nmf_objective(A: Array, Z: Array, D: Array) -> float:
    return float(((A - Z @ D) ** 2).sum())


def strata(counts: list[int], number: int) -> list[int]:
    """One occurrence at a time: types of one count share the stratum of their middle occurrence."""
    line = sorted(count for count in counts for _ in range(count))  # the count each occurrence's type has
    total, place = len(line), {}
    for count in set(line):
        first = line.index(count)
        middle = first + line.count(count) / 2
        place[count] = min(int(middle / total * number), number - 1)
    return [place.get(count, -1) for count in counts]


def correlation_interval(f: Array, d: Array, group: Array) -> tuple[float, float, float]:
    """Pearson's r and the jackknife over groups on artanh r, from the values themselves."""
    r = np.corrcoef(f, d)[0, 1]
    names = np.unique(group)
    z = np.array([np.arctanh(np.corrcoef(f[group != g], d[group != g])[0, 1]) for g in names])
    variance = (len(names) - 1) / len(names) * ((z - z.mean()) ** 2).sum()
    reach = stats.t.ppf(0.975, len(names) - 1) * np.sqrt(variance)
    return float(r), float(np.tanh(np.arctanh(r) - reach)), float(np.tanh(np.arctanh(r) + reach))
