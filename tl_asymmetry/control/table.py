"""From runs, pair analyses and gradient covariances to the tidy tables of a control study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.rank_correlation import grouped_spearman
from tl_asymmetry.names import FOUND, SIGNIFICANT
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.training.runs import Run

CONTROL_COLUMNS = {
    "objective": "name of the objective",
    "grade": "its place from sharp to soft, or the number given",
    "seed": "of the order of the data",
    "compared": '"steps": after as many steps; "norm": where the delta has come as far as the slowest grade\'s',
    "matrix": "W_Q … W_out",
    "pathway": '"read" (d_model is the input) or "write" (d_model is the output)',
    "subspace": "name of the subspace the delta is held against",
    "rank": "k, the number of leading directions",
    "fraction": "share of ‖ΔW‖² in them, all layers and heads pooled",
    "relative": "fraction · d/k; 1 is isotropic",
    "median_relative": "median over layers and heads",
    "median_isotropic_z": "median over layers and heads of the standard deviations above a Haar-random subspace",
    "significant": f"share of the layers and heads tested with isotropic_{FOUND}",
    "activation_matched": "read: the reference from the inputs' own variance, pooled; write: NaN",
    "excess": "fraction / activation_matched",
    "gradient_matched": "write: the reference from this objective's own gradients at the checkpoint, pooled; read: NaN",
    "gradient_excess": "fraction / gradient_matched",
    "delta_norm": "‖ΔW‖ of all layers and heads",
    "delta_effective_rank": "median over layers and heads",
}
"""Columns of `ControlStudy.table`, in this order, and what they mean."""

CORRELATION_COLUMNS = {
    "compared": "as in the table",
    "matrix": "W_Q … W_out",
    "pathway": '"read" or "write"',
    "subspace": "as in the table",
    "rank": "k",
    "measure": '"relative", or the fraction over its matched reference: "excess" (read), "gradient_excess" (write)',
    "against": '"grade", or "gradient_effective_rank": that of the same matrix\'s δ, mean over layers and heads',
    "rho": "Spearman's ρ over objectives and seeds",
    "p": "two-sided, from permutations of the objectives; not corrected for the number of rows",
    "p_method": '"exact" (all orders), "draws" or "none"',
    "groups": "number of objectives",
}
"""Columns of `ControlStudy.correlations`."""

_KEY = ["objective", "grade", "seed", "compared"]


def head_table(pairs: Mapping[tuple[str, int, str], PairAnalysis], grades: Mapping[str, float]) -> pd.DataFrame:
    """The rows of all analyses, with what they are of."""
    frames = []
    for (name, seed, compared), pair in pairs.items():
        frame = pair.table.copy()
        values: list[Any] = [name, grades[name], seed, compared]
        for column, value in zip(reversed(_KEY), reversed(values), strict=True):
            frame.insert(0, column, value)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def control_table(heads: pd.DataFrame, d: int) -> pd.DataFrame:
    """Heads and layers pooled: fractions and references by energy, the rest by the median."""
    rows: list[dict[str, Any]] = []
    by = [*_KEY, "matrix", "pathway", "subspace", "rank"]
    for key, block in heads.groupby(by, sort=False):
        energy = block["delta_norm"].to_numpy(float) ** 2
        total = energy.sum()

        def pooled(column: str, block: pd.DataFrame = block, energy: Any = energy, total: Any = total) -> float:
            return float((block[column].to_numpy(float) * energy).sum() / total) if total > 0 else float("nan")

        tested = block["isotropic_q"].dropna()
        fraction, activation, gradient = (pooled(c) for c in ("fraction", "activation_matched", "gradient_matched"))
        entry: dict[str, Any] = {str(name): value for name, value in zip(by, key, strict=True)}
        rows.append(
            entry
            | {
                "fraction": fraction,
                "relative": fraction * d / entry["rank"],
                "median_relative": block["relative"].median(),
                "median_isotropic_z": block["isotropic_z"].median(),
                "significant": float((tested <= SIGNIFICANT).mean()) if len(tested) else float("nan"),
                "activation_matched": activation,
                "excess": fraction / activation,
                "gradient_matched": gradient,
                "gradient_excess": fraction / gradient,
                "delta_norm": float(np.sqrt(total)),
                "delta_effective_rank": block["delta_effective_rank"].median(),
            }
        )
    return pd.DataFrame(rows)[list(CONTROL_COLUMNS)]


def run_table(runs: Mapping[tuple[str, int, str], Run], grades: Mapping[str, float]) -> pd.DataFrame:
    """One row per run: how many steps it took and how far it came."""
    return pd.DataFrame(
        [
            {
                "objective": name, "grade": grades[name], "seed": seed, "compared": compared,
                "steps": len(run.losses), "distance": run.distances[-1],
                "first_loss": run.losses[0], "last_loss": run.losses[-1],
            }
            for (name, seed, compared), run in runs.items()
        ]
    )  # fmt: skip


def correlation_table(table: pd.DataFrame, gradients: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ of every matrix's fractions with the grade and with the effective rank of its δ."""
    of_δ = gradients[(gradients["side"] == "gradient") & (gradients["half"] == "all")]
    effective = of_δ.groupby(["objective", "matrix"])["effective_rank"].mean()
    names = list(dict.fromkeys(table["objective"]))
    grades = table.groupby("objective")["grade"].first()
    rows = []
    for (compared, matrix, pathway, subspace, rank), block in table.groupby(
        ["compared", "matrix", "pathway", "subspace", "rank"], sort=False
    ):
        groups = torch.tensor([names.index(name) for name in block["objective"]])
        own = "gradient_excess" if pathway == "write" else "excess"
        for measure in ("relative", own):
            values = torch.from_numpy(block[measure].to_numpy(float, copy=True))
            for against in ("grade", "gradient_effective_rank"):
                held = [grades[name] if against == "grade" else effective[name, str(matrix)] for name in names]
                ρ, p, method = grouped_spearman(values, groups, torch.tensor(held, dtype=torch.float64))
                rows.append((compared, matrix, pathway, subspace, rank, measure, against, ρ, p, method, len(names)))
    return pd.DataFrame(rows, columns=list(CORRELATION_COLUMNS))
