"""`analyze_pair` itself on the embedded base model and a change of it that is made by chance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from benchmarks.chance_updates import AdamState, by_head
from tl_asymmetry import ModelView, analyze_pair
from tl_asymmetry.demo import demo_model, demo_texts
from tl_asymmetry.models.strangers import strangers as told_of_strangers
from tl_asymmetry.models.texts import batches, token_sequences

READ = {"W_Q": "attn_in", "W_K": "attn_in", "W_V": "attn_in", "W_in": "mlp_in"}
RANK = 4
_BATCH = 16
_STEP = 1e-3
"""‖ΔW‖ / ‖W‖."""


@lru_cache(maxsize=1)
def trained_inputs() -> tuple[Any, dict[tuple[str, int], Tensor]]:
    """The base, and what its read matrices see on 160 texts: `[sequence, position, d]`, cut to the shortest of them."""
    base = demo_model("base")
    view = ModelView(base)
    sequences = token_sequences(view, demo_texts(160, seed=1), notes=print)
    length = min(map(len, sequences))
    seen: dict[tuple[str, int], list[Tensor]] = {}
    sites = {(point, layer) for point in READ.values() for layer in range(view.n_layers)}
    hooks = {site: lambda x, site=site: seen.setdefault(site, []).append(x[:, :length].detach()) for site in sites}
    with torch.no_grad():
        for tokens, _ in batches(sequences, 32):
            with view.hooks(hooks):
                view.run(tokens)
    return base, {site: torch.cat(parts) for site, parts in seen.items()}


def changed_by_chance(generator: Generator, *, optimizer: str, steps: int, first: bool) -> tuple[Any, Any]:
    """The base and a copy whose read matrices learned from δ that knows nothing of its input.

    As a transformer's δ does: none of W_Q at the first position, which sees one key; those of W_K add up to nothing in
    each sequence, whose softmax ignores what all keys share. W_in learns at the first position where `first`. W_O and
    W_out move isotropically.
    """
    base, inputs = trained_inputs()
    aligned = copy.deepcopy(base)
    for layer, block in enumerate(aligned.blocks):
        for matrix, point in READ.items():
            W = getattr(block.mlp if matrix == "W_in" else block.attn, matrix)
            heads = 1 if W.ndim == 2 else len(W)
            silent = matrix == "W_Q" or (matrix == "W_in" and not first)
            δ = partial(_upstream, centered=matrix == "W_K", silent=silent, generator=generator)
            change = _learned(inputs[point, layer], heads, W.shape[-1], generator, δ, optimizer, steps)
            _add(W, change.reshape(W.shape))
        for W in (block.attn.W_O, block.mlp.W_out):
            _add(W, torch.randn(W.shape, generator=generator))
    return base, aligned


def _upstream(a: Tensor, columns: int, *, centered: bool, silent: bool, generator: Generator) -> Tensor:
    δ = torch.randn(*a.shape[:2], columns, generator=generator)
    if centered:
        δ = δ - δ.mean(1, keepdim=True)
    if silent:
        δ[:, 0] = 0
    return δ


def _learned(
    a: Tensor, heads: int, columns: int, generator: Generator, upstream: Callable[[Tensor, int], Tensor],
    optimizer: str, steps: int,
) -> Tensor:  # fmt: skip
    state = AdamState()
    change = torch.zeros(a.shape[-1], heads * columns)
    for _ in range(steps):
        chosen = torch.randperm(len(a), generator=generator)[: _BATCH if optimizer == "adam" else len(a)]
        x = a[chosen]
        gradient = x.flatten(0, 1).T @ upstream(x, heads * columns).flatten(0, 1)
        change -= state.step(gradient) if optimizer == "adam" else gradient
    return by_head(change, heads)


def _add(W: Tensor, change: Tensor) -> None:
    with torch.no_grad():
        W += _STEP * W.norm() / change.norm() * change


def beyond(generator: Generator, *, optimizer: str, steps: int, first: bool = False) -> Mapping[str, np.ndarray]:
    """Heads and matrices that the tool calls beyond what training gives, and what else it finds."""
    pair = changed_by_chance(generator, optimizer=optimizer, steps=steps, first=first)
    texts = demo_texts(60, seed=int(torch.randint(2, 1 << 20, (1,), generator=generator)))
    result = analyze_pair(*pair, texts, ranks=[RANK], optimizer=optimizer, groups=1, progress=False)
    table = result.table
    read = table[(table["pathway"] == "read") & (table["subspace"] == table["matrix"].map(READ))]
    written = table[table["pathway"] == "write"]
    return {
        "beyond": (read["verdict"] == "beyond").to_numpy(),
        "below the reference": (read["vs_reference"] == "below").to_numpy(),
        "uncorrected p < 0.05": (read["excess_p"] < 0.05).to_numpy(),
        "isotropic writing found": (written["vs_chance"] != "not told apart").to_numpy(),
        "median excess": read["excess"].to_numpy(),
        **{f"median excess of {matrix}": read.loc[read["matrix"] == matrix, "excess"].to_numpy() for matrix in READ},
    }


def strangers(generator: Generator) -> Mapping[str, np.ndarray]:
    """Whether two models that share nothing but their shape are called unrelated, and the summary counts nothing."""
    base = demo_model("base")
    other = copy.deepcopy(base)
    with torch.no_grad():
        for block in other.blocks:
            for W in (block.attn.W_Q, block.attn.W_K, block.attn.W_V, block.attn.W_O, block.mlp.W_in, block.mlp.W_out):
                W.copy_(W.std() * torch.randn(W.shape, generator=generator))
    result = analyze_pair(base, other, demo_texts(40, seed=0), ranks=[RANK], groups=1, progress=False)
    unrelated, summary = result.config["unrelated"], str(result.summary())
    told = len(unrelated) == len(ModelView(base).matrices) and told_of_strangers(unrelated) in summary
    return {"warned": np.array([told and "tested)" not in summary])}
