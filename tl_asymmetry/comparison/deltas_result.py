"""What `compare_deltas` gives back: every two deltas, trainings against their own runs, maps, a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.models.strangers import strangers
from tl_asymmetry.names import SIGNIFICANT
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

DELTA_COLUMNS = {
    "a": "name of one model",
    "b": "name of the other",
    "same": "whether they are runs of one training",
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "matrix": "W_Q … W_out",
    "pathway": '"read" or "write": whether the input or the output side is the residual stream',
    "cosine": "⟨ΔWₐ, ΔW_b⟩ / (‖ΔWₐ‖ ‖ΔW_b‖); NaN where one of them is zero",
    "cosine_sd": "its standard deviation for deltas that share their row and column covariances and nothing else",
    "leading_cosine": "⟨u vᵀ, u' v'ᵀ⟩ of the leading singular directions: 1 the same on both sides, −1 the opposite",
    "directions": "n, leading singular directions compared: as asked for, fewer where one delta has fewer",
    "overlap_in": "‖UₐᵀU_b‖² / n of the input sides (left in y = x W), what the deltas read: 1 if they span one space",
    "chance_in": "its mean over random spaces, n over the length of the side",
    "z_in": "standard deviations above chance",
    "p_in": "one-sided probability of an overlap this large with a Haar-random space",
    "q_in": "Benjamini–Hochberg over the layers and heads of this matrix and these two models",
    "overlap_out": "the same of the output sides, what the deltas write",
    "chance_out": "as chance_in",
    "z_out": "as z_in",
    "p_out": "as p_in",
    "q_out": "as q_in",
    "share_a": "share of a's ‖ΔW‖² in its n directions",
    "share_b": "of b's",
    "rounding_share_a": "share of a's ‖ΔW‖² that storage explains: the cosine is at most √((1 − this)(1 − b's))",
    "rounding_share_b": "of b's",
    "delta_relative_norm_a": "‖ΔW‖ / ‖W_base‖ of a",
    "delta_relative_norm_b": "of b",
}
"""Columns of `DeltaComparison.table`, in this order, and what they mean."""

ARM_COLUMNS = {
    "arm_a": "name of one training",
    "arm_b": "name of the other",
    "matrix": "W_Q … W_out, all layers and heads as one vector; None: all matrices",
    "cosine": "mean over every two runs of the two trainings",
    "within": "mean over every two runs of the same one; NaN where neither has two",
    "separation": "within − cosine",
    "p": "share of the relabelings of runs with a separation at least as large; NaN without one to compare with",
    "relabelings": "how many there are that differ: p cannot be below one over this",
}
"""Columns of `DeltaComparison.arms`, in this order, and what they mean."""

DELTA_DEFINITIONS = (
    Definition(
        "Cosine of two deltas", "[ours]",
        "Of two weight changes of one base as vectors; of several matrices or layers, from the sums of their inner "
        "products. Two deltas with the same row and column covariances and nothing else in common, as trainings on "
        "similar inputs have, reach ± cosine_sd by chance; storage noise lowers it.",
    ),
    Definition(
        "Input and output side", "[ours]",
        "Leading singular directions of ΔW in the orientation y = x W: left ones are what a change reads, right ones "
        "what it writes. Their overlap stands beside that of Haar-random spaces. Any two trainings on similar inputs "
        "beat that on the input side: alone it says nothing of the trainings' aims.",
    ),
    Definition(
        "Runs as the null", "[ours]",
        "Whether two trainings differ: the mean cosine between them beside that of two runs of the same one, with the "
        "runs' labels exchanged in every way. Two against two runs cannot get below p = 1/3, three against three 0.1, "
        "four against four 0.03.",
    ),
    Definition(
        "Order", "[ours]",
        "Leaves of average linkage on 1 − cosine of the whole models' deltas, arranged so that neighbours are alike.",
    ),
)  # fmt: skip
"""What the words of a comparison of deltas mean."""

SIDES = {"in": "input side (read)", "out": "output side (written)"}


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class DeltaComparison(Result):
    """Many weight changes of one base against each other. Made by `compare_deltas`.

    `table` has one row for every two models × layer × head × matrix: see `DELTA_COLUMNS`.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "arms")
    CAPTION = (
        "Two trainings and a matrix a row: means over their runs; read and written: medians over layers and heads."
    )
    LISTED = ("cosine", "cosine_sd", "overlap_in", "q_in", "overlap_out", "q_out")

    arms: pd.DataFrame
    """One row for every two trainings, of the whole model and of each matrix: see `ARM_COLUMNS`."""

    # -- numbers -------------------------------------------------------------------------------------------------

    def cosines(self, layer: int | None = None, matrix: str | None = None) -> pd.DataFrame:
        """Cosines of every two deltas, heads together; None: all layers, all matrices. In the order of clustering.

        Raises:
            ValueError: no such layer or matrix.
        """
        layers = range(self.config["shape"]["n_layers"]) if layer is None else [layer]
        names = self.config["matrices"] if matrix is None else [matrix]
        keys = [f"gram/{i}/{name}" for i in layers for name in names]
        if not all(key in self.arrays for key in keys):
            raise ValueError(
                f"expected a layer from 0 to {self.config['shape']['n_layers'] - 1} and a matrix among "
                f"{', '.join(self.config['matrices'])}, got {layer} and {matrix!r}; pass one of each, or None for all"
            )
        return self._ordered(cosines_of([self.arrays[key] for key in keys]))

    def overlaps(self, side: str = "in", matrix: str | None = None) -> pd.DataFrame:
        """Overlap over chance of every two deltas' leading directions, the median over heads. NaN on the diagonal.

        Args:
            side: "in", what they read, or "out", what they write.
            matrix: only this one.

        Raises:
            ValueError: no such side or matrix.
        """
        if side not in SIDES or matrix not in (None, *self.config["matrices"]):
            raise ValueError(
                f"expected a side 'in' or 'out' and a matrix among {', '.join(self.config['matrices'])}, got {side!r} "
                f"and {matrix!r}; pass one of each, or no matrix"
            )
        rows = self.table if matrix is None else self.table[self.table["matrix"] == matrix]
        over = (rows[f"overlap_{side}"] / rows[f"chance_{side}"]).groupby([rows["a"], rows["b"]]).median()
        names = list(self.config["models"])
        grid = np.full((len(names), len(names)), np.nan)
        for a, b, value in over.reset_index().itertuples(index=False):
            i, j = names.index(a), names.index(b)
            grid[i, j] = grid[j, i] = value
        return self._ordered(grid)

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_map(
        self,
        matrix: str | None = None,
        *,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Model × model map in the order of clustering; a menu picks the cosine or the overlap of either side.

        Args:
            matrix: only this one; None: all.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: a matrix that was not compared.
        """
        from tl_asymmetry.plots import deltas_figure

        return deltas_figure(
            self.cosines(matrix=matrix), {words: self.overlaps(side, matrix) for side, words in SIDES.items()},
            what=matrix or "all matrices", title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_heads(
        self,
        a: str,
        b: str,
        matrix: str,
        side: str = "in",
        *,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Layer × head map of the overlap of two deltas' leading directions, over chance.

        Args:
            a, b: names of the two models.
            matrix: its name.
            side: "in", what they read, or "out", what they write.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not compared.
        """
        from tl_asymmetry.plots import overlap_figure

        rows = self.table[self.table["a"].isin([a, b]) & self.table["b"].isin([a, b])]
        if side not in SIDES or rows.empty:
            raise ValueError(
                f"expected two models among {', '.join(self.config['models'])} and a side 'in' or 'out', got {a!r}, "
                f"{b!r} and {side!r}; pass such names"
            )
        renamed = rows.rename(columns={f"{name}_{side}": name for name in ("overlap", "chance", "z", "p", "q")})
        return overlap_figure(
            renamed,
            matrix,
            what=f"leading directions, {SIDES[side]},",
            title=title,
            template=template,
            width=width,
            height=height,
        )

    # -- words ---------------------------------------------------------------------------------------------------

    def _ordered(self, grid: np.ndarray) -> pd.DataFrame:
        order, names = self.config["order"], list(self.config["models"])
        labels = [names[i] for i in order]
        return pd.DataFrame(grid[np.ix_(order, order)], index=labels, columns=labels)

    def _title(self) -> str:
        return f"{', '.join(dict.fromkeys(self.config['arms']))}: deltas from {self.config['base']['name']}"

    def _facts(self) -> str:
        shape = self.config["shape"]
        return (
            f"{len(self.config['models'])} models; {shape['n_layers']} layers × {shape['n_heads']} heads, d_model "
            f"{shape['d_model']}; {', '.join(self.config['matrices'])}; {self.config['rank']} leading directions"
        )

    def _summary_table(self) -> pd.DataFrame:
        arm = dict(zip(self.config["models"], self.config["arms"], strict=True))
        other = self.table[~self.table["same"]]
        over = pd.DataFrame(
            {
                "arm_a": other["a"].map(arm), "arm_b": other["b"].map(arm), "matrix": other["matrix"],
                "read ×": other["overlap_in"] / other["chance_in"],
                "written ×": other["overlap_out"] / other["chance_out"],
            }
        )  # fmt: skip
        medians = over.groupby(["arm_a", "arm_b", "matrix"], sort=False).median().reset_index()
        rows = self.arms[self.arms["matrix"].notna()].merge(medians, on=["arm_a", "arm_b", "matrix"], how="left")
        return rows[["arm_a", "arm_b", "matrix", "cosine", "within", "p", "read ×", "written ×"]]

    def _headline(self) -> list[str]:
        unlike = [strangers(found, of=f" of {name}") for name, found in self.config["unrelated"].items()]
        sentences = []
        for row in self.arms[self.arms["matrix"].isna()].to_dict("records"):
            said = f"{row['arm_a']} and {row['arm_b']}: their deltas have a cosine of {row['cosine']:.3f} over all "
            if np.isnan(row["within"]):
                sentences.append(f"{said}matrices; no second run says how alike two runs of one training are.")
                continue
            told = (
                f"; {row['p'] * row['relabelings']:.0f} of {row['relabelings']} labelings of the runs tell them apart "
                f"at least as well (p {row['p']:.2g}"
                f"{'' if row['relabelings'] * SIGNIFICANT >= 1 else ', too few runs for a test at 0.05'})"
                if not np.isnan(row["p"])
                else ""
            )
            sentences.append(f"{said}matrices, two runs of one training {row['within']:.3f}{told}.")
        return [*unlike, *(sentences or ["All models are runs of one training."])]

    def _report(self) -> Report:
        maps = {"all": self.plot_map()} | {matrix: self.plot_map(matrix) for matrix in self.config["matrices"]}
        return self._page(
            figures=[FigureSection("Who is near whom", maps, "Neighbours are alike.", pick="matrix")],
            tables=[
                TableSection("Summary", self._summary_table(), "Medians over heads for the overlaps.", "summary"),
                TableSection("Trainings", self.arms, "Beside runs of the same one; matrix empty = all.", "arms"),
                TableSection("Every two models", self.table, "One row per head and matrix.", "table"),
            ],
            methods=[("Overlap", "against Haar-random spaces; q by Benjamini–Hochberg over the heads of a matrix")],
            definitions=DELTA_DEFINITIONS,
        )


def cosines_of(grams: Sequence[Tensor]) -> np.ndarray:
    """Cosines of vectors put together from parts, from the parts' inner products `[head, run, run]`."""
    gram = torch.stack([gram.sum(0) for gram in grams]).sum(0)
    size = gram.diagonal().clamp(min=0).sqrt()
    return (gram / (size.unsqueeze(-1) * size)).numpy()
