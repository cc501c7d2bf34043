"""What `analyze_pair` gives back: tables, profiles, figures, a report."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.padding import padded_stack
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import EXPERT_INPUT, whole_place
from tl_asymmetry.pair.data import PairData
from tl_asymmetry.pair.deltas import Delta, stacked
from tl_asymmetry.pair.projections import Projection
from tl_asymmetry.pair.report import pair_report
from tl_asymmetry.pair.summary import against_gradients, headline, summary_table
from tl_asymmetry.results.labelled import require_xarray
from tl_asymmetry.results.report import Report


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class PairAnalysis(PairData):
    """Where a base and an aligned model differ, by head, against two nulls. Made by `analyze_pair`.

    Printing it gives the summary; in a notebook it is a table.
    """

    @with_fresh_settings
    def directions(
        self,
        layer: int | str,
        matrix: str | None = None,
        head: int | None = None,
        n: int = 5,
        *,
        model: Any = None,
        contexts: int = 5,
    ) -> pd.DataFrame:
        """The leading residual directions of one head's delta, with what they are near and what excites them.

        The first call runs the calibration tokens through the layers up to this one, a later one through all layers if
        it must; what was looked up is kept for all heads of these layers.

        Args:
            layer: which layer; or the whole place, spelled "L7H3.W_Q" or "L7.W_in".
            matrix: its name.
            head: which head (the key-value head for W_K and W_V); None for a matrix of the MLP.
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
        from tl_asymmetry.pair.directions import describe_directions  # here, since a table is a class of pandas' own

        model = model if model is not None else self._model() if self._model is not None else None
        if model is None:
            raise ValueError(
                "expected the base model to look tokens and contexts up in, but it is gone; pass model=base"
            )
        said: Any = layer if matrix is None else (layer, matrix, head)
        place = whole_place(said, head)
        return describe_directions(
            ModelView(model), self.arrays, self.config, place, n=n, contexts=contexts, kept=self._lookups
        )

    # -- words ---------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        models = self.config["models"]
        return f"{models['base']['name']} → {models['aligned']['name']}"

    def _facts(self) -> str:
        shape, ranks = self.config["shape"], ", ".join(map(str, self.config["ranks"]))
        several = "s" if self.config["sequences"] > 1 else ""
        return (
            f"{shape['n_layers']} layers × {shape['n_heads']} heads, d_model {shape['d_model']}; "
            f"{self.config['tokens']} tokens in {self.config['sequences']} sequence{several}; "
            f"ranks {ranks}, shown {self.config['shown_rank']}"
        )

    def _summary_table(self) -> pd.DataFrame:
        return summary_table(self)

    def _headline(self) -> list[str]:
        return [*headline(self), *against_gradients(self)]

    def _report(self) -> Report:
        return pair_report(self)

    # -- pages ---------------------------------------------------------------------------------------------------

    @with_fresh_settings
    def to_explorer(self, path: str | Path, **options: Any) -> Path:
        """Write the head explorer: one self-contained page that opens offline. See `explorer`."""
        from tl_asymmetry.explore import explorer

        return explorer(self, path, **options)

    # -- other forms ---------------------------------------------------------------------------------------------

    def to_xarray(self) -> Any:
        """The table as an `xarray.Dataset` for each (matrix, subspace), in a dict. Needs the extra `xarray`.

        Returns:
            `{(matrix, subspace): Dataset over layer, head, rank}`; an MLP matrix has no head axis.
        """
        require_xarray()
        datasets = {}
        for key, rows in self.table.groupby(["matrix", "subspace"], sort=False):
            units = [unit for unit in ("head", "expert") if rows[unit].notna().all()]
            axes = ["layer", *units, "rank"]
            plain = rows.drop(columns=["matrix", "subspace", *({"head", "expert"} - set(axes))])
            plain = plain.astype({axis: "int64" for axis in axes})
            datasets[key] = plain.set_index(axes).to_xarray()
        return datasets

    # -- making --------------------------------------------------------------------------------------------------

    @classmethod
    def assemble(
        cls,
        *,
        table: pd.DataFrame,
        nulls: pd.DataFrame,
        tests: pd.DataFrame,
        asymmetry: pd.DataFrame,
        other_changes: pd.DataFrame,
        circuits: Sequence[pd.DataFrame],
        deltas: Mapping[str, Sequence[Delta | None]],
        projections: Mapping[tuple[str, str], Sequence[Projection | None]],
        variants: Mapping[str, Tensor],
        sequences: Sequence[Tensor],
        config: dict[str, Any],
        notes: Sequence[str],
        model_base: Any,
    ) -> PairAnalysis:
        """Put the parts of an analysis together, stacked over layers."""
        arrays: dict[str, Tensor] = {}
        for matrix, layers in deltas.items():
            arrays[f"spectrum/{matrix}"] = stacked(layers, "spectrum")
            if any(layer is not None and layer.pooled_spectrum is not None for layer in layers):
                arrays[f"pooled_spectrum/{matrix}"] = stacked(layers, "pooled_spectrum")  # of all heads as one delta
            for name in ("directions", "partners"):
                arrays[f"{name}/{matrix}"] = stacked(layers, name)
        for (matrix, subspace), held in projections.items():
            first = next(layer for layer in held if layer is not None)
            energy = stacked(deltas[matrix], "energy").unsqueeze(-1)
            arrays[f"profile/{matrix}/{subspace}"] = (stacked(held, "energies") / energy).float()
            for layer, projection in enumerate(held):
                if projection is not None and subspace != EXPERT_INPUT:  # whose energies end where an expert's do
                    arrays[f"profile/{matrix}/{subspace}"][layer, :, projection.existing :] = torch.nan
            arrays[f"eigenvalues/{subspace}"] = stacked(held, "eigenvalues")
            for null in first.references:  # at every rank up to the largest in use: [layer, head or 1, top]
                parts = [None if layer is None else torch.atleast_2d(layer.references[null]) for layer in held]
                arrays[f"expected/{null}/{matrix}/{subspace}"] = padded_stack(parts)
            if first.gradient_reference is not None:  # of every head by itself: [layer, head, top]
                arrays[f"expected/gradient/{matrix}/{subspace}"] = stacked(held, "gradient_reference")
            if first.replicates is not None:  # fractions with one group of texts left out [layer, group, head, rank]
                arrays[f"replicates/{matrix}/{subspace}"] = stacked(held, "replicates") / energy.unsqueeze(1)
        arrays["tokens"] = torch.cat(list(sequences))
        arrays["lengths"] = torch.tensor([len(sequence) for sequence in sequences])
        arrays |= variants
        return cls(
            table=table,
            nulls=nulls,
            tests=tests,
            asymmetry=asymmetry,
            other_changes=other_changes,
            circuits=pd.concat(circuits, ignore_index=True),
            config=config,
            notes=tuple(notes),
            arrays=arrays,
            _model=weakref.ref(model_base),
        )
