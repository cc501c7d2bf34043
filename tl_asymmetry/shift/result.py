"""What `activation_shift` gives back: the shift at each point, what the weights foretell of it, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result
from tl_asymmetry.results.top import in_order

if TYPE_CHECKING:
    import plotly.graph_objects as go

SHIFT_COLUMNS = {
    "layer": "layer, from 0",
    "point": '"resid_mid" (after attention) or "resid_post" (after the block)',
    "shift_norm": "‖Δμ‖: mean over tokens of the aligned stream less the base's",
    "relative": "‖Δμ‖ over ‖μ‖ of the base",
    "direct_norm": "norm of what ΔW of all write matrices up to here does to the base's mean inputs",
    "direct_cosine": "its cosine with Δμ",
    "direct_explained": "1 − ‖Δμ − direct‖² / ‖Δμ‖²; below 0 it predicts worse than nothing",
    "first_order_norm": "norm of the derivative of the mean stream in the direction of all parameters' change",
    "first_order_cosine": "its cosine with Δμ",
    "first_order_explained": "1 − ‖Δμ − first order‖² / ‖Δμ‖²",
    "leading_cosine": "|cosine| of Δμ with the leading direction that ΔW of the matrices writing here writes",
    "leading_expected": "the same of a random direction, on average",
    "leading_p": "how often a random direction comes as near, exactly",
}
"""Columns of `ActivationShift.table`."""

HEAD_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head of W_O; NA for W_out",
    "matrix": "W_O or W_out",
    "point": "where it writes",
    "write_norm": "norm of what its ΔW does to the base's mean input",
    "cosine": "its cosine with Δμ there",
    "share": "⟨written, Δμ⟩ / ‖Δμ‖²: its share of the shift; shares of all that wrote so far need not add up to 1",
}
"""Columns of `ActivationShift.heads`."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class ActivationShift(Result):
    """How far mean activations are apart, and how much of that the weights foretell. Made by `activation_shift`.

    `table` has one row per point of the stream: see `SHIFT_COLUMNS`.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "heads")

    LISTED = ("share", "cosine", "write_norm")

    heads: pd.DataFrame
    """One row per head of W_O and per W_out: see `HEAD_COLUMNS`."""

    def vector(self, layer: int, point: str = "resid_post", which: str = "shift") -> Tensor:
        """Δμ at a point, `[d_model]` float64, or what is foretold of it (`which="direct"`, `"first_order"`).

        Raises:
            ValueError: no such layer, point or prediction.
        """
        key = f"{which}/{point}/{layer}"
        if key not in self.arrays:
            there = ", ".join(dict.fromkeys(name.rpartition("/")[0] for name in self.arrays))
            raise ValueError(f"expected one of {there} at a layer of the model, got {key}; pass which, point and layer")
        return self.arrays[key]

    def _listed(self) -> pd.DataFrame:
        """Heads: their direct writing takes part in the shift where they write."""
        return self.heads

    def plot(
        self, *, title: str | None = None, template: Any = None, width: int | None = None, height: int | None = None
    ) -> go.Figure:
        """The shift over the layers and what is foretold of it. See `plots.shift_figure`."""
        from tl_asymmetry.plots import shift_figure

        return shift_figure(self.table, title=title, template=template, width=width, height=height)

    def _title(self) -> str:
        models = self.config["models"]
        return f"{models['base']['name']} → {models['aligned']['name']}"

    def _facts(self) -> str:
        return f"mean activations over {self.config['tokens']} tokens in {self.config['sequences']} sequences"

    def _summary_table(self) -> pd.DataFrame:
        columns = ["layer", "point", "relative", "direct_explained", "first_order_explained", "leading_cosine",
                   "leading_expected"]  # fmt: skip
        return self.table.loc[self.table["point"] == "resid_post", columns]

    def _headline(self) -> list[str]:
        last = self.table.iloc[-1]
        if not last["shift_norm"] > 0:
            return ["The mean activations do not differ."]
        said = (
            f"After the last block the mean stream has moved by {last['relative']:.2g} of its length. The direct "
            f"writes of ΔW explain {last['direct_explained']:.0%} of that"
        )
        if pd.notna(last["first_order_explained"]):
            said += f", the first order in all parameters {last['first_order_explained']:.0%}"
        return [said + " (below 0: worse than predicting no shift)."]

    def _report(self) -> Report:
        taking_part = in_order(self.heads, "share", self.LISTED)
        return self._page(
            figures=[FigureSection("Does the weight explain the shift?", self.plot(), "1: all of it.")],
            tables=[
                TableSection("Points of the stream", self.table, "One row per point.", "table"),
                TableSection("Heads that take most part", taking_part.head(20), "By share of the shift.", "top"),
                TableSection("All write matrices", self.heads, "One row per head.", "heads"),
            ],
            methods=[*SHIFT_COLUMNS.items(), *HEAD_COLUMNS.items()],
            definitions=DEFINITIONS,
        )


DEFINITIONS = (
    Definition(
        "Direct write", "[ours]",
        "ΔW of the write matrices applied to the base's mean inputs, added up over heads, matrices and layers: what "
        "the shift would be if nothing but those products changed. Biases, norms and changed inputs are not in it.",
    ),
    Definition(
        "First order", "[ours]",
        "The derivative of the base's mean stream as all parameters move to the aligned model's, by forward-mode "
        "differentiation: all paths through the model, each to first order.",
    ),
    Definition(
        "Leading write direction", "[ours]",
        "The first singular direction on the residual side of ΔW of the matrices that write at a point, heads "
        "together. A random direction's squared cosine is Beta(1/2, (d − 1)/2).",
    ),
)  # fmt: skip
