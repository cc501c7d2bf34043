"""What the explorer's page is given: the tables as arrays over layers and heads, curves, spectra, directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.explore.pack import Pack
from tl_asymmetry.geometry.spectrum import marchenko_pastur_edge
from tl_asymmetry.names import reads_latent
from tl_asymmetry.pair.data import PairData
from tl_asymmetry.pair.lookups import MatrixDirections, context_parts
from tl_asymmetry.pair.tables import PAIR_COLUMNS
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.held import ISOTROPIC, Held, held_against
from tl_asymmetry.plots.maps import VERDICTS
from tl_asymmetry.results.nulls import described
from tl_asymmetry.spectra.result import SpectralAnalysis

KEYS = ("layer", "head", "matrix", "subspace", "rank", "pathway")
CURVE_POINTS, SPECTRUM_POINTS = 40, 64
"""Ranks and indexes at which curves and spectra are drawn, log-spaced as their axes are."""
FRAME_COLUMNS = (
    "layer", "head", "matrix", "rank", "on_principal", "on_principal_relative", "on_principal_q", "coupling",
    "intruders", "intruders_expected", "rotation_left", "rotation_left_expected", "rotation_right",
    "rotation_right_expected",
)  # fmt: skip
"""Columns of a spectral analysis that a card shows."""
ATTACHED_ROWS = 200_000
"""Rows of an attached table above which only those at the shown rank are kept."""
STEP_COLUMNS = ("layer", "head", "matrix", "subspace", "rank", "relative", "ci_low", "ci_high", "isotropic_q", "excess")
"""Columns of a pair's table that are kept of an attached trajectory."""
_CONTEXT_TOKENS, _TOKENS_AFTER = 12, 4


def maps(result: PairData, pack: Pack) -> list[dict[str, Any]]:
    """Each matrix against each subspace: all columns of the table and of its nulls, as arrays [rank, layer, head].

    Ranks come first, since what does not depend on them then repeats in long runs.
    """
    table, ranks = result.table, result.config["ranks"]
    layers = list(range(result.config["shape"]["n_layers"]))
    helds = held_against(table, described(result.nulls))
    found = []
    for (matrix, subspace), rows in table.groupby(["matrix", "subspace"], sort=False):
        units = pick.units(rows)
        placed = rows.assign(head=units)
        heads = pick.heads_of(placed)
        shared, group = pick.kv_group(table, str(matrix), None)
        keyed = rows.assign(head=units.astype("float64").fillna(-1)).set_index(["rank", "layer", "head"])
        places = [-1.0 if h is None or pd.isna(h) else float(h) for h in heads]
        at = pd.MultiIndex.from_product([ranks, layers, places])
        full, row_of_cell = keyed.reindex(at), keyed.index.get_indexer(at)
        relative = result.width(str(matrix)) / at.get_level_values(0).to_numpy(float)
        nulls = {}
        for held in (held.of(rows) for held in helds):
            if held.there:
                nulls[held.key] = _of_null(held, row_of_cell, relative, pack)
        columns: dict[str, Any] = {}
        for name in (c for c in table.columns if c not in KEYS):
            column = full[name]
            if pd.api.types.is_numeric_dtype(table[name]):
                columns[name] = pack.numbers(column.to_numpy(float, na_value=np.nan))
            else:
                columns[name] = pack.words(column.fillna(""))
        found.append(
            {
                "matrix": str(matrix), "subspace": str(subspace), "pathway": str(rows["pathway"].iloc[0]),
                "heads": None if heads == [None] else len(heads), "kv": shared, "group": group or 1,
                "d": result.width(str(matrix)), "latent": reads_latent(str(matrix)), "experts": pick.has_experts(rows),
                "whole": sorted({int(x) for x in rows.loc[rows["expert"].isna(), "layer"]})
                if pick.has_experts(rows) else [],
                "empty": _empty(placed, table, layers, heads),
                "columns": columns, "nulls": nulls,
            }
        )  # fmt: skip
    return found


def _empty(
    rows: pd.DataFrame, table: pd.DataFrame, layers: Sequence[int], heads: Sequence[int | None]
) -> dict[str, dict[str, str]]:
    """Why cells have no row at any rank, by layer and place in it."""
    there = {(int(x), -1 if pd.isna(h) else int(h)) for x, h in zip(rows["layer"], rows["head"], strict=True)}
    found: dict[str, dict[str, str]] = {}
    for layer in layers:
        for place, head in enumerate(heads):
            if (layer, -1 if head is None else head) not in there:
                found.setdefault(str(layer), {})[str(place)] = pick.absence(rows, table, layer, head)
    return found


def _of_null(held: Held, at: np.ndarray, relative: np.ndarray, pack: Pack) -> dict[str, Any]:
    """A null's numbers beside a map, `expected` over chance; of the isotropic one only what no column holds.

    What is only shown is held as it is shown; by excess, p and q heads are searched, sorted and coloured.

    Args:
        held: of the map's rows.
        at: which of these stands in each cell; −1 where none does.
        relative: what makes a fraction one over chance, by cell.
        pack: takes the numbers.
    """

    def laid_out(numbers: pd.Series) -> np.ndarray:
        return np.where(at < 0, np.nan, numbers.to_numpy(float)[at])

    relation = pack.numbers(laid_out(held.relation))
    if held.key == ISOTROPIC:
        return {"relation": relation}
    return {
        "relation": relation,
        **{name: pack.numbers(laid_out(held.numbers[name])) for name in ("excess", "p", "q")},
        **{name: pack.shown(laid_out(held.numbers[name])) for name in ("low", "high")},
        "expected": pack.shown(laid_out(held.numbers["expected"]) * relative),
    }


def nulls(result: PairData) -> list[dict[str, str]]:
    """The nulls that some row is held against, in words."""
    words = described(result.nulls).drop_duplicates("null")[["null", "label", "over", "meaning", "applies"]]
    renamed = words.rename(columns={"null": "key"}).astype(str)
    return [{str(name): value for name, value in row.items()} for row in renamed.to_dict("records")]


def verdicts() -> list[dict[str, str]]:
    """Verdicts with their sign and colour."""
    return [{"verdict": verdict, "sign": sign, "color": color} for verdict, (sign, color) in VERDICTS.items()]


def usual_subspaces(result: PairData) -> dict[str, str]:
    """The subspace each matrix is first held against."""
    return {str(m): pick.default_subspace(result.table, m) for m in dict.fromkeys(result.table["matrix"])}


def curves(result: PairData, pack: Pack) -> dict[str, dict[str, Any]]:
    """Relative fraction against rank of every head, `"W_Q/attn_in": {k, relative [layer, head, k]}`."""
    found = {}
    for name, profile in result.arrays.items():
        if not name.startswith("profile/"):
            continue
        _, matrix, subspace = name.split("/", 2)
        d = result.width(matrix)
        size = profile.shape[-1]
        k = _spaced(size, CURVE_POINTS) if result.is_ordered(subspace) else np.array([size])
        relative = np.cumsum(profile.numpy().astype(np.float64), axis=-1)[..., k - 1] * d / k
        found[name.removeprefix("profile/")] = {"k": k.tolist(), "relative": pack.shown(relative)}
    return found


def spectra(result: PairData, pack: Pack) -> dict[str, dict[str, Any]]:
    """Shares of ‖ΔW‖² along each head's own directions (indexes from 1), with the edge independent entries would have.

    The edge [ours] is the Marchenko–Pastur law's with the longer axis of ΔW as samples and the shorter one as
    variables, fitted to the median as in `marchenko_pastur_edge`. Descriptive: no trained delta has independent
    entries.
    """
    found = {}
    for name, spectrum in result.arrays.items():
        if not name.startswith("spectrum/"):
            continue
        total = spectrum.sum(-1, keepdim=True)
        share = spectrum / total
        matrix, index = name.removeprefix("spectrum/"), _spaced(spectrum.shape[-1], SPECTRUM_POINTS)
        samples = max(result.width(matrix), result.arrays[f"partners/{matrix}"].shape[-1])
        found[matrix] = {
            "index": index.tolist(),
            "share": pack.shown(share.numpy()[..., index - 1]),
            "edge": pack.shown(_edges(share, samples)),
        }
    return found


def _spaced(last: int, points: int) -> np.ndarray:
    """Numbers from 1 to the last, all of them or about so many, log-spaced."""
    return np.unique(np.geomspace(1, last, points).round().astype(int)) if last > points else np.arange(1, last + 1)


def _edges(share: Tensor, samples: int) -> np.ndarray:
    """Marchenko–Pastur edge of each head's normalised spectrum; NaN for a zero delta. [layer, head]"""
    edges = np.full(share.shape[:2], np.nan)
    for at in np.ndindex(*edges.shape):
        if bool((share[at] > 0).any()):
            edges[at] = marchenko_pastur_edge(share[at], samples)
    return edges


def directions(
    found: Mapping[str, MatrixDirections], sequences: Sequence[Tensor], tokenizer: Any, pack: Pack
) -> dict[str, Any]:
    """Leading directions by matrix, with one list of all the tokens and contexts they name."""
    token_ids = np.unique(
        np.concatenate([a.numpy().ravel() for d in found.values() for a in (d.embedding, d.unembedding)])
    )
    places = np.unique(np.concatenate([d.contexts.numpy().ravel() for d in found.values()]))
    words = [str(t) if tokenizer is None else tokenizer.decode([int(t)]) for t in token_ids]
    by_matrix = {}
    for matrix, d in found.items():
        by_matrix[matrix] = {
            "n": d.energy.shape[-1], "tokens": d.embedding.shape[-1], "contexts": d.contexts.shape[-1],
            "energy": pack.shown(d.energy.numpy()),
            "embedding": pack.indexes(np.searchsorted(token_ids, d.embedding.numpy())),
            "embedding_cosine": pack.shown(d.embedding_cosine.numpy()),
            "unembedding": pack.indexes(np.searchsorted(token_ids, d.unembedding.numpy())),
            "unembedding_cosine": pack.shown(d.unembedding_cosine.numpy()),
            "context": pack.indexes(np.searchsorted(places, d.contexts.numpy())),
            "projection": pack.shown(d.projections.numpy(), digits=2),
        }  # fmt: skip
    texts = context_parts(tokenizer, sequences, places.tolist(), _CONTEXT_TOKENS, _TOKENS_AFTER)
    return {"tokens": words, "contexts": texts, "matrices": by_matrix}


def frame(spectra: SpectralAnalysis, pack: Pack) -> dict[str, Any]:
    """Shares, intruders and rotation of each head or expert in the base weight's own singular frame."""
    table = spectra.table.assign(head=pick.units(spectra.table))
    return attached("Spectra", table[list(FRAME_COLUMNS)], min(spectra.config["shown_rank"].values()), pack)


def attached(name: str, source: Any, shown_rank: int, pack: Pack) -> dict[str, Any]:
    """Another analysis's rows, to be shown with the head and matrix they belong to.

    Args:
        name: heading, e.g. "Edits".
        source: a DataFrame with the columns layer, head, matrix, or a result whose `.table` is one; with `matrices`,
            several names in one cell, its row is shown with each of them.
        shown_rank: kept alone where the table is large and has ranks.
        pack: takes the numbers.

    Raises:
        ValueError: no such columns.
    """
    table = getattr(source, "table", source)
    if not isinstance(table, pd.DataFrame):
        raise ValueError(
            f"expected {name.lower()} as a result or a DataFrame, got {type(source).__name__}; pass one with the "
            "columns layer, head and matrix"
        )
    if "matrices" in table and "matrix" not in table:
        table = table.assign(matrix=table["matrices"].str.split()).explode("matrix", ignore_index=True)
    pick.require(table, ("layer", "head", "matrix"), f"a result or table of {name.lower()} per layer, head and matrix")
    said = ""
    if len(table) > ATTACHED_ROWS and "rank" in table.columns:
        table = table[table["rank"] == shown_rank]
        said = f"Rows at rank {shown_rank} only."
    if "step" in table.columns:
        # A trajectory repeats every column of a pair's table at every step.
        table = table[[c for c in table.columns if c in STEP_COLUMNS or c not in PAIR_COLUMNS]]
    columns: dict[str, Any] = {}
    for column in table.columns:
        values = table[column]
        if column in ("layer", "head") or pd.api.types.is_numeric_dtype(values):
            columns[str(column)] = pack.numbers(values.astype("Float64").to_numpy(float, na_value=np.nan))
        else:
            columns[str(column)] = pack.words(["" if _missing(v) else v for v in values])
    return {"name": name, "note": said, "rows": len(table), "columns": columns}


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
