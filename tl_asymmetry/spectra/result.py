"""What `analyze_spectra` gives back: a table, a map, a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.names import SIGNIFICANT
from tl_asymmetry.results.report import FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result
from tl_asymmetry.spectra.report import SPECTRAL_DEFINITIONS, headline, summary_table

if TYPE_CHECKING:
    import plotly.graph_objects as go

SPECTRAL_COLUMNS: Mapping[str, str] = {
    "layer": "number of the block",
    "head": "query head for W_Q and W_O, KV head for W_K and W_V, NA for the MLP",
    "expert": "expert of a mixture, else NA",
    "matrix": "its name",
    "rank": "k leading singular vectors of the base on each side",
    "on_principal": "‖U_kᵀ ΔW V_k‖² / ‖ΔW‖², 0 to 1",
    "on_principal_relative": "the same over its chance, k²/(mn)",
    "left_relative": "‖U_kᵀ ΔW‖² / ‖ΔW‖² over its chance, k/m (left: the input side of y = x W)",
    "right_relative": "‖ΔW V_k‖² / ‖ΔW‖² over its chance, k/n",
    "on_principal_p": "one-sided: a delta at random orientation has a share at least this large",
    "on_principal_q": "Benjamini–Hochberg over the layers and heads of this matrix and rank",
    "coupling": "on_principal / (left share · right share); 1: no more than the two sides' product",
    "on_principal_unshrunk": "on_principal_relative of ΔW − sW, s the shrink component of weight decay",
    "on_principal_rounding": "what storage noise alone would have as on_principal_relative",
    "intruders": "how many of the aligned weight's k leading left vectors have |cos| < 0.5 with each of the base's",
    "intruders_expected": "the same for the delta at random orientation",
    "intruders_inside": "share of the intruders' length inside the base's 2k leading left vectors; NaN without any",
    "intruders_right": "as intruders, right singular vectors (what nn.Linear, which stores Wᵀ, has on its left)",
    "intruders_right_expected": "the same for the delta at random orientation",
    "intruders_right_inside": "as intruders_inside, right side",
    "rotation_left": "mean sin² of the angles between the k leading left subspaces of both weights, 0 to 1",
    "rotation_left_expected": "the same for the delta at random orientation",
    "rotation_right": "as rotation_left, right side",
    "rotation_right_expected": "the same for the delta at random orientation",
    "drift": "‖σ_aligned − σ_base‖ / ‖σ_base‖ over the k leading singular values",
    "changed_share": "share of the stored entries that differ; NaN for an adapter",
    "changed_expected": "share that a dense delta of this norm and entry law would change once stored",
    "changed_relative": "changed_share / changed_expected: 1 where the change is dense and small, below where sparse",
    "rounding_share": "share of ‖ΔW‖² that storage alone explains",
    "delta_relative_norm": "‖ΔW‖ / ‖W‖",
}
"""Columns of the table, in this order, and what they mean."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class SpectralAnalysis(Result):
    """Where weight deltas lie in the base weights' own frames, beside chance. Made by `analyze_spectra`."""

    CAPTION = "Medians over layers and heads; intruders: their sum."
    LISTED = ("on_principal_relative", "on_principal_q", "coupling", "intruders", "delta_relative_norm")

    table: pd.DataFrame
    """Tidy: one row per layer × matrix × head × rank; `result.SPECTRAL_COLUMNS` says what the columns mean."""

    def plot_heads(
        self,
        matrix: str | None = None,
        *,
        value: str = "on_principal_relative",
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Layer × head map of one matrix; a menu picks what is shown, dots stand where q ≤ 0.05.

        Args:
            matrix: its name; None: the first.
            value: shown first: "on_principal_relative", "left_relative", "right_relative", "on_principal_unshrunk",
                "coupling" or "changed_relative".
            rank: None: the shown one.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analyzed.
        """
        from tl_asymmetry.plots import spectra_figure

        matrix = next(iter(self.config["shown_rank"])) if matrix is None else matrix
        return spectra_figure(
            self.table, matrix, value=value, rank=self.config["shown_rank"].get(matrix) if rank is None else rank,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def _shown_rows(self) -> pd.DataFrame:
        return self.table[self.table["rank"] == self.table["matrix"].map(self.config["shown_rank"])]

    def _title(self) -> str:
        models = self.config["models"]
        return f"{models['base']['name']} → {models['aligned']['name']}, spectra"

    def _facts(self) -> str:
        shape, shown = self.config["shape"], self.config["shown_rank"]
        return (
            f"{shape['n_layers']} layers × {shape['n_heads']} heads, d_model {shape['d_model']}; weights alone; shown "
            f"rank {', '.join(f'{matrix} {rank}' for matrix, rank in shown.items())}; tests at {SIGNIFICANT}"
        )

    def _summary_table(self) -> pd.DataFrame:
        return summary_table(self._shown_rows())

    def _headline(self) -> list[str]:
        return headline(self._shown_rows(), self.config["unrelated"])

    def _report(self) -> Report:
        shape = self.config["shape"]
        matrices = [m for m, block in self.table.groupby("matrix", sort=False) if block["on_principal"].notna().any()]
        maps = {str(matrix): self.plot_heads(str(matrix)) for matrix in matrices}
        figures = [FigureSection("Where each head changed, in the base's own frame", maps, pick="matrix")]
        return self._page(
            subtitle=f"{shape['n_layers']} layers × {shape['n_heads']} heads, d_model {shape['d_model']}; "
            "weights alone",
            figures=figures if maps else [],
            tables=[
                TableSection("Medians by matrix", self._summary_table(), "At the shown rank.", "summary"),
                TableSection("All rows", self.table, "One row per layer, matrix, head and rank.", "table"),
            ],
            methods=[
                ("Frames", "Gram matrix and eigensolve in float64, one matrix at a time; of all weights but the base's "
                 "the leading vectors alone"),
                ("Chance", "independent Haar frames; deltas turned at random, seed "
                 f"{self.config['arguments']['seed']}; q by Benjamini–Hochberg over the layers and heads "
                 "of one matrix and rank"),
            ],
            definitions=SPECTRAL_DEFINITIONS,
        )  # fmt: skip
