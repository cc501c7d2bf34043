"""What `analyze_stages` gives back: the ledger of every stage, how alike stages are, figures, a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.ledger import ledger
from tl_asymmetry.models.strangers import strangers
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEDGER_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "matrix": "W_Q … W_out",
    "pathway": '"read" or "write"',
    "stage": "the checkpoint that the stage ends in; its delta Δ_i is from the one before",
    "norm": "‖Δ_i‖",
    "relative_norm": "‖Δ_i‖ over the norm of the first checkpoint's weights",
    "kept": "1 + Σ_{j≠i} ⟨Δ_i, Δ_j⟩ / ‖Δ_i‖²: how much of it the whole way has; unbounded",
    "undone": "max(0, −⟨Δ_i, Σ_{j>i} Δ_j⟩) / ‖Δ_i‖²: how much later stages took back; above 1 they overshot",
    "turned": "how far later stages went beside it, over ‖Δ_i‖",
    "rounding": "how much storage noise of the checkpoints it shares with its neighbours lowers kept, simulated",
    "kept_unrounded": "kept without that",
    "total_norm": "‖Σ Δ_i‖, of the whole way",
}
"""Columns of `StageAnalysis.table`."""

PAIR_COLUMNS = {
    "layer": "as in the ledger",
    "head": "as in the ledger",
    "matrix": "as in the ledger",
    "pathway": "as in the ledger",
    "first": "the earlier stage",
    "second": "the later one",
    "cosine": "⟨Δ_first, Δ_second⟩ / ‖Δ_first‖‖Δ_second‖",
    "cosine_sd_free": "its standard deviation for entries that are independent, 1/√(rows · columns)",
    "cosine_sd": "for deltas that share their row and column covariances and nothing else, as two trainings on similar "
    "inputs do",
    "rounding_cosine": "what storage noise of the checkpoint between them makes of it; 0 where they do not meet",
    "cosine_unrounded": "cosine without that",
    "overlap": "‖U_firstᵀ U_second‖² / k of their leading directions on the residual side: read or written",
    "overlap_expected": "k / d_model, by chance",
}
"""Columns of `StageAnalysis.pairs`."""

PREDICTION_COLUMNS = {
    "first": "the earlier checkpoint",
    "second": "the later one",
    "kl": "KL(first ‖ second) of next-token predictions, mean over places, nats",
    "ce_first": "cross-entropy of the earlier one on the texts, nats",
    "ce_second": "of the later one",
}
"""Columns of `StageAnalysis.predictions`."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class StageAnalysis(Result):
    """A chain of training stages: what each did to the weights, and what became of it. Made by `analyze_stages`.

    `table`, the ledger, has one row per layer × head × matrix × stage: see `LEDGER_COLUMNS`.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "pairs", "predictions")
    LISTED = ("undone", "kept", "turned", "rounding", "relative_norm")

    pairs: pd.DataFrame
    """One row per layer × head × matrix × two stages: see `PAIR_COLUMNS`."""
    predictions: pd.DataFrame
    """One row for every two checkpoints where texts were given: see `PREDICTION_COLUMNS`."""

    # -- numbers -------------------------------------------------------------------------------------------------

    def gram(self, layer: int | None = None, matrix: str | None = None) -> Tensor:
        """Inner products of the stages' deltas, `[stage, stage]` float64, heads together; None: all layers or matrices.

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
        return torch.stack([self.arrays[key].sum(0) for key in keys]).sum(0)

    def pooled(self, by: str | None = "layer") -> pd.DataFrame:
        """The ledger of all heads together: of each layer, of each matrix (`by="matrix"`), or of the model (None).

        Returns:
            Columns `layer` or `matrix`, `stage`, `norm`, `kept`, `undone`, `turned`.

        Raises:
            ValueError: another grouping.
        """
        choices: dict[str | None, Sequence[Any]] = {
            "layer": range(self.config["shape"]["n_layers"]), "matrix": self.config["matrices"], None: [None],
        }  # fmt: skip
        if by not in choices:
            raise ValueError(f"expected by to be 'layer', 'matrix' or None, got {by!r}; pass one of these")
        rows = []
        for value in choices[by]:
            gram = self.gram(**({} if by is None else {by: value}))
            found = ledger(gram)
            for i, stage in enumerate(self.config["stages"][1:]):
                own = {} if by is None else {by: value}
                numbers = {name: getattr(found, name)[i].item() for name in ("kept", "undone", "turned")}
                rows.append({**own, "stage": stage, "norm": gram[i, i].sqrt().item(), **numbers})
        return pd.DataFrame(rows)

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_flow(
        self, *, title: str | None = None, template: Any = None, width: int | None = None, height: int | None = None
    ) -> go.Figure:
        """What became of each stage, layer by layer: kept, undone, turned. See `plots.stage_flow_figure`."""
        from tl_asymmetry.plots import stage_flow_figure

        return stage_flow_figure(self.pooled("layer"), title=title, template=template, width=width, height=height)

    def plot_cosines(
        self, *, title: str | None = None, template: Any = None, width: int | None = None, height: int | None = None
    ) -> go.Figure:
        """Cosines of every two stages by layer, over their spread by chance. See `plots.stage_cosines_figure`."""
        from tl_asymmetry.plots import stage_cosines_figure

        return stage_cosines_figure(self.pairs, title=title, template=template, width=width, height=height)

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        return " → ".join(self.config["stages"])

    def _facts(self) -> str:
        shape = self.config["shape"]
        read = f"; {self.config['tokens']} tokens" if self.config["tokens"] else ""
        return f"{shape['n_layers']} layers, d_model {shape['d_model']}; {', '.join(self.config['matrices'])}{read}"

    def _summary_table(self) -> pd.DataFrame:
        return self.pooled(None)

    def _headline(self) -> list[str]:
        whole, stages = self.pooled(None), self.config["stages"]
        if not bool((whole["norm"] > 0).any()):
            return ["No stage changed a weight."]
        sentences = [
            strangers(matrices, of=f" of {stage}", than="the stage's before")
            for stage, matrices in self.config["unrelated"].items()
        ]
        for row in whole.to_dict("records")[:-1]:
            if not row["norm"] > 0:
                sentences.append(f"{row['stage']} changed no weight.")
                continue
            noise = self.table[self.table["stage"] == row["stage"]]
            floor = (noise["rounding"] * noise["norm"] ** 2).sum() / (noise["norm"] ** 2).sum()
            rounding = f" (storage noise alone lowers that by {floor:.1%})" if floor >= 0.001 else ""
            back = f"took {row['undone']:.1%} of it back" if row["undone"] > 0 else "took none of it back"
            sentences.append(
                f"Of {row['stage']} the whole way to {stages[-1]} keeps {row['kept']:.1%}{rounding}"
                f"{', since later ones went on along it' if row['kept'] > 1 else ''}; later stages {back} and went "
                f"{row['turned']:.2g} times as far beside it."
            )
        consecutive = set(pairwise(stages))
        for row in self.predictions.to_dict("records"):
            if (row["first"], row["second"]) not in consecutive:
                continue
            sentences.append(f"{row['first']} and {row['second']} predict {row['kl']:.3g} nats apart.")
        return sentences

    def _report(self) -> Report:
        figures = [
            FigureSection("What became of each stage", self.plot_flow(), "All heads and matrices of a layer together.")
        ]
        if len(self.pairs):
            figures.append(FigureSection("How alike the stages are", self.plot_cosines(), "In units of chance."))
        tables = [
            TableSection("The whole model", self.pooled(None), "All heads together.", "whole"),
            TableSection("By matrix", self.pooled("matrix"), "All layers and heads together.", "matrices"),
            TableSection("Ledger", self.table, "One row per head, matrix and stage.", "table"),
        ]
        if len(self.pairs):
            tables.append(TableSection("Pairs of stages", self.pairs, "One row per head, matrix, two stages.", "pairs"))
        if len(self.predictions):
            tables.append(TableSection("Predictions", self.predictions, "Every two checkpoints.", "predictions"))
        return self._page(
            figures=figures,
            tables=tables,
            methods=[*LEDGER_COLUMNS.items(), *PAIR_COLUMNS.items()],
            definitions=DEFINITIONS,
        )


DEFINITIONS = (
    Definition(
        "Kept, undone, turned", "[ours]",
        "A stage's delta Δ_i is held against the sum of all and of the later ones. Σ kept ‖Δ_i‖² = ‖Σ Δ_i‖². A way "
        "that returns to where it was keeps nothing and has undone 1.",
    ),
    Definition(
        "Chance", "[ours]",
        "The cosine of two deltas with independent entries has standard deviation 1/√(rows · columns). Two trainings "
        "on similar inputs share covariances, which makes it larger: cosine_sd.",
    ),
    Definition(
        "Storage noise", "[ours]",
        "Rounding of a 16-bit checkpoint enters the stage before it and the stage after it with opposite signs, which "
        "looks like undoing. It is simulated with steps of the same lengths that have nothing to do with each other.",
    ),
)  # fmt: skip
