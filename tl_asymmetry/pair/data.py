"""The data of a pair's analysis: tables, profiles, and figures of them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.spectrum import marchenko_pastur_edge
from tl_asymmetry.names import POINTS, kind_of
from tl_asymmetry.pair.sensitivity import sensitivity_table
from tl_asymmetry.pair.stability import stability_table
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class PairData(Result):
    """What `PairAnalysis` holds, without the words."""

    TABLES = ("table", "nulls", "asymmetry", "other_changes", "circuits")

    table: pd.DataFrame
    """Tidy: one row per layer × head × matrix × subspace × rank; `tables.PAIR_COLUMNS` says what the columns mean."""
    nulls: pd.DataFrame
    """What each row is held against, one row for each row of the table and null; `results.nulls.NULL_COLUMNS` says what
    the columns mean, `results.nulls.NULLS` what the nulls are."""
    asymmetry: pd.DataFrame
    """Read against write per head, and per layer (head NA): log2 ratio, its expectation by chance, an interval."""
    other_changes: pd.DataFrame
    """What has no head: biases, norm gains, embeddings; norms and the shrink component."""
    circuits: pd.DataFrame
    """Per head: change of the products W_Q W_Kᵀ and W_V W_O, and the fraction of it on each side."""
    _model: weakref.ref[Any] | None = None

    # -- numbers -------------------------------------------------------------------------------------------------

    def energy_profile(self, matrix: str, subspace: str) -> Float[np.ndarray, "layer head k"]:
        """Share of ‖ΔW‖² along each ordered direction of a subspace; its cumulative sum is the fraction at each rank.

        Returns:
            float32 `[layer, head, d_model]` (an MLP matrix has one head; a given subspace has its own rank).

        Raises:
            ValueError: a matrix or subspace that was not analysed.
        """
        return self._array("profile", matrix, subspace)

    def eigenvalues(self, subspace: str) -> Float[np.ndarray, "layer k"]:
        """Variance along each ordered direction of a subspace, float64; NaN for a subspace without eigenvalues."""
        return self._array("eigenvalues", subspace)

    def delta_spectrum(self, matrix: str) -> Float[np.ndarray, "layer head r"]:
        """Eigenvalues of ΔW ΔWᵀ of each head, descending, float64."""
        return self._array("spectrum", matrix)

    @with_fresh_settings
    def sensitivity(self) -> pd.DataFrame:
        """The fractions under every other choice of subspace: whose activations, centring, first position, final norm.

        Raises:
            ValueError: analysed without `sensitivity=True`.
        """
        if not any(name.startswith("sensitivity/") for name in self.arrays):
            if self.config["arguments"]["sensitivity"]:
                raise ValueError(
                    "expected a subspace that can be chosen otherwise, got only given ones; pass subspaces by name"
                )
            raise ValueError(
                "expected an analysis with sensitivity=True, got one without; pass sensitivity=True to analyze_pair"
            )
        headed = {str(matrix): bool(rows["head"].notna().all()) for matrix, rows in self.table.groupby("matrix")}
        return sensitivity_table(self.arrays, self.config["ranks"], headed)

    @with_fresh_settings
    def stability(self) -> pd.DataFrame:
        """How much each head's verdict depends on the choice of subspace; columns in `stability.STABILITY_COLUMNS`.

        Every variant of `sensitivity()` is held against the isotropic null of the same delta.

        Raises:
            ValueError: analysed without `sensitivity=True`.
        """
        spectra = {str(matrix): self.delta_spectrum(str(matrix)) for matrix in dict.fromkeys(self.table["matrix"])}
        return stability_table(
            self.sensitivity(), self.table, spectra, d=self._d, seed=self.config["arguments"]["seed"]
        )

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_heads(self, matrix: str | None = None, **options: Any) -> go.Figure:
        """Layer × head map of one matrix, or of all with a menu; hover gives value, interval and both nulls.

        Args:
            matrix: its name; None gives one figure of all matrices and subspaces (`plots.head_maps_figure`).
            options: as for `plots.heads_figure`.
        """
        from tl_asymmetry.plots import head_maps_figure, heads_figure

        if matrix is None:
            return head_maps_figure(self.table, **{**self._figure_defaults(), **options})

        return heads_figure(self.table, matrix, **{**self._figure_defaults(), **self._kv(matrix), **options})

    def plot_layers(self, **options: Any) -> go.Figure:
        """Every matrix over the layers, reads above, writes below. See `plots.layers_figure`."""
        from tl_asymmetry.plots import layers_figure

        return layers_figure(self.table, **{**self._figure_defaults(), **options})

    def plot_rank_curve(self, matrix: str, layer: int, head: int | None = None, **options: Any) -> go.Figure:
        """Relative fraction against rank with both nulls and the interval. See `plots.rank_curve_figure`."""
        from tl_asymmetry.plots import rank_curve_figure

        options = {"d_model": self._d, **self._kv(matrix), **options}
        return rank_curve_figure(self.table, matrix, layer=layer, head=head, **options)

    def plot_asymmetry(self, **options: Any) -> go.Figure:
        """Read against write, one point per head. See `plots.asymmetry_figure`."""
        from tl_asymmetry.plots import asymmetry_figure

        if self.asymmetry.empty:
            raise ValueError(
                "expected an analysis of W_Q and W_K against attn_in and of W_O against prediction, got one without; "
                "pass the default matrices and subspaces to analyze_pair"
            )
        return asymmetry_figure(self.asymmetry, **{"default_rank": self.config["shown_rank"], **options})

    def plot_sensitivity(self, matrix: str | None = None, **options: Any) -> go.Figure:
        """How stable each head's verdict is over the choices of subspace. See `plots.stability_figure`."""
        from tl_asymmetry.plots import stability_figure

        options = {"default_rank": self.config["shown_rank"], "matrix": matrix, **options}
        return stability_figure(self.stability(), **options)

    def plot_spectrum(self, subspace: str = "attn_in", **options: Any) -> go.Figure:
        """Eigenvalue spectra of a subspace, or of a delta by its matrix's name. See `plots.spectrum_figure`.

        Activations carry the Marchenko–Pastur edge of as many independent samples as there were tokens.
        """
        from tl_asymmetry.plots import spectrum_figure

        options = {"name": subspace, **options}
        if f"spectrum/{subspace}" in self.arrays:
            spectra = self.delta_spectrum(subspace).sum(1)  # heads pooled
            return spectrum_figure(spectra, **{**options, "name": f"ΔW of {subspace}, heads pooled"})
        eigenvalues = self.eigenvalues(subspace)
        if np.isnan(eigenvalues).all():
            raise ValueError(f"expected a subspace with eigenvalues, got {subspace!r}, given without; pass another one")
        defaults = {"ranks": self.config["ranks"], "edge": self._edges(subspace, eigenvalues)}
        return spectrum_figure(eigenvalues, **{**defaults, **options})

    def _edges(self, subspace: str, eigenvalues: Float[np.ndarray, "layer k"]) -> dict[str, float] | None:
        """Marchenko–Pastur edge of each layer's captured activations; None for what is no moment of tokens."""
        if subspace not in POINTS or isinstance(self.config["arguments"]["subspaces"], Mapping):
            return None
        tokens = self.config["tokens"]
        return {
            f"L{layer}": marchenko_pastur_edge(torch.from_numpy(λ), tokens)
            for layer, λ in enumerate(eigenvalues)
            if (λ > 0).any()
        }

    @property
    def _d(self) -> int:
        return self.config["shape"]["d_model"]

    def _figure_defaults(self) -> dict[str, Any]:
        return {"default_rank": self.config["shown_rank"], "d_model": self._d}

    def _kv(self, matrix: str) -> dict[str, bool]:
        shape = self.config["shape"]
        return {"kv": kind_of(matrix).heads == "kv" and shape["n_kv_heads"] < shape["n_heads"]}

    def _array(self, kind: str, *keys: str) -> np.ndarray:
        name = "/".join((kind, *keys))
        if name not in self.arrays:
            there = sorted(n.removeprefix(f"{kind}/") for n in self.arrays if n.startswith(f"{kind}/"))
            raise ValueError(f"expected one of {', '.join(there)}, got {'/'.join(keys)!r}; pass what was analysed")
        return self.arrays[name].numpy()
