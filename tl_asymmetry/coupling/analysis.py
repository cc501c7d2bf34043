"""Do directions of training move linear centroids more than random ones? (arXiv:2604.25143)"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import check_draws, checked, listed
from tl_asymmetry.coupling.response import random_directions
from tl_asymmetry.coupling.result import CouplingStudy
from tl_asymmetry.coupling.trajectories import Trajectory, as_trajectory
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.rolling_svd import RollingSVD
from tl_asymmetry.notes import Notes
from tl_asymmetry.results.provenance import versions

ESTIMATORS = ("update", "gradient")
"""Rows of the window: differences of consecutive checkpoints, or the loss's gradient at each checkpoint."""

ALIGNMENTS = ("backward", "forward")
"""Whether a checkpoint's window ends with it (the paper's text) or begins with it (the author's code)."""


@checked
@with_fresh_settings
def direction_coupling(
    source: Any,
    *,
    estimators: Sequence[str] = ESTIMATORS,
    windows: Sequence[int] = (20,),
    alignments: Sequence[str] = ("backward",),
    rank: int = 3,
    checkpoints: int = 40,
    draws: int = 20,
    fresh: bool = True,
    method: str = "exact",
    epsilon: float = 0.005,
    maximum: bool = False,
    seed: int = 200,
    progress: bool = False,
) -> CouplingStudy:
    """R_k = A(v_k) / median A(random direction) along a training run, for directions of updates and of gradients.

    v_k are the leading right singular vectors of a window of W rows, uncentred: "update" rows are differences of
    consecutive checkpoints' θ, "gradient" rows the loss's gradient at each checkpoint on a fixed batch, one stream for
    each objective. A is `centroid_response`. The update has one stream; its directions are held against every
    objective's centroids.

    Args:
        source: a `grokking.GrokRun`, or a trajectory: `GrokTrajectory` with probes of your own, `BlockTrajectory` for
            a language model's attention block.
        estimators: some of `ESTIMATORS`.
        windows: numbers of rows W; with W < rank there are W directions.
        alignments: some of `ALIGNMENTS`. At the run's ends a backward window has fewer rows, a forward one is moved
            back until it fits, as the author's code does.
        rank: directions of each window.
        checkpoints: how many are looked at, evenly spaced over those the run kept.
        draws: random unit directions; their median response is the unit of R.
        fresh: draw them anew at each checkpoint, as published; False keeps one set for the whole run.
        method: "exact" (mixed derivative) or "finite_difference" (published).
        epsilon: of the finite difference, relative to ‖θ‖.
        maximum: also λ_max = the largest A of any unit direction, by Lanczos at every checkpoint (as dear as all the
            rest), for `share_of_max = A / λ_max`, which compares across models.
        seed: of the random directions.
        progress: show a progress bar.

    Raises:
        ValueError: unknown words, rank or draws or windows below 1, fewer than two checkpoints.

    Example:
        >>> from tl_asymmetry.grokking import Recipe, train
        >>> run = train("add", p=7, seed=1, recipe=Recipe(steps=30, every=5), sizes={"d_model": 16, "d_mlp": 32})
        >>> study = direction_coupling(run, windows=(3,), checkpoints=3)
        >>> sorted(study.table["estimator"].unique()), study.table["step"].unique().tolist()
        (['gradient', 'update'], [0, 15, 30])
    """
    estimators = listed("estimators", estimators, str, instead='estimators=("update",)')
    windows = listed("windows", windows, int, instead="windows=(20,)")
    alignments = listed("alignments", alignments, str, instead='alignments=("backward",)')
    _check(estimators, windows, alignments, rank, checkpoints, draws, method)
    trajectory = as_trajectory(source)
    notes = Notes()
    n = len(trajectory.steps)
    chosen = sorted(set(torch.linspace(0, n - 1, min(checkpoints, n), dtype=torch.float64).int().tolist()))
    streams = _streams(trajectory, estimators, progress)
    if any(len(rows) < W for W in windows for rows in streams.values()):
        shortest = min(len(rows) for rows in streams.values())
        notes.warn(f"expected {max(windows)} rows for a window, got {shortest} in all: longer windows stay short")
    rows: list[dict[str, Any]] = []
    levels: list[dict[str, Any]] = []
    for index in tqdm(chosen, desc="couplings", unit="checkpoint", disable=not progress):
        for objective in trajectory.objectives:
            candidates = list(_candidates(streams, index, objective, windows, alignments, rank))
            size = next(iter(streams.values())).shape[1]
            random = random_directions(draws, size, seed=(seed, index) if fresh else seed)
            problem = trajectory.problem(index, objective)
            V = torch.cat([*(c.directions for c in candidates), random])
            A = problem.exact(V) if method == "exact" else problem.finite_difference(V, epsilon)
            level = {"step": trajectory.steps[index], "objective": objective, **_spread(A[-draws:], size)}
            if maximum:
                level["largest"], level["largest_residual"] = problem.largest(seed=seed)
            levels.append(level)
            at = 0
            for c in candidates:
                for k in range(len(c.directions)):
                    rows.append(
                        {"step": trajectory.steps[index], "objective": objective, "estimator": c.estimator,
                         "window": c.window, "alignment": c.alignment, "rows": c.rows, "k": k + 1,
                         "singular_value": c.singular_values[k].item(), "response": A[at].item(),
                         "ratio": A[at].item() / level["random_median"],
                         "share_of_max": A[at].item() / level["largest"] if maximum else float("nan")}
                    )  # fmt: skip
                    at += 1
    config = {
        "arguments": {"estimators": list(estimators), "windows": list(windows), "alignments": list(alignments),
                      "rank": rank, "checkpoints": checkpoints, "draws": draws, "fresh": fresh, "method": method,
                      "epsilon": epsilon, "maximum": maximum, "seed": seed},
        "trajectory": trajectory.record(), "parameters": size, "versions": versions(),
    }  # fmt: skip
    return CouplingStudy(
        table=pd.DataFrame(rows),
        levels=pd.DataFrame(levels),
        accuracy=trajectory.accuracy.reset_index(drop=True),
        config=config,
        notes=tuple(notes.lines),
        arrays={},
    )


@checked
@with_fresh_settings
def coupling_sensitivity(
    source: Any,
    *,
    step: int,
    estimator: str = "gradient",
    window: int = 20,
    rank: int = 3,
    epsilons: Sequence[float] = (0.0005, 0.001, 0.005, 0.02, 0.05),
    seeds: Sequence[int] = (0, 1, 2),
    draws: int = 20,
) -> pd.DataFrame:
    """R̄ at one checkpoint, by step size of the finite difference, by the exact derivative, and by random draw.

    For other probe seeds pass `GrokTrajectory(run, probe_seed=…)` as the source.

    Args:
        source: as in `direction_coupling`.
        step: one of its checkpoints.
        estimator, window, rank, draws: as there, with a backward window.
        epsilons: relative step sizes.
        seeds: of the random directions.

    Returns:
        One row per method, epsilon (NaN for exact), seed and objective: `mean_ratio`, `ratio_1`.

    Raises:
        ValueError: no checkpoint at that step.
    """
    trajectory = as_trajectory(source)
    if step not in trajectory.steps:
        raise ValueError(f"expected a step with a checkpoint, got {step}; pass one such as {trajectory.steps[-1]}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"expected estimator among {', '.join(ESTIMATORS)}, got {estimator!r}; pass one of these")
    epsilons = listed("epsilons", epsilons, float, instead="epsilons=[0.005]")
    seeds = listed("seeds", seeds, int, instead="seeds=[0]")
    if not all(0 < epsilon < 1 for epsilon in epsilons):
        raise ValueError(f"expected epsilons between 0 and 1, got {epsilons}; pass relative step sizes such as 0.005")
    if window < 1:
        raise ValueError(f"expected window >= 1, got {window}; pass window=20")
    check_draws(draws)
    index = trajectory.steps.index(step)
    streams = _streams(trajectory, [estimator], progress=False)
    rows = []
    for objective in trajectory.objectives:
        (window_of,) = _candidates(streams, index, objective, [window], ["backward"], rank)
        problem = trajectory.problem(index, objective)
        for seed in seeds:
            random = random_directions(draws, problem.θ.size, seed=(seed, index))
            V = torch.cat([window_of.directions, random])
            found = {"exact": (float("nan"), problem.exact(V))}
            found |= {f"ε = {e:g}": (e, problem.finite_difference(V, e)) for e in epsilons}
            for name, (epsilon, A) in found.items():
                ratios = A[:-draws] / A[-draws:].quantile(0.5)
                rows.append(
                    {"objective": objective, "method": "exact" if name == "exact" else "finite_difference",
                     "epsilon": epsilon, "seed": seed, "mean_ratio": ratios.mean().item(), "ratio_1": ratios[0].item()}
                )  # fmt: skip
    return pd.DataFrame(rows)


def window_rows(
    rows: Float[Tensor, "rows parameters"], index: int, window: int, alignment: str, *, differences: bool
) -> Float[Tensor, "held parameters"]:
    """The rows of a checkpoint's window.

    Args:
        rows: one for each checkpoint; for differences, row i leads from checkpoint i to i + 1.
        index: the checkpoint.
        window: rows wanted.
        alignment: "backward": up to and with this checkpoint; "forward": from it on, moved back at the end.
        differences: whether rows are differences.
    """
    if alignment == "forward":
        start = max(0, min(index, len(rows) - window))
        return rows[start : start + window]
    end = index if differences else index + 1
    return rows[max(0, end - window) : end]


@dataclass(frozen=True)
class _Candidate:
    """Directions of one window, with what they are."""

    estimator: str
    window: int
    alignment: str
    rows: int
    directions: Tensor
    singular_values: Tensor


def _streams(trajectory: Trajectory, estimators: Sequence[str], progress: bool) -> dict[tuple[str, str], Tensor]:
    """Rows of every stream, by (estimator, objective); the update belongs to no objective."""
    indexes = range(len(trajectory.steps))
    streams: dict[tuple[str, str], Tensor] = {}
    if "update" in estimators:
        streams["update", ""] = torch.stack([trajectory.parameters(i).float() for i in indexes]).diff(dim=0)
    if "gradient" in estimators:
        gradients: dict[str, list[Tensor]] = {objective: [] for objective in trajectory.objectives}
        for i in tqdm(indexes, desc="gradients", unit="checkpoint", disable=not progress):
            for objective, rows in gradients.items():
                rows.append(trajectory.gradient(i, objective).float())
        streams |= {("gradient", objective): torch.stack(rows) for objective, rows in gradients.items()}
    return streams


def _candidates(
    streams: dict[tuple[str, str], Tensor],
    index: int,
    objective: str,
    windows: Sequence[int],
    alignments: Sequence[str],
    rank: int,
) -> Iterator[_Candidate]:
    for (estimator, owner), rows in streams.items():
        if owner not in ("", objective):
            continue
        for window in windows:
            for alignment in alignments:
                held = window_rows(rows, index, window, alignment, differences=estimator == "update")
                if len(held) == 0:
                    continue  # no update has come before the first checkpoint
                svd = RollingSVD(len(held), min(rank, len(held)), dtype=torch.float32)
                for row in held:
                    svd.update(row)
                yield _Candidate(
                    estimator, window, alignment, len(held), svd.right_singular_vectors.float(), svd.singular_values
                )


def _spread(A: Tensor, size: int) -> dict[str, float]:
    """Random directions' responses: their median, and the trace they estimate (Hutchinson on the sphere)."""
    # torch's median of an even number is the lower one of the middle two; the paper's is their mean.
    middle = A.quantile(0.5).item()
    return {
        "random_median": middle, "random_low": A.min().item(), "random_high": A.max().item(),
        "trace": size * A.mean().item(), "trace_error": size * A.std().item() / len(A) ** 0.5 if len(A) > 1 else
        float("nan"),
    }  # fmt: skip


def _check(
    estimators: Sequence[str],
    windows: Sequence[int],
    alignments: Sequence[str],
    rank: int,
    checkpoints: int,
    draws: int,
    method: str,
) -> None:
    for what, given, allowed in (
        ("estimators", estimators, ESTIMATORS), ("alignments", alignments, ALIGNMENTS),
        ("method", [method], ("exact", "finite_difference")),
    ):  # fmt: skip
        if not given or not set(given) <= set(allowed):
            raise ValueError(f"expected {what} out of {', '.join(allowed)}, got {list(given)}; pass some of these")
    check_draws(draws)
    smallest = {"rank": rank, "checkpoints": checkpoints, "windows": min(windows, default=0)}
    for what, value in smallest.items():
        if value < 1:
            raise ValueError(f"expected {what} >= 1, got {value}; pass a positive number")
