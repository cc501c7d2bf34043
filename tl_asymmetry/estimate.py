"""What an analysis will cost, before it is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_asymmetry.geometry.subspace import Subspace, ordered_eigh
from tl_asymmetry.models.capture import balanced_groups
from tl_asymmetry.models.checks import check_pair, check_token_count
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.plan import STREAM_SUBSPACES, make_plan, token_sequences

_PROBE = 512


@dataclass(frozen=True, repr=False)
class PairEstimate:
    """Predicted cost of `analyze_pair`, beside the two models themselves."""

    table: pd.DataFrame
    """One row per stage: `stage, seconds, bytes` (peak memory of that stage on top of the models)."""
    tokens: int
    """Tokens that will be run."""

    @property
    def seconds(self) -> float:
        """Predicted time in all."""
        return float(self.table["seconds"].sum())

    @property
    def peak_bytes(self) -> int:
        """Predicted peak memory on top of the models: the moments stay while everything after them runs."""
        stage = self.table.set_index("stage")["bytes"]
        return int(stage["moments"] + stage.drop("moments").max())

    def __repr__(self) -> str:
        shown = self.table.assign(MB=self.table["bytes"] / 1e6).drop(columns="bytes")
        return (
            f"PairEstimate: about {self.seconds:.0f} s and {self.peak_bytes / 1e6:.0f} MB beside the models, "
            f"{self.tokens} tokens\n" + shown.to_string(index=False, float_format="{:.3g}".format)
        )


def estimate_pair(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    matrices: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None,
    exclude_first: bool = True,
    centered: bool = False,
    batch_size: int = 8,
    max_tokens: int | None = None,
    groups: int = 8,
    activations: str = "base",
    gradient: Any = None,
    sensitivity: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> PairEstimate:
    """Predict time and memory of `analyze_pair` with the same arguments, without running the model.

    Operations are counted from shapes; their speed is measured on one product and one eigensolve (under a second).
    Expect the right order of magnitude:
    the probes are short, and a busy machine disturbs them.

    Raises:
        ValueError: what `analyze_pair` would refuse about the pair's shapes, texts, tokens and ranks.

    Example:
        >>> from tl_asymmetry.demo import demo_pair, demo_texts
        >>> estimate_pair(*demo_pair(), demo_texts(4, seed=0), ranks=[4]).seconds < 60
        True
    """
    base = ModelView(model_base)
    if not isinstance(model_aligned, str | Path):  # else it would have to be loaded
        check_pair(base, ModelView(model_aligned))
    plan = make_plan(base, matrices, ranks, subspaces, groups=groups, activations=activations, batch_size=batch_size)
    sequences = token_sequences(base, texts, tokens, max_tokens, notes=lambda line: None)
    check_token_count(sum(len(s) - exclude_first for s in sequences), plan.ranks)
    d, L, n = base.d_model, base.n_layers, sum(map(len, sequences))
    held_groups = len(balanced_groups(sequences, groups))
    models = 2 if sensitivity or activations == "both" else 1
    sizes = [base.weight(0, matrix).numel() for matrix in plan.matrices]
    workers = min(torch.get_num_threads(), L)  # layers at work side by side, each with its deltas and an eigensolve

    noise = torch.randn(_PROBE, _PROBE, generator=torch.Generator().manual_seed(seed))
    flops = _rate(lambda x: x @ x, noise.to(base.device), 2.0 * _PROBE**3)
    probe = noise[:d, :d].double()
    eigensolve = (d / len(probe)) ** 3 / _rate(lambda x: ordered_eigh(x @ x.mT), probe, 1.0)

    packed = d * (d + 1) // 2 * 8
    sites = len(plan.points) * L
    streams = [name for name in plan.subspaces if name in STREAM_SUBSPACES and name not in plan.given]
    replicates = held_groups if groups > 1 else 0
    variants = 12 if sensitivity else 0
    block = 2 * n * sum(base.weight(0, matrix).numel() for matrix in base.matrices) * L
    longest = max(map(len, sequences)) * min(batch_size, len(sequences))
    width = 4 * (6 * d + 2 * (base.d_mlp or 0)) + 4 * base.n_heads * max(map(len, sequences)) * 2
    stages = [
        ("forward", models * block / flops, longest * width),
        ("moments", models * 2 * n * d * d * sites / flops,
         models * sites * packed * held_groups * (2 if sensitivity else 1)),
        ("eigensolves", eigensolve * (L * len(streams) * (1 + replicates + variants) + 1), 6 * d * d * 8),
        ("projections", 2 * d * sum(sizes) * L * (2 + replicates / 4 + variants) / flops,
         workers * (12 * sum(sizes) + 48 * d * d)),
        ("prediction", 2 * d * d * base.d_vocab / flops, 4 * d * 16_384),
    ]  # fmt: skip
    return PairEstimate(pd.DataFrame(stages, columns=["stage", "seconds", "bytes"]), tokens=n)


def _rate(operation: Callable[[Tensor], Any], x: Tensor, work: float) -> float:
    """Work per second of an operation: the best of five tries after a warm-up, since others may share the machine."""
    operation(x)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        operation(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = min(best, time.perf_counter() - start)
    return work / best
