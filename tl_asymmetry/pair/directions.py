"""The leading directions of one head's delta as a table: what they are near, and which texts excite them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from torch import Tensor

from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import Place, nearest, reads_latent
from tl_asymmetry.pair.lookups import Lookups, check_count, context_words, of_place
from tl_asymmetry.results.tables import AnyFrame

DIRECTION_COLUMNS = ("direction", "sign", "energy", "embedding_tokens", "unembedding_tokens", "contexts")
"""Columns of `PairAnalysis.directions`, in this order."""

_CONTEXT_TOKENS = 12


class Directions(pd.DataFrame, metaclass=AnyFrame):
    """A DataFrame in all it does, but that its lists of tokens and contexts print as words.

    Example:
        >>> near = [("rain", 0.31), ("wet", 0.3)]
        >>> Directions([(1, "+", 0.25, near, near, [("the road was wet", 2.5)])], columns=DIRECTION_COLUMNS)
        direction 1 (+): 25% of ‖ΔW‖²
          embedding tokens    rain 0.31, wet 0.30
          unembedding tokens  rain 0.31, wet 0.30
          contexts            the road was wet 2.50
    """

    @property
    def _constructor(self) -> Any:
        return Directions

    def __repr__(self) -> str:
        if self.empty or not {*DIRECTION_COLUMNS} <= {*self.columns}:
            return repr(pd.DataFrame(self))
        blocks = []
        for row in self.to_dict("records"):
            lines = [f"direction {row['direction']} ({row['sign']}): {row['energy']:.0%} of ‖ΔW‖²"]
            for name in DIRECTION_COLUMNS[3:]:
                joint = f"\n{'':22}" if name == "contexts" else ", "
                lines.append(f"  {name.replace('_', ' '):20}{joint.join(_said(row[name]))}")
            blocks.append("\n".join(lines))
        return "\n".join(blocks)

    def _repr_html_(self) -> str | None:
        lists = [name for name in DIRECTION_COLUMNS[3:] if name in self]
        plain = pd.DataFrame(self).assign(**{name: self[name].map(lambda x: ", ".join(_said(x))) for name in lists})
        with pd.option_context("display.max_colwidth", None):
            return plain.to_html(index=False, border=0)


def _said(leaders: Sequence[tuple[str, float]]) -> list[str]:
    """Tokens or contexts with their numbers, blanks at the ends and line breaks left out."""
    return [f"{' '.join(word.split()) or repr(word)} {number:.2f}" for word, number in leaders]


def describe_directions(
    view: ModelView,
    arrays: Mapping[str, Tensor],
    config: Mapping[str, Any],
    place: Place,
    *,
    n: int,
    contexts: int,
    kept: Lookups,
) -> pd.DataFrame:
    """One row per direction and sign of one head; see `PairAnalysis.directions`."""
    _check_matrix(arrays, place)
    check_count(arrays, [place.matrix], n, "n")
    if contexts < 1:
        raise ValueError(f"expected contexts of at least 1, got {contexts}; pass contexts=5")
    kept.require_base(view, config)
    _check_unit(view, arrays, place)
    sequences = arrays["tokens"].split(arrays["lengths"].tolist())
    positions, projections = kept.contexts(view, arrays, place, contexts)
    near = kept.near(view, arrays, place)
    spectrum = arrays[f"spectrum/{place.matrix}"][of_place(place)][0, 0]

    def tokens(space: str, *at: int) -> list[tuple[str, float]]:
        ids, cosines = (x[at] for x in near[space])
        words = [str(t) if view.tokenizer is None else view.tokenizer.decode([t]) for t in ids.tolist()]
        return list(zip(words, cosines.tolist(), strict=True))

    rows = []
    for i in range(n):
        for s, sign in enumerate("+−"):
            shown = positions[i, s, :contexts].tolist()
            words = context_words(view.tokenizer, sequences, shown, _CONTEXT_TOKENS)
            rows.append({
                "direction": i + 1,
                "sign": sign,
                "energy": (spectrum[i] / spectrum.sum()).item(),
                "embedding_tokens": tokens("embedding", i, s),
                "unembedding_tokens": tokens("unembedding", i, s),
                "contexts": list(zip(words, projections[i, s, :contexts].tolist(), strict=True)),
            })  # fmt: skip
    return Directions(rows, columns=list(DIRECTION_COLUMNS))


def _check_matrix(arrays: Mapping[str, Tensor], place: Place) -> None:
    if f"directions/{place.matrix}" not in arrays:
        there = [name.split("/")[1] for name in arrays if name.startswith("directions/")]
        raise ValueError(
            f"expected a matrix among {', '.join(there)}, got {place.matrix!r}; pass {nearest(place.matrix, there)}"
        )
    if reads_latent(place.matrix):
        raise ValueError(
            f"expected a matrix on the residual stream, got {place.matrix!r}, whose directions are those of a latent; "
            "pass another one"
        )
    layers = len(arrays[f"directions/{place.matrix}"])
    if not 0 <= place.layer < layers:
        raise ValueError(f"expected a layer from 0 to {layers - 1}, got {place.layer}; pass one of these")


def _check_unit(view: ModelView, arrays: Mapping[str, Tensor], place: Place) -> None:
    """Refuse a head where there are experts, and the like."""
    matrix, count = place.matrix, arrays[f"directions/{place.matrix}"].shape[1]
    unit = view.unit(place.layer, matrix)
    given = {"head": place.head, "expert": place.expert}
    wanted = {name for name, number in given.items() if number is not None}
    number = None if unit is None else given[unit]
    if wanted != ({unit} - {None}) or (number is not None and not 0 <= number < count):
        expected = "head=None (an MLP matrix)" if unit is None else f"{_ARTICLES[unit]} from 0 to {count - 1}"
        got = place.head if place.expert is None else f"expert {place.expert}"
        raise ValueError(f"expected {expected} for {matrix}, got {got}; pass that")


_ARTICLES = {"head": "a head", "expert": "an expert"}
