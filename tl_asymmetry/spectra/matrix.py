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
from tl_asymmetry.geometry.rounding import rounding_noise
from tl_asymmetry.geometry.spectral_frame import Frame, expected_rotation, intruders, rotation, spectral_frame
from tl_asymmetry.geometry.two_sided import rounding_share_between, two_sided_tail
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
    here = _Frames.of(W, change, np.random.default_rng([seed, layer]))
    headed = kind_of(matrix).heads is not None
    for rank in ranks:
        columns = whole | _at_rank(W, change, here, rank)
        for head in range(len(W)):
            place = {"layer": layer, "head": head if headed else None, "expert": None, "matrix": matrix, "rank": rank}
            yield place | {name: float(values[head]) for name, values in columns.items()}


@dataclass(frozen=True)
class _Frames:
    """The frames of the base, of the aligned weight, and of deltas at random orientation."""

    base: Frame
    aligned: Frame
    turned: list[Frame]

    @classmethod
    def of(cls, W: Tensor, change: Change, generator: np.random.Generator) -> _Frames:
        draws = _DRAWS if min(W.shape[-2:]) <= _LARGE else _DRAWS_OF_LARGE
        return cls(
            spectral_frame(W),
            spectral_frame(change.added_to(W)),
            [spectral_frame(change.turned(generator).added_to(W)) for _ in range(draws)],
        )


def _of_whole(W: Float[Tensor, "head m n"], change: Change, *, seed: int) -> dict[str, Float64[Tensor, " head"]]:
    """What does not depend on the rank. An adapter's delta was never stored: nothing of it is rounding, or sparse."""
    relative = (change.energy / W.double().square().sum((-2, -1))).sqrt()
    if change.stored is None:
        never = torch.full_like(relative, torch.nan)
        rounding = torch.where(change.energy > 0, 0.0, torch.nan)
        return {
            "changed_share": never, "changed_expected": never, "rounding_share": rounding,
            "delta_relative_norm": relative,
        }  # fmt: skip
    ΔW, stored = change.left, change.stored
    return {
        "changed_share": changed_share(ΔW),
        "changed_expected": changed_expected(W, ΔW, stored, seed=seed),
        "rounding_share": rounding_noise(W, ΔW, stored, seed=seed).share,
        "delta_relative_norm": relative,
    }


def _at_rank(W: Float[Tensor, "head m n"], change: Change, here: _Frames, k: int) -> dict[str, Tensor]:
    m, n = W.shape[-2:]
    energy = change.energy
    U, V = here.base.left(k), here.base.right(k)
    core = change.between(U, V)
    share, chance = core.square().sum((-2, -1)) / energy, k * k / (m * n)
    left, right = (profile.sum(-1) / energy for profile in (change.left_profile(U), change.right_profile(V)))
    shrink = change.inner(W) / here.base.values.square().sum(-1)
    unshrunk = core - torch.diag_embed(shrink.unsqueeze(-1) * here.base.values[..., :k])
    rest = energy - shrink.square() * here.base.values.square().sum(-1)
    σ, moved = here.base.values[..., :k], here.aligned.values[..., :k]
    return {
        "on_principal": share,
        "on_principal_relative": share / chance,
        "left_relative": left * m / k,
        "right_relative": right * n / k,
        "on_principal_p": two_sided_tail(share, change.purity, m, n, k, k),
        "coupling": share / (left * right),
        "on_principal_unshrunk": unshrunk.square().sum((-2, -1)) / rest / chance,
        "on_principal_rounding": rounding_share_between(W, U, V) / chance,
        **_turned(here, k, energy, m, n),
        "drift": (moved - σ).square().sum(-1).sqrt() / σ.square().sum(-1).sqrt(),
    }


def _turned(here: _Frames, k: int, energy: Float64[Tensor, " head"], m: int, n: int) -> dict[str, Tensor]:
    """Intruders and rotation on both sides, beside those of deltas at random orientation. NaN for a zero delta."""
    columns: dict[str, Tensor] = {}
    first_order = expected_rotation(here.base.values, energy, m, n, k)
    for side, small in zip(("left", "right"), first_order, strict=True):
        cosines = {"left": here.base.left_cosines, "right": here.base.right_cosines}[side]
        before, span = _leading(here.base, side, k), _leading(here.base, side, min(2 * k, here.base.values.shape[-1]))

        def intruding(frame: Frame, cosines: Any = cosines, side: str = side) -> Tensor:
            return intruders(cosines(_leading(frame, side, k)), THRESHOLD)

        counted = intruding(here.aligned)
        held = (span.mT @ _leading(here.aligned, side, k)).square().sum(-2)
        by_chance = torch.stack([intruding(frame).sum(-1) for frame in here.turned]).mean(0)
        drawn = torch.stack([rotation(before, _leading(frame, side, k)) for frame in here.turned]).mean(0)
        suffix = "" if side == "left" else "_right"
        columns |= {
            f"intruders{suffix}": counted.sum(-1),
            f"intruders{suffix}_expected": by_chance,
            f"intruders{suffix}_inside": (counted * held).sum(-1) / counted.sum(-1),
            f"rotation_{side}": rotation(before, _leading(here.aligned, side, k)),
            f"rotation_{side}_expected": torch.where(small.isfinite(), small, drawn),
        }
    return {name: torch.where(energy > 0, values, torch.nan) for name, values in columns.items()}


def _leading(frame: Frame, side: str, k: int) -> Float64[Tensor, "head axis k"]:
    return frame.left(k) if side == "left" else frame.right(k)
