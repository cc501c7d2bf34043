"""What `rank_one_study` gives back: effects against controls, the strongest sites, figures, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.interventions.design import EXCHANGEABLE
from tl_asymmetry.interventions.tables import BASELINE_COLUMNS, BY_MAGNITUDE, CELL, OUTCOMES
from tl_asymmetry.names import FOUND, SIGNIFICANT, counted, nearest
from tl_asymmetry.results.report import CITATIONS, Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result
from tl_asymmetry.results.top import in_order, top_rows

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SITE = ["layer", "head", "matrix"]
_FIRST = ("shift", "kl", "margin_shift", "margin", "ce")
"""Which outcome is shown where only one can be: the first of these that was measured and is known."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class RankOneStudy(Result):
    """What single directions of single heads do, each against its own controls. Made by `rank_one_study`.

    Printing it gives the summary; in a notebook it is a table.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "edits", "baseline")
    LISTED = ("effect", "percentile", "p", "q", "control_mean")

    edits: pd.DataFrame
    """One row per edit, targets (`control` "target", at every dose) and controls alike: outcomes, norm."""
    baseline: pd.DataFrame
    """One row per intervention: the unedited models, what they predict and how far they are apart."""

    # -- numbers -------------------------------------------------------------------------------------------------

    def top(
        self,
        n: int = 10,
        by: str | None = None,
        matrix: str | None = None,
        *,
        intervention: str | None = None,
        direction: str | None = None,
    ) -> pd.DataFrame:
        """The sites whose edit does most, with its standing among each kind of control.

        Args:
            n: how many lines at most.
            by: an outcome; "ce" and "margin" count by size. By default "shift" where the models differ.
            matrix, intervention, direction: only this one; all by default.

        Returns:
            Columns of the site and direction, every outcome measured, `delta_share`, for each kind of control
            `percentile_<kind>`, and `p` and `q` against undo-matched controls, of the outcome sorted by.

        Raises:
            ValueError: an outcome, matrix, intervention or direction that was not studied.
        """
        from tl_asymmetry.results.tables import as_table

        by = self._known("outcome", by, self._outcome(), argument="by")
        cells = self._cells(by, intervention, direction)
        found = top_rows(cells, n, by, matrix, self._read_first(cells), signed=BY_MAGNITUDE)
        return as_table(found, (by, *self._read_first(cells)))

    def _cells(self, outcome: str, intervention: str | None = None, direction: str | None = None) -> pd.DataFrame:
        """One row per site and direction; percentiles, p and q are of this outcome."""
        rows = self.table[self.table["outcome"] == outcome]
        for column, wanted in (("intervention", intervention), ("direction", direction)):
            if wanted is not None:
                rows = rows[rows[column] == self._known(column, wanted, wanted)]
        cells = rows.drop_duplicates(list(CELL)).set_index(list(CELL))
        found = cells[["delta_share"]].copy()
        effects = self.edits[(self.edits["control"] == "target") & (self.edits["dose"] == 1)].set_index(list(CELL))
        for name in self.config["outcomes"]:
            found[name] = effects[name]
        for kind, block in rows.groupby("control", sort=False):
            of_kind = block.set_index(list(CELL))
            found[f"percentile_{kind}"] = of_kind["percentile"]
            if kind in EXCHANGEABLE:
                found["p"], found["q"] = of_kind["p"], of_kind["q"]
        return found.reset_index()

    def _strongest(self, n: int, outcome: str, **kinds: str) -> pd.DataFrame:
        """The first n cells in the order of an outcome, whether any has a number or not."""
        cells = self._cells(outcome, **kinds)
        return in_order(cells, outcome, self._read_first(cells), signed=BY_MAGNITUDE).head(n).reset_index(drop=True)

    def _read_first(self, cells: pd.DataFrame) -> list[str]:
        """What is known of a cell, effects and tests before the rest."""
        columns = [*self.config["outcomes"], "p", "q", *cells.columns[cells.columns.str.startswith("percentile_")]]
        return [*columns, "delta_share"]

    def _outcome(self) -> str:
        measured = [name for name in _FIRST if name in self.config["outcomes"]]
        known = [name for name in measured if self.table.loc[self.table["outcome"] == name, "effect"].notna().any()]
        return (known or measured)[0]

    def _known(self, column: str, value: str | None, default: str, *, argument: str | None = None) -> str:
        value = default if value is None else value
        there = list(dict.fromkeys(self.table[column]))
        if value not in there:
            raise ValueError(
                f"expected {argument or column} among {', '.join(there)}, got {value!r}; pass {nearest(value, there)}"
            )
        return value

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_controls(
        self,
        matrix: str | None = None,
        *,
        outcome: str | None = None,
        direction: str | None = None,
        intervention: str | None = None,
        index: int = 1,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Each head's effect on top of the cloud of its controls.

        Args:
            matrix: which; None: the first.
            outcome: a column of outcomes; None: the study's own.
            direction, intervention: which; None: the first.
            index: 1 for the leading direction of its kind.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not studied.
        """
        from tl_asymmetry.plots import controls_figure

        return controls_figure(
            self.edits, matrix, outcome=self._outcome() if outcome is None else outcome, direction=direction,
            intervention=intervention, index=index, title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_heads(
        self,
        matrix: str | None = None,
        *,
        outcome: str | None = None,
        direction: str | None = None,
        intervention: str | None = None,
        index: int = 1,
        control: str | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Layer × head map of effects; those above all their controls are marked.

        Args:
            matrix: which; None: the first.
            outcome: a column of outcomes; None: the study's own.
            direction, intervention: which; None: the first.
            index: 1 for the leading direction of its kind.
            control: the kind of control that decides on the marks; None: the first.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not studied.
        """
        from tl_asymmetry.plots import effects_figure

        return effects_figure(
            self.table, matrix, outcome=self._outcome() if outcome is None else outcome, direction=direction,
            intervention=intervention, index=index, control=control,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_doses(
        self,
        n: int = 6,
        *,
        outcome: str | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Effect against dose for the strongest cells.

        Args:
            n: how many cells.
            outcome: a column of outcomes; None: the study's own.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not studied.
        """
        from tl_asymmetry.plots import doses_figure

        outcome = self._known("outcome", outcome, self._outcome())
        cells = self._strongest(n, outcome)[list(CELL)]
        return doses_figure(
            self.edits.merge(cells, on=list(CELL)), outcome=outcome,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        models = self.config["models"]
        return f"{models['base']['name']} → {models['aligned']['name']}"

    def _facts(self) -> str:
        config = self.config
        done = " and ".join(dict.fromkeys(self.edits["intervention"]))
        made = int((self.edits["norm"] > 0).sum())
        return (
            f"{done} of {', '.join(config['directions'])} directions at {counted(config['sites'], 'site')}; "
            f"{counted(made, 'edit')}, {config['tokens']} tokens in {counted(config['sequences'], 'sequence')}"
        )

    def _summary_table(self) -> pd.DataFrame:
        return self._strongest(10, self._outcome())

    def _headline(self) -> list[str]:
        return list(_headline(self))

    def _report(self) -> Report:
        return _report(self)

    # -- making --------------------------------------------------------------------------------------------------

    @classmethod
    def assemble(
        cls,
        table: pd.DataFrame,
        edits: pd.DataFrame,
        baselines: Sequence[Mapping[str, Any]],
        config: dict[str, Any],
        notes: Sequence[str],
    ) -> RankOneStudy:
        """Put the parts of a study together."""
        baseline = pd.DataFrame(baselines, columns=list(BASELINE_COLUMNS))
        return cls(table=table, edits=edits, baseline=baseline, config=config, notes=tuple(notes), arrays={})


def _headline(study: RankOneStudy) -> Sequence[str]:
    table, outcome = study.table, study._outcome()
    if not bool((study.edits["norm"] > 0).any()):
        return ["No edit changes a weight: the models do not differ along these directions."]
    sentences = []
    for row in study.baseline.to_dict("records"):
        margins = ""
        if row["pairs"]:
            margins = f"; preference margin {row['margin_original']:+.3g} and {row['margin_other']:+.3g} nats"
        sentences.append(
            f"Unedited: cross-entropy {row['ce_original']:.4g} ({row['original']}) and {row['ce_other']:.4g} "
            f"({row['other']}) nats, {row['kl_other']:.3g} nats apart{margins}."
        )
    # A cell without an edit has no effect and cannot exceed anything: it is none of those counted.
    shown = table[(table["outcome"] == outcome) & (table["edit_norm"] > 0)]
    for intervention, direction in dict.fromkeys(zip(shown["intervention"], shown["direction"], strict=True)):
        rows = shown[(shown["intervention"] == intervention) & (shown["direction"] == direction)]
        cells = rows.drop_duplicates(list(CELL))
        best = study._strongest(1, outcome, intervention=intervention, direction=direction).iloc[0]
        verb = {"shift": "moves {:.1%} of the way to the other model", "margin_shift": "moves {:.1%} of the margin"}
        did = verb.get(outcome, outcome + " {:.3g}").format(best[outcome])
        tests = rows[rows["p"].notna()]
        beaten = [
            f"{int((of['p'] <= 1 / (1 + of['draws'])).sum())} of {len(of)} cells exceed all their controls that undo "
            f"as much ({len(of) / (1 + of['draws'].mean()):.3g} expected of random directions)"
            for _, of in tests.groupby("control", sort=False)
        ]
        sentences.append(
            f"{intervention.capitalize()} of {direction} directions: the strongest of {len(cells)} cells, "
            f"{_site(best)} #{best['index']}, {did}"
            f"{'; ' + '; '.join(beaten) if beaten else '; no controls that undo as much, so no test'}."
        )
    q = table.loc[table["outcome"] == outcome, "q"]
    if q.notna().any():
        sentences.append(
            f"{FOUND} in {int((q <= SIGNIFICANT).sum())} of {int(q.notna().sum())} comparisons on {outcome}."
        )
    return sentences


def _site(row: Any) -> str:
    head = "" if pd.isna(row["head"]) else f"H{int(row['head'])}"
    return f"L{int(row['layer'])}{head} {row['matrix']}"


DEFINITIONS = (
    Definition(
        "Rank-1 intervention", "[paper]",
        "Editing one direction of one matrix in closed form, against controls matched in all but the direction. The "
        "formulas below are ours.",
    ),
    Definition(
        "Removal, insertion", "[choice]",
        "Removal takes out of the aligned model what ΔW = W_aligned − W_base does along a unit direction q of the "
        "residual stream: W_aligned − q qᵀΔW for matrices that read it, W_aligned − ΔW q qᵀ for those that write. "
        "Insertion puts the same into the base.",
    ),
    Definition(
        "Controls", "[choice]",
        "undo_matched [ours]: as much of ΔW taken out or put in as by the edit, ‖qᵀΔW‖, along a random direction, or, "
        "where that one would be overdone by more than half, along a random subspace. The others keep everything but "
        "the residual direction, and so inject a product that undoes nothing. random: any; complement: none of q; "
        "low_variance: the eigenvectors of least variance; equal_variance: orthogonal to q with the same variance of "
        "the stream, or, where there is none such, scaled to it and marked as not norm-matched. permuted_heads: the "
        "same edit at another head.",
    ),
    Definition(
        "Percentile, p, q", "[ours]",
        "Percentile: standing of the effect among its controls. p = (1 + controls at least as large) / (1 + draws), "
        "one-sided, from undo_matched controls only: these are exchangeable with the edit where its direction does no "
        "more for each unit undone than a random one. Where no single direction undoes as much, the control is a "
        "subspace, whose effect varies less: in simulations p ≤ 0.05 came in 0 to 4 % for random directions, and for "
        "top singular directions, which are none, in 1 to 8 % of effects that are shares undone and in 2 to 17 % of "
        "displacements such as KL: read their effects beside the controls', not their p. Sites without a delta are no "
        "tests. q by Benjamini–Hochberg over sites, given only where that many draws can reach 0.05.",
    ),
    *(Definition(f"Outcome: {name}", "[choice]", meaning[0].upper() + meaning[1:] + ".") for name, meaning in
      OUTCOMES.items()),
)  # fmt: skip


def _report(study: RankOneStudy) -> Report:
    arguments, outcome = study.config["arguments"], study._outcome()
    figures = []
    matrices = list(dict.fromkeys(study.table["matrix"]))
    if bool((study.edits["norm"] > 0).any()):
        figures = [
            FigureSection(
                "Which heads carry it", {m: study.plot_heads(m) for m in matrices},
                "A dot: above all controls that undo as much.",
                "matrix",
            ),
            FigureSection(
                "Each head against its controls", {m: study.plot_controls(m) for m in matrices},
                "A target among its cloud does no more than any edit of its size.", "matrix",
            ),
        ]  # fmt: skip
        if study.edits["dose"].nunique() > 1:
            figures.append(FigureSection("Dose and response", study.plot_doses()))
    return study._page(
        figures=figures,
        tables=[
            TableSection("Strongest sites", study._strongest(20, outcome), f"By {outcome}.", "top"),
            TableSection("All comparisons", study.table, "One row per cell, outcome and kind of control.", "table"),
            TableSection("Unedited models", study.baseline, "What the edits are compared with.", "baseline"),
            TableSection("All edits", study.edits, "One row per edit.", "edits"),
        ],
        methods=[
            ("Sites", f"{study.config['sites']}: layer, matrix, head"),
            ("Directions", f"{', '.join(study.config['directions'])}, {arguments['n_directions']} of each at most"),
            ("Controls", f"{arguments['draws']} draws of each of {', '.join(arguments['controls'])}, seed "
             f"{arguments['seed']}"),
        ],
        definitions=DEFINITIONS,
        citations=CITATIONS[:1],
    )  # fmt: skip
