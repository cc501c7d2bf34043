"""What `detection_power` gives back: how many plants of each size were found, and the smallest size found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from scipy import stats

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.names import FOUND, kind_of
from tl_asymmetry.results.nulls import ISOTROPIC, NULLS
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

_KEYS = {
    "matrix": "W_Q … W_out",
    "pathway": '"read" or "write"',
    "subspace": "whose leading directions are planted in, and tested",
    "rank": "k, the number of these",
    "null": '"isotropic" or the optimizer whose reference is tested',
}

POWER_COLUMNS = {
    **_KEYS,
    "size": "share of ‖ΔW‖² moved into one random direction of the subspace, 0 to 1",
    "plants": "how many were planted, over layers and heads",
    "found": "how many of them were found",
    "share": "found / plants",
    "low": "lower end of its exact binomial 95 % interval",
    "high": "upper end",
}
"""Columns of `PowerAnalysis.table`."""

SMALLEST_COLUMNS = {
    **_KEYS,
    "threshold": "p up to which a lone head is called in this pair; the smallest over layers",
    "smallest": "smallest size tried from which on at least the power asked for was found; NaN: none",
    "smallest_low": "the same of the upper ends of the intervals: a smaller size may do",
    "smallest_high": "the same of the lower ends: this size does; NaN: more plants or larger sizes are needed to say",
}
"""Columns of `PowerAnalysis.smallest`."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class PowerAnalysis(Result):
    """How large a mark must be to be found in a pair. Made by `detection_power`.

    `table` has one row per matrix, subspace, null and size: see `POWER_COLUMNS`.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "smallest")
    CAPTION = "A matrix, subspace and null, all layers and heads together."
    LISTED = ("share", "size", "plants", "found", "low", "high")

    smallest: pd.DataFrame
    """One row per matrix, subspace and null: see `SMALLEST_COLUMNS`."""

    def plot(
        self,
        null: str | None = None,
        *,
        subspace: str | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """The share of plants found against their size, a line for each matrix. See `plots.power_figure`.

        Args:
            null: "isotropic", or the optimizer whose reference was tested; None: the former.
            subspace: None: a read matrix's own input, "prediction" for a write matrix.
            title, template, width, height: as in `PairAnalysis.plot_heads`.

        Raises:
            ValueError: what was not tested.
        """
        from tl_asymmetry.plots import power_figure

        return power_figure(
            self.table, null=ISOTROPIC if null is None else null, subspace=subspace, power=self.config["power"],
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def _title(self) -> str:
        models = self.config["models"]
        return f"{models['base']['name']} → {models['aligned']['name']}"

    def _facts(self) -> str:
        sizes = self.table["size"].unique().tolist()
        return (
            f"shares of {', '.join(f'{size:g}' for size in sizes)} planted; {self.config['tokens']} tokens in "
            f"{self.config['sequences']} sequences"
        )

    def _summary_table(self) -> pd.DataFrame:
        return self.smallest

    def _headline(self) -> list[str]:
        said = []
        for null, rows in self.smallest.groupby("null", sort=False):
            what = "a random subspace" if null == ISOTROPIC else f"what training gives ({NULLS[str(null)].label})"
            reached = [
                f"{matrix} in {subspace} {'none of those tried' if np.isnan(smallest) else f'{smallest:g}'}"
                for matrix, subspace, smallest in rows[["matrix", "subspace", "smallest"]].to_numpy()
            ]
            nothing = self.table[(self.table["null"] == null) & (self.table["size"] == 0)]
            said.append(
                f"Smallest share found above {what} in at least {self.config['power']:.0%} of plants: "
                f"{', '.join(reached)}. Where nothing was planted {nothing['found'].sum()} of "
                f"{nothing['plants'].sum()} were found."
            )
        said.append(
            "One direction in one head, all other tests at p = 1: what a change spread over more directions or heads "
            "takes to be found was not measured."
        )
        return said

    def _report(self) -> Report:
        figures = [
            FigureSection(
                f"Found above {'a random subspace' if null == ISOTROPIC else NULLS[null].label}", self.plot(null),
                "Bars: exact binomial 95 % intervals.",
            )
            for null in self.table["null"].unique()
        ]  # fmt: skip
        return self._page(
            figures=figures,
            tables=[
                TableSection(
                    "Smallest share found", self.smallest, "One row per matrix, subspace and null.", "smallest"
                ),
                TableSection("All sizes", self.table, "One row per matrix, subspace, null and size.", "table"),
            ],
            methods=[*POWER_COLUMNS.items(), *SMALLEST_COLUMNS.items()],
            definitions=DEFINITIONS,
        )


def power_tables(
    found: Mapping[tuple[str, str, int, str], tuple[np.ndarray, float]], sizes: Sequence[float], power: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`PowerAnalysis.table` and `.smallest`.

    Args:
        found: by matrix, subspace, rank and null, which plants were found, `[size, plant]`, and the threshold of p.
        sizes: ascending.
        power: to be reached.
    """
    rows: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for (matrix, subspace, rank, null), (called, threshold) in found.items():
        keys = {
            "matrix": matrix, "pathway": kind_of(matrix).side, "subspace": subspace, "rank": rank, "null": null,
        }  # fmt: skip
        counts, n = called.sum(1), called.shape[1]
        intervals = [stats.binomtest(int(count), n).proportion_ci() for count in counts]
        rows += [
            {**keys, "size": size, "plants": n, "found": int(count), "share": count / n, "low": i.low, "high": i.high}
            for size, count, i in zip(sizes, counts, intervals, strict=True)
        ]
        ends.append({
            **keys,
            "threshold": threshold,
            "smallest": _from_on(sizes, counts / n, power),
            "smallest_low": _from_on(sizes, [i.high for i in intervals], power),
            "smallest_high": _from_on(sizes, [i.low for i in intervals], power),
        })  # fmt: skip
    return pd.DataFrame(rows, columns=list(POWER_COLUMNS)), pd.DataFrame(ends, columns=list(SMALLEST_COLUMNS))


def _from_on(sizes: Sequence[float], shares: Sequence[float] | np.ndarray, power: float) -> float:
    """The smallest size at which, and at all larger ones, the share is at least the power."""
    reached = np.minimum.accumulate(np.asarray(shares)[::-1] >= power)[::-1]
    return float(sizes[int(reached.argmax())]) if reached.any() else np.nan


DEFINITIONS = (
    Definition(
        "Plant", "[ours]",
        "A delta that is chance under a null, of the head's own norm, with a share of its energy moved into u vᵀ: u a "
        "random unit vector in the leading k directions of the subspace, v one of the other axis. Chance is the "
        "spectrum of the head's own ΔW in Haar-random frames for the isotropic null, and C^{1/2} G √S Vᵀ for the "
        "optimizer's reference, S the spectrum of C^{-1/2} ΔW. It is added to the base's weights and stored in the "
        "format of the aligned ones, so that storage noise is what it would be.",
    ),
    Definition(
        "Found", "[ours]",
        f"Its p, in ΔW and in ΔW − sW, is one at which the hierarchy of `analyze_pair` calls a head ({FOUND}) where "
        "all other heads, and all layers with their heads pooled, have p = 1. In a pair with other findings a head is "
        "called more easily. The reference's test is also made without the mean input, since gradients with a mean "
        "leave a mark along it by chance: of a plant only what lies across that input counts, and a share of 1 may be "
        "missed.",
    ),
    Definition(
        "Smallest share found", "[ours]",
        "The smallest size tried from which on the share of plants found is at least the power. The bounds beside it "
        "say the same of the ends of the exact binomial (Clopper & Pearson 1934) 95 % intervals; they know nothing of "
        "other texts, and nothing between the sizes tried.",
    ),
)  # fmt: skip
