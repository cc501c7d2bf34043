"""What `direction_coupling` gives back: ratios along a run, their peaks, figures, a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

STREAM = ["objective", "estimator", "window", "alignment"]
"""Columns that name one curve."""

DEFINITIONS = (
    Definition(
        "Centroid (μ)", "[paper]",
        "The gradient of one logit, that of the correct answer, by the embedded input. The full Linear-Centroids form "
        "takes the sum of all outputs, J_f(x)ᵀ 1; for a language model's attention block, f is what the block writes "
        "and x the stream that enters it.",
    ),
    Definition(
        "Response A(v)", "[paper]",
        "The mean over probes of the squared norm of the centroid's derivative along v in the attention weights. "
        "Published as a central finite difference; computed here by an exact second derivative unless the settings "
        "say otherwise.",
    ),
    Definition(
        "Ratio R_k and its mean", "[paper]",
        "A of the k-th right singular vector of a window over the median A of random unit directions. 1 is what a "
        "random direction has. mean_ratio is the mean over the k ≤ 3 of a window, peak its maximum over checkpoints.",
    ),
    Definition(
        "Update and gradient directions", "[paper]",
        "Rows of the window are differences of consecutive checkpoints (update), or the gradient of the loss at each "
        "checkpoint on a fixed batch (gradient). A backward window ends with the checkpoint (the paper's text), a "
        "forward one begins with it (the author's code).",
    ),
    Definition(
        "share_of_max", "[ours]",
        "A(v) over the largest A of any unit direction, the largest eigenvalue of M in A(v) = vᵀMv, found by the "
        "Lanczos method. It compares across models; the ratio depends on the number of parameters.",
    ),
)  # fmt: skip
"""Definitions a report of couplings carries."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class CouplingStudy(Result):
    """How strongly directions of training move linear centroids, along a run. Made by `direction_coupling`.

    `table` has one row per checkpoint, objective, estimator, window, alignment and k: `step, objective, estimator,
    window, alignment, rows` (in the window), `k, singular_value` (of the window), `response` (A), `ratio` (R_k),
    `share_of_max` (A / λ_max; NaN unless `maximum=True`).
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "levels", "accuracy")
    LISTED = ("mean_ratio", "step", "ratio_1", "step_1")

    levels: pd.DataFrame
    """One row per checkpoint and objective: `random_median`, `random_low`, `random_high` of the random directions' A;
    `trace` of M, estimated from them, with its standard error; `largest`, `largest_residual` if it was asked for."""
    accuracy: pd.DataFrame
    """`step, op, train_accuracy, test_accuracy` of the run; empty for a language model."""

    def _listed(self) -> pd.DataFrame:
        """Curves by their peaks."""
        return self.peaks

    @property
    def mean_ratios(self) -> pd.DataFrame:
        """One row per checkpoint and curve: `mean_ratio` (of R_k), `ratio_1` (R_1), `directions` (their number)."""
        grouped = self.table.groupby(["step", *STREAM], sort=False)
        return grouped.agg(
            mean_ratio=("ratio", "mean"), ratio_1=("ratio", "first"), directions=("k", "max"), rows=("rows", "first")
        ).reset_index()

    @property
    def peaks(self) -> pd.DataFrame:
        """One row per curve: the largest R̄ and R_1 over checkpoints and their steps.

        Only windows that have as many directions as the curve ever has count: at a run's start a backward window may
        hold fewer rows than the rank.
        """
        means = self.mean_ratios
        means = means[means["directions"] == means.groupby(STREAM, sort=False)["directions"].transform("max")]
        peaks = []
        for names, curve in means.groupby(STREAM, sort=False):
            top, first = curve.iloc[int(curve["mean_ratio"].argmax())], curve.iloc[int(curve["ratio_1"].argmax())]
            peaks.append(
                dict(zip(STREAM, names, strict=True))
                | {"mean_ratio": top["mean_ratio"], "step": int(top["step"]), "ratio_1": first["ratio_1"],
                   "step_1": int(first["step"])}
            )  # fmt: skip
        return pd.DataFrame(peaks)

    def plot_time(
        self,
        *,
        objective: str | None = None,
        window: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Accuracy with R̄ of both estimators over steps.

        Args:
            objective: which; None: all with a slider.
            window: rows in the window; None: the first that is not 1.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: an unknown objective or window.
        """
        from tl_asymmetry.plots import coupling_figure

        return coupling_figure(
            self.mean_ratios, self.accuracy, objective=objective, window=window,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_windows(
        self,
        *,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Peak R̄ and R_1 against the window.

        Args:
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.
        """
        from tl_asymmetry.plots import windows_figure

        return windows_figure(self.peaks, title=title, template=template, width=width, height=height)

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        record = self.config["trajectory"]
        if "run" in record:
            task = record["run"]["task"]
            ops = task["ops"] if isinstance(task["ops"], str) else " + ".join(task["ops"])
            return f"Directions and centroids: {ops} modulo {task['p']}, seed {record['run']['seed']}"
        return f"Directions and centroids: {record['model']['name']}, attention of layer {record['layer']}"

    def _facts(self) -> str:
        arguments = self.config["arguments"]
        return (
            f"{self.table['step'].nunique()} checkpoints, {self.config['parameters']} attention weights, "
            f"{arguments['draws']} random directions {'anew at each checkpoint' if arguments['fresh'] else 'shared'}, "
            f"responses by {'the exact derivative' if arguments['method'] == 'exact' else 'finite differences'}"
        )

    def _summary_table(self) -> pd.DataFrame:
        return self.peaks

    def _headline(self) -> list[str]:
        sentences = []
        means = self.peaks[self.peaks["window"] == self.config["arguments"]["windows"][0]]
        for objective, peaks in means.groupby("objective", sort=False):
            parts = [
                f"{row['mean_ratio']:.3g} for {row['estimator']} directions ({row['alignment']} window of "
                f"{row['window']}, step {row['step']})"
                for row in peaks.to_dict("records")
            ]
            sentences.append(f"{objective}: the mean ratio to a random direction peaks at {', '.join(parts)}.")
        return sentences

    def _report(self) -> Report:
        figures = [FigureSection("Couplings along the run", self.plot_time(), "1 = a random direction.")]
        if self.table["window"].nunique() > 1:
            figures.append(FigureSection("Does the window matter?", self.plot_windows()))
        return self._page(
            figures=figures,
            tables=[
                TableSection("Peaks", self.peaks, "Largest value over checkpoints of each curve.", "peaks"),
                TableSection("All rows", self.table, "One row per checkpoint, curve and direction.", "table"),
                TableSection("Random directions", self.levels, "The unit of every ratio.", "levels"),
            ],
            definitions=DEFINITIONS,
        )
