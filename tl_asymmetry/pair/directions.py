"""What a delta's leading directions are near, and which texts excite them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry.models.texts import batches
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of
from tl_asymmetry.results.provenance import weights_hash

DIRECTION_COLUMNS = ("direction", "sign", "energy", "embedding_tokens", "unembedding_tokens", "contexts")
"""Columns of `PairAnalysis.directions`, in this order."""

_NEAREST = 8
_CONTEXT_TOKENS = 12
_BATCH = 8


def describe_directions(
    view: ModelView,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    layer: int,
    head: int | None,
    matrix: str,
    *,
    n: int,
    contexts: int,
) -> pd.DataFrame:
    """One row per direction and sign; see `PairAnalysis.directions`."""
    directions, partners, spectrum = _chosen(arrays, layer, head, matrix)
    if not 1 <= n <= len(directions):
        raise ValueError(f"expected n from 1 to {len(directions)}, got {n}; pass a smaller n")
    require_base(view, config)
    probes = directions if kind_of(matrix).reads else partners
    excited = _exciting_contexts(view, arrays, layer, head, matrix, probes[:n], contexts)
    W_U = view.unembedding()[0]
    near = {"embedding_tokens": view.embedding(), "unembedding_tokens": W_U.mT}
    cosines = {name: _cosines(vectors, directions[:n]) for name, vectors in near.items()}
    rows = []
    for i in range(n):
        for sign in (1, -1):
            row: dict[str, Any] = {
                "direction": i + 1,
                "sign": "+" if sign > 0 else "−",
                "energy": (spectrum[i] / spectrum.sum()).item(),
                "contexts": excited[i, sign],
            }
            for name, cosine in cosines.items():
                top = (sign * cosine[:, i]).topk(min(_NEAREST, len(cosine)))
                row[name] = [(_token(view, int(t)), v) for t, v in zip(top.indices, top.values.tolist(), strict=True)]
            rows.append(row)
    return pd.DataFrame(rows)[list(DIRECTION_COLUMNS)]


def require_base(view: ModelView, config: Mapping[str, Any]) -> None:
    """Check that a model is the base that was analysed.

    Raises:
        ValueError: other weights.
    """
    if weights_hash(view) != config["models"]["base"]["weights_xxh3"]:
        raise ValueError(
            f"expected the base model of this analysis, got other weights ({view.name!r}); pass model=base"
        )


def _chosen(arrays: Mapping[str, Tensor], layer: int, head: int | None, matrix: str) -> tuple[Tensor, Tensor, Tensor]:
    if f"directions/{matrix}" not in arrays:
        there = [name.split("/")[1] for name in arrays if name.startswith("directions/")]
        raise ValueError(f"expected a matrix among {', '.join(there)}, got {matrix!r}; pass one that was analysed")
    layers, heads = arrays[f"directions/{matrix}"].shape[:2]
    if not 0 <= layer < layers:
        raise ValueError(f"expected a layer from 0 to {layers - 1}, got {layer}; pass one of these")
    headless = kind_of(matrix).heads is None
    if headless != (head is None) or (head is not None and not 0 <= head < heads):
        wanted = "head=None (an MLP matrix)" if headless else f"a head from 0 to {heads - 1}"
        raise ValueError(f"expected {wanted} for {matrix}, got {head}; pass that")
    at = layer, head or 0
    return arrays[f"directions/{matrix}"][at], arrays[f"partners/{matrix}"][at], arrays[f"spectrum/{matrix}"][at]


def _exciting_contexts(
    view: ModelView,
    arrays: Mapping[str, Tensor],
    layer: int,
    head: int | None,
    matrix: str,
    probes: Float[Tensor, "n width"],
    count: int,
) -> dict[tuple[int, int], list[tuple[str, float]]]:
    """For each direction and sign, the contexts whose last token projects most on it, with the projection."""
    sequences = arrays["tokens"].split(arrays["lengths"].tolist())
    point = kind_of(matrix).point
    scores: list[Tensor] = []

    def read(x: Tensor) -> None:
        x = x[:, :, head] if point == "z" else x
        scores.append((x.float() @ probes.to(x.device, torch.float32).mT).cpu())

    places: list[tuple[int, int]] = []
    kept: list[Tensor] = []
    with torch.no_grad(), view.evaluating(), view.hooks({(point, layer): read}):
        for start, (tokens, mask) in enumerate(batches(sequences, _BATCH)):
            view.run(tokens.to(view.device))
            mask[:, 0] = False  # the first position's sink activations would fill every list
            kept.append(scores.pop()[mask])
            places += [(start * _BATCH + row, pos) for row, pos in mask.nonzero().tolist()]
    table = torch.cat(kept)
    excited = {}
    for i in range(len(probes)):
        for sign in (1, -1):
            top = (sign * table[:, i]).topk(min(count, len(table)))
            excited[i, sign] = [
                (_context(view, sequences[places[at][0]], places[at][1]), value)
                for at, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
    return excited


def _cosines(vectors: Float[Tensor, "token d"], directions: Float[Tensor, "n d"]) -> Float[Tensor, "token n"]:
    inner = vectors.float() @ directions.to(vectors.device, torch.float32).mT
    return (inner / vectors.float().norm(dim=-1, keepdim=True).clamp(min=1e-30)).cpu()


def _context(view: ModelView, sequence: Int[Tensor, " pos"], position: int) -> str:
    start = max(0, position - _CONTEXT_TOKENS)
    if view.tokenizer is None:
        return " ".join(map(str, sequence[start : position + 1].tolist()))
    return view.tokenizer.decode(sequence[start : position + 1].tolist())


def _token(view: ModelView, token: int) -> str:
    return str(token) if view.tokenizer is None else view.tokenizer.decode([token])
