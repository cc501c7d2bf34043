"""The fixed bases of a tangent analysis: fitted once on early activations, with their control subspaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.nonnegative import semi_nmf
from tl_asymmetry.geometry.sample import RowSample
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace
from tl_asymmetry.geometry.tangent import Control, control_subspaces, moment_energies
from tl_asymmetry.models.capture import merged
from tl_asymmetry.names import BASIS_METHODS
from tl_asymmetry.tangents.observation import Observation

METHODS: tuple[str, ...] = tuple(BASIS_METHODS)
"""How a basis can be taken."""

Key = tuple[str, int, str, int]
"""Method, rank, point, layer."""


@dataclass(frozen=True)
class TangentBases:
    """One orthonormal basis for each method, rank, point and layer, and how each was come by."""

    bases: dict[Key, Float[Tensor, "d rank"]]
    """Q_T, float64."""
    rows: list[dict[str, Any]]
    """One each, JSON-ready: explained, overlap_pca, and for semi-NMF relative_error, spread, stability, converged,
    directions (independent ones found, at most rank)."""
    draws: int
    """Controls for each."""
    control: Control
    """Of which kind."""
    seed: int
    """Of the controls."""

    def stack(self, key: Key) -> Float[Tensor, "basis d rank"]:
        """The basis and its control subspaces behind it; drawn once and the same for every checkpoint and head."""
        if key not in self._stacks:
            Q = self.bases[key]
            label = "/".join(map(str, (self.seed, *key)))
            seed = xxhash.xxh3_64_intdigest(label.encode()) >> 1
            N = control_subspaces(Q, self.draws, control=self.control, seed=seed)
            self._stacks[key] = torch.cat([Q.unsqueeze(0), N])
        return self._stacks[key]

    @cached_property
    def _stacks(self) -> dict[Key, Tensor]:
        return {}

    @property
    def notes(self) -> list[str]:
        """What the reader must know of them."""
        return [
            f"semi-NMF of rank {row['rank']} at layer {row['layer']} {row['point']} found {row['directions']} "
            "independent directions: its basis is filled up with arbitrary ones"
            for row in self.rows
            if row.get("directions", row["rank"]) < row["rank"]
        ]

    @property
    def table(self) -> pd.DataFrame:
        """`rows` as a DataFrame."""
        return pd.DataFrame({name: [row.get(name) for row in self.rows] for name in _LAYOUT}).astype(_LAYOUT)

    def arrays(self) -> dict[str, Tensor]:
        """`{"basis/METHOD/RANK/POINT": [layer, d, rank]}`."""
        families = dict.fromkeys(key[:3] for key in self.bases)
        return {
            f"basis/{'/'.join(map(str, family))}": torch.stack(
                [Q for key, Q in self.bases.items() if key[:3] == family]
            )
            for family in families
        }


def fit_bases(
    early: Sequence[Observation],
    *,
    methods: Sequence[str],
    ranks: Sequence[int],
    centered: bool,
    starts: int,
    sample_rows: int,
    draws: int,
    control: Control,
    seed: int,
) -> TangentBases:
    """Fit every basis on the activations of the early checkpoints, pooled.

    PCA: leading eigenvectors of the uncentred second moment (or the covariance). Semi-NMF: the span of D in A ≈ Z D on
    a sample of rows, the best of several starts.
    """
    bases: dict[Key, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for point, layer in early[0].activations:
        moments = merged(o.activations[point, layer] for o in early).pooled()
        principal = principal_subspace(moments, centered=centered)
        for method in methods:
            sample = _pooled_sample([o.samples[point, layer] for o in early], sample_rows) if method != "pca" else None
            for rank in ranks:
                key = method, rank, point, layer
                row: dict[str, Any] = {"method": method, "rank": rank, "point": point, "layer": layer}
                if sample is None:
                    bases[key] = principal.basis[:, :rank]
                else:
                    centre = moments.mean.to(sample) if centered else 0
                    bases[key], fit = _semi_nmf_basis(sample - centre, rank, starts=starts, seed=seed)
                    row |= fit
                row["explained"] = moment_energies(moments.second_moment, bases[key].unsqueeze(0)).item()
                row["overlap_pca"] = Subspace(bases[key]).overlap(principal.truncate(rank))
                rows.append(row)
    return TangentBases(bases, rows, draws, control, seed)


def bases_from(
    arrays: Mapping[str, Tensor], rows: list[dict[str, Any]], draws: int, control: Control, seed: int
) -> TangentBases:
    """What `TangentBases.arrays` gave, again."""
    bases: dict[Key, Tensor] = {}
    for name, layers in arrays.items():
        _, method, rank, point = name.split("/")
        bases |= {(method, int(rank), point, layer): Q for layer, Q in enumerate(layers)}
    return TangentBases(bases, rows, draws, control, seed)


def _pooled_sample(samples: Sequence[RowSample], size: int) -> Tensor:
    pooled = RowSample(size)
    for sample in samples:
        pooled.merge(sample)
    return pooled.rows


def _semi_nmf_basis(rows: Tensor, rank: int, *, starts: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    fit = semi_nmf(rows, rank, seeds=range(seed, seed + starts), tol=1e-4, max_iter=300)
    D = fit.D.double()
    best, worst = min(fit.objectives), max(fit.objectives)
    return torch.linalg.qr(D.mT).Q, {
        "relative_error": fit.relative_error,
        "spread": worst / best - 1 if best > 0 else 0.0,
        "stability": fit.stability.mean().item(),
        "converged": fit.converged,
        "directions": int(torch.linalg.matrix_rank(D, rtol=1e-8)),
    }


_LAYOUT = {
    "method": "object", "rank": "int64", "point": "object", "layer": "int64", "explained": "float64",
    "overlap_pca": "float64", "relative_error": "float64", "spread": "float64", "stability": "float64",
    "converged": "boolean", "directions": "Int64",
}  # fmt: skip
