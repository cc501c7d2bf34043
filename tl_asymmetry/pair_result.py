"""What `analyze_pair` gives back: tables, profiles, figures, a report."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.deltas import Delta, stacked
from tl_asymmetry.directions import describe_directions
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair_summary import summary_html, summary_text
from tl_asymmetry.projections import Projection
from tl_asymmetry.results import load_result, save_result
from tl_asymmetry.sensitivity import SensitivityProfiles, sensitivity_table

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, repr=False)
class PairAnalysis:
    """Where a base and an aligned model differ, by head, against two nulls. Made by `analyze_pair`.

    Printing it gives the summary; in a notebook it is a table.
    """

    table: pd.DataFrame
    """Tidy: one row per layer × head × matrix × subspace × rank; the columns are described in `how_to_read`."""
    asymmetry: pd.DataFrame
    """Read against write per head, and per layer (head NA): log2 ratio, its expectation by chance, an interval."""
    other_changes: pd.DataFrame
    """What has no head: biases, norm gains, embeddings; norms and the shrink component."""
    circuits: pd.DataFrame
    """Per head: change of the products W_Q W_Kᵀ and W_V W_O, and the fraction of it on each side."""
    config: dict[str, Any]
    """Every argument, versions, model names and hashes, dtypes, devices, token count. JSON-ready."""
    notes: tuple[str, ...]
    """What a reader must know: what was left out, what degrades the answer."""
    arrays: dict[str, Tensor] = field(compare=False)
    """Profiles, eigenvalues, spectra and directions behind the tables, by name; see the accessors."""
    _model: weakref.ref[Any] | None = field(default=None, compare=False)

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

    def directions(
        self, layer: int, head: int | None, matrix: str, n: int = 5, *, model: Any = None, contexts: int = 5
    ) -> pd.DataFrame:
        """The leading residual directions of one head's delta, with what they are near and what excites them.

        Args:
            layer: which layer.
            head: which head (the key-value head for W_K and W_V); None for a matrix of the MLP.
            matrix: its name.
            n: how many directions, at most 5.
            model: the base model; by default the one that was analysed, if it still exists.
            contexts: how many calibration contexts to show for each direction and sign.

        Returns:
            One row per direction and sign: its share of ‖ΔW‖², the nearest tokens in embedding and unembedding by
            cosine, and the contexts with the largest projection (of the matrix's input on the direction for a read
            matrix; of what the delta writes along it for a write matrix). A singular vector has no sign of its own, so
            both are shown.

        Raises:
            ValueError: no such layer, head or matrix; the model is gone; another model than the one analysed.
        """
        model = model if model is not None else self._model() if self._model is not None else None
        if model is None:
            raise ValueError(
                "expected the base model to look tokens and contexts up in, but it is gone; pass model=base"
            )
        return describe_directions(
            ModelView(model), self.arrays, self.config, layer, head, matrix, n=n, contexts=contexts
        )

    # -- words ---------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The main numbers in one screen of plain text."""
        return summary_text(self)

    def __repr__(self) -> str:
        return self.summary()

    def _repr_html_(self) -> str:
        return summary_html(self)

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_heads(self, matrix: str, **options: Any) -> go.Figure:
        """Layer × head map of one matrix; hover gives value, interval and both nulls. See `plots.heads_figure`."""
        from tl_asymmetry.plots import heads_figure

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

    def plot_spectrum(self, subspace: str = "attn_in", **options: Any) -> go.Figure:
        """Eigenvalue spectra of a subspace, or of a delta by its matrix's name. See `plots.spectrum_figure`."""
        from tl_asymmetry.plots import spectrum_figure

        options = {"name": subspace, **options}
        if f"spectrum/{subspace}" in self.arrays:
            spectra = self.delta_spectrum(subspace).sum(1)  # heads pooled
            return spectrum_figure(spectra, **{**options, "name": f"ΔW of {subspace}, heads pooled"})
        eigenvalues = self.eigenvalues(subspace)
        if np.isnan(eigenvalues).all():
            raise ValueError(f"expected a subspace with eigenvalues, got {subspace!r}, given without; pass another one")
        return spectrum_figure(eigenvalues, **{"ranks": self.config["ranks"], **options})

    def to_html(self, path: str | Path) -> Path:
        """Write the report: one self-contained page that opens offline. Returns its path."""
        from tl_asymmetry.pair_report import pair_report
        from tl_asymmetry.report import write_report

        return write_report(path, pair_report(self))

    # -- disk ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the analysis into a folder (safetensors and JSON, no pickle). Returns the folder."""
        tables = {name: getattr(self, name) for name in _TABLES}
        return save_result(
            path, "PairAnalysis", tables=tables, arrays=self.arrays, config=self.config, notes=self.notes
        )

    @classmethod
    def load(cls, path: str | Path) -> PairAnalysis:
        """Read what `save` wrote; every number as it was.

        Raises:
            ValueError: no such analysis there.
        """
        tables, arrays, config, notes = load_result(path, "PairAnalysis")
        table, asymmetry, other_changes, circuits = (tables[name] for name in _TABLES)
        return cls(table, asymmetry, other_changes, circuits, config, notes, arrays)

    def to_xarray(self) -> Any:
        """The table as an `xarray.Dataset` for each (matrix, subspace), in a dict. Needs the extra `xarray`.

        Returns:
            `{(matrix, subspace): Dataset over layer, head, rank}`; an MLP matrix has no head axis.
        """
        try:
            import xarray  # noqa: F401 - pandas' to_xarray needs it
        except ImportError as error:
            raise ImportError("expected xarray to be installed; pip install 'tl-asymmetry[xarray]'") from error
        datasets = {}
        for key, rows in self.table.groupby(["matrix", "subspace"], sort=False):
            axes = ["layer", "rank"] if rows["head"].isna().all() else ["layer", "head", "rank"]
            plain = rows.drop(columns=["matrix", "subspace", *({"head"} - set(axes))])
            plain = plain.astype({axis: "int64" for axis in axes})
            datasets[key] = plain.set_index(axes).to_xarray()
        return datasets

    # -- making --------------------------------------------------------------------------------------------------

    @classmethod
    def assemble(
        cls,
        *,
        table: pd.DataFrame,
        asymmetry: pd.DataFrame,
        other_changes: pd.DataFrame,
        circuits: Sequence[pd.DataFrame],
        deltas: Mapping[str, Sequence[Delta]],
        projections: Mapping[tuple[str, str], Sequence[Projection]],
        sensitivity: SensitivityProfiles | None,
        sequences: Sequence[Tensor],
        config: dict[str, Any],
        notes: Sequence[str],
        model_base: Any,
    ) -> PairAnalysis:
        """Put the parts of an analysis together, stacked over layers."""
        arrays: dict[str, Tensor] = {}
        for matrix, layers in deltas.items():
            arrays[f"spectrum/{matrix}"] = stacked(layers, "spectrum")
            for name in ("directions", "partners"):
                arrays[f"{name}/{matrix}"] = stacked(layers, name)
        for (matrix, subspace), held in projections.items():
            energy = stacked(deltas[matrix], "energy").unsqueeze(-1)
            arrays[f"profile/{matrix}/{subspace}"] = (stacked(held, "energies") / energy).float()
            arrays[f"eigenvalues/{subspace}"] = stacked(held, "eigenvalues")
        arrays["tokens"] = torch.cat(list(sequences))
        arrays["lengths"] = torch.tensor([len(sequence) for sequence in sequences])
        if sensitivity is not None:
            arrays |= sensitivity.arrays()
        return cls(
            table=table,
            asymmetry=asymmetry,
            other_changes=other_changes,
            circuits=pd.concat(circuits, ignore_index=True),
            config=config,
            notes=tuple(notes),
            arrays=arrays,
            _model=weakref.ref(model_base),
        )

    @property
    def _d(self) -> int:
        return self.config["shape"]["d_model"]

    def _figure_defaults(self) -> dict[str, Any]:
        return {"default_rank": self.config["shown_rank"], "d_model": self._d}

    def _kv(self, matrix: str) -> dict[str, bool]:
        shape = self.config["shape"]
        return {"kv": matrix in ("W_K", "W_V") and shape["n_kv_heads"] < shape["n_heads"]}

    def _array(self, kind: str, *keys: str) -> np.ndarray:
        name = "/".join((kind, *keys))
        if name not in self.arrays:
            there = sorted(n.removeprefix(f"{kind}/") for n in self.arrays if n.startswith(f"{kind}/"))
            raise ValueError(f"expected one of {', '.join(there)}, got {'/'.join(keys)!r}; pass what was analysed")
        return self.arrays[name].numpy()


_TABLES = ("table", "asymmetry", "other_changes", "circuits")
