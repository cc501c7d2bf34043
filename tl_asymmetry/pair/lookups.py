"""What deltas' leading directions are near, and which texts excite them: found once for many heads, as indexes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.models.texts import batches
from tl_asymmetry.models.view import ModelView, Reader
from tl_asymmetry.names import Place, kind_of
from tl_asymmetry.results.provenance import weights_hash

_NEAREST = 8
_BATCH = 8
# Directions and tokens whose cosines are made at once: 32 MB of them.
_CHUNK, _VOCABULARY_CHUNK = 512, 16_384


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


class Lookups:
    """What was looked up of one result's directions: kept, so that nothing is run or multiplied twice.

    A pass over the texts shows the inputs of all layers up to the one that was asked for, and serves all their heads. A
    second one goes through all layers, so that there is no third.
    """

    def __init__(self) -> None:
        self._checked: tuple[weakref.ref[Any], tuple[tuple[int, int], ...] | None] | None = None
        self._contexts: dict[Place, tuple[Tensor, Tensor]] = {}
        self._near: dict[Place, dict[str, tuple[Tensor, Tensor]]] = {}

    def require_base(self, view: ModelView, config: Mapping[str, Any]) -> None:
        """`require_base`, once for a model whose weights stay as they are."""
        stamp = view.stamp()
        if stamp is not None and self._checked is not None:
            model, then = self._checked
            if model() is view.model and then == stamp:
                return
        require_base(view, config)
        self._checked = weakref.ref(view.model), stamp

    def contexts(
        self, view: ModelView, arrays: Mapping[str, Tensor], place: Place, count: int
    ) -> tuple[Int[Tensor, "n 2 context"], Float[Tensor, "n 2 context"]]:
        """Positions and projections of one place's directions, at least `count` of them where there are so many."""
        if place not in self._contexts or self._contexts[place][0].shape[-1] < min(count, len(arrays["tokens"])):
            together = regular_matrices(view, arrays)
            if place.matrix in together:
                layers = slice(0, view.n_layers if self._contexts else place.layer + 1)
                probes = {m: _probes(arrays, m)[layers] for m in together}
                found = _contexts(view, arrays, probes, layers, slice(None), count, False)
            else:
                layers, heads = of_place(place)
                probes = {place.matrix: _probes(arrays, place.matrix)[layers, heads]}
                found = _contexts(view, arrays, probes, layers, heads, count, False)
            for matrix, (positions, projections) in found.items():
                headed = kind_of(matrix).heads is not None
                for i, layer in enumerate(range(view.n_layers)[layers]):
                    for entry in range(positions.shape[1]):
                        own = Place(layer, matrix, entry if headed else None) if matrix in together else place
                        self._contexts[own] = positions[i, entry], projections[i, entry]
        return self._contexts[place]

    def near(
        self, view: ModelView, arrays: Mapping[str, Tensor], place: Place
    ) -> dict[str, tuple[Int[Tensor, "n 2 token"], Float[Tensor, "n 2 token"]]]:
        """Nearest tokens of one place's directions and their cosines, in each of the vocabulary's two matrices."""
        if place not in self._near:
            found = _near(view, {place.matrix: arrays[f"directions/{place.matrix}"][of_place(place)]}, _NEAREST)
            of_matrix = {space: of[place.matrix] for space, of in found.items()}
            self._near[place] = {space: (ids[0, 0], cosines[0, 0]) for space, (ids, cosines) in of_matrix.items()}
        return self._near[place]


def find_directions(
    view: ModelView,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    n: int,
    tokens: int,
    contexts: int,
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
        progress: show a bar.
        argument: what the caller's own argument for `n` is named, for its refusal.

    Raises:
        ValueError: another model than the one analysed, or more directions than were kept.
    """
    matrices = regular_matrices(view, arrays)
    if not matrices:
        return {}
    check_count(arrays, matrices, n, argument)
    require_base(view, config)
    directions = {m: arrays[f"directions/{m}"][:, :, :n] for m in matrices}
    probes = {m: _probes(arrays, m)[:, :, :n] for m in matrices}
    excited = _contexts(view, arrays, probes, slice(None), slice(None), contexts, progress)
    near = _near(view, directions, tokens)
    found = {}
    for m in matrices:
        spectrum = arrays[f"spectrum/{m}"]
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


def regular_matrices(view: ModelView, arrays: Mapping[str, Tensor]) -> list[str]:
    """The analysed matrices that all layers have; in others, and in experts, directions are found place by place."""
    names = [name.removeprefix("directions/") for name in arrays if name.startswith("directions/")]
    return [m for m in names if m in view.matrices and view.has_point(kind_of(m).point)]


def of_place(place: Place) -> tuple[slice, slice]:
    """Of arrays `[layer, head, …]` the part of one place."""
    entry = place.head or place.expert or 0
    return slice(place.layer, place.layer + 1), slice(entry, entry + 1)


def _probes(arrays: Mapping[str, Tensor], matrix: str) -> Float[Tensor, "layer head n width"]:
    """What a matrix's inputs are projected on: its directions, or for a write matrix their partners."""
    return arrays[f"{'directions' if kind_of(matrix).reads else 'partners'}/{matrix}"]


def check_count(arrays: Mapping[str, Tensor], matrices: Sequence[str], n: int, argument: str) -> None:
    """Check that so many directions of each head were kept.

    Raises:
        ValueError: fewer than one, or more, under the argument's name.
    """
    kept = min(arrays[f"directions/{m}"].shape[2] for m in matrices)
    if not 1 <= n <= kept:
        raise ValueError(f"expected {argument} from 1 to {kept}, got {n}; pass a number in between")


def require_base(view: ModelView, config: Mapping[str, Any]) -> None:
    """Check that a model is the base that was analysed.

    Raises:
        ValueError: other weights.
    """
    if weights_hash(view) != config["models"]["base"]["weights_xxh3"]:
        raise ValueError(
            f"expected the base model of this analysis, got other weights ({view.name!r}); pass model=base"
        )


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


def _near(
    view: ModelView, directions: Mapping[str, Float[Tensor, "layer head n d"]], count: int
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """`_nearest` in the embedding and in the unembedding, by matrix; once where these are one."""
    spaces = {"embedding": view.embedding(), "unembedding": view.unembedding()[0].mT}
    near: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for name, vectors in spaces.items():
        tied = name == "unembedding" and _same(vectors, spaces["embedding"])
        near[name] = near["embedding"] if tied else {m: _nearest(vectors, d, count) for m, d in directions.items()}
    return near


def _nearest(
    vectors: Float[Tensor, "token d"], directions: Float[Tensor, "layer head n d"], count: int
) -> tuple[Int[Tensor, "layer head n 2 count"], Float[Tensor, "layer head n 2 count"]]:
    """Tokens of largest cosine with each direction and with its negative; a block of the vocabulary at a time."""
    flat = directions.flatten(0, 2).to(vectors.device, torch.float32)
    leaders = [_Nearest(min(count, len(vectors))) for _ in flat.split(_CHUNK)]
    with exact_products(vectors.device):
        for start in range(0, len(vectors), _VOCABULARY_CHUNK):
            block = vectors[start : start + _VOCABULARY_CHUNK].float()
            sizes = torch.linalg.vector_norm(block, dim=-1).clamp(min=1e-30)
            for part, leading in zip(flat.split(_CHUNK), leaders, strict=True):
                leading.see(part @ block.mT / sizes, start)
    shape = (*directions.shape[:3], 2, -1)
    tokens, cosines = (torch.cat([getattr(leading, name) for leading in leaders]) for name in ("tokens", "cosines"))
    return tokens.reshape(shape), cosines.reshape(shape)


def _same(x: Tensor, y: Tensor) -> bool:
    return (x.data_ptr(), x.shape, x.stride()) == (y.data_ptr(), y.shape, y.stride())


class _Nearest:
    """The tokens of largest and of smallest cosine seen so far, on CPU; the smallest with their sign turned."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.tokens = torch.empty(0, dtype=torch.long)
        self.cosines = torch.empty(0)

    def see(self, cosines: Float[Tensor, "direction token"], first: int) -> None:
        """Take in a block of the vocabulary, whose first token is `first`."""
        kept = min(self.count, cosines.shape[1])
        largest, smallest = (cosines.topk(kept, dim=-1, largest=largest) for largest in (True, False))
        values = torch.stack([largest.values, -smallest.values], 1).cpu()
        places = torch.stack([largest.indices, smallest.indices], 1).cpu() + first
        if first:
            values, places = torch.cat([self.cosines, values], -1), torch.cat([self.tokens, places], -1)
        self.cosines, at = values.topk(self.count if first else kept, dim=-1)
        self.tokens = places.gather(-1, at)


def context_words(tokenizer: Any, sequences: Sequence[Tensor], places: Sequence[int], width: int) -> list[str]:
    """The tokens up to and including some positions of the concatenated sequences, as text.

    Args:
        tokenizer: None gives token ids.
        sequences: the calibration tokens.
        places: positions in their concatenation.
        width: tokens before the position, at most.
    """
    return ["".join(parts) for parts in context_parts(tokenizer, sequences, places, width, 0)]


def context_parts(
    tokenizer: Any, sequences: Sequence[Tensor], places: Sequence[int], before: int, after: int
) -> list[tuple[str, str, str]]:
    """The text before some positions of the concatenated sequences, the token there, and the text after it.

    Together they are the text of these tokens, unless a character lies in several of them.

    Args:
        tokenizer: None gives token ids.
        sequences: the calibration tokens.
        places: positions in their concatenation.
        before, after: tokens on either side, at most.
    """
    starts = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
    owners = torch.bucketize(torch.tensor(list(places), dtype=torch.long), starts, right=True) - 1

    def text(ids: list[int]) -> str:
        if not ids:
            return ""
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)

    def added(ids: list[int], more: list[int]) -> str:
        """What more tokens add to a text, read after as many of its tokens as leave what is there unchanged."""
        for known in (ids, ids[-1:]):
            whole, shown = text(known + more), text(known)
            if whole.startswith(shown):
                return whole[len(shown) :]
        return text(more)

    found = []
    for place, owner in zip(places, owners.tolist(), strict=True):
        sequence, at = sequences[owner].tolist(), place - int(starts[owner])
        earlier, later = sequence[max(0, at - before) : at], sequence[at + 1 : at + 1 + after]
        found.append((text(earlier), added(earlier, [sequence[at]]), added([*earlier, sequence[at]], later)))
    return found
