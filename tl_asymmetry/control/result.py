"""What `contrastive_control` gives back: fractions by grade, seed and matrix, spectra of δ, correlations, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.control.table import (
    CONTROL_COLUMNS,
    CORRELATION_COLUMNS,
    control_table,
    correlation_table,
    head_table,
    run_table,
)
from tl_asymmetry.gradients.result import GradientCovariance
from tl_asymmetry.names import counted
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result
from tl_asymmetry.results.top import shown_rows
from tl_asymmetry.training.runs import Run

if TYPE_CHECKING:
    import plotly.graph_objects as go

DEFINITIONS = (
    Definition(
        "Graded control", "[choice]",
        "Copies of one checkpoint are trained under objectives graded from sharp to soft: same rows in the same order, "
        "same optimiser, same number of steps, no dropout. An objective that reads texts gets the chosen halves of "
        "preference data.",
    ),
    Definition(
        "Equal steps, equal norm", "[ours]",
        "Deltas are compared after the same number of steps, and where they have come equally far: at the first step "
        "at which √Σ‖ΔW‖² reaches what the slowest grade of that seed reaches in the end. A delta's fraction does not "
        "change when it is scaled, so that is what matched norms can mean.",
    ),
    Definition(
        "Pooled fraction", "[choice]",
        "The share of ‖ΔW‖² of all layers and heads of a matrix together that lies in its subspaces; references are "
        "pooled with the same weights.",
    ),
    Definition(
        "Correlation with the grade", "[ours]",
        "Spearman's ρ over all grades and seeds. p is two-sided from permutations of the grades, whole objectives with "
        "all their seeds: seeds are no new grades, so with four of them p is at least 1/12.",
    ),
)  # fmt: skip


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class ControlStudy(Result):
    """Objectives graded from sharp to soft, and where the deltas they leave lie. Made by `contrastive_control`.

    `table` has one row per objective × seed × comparison × matrix × subspace × rank, heads and layers pooled;
    `control_table.CONTROL_COLUMNS` says what the columns mean.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "heads", "gradients", "runs", "correlations")
    CAPTION = "Means over seeds."
    LISTED = ("relative", "grade", "excess", "gradient_excess", "significant")

    heads: pd.DataFrame
    """The rows of every `PairAnalysis`, with objective, grade, seed and comparison: per layer and head."""
    gradients: pd.DataFrame
    """`GradientCovariance.table` of every objective at the common checkpoint, with objective and grade."""
    runs: pd.DataFrame
    """One row per objective × seed × comparison: steps taken, distance come, first and last loss."""
    correlations: pd.DataFrame
    """Spearman's ρ of the fractions with the grade and with the effective rank of δ, and permutation p; see
    `control_table.CORRELATION_COLUMNS`."""

    def _compared(self) -> str:
        """Where deltas are compared unless another is asked for."""
        return "norm" if self.config["match_norm"] else "steps"

    def _listed(self) -> pd.DataFrame:
        rows = shown_rows(self.table[self.table["compared"] == self._compared()], self.config)
        return rows[[*(name for name in rows if name != "grade"), "grade"]]

    # -- numbers -------------------------------------------------------------------------------------------------

    def spectrum(self, objective: str, matrix: str) -> np.ndarray:
        """Eigenvalues of δ's second moment at the checkpoint, `[layer, head, r]`, descending.

        Raises:
            ValueError: no such objective or matrix.
        """
        key = f"spectrum/{objective}/{matrix}"
        if key not in self.arrays:
            raise ValueError(
                f"expected an objective among {', '.join(self.config['objectives'])} and a matrix among "
                f"{', '.join(self.config['matrices'])}, got {objective!r} and {matrix!r}; pass one of each"
            )
        return self.arrays[key].numpy()

    def overview(self, *, rank: int | None = None, compared: str | None = None) -> pd.DataFrame:
        """One row per objective: effective ranks of δ and fractions of the delta, means over seeds.

        Args:
            rank: of the fractions; default the one that is shown.
            compared: "steps" or "norm"; default "norm" where deltas were compared there.
        """
        k = self.config["shown_rank"] if rank is None else rank
        for name, value in (("rank", rank), ("compared", compared)):
            if value is not None and value not in (known := list(dict.fromkeys(self.table[name]))):
                raise ValueError(
                    f"expected {name} among {', '.join(map(str, known))}, got {value!r}; pass one of these"
                )
        at = compared or self._compared()
        rows = self.table[(self.table["rank"] == k) & (self.table["compared"] == at)]
        overview = []
        for name, grade in self.config["grades"].items():
            entry: dict[str, Any] = {"objective": name, "grade": grade}
            of_δ = self.gradients[
                (self.gradients["objective"] == name) & (self.gradients["side"] == "gradient")
                & (self.gradients["half"] == "all")
            ]  # fmt: skip
            for matrix in ("W_Q", "W_O", "W_out"):
                ranks = of_δ.loc[of_δ["matrix"] == matrix, "effective_rank"]
                if len(ranks):
                    entry[f"erank δ {matrix}"] = ranks.mean()
            mine = rows[rows["objective"] == name]
            for matrix, subspace, label in (
                ("W_O", "prediction", "write W_O"), ("W_out", "prediction", "write W_out"),
                ("W_Q", "attn_in", "read W_Q"), ("W_K", "attn_in", "read W_K"),
            ):  # fmt: skip
                block = mine[(mine["matrix"] == matrix) & (mine["subspace"] == subspace)]
                if len(block):
                    entry[label] = block["relative"].mean()
                    excess = block["gradient_excess"] if matrix in ("W_O", "W_out") else block["excess"]
                    entry[f"{label} excess"] = excess.mean()
            overview.append(entry)
        return pd.DataFrame(overview)

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_spectrum(
        self,
        matrix: str = "W_O",
        *,
        layer: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Spectra of δ of a matrix, one line per objective; layers and heads pooled, or one layer.

        Args:
            matrix: its name.
            layer: which; None: all, each divided by its sum before pooling.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not captured.
        """
        from tl_asymmetry.plots import spectrum_figure

        spectra = {}
        for name in self.config["objectives"]:
            λ = self.spectrum(name, matrix)
            λ = λ if layer is None else λ[layer : layer + 1]
            total = λ.sum(-1, keepdims=True)
            spectra[name] = (λ / np.where(total > 0, total, 1)).mean((0, 1))
        where = "all layers" if layer is None else f"layer {layer}"
        return spectrum_figure(
            spectra, name=f"δ of {matrix}, {where}, heads pooled",
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_effective_rank(
        self,
        matrices: str | Sequence[str] | None = None,
        *,
        side: str = "gradient",
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Effective rank of δ by layer, one line per objective.

        Args:
            matrices: which to offer; None: all.
            side: shown first, "gradient" (δ) or "input" (a).
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: an unknown matrix or side.
        """
        from tl_asymmetry.plots import effective_rank_figure

        tables = {name: self.gradients[self.gradients["objective"] == name] for name in self.config["objectives"]}
        return effective_rank_figure(
            tables, matrices=matrices, side=side, title=title, template=template, width=width, height=height
        )

    def plot_grades(
        self,
        *,
        rank: int | None = None,
        compared: str | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Fraction against grade, one point per seed.

        Args:
            rank: which; None: the shown one.
            compared: "norm" or "steps", shown first; None: "norm" where there is one.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: an unknown rank or comparison.
        """
        from tl_asymmetry.plots import grades_figure

        return grades_figure(
            self.table, rank=rank, default_rank=self.config["shown_rank"], compared=compared,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        return f"{len(self.config['objectives'])} objectives from {self.config['model']['name']}"

    def _facts(self) -> str:
        config = self.config
        return (
            f"{config['steps']} steps of {config['batch_size']} rows, {counted(len(config['seeds']), 'seed')}; rank "
            f"{config['shown_rank']} shown, compared at equal {'norm' if config['match_norm'] else 'steps'}"
        )

    def _summary_table(self) -> pd.DataFrame:
        return self.overview()

    def _headline(self) -> list[str]:
        at = self._compared()
        rows = self.correlations[
            (self.correlations["rank"] == self.config["shown_rank"]) & (self.correlations["compared"] == at)
        ]
        sentences = []
        for matrix, subspace, what in (
            ("W_O", "prediction", "written by W_O"), ("W_out", "prediction", "written by W_out"),
            ("W_Q", "attn_in", "read by W_Q"),
        ):  # fmt: skip
            block = rows[
                (rows["matrix"] == matrix) & (rows["subspace"] == subspace) & (rows["measure"] == "relative")
            ].set_index("against")
            if block.empty:
                continue
            parts = [
                f"ρ = {row['rho']:+.2f} (p = {row['p']:.2g}) with {label}"
                for against, label in (
                    ("grade", "the grade"),
                    ("gradient_effective_rank", "the effective rank of its δ"),
                )
                for row in [block.loc[against]]
                if np.isfinite(row["rho"])
            ]
            if parts:
                sentences.append(f"Relative fraction {what}: {', '.join(parts)}.")
        if sentences:
            sentences.append("Each p, from permuted grades, stands for itself: none is corrected for their number.")
        groups = len(self.config["grades"])
        if groups < 5:
            sentences.append(f"With {groups} grades no p can be small: read the scatter, not the p.")
        return sentences

    def _report(self) -> Report:
        figures = [
            FigureSection("Fraction against grade", self.plot_grades(), "A point per seed; the line joins the means."),
            FigureSection("How many directions δ has", self.plot_effective_rank()),
            FigureSection(
                "Spectra of δ", {f"δ of {m}": self.plot_spectrum(m) for m in self.config["matrices"]
                                 if any(f"spectrum/{name}/{m}" in self.arrays for name in self.config["objectives"])},
            ),
        ]  # fmt: skip
        return self._page(
            figures=figures,
            tables=[
                TableSection(
                    "Summary", self.overview(), "Means over seeds; relative fractions and excesses.", "summary"
                ),
                TableSection("Correlations", self.correlations, "Spearman; p by permuting grades.", "correlations"),
                TableSection("Fractions", self.table, "One row per objective, seed, comparison, matrix …", "table"),
                TableSection("Runs", self.runs, "How far each run came.", "runs"),
                TableSection("Gradients", self.gradients, "Both sides at the checkpoint.", "gradients"),
            ],
            methods=[
                ("Objectives", "; ".join(f"{n}: {o}" for n, o in self.config["objectives"].items())),
                *CONTROL_COLUMNS.items(),
                *CORRELATION_COLUMNS.items(),
            ],
            definitions=DEFINITIONS,
        )

    # -- making --------------------------------------------------------------------------------------------------

    @classmethod
    def assemble(
        cls,
        *,
        gradients: Mapping[str, GradientCovariance],
        pairs: Mapping[tuple[str, int, str], PairAnalysis],
        runs: Mapping[tuple[str, int, str], Run],
        grades: Mapping[str, float],
        config: dict[str, Any],
        notes: Sequence[str],
    ) -> ControlStudy:
        """Put the parts together."""
        of_δ = [g.table.assign(objective=name, grade=grades[name]) for name, g in gradients.items()]
        stacked = pd.concat(of_δ, ignore_index=True)
        stacked = stacked[["objective", "grade", *stacked.columns[:-2]]]
        heads = head_table(pairs, grades)
        table = control_table(heads, config["shape"]["d_model"])
        first = next(iter(pairs.values()))
        arrays: dict[str, Tensor] = {}
        for name, covariance in gradients.items():
            for matrix in config["matrices"]:
                key = f"spectrum/all/gradient/{matrix}"
                if key in covariance.arrays:
                    arrays[f"spectrum/{name}/{matrix}"] = covariance.arrays[key]
        return cls(
            table=table,
            heads=heads,
            gradients=stacked,
            runs=run_table(runs, grades),
            correlations=correlation_table(table, stacked),
            config=config | {"shown_rank": first.config["shown_rank"]},
            notes=tuple(notes),
            arrays=arrays,
        )
