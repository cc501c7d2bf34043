"""Read against write: one number for each head and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.pair.deltas import Delta, stacked
from tl_asymmetry.pair.projections import Projection

ASYMMETRY_COLUMNS = (
    "layer", "head", "rank", "read", "write", "log2_ratio", "log2_expected", "log2_excess", "ci_low", "ci_high",
)  # fmt: skip
"""Columns of the asymmetry table, in this order."""

READ_SIDE = (("W_Q", "attn_in"), ("W_K", "attn_in"))
WRITE_SIDE = (("W_O", "prediction"), ("W_out", "prediction"))


@dataclass(frozen=True)
class _Side:
    """Energies of one side at one rank, `[..., layer, head]`, not yet pooled over matrices."""

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


def asymmetry_table(
    deltas: Mapping[str, Sequence[Delta]],
    projections: Mapping[tuple[str, str], Sequence[Projection]],
    ranks: Sequence[int],
    *,
    d: int,
    n_heads: int,
) -> pd.DataFrame:
    """log2(relative read / relative write), per head and, with heads pooled by energy, per layer (head NA).

    Read is W_Q and W_K against the attention input's principal directions (each query head with its key head; in a
    layer each key head counts once); write is W_O, per layer also W_out, against the prediction directions. Chance is
    not 0, since any gradient reads: `log2_expected` is the same ratio from the matched references, NaN without
    gradients, and `log2_excess` the difference. The interval covers the read side only.

    Returns:
        An empty table if the analysis holds W_Q, W_K, W_O or the two subspaces out.
    """
    needed = [*READ_SIDE, WRITE_SIDE[0]]
    if any(key not in projections for key in needed):
        return pd.DataFrame(columns=list(ASYMMETRY_COLUMNS))
    frames = []
    for column, k in enumerate(ranks):
        if any(k > projections[key][0].energies.shape[-1] for key in needed):
            continue
        W_Q, W_K, W_O = (_side(deltas, projections, key, column, k) for key in needed)
        layer_write = W_O.pooled()
        if WRITE_SIDE[1] in projections:
            layer_write = layer_write.plus(_side(deltas, projections, WRITE_SIDE[1], column, k).pooled())
        frames.append(_rows(W_Q.pooled().plus(W_K.pooled()), layer_write, k, d, per_head=False))
        frames.append(_rows(W_Q.plus(W_K.grouped(n_heads)), W_O, k, d, per_head=True))
    table = pd.concat(frames, ignore_index=True)
    return table.sort_values(["layer", "head", "rank"], na_position="first", ignore_index=True)


def _side(
    deltas: Mapping[str, Sequence[Delta]],
    projections: Mapping[tuple[str, str], Sequence[Projection]],
    key: tuple[str, str],
    column: int,
    k: int,
) -> _Side:
    layers = projections[key]
    total = stacked(deltas[key[0]], "energy")
    if key in READ_SIDE:
        reference = stacked(layers, "activation_reference")[:, k - 1 : k]
    else:
        reference = stacked(layers, "gradient_reference")[..., k - 1]
    replicates = None
    if layers[0].replicates is not None:
        replicates = stacked(layers, "replicates")[..., column].transpose(0, 1)
    return _Side(stacked(layers, "energies")[..., :k].sum(-1), total, reference * total, replicates)


def _rows(read: _Side, write: _Side, k: int, d: int, *, per_head: bool) -> pd.DataFrame:
    scale = d / k
    read_relative, write_relative = (side.inside / side.total * scale for side in (read, write))
    ratio = read_relative / write_relative
    expected = torch.log2(read.expected / read.total) - torch.log2(write.expected / write.total)
    low = high = torch.full_like(ratio, torch.nan)
    if read.replicates is not None:
        replicates = read.replicates / read.total * scale / write_relative
        interval = log_jackknife_interval(ratio, replicates, corrected=True)
        low, high = interval.low, interval.high
    log_ratio = torch.log2(ratio)
    layers, heads = ratio.shape
    head = np.tile(np.arange(heads), layers) if per_head else [pd.NA] * layers
    columns = {
        "read": read_relative,
        "write": write_relative,
        "log2_ratio": log_ratio,
        "log2_expected": expected,
        "log2_excess": log_ratio - expected,
        "ci_low": torch.log2(low),
        "ci_high": torch.log2(high),
    }
    frame = pd.DataFrame({name: value.flatten().numpy() for name, value in columns.items()})
    frame["layer"] = pd.array(np.repeat(np.arange(layers), heads), dtype="Int64")
    frame["head"] = pd.array(head, dtype="Int64")
    frame["rank"] = k
    return frame[list(ASYMMETRY_COLUMNS)]
