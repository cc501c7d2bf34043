"""Two analyses of one base: where their deltas differ, and whether they lie along the same directions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND, ROUNDING_FLAGGED, SIGNIFICANT
from tl_asymmetry.plots import maps, style
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.drawing import Drawing, heatmap, scatter
from tl_asymmetry.plots.hover import head_name
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, note, rank_slider

DIFFERENCE_HOVER = (
    "<b>%{customdata[0]}</b>"
    "<br>%{customdata[1]}: relative %{customdata[2]}, excess %{customdata[3]}"
    "<br>q %{customdata[4]}, rounding share %{customdata[5]}"
    "<br>%{customdata[6]}: relative %{customdata[7]}, excess %{customdata[8]}"
    "<br>q %{customdata[9]}, rounding share %{customdata[10]}"
    "<br>ratio %{customdata[11]}, 95 % interval over texts: %{customdata[12]}"
    "<br>over training runs: %{customdata[13]}, q %{customdata[14]}<extra></extra>"
)
OVERLAP_HOVER = (
    "<b>%{customdata[0]}</b><br>overlap of %{customdata[1]} directions %{customdata[2]}, chance %{customdata[3]}"
    "<br>z %{customdata[4]}, p %{customdata[5]}, q %{customdata[6]}<br>cosine of the deltas %{customdata[7]}"
    "<br>share of ‖ΔW‖² in them: %{customdata[8]} and %{customdata[9]}<extra></extra>"
)


@checked
def differences_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    subspace: str | None = None,
    rank: int | None = None,
    default_rank: int | None = None,
    kv: bool | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map log2(relative_a / relative_b) over layers and heads; a dot where the spread between runs tells them apart.

    Without several runs in both arms there are no dots: two runs of one recipe differ as well.

    Grey with a cross, or a diamond: where either delta is rounding, mostly or in part, as in `heads_figure`.

    Args:
        table: rows of `Comparison.table` of one pair of analyses.
        matrix: one of the table's.
        subspace: None: own input for a read matrix, "prediction" for a write matrix.
        rank, default_rank: one rank, or the first of the slider; None: all, first the middle one.
        kv, layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace or rank, or rows of several pairs.

    Example:
        >>> from tl_asymmetry.plots import differences_figure
        >>> differences_figure(comparison.table, "W_Q", rank=4).write_html("differences.html")
    """
    pick.require(
        table,
        (
            "a", "b", *pick.KEYS, "pathway", "log2_ratio", "ci_low", "ci_high", "seed_low", "seed_high", "seed_q",
            "vs_other", "rounding_share_a", "rounding_share_b",
        ),
        "Comparison.table",
    )  # fmt: skip
    a, b = _one_pair(table)
    style.one_of("matrix", matrix, list(dict.fromkeys(table["matrix"])), "matrix")
    rows = table[table["matrix"] == matrix]
    space = pick.default_subspace(table, matrix) if subspace is None else subspace
    style.one_of(f"subspace of {matrix}", space, list(dict.fromkeys(rows["subspace"])), "subspace")
    rows = rows[rows["subspace"] == space]
    ranks, start = pick.pick_ranks(rows, rank, default_rank, None)
    shared, group = pick.kv_group(table, matrix, kv)

    def side(row: Any, of: str, suffix: str) -> list[str]:
        columns = ("relative", "excess", "isotropic_q", "rounding_share")
        return [style.text(of), *(style.number(row[f"{column}_{suffix}"]) for column in columns)]

    def hover(row: Any, name: str) -> list[str]:
        ratio = style.as_float(row["log2_ratio"])
        return [
            name, *side(row, a, "a"), *side(row, b, "b"),
            style.MISSING if math.isnan(ratio) else style.number(2**ratio), interval(row, "ci"), interval(row, "seed"),
            style.number(row["seed_q"]),
        ]  # fmt: skip

    def interval(row: Any, of: str) -> str:
        low, high = style.as_float(row[f"{of}_low"]), style.as_float(row[f"{of}_high"])
        return "none" if math.isnan(low) else f"{style.number(2**low)} to {style.number(2**high)}"

    frames = []
    for k in ranks:
        here = rows[rows["rank"] == k]
        certain = here["vs_other"].isin(["larger", "smaller"])
        frames.append((here, here["log2_ratio"], certain))
    words = heading(
        f"{style.text(matrix)}: {style.text(a)} against {style.text(b)}",
        f"Ratio of the relative fractions in {style.text(space)}. Orange: more in {style.text(a)}. "
        + (
            f"Dot: told apart by the spread between runs ({FOUND})."
            if (rows["vs_other"] != "").any()
            else "One run an arm: nothing is counted as different."
        ),
        **layout,
    )
    shares = frames[0][0][["rounding_share_a", "rounding_share_b"]].max(axis=1)
    return _map(
        frames, ranks, start, matrix, hover, DIFFERENCE_HOVER, words, "a / b", "told apart by runs",
        rounding=shares, shared=shared, group=group, **layout,
    )  # fmt: skip


@checked
def overlap_figure(
    overlap: pd.DataFrame,
    matrix: str,
    *,
    kv: bool | None = None,
    what: str = "leading residual directions",
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map how far two deltas' leading residual directions span the same space, over chance; a dot where q ≤ 0.05.

    Args:
        overlap: rows of `Comparison.overlap` of one pair of analyses.
        matrix: one of the table's.
        kv, layout: as in `heads_figure`.
        what: which directions they are, for the title.

    Raises:
        ValueError: for an unknown matrix, or rows of several pairs.

    Example:
        >>> from tl_asymmetry.plots import overlap_figure
        >>> overlap_figure(comparison.overlap, "W_Q").write_html("overlap.html")
    """
    pick.require(overlap, ("a", "b", "layer", "head", "matrix", "overlap", "chance", "q"), "Comparison.overlap")
    a, b = _one_pair(overlap)
    style.one_of("matrix", matrix, list(dict.fromkeys(overlap["matrix"])), "matrix")
    rows = overlap[overlap["matrix"] == matrix]
    shared, group = pick.kv_group(overlap, matrix, kv)

    def hover(row: Any, name: str) -> list[str]:
        columns = ("overlap", "chance", "z", "p", "q", "cosine", "share_a", "share_b")
        return [name, str(int(row["directions"])), *(style.number(row[c]) for c in columns)]

    with np.errstate(divide="ignore", invalid="ignore"):
        value = pd.Series(np.log2((rows["overlap"] / rows["chance"]).to_numpy(float)), index=rows.index)
    words = heading(
        f"{style.text(matrix)}: directions shared",
        f"Overlap of the {what} of {style.text(a)} and {style.text(b)}, over that of random spaces. Dot: {FOUND}.",
        **layout,
    )
    return _map(
        [(rows, value, rows["q"] <= SIGNIFICANT)], [0], 0, matrix, hover, OVERLAP_HOVER, words, "× chance",
        FOUND, rounding=None, shared=shared, group=group, **layout,
    )  # fmt: skip


def _one_pair(table: pd.DataFrame) -> tuple[str, str]:
    pairs = table[["a", "b"]].drop_duplicates()
    if len(pairs) != 1:
        raise ValueError(f"expected the rows of one pair of analyses, got {len(pairs)}; pass those of one a and b")
    return str(pairs["a"].iloc[0]), str(pairs["b"].iloc[0])


def _map(
    frames: list[tuple[pd.DataFrame, pd.Series, pd.Series]],
    ranks: list[int],
    start: int,
    matrix: str,
    hover: Any,
    hover_template: str,
    words: str,
    bar: str,
    dot: str,
    *,
    rounding: pd.Series | None,
    shared: bool,
    group: int | None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """A layer × head map of log2 ratios, one for each rank, on one scale, and what rounding weakens."""
    layers, heads = pick.layers_of(frames[0][0]), pick.heads_of(frames[0][0])
    x = list(range(len(heads)))
    every = np.concatenate([value.to_numpy(float, na_value=np.nan) for _, value, _ in frames])
    limit = float(max(1, math.ceil(np.abs(every[np.isfinite(every)]).max(initial=0.0))))
    exponents, labels = style.ratio_ticks(-limit, limit)

    def drawn(at: int) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        rows, value, marked = frames[at]
        z = pick.grid(rows, value, layers, heads).clip(-limit, limit)
        cells = [[[style.MISSING] * 15 for _ in heads] for _ in layers]
        for row in rows.to_dict("records"):
            i = layers.index(int(row["layer"]))
            j = heads.index(None if pd.isna(row["head"]) else int(row["head"]))
            name = f"{head_name(layers[i], heads[j], kv=shared, group=group)} · {style.text(matrix)}"
            cells[i][j] = hover(row, name)
        down, across = np.nonzero(pick.grid(rows, marked.astype(float), layers, heads) == 1)
        shown = [[None if math.isnan(v) else round(float(v), 3) for v in r] for r in z]
        return (
            shown,
            cells,
            {
                "x": [int(v) for v in across] or [None],
                "y": [layers[v] for v in down] or [None],
            },
        )

    z, cells, dots = drawn(start)
    figure = Drawing(
        [
            heatmap(
                x=x, y=layers, z=z, zmin=-limit, zmax=limit, zmid=0, xgap=1, ygap=1,
                colorscale=style.diverging(layout.get("template")), meta="diverging", customdata=cells,
                hovertemplate=hover_template, name=matrix,
                colorbar={
                    "thickness": 12, "len": 1, "outlinewidth": 0, "x": 1.01, "xpad": 4, "tickmode": "array",
                    "tickvals": exponents, "ticktext": labels,
                    "title": {"text": bar, "side": "top", "font": {"size": 11}},
                },
            ),
            scatter(
                **dots, mode="markers", name=dot, hoverinfo="skip", showlegend=True,
                marker={"symbol": "circle", "size": 6, "color": "#14181f", "line": {"width": 1.4, "color": "#ffffff"}},
            ),
        ]
    )  # fmt: skip
    if len(ranks) > 1:
        steps = []
        for at in range(len(ranks)):
            z, cells, dots = drawn(at)
            change = {"z": [z, None], "customdata": [cells, None], "x": [x, dots["x"]], "y": [layers, dots["y"]]}
            steps.append([change, [0, 1]])
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])
    if rounding is not None and bool((rounding >= ROUNDING_FLAGGED).any()):
        laid_out = pick.grid(frames[0][0], rounding, layers, heads)
        figure.add_traces(maps.rounding_marks(laid_out, layers, maps.mark_size(layers, heads)))
    if not np.isfinite(every).any():
        note(figure, "No value: a delta is zero, so its fractions are undefined.")
    maps.head_axes(figure, layers, heads, shared)
    return finish(figure, words, right=64, plot_height=maps.map_height(layers), **layout)
