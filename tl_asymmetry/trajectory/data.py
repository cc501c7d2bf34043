"""The data of a trajectory: tables, curves, emergence, and figures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.names import SIGNIFICANT, kind_of
from tl_asymmetry.results.result import Result
from tl_asymmetry.results.top import shown_rows

if TYPE_CHECKING:
    import plotly.graph_objects as go

EMERGENCE_COLUMNS = (
    "reference", "layer", "head", "matrix", "pathway", "subspace", "rank", "step", "significant", "checkpoints",
)  # fmt: skip
"""Columns of `TrajectoryAnalysis.emergence()`, in this order."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class TrajectoryData(Result):
    """What `TrajectoryAnalysis` holds, without the words."""

    TABLES = ("table", "asymmetry", "curves", "checkpoints")
    CAPTION = "A matrix with all its layers and heads pooled by energy; q ≤ 0.05 counts heads."
    LISTED = ("excess", "excess_low", "excess_high", "excess_q", "relative", "isotropic_q", "verdict")

    table: pd.DataFrame
    """Tidy: `step`, `reference` ("first": W_t − W_first; "previous": W_t − W_previous), and the columns of
    `PairAnalysis.table`. q is adjusted within a step, over the layers and heads of a matrix, subspace and rank."""
    asymmetry: pd.DataFrame
    """`step`, `reference`, and the columns of `PairAnalysis.asymmetry`."""
    curves: pd.DataFrame
    """`step`, `reference`, and `measurements.CURVE_COLUMNS`: all layers and heads pooled by energy, with intervals."""
    checkpoints: pd.DataFrame
    """`step, name, weights_xxh3, previous_step`, the first one (which has no delta) included."""

    # -- numbers -------------------------------------------------------------------------------------------------

    def emergence(self, *, level: float = SIGNIFICANT) -> pd.DataFrame:
        """Since when a head's delta has been more concentrated than chance: the first step from which on its q says so.

        Args:
            level: the q up to which a head counts as concentrated, at that checkpoint and at all later ones.

        Returns:
            One row for each reference, layer, head, matrix, subspace and rank: `step` (NA if q is above it, or NaN,
            at the last checkpoint), at how many `checkpoints` it is `significant`. Each step's q controls
            the false discoveries of that step; nothing is corrected for the number of checkpoints.

        Raises:
            ValueError: a level outside 0 … 1.
        """
        from tl_asymmetry.results.tables import as_table

        if not 0 < level < 1:
            raise ValueError(f"expected a level between 0 and 1, got {level}; pass level=0.05")
        keys = [c for c in EMERGENCE_COLUMNS if c not in ("step", "significant", "checkpoints")]
        wide = self.table.assign(below=self.table["isotropic_q"] <= level).pivot(
            index=keys, columns="step", values="below"
        )
        steps = wide.columns.to_numpy(dtype=int)
        below = wide.to_numpy(dtype=float, na_value=0.0).astype(bool)
        stays = np.logical_and.accumulate(below[:, ::-1], axis=1)[:, ::-1]
        since = pd.array([steps[row.argmax()] if row.any() else pd.NA for row in stays], dtype="Int64")
        found = wide.index.to_frame(index=False).assign(
            step=since, significant=below.sum(1), checkpoints=wide.notna().sum(axis=1).to_numpy()
        )
        order = {matrix: i for i, matrix in enumerate(dict.fromkeys(self.table["matrix"]))}
        found = found.sort_values(
            ["reference", "matrix", "subspace", "layer", "head", "rank"],
            key=lambda c: c.map(order) if c.name == "matrix" else c, ignore_index=True,
        )  # fmt: skip
        return as_table(found[list(EMERGENCE_COLUMNS)], ("step", "significant", "checkpoints"))

    def delta_spectrum(self, matrix: str, reference: str | None = None) -> Float[np.ndarray, "step layer head r"]:
        """Eigenvalues of ΔW ΔWᵀ of each head at each step of `table`, descending, float64.

        Raises:
            ValueError: a matrix or reference that was not analysed.
        """
        return self._array("spectrum", matrix, reference)

    def gradient_spectrum(self, matrix: str) -> Float[np.ndarray, "step layer head d_model"]:
        """Eigenvalues of the second moment of the gradient upstream of W_O or W_out at each step, descending, float64.

        Raises:
            ValueError: another matrix, or a trajectory recorded without `gradient`.
        """
        name = f"gradient_spectrum/{matrix}"
        if name not in self.arrays:
            there = sorted(n.partition("/")[2] for n in self.arrays if n.startswith("gradient_spectrum/"))
            raise ValueError(
                f"expected one of {', '.join(there) or 'none (made without gradient=)'}, got {matrix!r}; pass W_O or "
                "W_out of a trajectory with gradient="
            )
        return self.arrays[name].numpy()

    @property
    def steps(self) -> list[int]:
        """Steps of the table, ascending; the first checkpoint is not among them."""
        return self.arrays["steps"].tolist()

    def _listed(self) -> pd.DataFrame:
        """The last step: where training arrived."""
        return shown_rows(self.table[self.table["step"] == self.steps[-1]], self.config)

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_curves(
        self,
        matrices: str | Sequence[str] | None = None,
        *,
        subspace: str | None = None,
        reference: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Read and write over training with intervals, heads pooled by energy.

        Args:
            matrices: which; None: all.
            subspace: hold every matrix against this one; None: reads against their own input, writes against
                "prediction".
            reference: "first" or "previous", what changes are measured from; None: the first that was asked for.
            rank: the only one; None: all with a slider, the shown rank first.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import curves_figure

        return curves_figure(
            self.curves, matrices=matrices, subspace=subspace, rank=rank,
            default_rank=self.config["shown_rank"],
            reference=self._references[0] if reference is None else reference,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_head_curves(
        self,
        matrix: str,
        layer: int,
        *,
        subspace: str | None = None,
        reference: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """The heads of one layer over training, with intervals.

        Args:
            matrix: its name.
            layer: which.
            subspace: None: a read matrix's own input, "prediction" for a write matrix.
            reference: "first" or "previous", what changes are measured from; None: the first that was asked for.
            rank: the only one; None: all with a slider, the shown rank first.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import head_curves_figure

        return head_curves_figure(
            self.table, matrix, layer=layer, subspace=subspace, rank=rank, **self._kv(matrix),
            default_rank=self.config["shown_rank"],
            reference=self._references[0] if reference is None else reference,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_animation(
        self,
        matrix: str,
        *,
        subspace: str | None = None,
        reference: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """The layer × head map of one matrix, a frame for each checkpoint.

        Args:
            matrix: its name.
            subspace: None: a read matrix's own input, "prediction" for a write matrix.
            reference: "first" or "previous", what changes are measured from; None: the first that was asked for.
            rank: which; None: the shown one.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import animation_figure

        return animation_figure(
            self.table, matrix, subspace=subspace, rank=rank, **self._kv(matrix),
            default_rank=self.config["shown_rank"],
            reference=self._references[0] if reference is None else reference,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_emergence(
        self,
        matrix: str,
        *,
        level: float = SIGNIFICANT,
        subspace: str | None = None,
        reference: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Since which step each head has been more concentrated than chance.

        Args:
            matrix: its name.
            level: what q must stay below.
            subspace: None: a read matrix's own input, "prediction" for a write matrix.
            reference: "first" or "previous", what changes are measured from; None: the first that was asked for.
            rank: the only one; None: all with a slider, the shown rank first.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import emergence_figure

        return emergence_figure(
            self.emergence(level=level), matrix, level=level, subspace=subspace, rank=rank, **self._kv(matrix),
            default_rank=self.config["shown_rank"],
            reference=self._references[0] if reference is None else reference,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    @property
    def _references(self) -> list[str]:
        return list(self.config["references"])

    def _figure_defaults(self) -> dict[str, Any]:
        return {"default_rank": self.config["shown_rank"], "reference": self._references[0]}

    def _kv(self, matrix: str) -> dict[str, bool]:
        shape = self.config["shape"]
        return {"kv": kind_of(matrix).heads == "kv" and shape["n_kv_heads"] < shape["n_heads"]}

    def _array(self, kind: str, matrix: str, reference: str | None) -> np.ndarray:
        name = f"{kind}/{matrix}/{self._references[0] if reference is None else reference}"
        if name not in self.arrays:
            there = sorted(n.removeprefix(f"{kind}/") for n in self.arrays if n.startswith(f"{kind}/"))
            raise ValueError(
                f"expected one of {', '.join(there)}, got {name.removeprefix(f'{kind}/')!r}; pass what was analysed"
            )
        return self.arrays[name].numpy()
