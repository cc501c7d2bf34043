"""Draw the README's figure, `heads.svg`: three maps of the embedded pair's heads.

    python docs/images/heads.py

Colours, marks and numbers are those of `PairAnalysis.plot_heads`, written as a small SVG that follows the reader's
light or dark preference.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tl_asymmetry import PairAnalysis, analyze_pair
from tl_asymmetry.demo import demo_pair, demo_texts
from tl_asymmetry.names import FOUND
from tl_asymmetry.plots import style

CELL, GAP, LEFT, TOP = 52, 34, 44, 66
PANELS = (
    ("W_Q reads its input", "W_Q", "attn_in", "relative", "vs_chance", "1 = a random subspace"),
    ("W_O writes for prediction", "W_O", "prediction", "relative", "vs_chance", "1 = a random subspace"),
    ("W_Q, excess over inputs", "W_Q", "attn_in", "excess", "vs_reference", "1 = Adam on these inputs"),
)
"""Title, matrix, subspace, column, the column of its test and what 1 means, of each map."""
LIMIT = 4
"""Octaves from chance at which colours end."""


def colour(octaves: float, theme: str) -> str:
    """The diverging scale's colour at a distance from chance."""
    stops = style.DIVERGING[theme]
    at = 0.5 + 0.5 * max(-1.0, min(1.0, octaves / LIMIT))
    parts = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for _, c in stops], dtype=float)
    mixed = [round(float(np.interp(at, [s for s, _ in stops], parts[:, i]))) for i in range(3)]
    return "#" + "".join(f"{v:02x}" for v in mixed)


def ink(background: str) -> str:
    """Black or white, whichever is read more easily on a colour."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (int(background[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#14181f" if (light + 0.05) / 0.06 > 1.05 / (light + 0.05) else "#ffffff"


def draw(result: PairAnalysis) -> str:
    """The figure, as SVG."""
    rank, shape = result.config["shown_rank"], result.config["shape"]
    layers, heads = shape["n_layers"], shape["n_heads"]
    wide, high = heads * CELL, layers * CELL
    rules: dict[str, list[str]] = {"light": [], "dark": []}
    parts: list[str] = []
    for n, (title, matrix, subspace, column, told, meaning) in enumerate(PANELS):
        x0 = LEFT + n * (wide + GAP)
        parts.append(f'<text x="{x0}" y="32" class="b">{title}</text><text x="{x0}" y="51" class="s">{meaning}</text>')
        table = result.table
        chosen = (table["matrix"] == matrix) & (table["subspace"] == subspace) & (table["rank"] == rank)
        for row in table[chosen].to_dict("records"):
            value, name = float(row[column]), f"p{n}l{row['layer']}h{row['head']}"
            for theme, css in rules.items():
                fill = colour(math.log2(value), theme)
                css.append(
                    f".{name}{{fill:{fill}}}.{name}t{{fill:{ink(fill)}}}"
                    f".{name}s{{fill:none;stroke:{ink(fill)};stroke-width:1.5}}"
                )
            x, y = x0 + int(row["head"]) * CELL, TOP + int(row["layer"]) * CELL
            dot = {
                "above": f'<circle cx="{x + CELL / 2 - 1}" cy="{y + 37}" r="3.2" class="{name}t"/>',
                "below": f'<circle cx="{x + CELL / 2 - 1}" cy="{y + 37}" r="3" class="{name}s"/>',
            }.get(row[told], "")
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL - 2}" height="{CELL - 2}" class="{name}"/>'
                f'<text x="{x + CELL / 2 - 1}" y="{y + 25}" class="c {name}t">{value:.2g}</text>' + dot
            )
        parts += [
            f'<text x="{x0 + h * CELL + CELL / 2 - 1}" y="{TOP + high + 14}" class="s c">{h}</text>'
            for h in range(heads)
        ]
    parts += [f'<text x="{LEFT - 8}" y="{TOP + i * CELL + CELL / 2 + 3}" class="s e">{i}</text>' for i in range(layers)]
    total, bottom = LEFT + len(PANELS) * wide + (len(PANELS) - 1) * GAP + 20, TOP + high + 62
    foot = (
        f"Layers down, heads across. Share of each head's weight change in the leading {rank} of {shape['d_model']} "
        "directions, over chance."
    )
    parts += [
        f'<text x="{LEFT}" y="{bottom - 26}" class="s">{foot}</text>',
        f'<text x="{LEFT}" y="{bottom - 9}" class="s">Orange: more than 1. Blue: less. A dot: told apart from 1 by its '
        f"own test, {FOUND}, filled above it, hollow below.</text>",
    ]

    def sheet(theme: str) -> str:
        return f".bg{{fill:{style.PAPER[theme]}}}text{{fill:{style.INK[theme]}}}" + "".join(rules[theme])

    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {bottom}" width="{total}" height="{bottom}" '
        f'role="img" aria-label="Three maps of layers by heads of the embedded pair">'
        f"<style>text{{font:13px {style.FONT.replace(chr(39), '')}}}.b{{font-weight:600;font-size:14px}}"
        f".s{{font-size:12px}}.c{{text-anchor:middle}}.e{{text-anchor:end}}{sheet('light')}"
        f"@media (prefers-color-scheme:dark){{{sheet('dark')}}}</style>"
        f'<rect class="bg" width="{total}" height="{bottom}" rx="8"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    result = analyze_pair(*demo_pair(), demo_texts(400, seed=0))
    Path(__file__).with_name("heads.svg").write_text(draw(result), encoding="utf-8")
