"""One matrix of one layer: every number of the table, for each of its heads and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.changed import changed_expected, changed_share
from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.geometry.rounding import rounding_noise
from tl_asymmetry.geometry.spectral_frame import Frame, expected_rotation, intruders, leading_frame, spectral_frame
from tl_asymmetry.geometry.two_sided import nested_sums, rounding_profile_between, two_sided_tail
from tl_asymmetry.models.readers.base import Weights
from tl_asymmetry.names import kind_of
from tl_asymmetry.spectra.change import Change, change_of, heads_first

THRESHOLD = 0.5
"""|cos| under which two singular vectors do not resemble each other."""
_DRAWS, _DRAWS_OF_LARGE, _LARGE = 8, 1, 256
"""Deltas at random orientation for each matrix; fewer where its shorter axis is longer than `_LARGE`."""


def matrix_rows(
    base: Weights, aligned: Weights, layer: int, matrix: str, ranks: Sequence[int], *, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of the table, rank by rank and head by head."""
    W = heads_first(base.weight(layer, matrix))
    change = change_of(base, aligned, layer, matrix)
    whole = _of_whole(W, change, seed=seed)
    frames = _Frames.of(W, change, max(ranks), np.random.default_rng([seed, layer]))
    profiles = _shares(W, change, frames) | _turned(frames) | _drift(frames)
    headed = kind_of(matrix).heads is not None
    for rank in ranks:
        columns = whole | _at_rank(W, change, frames, profiles, rank)
        for head in range(len(W)):
            place = {"layer": layer, "head": head if headed else None, "expert": None, "matrix": matrix, "rank": rank}
            yield place | {name: float(values[head]) for name, values in columns.items()}


@dataclass(frozen=True)
class _Frames:
    """The frames of the base, of the aligned weight, and of deltas at random orientation, up to the largest rank."""

    rank: int
    base: Frame
    aligned: Frame
    turned: list[Frame]

    @classmethod
    def of(cls, W: Tensor, change: Change, rank: int, generator: np.random.Generator) -> _Frames:
        draws = _DRAWS if min(W.shape[-2:]) <= _LARGE else _DRAWS_OF_LARGE
        return cls(
            rank,
            spectral_frame(W, longer=2 * rank),
            leading_frame(change.added_to(W), rank),
            [leading_frame(change.turned(generator).added_to(W), rank) for _ in range(draws)],
        )


def _of_whole(W: Float[Tensor, "head m n"], change: Change, *, seed: int) -> dict[str, Float64[Tensor, " head"]]:
    """What does not depend on the rank. An adapter's delta was never stored: nothing of it is rounding, or sparse."""
    size = W.double().square().sum((-2, -1))
    relative = (change.energy / size).sqrt()
    shrink = change.inner(W) / size
    if change.stored is None:
        never = torch.full_like(relative, torch.nan)
        rounding = torch.where(change.energy > 0, 0.0, torch.nan)
        return {
            "changed_share": never, "changed_expected": never, "changed_relative": never, "rounding_share": rounding,
            "delta_relative_norm": relative, "shrink": shrink,
        }  # fmt: skip
    ΔW, stored = change.left, change.stored
    changed, expected = changed_share(ΔW), changed_expected(W, ΔW, stored, seed=seed)
    return {
        "changed_share": changed,
        "changed_expected": expected,
        "changed_relative": changed / expected,
        "rounding_share": rounding_noise(W, ΔW, stored, seed=seed).share,
        "delta_relative_norm": relative,
        "shrink": shrink,
    }


def _shares(W: Float[Tensor, "head m n"], change: Change, frames: _Frames) -> dict[str, Float64[Tensor, "head k"]]:
    """Shares of ‖ΔW‖² at rank 1, 2, … in the base's frame, and of rounding alone."""
    k, energy = frames.rank, change.energy.unsqueeze(-1)
    U, V, σ = frames.base.left(k), frames.base.right(k), frames.base.values
    core = change.between(U, V)
    size = σ.square().sum(-1)
    shrink = change.inner(W) / size
    unshrunk = core - torch.diag_embed(shrink.unsqueeze(-1) * σ[..., :k])
    return {
        "on_principal": nested_sums(core.square()) / energy,
        "left": change.left_profile(U).cumsum(-1) / energy,
        "right": change.right_profile(V).cumsum(-1) / energy,
        "unshrunk": nested_sums(unshrunk.square()) / (energy - (shrink.square() * size).unsqueeze(-1)),
        "rounding": rounding_profile_between(W, U, V),
    }


def _turned(frames: _Frames) -> dict[str, Float64[Tensor, "head k"]]:
    """Intruders and rotation of both sides at rank 1, 2, …, beside those of deltas at random orientation."""
    k = frames.rank
    columns: dict[str, Tensor] = {}
    for side, cosines in (("left", frames.base.left_cosines), ("right", frames.base.right_cosines)):
        before, after = _leading(frames.base, side, 2 * k), _leading(frames.aligned, side, k)
        drawn = [_leading(frame, side, k) for frame in frames.turned]
        intruding = intruders(cosines(after), THRESHOLD)
        # What the base's 2, 4, 6, … leading directions, or all it has, hold of each vector: [head, rank, vector]
        spans = (2 * torch.arange(1, k + 1)).clamp(max=before.shape[-1]) - 1
        held = (before.mT @ after).square().cumsum(-2)[..., spans, :]
        counted = intruding.cumsum(-1)
        columns |= {
            f"intruders_{side}": counted,
            f"intruders_{side}_expected": _mean([intruders(cosines(v), THRESHOLD).cumsum(-1) for v in drawn]),
            f"intruders_{side}_inside": (held * intruding.unsqueeze(-2)).tril().sum(-1) / counted,
            f"rotation_{side}": _rotations(before[..., :k], after),
            f"rotation_{side}_expected": _mean([_rotations(before[..., :k], v) for v in drawn]),
        }
    return columns


def _drift(frames: _Frames) -> dict[str, Float64[Tensor, "head k"]]:
    """How far the leading singular values moved."""
    σ = frames.base.values[..., : frames.rank]
    moved = (frames.aligned.values - σ).square().cumsum(-1).sqrt()
    return {"drift": moved / σ.square().cumsum(-1).sqrt()}


def _at_rank(W: Tensor, change: Change, frames: _Frames, profiles: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The columns of one rank. NaN for a zero delta."""
    m, n = W.shape[-2:]
    at, chance = {name: profile[..., k - 1] for name, profile in profiles.items()}, k * k / (m * n)
    first_order = dict(
        zip(("left", "right"), expected_rotation(frames.base.values, change.energy, m, n, k), strict=True)
    )
    turned = {"drift": at["drift"]}
    for side, suffix in (("left", ""), ("right", "_right")):
        small = first_order[side]
        turned |= {
            f"intruders{suffix}": at[f"intruders_{side}"],
            f"intruders{suffix}_expected": at[f"intruders_{side}_expected"],
            f"intruders{suffix}_inside": at[f"intruders_{side}_inside"],
            f"rotation_{side}": at[f"rotation_{side}"],
            f"rotation_{side}_expected": torch.where(small.isfinite(), small, at[f"rotation_{side}_expected"]),
        }
    return {
        "on_principal": at["on_principal"],
        "on_principal_relative": at["on_principal"] / chance,
        "left_relative": at["left"] * m / k,
        "right_relative": at["right"] * n / k,
        "on_principal_p": two_sided_tail(at["on_principal"], change.purity, m, n, k, k),
        "coupling": at["on_principal"] / (at["left"] * at["right"]),
        "on_principal_unshrunk": at["unshrunk"] / chance,
        "on_principal_rounding": at["rounding"] / chance,
        **{name: torch.where(change.energy > 0, values, torch.nan) for name, values in turned.items()},
    }


def _leading(frame: Frame, side: str, k: int) -> Float64[Tensor, "head axis k"]:
    return frame.left(k) if side == "left" else frame.right(k)


def _rotations(first: Float64[Tensor, "head d k"], second: Float64[Tensor, "head d k"]) -> Float64[Tensor, "head k"]:
    """`rotation` of the spans of the first 1, 2, … k columns."""
    with exact_products(first.device):
        inner = nested_sums((first.mT @ second).square())
    return (1 - inner / torch.arange(1, first.shape[-1] + 1, device=first.device)).clamp(0, 1)


def _mean(draws: list[Tensor]) -> Tensor:
    return torch.stack(draws).mean(0)
