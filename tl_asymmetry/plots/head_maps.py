"""All layer × head maps of a table in one figure: a menu of matrices, one of values and their nulls, a slider of ranks.

plotly's controls know nothing of each other: each can only set attributes to what was written into it beforehand. So
that any combination works, every control owns attributes of its own. All maps are laid out on one sheet, matrices
below each other and ranks side by side: the menu of matrices moves the window's vertical range, the slider of ranks
its horizontal one (and the colour limits), the menu of values shows and hides traces. Nothing is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import ROUNDING_DOMINATED, ROUNDING_FLAGGED
from tl_asymmetry.plots import maps, style
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.drawing import Drawing, Trace, heatmap, merged, scatter
from tl_asymmetry.plots.held import ISOTROPIC, Held, held_against
from tl_asymmetry.plots.hover import head_cells, head_fields, head_template, row_names
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note, rank_slider

_ONLY_INSIDE = {"marker": {"maxdisplayed": 1_000_000}}
"""A limit no figure reaches: with one set, plotly draws only the marks inside the window."""


@checked
def head_maps_figure(
    table: pd.DataFrame,
    *,
    nulls: pd.DataFrame | None = None,
    matrix: str | None = None,
    subspace: str | None = None,
    value: str = "relative",
    default_rank: int | None = None,
    d_model: int | None = None,
    kv: bool | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map every matrix over layers and heads, with menus of matrices and values and a slider of ranks that combine.

    Colours and marks are those of `heads_figure`. The colour range belongs to the value and rank shown and is the
    same for all matrices, so that maps can be compared. A value comes with the null it is held against: the
    isotropic one (as a ratio or in standard deviations), or a matched reference. A KV head spans the query heads it
    serves, an MLP matrix the whole width.

    Args:
        table, nulls: as in `heads_figure`.
        matrix, subspace: shown first; None: the table's first matrix, against its usual subspace.
        value: shown first, as in `heads_figure`.
        default_rank: shown first; None: `d // 16`, or the middle one.
        d_model, kv, layout: as in `heads_figure`.

    Raises:
        ValueError: for an unknown matrix, subspace, rank or value, or a value no matrix has.

    Example:
        >>> head_maps_figure(result.table, matrix="W_O").write_html("maps.html")
    """
    pick.require(table, pick.COLUMNS)
    first = str(table["matrix"].iloc[0]) if matrix is None else matrix
    first_space = pick.select(table, first, subspace)[1]
    d = pick.d_model_of(table, d_model)
    ranks, start = pick.pick_ranks(table, None, default_rank, d)
    layers = pick.layers_of(table)
    helds = held_against(table, nulls)
    values = maps.values_of(table, helds, d)
    value = maps.key_of(table, values, helds, value)
    shown = maps.offered(values, table)
    if value not in shown:
        raise ValueError(f"expected a value that some matrix has, got {value!r}, which is NaN in every row; "
                         f"pass value={shown[0]!r}")  # fmt: skip
    values = {key: values[key] for key in shown}
    kinds = maps.tested(values, shown)
    pairs = list(dict.fromkeys(zip(table["matrix"], table["subspace"], strict=True)))
    blocks = [
        _block(table, m, s, n, ranks=ranks, layers=layers, d=d, kv=kv, values=values, helds=helds, kinds=kinds)
        for n, (m, s) in enumerate(pairs)
    ]
    columns = max(len(b.heads) for b in blocks)
    at_first = pairs.index((first, first_space))

    figure = Drawing()
    # One colour limit for each value and rank.
    looks = {
        key: [maps.look(np.concatenate([b.grids[key][r].ravel() for b in blocks])[None], v) for r in range(len(ranks))]
        for key, v in values.items()
    }
    owners: list[tuple[str, ...]] = []  # the values each of the first traces belongs to
    for key, v in values.items():
        bar = True
        for block in blocks:
            if not any(np.isfinite(g).any() for g in block.grids[key]):
                figure.add_trace(_absent(block, v.absent, columns, len(ranks), visible=key == value))
            else:
                cells = [maps.look(g, v, look["zmax"]) for g, look in zip(block.grids[key], looks[key], strict=True)]
                sheet = {name: _sheet([cell[name] for cell in cells], None) for name in ("z", "text") if cells[0][name]}
                figure.add_trace(
                    maps.cells(
                        v, key, {**looks[key][start], **sheet}, layout.get("template"),
                        **block.axes(columns, len(ranks)), showscale=bar, visible=key == value,
                    )
                )  # fmt: skip
                bar = False
            owners.append((key,))
    coloured = [i for i, trace in enumerate(figure.data) if trace["type"] == "heatmap"]
    size = float(np.clip(180 / max(len(layers), columns), 5, 11))
    for name, relation, _, of in kinds:
        dots = maps.dots(*_places(blocks, columns, name), relation, 0.75 * size, name)
        figure.add_trace(merged(dots, {"visible": value in of, **_ONLY_INSIDE}))
        owners.append(of)

    for block in blocks:
        if any(mask.any() for mask in block.masks["dominated"]):
            figure.add_trace(_grey(block, columns, len(ranks)))
    for mark in (
        maps.marks(*_places(blocks, columns, "dominated"), "x", 1.5 * size,
                   f"rounding share ≥ {ROUNDING_DOMINATED} (mostly storage)"),
        maps.marks(*_places(blocks, columns, "rounded", 0.28), "diamond", 0.9 * size,
                   f"rounding share ≥ {ROUNDING_FLAGGED}", light=True),
    ):  # fmt: skip
        figure.add_trace(merged(mark, _ONLY_INSIDE))
    for block in blocks:
        figure.add_trace(_hover(block, columns, len(ranks)))

    def words(key: str) -> str:
        label = values[key].label
        return heading(style.text(label[:1].upper() + label[1:]), style.text(values[key].meaning), **layout)

    menus = []
    if len(blocks) > 1:
        menus.append(
            menu(
                "matrix",
                [(b.label, [_window(b, columns, len(ranks))]) for b in blocks],
                active=at_first,
                method="relayout",
            )
        )
    if len(shown) > 1:
        indexes = list(range(len(owners)))
        options: list[tuple[str, list[Any]]] = [
            (
                style.text(v.label),
                [
                    {"visible": [key in of for of in owners]},
                    {"title.text": words(key), "margin.r": maps.bar_width(v)},
                    indexes,
                ],
            )
            for key, v in values.items()
        ]
        menus.append(menu("value and its null", options, active=shown.index(value), method="update"))
    ranges = [[r * (columns + 1) - 0.5, r * (columns + 1) + columns - 0.5] for r in range(len(ranks))]
    if len(ranks) > 1:
        steps = []
        for r in range(len(ranks)):
            of_maps = [looks[owners[i][0]][r] for i in coloured]
            limits = {
                **{name: [k[name] for k in of_maps] for name in ("zmin", "zmax")},
                **{f"colorbar.{name}": [k[name] for k in of_maps] for name in ("tickvals", "ticktext")},
            }
            steps.append([limits, {"xaxis.range": ranges[r]}, coloured])
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])
    figure.update_layout(updatemenus=menus, dragmode=False)

    window = _window(blocks[at_first], columns, len(ranks))
    figure.update_xaxes(
        title=window["xaxis.title.text"], showgrid=False, range=ranges[start], fixedrange=True, tickmode="array",
        tickvals=window["xaxis.tickvals"], ticktext=window["xaxis.ticktext"],
    )  # fmt: skip
    ticks = style.integer_ticks(range(len(layers)), 24)["tickvals"]
    figure.update_yaxes(
        title="layer", showgrid=False, range=window["yaxis.range"], fixedrange=True, tickmode="array",
        tickvals=[b.top + i for b in blocks for i in ticks], ticktext=[str(layers[i]) for _ in blocks for i in ticks],
    )  # fmt: skip
    if table["relative"].isna().all():
        note(figure, "No value: the delta is zero, so its fractions are undefined.")
    return finish(
        figure,
        words(value),
        plot_height=maps.map_height(layers),
        right=maps.bar_width(values[value]),
        legend_px=maps.legend_height(kinds),
        **layout,
    )


@dataclass(frozen=True)
class _Block:
    """The maps of one matrix against one subspace, on the sheet."""

    label: str
    """In the menu."""
    axis: str
    """Title of the horizontal axis."""
    top: int
    """Vertical position of the first layer."""
    heads: list[int | None]
    """Its own heads."""
    hovertemplate: str
    """Of its cells."""
    grids: dict[str, list[np.ndarray]]
    """Numbers [layer, head] by value and rank."""
    masks: dict[str, list[np.ndarray]]
    """Which cells carry which mark, by rank."""
    hovers: list[list[list[list[str]]]]
    """Fields of each cell's hover, by rank."""

    @property
    def layers(self) -> int:
        return len(self.grids["relative"][0])

    def edges(self, columns: int, ranks: int) -> list[float]:
        """Horizontal edges of all its cells, and of an empty column between ranks."""
        wide = columns / len(self.heads)
        return [
            round(r * (columns + 1) - 0.5 + n * wide, 4) for r in range(ranks) for n in range(len(self.heads) + 1)
        ]  # fmt: skip

    def axes(self, columns: int, ranks: int) -> dict[str, Any]:
        """Where its cells lie on the sheet."""
        return {"x": self.edges(columns, ranks), "y": [self.top + i for i in range(self.layers)]}


def _block(
    table: pd.DataFrame, matrix: str, space: str, number: int, *,
    ranks: Sequence[int], layers: list[int], d: int | None, kv: bool | None,
    values: Mapping[str, maps.Value], helds: Sequence[Held], kinds: Sequence[maps.Dots],
) -> _Block:  # fmt: skip
    rows, _ = pick.select(table, matrix, space)
    heads = pick.heads_of(rows)
    shared, group = pick.kv_group(table, matrix, kv)
    cells, shape = pick.places(rows, layers, heads, ranks), (len(ranks), len(layers), len(heads))

    def laid_out(numbers: pd.Series) -> list[np.ndarray]:
        return list(pick.laid_out(cells, numbers.loc[rows.index], shape))

    rounding = laid_out(rows["rounding_share"])
    name, against = style.text(matrix), style.text(space)
    experts = pick.has_experts(rows)
    what = maps.unit_word(shared, experts) if heads != [None] else "no heads, one value a layer"
    told = [held for held in helds if held.of(rows).there or held.key == ISOTROPIC]
    fields = pd.Series(head_fields(rows, row_names(rows, shared, group), space, d, told), rows.index)
    return _Block(
        label=f"{name} in {against}",
        axis=f"{what} · {name} against {against}",
        top=number * (len(layers) + 1),
        heads=heads,
        hovertemplate=head_template(matrix, told, verdict="verdict" in table.columns, experts=experts),
        grids={key: laid_out(v.numbers) for key, v in values.items()},
        masks={
            "dominated": [g >= ROUNDING_DOMINATED for g in rounding],
            "rounded": [(g >= ROUNDING_FLAGGED) & (g < ROUNDING_DOMINATED) for g in rounding],
            **{
                dot: [grid == relation for grid in laid_out(held.relation)] for dot, relation, held, _ in kinds
            },
        },
        hovers=[
            head_cells(
                r, fields.loc[r.index], layers, heads,
                kv=shared, group=group, expert=experts, why=partial(pick.absence, rows, table),
            )
            for k in ranks
            for r in [rows.loc[rows["rank"] == k, ["layer", "head"]]]
        ],
    )  # fmt: skip


def _window(block: _Block, columns: int, ranks: int) -> dict[str, Any]:
    """What the menu of matrices sets: which layers, and the names of the heads under every rank."""
    wide = columns / len(block.heads)
    ticks = style.integer_ticks(range(len(block.heads)))["tickvals"] if block.heads != [None] else []
    return {
        "yaxis.range": [block.top + block.layers - 0.5, block.top - 0.5],
        "xaxis.title.text": block.axis,
        "xaxis.tickvals": [r * (columns + 1) - 0.5 + (i + 0.5) * wide for r in range(ranks) for i in ticks],
        "xaxis.ticktext": [str(block.heads[i]) for _ in range(ranks) for i in ticks],
    }


def _sheet(parts: Sequence[Sequence[Sequence[Any]]], empty: Any) -> list[list[Any]]:
    """Maps [layer][head] of all ranks side by side, an empty column between two."""
    return [
        [cell for r, part in enumerate(parts) for cell in ([empty] if r else []) + list(part[i])]
        for i in range(len(parts[0]))
    ]  # fmt: skip


def _absent(block: _Block, why: str, columns: int, ranks: int, *, visible: bool) -> Trace:
    """Words in the middle of an empty map."""
    middle = [r * (columns + 1) + (columns - 1) / 2 for r in range(ranks)]
    return scatter(
        x=middle, y=[block.top + (block.layers - 1) / 2] * ranks, text=[why] * ranks, mode="text", hoverinfo="skip",
        showlegend=False, visible=visible, cliponaxis=True, name="absent",
    )  # fmt: skip


def _grey(block: _Block, columns: int, ranks: int) -> Trace:
    cells = [np.where(mask, 1.0, np.nan) for mask in block.masks["dominated"]]
    return heatmap(
        **block.axes(columns, ranks), xgap=1, ygap=1, z=_sheet([maps.lists(c) for c in cells], None), zmin=0, zmax=1,
        showscale=False, opacity=0.85, colorscale=[(0, "#8d949c"), (1, "#8d949c")], hoverinfo="skip", name="greyed",
    )  # fmt: skip


def _hover(block: _Block, columns: int, ranks: int) -> Trace:
    """A transparent map that carries the words of every cell, stored once and not once for each value."""
    axes = block.axes(columns, ranks)
    return heatmap(
        **axes, xgap=1, ygap=1, z=[[0] * (len(axes["x"]) - 1) for _ in axes["y"]], showscale=False, name="hover",
        colorscale=[(0, "rgba(0,0,0,0)"), (1, "rgba(0,0,0,0)")], customdata=_sheet(block.hovers, []),
        hovertemplate=block.hovertemplate,
    )  # fmt: skip


def _places(
    blocks: Sequence[_Block], columns: int, mark: str, offset: float = 0.0
) -> tuple[list[float], list[float]]:  # fmt: skip
    """Where the marked cells of all maps lie on the sheet."""
    xs: list[float] = []
    ys: list[float] = []
    for block in blocks:
        wide = columns / len(block.heads)
        for r, mask in enumerate(block.masks[mark]):
            i, j = np.nonzero(mask)
            xs += [round(r * (columns + 1) - 0.5 + (n + 0.5) * wide + offset, 3) for n in j.tolist()]
            ys += [block.top + n - offset for n in i.tolist()]
    return xs, ys
