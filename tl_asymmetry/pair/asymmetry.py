"""Read against write: one number for each head and layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.pair.numbers import Measurements

ASYMMETRY_COLUMNS = (
    "layer", "head", "rank", "read", "write", "log2_ratio", "log2_expected", "log2_excess", "expected_from", "ci_low",
    "ci_high",
)  # fmt: skip
"""Columns of the asymmetry table, in this order."""

BOTH_SIDES, READ_ONLY = "both sides", "read reference only"
"""What `expected_from` says."""

READ_SIDE = (("W_Q", "attn_in"), ("W_K", "attn_in"))
WRITE_SIDE = (("W_O", "prediction"), ("W_out", "prediction"))


@dataclass(frozen=True)
class _Side:
    """Energies of one side at one rank, `[..., place, head]`, not yet pooled over matrices."""

    inside: Tensor
    total: Tensor
    expected: Tensor
    replicates: Tensor | None

    def pooled(self) -> _Side:
        """All heads of a layer as one."""

        def pool(x: Tensor) -> Tensor:
            return x.sum(-1, keepdim=True)

        return _Side(
            pool(self.inside),
            pool(self.total),
            pool(self.expected),
            None if self.replicates is None else pool(self.replicates),
        )

    def plus(self, other: _Side) -> _Side:
        both = self.replicates is not None and other.replicates is not None
        return _Side(
            self.inside + other.inside,
            self.total + other.total,
            self.expected + other.expected,
            self.replicates + other.replicates if both else None,  # type: ignore[operator]
        )

    def grouped(self, heads: int) -> _Side:
        """Each key-value head repeated for the query heads it serves."""

        def repeat(x: Tensor) -> Tensor:
            return x.repeat_interleave(heads // x.shape[-1], -1)

        return _Side(
            repeat(self.inside),
            repeat(self.total),
            repeat(self.expected),
            None if self.replicates is None else repeat(self.replicates),
        )


def asymmetry_table(numbers: Measurements) -> pd.DataFrame:
    """log2(relative read / relative write), per head and, with heads pooled by energy, per layer (head NA).

    Read is W_Q and W_K against the attention input's principal directions (each query head with its key head; in a
    layer each key head counts once); write is W_O, per layer also W_out, against the prediction directions. Chance is
    not 0, since any gradient reads: `log2_expected` is the same ratio from the matched references of both sides where
    gradients are given, else that of the read side over 1 (`expected_from` says which), and `log2_excess` the
    difference. The interval covers the read side only, and there is no p: no claim rests on this number alone.

    Returns:
        An empty table if the analysis holds W_Q, W_K, W_O or the two subspaces out.
    """
    needed = [*READ_SIDE, WRITE_SIDE[0]]
    columns = [*numbers.labels, *ASYMMETRY_COLUMNS]
    if any(key not in numbers.held or _differ(numbers, key[0]) for key in needed):
        return pd.DataFrame(columns=columns)
    blocks: list[dict[str, Any]] = []
    common = min(len(numbers.ranks_of(*key)) for key in needed)
    for column, rank in enumerate(numbers.layout.ranks[:common]):
        if not all(rank in numbers.layout.measured[subspace] for _, subspace in needed):
            continue
        W_Q, W_K, W_O = (_side(numbers, key, column) for key in needed)
        layer_write = W_O.pooled()
        if WRITE_SIDE[1] in numbers.held:
            layer_write = layer_write.plus(_side(numbers, WRITE_SIDE[1], column).pooled())
        there = torch.stack([numbers.held[key].exists[:, column] for key in needed]).gt(0).all(0)
        sides = (W_Q.pooled().plus(W_K.pooled()), layer_write), (W_Q.plus(W_K.grouped(numbers.layout.n_heads)), W_O)
        blocks += [_columns(read, write, rank, numbers.layout.d, there) for read, write in sides]
    units = ([None] * numbers.layout.n_layers, ["head"] * numbers.layout.n_layers)  # a layer's row, then its heads'
    table = pd.DataFrame({
        **numbers.rows([(of["read"].shape[1], units[i % 2]) for i, of in enumerate(blocks)]),
        **{name: np.concatenate([of[name].ravel() for of in blocks]) for name in blocks[0]},
    })  # fmt: skip
    rows = table[table["exists"]].sort_values(["run", "layer", "head", "rank"], na_position="first", ignore_index=True)
    return rows[columns]


def _differ(numbers: Measurements, matrix: str) -> bool:
    """Whether some layers that have a matrix have fewer heads than others."""
    present = numbers.deltas[matrix].energy.isfinite()
    return bool((present.any(-1) != present.all(-1)).any())


def _side(numbers: Measurements, key: tuple[str, str], column: int) -> _Side:
    held, total = numbers.held[key], numbers.deltas[key[0]].energy
    if key in READ_SIDE:
        reference = None if held.activation is None else held.activation[..., column]
        if reference is not None and reference.ndim == 1:  # one for all heads
            reference = reference.unsqueeze(-1)
    else:
        reference = None if held.gradient is None else held.gradient[..., column]
    replicates = None if held.replicates is None else held.replicates[..., column].transpose(0, 1)
    expected = torch.full_like(total, torch.nan) if reference is None else reference * total
    return _Side(held.inside[..., column], total, expected, replicates)


def _columns(read: _Side, write: _Side, rank: int, d: int, there: Tensor) -> dict[str, np.ndarray]:
    """Columns `[place, head]`, of the places that are `there`: whose subspaces have so many directions."""
    scale = d / rank
    read_relative, write_relative = (side.inside / side.total * scale for side in (read, write))
    ratio = read_relative / write_relative
    by_write = write.expected / write.total * scale
    both = bool(by_write.isfinite().any())
    expected = torch.log2(read.expected / read.total * scale) - (torch.log2(by_write) if both else 0)
    low = high = torch.full_like(ratio, torch.nan)
    if read.replicates is not None:
        replicates = read.replicates / read.total * scale / write_relative
        interval = log_jackknife_interval(ratio, replicates, corrected=True)
        low, high = interval.low, interval.high
    log_ratio = torch.log2(ratio)
    of_places = {
        "read": read_relative,
        "write": write_relative,
        "log2_ratio": log_ratio,
        "log2_expected": expected,
        "log2_excess": log_ratio - expected,
        "ci_low": torch.log2(low),
        "ci_high": torch.log2(high),
        # some layers have no attention
        "exists": (read.total + write.total).isfinite() & there.unsqueeze(-1),
    }
    same = {"rank": rank, "expected_from": BOTH_SIDES if both else READ_ONLY}
    return {
        **{name: np.full(ratio.shape, value) for name, value in same.items()},
        **{name: value.numpy() for name, value in of_places.items()},
    }
