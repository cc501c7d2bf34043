"""Tangent proxies against gradients: energy and anisotropy over training, and by how frequent a token is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked
from tl_asymmetry.names import BASIS_METHODS, SIGNIFICANT
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note, slider

SOURCE = "TangentAnalysis.table"
SITE = {"resid_post": "block output"}
"""What sites are called, where their names are not words."""

HOVER = (
    "<b>%{customdata[0]}</b><br>step %{x}<br>energy in the basis %{customdata[1]}"
    "<br>normal controls %{customdata[2]}: ratio %{customdata[3]}, p %{customdata[4]} (size at 0.05: %{customdata[5]})"
    "<br>expected from the activations' spectrum %{customdata[6]}: excess %{customdata[7]}"
    "<br>most any subspace of this rank holds %{customdata[8]}"
    "<br>anisotropy in the basis %{customdata[9]}, normal controls %{customdata[10]}, p %{customdata[11]}"
    "<extra></extra>"
)
STRATUM_HOVER = (
    "<b>%{customdata[0]}</b><br>log-frequency %{customdata[1]} to %{customdata[2]}<br>%{customdata[3]} tokens with a "
    "gradient, %{customdata[4]} of the gradient's energy<br>energy in the basis %{customdata[5]}: ratio "
    "%{customdata[6]}, p %{customdata[7]}<br>distance to the centroid %{customdata[8]}<extra></extra>"
)


@checked
def tangent_energy_figure(
    table: pd.DataFrame,
    *,
    gradient: str | None = None,
    method: str | None = None,
    rank: int | None = None,
    basis_until: float | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw the energy of gradients in the fixed basis, relative to normal controls, layer by layer over training.

    Solid: energy / mean energy of the controls. Dotted, same colour: what the activations' own spectrum would give, in
    the same units. Dashed grey: 1, the controls. A menu picks the matrix, all heads together; a filled point has p at
    most 0.05, which for controls from the complement is no level of 0.05 (see the hover).

    Args:
        table: `TangentAnalysis.table`.
        gradient: "weight" or "activation"; None: the first the table has.
        method: "pca" or "semi_nmf"; None: the first.
        rank: of the basis; None: the one nearest 16.
        basis_until: last step the basis was fitted on, drawn as a line.
        layout: as in `heads_figure`.

    Raises:
        ValueError: for a gradient, method or rank the table does not have.

    Example:
        >>> from tl_asymmetry.plots import tangent_energy_figure
        >>> tangent_energy_figure(tangents.table, gradient="weight").write_html("energy.html")
    """
    rows, named = _select(table, gradient, method, rank)
    rows = rows.assign(_null=rows["spectrum_expected"] / rows["normal_energy"])
    return _curves(
        rows, "ratio", "_null", "p", axis="energy / normal controls", ratio=True,
        words=(
            f"Energy of {named[0]} gradients in early directions",
            f"{named[1]}. Solid: over the mean of the normal controls (dashed: 1). Dotted: what the activations' own "
            "spectrum would give. Filled: p ≤ 0.05.",
        ),
        basis_until=basis_until, **layout,
    )  # fmt: skip


@checked
def tangent_anisotropy_figure(
    table: pd.DataFrame,
    *,
    gradient: str | None = None,
    method: str | None = None,
    rank: int | None = None,
    basis_until: float | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw how much rounder gradients become once the basis is taken out of them, layer by layer over training.

    Solid: ΔIso of the basis. Dotted, same colour: mean ΔIso of the normal controls. Dashed grey: 0, no change.

    Args:
        table, gradient, method, rank, basis_until, layout: as in `heads_figure`.

    Raises:
        ValueError: for a gradient, method or rank the table does not have.

    Example:
        >>> from tl_asymmetry.plots import tangent_anisotropy_figure
        >>> tangent_anisotropy_figure(tangents.table, gradient="activation").write_html("anisotropy.html")
    """
    rows, named = _select(table, gradient, method, rank)
    return _curves(
        rows, "anisotropy", "normal_anisotropy", "anisotropy_p", axis="gain in isotropy", ratio=False,
        words=(
            f"Anisotropy of {named[0]} gradients in early directions",
            f"{named[1]}. Solid: isotropy gained when the basis is taken out (ΔIso). Dotted: when a normal control is. "
            "Filled: p ≤ 0.05.",
        ),
        basis_until=basis_until, **layout,
    )  # fmt: skip


@checked
def tangent_strata_figure(
    strata: pd.DataFrame,
    *,
    method: str | None = None,
    rank: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw strata of token frequency, rare to frequent: energy of their gradients, and distance to the centroid.

    One line a layer; a slider over the checkpoints, first the last one.

    Args:
        strata: `TangentAnalysis.strata`.
        method, rank, layout: as in `heads_figure`.

    Raises:
        ValueError: for a method or rank the table does not have, or a table without strata.

    Example:
        >>> from tl_asymmetry.plots import tangent_strata_figure
        >>> tangent_strata_figure(tangents.strata).write_html("strata.html")
    """
    pick.require(strata, ("step", "layer", "method", "rank", "stratum", "energy", "distance"), "TangentAnalysis.strata")
    rows, chosen, k = _of_family(strata, method, rank)
    steps, layers = sorted(int(s) for s in rows["step"].unique()), pick.layers_of(rows)
    colours = style.sequential(len(layers))
    figure = Drawing(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.09)
    panels = (("energy", 1), ("distance", 2))

    def drawn(step: int, layer: int, column: str) -> tuple[list[int], list[float | None], list[list[str]]]:
        here = rows[(rows["step"] == step) & (rows["layer"] == layer)].sort_values("stratum")
        hover = [_stratum_hover(row) for row in here.to_dict("records")]
        return [int(s) for s in here["stratum"]], [_or_none(v) for v in here[column]], hover

    for column, at in panels:
        for layer, colour in zip(layers, colours, strict=True):
            x, y, hover = drawn(steps[-1], layer, column)
            figure.add_trace(
                scatter(
                    x=x, y=y, mode="lines+markers", name=f"L{layer}", legendgroup=str(layer), showlegend=at == 1,
                    line={"color": colour, "width": 2}, marker={"size": 8, "color": colour}, customdata=hover,
                    hovertemplate=STRATUM_HOVER,
                ),
                row=at, col=1,
            )  # fmt: skip
    if len(steps) > 1:
        changes = []
        for step in steps:
            parts = [drawn(step, layer, column) for column, _ in panels for layer in layers]
            changes.append((str(step), [{"y": [y for _, y, _ in parts], "customdata": [h for _, _, h in parts]}]))
        figure.update_layout(sliders=[slider("step", changes, active=len(steps) - 1, prefix="step ")])
    for column, at, name in (("energy", 1, "energy in the basis"), ("distance", 2, "distance to centroid")):
        values = rows[column].to_numpy(float)
        top = float(np.nanmax(values, initial=0.0))
        figure.update_yaxes(title=name, range=[0, 1.08 * top if top > 0 else 1], row=at, col=1)
    numbers = sorted(int(s) for s in rows["stratum"].unique())
    labels = [
        "rarest" if n == numbers[0] else "most frequent" if n == numbers[-1] else str(n) for n in numbers
    ]  # fmt: skip
    figure.update_xaxes(tickmode="array", tickvals=numbers, ticktext=labels)
    figure.update_xaxes(
        title="fifth of all tokens" if len(numbers) == 5 else "stratum of token frequency", row=2, col=1
    )
    words = heading(
        "By token frequency",
        f"Per-token gradients at the block output against the {BASIS_METHODS.get(chosen, style.text(chosen))} basis of "
        f"rank {k}; strata of equal mass in the corpus, one line a layer.",
        **layout,
    )
    return finish(figure, words, plot_height=440, **layout)


def _select(
    table: pd.DataFrame, gradient: str | None, method: str | None, rank: int | None
) -> tuple[pd.DataFrame, tuple[str, str]]:
    """Rows of whole matrices for one kind of gradient, method and rank, and how titles name them."""
    pick.require(
        table, ("step", "layer", "head", "gradient", "site", "method", "rank", "energy", "normal_energy", "ratio", "p"),
        SOURCE,
    )  # fmt: skip
    kinds = list(dict.fromkeys(table["gradient"]))
    kind = kinds[0] if gradient is None else style.one_of("gradient", gradient, kinds, "gradient")
    rows, chosen, k = _of_family(table[(table["gradient"] == kind) & table["head"].isna()], method, rank)
    return rows, (style.text(kind), f"{BASIS_METHODS.get(chosen, style.text(chosen))} basis of rank {k}")


def _of_family(table: pd.DataFrame, method: str | None, rank: int | None) -> tuple[pd.DataFrame, str, int]:
    methods = list(dict.fromkeys(table["method"]))
    chosen = methods[0] if method is None and methods else style.one_of("method", method, methods, "method")
    rows = table[table["method"] == chosen]
    ranks = sorted(int(r) for r in rows["rank"].unique())
    k = min(ranks, key=lambda r: (abs(r - 16), r)) if rank is None else style.one_of("rank", rank, ranks, "rank")
    return rows[rows["rank"] == k], str(chosen), int(k)


def _curves(
    rows: pd.DataFrame,
    value: str,
    null: str,
    p: str,
    *,
    axis: str,
    ratio: bool,
    words: tuple[str, str],
    basis_until: float | None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """One line a layer over steps with its null, a menu over sites."""
    sites, layers = list(dict.fromkeys(rows["site"])), pick.layers_of(rows)
    colours = style.sequential(len(layers))
    figure = Drawing()

    def drawn(site: str, layer: int) -> dict[str, list[Any]]:
        here = rows[(rows["site"] == site) & (rows["layer"] == layer)].sort_values("step")
        return {
            "x": [int(s) for s in here["step"]],
            "y": [_or_none(v) for v in here[value]],
            "null": [_or_none(v) for v in here[null]],
            "hover": [_hover(row) for row in here.to_dict("records")],
            "symbol": ["circle" if style.as_float(v) <= SIGNIFICANT else "circle-open" for v in here[p]],
        }

    for layer, colour in zip(layers, colours, strict=True):
        shown = drawn(sites[0], layer)
        figure.add_trace(
            scatter(
                x=shown["x"], y=shown["null"], mode="lines", line={"color": colour, "dash": "dot", "width": 1.5},
                hoverinfo="skip", showlegend=False, legendgroup=str(layer), name=f"L{layer} null",
            )
        )  # fmt: skip
        figure.add_trace(
            scatter(
                x=shown["x"], y=shown["y"], mode="lines+markers", name=f"L{layer}", legendgroup=str(layer),
                line={"color": colour, "width": 2}, customdata=shown["hover"], hovertemplate=HOVER,
                marker={"size": 8, "color": colour, "symbol": shown["symbol"], "line": {"color": colour, "width": 1.5}},
            )
        )  # fmt: skip

    def titled(site: str) -> str:
        return heading(words[0], f"{style.text(SITE.get(site, site))}, {words[1]}", **layout)

    if len(sites) > 1:
        options = []
        for site in sites:
            parts = [drawn(site, layer) for layer in layers]
            restyled = {
                "y": [y for part in parts for y in (part["null"], part["y"])],
                "customdata": [h for part in parts for h in (None, part["hover"])],
                "marker.symbol": [m for part in parts for m in (None, part["symbol"])],
            }
            label = style.text(SITE.get(site, site))
            options.append((label, [restyled, {"title.text": titled(site)}]))
        figure.update_layout(updatemenus=[menu("site", options, method="update")])
    figure.add_hline(y=1 if ratio else 0, line={"color": style.GUIDE, "dash": "dash", "width": 1.5})
    if basis_until is not None:
        figure.add_vline(x=basis_until, line={"color": style.GUIDE, "dash": "dot", "width": 1})
    seen = [v for v in rows[[value, null]].to_numpy(float).ravel() if np.isfinite(v)]
    if ratio:
        figure.update_yaxes(title=axis, **style.ratio_axis(seen))
    else:
        low, high = min([*seen, 0.0]), max([*seen, 1e-6])
        air = 0.06 * (high - low)
        figure.update_yaxes(title=axis, range=[low - air, high + air])
    steps = rows["step"].to_numpy(float)
    air = 0.03 * max(steps.max() - steps.min(), 1.0)
    figure.update_xaxes(title="training step", range=[steps.min() - air, steps.max() + air])
    if not seen:
        note(figure, "No value: the gradients are zero, so their fractions are undefined.")
    return finish(figure, titled(sites[0]), plot_height=330, **layout)


def _hover(row: Mapping[Any, Any]) -> list[str]:
    name = f"L{int(row['layer'])} · {style.text(SITE.get(row['site'], row['site']))}"
    columns: Sequence[str] = (
        "energy", "normal_energy", "ratio", "p", "size", "spectrum_expected", "excess", "largest_energy", "anisotropy",
        "normal_anisotropy", "anisotropy_p",
    )  # fmt: skip
    return [name, *(style.number(row[column]) for column in columns)]


def _stratum_hover(row: Mapping[Any, Any]) -> list[str]:
    columns = (
        "log_frequency_low", "log_frequency_high", "tokens", "gradient_share", "energy", "ratio", "p", "distance"
    )  # fmt: skip
    numbers = [str(int(row[c])) if c == "tokens" else style.number(row[c]) for c in columns]
    return [f"L{int(row['layer'])} · stratum {int(row['stratum'])} (1 = rarest)", *numbers]


def _or_none(value: Any) -> float | None:
    value = style.as_float(value)
    return value if np.isfinite(value) else None
