"""What `prediction_pullback` gives back: one subspace per layer, and how they lie to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.spectrum import effective_rank
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.pair.plan import default_ranks
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

KIND = {
    "same": "same position, ∂ resid_final[t] / ∂ resid_post[t]",
    "sum": "summed over sources, Σ_s ∂ resid_final[t] / ∂ resid_post[s]",
    "given": "of Jacobians passed in",
}
"""In words, by `sources`."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class PredictionPullback(Result, Sequence[Subspace]):
    """The prediction subspace pulled back to layers; as a sequence, their subspaces. Made by `prediction_pullback`.

    `table` has one row per layer × rank: `overlap` with the prediction subspace of that rank (1 = the same), `chance` =
    k/d, `energy` (the share of ‖J̄ᵀP‖² in the first k directions), and `effective_rank` of the layer's whole spectrum.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "overlaps")
    LISTED = ("overlap", "chance", "energy", "effective_rank")

    overlaps: pd.DataFrame
    """One row per pair × rank: `a, b` ("layer 0", …, "prediction"), `rank, overlap, chance`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in the order of the subspaces."""
        return tuple(self.arrays["layers"].tolist())

    @property
    def subspaces(self) -> list[Subspace]:
        """One for each layer, with squared singular values as eigenvalues; float64."""
        return list(self)

    def __len__(self) -> int:
        return len(self.arrays["layers"])

    def __getitem__(self, index: Any) -> Any:
        """The subspace at that place in `layers`, or several for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected a place from 0 to {len(self) - 1}, got {index}")
        layer = self.layers[index]
        return Subspace(self.arrays["basis"][index], self.arrays["eigenvalues"][index], f"pullback L{layer}")

    def subspace(self, layer: int) -> Subspace:
        """The subspace of one layer.

        Raises:
            ValueError: a layer that was not asked for.
        """
        return self[self._index(layer)]

    def mean(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """J̄: the mean Jacobian from a layer's output to the final stream, `J[i, j] = ∂ final_i / ∂ out_j`.

        Raises:
            ValueError: a layer that was not asked for, or a `rank` was, so that J̄ was never whole.
        """
        if "mean" not in self.arrays:
            raise ValueError("expected whole mean Jacobians, got leading directions only; pass rank=None")
        return self.arrays["mean"][self._index(layer)]

    def _listed(self) -> pd.DataFrame:
        return self.table[self.table["rank"] == self._usual_rank()]

    def _usual_rank(self) -> int:
        """The one of the ranks that is nearest d // 16."""
        usual = max(self.config["shape"]["d_model"] // 16, 1)
        return min((int(k) for k in self.overlaps["rank"].unique()), key=lambda k: (abs(k - usual), k))

    def _index(self, layer: int) -> int:
        if layer not in self.layers:
            raise ValueError(
                f"expected a layer among {', '.join(map(str, self.layers))}, got {layer}; pass one of these"
            )
        return self.layers.index(layer)

    def plot_overlaps(
        self,
        *,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """How the layers' subspaces overlap, layer × layer, with a slider of ranks.

        Args:
            rank: shown first; None: the one nearest `d // 16`.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: a rank that was not measured.
        """
        from tl_asymmetry.plots.jacobians import overlap_figure

        rank = self._usual_rank() if rank is None else rank
        return overlap_figure(self.overlaps, rank=rank, title=title, template=template, width=width, height=height)

    def plot_spectrum(
        self,
        *,
        ranks: Sequence[int] = (),
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Squared singular values of J̄ᵀP, a line per layer.

        Args:
            ranks: marked by vertical lines.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: a rank below 1.
        """
        from tl_asymmetry.plots.spectrum import spectrum_figure

        values = {
            # what J̄ or a LayerNorm takes out entirely comes back as rounding, of either sign
            f"layer {layer}": row.where(row > 1e-12 * row[0], 0).numpy()
            for layer, row in zip(self.layers, self.arrays["eigenvalues"], strict=True)
        }
        return spectrum_figure(
            values, name="the pulled-back prediction map", ranks=ranks,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    # -- words -----------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        return self.config["model"]["name"]

    def _facts(self) -> str:
        config = self.config
        over = f"mean over {config['tokens']} tokens; " if config["tokens"] else ""
        return f"{KIND[config['sources']]}; {over}{config['rank']} directions pulled back; by {config['method']}"

    def _summary_table(self) -> pd.DataFrame:
        ranks = sorted(self.table["rank"].unique())
        shown = min(ranks, key=lambda k: (abs(k - max(self.config["shape"]["d_model"] // 16, 1)), k))
        rows = self.table[self.table["rank"] == shown]
        return rows.iloc[:: -(-len(rows) // 24)]

    def _headline(self) -> list[str]:
        rows = self._summary_table()
        first = rows.iloc[0]
        return [
            f"At rank {int(first['rank'])}, what layer {int(first['layer'])} must write for prediction overlaps "
            f"{first['overlap']:.3g} with the prediction subspace itself (chance {first['chance']:.3g}).",
        ]

    def _report(self) -> Report:
        return self._page(
            title=f"The prediction subspace of {self._title()}, pulled back",
            figures=[
                FigureSection("Overlap of the layers' subspaces", self.plot_overlaps()),
                FigureSection("Spectra", self.plot_spectrum()),
            ],
            tables=[
                TableSection("Layers", self.table, "One row per layer and rank.", "layers"),
                TableSection("Overlaps", self.overlaps, "One row per pair of subspaces and rank.", "overlaps"),
            ],
            methods=[("Jacobian", KIND[self.config["sources"]]), ("Method", self.config["method"])],
            definitions=DEFINITIONS,
        )


DEFINITIONS = (
    Definition(
        "Pulled-back prediction subspace", "[choice]",
        "Leading left singular vectors of J̄ᵀ C diag(γ) W_U (its mean over the vocabulary removed), J̄ the mean Jacobian "
        "from a layer's output to the final stream. In the last layer it is the prediction subspace.",
    ),
    Definition(
        "Overlap", "[ours]",
        "‖Q₁ᵀQ₂‖² / k of two subspaces of rank k: 1 is the same, 0 orthogonal, k/d chance.",
    ),
)  # fmt: skip


def pullback_table(arrays: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per layer × rank."""
    P, rows = arrays["prediction"], []
    d = len(P)
    for layer, Q, λ in zip(arrays["layers"].tolist(), arrays["basis"], arrays["eigenvalues"], strict=True):
        share = λ.cumsum(0) / λ.sum()
        for k in _ranks(arrays):
            rows.append(
                {
                    "layer": layer, "rank": k, "overlap": _overlap(Q, P, k), "chance": k / d,
                    "energy": float(share[k - 1]), "effective_rank": float(effective_rank(λ)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def overlap_table(arrays: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per pair of subspaces × rank, the prediction subspace among them."""
    named = {f"layer {layer}": Q for layer, Q in zip(arrays["layers"].tolist(), arrays["basis"], strict=True)}
    named["prediction"] = arrays["prediction"]
    d = len(arrays["prediction"])
    rows = [
        {"a": a, "b": b, "rank": k, "overlap": _overlap(Q1, Q2, k), "chance": k / d}
        for k in _ranks(arrays)
        for a, Q1 in named.items()
        for b, Q2 in named.items()
    ]
    return pd.DataFrame(rows)


def _ranks(arrays: Mapping[str, Tensor]) -> list[int]:
    d, most = len(arrays["prediction"]), arrays["basis"].shape[-1]
    return [k for k in default_ranks(d) if k <= most] or [most]


def _overlap(Q1: Float[Tensor, "d _a"], Q2: Float[Tensor, "d _b"], k: int) -> float:
    return float((Q1[:, :k].mT @ Q2[:, :k]).square().sum() / k)
