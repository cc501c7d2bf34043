"""What `gradient_covariance` gives back: both second moments of every outer product, tables, figures, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.fraction import energy_profile
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.padding import padded_stack
from tl_asymmetry.gradients.capture import Captured, Weighing
from tl_asymmetry.gradients.report import DEFINITIONS, headline, summary_table
from tl_asymmetry.gradients.table import CROSS_COLUMNS, GRADIENT_COLUMNS, Side
from tl_asymmetry.names import counted, kind_of
from tl_asymmetry.results.report import FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class GradientCovariance(Result):
    """Input and gradient second moments of every matrix under one objective. Made by `gradient_covariance`.

    `table` has one row per layer × head × matrix × side; `gradient_table.GRADIENT_COLUMNS` says what the columns mean.
    Pass it to `analyze_pair(..., gradient=...)` for the matched reference of write matrices, and so that the reference
    of read matrices weighs every input by its gradient, each head's by its own.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "gradients")
    CAPTION = "Medians over layers and heads."
    LISTED = ("top_energy", "top_energy_low", "top_energy_high", "effective_rank", "stable_rank")

    gradients: pd.DataFrame
    """One row per layer × head × matrix: the norm of the gradient itself beside its two sides' traces; see
    `gradient_table.CROSS_COLUMNS`."""

    # -- numbers -------------------------------------------------------------------------------------------------

    def input_moment(
        self, layer: int, matrix: str, head: int | None = None, *, half: str = "all"
    ) -> Float64[Tensor, "d d"]:
        """Uncentred second moment of a matrix's input per token, Σ_t a_t a_tᵀ / n, float64 on CPU.

        Args:
            layer: which layer.
            matrix: its name.
            head: needed for W_O, whose heads have inputs of their own; else without meaning.
            half: "all", or the name of a pass where these were told apart.

        Raises:
            ValueError: what was not captured, or a moment on the d_mlp axis without `full_mlp=True`.
        """
        self._require(layer, matrix)
        own = kind_of(matrix).input_axis == "head"
        return self._moment("input", self._input(layer, matrix), layer, matrix, head if own else None, half)

    def gradient_moment(
        self, layer: int, matrix: str, head: int | None = None, *, half: str = "all"
    ) -> Float64[Tensor, "d d"]:
        """Uncentred second moment of a matrix's upstream gradient per token, Σ_t δ_t δ_tᵀ / n, float64 on CPU.

        δ is that of the summed loss, so its scale does not depend on the number of tokens.

        Args:
            layer: which layer.
            matrix: its name.
            head: needed for W_Q, W_K, W_V; the heads of W_O have one gradient in common.
            half: "all", or the name of a pass where these were told apart.

        Raises:
            ValueError: what was not captured, or a moment on the d_mlp axis without `full_mlp=True`.
        """
        self._require(layer, matrix)
        own = kind_of(matrix).output_axis == "head"
        return self._moment("gradient", matrix, layer, matrix, head if own else None, half)

    def weighted_input(
        self, layer: int, matrix: str, head: int | None = None
    ) -> tuple[Float64[Tensor, "d d"], Float64[Tensor, " d"]] | None:
        """Second moment and mean of ‖δ_t‖ a_t: what a matrix, or one of its heads, learns from, token by token.

        Args:
            layer: which layer.
            matrix: its name.
            head: by this head's δ alone; None: by all heads' δ together.

        Returns:
            Σ_t ‖δ_t‖² a_t a_tᵀ / n and Σ_t ‖δ_t‖ a_t / n, float64 on CPU; None for a write matrix, for one that was
            not captured, for keys whose gradients cancel over every sequence (softmax ignores what they share), and
            for a head without weights of its own (`head_weights`).

        Raises:
            ValueError: no such layer or head.
        """
        self._require_layer(layer)
        kind = "weighted" if head is None else "weighted_heads"
        if f"{kind}/{matrix}" not in self.arrays:
            return None
        moment, mean = (self.arrays[f"{name}/{matrix}"][layer] for name in (kind, f"{kind}_mean"))
        if head is None:
            return moment, mean
        if not 0 <= head < len(moment):
            raise ValueError(f"expected a head from 0 to {len(moment) - 1} of {matrix}, got {head}; pass one of these")
        return moment[head], mean[head]

    def spectrum(self, matrix: str, side: str = "gradient", *, half: str = "all") -> Float[np.ndarray, "layer head r"]:
        """Eigenvalues of a side's second moment, descending (the leading ones on a sketched axis); one head if shared.

        Raises:
            ValueError: what was not captured.
        """
        self._require(None, matrix)
        if side not in ("input", "gradient"):
            raise ValueError(f'expected side "input" or "gradient", got {side!r}; pass one of the two')
        key = f"gradient/{matrix}" if side == "gradient" else f"input/{self._input(None, matrix)}"
        return self._array("spectrum", half, key).numpy()

    def permuted_fractions(
        self, layer: int, matrix: str, basis: Float[Tensor, "d_model k"]
    ) -> Float64[Tensor, "draw head k"] | None:
        """The subspace fraction in the leading 1 … k directions of gradients whose δ were permuted within sequences.

        Returns:
            None for a write matrix, or when captured without `permutations`.

        Raises:
            ValueError: no such layer, or no tensor as a basis.
        """
        self._require_layer(layer)
        name = f"permuted/{matrix}"
        if not kind_of(matrix).reads or name not in self.arrays:
            return None
        drawn = self.arrays[name][:, layer]
        return energy_profile(drawn, basis.to(drawn)).cumsum(-1)

    @property
    def halves(self) -> tuple[str, ...]:
        """ "all", and the names of the passes that were told apart."""
        return tuple(dict.fromkeys(self.table["half"]))

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_spectrum(
        self,
        matrix: str = "W_O",
        side: str = "gradient",
        *,
        layer: int | None = None,
        ranks: Sequence[int] = (),
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Spectra of one side of a matrix, heads pooled, one line per layer.

        Args:
            matrix: its name.
            side: "gradient" (δ) or "input" (a).
            layer: shown first; None: all.
            ranks: marked by vertical lines.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not captured.
        """
        from tl_asymmetry.plots import spectrum_figure

        spectra = self.spectrum(matrix, side)
        own = side == "gradient" or kind_of(matrix).point == "z"  # sides that each head has for itself
        pooled = np.sort(spectra.sum(1) if own else spectra[:, 0])[:, ::-1]
        of = "δ" if side == "gradient" else "a"
        return spectrum_figure(
            pooled, name=f"{of} of {matrix}", layer=layer, ranks=ranks,
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
        """Effective rank of δ and of a over the layers, with a menu of matrices and sides.

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

        return effective_rank_figure(
            {self.config["objective"]: self.table}, matrices=matrices, side=side,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        return f"{self.config['model']['name']} under {self.config['objective']}"

    def _facts(self) -> str:
        shape = self.config["shape"]
        return (
            f"{shape['n_layers']} layers × {shape['n_heads']} heads, d_model {shape['d_model']}; "
            f"{counted(self.config['sequences'], 'sequence')} in {counted(self.config['batches'], 'batch')}, "
            f"{self.config['terms']} terms, "
            f"mean loss {self.config['loss']:.4g}"
        )

    def _summary_table(self) -> pd.DataFrame:
        return summary_table(self.table)

    def _headline(self) -> list[str]:
        return headline(self.table, self.gradients)

    def _report(self) -> Report:
        figures = []
        if self.table["effective_rank"].notna().any():
            figures.append(
                FigureSection(
                    "How many directions, layer by layer", self.plot_effective_rank(),
                    "Effective rank of both sides as a share of their dimension.",
                )
            )  # fmt: skip
            spectra: dict[str, Any] = {}
            for matrix in self.config["matrices"]:
                for side, letter in (("gradient", "δ"), ("input", "a")):
                    key = f"{letter} of {matrix}"
                    try:
                        if (self.spectrum(matrix, side) > 0).any():
                            spectra[key] = self.plot_spectrum(matrix, side)
                    except ValueError:  # no gradient reached it
                        continue
            figures.append(
                FigureSection("Spectra", spectra, "Heads pooled; on a sketched axis the leading eigenvalues.")
            )
        columns = [(name, meaning) for name, meaning in (GRADIENT_COLUMNS | CROSS_COLUMNS).items()]
        return self._page(
            figures=figures,
            tables=[
                TableSection("Summary", self._summary_table(), "Medians over layers and heads.", "summary"),
                TableSection("Both sides", self.table, "One row per layer, head, matrix and side.", "table"),
                TableSection("Gradients", self.gradients, "One row per layer, head and matrix.", "gradients"),
            ],
            methods=[
                ("Objective", str(self.config["objective"])),
                ("Passes", "one forward and one backward pass per batch, evaluation mode, parameters frozen; the graph "
                 "starts at the residual stream before the first block"),
                ("Intervals", "delete-one-group jackknife over groups of sequences, on the log; over texts, not seeds"),
                *columns,
            ],
            definitions=DEFINITIONS,
        )  # fmt: skip

    # -- making --------------------------------------------------------------------------------------------------

    @classmethod
    def assemble(
        cls,
        *,
        table: pd.DataFrame,
        gradients: pd.DataFrame,
        layers: Sequence[Mapping[tuple[str, str, str], Side]],
        captured: Captured,
        config: dict[str, Any],
        notes: Sequence[str],
    ) -> GradientCovariance:
        """Put the parts together, stacked over layers."""
        arrays: dict[str, Tensor] = {}
        for half, side, key in dict.fromkeys(place for sides in layers for place in sides):
            there = [sides.get((half, side, key)) for sides in layers]
            held = [None if one is None or not one.tokens else one for one in there]
            reached = [one for one in held if one is not None]
            if not reached:
                continue
            spectra = padded_stack([None if one is None else one.spectrum for one in held], beyond=0.0)
            arrays[f"spectrum/{half}/{side}/{key}"] = spectra.nan_to_num()
            if reached[0].moment is not None:
                arrays[f"moment/{half}/{side}/{key}"] = padded_stack(
                    [None if one is None else one.moment for one in held]
                )
        for matrix in dict.fromkeys(matrix for _, matrix in captured.permuted):
            drawn = [captured.permuted.get((layer, matrix)) for layer in range(len(layers))]
            arrays[f"permuted/{matrix}"] = padded_stack(drawn).transpose(0, 1)
        for matrix in dict.fromkeys(matrix for _, matrix, _ in captured.weighted):
            arrays |= _weighted(matrix, captured.weighted, len(layers))
        return cls(table=table, gradients=gradients, config=config, notes=tuple(notes), arrays=arrays)

    # -- looking up ----------------------------------------------------------------------------------------------

    def _moment(self, side: str, key: str, layer: int, matrix: str, head: int | None, half: str) -> Tensor:
        moments = self._array("moment", half, f"{side}/{key}")[layer]
        table = self.table
        rows = table[(table["layer"] == layer) & (table["matrix"] == matrix) & (table["side"] == side)]
        if rows.empty:
            raise ValueError(f"expected a layer that has {matrix}, got {layer}; pass one that the table lists")
        dimension, heads = int(rows["dimension"].max()), rows["head"].nunique()  # where layers differ, it is filled up
        if dimension:
            moments = moments[:, :dimension, :dimension]
        if len(moments) == 1:
            return moments[0]
        if head is None or not 0 <= head < heads:
            raise ValueError(f"expected a head from 0 to {heads - 1} for this side of {matrix}, got {head}; pass head=")
        return moments[head]

    def _array(self, kind: str, half: str, key: str) -> Tensor:
        if half not in self.halves:
            raise ValueError(f"expected half among {', '.join(self.halves)}, got {half!r}; pass one of these")
        name = f"{kind}/{half}/{key}"
        if name not in self.arrays:
            raise ValueError(
                f"expected a {kind} that was captured, got {key!r} (half {half!r}); pass full_mlp=True to "
                "gradient_covariance for moments on the d_mlp axis, or an objective whose gradient reaches this matrix"
            )
        return self.arrays[name]

    def _input(self, layer: int | None, matrix: str) -> str:
        """Under which name a matrix's inputs are kept in a layer; None: in the first that has it."""
        found = self.table[self.table["matrix"] == matrix]["layer"]
        layer = int(found.iloc[0]) if layer is None else layer
        return f"{matrix} of experts" if [layer, matrix] in self.config["experts"] else kind_of(matrix).point

    def _require(self, layer: int | None, matrix: str) -> None:
        matrices = self.config["matrices"]
        if matrix not in matrices:
            raise ValueError(f"expected a matrix among {', '.join(matrices)}, got {matrix!r}; pass one of these")
        if layer is not None:
            self._require_layer(layer)

    def _require_layer(self, layer: int) -> None:
        layers = self.config["shape"]["n_layers"]
        if not 0 <= layer < layers:
            raise ValueError(f"expected a layer from 0 to {layers - 1}, got {layer}; pass one of these")


def _weighted(matrix: str, captured: Mapping[Weighing, StreamingMoments], n_layers: int) -> dict[str, Tensor]:
    """Second moments and means of a matrix's weighted inputs by layer, of all heads and of those that were told apart;
    zero where no gradient reaches."""
    held = {(layer, head): moments for (layer, name, head), moments in captured.items() if name == matrix}
    d = next(iter(held.values())).d
    nothing = torch.zeros(d, d, dtype=torch.float64)
    heads = sorted({head for _, head in held if head is not None})
    arrays: dict[str, Tensor] = {}
    for kind, chosen in (("weighted", [None]), ("weighted_heads", heads)):
        there = [held.get((layer, head)) for layer in range(n_layers) for head in chosen]
        if there:
            reached = [moments if moments is not None and moments.count else None for moments in there]
            shape = (n_layers, len(chosen)) if chosen is heads else (n_layers,)
            moment = torch.stack([nothing if moments is None else moments.second_moment for moments in reached])
            mean = torch.stack([nothing[0] if moments is None else moments.mean for moments in reached])
            arrays[f"{kind}/{matrix}"] = moment.reshape(*shape, d, d)
            arrays[f"{kind}_mean/{matrix}"] = mean.reshape(*shape, d)
    return arrays
