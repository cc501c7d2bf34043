"""Layer × head maps of a delta in the base weight's own frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND, SIGNIFICANT
from tl_asymmetry.plots import maps, style
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots.drawing import Drawing, heatmap
from tl_asymmetry.plots.hover import head_name
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu

VALUES = {
    "on_principal_relative": ("on-principal share over chance", "1 = chance: a delta at random orientation."),
    "left_relative": ("share on the input side over chance", "1 = chance, the base's leading left vectors."),
    "right_relative": ("share on the output side over chance", "1 = chance, the base's leading right vectors."),
    "on_principal_unshrunk": ("on-principal share over chance, shrinkage removed", "1 = chance, of ΔW − sW."),
    "coupling": ("coupling of both sides", "1 = no more than the product of the one-sided shares."),
    "changed_relative": ("entries changed, over a dense change", "1 = small, not sparse; below: sparse. Of storage."),
}
"""What a map can show: its label, and what its center means."""
BARS = {"coupling": "coupling", "changed_relative": "× dense"}
"""Headings of the colour bar, where it is not chance."""
HOVER = (
    "<b>%{customdata[0]}</b>, rank %{customdata[1]}<br>on-principal %{customdata[2]}, %{customdata[3]} × chance"
    "<br>p %{customdata[4]}, q %{customdata[5]}<br>one side: left %{customdata[6]} ×, right %{customdata[7]} ×; "
    "coupling %{customdata[8]}<br>without shrinkage %{customdata[9]} ×; rounding alone %{customdata[10]} ×"
    "<br>intruders left %{customdata[11]} (by chance %{customdata[12]}), right %{customdata[13]} (%{customdata[14]})"
    "<br>rotation left %{customdata[15]} (%{customdata[16]}), right %{customdata[17]} (%{customdata[18]})"
    "<br>entries changed %{customdata[19]} (dense: %{customdata[20]}); rounding share %{customdata[21]}<extra></extra>"
)
_HOVERED = (
    "rank", "on_principal", "on_principal_relative", "on_principal_p", "on_principal_q", "left_relative",
    "right_relative", "coupling", "on_principal_unshrunk", "on_principal_rounding", "intruders", "intruders_expected",
    "intruders_right", "intruders_right_expected", "rotation_left", "rotation_left_expected", "rotation_right",
    "rotation_right_expected", "changed_share", "changed_expected", "rounding_share",
)  # fmt: skip


@checked
def spectra_figure(
    table: pd.DataFrame,
    matrix: str,
    *,
    value: str = "on_principal_relative",
    rank: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw one matrix of a spectral analysis: a cell per head, coloured by log2 about 1, a dot where q ≤ 0.05.

    Args:
        table: `SpectralAnalysis.table`.
        matrix: its name.
        value: shown first; a menu has the others of `VALUES`.
        rank: None: the largest.
        layout: as in `heads_figure`.

    Raises:
        ValueError: a matrix, rank or value that is not there.

    Example:
        >>> from tl_asymmetry import analyze_spectra
        >>> spectra = analyze_spectra(base, aligned, matrices=["W_Q"], ranks=[1, 4], progress=False)
        >>> spectra_figure(spectra.table, "W_Q", rank=4).write_html("spectra.html")
    """
    style.one_of("matrix", matrix, list(dict.fromkeys(table["matrix"])), "matrix")
    style.one_of("value", value, list(VALUES), "value")
    rows = table[table["matrix"] == matrix]
    ranks = sorted(int(k) for k in rows["rank"].unique())
    rank = ranks[-1] if rank is None else style.one_of("rank", rank, ranks, "rank")
    rows = rows[rows["rank"] == rank]
    layers, heads = pick.layers_of(rows), pick.heads_of(rows)
    shared, group = pick.kv_group(table, matrix, None)
    shown = {
        key: maps.Value(label, meaning, BARS.get(key, "× chance"), rows[key].astype(float))
        for key, (label, meaning) in VALUES.items()
    }
    figure = Drawing()
    x = list(range(len(heads)))
    for key, one in shown.items():
        look = maps.look(one.grid(rows, layers, heads), one)
        figure.add_trace(maps.cells(one, key, look, layout.get("template"), x=x, y=layers, visible=key == value))
    size = maps.mark_size(layers, heads)
    figure.add_traces(maps.rounding_marks(pick.grid(rows, rows["rounding_share"], layers, heads), layers, size))
    above = pick.grid(rows, rows["on_principal_q"], layers, heads) <= SIGNIFICANT
    name = f"on-principal above chance ({FOUND})"
    figure.add_trace(maps.dots(*maps.where(above, layers), 1, 0.75 * size, name))
    figure.add_trace(
        heatmap(
            x=x, y=layers, z=np.zeros((len(layers), len(heads))).tolist(), showscale=False, name="hover",
            colorscale=[(0, "rgba(0,0,0,0)"), (1, "rgba(0,0,0,0)")], hovertemplate=HOVER,
            customdata=_hovers(rows, layers, heads, shared, group),
        )
    )  # fmt: skip

    def words(key: str) -> str:
        label, meaning = VALUES[key]
        return heading(f"{style.text(matrix)}: {label}", f"The base's {rank} leading directions. {meaning}", **layout)

    options: list[tuple[str, list[Any]]] = [
        (label, [{"visible": [key == other for other in VALUES] + [True] * 5}, {"title.text": words(key)}])
        for key, (label, _) in VALUES.items()
    ]
    figure.update_layout(updatemenus=[menu("value", options, active=list(VALUES).index(value), method="update")])
    maps.head_axes(figure, layers, heads, shared)
    return finish(figure, words(value), plot_height=maps.map_height(layers), right=64, **layout)


def _hovers(rows: pd.DataFrame, layers: list[int], heads: list[int | None], shared: bool, group: int | None) -> Any:
    at = {(int(r["layer"]), None if pd.isna(r["head"]) else int(r["head"])): r for _, r in rows.iterrows()}
    empty = [""] * (1 + len(_HOVERED))
    return [
        [
            [head_name(layer, head, kv=shared, group=group), *(style.number(at[layer, head][c]) for c in _HOVERED)]
            if (layer, head) in at
            else empty
            for head in heads
        ]
        for layer in layers
    ]
