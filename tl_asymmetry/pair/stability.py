"""How much each head's verdict depends on choices: every fraction, held against chance under every variant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.hierarchy import hierarchy
from tl_asymmetry.geometry.nulls import Asked, IsotropicNull, Told
from tl_asymmetry.names import FOUND, SIGNIFICANT
from tl_asymmetry.pair.sensitivity import unit_of

STABILITY_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "expert": "expert of a mixture; NA elsewhere",
    "matrix": "W_Q … W_out",
    "subspace": "the subspace whose variants are compared",
    "rank": "k",
    "relative": "of the analysis itself, from its table",
    "isotropic_q": "of the analysis itself",
    "variants": "how many variants there are, the analysis's own among them",
    "low": "smallest relative over the variants",
    "median": "median relative over the variants",
    "high": "largest relative over the variants",
    "low_variant": "the variant that gives the smallest",
    "high_variant": "the variant that gives the largest",
    "significant": f"share of the variants in which {FOUND}, each in the place of the analysis's own choice",
    "verdict": f'"concentrated" ({FOUND} in all variants), "not" (in none), "depends", "none" (no test)',
}
"""Columns of `PairAnalysis.stability()`, in this order, and what they mean."""

_CHOICES = ("activations", "centered", "first_position", "fold_norm")
_PLACE = ["layer", "head", "expert"]
Family = tuple[str, str]
"""Matrix and subspace."""

Spectra = Mapping[str, tuple[Tensor, Tensor | None]]
"""By matrix: eigenvalues of ΔW ΔWᵀ of each head [layer, head, r], and of a layer's heads as one delta [layer, s]."""


def stability_table(
    variants: pd.DataFrame, table: pd.DataFrame, spectra: Spectra, *, widths: Mapping[str, int], seed: int
) -> pd.DataFrame:
    """One row per layer × head × matrix × subspace × rank, over all variants of the subspace.

    The isotropic null belongs to the delta, not to the subspace, so every variant is held against the same law. A
    variant's tests stand in the analysis's hierarchy in the place of its own, with all other families as they are.

    Args:
        variants: `PairAnalysis.sensitivity()`.
        table: `PairAnalysis.table`.
        spectra: of the deltas.
        widths: d by matrix.
        seed: of the null's draws.
    """
    of_ranks = [_OfRank.of(int(str(rank)), of, table, spectra) for rank, of in variants.groupby("rank", sort=False)]
    for d in {*widths.values()}:
        null = IsotropicNull(d, seed=seed)
        every = [
            tests
            for one in of_ranks
            for of in (one.own, one.varied)
            for (matrix, _), tests in of.items()
            if widths[matrix] == d
        ]
        told = iter(null.tails_of([question for tests in every for question in tests.asked()]))
        for tests in every:
            tests.hear(told)
    blocks = []
    for one in of_ranks:
        k = one.rank
        heads = {family: tests.heads[0] for family, tests in one.own.items()}
        pooled = {family: tests.pooled[0] for family, tests in one.own.items()}
        for family, tests in one.varied.items():
            by_variant = tests.variants
            q = np.stack([
                hierarchy(heads | {family: p}, pooled | {family: together}).head_q[family][tests.places]
                for p, together in zip(tests.heads, tests.pooled, strict=True)
            ])  # fmt: skip
            relative = np.stack([block["relative"].to_numpy(float) for block in by_variant])
            known = np.isfinite(q).all(0)
            share = np.where(known, (q <= SIGNIFICANT).mean(0), np.nan)
            names = np.array([_name(block.iloc[0]) for block in by_variant])
            finite = np.isfinite(relative).all(0)
            blocks.append(
                by_variant[0][_PLACE].assign(
                    matrix=family[0],
                    subspace=family[1],
                    rank=k,
                    variants=len(by_variant),
                    low=relative.min(0),
                    median=np.median(relative, axis=0),
                    high=relative.max(0),
                    low_variant=np.where(finite, names[np.nan_to_num(relative).argmin(0)], ""),
                    high_variant=np.where(finite, names[np.nan_to_num(relative).argmax(0)], ""),
                    significant=share,
                    verdict=np.select([~known, share == 1, share == 0], ["none", "concentrated", "not"], "depends"),
                )
            )
    found = pd.concat(blocks, ignore_index=True)
    keys = [*_PLACE, "matrix", "subspace", "rank"]
    merged = found.merge(table[[*keys, "relative", "isotropic_q"]], on=keys, how="left", validate="one_to_one")
    return merged[list(STABILITY_COLUMNS)]


class _Tests:
    """p of one matrix, subspace and rank against chance, in one or several variants."""

    heads: Float[np.ndarray, "variant layer head"]
    pooled: Float[np.ndarray, "variant layer"]

    def __init__(
        self,
        k: int,
        variants: Sequence[pd.DataFrame],
        spectrum: Float[Tensor, "layer head r"],
        pooled: Float[Tensor, "layer s"] | None,
    ) -> None:
        self.k, self.variants = k, variants
        self.places = variants[0]["layer"].to_numpy(int), unit_of(variants[0])
        self._spectra = spectrum, pooled
        self._fraction = torch.full((len(variants), *spectrum.shape[:2]), torch.nan, dtype=torch.float64)
        for i, rows in enumerate(variants):
            self._fraction[i][self.places] = torch.tensor(rows["fraction"].to_numpy(float))

    def asked(self) -> list[Asked]:
        """Of the heads, and of the heads pooled where there are several."""
        (spectrum, pooled), fraction, count = self._spectra, self._fraction, len(self.variants)
        asked: list[Asked] = [(spectrum.flatten(0, 1).repeat(count, 1), self.k, fraction.flatten())]
        if pooled is not None:
            energy = spectrum.nan_to_num().sum(-1)
            whole = (fraction.nan_to_num() * energy).sum(-1) / energy.sum(-1)
            asked.append((pooled.repeat(count, 1), self.k, whole.flatten()))
        return asked

    def hear(self, told: Iterator[Told]) -> None:
        """Take the answers, in the same order."""
        shape = self._fraction.shape
        self.heads = next(told)[0].reshape(shape)
        self.pooled = np.full(shape[:2], np.nan) if self._spectra[1] is None else next(told)[0].reshape(shape[:2])


@dataclass(frozen=True)
class _OfRank:
    """All tests of one rank."""

    rank: int
    """k."""
    own: Mapping[Family, _Tests]
    """The analysis's own, by matrix and subspace."""
    varied: Mapping[Family, _Tests]
    """In all variants."""

    @classmethod
    def of(cls, k: int, variants: pd.DataFrame, table: pd.DataFrame, spectra: Spectra) -> _OfRank:
        """From the variants at a rank."""

        def tests(of: pd.DataFrame, by: list[str]) -> dict[Family, _Tests]:
            return {
                (str(matrix), str(subspace)): _Tests(
                    # groupby keeps the rows' order: layers and heads within each variant.
                    k, [block for _, block in rows.groupby(by, sort=False)] if by else [rows], *spectra[str(matrix)]
                )
                for (matrix, subspace), rows in of.groupby(["matrix", "subspace"], sort=False)
            }  # fmt: skip

        return cls(k, tests(table[table["rank"] == k], []), tests(variants, list(_CHOICES)))


def _name(row: pd.Series) -> str:
    """A variant in words."""
    center = "centred" if row["centered"] else "uncentred"
    if row["fold_norm"] != "-":
        folded = "final norm folded" if row["fold_norm"] == "folded" else "final norm not folded"
        return f"{row['activations']} unembedding, {center}, {folded}"
    return f"{row['activations']} activations, {center}, first position {row['first_position']}"
