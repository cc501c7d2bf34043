"""What deltas' leading directions are near, and which texts excite them: of one head as a table, of all as indexes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.models.texts import batches
from tl_asymmetry.models.view import ModelView, Reader
from tl_asymmetry.names import Place, kind_of
from tl_asymmetry.results.provenance import weights_hash

DIRECTION_COLUMNS = ("direction", "sign", "energy", "embedding_tokens", "unembedding_tokens", "contexts")
"""Columns of `PairAnalysis.directions`, in this order."""

_NEAREST = 8
_CONTEXT_TOKENS = 12
_BATCH = 8
_CHUNK = 512


@dataclass(frozen=True)
class MatrixDirections:
    """The leading residual directions of one matrix's deltas, by layer and head; both signs of each, + first."""

    energy: Float[Tensor, "layer head n"]
    """Share of ‖ΔW‖² along each; NaN for a zero delta."""
    embedding: Int[Tensor, "layer head n 2 token"]
    """Nearest tokens in the embedding, by cosine, nearest first."""
    embedding_cosine: Float[Tensor, "layer head n 2 token"]
    """Their cosines."""
    unembedding: Int[Tensor, "layer head n 2 token"]
    """Nearest tokens in the unembedding."""
    unembedding_cosine: Float[Tensor, "layer head n 2 token"]
    """Their cosines."""
    contexts: Int[Tensor, "layer head n 2 context"]
    """Positions in the concatenated calibration tokens with the largest projection, largest first."""
    projections: Float[Tensor, "layer head n 2 context"]
    """Those projections: of the matrix's input on the direction (read), of what the delta writes along it (write)."""


def describe_directions(
    view: ModelView, arrays: Mapping[str, Tensor], config: Mapping[str, Any], place: Place, *, n: int, contexts: int
) -> pd.DataFrame:
    """One row per direction and sign of one head; see `PairAnalysis.directions`."""
    _check_place(arrays, place)
    found = find_directions(
        view, arrays, config, n=n, tokens=_NEAREST, contexts=contexts, place=place, progress=False
    )[place.matrix]  # fmt: skip
    sequences = arrays["tokens"].split(arrays["lengths"].tolist())

    def tokens(ids: Tensor, cosines: Tensor) -> list[tuple[str, float]]:
        words = [str(t) if view.tokenizer is None else view.tokenizer.decode([t]) for t in ids.tolist()]
        return list(zip(words, cosines.tolist(), strict=True))

    rows = []
    for i in range(n):
        for sign, s in (("+", 0), ("−", 1)):
            at = 0, 0, i, s
            words = context_words(view.tokenizer, sequences, found.contexts[at].tolist(), _CONTEXT_TOKENS)
            rows.append({
                "direction": i + 1,
                "sign": sign,
                "energy": found.energy[0, 0, i].item(),
                "embedding_tokens": tokens(found.embedding[at], found.embedding_cosine[at]),
                "unembedding_tokens": tokens(found.unembedding[at], found.unembedding_cosine[at]),
                "contexts": list(zip(words, found.projections[at].tolist(), strict=True)),
            })  # fmt: skip
    return pd.DataFrame(rows)[list(DIRECTION_COLUMNS)]


def find_directions(
    view: ModelView,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    n: int,
    tokens: int,
    contexts: int,
    place: Place | None = None,
    progress: bool,
    argument: str = "n",
) -> dict[str, MatrixDirections]:
    """The leading directions of every head of the matrices that all layers have, by matrix, in one pass over the texts.

    Args:
        view: the base model that was analysed.
        arrays, config: of the result.
        n: directions of each head.
        tokens: nearest tokens of each direction and sign.
        contexts: calibration contexts of each direction and sign.
        place: only this one, as layer 0 and head 0 of what is returned.
        progress: show a bar.
        argument: what the caller's own argument for `n` is named, for its refusal.

    Raises:
        ValueError: another model than the one analysed, or more directions than were kept.
    """
    matrices = [name.removeprefix("directions/") for name in arrays if name.startswith("directions/")]
    # Of what only some layers have, or each expert, one place at a time.
    regular = [m for m in matrices if m in view.matrices and view.has_point(kind_of(m).point)]
    matrices = regular if place is None else [place.matrix]
    if not matrices:
        return {}
    kept = min(arrays[f"directions/{m}"].shape[2] for m in matrices)
    if not 1 <= n <= kept:
        raise ValueError(f"expected {argument} from 1 to {kept}, got {n}; pass a number in between")
    require_base(view, config)
    layers = slice(None) if place is None else slice(place.layer, place.layer + 1)
    heads = slice(None) if place is None else slice(place.head or 0, (place.head or 0) + 1)

    def of(kind: str, matrix: str) -> Tensor:
        return arrays[f"{kind}/{matrix}"][layers, heads]

    directions = {m: of("directions", m)[:, :, :n] for m in matrices}
    probes = {m: directions[m] if kind_of(m).reads else of("partners", m)[:, :, :n] for m in matrices}
    excited = _contexts(view, arrays, probes, layers, heads, contexts, progress)
    spaces = {"embedding": view.embedding(), "unembedding": view.unembedding()[0].mT}
    near = {name: {m: _nearest(vectors, d, tokens) for m, d in directions.items()} for name, vectors in spaces.items()}
    found = {}
    for m in matrices:
        spectrum = of("spectrum", m)
        found[m] = MatrixDirections(
            energy=spectrum[..., :n] / spectrum.sum(-1, keepdim=True),
            embedding=near["embedding"][m][0],
            embedding_cosine=near["embedding"][m][1],
            unembedding=near["unembedding"][m][0],
            unembedding_cosine=near["unembedding"][m][1],
            contexts=excited[m][0],
            projections=excited[m][1],
        )
    return found


def require_base(view: ModelView, config: Mapping[str, Any]) -> None:
    """Check that a model is the base that was analysed.

    Raises:
        ValueError: other weights.
    """
    if weights_hash(view) != config["models"]["base"]["weights_xxh3"]:
        raise ValueError(
            f"expected the base model of this analysis, got other weights ({view.name!r}); pass model=base"
        )


def _check_place(arrays: Mapping[str, Tensor], place: Place) -> None:
    layer, matrix, head = place.layer, place.matrix, place.head
    if f"directions/{matrix}" not in arrays:
        there = [name.split("/")[1] for name in arrays if name.startswith("directions/")]
        raise ValueError(f"expected a matrix among {', '.join(there)}, got {matrix!r}; pass one that was analysed")
    layers, heads = arrays[f"directions/{matrix}"].shape[:2]
    if not 0 <= layer < layers:
        raise ValueError(f"expected a layer from 0 to {layers - 1}, got {layer}; pass one of these")
    whole = kind_of(matrix).heads is None
    if whole != (head is None) or (head is not None and not 0 <= head < heads):
        wanted = "head=None (an MLP matrix)" if whole else f"a head from 0 to {heads - 1}"
        raise ValueError(f"expected {wanted} for {matrix}, got {head}; pass that")


class _Leaders:
    """The largest projections seen so far on each probe and its negative."""

    def __init__(self, probes: Float[Tensor, "head n width"], heads: slice, count: int) -> None:
        shown, n, _ = probes.shape
        self.probes, self.heads, self.count = probes, heads, count
        self.values = torch.empty(0, shown, n, 2)
        self.places = torch.empty(0, shown, n, 2, dtype=torch.long)

    def see(self, x: Tensor, kept: Tensor, places: Tensor) -> None:
        """Update from a batch of inputs, of which the positions `kept` count; `places` says where those stand."""
        probes = self.probes.to(x.device, torch.float32)
        by_head = x.ndim == 4  # "z" has its own input for each head
        with exact_products(x.device):
            form = "...hw,hnw->...hn" if by_head else "...w,hnw->...hn"
            score = torch.einsum(form, (x[:, :, self.heads] if by_head else x).float(), probes)
            score = score[kept.to(x.device)].cpu()
        both = torch.cat([self.values, torch.stack([score, -score], dim=-1)])
        where = torch.cat([self.places, places.view(-1, 1, 1, 1).expand(-1, *both.shape[1:])])
        self.values, at = both.topk(min(self.count, len(both)), dim=0)
        self.places = where.gather(0, at)


def _contexts(
    view: ModelView,
    arrays: Mapping[str, Tensor],
    probes: Mapping[str, Float[Tensor, "layer head n width"]],
    layers: slice,
    heads: slice,
    count: int,
    progress: bool,
) -> dict[str, tuple[Tensor, Tensor]]:
    """(positions, projections) `[layer, head, n, 2, context]` of each matrix, in one pass over the texts."""
    sequences = arrays["tokens"].split(arrays["lengths"].tolist())
    shown = range(view.n_layers)[layers]
    leaders = {
        (m, layer): _Leaders(p, heads, count)
        for m, of_layers in probes.items()
        for layer, p in zip(shown, of_layers, strict=True)
    }
    now: dict[str, Tensor] = {}

    def reader(point: str, layer: int) -> Reader:
        at_work = [leaders[m, layer] for m in probes if kind_of(m).point == point]

        def read(x: Tensor) -> None:
            for each in at_work:
                each.see(x, now["kept"], now["places"])

        return read

    readers = {(kind_of(m).point, layer): reader(kind_of(m).point, layer) for m, layer in leaders}
    begin = 0
    bar = tqdm(total=len(sequences), desc="contexts of directions", disable=not progress)
    with torch.no_grad(), view.evaluating(), view.hooks(readers), bar:
        for tokens, mask in batches(sequences, _BATCH):
            mask = mask.clone()
            size = mask.sum(1)
            starts = begin + torch.cat([torch.zeros(1, dtype=torch.long), size.cumsum(0)[:-1]])
            places = starts[:, None] + torch.arange(tokens.shape[1])
            mask[:, 0] = False  # the first position's sink activations would fill every list
            now["kept"], now["places"] = mask, places[mask]
            view.run(tokens.to(view.device), layers=shown.stop)
            begin += int(size.sum())
            bar.update(len(tokens))
    return {
        m: tuple(  # type: ignore[misc]
            torch.stack([getattr(leaders[m, layer], name) for layer in shown]).permute(0, 2, 3, 4, 1)
            for name in ("places", "values")
        )
        for m in probes
    }


def _nearest(
    vectors: Float[Tensor, "token d"], directions: Float[Tensor, "layer head n d"], count: int
) -> tuple[Int[Tensor, "layer head n 2 count"], Float[Tensor, "layer head n 2 count"]]:
    """Tokens of largest cosine with each direction and with its negative."""
    unit = vectors.float() / vectors.float().norm(dim=-1, keepdim=True).clamp(min=1e-30)
    count = min(count, len(unit))
    tokens, cosines = [], []
    with exact_products(unit.device):
        for part in directions.flatten(0, 2).split(_CHUNK):
            cosine = part.to(unit) @ unit.mT
            both = torch.stack([cosine, -cosine], dim=1).topk(count, dim=-1)
            tokens.append(both.indices.cpu())
            cosines.append(both.values.cpu())
    shape = (*directions.shape[:3], 2, count)
    return torch.cat(tokens).reshape(shape), torch.cat(cosines).reshape(shape)


def context_words(tokenizer: Any, sequences: Sequence[Tensor], places: Sequence[int], width: int) -> list[str]:
    """The tokens up to and including some positions of the concatenated sequences, as text.

    Args:
        tokenizer: None gives token ids.
        sequences: the calibration tokens.
        places: positions in their concatenation.
        width: tokens before the position, at most.
    """
    starts = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
    owners = torch.bucketize(torch.tensor(list(places), dtype=torch.long), starts, right=True) - 1
    words = []
    for place, owner in zip(places, owners.tolist(), strict=True):
        end = place - int(starts[owner]) + 1
        ids = sequences[owner][max(0, end - 1 - width) : end].tolist()
        words.append(" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids))
    return words
