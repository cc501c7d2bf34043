"""Eigenvalue spectra: how concentrated what a matrix sees is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tl_asymmetry.arguments import checked, listed
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, scatter
from tl_asymmetry.plots.layout import Layout, Unpack, finish, heading, menu, note, slider

MOST_POINTS = 400
EVERY_INDEX = 64
DASHES = ("solid", "dash", "dot", "dashdot")


@checked
def spectrum_figure(
    eigenvalues: Mapping[str, Any] | Any,
    *,
    name: str = "",
    edge: float | Mapping[str, float] | None = None,
    ranks: Sequence[int] = (),
    layer: int | None = None,
    **layout: Unpack[Layout],
) -> go.Figure:
    """Draw eigenvalues in descending order on log-log axes, one line per layer or per named spectrum.

    A slider picks one spectrum out or shows all; a menu switches between eigenvalues and their share of the total,
    in which spectra of different scale can be compared. Beyond the first 64 indexes, at most 400 log-spaced ones
    are drawn, and the title says so.

    Args:
        eigenvalues: array [layer, d], or a mapping from names to arrays [d] or [layer, d]; any scale, not negative
            but for rounding. What is not positive cannot stand on a log axis; the title counts it.
        name: what an array's spectra are of, e.g. "attn_in".
        edge: Marchenko–Pastur edge in the units of the eigenvalues: one, or one per named spectrum ("L0", "L1", …
            for an array).
        ranks: ranks to mark by vertical lines.
        layer: show this layer of an array first; None shows all.
        layout: as in `heads_figure`.

    Raises:
        ValueError: for an array of the wrong shape, an unknown layer, or an edge without a spectrum.

    Example:
        >>> spectrum_figure(result.eigenvalues("attn_in"), name="attn_in", ranks=[16]).write_html("spectrum.html")
    """
    spectra = _named(eigenvalues)
    names = list(spectra)
    if layer is not None:
        style.one_of("layer", f"L{layer}", names, "layer")
    edges = edge if isinstance(edge, Mapping) else {} if edge is None else dict.fromkeys(names, edge)
    for key in edges:
        style.one_of("edge's name", key, names, "edge")
    ranks = listed("ranks", ranks, int, instead="ranks=[16]")
    for k in ranks:
        if k < 1:
            raise ValueError(f"expected ranks >= 1, got {k}; pass ranks=() for no lines")
    figure = Drawing()
    dropped, thinned = 0, False
    colours = list(style.SERIES) if len(names) <= len(style.SERIES) else style.sequential(len(names))
    absolute, shares = [], []
    first = names.index(f"L{layer}") if layer is not None else None
    for i, (key, values) in enumerate(spectra.items()):
        positive = values > 0
        dropped += int((~positive).sum())
        at = _indexes(len(values))
        thinned = thinned or len(at) < len(values)
        at = at[positive[at]]
        absolute.append(values[at])
        total = values[positive].sum()
        shares.append(values[at] / total if total > 0 else values[at])
        figure.add_trace(
            scatter(
                x=at + 1, y=absolute[-1], mode="lines", name=style.text(key), visible=first is None or i == first,
                line={
                    "color": colours[i], "width": 1.8,
                    "dash": DASHES[i % len(DASHES)],
                },
                customdata=[[style.number(v, 4), style.number(v / total if total > 0 else None)] for v in absolute[-1]],
                hovertemplate=(
                    f"<b>{style.text(key)}</b>, index %{{x}}<br>eigenvalue %{{customdata[0]}}"
                    "<br>share of the total %{customdata[1]}<extra></extra>"
                ),
            )
        )  # fmt: skip
    marked = [key for key in names if key in edges]
    for key in marked:
        i = names.index(key)
        size = len(spectra[key])
        figure.add_trace(
            scatter(
                x=[1, size], y=[edges[key]] * 2, mode="lines", line={"color": colours[i], "dash": "dash", "width": 1.3},
                name=f"{style.text(key)}: Marchenko–Pastur edge", visible=first is None or i == first,
                showlegend=len(names) == 1, customdata=[[style.number(edges[key], 4), style.MISSING]] * 2,
                hovertemplate=f"{style.text(key)}: Marchenko–Pastur edge %{{customdata[0]}}<extra></extra>",
            )
        )  # fmt: skip
    for k in ranks:
        figure.add_vline(x=k, line={"color": style.GUIDE, "dash": "dot", "width": 1})
        # An annotation on a log axis stands at the logarithm, which add_vline's own annotation does not know.
        figure.add_annotation(
            text=f"k = {k}", x=math.log10(k), y=1, yref="paper", xanchor="left", yanchor="top", showarrow=False,
            font={"size": 11},
        )  # fmt: skip

    totals = {key: float(v[v > 0].sum()) for key, v in spectra.items()}
    relative = [s.tolist() for s in shares] + [
        [edges[k] / totals[k] if totals[k] > 0 else None] * 2 for k in marked
    ]  # fmt: skip
    plain = [a.tolist() for a in absolute] + [[float(edges[k])] * 2 for k in marked]
    ranges = [_range([*parts, [v for line in lines[len(names) :] for v in line if v]])
              for parts, lines in ((absolute, plain), (shares, relative))]  # fmt: skip
    below = sum(len(a) - len(_before_cliff(a)) for a in absolute)
    figure.update_layout(
        updatemenus=[
            menu(
                "value",
                [
                    (label, [{"y": ys}, {"yaxis.title.text": label, "yaxis.range": range_of}])
                    for label, ys, range_of in zip(
                        ("eigenvalue", "share of the total"), (plain, relative), ranges, strict=True
                    )
                ],
                method="update",
            )
        ]
    )
    if len(names) > 1:
        owners = [*names, *marked]
        steps = [("all", [True] * len(owners))] + [(n, [o == n for o in owners]) for n in names]
        figure.update_layout(
            sliders=[
                slider(
                    "spectrum",
                    [(style.text(label), [{"visible": which}]) for label, which in steps],
                    active=0 if first is None else first + 1,
                    prefix="shown: ",
                )
            ]
        )
    figure.update_xaxes(title="index (largest first)", type="log", dtick=1, minor={"ticks": ""})
    figure.update_yaxes(title="eigenvalue", type="log", exponentformat="power", dtick=1, range=ranges[0])
    if not any(len(a) for a in absolute):
        note(figure, "No positive eigenvalue.")
    remarks = [
        f"{dropped} eigenvalues that are not positive have no place on a log axis." if dropped else "",
        f"{below} last eigenvalues, a hundred times smaller than the one before, lie under the axis." if below else "",
        f"Drawn at {MOST_POINTS} log-spaced indexes at most." if thinned else "",
        "Dashed: Marchenko–Pastur edge (descriptive: tokens are dependent)." if marked else "",
    ]
    of = f" of {style.text(name)}" if name else ""
    words = heading(
        f"Eigenvalue spectra{of}",
        " ".join(["A flat line would be an isotropic space.", *filter(None, remarks)]),
        **layout,
    )
    many = len(names) > 12
    return finish(figure, words, plot_height=380, legend=not many, **layout)


def _before_cliff(values: np.ndarray) -> np.ndarray:
    """Descending eigenvalues without a last one that is next to nothing.

    A norm that removes the mean leaves one direction without variance; rounding puts it far below all others, where it
    would stretch the axis.
    """
    return values[:-1] if len(values) > 2 and values[-1] < 0.01 * values[-2] else values


def _range(parts: Sequence[Any]) -> list[float] | None:
    """Range of a log axis that holds some spectra and edges."""
    seen = [v for part in parts for v in _before_cliff(np.asarray(part, dtype=float)) if v > 0]
    return [math.log10(min(seen)) - 0.15, math.log10(max(seen)) + 0.15] if seen else None


def _named(eigenvalues: Any) -> dict[str, np.ndarray]:
    """Spectra by name, each [d] and descending; a layer axis is unrolled into L0, L1, …"""
    if isinstance(eigenvalues, Mapping):
        parts = {str(k): _array(v, f"eigenvalues[{k!r}]") for k, v in eigenvalues.items()}
    else:
        array = _array(eigenvalues, "eigenvalues")
        parts = {"": array[None] if array.ndim == 1 else array}
    spectra: dict[str, np.ndarray] = {}
    for key, array in parts.items():
        if array.ndim == 1:
            spectra[key] = array
            continue
        for i, row in enumerate(array):
            spectra[f"{key} L{i}".strip()] = row
    if not spectra:
        raise ValueError("expected at least one spectrum, got none; pass result.eigenvalues(subspace)")
    return {key: np.sort(v)[::-1] for key, v in spectra.items()}


def _array(values: Any, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim not in (1, 2) or array.shape[-1] == 0:
        raise ValueError(
            f"expected {what} of shape [d] or [layer, d], got {list(array.shape)}; pass result.eigenvalues(subspace)"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"expected {what} without NaN or infinity, got some; pass eigenvalues of finite moments")
    return array


def _indexes(size: int) -> np.ndarray:
    """Indexes drawn: the first 64 all, then log-spaced ones, the last among them."""
    if size <= MOST_POINTS:
        return np.arange(size)
    later = np.geomspace(EVERY_INDEX, size - 1, MOST_POINTS - EVERY_INDEX)
    return np.unique(np.concatenate([np.arange(EVERY_INDEX), np.round(later).astype(int)]))
