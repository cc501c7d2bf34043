"""Layer × head maps: the values a cell can show, their colours, and the marks over cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from tl_asymmetry.names import FOUND, ROUNDING_DOMINATED, ROUNDING_FLAGGED
from tl_asymmetry.plots import rows as pick
from tl_asymmetry.plots import style
from tl_asymmetry.plots.drawing import Drawing, Trace, heatmap, scatter
from tl_asymmetry.plots.held import ISOTROPIC, Held, repeats
from tl_asymmetry.plots.layout import LEGEND_PX

VERDICTS = {
    "beyond": ("▲", "#8f4304"),
    "more than its inputs give": ("△", "#a55fb0"),
    "concentrated": ("●", "#d9812c"),
    "as trained": ("≈", "#f0c48c"),
    "less than trained": ("▽", "#b4d2e8"),
    "depleted": ("▼", "#1b4f8a"),
    "no evidence": ("·", "#d8d6cf"),
    "unchanged": ("–", "#b9bdc3"),
    "not measurable": ("×", "#8d949c"),
}
"""Verdicts of a table, each with a sign that needs no colour, and a colour."""


@dataclass(frozen=True)
class Value:
    """One quantity a map can show."""

    label: str
    """Its name in the menu and the title."""
    meaning: str
    """What its centre stands for, in the title."""
    bar: str
    """Heading of the colour bar."""
    numbers: pd.Series
    """On the table's index."""
    kind: str = "ratio"
    """"ratio": coloured by log2, centred on 1; "plain": as it is, centred on 0; "verdict": a place in `VERDICTS`."""
    held: Held | None = None
    """The null whose test its dots show."""
    absent: str = "no value"
    """Said in place of a map whose matrix has no such value."""

    def grid(self, rows: pd.DataFrame, layers: Sequence[int], heads: Sequence[int | None]) -> np.ndarray:
        """Its numbers of some rows, laid out as [layer, head]."""
        return pick.grid(rows, self.numbers.loc[rows.index], layers, heads)


def values_of(table: pd.DataFrame, helds: Sequence[Held], d: int | None) -> dict[str, Value]:
    """What maps of a table can show, in the order of menus: `relative`, the excess over each other null, `unrounded`
    (relative with the rounding share removed), `z`, and the `verdict` where the table has one."""
    chance = next(held for held in helds if held.key == ISOTROPIC)

    def of(column: str) -> pd.Series:
        return pd.Series(table[column].to_numpy(float, na_value=np.nan), index=table.index)

    ratio = f"relative fraction over {chance.over}"
    values = {"relative": Value(ratio, chance.meaning, "× chance", of("relative"), held=chance)}
    for held in helds:
        if held.key != ISOTROPIC:
            values[held.key] = Value(
                f"excess over {held.over}", held.meaning, "× reference", held.numbers["excess"], held=held,
                absent=f"no value:<br>{held.label}<br>applies to {held.applies}",
            )  # fmt: skip
    unrounded = pd.Series(pick.in_relative_units(table, "fraction_unrounded", d), index=table.index)
    values["unrounded"] = Value(f"{ratio}, rounding removed", chance.meaning, "× chance", unrounded, held=chance)
    values["z"] = Value(
        "isotropic z", "0 = chance: standard deviations of a random subspace from its mean.", "z", of("isotropic_z"),
        kind="plain", held=chance,
    )  # fmt: skip
    if "verdict" in table.columns:
        code = {verdict: float(i) for i, verdict in enumerate(VERDICTS)}
        values["verdict"] = Value(
            "verdict", "What the tests of both nulls say together.", "", table["verdict"].map(code).astype(float),
            kind="verdict",
        )  # fmt: skip
    return values


def key_of(table: pd.DataFrame, values: Mapping[str, Value], helds: Sequence[Held], value: str) -> str:
    """The key of the value that a user's word names: a key, or a column of the table that repeats a null's excess.

    Raises:
        ValueError: another word.
    """
    if value in values:
        return value
    columns = [c for c in ("excess", "gradient_excess") if c in table.columns]
    style.one_of("value", value, [*values, *columns], "value")
    same = [held.key for held in helds if held.key in values and repeats(table, held.numbers, value)]
    if not same:
        raise ValueError(f"expected a value that some matrix has, got {value!r}, which is NaN in every row; "
                         "pass value='relative'")  # fmt: skip
    return same[0]


def offered(values: Mapping[str, Value], table: pd.DataFrame) -> list[str]:
    """Keys of the values that some of the rows have; `relative` always."""
    return [key for key, v in values.items() if key == "relative" or v.numbers.loc[table.index].notna().any()]


def look(numbers: np.ndarray, value: Value, limit: float | None = None) -> dict[str, Any]:
    """What a map of these numbers sets: cells, colour limits (symmetric: given, or theirs), ticks of the colour bar,
    and what is written in the cells."""
    if value.kind == "verdict":
        signs, names = [sign for sign, _ in VERDICTS.values()], list(VERDICTS)
        return {
            "z": lists(numbers), "zmin": -0.5, "zmax": len(names) - 0.5, "tickvals": list(range(len(names))),
            "ticktext": [f"{sign} {name}" for sign, name in zip(signs, names, strict=True)],
            "text": [["" if math.isnan(v) else signs[int(v)] for v in row] for row in numbers],
        }  # fmt: skip
    if value.kind == "plain":
        finite = np.abs(numbers[np.isfinite(numbers)])
        limit = limit or float(max(finite.max(initial=0.0), 2.0))
        tick = 10 ** math.floor(math.log10(limit))
        tick *= 1 if limit / tick < 2 else 2 if limit / tick < 5 else 4
        ticks = [-tick, 0, tick]
        return {
            "z": lists(numbers), "zmin": -limit, "zmax": limit, "tickvals": ticks,
            "ticktext": [f"{t:g}" for t in ticks], "text": None,
        }  # fmt: skip
    with np.errstate(divide="ignore", invalid="ignore"):
        # Zero, and what a correction took below it, is as far under chance as the scale goes.
        logs = np.where(numbers <= 0, -np.inf, np.log2(numbers))
    finite = np.abs(logs[np.isfinite(logs)])
    limit = limit or float(max(1, math.ceil(finite.max(initial=0.0))))
    exponents, labels = style.ratio_ticks(-limit, limit)
    return {
        "z": lists(np.where(np.isneginf(logs), -limit, logs)), "zmin": -limit, "zmax": limit,
        "tickvals": exponents, "ticktext": labels, "text": None,
    }  # fmt: skip


def cells(value: Value, name: str, shown: Mapping[str, Any], template: Any, **where: Any) -> Trace:
    """The coloured cells of one value.

    Args:
        value, name: what is shown, and the name of the trace.
        shown: from `look`.
        template: of the figure, for the colours.
        where: `x`, `y`, `visible`, `showscale`.
    """
    colours: dict[str, Any] = {"zmid": 0, "colorscale": style.diverging(template), "meta": "diverging"}
    if value.kind == "verdict":
        steps = [(i / len(VERDICTS), (i + 1) / len(VERDICTS), c) for i, (_, c) in enumerate(VERDICTS.values())]
        colours = {
            "colorscale": [(at, c) for low, high, c in steps for at in (low, high)], "text": shown["text"],
            "texttemplate": "%{text}",
        }  # fmt: skip
    return heatmap(
        z=shown["z"], zmin=shown["zmin"], zmax=shown["zmax"], xgap=1, ygap=1, hoverinfo="skip", name=name, **colours,
        colorbar={
            "thickness": 12, "len": 0.94, "y": 0, "yanchor": "bottom", "outlinewidth": 0, "x": 1.01, "xpad": 4,
            "title": {"text": value.bar, "side": "top", "font": {"size": 11}},
            "tickmode": "array", "tickvals": shown["tickvals"], "ticktext": shown["ticktext"],
        },
        **where,
    )  # fmt: skip


def lists(values: np.ndarray) -> list[list[float | None]]:
    """Nested lists with None for NaN, three decimals: what menus and sliders can carry."""
    return [[None if math.isnan(v) else round(float(v), 3) for v in row] for row in values]


class Dots(NamedTuple):
    """One kind of dots over maps."""

    name: str
    """In the legend."""
    relation: int
    """1: rows told to lie above the null; −1: below it."""
    held: Held
    """The null."""
    values: tuple[str, ...]
    """Keys of the values that are held against it."""


def tested(values: Mapping[str, Value], shown: Sequence[str]) -> list[Dots]:
    """The kinds of dots over the maps of some values."""
    kinds = []
    for held in {v.held.key: v.held for v in (values[key] for key in shown) if v.held is not None}.values():
        of = tuple(key for key in shown if values[key].held is held)
        for relation, word in ((1, "above"), (-1, "below")):
            if held.key == ISOTROPIC and relation == 1 or (held.relation == relation).any():
                kinds.append(Dots(f"{word} {held.over} ({FOUND})", relation, held, of))
    return kinds


def dots(x: list[float], y: list[float], relation: int, size: float, name: str) -> Trace:
    """Dots over cells: filled above a null, hollow below."""
    return marks(x, y, "circle", size, name, light=relation == -1)


def where(mask: np.ndarray, layers: Sequence[int], offset: float = 0.0) -> tuple[list[float], list[float]]:
    """Coordinates of the cells of a mask [layer, head], moved towards the upper right by `offset` of a cell."""
    i, j = np.nonzero(mask)
    return [float(v) + offset for v in j], [float(layers[int(v)]) - offset for v in i]


def mark_size(layers: list[int], heads: list[int | None]) -> float:
    """Pixels of a mark that fits the cells of a map."""
    return float(np.clip(180 / max(len(layers), len(heads)), 5, 11))


def rounding_marks(rounding: np.ndarray, layers: list[int], size: float) -> list[Trace]:
    """Grey and a cross over cells whose delta is mostly rounding, a diamond where part of it is.

    Args:
        rounding: rounding shares [layer, head]; NaN has no mark.
        layers: the map's.
        size: of a mark, pixels.
    """
    dominated = rounding >= ROUNDING_DOMINATED
    grey = heatmap(
        x=list(range(rounding.shape[1])), y=layers, z=lists(np.where(dominated, 1.0, np.nan)), zmin=0, zmax=1,
        showscale=False, opacity=0.85, colorscale=[(0, "#8d949c"), (1, "#8d949c")], xgap=1, ygap=1, hoverinfo="skip",
        name="greyed",
    )  # fmt: skip
    crossed = where(dominated, layers)
    partly = where((rounding >= ROUNDING_FLAGGED) & ~dominated, layers, offset=0.28)
    return [
        grey,
        marks(*crossed, "x", 1.5 * size, f"rounding share ≥ {ROUNDING_DOMINATED} (mostly storage)"),
        marks(*partly, "diamond", 0.9 * size, f"rounding share ≥ {ROUNDING_FLAGGED}", light=True),
    ]


def marks(x: list[float], y: list[float], symbol: str, size: float, name: str, *, light: bool = False) -> Trace:
    """Marks over cells: dark with a light rim or the reverse, which shows on every colour and on both pages."""
    dark, bright = "#14181f", "#ffffff"
    marker = {
        "symbol": symbol, "size": size, "color": bright if light else dark,
        "line": {"width": 1.4, "color": dark if light else bright},
    }  # fmt: skip
    # A trace without a point has no legend entry, so an unused mark keeps one point that is not drawn.
    at: dict[str, list[Any]] = {"x": [*x] or [None], "y": [*y] or [None]}
    return scatter(**at, mode="markers", marker=marker, name=name, hoverinfo="skip", showlegend=True, meta="mark")


def map_height(layers: Sequence[int]) -> int:
    """Pixels of a map, not counting what stands around it."""
    return int(np.clip(26 * len(layers), 220, 620))


def legend_height(kinds: Sequence[Dots]) -> int:
    """Pixels kept for the legend: on a narrow page each of its entries has a line of its own."""
    return LEGEND_PX + 20 * max(0, len({kind.relation for kind in kinds}) - 1)


def bar_width(value: Value) -> int:
    """Pixels kept on the right for a value's colour bar: verdicts are words."""
    return 190 if value.kind == "verdict" else 64


def unit_word(shared: bool, experts: bool) -> str:
    """What the columns of a map are."""
    return "expert" if experts else "KV head" if shared else "head"


def head_axes(
    figure: Drawing, layers: Sequence[int], heads: Sequence[int | None], shared: bool, experts: bool = False
) -> None:
    """Axes of a layer × head map: the first layer on top, a single column for a matrix of the MLP."""
    single = list(heads) == [None]
    ticks = style.integer_ticks(list(range(len(heads))))
    figure.update_xaxes(
        title=None if single else unit_word(shared, experts), showgrid=False, constrain="domain",
        tickmode="array", tickvals=ticks["tickvals"], range=[-0.5, len(heads) - 0.5],
        ticktext=["MLP"] if single else [str(heads[i]) for i in ticks["tickvals"]],
    )  # fmt: skip
    figure.update_yaxes(
        title="layer", showgrid=False, range=[layers[-1] + 0.5, layers[0] - 0.5], **style.integer_ticks(layers, 24)
    )
