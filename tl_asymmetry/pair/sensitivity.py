"""How much a verdict depends on choices: the same deltas under every other choice of subspace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.padding import padded_stack
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace
from tl_asymmetry.models.capture import merged
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.pair.deltas import AnyDelta
from tl_asymmetry.pair.plan import Plan, Sources

SENSITIVITY_COLUMNS = (
    "layer", "head", "expert", "matrix", "subspace", "activations", "centered", "first_position", "fold_norm", "rank",
    "fraction", "relative",
)  # fmt: skip
"""Columns of `PairAnalysis.sensitivity()`, in this order."""

_PREFIX = "sensitivity"


class SensitivityProfiles:
    """Energy profiles under every variant of the captured and prediction subspaces.

    Variants of a captured subspace: whose activations (base, aligned, both) × covariance or second moment × first
    position out or in. Of the prediction subspace: whose unembedding × mean over the vocabulary out or in × final norm
    folded or not.
    """

    def __init__(self, predictions: Mapping[str, Subspace], sources: Sources) -> None:
        self._predictions = predictions
        self._sources = sources

    def of_layer(self, layer: int, deltas: Mapping[str, AnyDelta], plan: Plan) -> dict[str, Tensor]:
        """One layer's energy profiles on all variants of the subspaces that its deltas are held against; NaN along
        what is no direction of a variant."""
        profiles = {}
        for variant, subspace in self._variants(layer, plan):
            for matrix, delta in deltas.items():
                if variant.split("/")[0] in plan.targets[matrix]:
                    profile = delta.energies(subspace.basis) / delta.numbers.energy.unsqueeze(-1)
                    profile[:, subspace.existing :] = torch.nan
                    profiles[f"{_PREFIX}/{matrix}/{variant}"] = profile.float()
        return profiles

    def moments_of_layer(self, layer: int) -> dict[str, Tensor]:
        """The moments behind one layer's profiles, for a result to keep."""
        arrays = {}
        for model, capture in self._sources.captures.items():
            for part, groups in (("counted", capture.groups), ("first", capture.first_positions or ())):
                for site in [site for site in groups[0] if site[1] == layer] if groups else []:
                    moments = merged(group[site] for group in groups)
                    for name, value in moments.state_dict().items() if moments.count else ():  # experts without tokens
                        arrays[f"moments/{model}/{site[0]}/{layer}/{part}/{name}"] = value
        return arrays

    def _variants(self, layer: int, plan: Plan) -> Iterator[tuple[str, Subspace]]:
        points = [name for name in plan.subspaces if name in plan.points]
        for name, activations, excluded in product(points, ("base", "aligned", "both"), (True, False)):
            moments = self._sources.total((name, layer), activations, exclude_first=excluded)
            for centered in (False, True):
                subspace = principal_subspace(moments, centered=centered)
                labels = "centered" if centered else "uncentered", "excluded" if excluded else "included"
                yield f"{name}/{activations}/{labels[0]}/{labels[1]}/-", subspace
        yield from self._predictions.items()


def prediction_variants(base: ModelView, aligned: ModelView) -> dict[str, Subspace]:
    """The prediction subspace's variants by label: whose unembedding, centred or not, norm folded or not."""
    return {
        f"prediction/{role}/{'centered' if centered else 'uncentered'}/-/{'folded' if fold else 'plain'}": (
            prediction_subspace(view, fold_norm=fold, centered=centered, d_vocab=base.d_vocab)
        )
        for (role, view), centered, fold in product(
            (("base", base), ("aligned", aligned)), (True, False), (True, False)
        )
    }


def stacked_variants(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Profiles `[layer, head, d]` by variant."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {name: padded_stack([layer.get(name) for layer in layers]) for name in names}


def sensitivity_table(
    arrays: Mapping[str, Tensor], ranks: Sequence[int], places: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """One row per layer × head × matrix × variant × rank, from what `stacked_variants` gave a result to keep.

    NaN at ranks that a variant does not have.

    Args:
        arrays: of the result.
        ranks: k.
        places: layer, head and expert of what there is of each matrix.
    """
    blocks: list[dict[str, Any]] = []
    for name, profile in arrays.items():
        if not name.startswith(f"{_PREFIX}/"):
            continue
        _, matrix, subspace, activations, centering, first, norm = name.split("/")
        there, d = places[matrix], profile.shape[-1]
        cumulative = profile.double().cumsum(-1)[there["layer"].to_numpy(int), unit_of(there)].numpy()
        same = {
            "matrix": matrix, "subspace": subspace, "activations": activations, "centered": centering == "centered",
            "first_position": first, "fold_norm": norm,
        }  # fmt: skip
        blocks += [
            {**same, "rank": k, "fraction": cumulative[:, k - 1], "relative": cumulative[:, k - 1] * d / k}
            for k in ranks
            if k < d
        ]
    # One frame for all blocks: pandas takes a millisecond for each column that is added to one.
    lengths = [len(of["fraction"]) for of in blocks]
    parts = {name: [block[name] for block in blocks] for name in blocks[0]}
    columns = {
        name: np.concatenate(of) if name in ("fraction", "relative") else np.repeat(of, lengths)
        for name, of in parts.items()
    }
    rows = pd.concat([places[block["matrix"]] for block in blocks], ignore_index=True)
    return rows.assign(**columns)[list(SENSITIVITY_COLUMNS)]


def unit_of(rows: pd.DataFrame) -> np.ndarray:
    """Where each row's head or expert stands in its layer; 0 for a matrix that is neither's."""
    return rows["head"].fillna(rows["expert"]).fillna(0).to_numpy(int)
