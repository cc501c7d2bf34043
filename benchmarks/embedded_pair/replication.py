"""Several tangent analyses, one per training seed, side by side: what holds in every seed and what does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from tl_asymmetry.names import BASIS_METHODS, SIGNIFICANT
from tl_asymmetry.tangents.result import TangentAnalysis

Runs = Mapping[tuple[str, int], TangentAnalysis]
"""Analyses by architecture and seed."""

_KEYS = ["model", "gradient", "method", "phase"]


def replication_table(runs: Runs) -> pd.DataFrame:
    """One row per architecture, gradient, method and phase: means over seeds of medians over matrices and steps.

    energy, normal (controls), ratio, p≤0.05 (share of rows), size (what a random basis would have), spectrum
    (spectrum-aware null), excess (energy over it, with its standard deviation over seeds), ΔIso and that of the
    controls.
    """
    rows = _per_seed(runs)
    means = rows.groupby(_KEYS, sort=False).mean(numeric_only=True).drop(columns="seed")
    spread = rows.groupby(_KEYS, sort=False)["excess"].std()
    means.insert(list(means.columns).index("excess") + 1, "± seeds", spread)
    return means.reset_index()


def replication_strata(runs: Runs) -> pd.DataFrame:
    """One row per architecture, method and stratum (1 = rarest tokens) over the late checkpoints: means over seeds."""
    frames = []
    for (model, seed), result in runs.items():
        late = result.strata[result.strata["phase"] == "late"]
        medians = late.groupby(["method", "stratum"])[["energy", "ratio", "gradient_share", "distance"]].median()
        frames.append(medians.reset_index().assign(model=model, seed=seed))
    return (
        pd.concat(frames)
        .groupby(["model", "method", "stratum"], sort=False)[["energy", "ratio", "gradient_share", "distance"]]
        .mean()
        .reset_index()
    )


def replication_frequency(runs: Runs) -> pd.DataFrame:
    """Correlation of log-frequency and distance to the centroid at the last step, per architecture and layer."""
    frames = []
    for (model, seed), result in runs.items():
        last = result.frequency[result.frequency["step"] == result.frequency["step"].max()]
        frames.append(last.assign(model=model, seed=seed))
    grouped = pd.concat(frames).groupby(["model", "layer"], sort=False)["pearson"]
    return pd.DataFrame({"pearson": grouped.mean(), "min": grouped.min(), "max": grouped.max()}).reset_index()


def replication_claims(runs: Runs) -> list[str]:
    """For each part of the paper's claim, in how many seeds it holds here, next to the spectrum-aware null.

    A seed counts where the median over matrices, layers and steps is on the claimed side.
    """
    rows = _per_seed(runs)
    claims: tuple[tuple[str, Callable[[pd.DataFrame], pd.Series]], ...] = (
        ("more energy than the normal controls", lambda r: r["ratio"] > 1),
        ("more energy than the activations' own spectrum would give", lambda r: r["excess"] > 1),
        ("more of the anisotropy than the normal controls", lambda r: r["ΔIso"] > r["normal ΔIso"]),
    )
    sentences = []
    for (model, gradient), block in rows.groupby(["model", "gradient"], sort=False):
        parts = []
        for words, holds in claims:
            counts = [f"{BASIS_METHODS[str(m)]} {_seeds(r, holds(r))}" for m, r in block.groupby("method", sort=False)]
            parts.append(f"{words} in {', '.join(counts)}")
        early = block[block["phase"] == "early"].set_index(["method", "seed"])
        late = block[block["phase"] == "late"].set_index(["method", "seed"])
        for column, words in (("ratio", "ratio to the controls"), ("excess", "excess over the spectrum")):
            falls = (early[column] > late[column]).reset_index(name="falls")
            counts = [
                f"{BASIS_METHODS[str(m)]} {_fraction(r['falls'])}" for m, r in falls.groupby("method", sort=False)
            ]
            parts.append(f"{words} higher early than late in {', '.join(counts)}")
        sentences.append(f"{str(model).capitalize()}, {gradient} gradients: {'; '.join(parts)} seeds.")
    return sentences


def _per_seed(runs: Runs) -> pd.DataFrame:
    """Medians over whole matrices, layers and steps of each run, p-values as shares of rows."""
    frames = []
    for (model, seed), result in runs.items():
        whole = result.table[result.table["head"].isna() & (result.table["rank"] == result.config["shown_rank"])]
        for (gradient, method, phase), block in whole.groupby(["gradient", "method", "phase"], sort=False):
            medians = block[list(_NAMES)].median().rename(_NAMES)
            shares = {
                "p≤0.05": (block["p"] <= SIGNIFICANT).mean(),
                "ΔIso p≤0.05": (block["anisotropy_p"] <= SIGNIFICANT).mean(),
            }
            about = {"model": model, "seed": seed, "gradient": gradient, "method": method, "phase": phase}
            frames.append(about | medians.to_dict() | shares)
    return pd.DataFrame(frames)[[*_KEYS, "seed", *_ORDER]]


_NAMES = {
    "energy": "energy", "normal_energy": "normal", "ratio": "ratio", "size": "size", "spectrum_expected": "spectrum",
    "excess": "excess", "anisotropy": "ΔIso", "normal_anisotropy": "normal ΔIso",
}  # fmt: skip
_ORDER = (
    "energy", "normal", "ratio", "p≤0.05", "size", "spectrum", "excess", "ΔIso", "normal ΔIso", "ΔIso p≤0.05",
)  # fmt: skip


def _seeds(rows: pd.DataFrame, holds: pd.Series) -> str:
    """Seeds in which it holds in both phases, of all."""
    return _fraction(holds.groupby(rows["seed"]).all())


def _fraction(condition: pd.Series) -> str:
    return f"{int(condition.sum())}/{len(condition)}"
