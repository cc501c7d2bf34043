"""What `rewind_study` gives back: heads alone, heads together, the way of the whole model, figures, a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.names import counted
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result
from tl_asymmetry.results.top import in_order

if TYPE_CHECKING:
    import plotly.graph_objects as go

UNIT_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head of a kv_head; NA for an MLP",
    "part": '"head", "kv_head" (keys and values that serve several heads) or "mlp"',
    "matrices": "what is set back together",
    "delta_norm": "‖ΔW‖ over these matrices",
    "kl": "KL(aligned ‖ edited) of next-token predictions, mean over places, nats",
    "ce": "cross-entropy on the texts, edited less aligned, nats",
    "shift": "share of the shift undone: 1 − KL(base ‖ edited) / KL(base ‖ aligned)",
    "matched_mean": "mean of shift over the units of the same part nearest in ‖ΔW‖",
    "matched_percentile": "share of these with a smaller shift, ties counting half, in per cent",
    "matched": "how many they are",
}
"""Columns of `RewindStudy.table`."""

CURVE_COLUMNS = {
    "order": '"importance" (shift alone, largest first), "norm" (‖ΔW‖), "random", or "matched": in place of each unit '
    "of the first half by importance, one of the second half that changed as much",
    "draw": "number of the random order, from 0",
    "count": "units set back together",
    "share": "their share of all units",
    "delta_share": "their share of ‖ΔW‖²",
    "kl": "as in the table",
    "ce": "as in the table",
    "shift": "as in the table",
}
"""Columns of `RewindStudy.curve`."""

PATH_COLUMNS = {
    "share": "how far all parameters are moved to the base: 0 the aligned model, 1 the base",
    "shift": "share of the shift undone",
    "ce": "cross-entropy on the texts, nats",
    "ce_straight": "the same on the straight line between the two models' own",
    "barrier": "ce less ce_straight: above 0 there is a barrier between the models",
}
"""Columns of `RewindStudy.path`."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class RewindStudy(Result):
    """Heads set back to the base, alone and together, and what of the alignment that undoes. Made by `rewind_study`.

    `table` has one row per unit, most often a head: see `UNIT_COLUMNS`.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "curve", "path")
    LISTED = ("shift", "matched_mean", "matched_percentile", "kl", "ce", "delta_norm")
    SIGNED = ("ce",)

    curve: pd.DataFrame
    """One row per order, draw and number of units set back together: see `CURVE_COLUMNS`."""
    path: pd.DataFrame
    """The whole model moved to the base by degrees: see `PATH_COLUMNS`."""

    # -- numbers -------------------------------------------------------------------------------------------------

    def areas(self) -> pd.DataFrame:
        """Area under each curve of `shift` over `share`, 1/2 for a straight line to 1; the matched one is partial.

        Returns:
            Columns `order`, `draws`, `area` (mean over draws), `low`, `high` (smallest and largest draw), `up_to` (the
            share of units at which the curve ends).
        """
        rows = []
        for order, block in self.curve.groupby("order", sort=False):
            areas = [_area(draw) for _, draw in block.groupby("draw")]
            rows.append(
                {"order": order, "draws": len(areas), "area": np.mean(areas), "low": min(areas), "high": max(areas),
                 "up_to": block["share"].max()}
            )  # fmt: skip
        return pd.DataFrame(rows, columns=["order", "draws", "area", "low", "high", "up_to"])

    @property
    def barrier(self) -> float:
        """The largest height of cross-entropy above the straight line between the models, nats; NaN without path."""
        return float(self.path["barrier"].max()) if len(self.path) else float("nan")

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_curve(
        self, *, title: str | None = None, template: Any = None, width: int | None = None, height: int | None = None
    ) -> go.Figure:
        """Share of the shift undone over the share of heads set back. See `plots.rewind_curve_figure`."""
        from tl_asymmetry.plots import rewind_curve_figure

        return rewind_curve_figure(self.curve, title=title, template=template, width=width, height=height)

    def plot_heads(
        self, *, title: str | None = None, template: Any = None, width: int | None = None, height: int | None = None
    ) -> go.Figure:
        """What each unit undoes alone, against how much it changed. See `plots.rewind_heads_figure`."""
        from tl_asymmetry.plots import rewind_heads_figure

        return rewind_heads_figure(self.table, title=title, template=template, width=width, height=height)

    def plot_path(
        self, *, title: str | None = None, template: Any = None, width: int | None = None, height: int | None = None
    ) -> go.Figure:
        """The whole model moved to the base by degrees. See `plots.rewind_path_figure`."""
        from tl_asymmetry.plots import rewind_path_figure

        return rewind_path_figure(self.path, title=title, template=template, width=width, height=height)

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        models = self.config["models"]
        return f"{models['aligned']['name']} set back to {models['base']['name']}"

    def _facts(self) -> str:
        config = self.config
        return (
            f"{config['units']} units of {', '.join(config['matrices'])}; {config['tokens']} tokens in "
            f"{counted(config['sequences'], 'sequence')}; {config['baseline']['kl_other']:.3g} nats apart"
        )

    def _most(self) -> pd.DataFrame:
        """All units, those first whose setting back alone undoes most."""
        return in_order(self.table, "shift", self.LISTED).drop(columns="matrices")

    def _summary_table(self) -> pd.DataFrame:
        return self._most().head(10)

    def _headline(self) -> list[str]:
        if self.config["baseline"]["kl_other"] == 0:
            return ["The two models predict the same: there is no shift to undo."]
        whole = self.curve[self.curve["count"] == self.config["units"]]["shift"].iloc[0]
        sentences = [f"All {self.config['units']} units together undo {whole:.1%} of the shift."]
        half = self.curve[self.curve["share"] <= 0.5]
        at = half[half["share"] == half["share"].max()]
        if at["share"].iloc[0] > 0:
            of = {order: block["shift"] for order, block in at.groupby("order", sort=False)}
            parts = [f"{of['importance'].iloc[0]:.1%} in order of importance", f"{of['norm'].iloc[0]:.1%} by ‖ΔW‖"]
            parts.append(f"{of['random'].min():.1%} to {of['random'].max():.1%} in {len(of['random'])} random orders")
            if "matched" in of:
                parts.append(f"{of['matched'].iloc[0]:.1%} for others that changed as much")
            share = at["share"].iloc[0]
            sentences.append(f"{share:.0%} of the units undo {', '.join(parts)} (the first found on these texts).")
        if len(self.path):
            sentences.append(
                f"Moving the whole model, cross-entropy rises at most {self.barrier:.3g} nats above the straight line "
                "between the two."
            )
        return sentences

    def _report(self) -> Report:
        figures = [
            FigureSection("How much of the shift is undone", self.plot_curve(), "Grey: random orders."),
            FigureSection("Each alone", self.plot_heads(), "Units that changed as much stand above each other."),
        ]
        if len(self.path):
            figures.append(FigureSection("The whole model by degrees", self.plot_path()))
        return self._page(
            figures=figures,
            tables=[
                TableSection("What undoes most", self._most().head(20), "Set back alone.", "top"),
                TableSection("Areas under the curves", self.areas(), "1/2 for a straight line to 1.", "areas"),
                TableSection("Units", self.table, "One row per unit.", "table"),
                TableSection("Curves", self.curve, "One row per order, draw and number of units.", "curve"),
                TableSection("The whole model", self.path, "One row per share.", "path"),
            ],
            methods=[*UNIT_COLUMNS.items(), *CURVE_COLUMNS.items(), *PATH_COLUMNS.items()],
            definitions=DEFINITIONS,
        )


DEFINITIONS = (
    Definition(
        "Setting back", "[ours]",
        "A head's matrices of the aligned model replaced by the base's, all else as it is. Rewinding is named by arXiv "
        "2608.10850; the definitions here are ours.",
    ),
    Definition(
        "Matched units", "[ours]",
        "The units of the same part that changed most nearly as much. They describe: no p is made from them.",
    ),
    Definition(
        "Order of importance", "[ours]",
        "By what each undoes alone, on the same texts as the curve, which therefore lies high; its lead over random "
        "orders is no test.",
    ),
    Definition(
        "Barrier", "[choice]",
        "Cross-entropy of the model with all parameters between the two, less the straight line between their own "
        "(linear mode connectivity, Frankle et al. 2020).",
    ),
)  # fmt: skip


def _area(rows: pd.DataFrame) -> float:
    """By trapezoids."""
    x, y = rows["share"].to_numpy(float), rows["shift"].to_numpy(float)
    return float(((y[1:] + y[:-1]) / 2 * (x[1:] - x[:-1])).sum())
