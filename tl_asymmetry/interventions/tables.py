"""From single edits to the tables of a study: effects, and where each stands among its controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.nulls import adjusted_p
from tl_asymmetry.interventions.design import EXCHANGEABLE
from tl_asymmetry.names import SIGNIFICANT

CELL = ("layer", "head", "matrix", "pathway", "intervention", "direction", "index")

OUTCOMES = {
    "kl": "KL(original ‖ edited) of next-token predictions, mean over places, nats",
    "ce": "cross-entropy on the texts, edited less original, mean over places, nats",
    "shift": "share of the way to the other model of the pair, back (removal) or over (insertion): "
    "1 − KL(other ‖ edited) / KL(other ‖ original)",
    "margin": "preference margin, edited less original, mean over pairs, nats: log-probability of chosen less that of "
    "rejected",
    "margin_shift": "share of the pair's difference in preference margin that is undone or installed",
}
"""What is measured of each edit. "Original" is the model that is edited."""

BY_MAGNITUDE = ("ce", "margin")
"""Outcomes in which an effect of either sign counts, so that sizes are compared with the controls'."""

EDIT_COLUMNS = (*CELL, "control", "draw", "dose", "norm", "norm_ratio", "norm_matched", "overlap", "delta_share",
                *OUTCOMES)  # fmt: skip
"""Columns of the table of single edits."""

STUDY_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "matrix": "W_Q … W_out",
    "pathway": '"read" or "write"',
    "intervention": '"removal" from the aligned model or "insertion" into the base',
    "direction": "kind of direction",
    "index": "1 for the leading direction of its kind",
    "outcome": "what was measured: " + "; ".join(f'"{name}" {meaning}' for name, meaning in OUTCOMES.items()),
    "control": "kind of control the effect is held against",
    "effect": "of the edit at dose 1",
    "control_mean": "mean effect of the controls",
    "control_low": "5 % quantile of the controls' effects",
    "control_median": "their median",
    "control_high": "95 % quantile",
    "percentile": "share of controls with a smaller effect, ties counting half, in per cent",
    "p": "(1 + number of controls with as large an effect or a larger one) / (1 + draws), one-sided; ce and margin by "
    "size; only from undo_matched controls, which undo as much as the edit: the others describe",
    "q": "Benjamini–Hochberg over sites of one intervention, direction, outcome and control; NaN where so few draws "
    "could not reach 0.05",
    "draws": "number of controls",
    "norm_matched": "whether the controls have the edit's norm",
    "norm_ratio": "mean norm of the controls over the edit's",
    "overlap": "mean squared cosine between the controls' directions; near 1 they are almost one",
    "edit_norm": "‖edit‖",
    "delta_share": "share of ‖ΔW‖² that the edit removes or inserts",
}
"""Columns of a study's table, in this order, and what they mean."""

ROUNDING = 1e-4
"""Relative difference below which two effects are one: a control that undoes all of a rank-1 delta is its target."""

BASELINE_COLUMNS = (
    "intervention", "original", "other", "ce_original", "ce_other", "kl_other", "margin_original", "margin_other",
    "places", "pairs",
)  # fmt: skip
"""Columns of the table of unedited models, in this order."""


def outcomes_of(sums: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """One edit's outcomes from its sums over places and the sums of the unedited models.

    Args:
        sums: kl, gain, kl_other, margin, as `measure` returns them.
        baseline: places, pairs, and sums log_prob, gain, kl_other, margin.
    """
    places, pairs = baseline["places"], baseline["pairs"]
    margin = sums["margin"] / pairs if pairs else math.nan
    return {
        "kl": sums["kl"] / places,
        "ce": (0.0 - sums["gain"]) / places,
        "shift": 1 - sums["kl_other"] / baseline["kl_other"] if baseline["kl_other"] > 0 else math.nan,
        "margin": margin,
        "margin_shift": margin * pairs / baseline["margin"] if pairs and baseline["margin"] != 0 else math.nan,
    }


def baseline_row(intervention: str, names: Mapping[str, str], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table of unedited models; margins are relative to the base, whose own is 0."""
    places, pairs = baseline["places"], baseline["pairs"]
    original, other = ("aligned", "base") if intervention == "removal" else ("base", "aligned")
    between = baseline["margin"] / pairs if pairs else math.nan  # of the other model, less the original's
    ce = -baseline["log_prob"] / places
    return {
        "intervention": intervention,
        "original": names[original],
        "other": names[other],
        "ce_original": ce,
        "ce_other": ce - baseline["gain"] / places,
        "kl_other": baseline["kl_other"] / places,
        "margin_original": -between if original == "aligned" else 0.0 * between,
        "margin_other": between if other == "aligned" else 0.0 * between,
        "places": places,
        "pairs": pairs,
    }


def edit_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of single edits, typed."""
    table = pd.DataFrame(rows, columns=list(EDIT_COLUMNS))
    floats = ["dose", "norm", "norm_ratio", "overlap", "delta_share", *OUTCOMES]
    whole = dict.fromkeys(("head", "draw"), "Int64") | dict.fromkeys(("layer", "index"), "int64")
    return table.astype(dict.fromkeys(floats, "float64") | whole | {"norm_matched": "bool"})


def study_table(edits: pd.DataFrame, outcomes: Sequence[str]) -> tuple[pd.DataFrame, int]:
    """Every target at dose 1 against each kind of its controls, and how many draws q would have needed.

    Returns:
        The table, columns as in `STUDY_COLUMNS`, and the largest number of draws that some family of sites lacked for
        its q (0 if none did).
    """
    rows = []
    for key, block in edits[edits["dose"] == 1].groupby(list(CELL), sort=False, dropna=False):
        cell = dict(zip(CELL, key, strict=True))
        target = block[block["control"] == "target"].iloc[0]
        for kind, controls in block[block["control"] != "target"].groupby("control", sort=False):
            for outcome in outcomes:
                rows.append(
                    {
                        **cell,
                        "outcome": outcome,
                        "control": kind,
                        **_standing(target, controls, outcome, tested=kind in EXCHANGEABLE),
                        "norm_matched": bool(controls["norm_matched"].all()),
                        "norm_ratio": float(controls["norm_ratio"].mean()),
                        "overlap": float(controls["overlap"].mean()),
                        "edit_norm": float(target["norm"]),
                        "delta_share": float(target["delta_share"]),
                    }
                )
    table = pd.DataFrame(rows, columns=list(STUDY_COLUMNS))
    table = table.astype({"layer": "int64", "head": "Int64", "index": "int64", "q": "float64"})
    lacking = 0
    for _, family in table.groupby(["intervention", "direction", "index", "outcome", "control"], sort=False):
        p = family["p"].to_numpy(float)
        tests = int(np.isfinite(p).sum())
        needed = math.ceil(tests / SIGNIFICANT) - 1
        if tests and family["draws"].min() >= needed:
            table.loc[family.index, "q"] = adjusted_p(p)
        elif tests:
            lacking = max(lacking, needed)
    return table, lacking


def _standing(target: pd.Series, controls: pd.DataFrame, outcome: str, *, tested: bool) -> dict[str, Any]:
    effect, of_controls = float(target[outcome]), controls[outcome].to_numpy(float)
    if target["norm"] == 0:  # nothing was edited: no test, and nothing to hold anything against
        of_controls = np.full_like(of_controls, math.nan)
    found = standing(effect, of_controls, outcome)
    return found if tested else {**found, "p": math.nan}


def standing(effect: float, controls: np.ndarray, outcome: str) -> dict[str, Any]:
    """Where an effect stands among those of its controls; effects within rounding of each other are tied."""
    if math.isnan(effect) or np.isnan(controls).any():
        known = ("control_mean", "control_low", "control_median", "control_high", "percentile", "p")
        return {"effect": effect, **dict.fromkeys(known, math.nan), "draws": len(controls)}
    size, sizes = (abs(effect), np.abs(controls)) if outcome in BY_MAGNITUDE else (effect, controls)
    sizes = np.where(np.isclose(sizes, size, rtol=ROUNDING, atol=0), size, sizes)
    low, median, high = np.quantile(controls, [0.05, 0.5, 0.95])
    return {
        "effect": effect,
        "control_mean": float(controls.mean()),
        "control_low": float(low),
        "control_median": float(median),
        "control_high": float(high),
        "percentile": 100 * float(((sizes < size) + 0.5 * (sizes == size)).mean()),
        "p": (1 + int((sizes >= size).sum())) / (1 + len(sizes)),
        "draws": len(controls),
    }
