"""What `compare` gives back: differences, overlaps, figures, a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.models.strangers import strangers
from tl_asymmetry.names import FOUND, MATRICES, PREDICTION, SIGNIFICANT, counted, kind_of
from tl_asymmetry.results.report import DEFINITIONS, Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

TABLE_COLUMNS = {
    "a": "name of one arm",
    "b": "name of the other",
    "runs_a": "runs of a",
    "runs_b": "runs of b",
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "expert": "expert of a mixture; NA for any other matrix",
    "matrix": "W_Q … W_out",
    "pathway": '"read" or "write"',
    "subspace": "name of the subspace both deltas are held against",
    "rank": "k",
    "relative_a": "relative fraction of a's delta; of several runs the geometric mean",
    "relative_b": "of b's",
    "log2_ratio": "log2(relative_a / relative_b); 0 where both are as concentrated",
    "ci_low": "lower end of the 95 % interval of log2_ratio over texts; NaN where the subspace needs no texts",
    "ci_high": "upper end",
    "difference": "relative_a − relative_b",
    "difference_low": "lower end of its 95 % interval over texts",
    "difference_high": "upper end",
    "seed_low": "lower end of the 95 % interval of log2_ratio over training runs; NaN where an arm has one run",
    "seed_high": "upper end",
    "seed_p": "two-sided probability of arms so far apart, with the spread between runs of each as the yardstick",
    "seed_q": "p corrected over families (matrix, subspace) of a rank, layers in them and heads in these",
    "vs_other": '"larger" (in a), "smaller" or "not told apart" by that test; "" where an arm has one run',
    "excess_a": "a's fraction over its matched reference, which is b's too where activations are the base's",
    "excess_b": "b's",
    "isotropic_q_a": "q of a's fraction in its own analysis, the largest over its runs",
    "isotropic_q_b": "of b's",
    "rounding_share_a": "share of a's ‖ΔW‖² that storage explains, the largest over its runs",
    "rounding_share_b": "of b's",
    "delta_relative_norm_a": "‖ΔW‖ / ‖W_base‖ of a",
    "delta_relative_norm_b": "of b",
}
"""Columns of `Comparison.table`, in this order, and what they mean."""

ASYMMETRY_COLUMNS = {
    "a": "name of one arm",
    "b": "name of the other",
    "runs_a": "runs of a",
    "runs_b": "runs of b",
    "layer": "layer",
    "head": "head; NA = whole layer",
    "rank": "k",
    "log2_ratio_a": "log2(relative read / relative write) of a, the mean over its runs",
    "log2_ratio_b": "of b",
    "difference": "log2_ratio_a − log2_ratio_b; what training gives by chance is nearly the same in both",
    "ci_low": "lower end of its 95 % interval over texts, which move the read sides only",
    "ci_high": "upper end",
    "seed_low": "lower end of its 95 % interval over training runs; NaN where an arm has one run",
    "seed_high": "upper end",
}
"""Columns of `Comparison.asymmetry`, in this order, and what they mean."""

OVERLAP_COLUMNS = {
    "a": "name of one arm",
    "b": "name of the other",
    "layer": "layer",
    "head": "head; NA for a matrix of the MLP",
    "expert": "expert of a mixture; NA for any other matrix",
    "matrix": "W_Q … W_out",
    "directions": "n, leading residual directions of each delta: as asked for, fewer where one delta has fewer",
    "overlap": "‖DₐᵀD_b‖² / n of the two orthonormal sets: 1 if they span one space; the mean over all pairs of a run "
    "of a with one of b",
    "chance": "n/d, its mean over random spaces",
    "within": "mean overlap between two runs of one arm; NaN where both have one run",
    "z": "standard deviations above chance, of the pair with the largest p",
    "p": "one-sided probability of an overlap this large with a Haar-random space, the largest over pairs of runs",
    "p_method": '"exact", "beta" or "draws"',
    "q": "Benjamini–Hochberg over the layers and heads of this matrix",
    "cosine": "⟨ΔWₐ, ΔW_b⟩ / (‖ΔWₐ‖ ‖ΔW_b‖) of their best rank-n approximations, which sees both sides and the signs",
    "leading_cosine": "|cosine| of the two leading residual directions",
    "share_a": "share of a's ‖ΔW‖² in its n directions",
    "share_b": "of b's",
}
"""Columns of `Comparison.overlap`, in this order, and what they mean."""

COMPARISON_DEFINITIONS = (
    Definition(
        "Ratio and difference (log2_ratio, difference)", "[ours]",
        "Of the relative fractions of two deltas in the same subspace. Their interval leaves the same group of texts "
        "out of both; it covers which texts define the subspace, for these very trained models. It says nothing of "
        "other seeds, data or lengths of training.",
    ),
    Definition(
        "Spread between runs (seed_p, seed_q, vs_other)", "[ours]",
        "Welch's t between the log2 relative fractions of the runs of two arms, each arm with the spread of its own "
        "runs; between arms of different numbers of runs with the degrees of freedom of the smaller one. q corrects it "
        "over families (matrix, subspace), the layers in those found and the heads in these. It speaks of other seeds "
        "of these two recipes. With one run an arm the spread is unknown and nothing is counted as different: two runs "
        "of one recipe differ beyond their intervals over texts in most heads.",
    ),
    Definition(
        "Overlap", "[ours]",
        "The leading residual directions of two deltas: the squared norm of the product of their orthonormal bases "
        "over their number, beside n/d, which two random spaces have. Two deltas that both follow the input's variance "
        "overlap for that reason alone.",
    ),
)  # fmt: skip
"""What the words of a comparison mean, besides those of a pair."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Comparison(Result):
    """Analyses of one base against each other. Made by `compare`."""

    TABLES = ("table", "asymmetry", "overlap")
    CAPTION = "Medians over layers and heads, each by itself: that of the ratio is not the ratio of the other two."
    LISTED = ("log2_ratio", "ci_low", "ci_high", "seed_q", "vs_other", "relative_a", "relative_b")
    SIGNED = ("log2_ratio",)

    table: pd.DataFrame
    """One row for each pair of analyses × layer × head × matrix × subspace × rank; see `TABLE_COLUMNS`."""
    asymmetry: pd.DataFrame
    """Read against write of both, per head and per layer; see `ASYMMETRY_COLUMNS`."""
    overlap: pd.DataFrame
    """The deltas' leading residual directions, per head; see `OVERLAP_COLUMNS`."""

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_differences(
        self,
        matrix: str,
        a: str | None = None,
        b: str | None = None,
        *,
        subspace: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Layer × head map of log2(relative_a / relative_b).

        Args:
            matrix: its name.
            a, b: names of the two analyses; None: the only pair there is.
            subspace: None: a read matrix's own input, "prediction" for a write matrix.
            rank: the only one; None: all with a slider, the shown rank first.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not compared.
        """
        from tl_asymmetry.plots import differences_figure

        return differences_figure(
            self._pair(self.table, a, b), matrix, subspace=subspace, rank=rank, kv=self._kv(matrix),
            default_rank=self.config["shown_rank"],
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_overlap(
        self,
        matrix: str,
        a: str | None = None,
        b: str | None = None,
        *,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Layer × head map of the overlap of two deltas' directions, over chance.

        Args:
            matrix: its name.
            a, b: names of the two analyses; None: the only pair there is.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not compared.
        """
        from tl_asymmetry.plots import overlap_figure

        return overlap_figure(
            self._pair(self.overlap, a, b), matrix, kv=self._kv(matrix),
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        return " against ".join(self.config["names"]) + f", from {self.config['base']['name']}"

    def _facts(self) -> str:
        shape, ranks = self.config["shape"], ", ".join(map(str, self.config["ranks"]))
        return (
            f"{shape['n_layers']} layers × {shape['n_heads']} heads, d_model {shape['d_model']}; "
            f"{self.config['tokens']} tokens in {self.config['sequences']} sequences; ranks {ranks}, shown "
            f"{self.config['shown_rank']}; {self.config['directions']} directions"
        )

    def _summary_table(self) -> pd.DataFrame:
        rows = []
        shown = self.table[self.table["rank"] == self.config["shown_rank"]]
        for (a, b, matrix, subspace), block in shown.groupby(["a", "b", "matrix", "subspace"], sort=False):
            o = self.overlap
            o = o[(o["a"] == a) & (o["b"] == b) & (o["matrix"] == matrix)]
            tested = int((block["vs_other"] != "").sum())
            larger, smaller = (int((block["vs_other"] == answer).sum()) for answer in ("larger", "smaller"))
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "matrix": matrix,
                    "subspace": subspace,
                    "relative a": block["relative_a"].median(),
                    "relative b": block["relative_b"].median(),
                    "ratio": 2 ** block["log2_ratio"].median(),
                    "a>b": f"{larger}/{tested}" if tested else "–",
                    "a<b": f"{smaller}/{tested}" if tested else "–",
                    "overlap": o["overlap"].median(),
                    "within": o["within"].median(),
                    "chance": o["chance"].median(),
                    f"overlap {FOUND}": f"{int((o['q'] <= SIGNIFICANT).sum())}/{int(o['q'].notna().sum())}",
                    "cosine": o["cosine"].median(),
                }
            )
        return pd.DataFrame(rows)

    def _headline(self) -> list[str]:
        k = self.config["shown_rank"]
        sentences = [strangers(unlike, of=f" of {name}") for name, unlike in self.config["unrelated"].items() if unlike]
        for (a, b), rows in self.table[self.table["rank"] == k].groupby(["a", "b"], sort=False):
            rows = rows[rows["log2_ratio"].notna()]
            own = rows[
                (rows["pathway"] == "read")
                & (rows["subspace"] == rows["matrix"].map(lambda matrix: kind_of(matrix).point))
            ]
            write = rows[(rows["pathway"] == "write") & (rows["subspace"] == PREDICTION)]
            for words, some in (
                (f"Reading, in the {counted(k, 'leading direction')} of each matrix's own input", own),
                (f"Writing, in the {counted(k, 'leading prediction direction')}", write),
            ):
                if len(some):
                    sentences.append(f"{words}: {_ratio(some, str(a), str(b))}{_told(some, str(a), str(b))}.")
            o = self.overlap[(self.overlap["a"] == a) & (self.overlap["b"] == b) & self.overlap["q"].notna()]
            if len(o):
                within = o["within"].median()
                runs = "" if pd.isna(within) else f", {within:.2f} between two runs of one arm"
                sentences.append(
                    f"Directions: the leading {int(o['directions'].max())} residual directions of {a} and {b} overlap "
                    f"by {o['overlap'].median():.2f} at the median ({o['chance'].median():.2f} by chance{runs}); "
                    f"{int((o['q'] <= SIGNIFICANT).sum())} of {len(o)} overlap more than random spaces do "
                    f"({FOUND}), as any two changes that follow the same inputs would."
                )
        single = [name for name, runs in self.config["runs"].items() if runs == 1]
        if single:
            which = "each kind" if len(single) == len(self.config["runs"]) else ", ".join(single)
            sentences.append(
                f"One trained model of {which}: "
                "intervals cover texts, not training runs, and two runs of one recipe differ as well, so no head is "
                "counted as different from it; pass several runs an arm, compare({name: [run, run, run], …})."
            )
        return sentences

    def _report(self) -> Report:
        pairs = list(dict.fromkeys(zip(self.table["a"], self.table["b"], strict=True)))
        matrices = list(dict.fromkeys(self.table["matrix"]))

        def each(make: str, table: pd.DataFrame) -> dict[str, go.Figure]:
            found = {}
            for a, b in pairs:
                for matrix in matrices:
                    rows = table[(table["a"] == a) & (table["b"] == b) & (table["matrix"] == matrix)]
                    if len(rows):
                        found[matrix if len(pairs) == 1 else f"{matrix}: {a}, {b}"] = getattr(self, make)(matrix, a, b)
            return found

        return self._page(
            figures=[
                FigureSection("Where they differ", each("plot_differences", self.table), "Dot: told apart by the "
                              "spread between runs of one arm; none where an arm has one run."),
                FigureSection("Do they move along the same directions?", each("plot_overlap", self.overlap)),
            ],
            tables=[
                TableSection("Summary", self._summary_table(), "Medians over layers and heads, each by itself: that of "
                             "the ratio is not the ratio of the other two.", "summary"),
                TableSection("Differences", self.table, "One row per pair, layer, head, matrix, subspace, rank.",
                             "table"),
                TableSection("Overlap", self.overlap, "Leading residual directions.", "overlap"),
                TableSection("Asymmetry", self.asymmetry, "Read against write; head empty = whole layer.", "asymmetry"),
            ],
            methods=[
                ("Training runs", "Welch's t between arms of several runs, on log2 of the relative fraction"),
                ("Intervals", "paired delete-one-group jackknife: both fractions without the same group of texts"),
                ("Overlap", "against Haar-random spaces; q by Benjamini–Hochberg over the heads of a matrix"),
            ],
            definitions=(*DEFINITIONS, *COMPARISON_DEFINITIONS),
        )  # fmt: skip

    def _pair(self, table: pd.DataFrame, a: str | None, b: str | None) -> pd.DataFrame:
        pairs = list(dict.fromkeys(zip(self.table["a"], self.table["b"], strict=True)))
        chosen = [pair for pair in pairs if a in (None, pair[0]) and b in (None, pair[1])]
        if not chosen:
            raise ValueError(
                f"expected one of {', '.join(f'{x} and {y}' for x, y in pairs)}, got {a!r} and {b!r}; pass such names"
            )
        x, y = chosen[0]
        return table[(table["a"] == x) & (table["b"] == y)]

    def _kv(self, matrix: str) -> bool:
        shape = self.config["shape"]
        shared = matrix in MATRICES and MATRICES[matrix].heads == "kv"
        return shared and shape["n_kv_heads"] < shape["n_heads"]


def _ratio(rows: pd.DataFrame, a: str, b: str) -> str:
    ratio = 2 ** rows["log2_ratio"]
    return (
        f"over {len(rows)} heads and matrices the fraction in {a} is {ratio.median():.2f} times that in {b} at the "
        f"median ({ratio.min():.2f} to {ratio.max():.2f})"
    )


def _told(rows: pd.DataFrame, a: str, b: str) -> str:
    """What the spread between runs says; nothing where an arm has one run."""
    tested = rows[rows["vs_other"] != ""]
    if tested.empty:
        return ""
    counts = {answer: int((tested["vs_other"] == answer).sum()) for answer in ("larger", "smaller", "not told apart")}
    runs = f"{int(rows['runs_a'].iloc[0])} runs of {a} and {int(rows['runs_b'].iloc[0])} of {b}"
    return (
        f"; held against the spread between {runs}, {counts['larger']} of {len(tested)} are larger in {a} ({FOUND}), "
        f"{counts['smaller']} smaller, and {counts['not told apart']} are not told apart"
    )
