"""One checkpoint's gradients held against the fixed bases: rows of the tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry._lazy import pd, special
from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.nulls import adjusted_p
from tl_asymmetry.geometry.tangent import (
    anisotropy_shares,
    control_size,
    energies,
    factor_of,
    moment_energies,
    rank_p,
)
from tl_asymmetry.models.capture import merged
from tl_asymmetry.names import kind_of
from tl_asymmetry.tangents.bases import TangentBases
from tl_asymmetry.tangents.observation import OUTPUT, Observation

TABLE = {
    "step": "int64", "phase": "object", "gradient": "object", "site": "object", "layer": "int64", "head": "Int64",
    "point": "object", "method": "object", "rank": "int64", "energy": "float64", "normal_energy": "float64",
    "ratio": "float64", "p": "float64", "q": "float64", "size": "float64", "spectrum_expected": "float64",
    "excess": "float64", "largest_energy": "float64", "isotropy": "float64", "anisotropy": "float64",
    "normal_anisotropy": "float64", "anisotropy_p": "float64", "gradient_norm": "float64", "samples": "int64",
}  # fmt: skip
"""Columns of `TangentAnalysis.table` and their types."""

STRATA = {
    "step": "int64", "phase": "object", "layer": "int64", "method": "object", "rank": "int64", "stratum": "int64",
    "log_frequency_low": "float64", "log_frequency_high": "float64", "tokens": "int64", "energy": "float64",
    "normal_energy": "float64", "ratio": "float64", "p": "float64", "gradient_share": "float64", "distance": "float64",
}  # fmt: skip
"""Columns of `TangentAnalysis.strata` and their types."""

FREQUENCY = {
    "step": "int64", "phase": "object", "layer": "int64", "pearson": "float64", "ci_low": "float64",
    "ci_high": "float64", "tokens": "int64",
}  # fmt: skip
"""Columns of `TangentAnalysis.frequency` and their types."""

CHECKPOINTS = {"step": "int64", "phase": "object", "loss": "float64", "basis": "bool"}
"""Columns of `TangentAnalysis.checkpoints` and their types."""

LAYOUTS = {"table": TABLE, "strata": STRATA, "frequency": FREQUENCY, "checkpoints": CHECKPOINTS}

Rows = dict[str, list[dict[str, Any]]]
"""Rows of each of the tables in `LAYOUTS`, by name. JSON-ready."""


@dataclass(frozen=True)
class Held:
    """What a checkpoint's gradients are held against, and how the model is made."""

    bases: TangentBases
    """Fixed bases with their controls."""
    families: Sequence[tuple[str, int]]
    """Method and rank of each."""
    edges: Sequence[tuple[float, float]]
    """Log-frequency edges of the strata."""
    strata: bool
    """Whether strata were asked for."""
    centred_keys: bool
    """Whether softmax hides from W_K what the keys of a sequence share."""


def rows_of(observation: Observation, phase: str, held: Held, *, basis: bool) -> Rows:
    """All rows of one checkpoint."""
    where = {"step": observation.step, "phase": phase}
    table = [*_weight_rows(observation, held), *_token_rows(observation, held)]
    _add_sizes(table, held)
    _add_q(table)
    for row in table:
        del row["_spectrum"]
    return {
        "table": [where | row for row in table],
        "strata": [where | row for row in _stratum_rows(observation, held)],
        "frequency": [where | row for row in _frequency_rows(observation)],
        "checkpoints": [where | {"loss": observation.loss, "basis": basis}],
    }


def frame(rows: Sequence[dict[str, Any]], layout: dict[str, str]) -> pd.DataFrame:
    """Rows as a DataFrame with the columns and types of a layout."""
    return pd.DataFrame({name: [row[name] for row in rows] for name in layout}).astype(layout)


def _weight_rows(observation: Observation, held: Held) -> Iterator[dict[str, Any]]:
    for (layer, matrix), gradient in observation.weights.items():
        point = kind_of(matrix).point
        moments = observation.activations[point, layer]
        reference = moments.within_covariance if matrix == "W_K" and held.centred_keys else moments.second_moment
        # rows are outputs, columns the residual axis
        by_head = gradient.mT if gradient.ndim == 3 else None
        whole = by_head.flatten(0, 1) if by_head is not None else gradient.mT
        for method, rank in held.families:
            Q = held.bases.stack((method, rank, point, layer))
            expected = moment_energies(reference, Q[:1]).item()
            about = {
                "gradient": "weight", "site": matrix, "layer": layer, "point": point, "method": method, "rank": rank,
            }  # fmt: skip
            parts = [(None, whole), *(enumerate(by_head) if by_head is not None else ())]
            for head, G in parts:
                yield about | {"head": head, "samples": len(G)} | _measures(
                    energies(G, Q), *anisotropy_shares(G - G.mean(0), Q), expected=expected, rank=rank,
                    spectrum=_spectrum_of_rows(G), norm=G.norm().item(),
                )  # fmt: skip


def _token_rows(observation: Observation, held: Held) -> Iterator[dict[str, Any]]:
    for layer in _layers(observation):
        parts = [moments for (at, _), moments in observation.tokens.items() if at == layer]
        moments = merged(parts)
        M, F = moments.second_moment, factor_of(moments.covariance)
        spectrum = torch.linalg.eigvalsh(M).clamp(min=0).flip(0)
        reference = observation.activations[OUTPUT, layer].second_moment
        for method, rank in held.families:
            Q = held.bases.stack((method, rank, OUTPUT, layer))
            about = {
                "gradient": "activation", "site": OUTPUT, "layer": layer, "head": None, "point": OUTPUT,
                "method": method, "rank": rank, "samples": moments.count,
            }  # fmt: skip
            yield about | _measures(
                moment_energies(M, Q), *anisotropy_shares(F, Q), expected=moment_energies(reference, Q[:1]).item(),
                rank=rank, spectrum=spectrum, norm=math.sqrt(M.trace().item()),
            )  # fmt: skip


def _measures(
    energy: Float[Tensor, " basis"],
    isotropy: Float[Tensor, ""],
    anisotropy: Float[Tensor, " basis"],
    *,
    expected: float,
    rank: int,
    spectrum: Float[Tensor, " d"],
    norm: float,
) -> dict[str, Any]:
    """The columns of one row; the first basis is the one under test, the others its controls."""
    own, normal = energy[0].item(), energy[1:].mean().item()
    return {
        "energy": own,
        "normal_energy": normal,
        "ratio": _ratio(own, normal),
        "p": rank_p(energy[0], energy[1:]).item(),
        "spectrum_expected": expected,
        "excess": _ratio(own, expected),
        "largest_energy": (spectrum[:rank].sum() / spectrum.sum()).item(),
        "isotropy": isotropy.item(),
        "anisotropy": anisotropy[0].item(),
        "normal_anisotropy": anisotropy[1:].mean().item(),
        "anisotropy_p": rank_p(anisotropy[0], anisotropy[1:]).item(),
        "gradient_norm": norm,
        "_spectrum": spectrum,
    }


def _ratio(own: float, other: float) -> float:
    """own / other; infinite where only the other is nothing."""
    if other > 0:
        return own / other
    return math.inf if own > 0 else math.nan


def _spectrum_of_rows(G: Float[Tensor, "sample d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of GᵀG, descending, with zeros for what G does not reach."""
    λ = torch.linalg.svdvals(G).square()
    return torch.nn.functional.pad(λ, (0, G.shape[1] - len(λ)))


def _add_sizes(table: Sequence[dict[str, Any]], held: Held) -> None:
    """What a nominal 0.05 of the energy test means for each row's gradient."""
    for rank in dict.fromkeys(rank for _, rank in held.families):
        mine = [row for row in table if row["rank"] == rank]
        if mine:
            spectra = torch.stack([row["_spectrum"] for row in mine])
            sizes, _ = control_size(spectra, rank, held.bases.draws, control=held.bases.control, seed=held.bases.seed)
            for row, size in zip(mine, sizes.tolist(), strict=True):
                row["size"] = size


def _add_q(table: Sequence[dict[str, Any]]) -> None:
    """Benjamini–Hochberg over the layers (and heads) of one site, method and rank."""
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table:
        key = row["gradient"], row["site"], row["method"], row["rank"], row["head"] is None
        families.setdefault(key, []).append(row)
    for rows in families.values():
        for row, q in zip(rows, adjusted_p(np.array([row["p"] for row in rows])).tolist(), strict=True):
            row["q"] = q


def _stratum_rows(observation: Observation, held: Held) -> Iterator[dict[str, Any]]:
    if not held.strata or not observation.tokens:
        return
    for layer in _layers(observation):
        traces = {s: _trace(m) for (at, s), m in observation.tokens.items() if at == layer}
        for method, rank in held.families:
            Q = held.bases.stack((method, rank, OUTPUT, layer))
            for number, (low, high) in enumerate(held.edges):
                moments = observation.tokens.get((layer, number))
                energy = torch.full((len(Q),), torch.nan) if moments is None else _energy(moments, Q)
                own, normal = energy[0].item(), energy[1:].mean().item()
                count, total = observation.distances[layer, number].tolist()
                yield {
                    "layer": layer, "method": method, "rank": rank, "stratum": number + 1, "log_frequency_low": low,
                    "log_frequency_high": high, "tokens": 0 if moments is None else moments.count, "energy": own,
                    "normal_energy": normal, "ratio": _ratio(own, normal),
                    "p": rank_p(energy[0], energy[1:]).item(),
                    "gradient_share": traces.get(number, 0.0) / sum(traces.values()),
                    "distance": total / count if count else math.nan,
                }  # fmt: skip


def _frequency_rows(observation: Observation) -> Iterator[dict[str, Any]]:
    if not observation.tokens:
        return
    for layer, groups in enumerate(observation.correlation):
        pearson, low, high = correlation_interval(groups)
        yield {
            "layer": layer, "pearson": pearson, "ci_low": low, "ci_high": high, "tokens": int(groups[:, 0].sum()),
        }  # fmt: skip


def correlation_interval(groups: Float[Tensor, "group six"]) -> tuple[float, float, float]:
    """Pearson correlation of two variables from group sums (n, Σf, Σf², Σd, Σd², Σfd), and its 95 % interval.

    Delete-one-group jackknife on Fisher's z = artanh r, with the t quantile: tokens of one text are not independent,
    and the usual interval would be too short. NaN under three groups, and where a variable is constant.
    """
    used = groups[groups[:, 0] > 0]
    g = len(used)
    whole = used.sum(0)
    r = _pearson(whole)
    if g < MINIMUM_GROUPS or math.isnan(r):
        return r, math.nan, math.nan
    z = np.arctanh(np.clip([_pearson(whole - group) for group in used], -1 + 1e-15, 1 - 1e-15))
    variance = (g - 1) / g * np.square(z - z.mean()).sum()
    reach = special.stdtrit(g - 1, 0.975) * math.sqrt(variance)
    centre = math.atanh(min(max(r, -1 + 1e-15), 1 - 1e-15))
    return r, math.tanh(centre - reach), math.tanh(centre + reach)


def _pearson(sums: Tensor) -> float:
    n, f, ff, d, dd, fd = sums.tolist()
    if n < 2:
        return math.nan
    variances = (ff / n - (f / n) ** 2) * (dd / n - (d / n) ** 2)
    return (fd / n - f / n * d / n) / math.sqrt(variances) if variances > 0 else math.nan


def _layers(observation: Observation) -> list[int]:
    return sorted({layer for layer, _ in observation.tokens})


def _energy(moments: StreamingMoments, Q: Tensor) -> Tensor:
    return moment_energies(moments.second_moment, Q)


def _trace(moments: StreamingMoments) -> float:
    return moments.count * moments.second_moment.trace().item()
