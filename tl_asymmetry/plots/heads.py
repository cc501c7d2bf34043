"""Layer × head map of one matrix: one cell per head, coloured by how far it is from chance or from another null."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.plots import maps, style
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.drawing import Drawing, heatmap
from tl_asymmetry.plots.held import ISOTROPIC, held_against
from tl_asymmetry.plots.hover import head_cells, head_fields, head_template, row_names
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note, rank_slider


@checked
def heads_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    nulls: pd.DataFrame | None = None,
    subspace: str | None = None,
    rank: int | None = None,
    value: str = "relative",
    default_rank: int | None = None,
    d_model: int | None = None,
    kv: bool | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Map one matrix over layers and heads, with a menu of values and a slider of ranks inside the figure.

    Colour is the distance from chance: blue below, neutral at it, orange above; ratios are coloured by their log2,
    so that 2 and 1/2 are equally strong. A dot marks what its test tells apart from the null shown (q ≤ 0.05): filled
    above it, hollow below. A white diamond marks a rounding share from 0.1, and a grey cell with a cross one from 0.5,
    where storage rather than training explains the delta. The colour range belongs to the rank shown. The hover gives
    the value, its interval, every null, and what weakens it.

    Args:
        table: `PairAnalysis.table`.
        matrix: one of the table's matrices; an MLP matrix gives a single column.
        subspace: one of the table's for that matrix; None: its own input for a read matrix, "prediction" for a
            write matrix, where the table has it.
        rank: show this rank only; None gives a slider over all of them.
        nulls: `PairAnalysis.nulls` in words (`results.nulls.described`); None: the nulls in the table's own columns.
        value: shown first: "relative", the key of another null or "excess" or "gradient_excess" (as the table has
            them), "unrounded" (relative with the rounding share removed), "z" or "verdict".
        default_rank: first rank of the slider; None: `d // 16`, or the middle one.
        d_model: width of the residual stream; None reads it off the table.
        kv: whether the heads of W_K and W_V are KV heads; None infers it from their number.
        layout: `title, template, width, height`; see `plots.layout.Layout`.

    Raises:
        ValueError: for an unknown matrix, subspace, rank or value, or a value this matrix has nowhere.

    Example:
        >>> heads_figure(result.table, "W_Q", value="excess").write_html("w_q.html")
    """
    chosen, space = pick.select(table, matrix, subspace)
    d = pick.d_model_of(table, d_model)
    ranks, start = pick.pick_ranks(chosen, rank, default_rank, d)
    layers, heads = pick.layers_of(table), pick.heads_of(chosen)
    experts = pick.has_experts(chosen)
    shared, group = pick.kv_group(table, matrix, kv)
    helds = held_against(table, nulls)
    values = maps.values_of(table, helds, d)
    first = maps.key_of(table, values, helds, value)
    shown = maps.offered(values, chosen)
    if first not in shown:
        raise ValueError(
            f"expected a value that {matrix} against {space} has, got {value!r}, which is NaN in every row; "
            f"pass value={shown[0]!r}"
        )
    by_rank = [chosen[chosen["rank"] == k] for k in ranks]
    looks = {key: [maps.look(values[key].grid(r, layers, heads), values[key]) for r in by_rank] for key in shown}

    x = list(range(len(heads)))
    size = maps.mark_size(layers, heads)
    figure = Drawing()
    owners: list[tuple[str, ...] | None] = []  # the values each trace belongs to; None: all
    for key in shown:
        cells = maps.cells(
            values[key], key, looks[key][start], layout.get("template"), x=x, y=layers, visible=key == first
        )
        figure.add_trace(cells)
        owners.append((key,))
    rounding = pick.grid(by_rank[start], by_rank[start]["rounding_share"], layers, heads)
    figure.add_traces(maps.rounding_marks(rounding, layers, size))
    owners += [None] * 3
    kinds = maps.tested(values, shown)
    dots = [
        [maps.where(pick.grid(r, held.relation.loc[r.index], layers, heads) == relation, layers) for r in by_rank]
        for _, relation, held, _ in kinds
    ]
    for (name, relation, _, of), at in zip(kinds, dots, strict=True):
        figure.add_trace(maps.dots(*at[start], relation, 0.75 * size, name) | {"visible": first in of})
        owners.append(of)
    told = [held for held in helds if held.of(chosen).there or held.key == ISOTROPIC]
    hovers = [
        head_cells(
            r, head_fields(r, row_names(r, shared, group), space, d, told), layers, heads,
            kv=shared, group=group, expert=experts, why=partial(pick.absence, chosen, table),
        )
        for r in by_rank
    ]  # fmt: skip
    # One transparent map on top carries every hover, so that the texts are stored once and not once per value.
    blank = [[0] * len(heads) for _ in layers]
    figure.add_trace(
        heatmap(
            x=x, y=layers, z=blank, showscale=False, name="hover",
            colorscale=[(0, "rgba(0,0,0,0)"), (1, "rgba(0,0,0,0)")], customdata=hovers[start],
            hovertemplate=head_template(matrix, told, verdict="verdict" in table.columns, experts=experts),
        )
    )  # fmt: skip
    owners.append(None)

    def words(key: str) -> str:
        at = f" at rank {ranks[0]}" if len(ranks) == 1 else ""
        return heading(
            f"{style.text(matrix)}: {style.text(values[key].label)}",
            f"Against {style.text(space)}{at}. {style.text(values[key].meaning)}",
            **layout,
        )

    if len(shown) > 1:
        options: list[tuple[str, list[Any]]] = [
            (
                style.text(values[key].label),
                [
                    {"visible": [of is None or key in of for of in owners]},
                    {"title.text": words(key), "margin.r": maps.bar_width(values[key])},
                ],
            )
            for key in shown
        ]
        figure.update_layout(updatemenus=[menu("value", options, active=shown.index(first), method="update")])
    if len(ranks) > 1:
        # The menu shows and hides traces, the slider refills them: so each works whatever the other stands at.
        n, m = len(shown), len(kinds)
        targets = [*range(n), *range(n + 3, n + 3 + m), len(owners) - 1]
        steps: list[Any] = []
        nowhere: list[Any] = [None]
        for step in range(len(ranks)):
            here = [looks[key][step] for key in shown]
            steps.append(
                [
                    {
                        "x": [x] * n + [kind[step][0] or nowhere for kind in dots] + [x],
                        "y": [layers] * n + [kind[step][1] or nowhere for kind in dots] + [layers],
                        "z": [k["z"] for k in here] + [None] * m + [blank],
                        **{name: [k[name] for k in here] + [None] * (m + 1) for name in ("zmin", "zmax", "text")},
                        **{
                            f"colorbar.{name}": [k[name] for k in here] + [None] * (m + 1)
                            for name in ("tickvals", "ticktext")
                        },
                        "customdata": [None] * (n + m) + [hovers[step]],
                    },
                    targets,
                ]
            )
        figure.update_layout(sliders=[rank_slider(ranks, start, steps)])

    if chosen["relative"].isna().all():
        note(figure, "No value: the delta is zero, so its fractions are undefined.")
    maps.head_axes(figure, layers, heads, shared, experts)
    return finish(
        figure,
        words(first),
        plot_height=maps.map_height(layers),
        right=maps.bar_width(values[first]),
        legend_px=maps.legend_height(kinds),
        **layout,
    )
