"""Many weight changes of one base held against each other: no texts, one matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.comparison.deltas_result import ARM_COLUMNS, DELTA_COLUMNS, DeltaComparison, cosines_of
from tl_asymmetry.geometry.nulls import IsotropicNull, adjusted_p
from tl_asymmetry.geometry.overlap import overlap_by_chance
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.rounding import rounding_noise
from tl_asymmetry.models.checks import check_shapes
from tl_asymmetry.models.configurations import strange_families
from tl_asymmetry.models.readers.base import Weights
from tl_asymmetry.models.strangers import cosines_with_base, strangers, unrelated
from tl_asymmetry.models.weights import opened
from tl_asymmetry.names import SMALLEST_EIGENVALUE, kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.plan import chosen_matrices
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions
from tl_asymmetry.settings import checked_hash
from tl_asymmetry.spectra.change import Change, change_of, heads_first

_MOST_RUNS = 12


@checked
@with_fresh_settings
def compare_deltas(
    model_base: Any,
    models: Mapping[str, Any],
    *,
    matrices: Sequence[str] | str | None = None,
    rank: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> DeltaComparison:
    """How alike many weight changes of one base are: cosines, shared directions of either side, and who is near whom.

    For same data under another loss, other data under the same loss, or a shelf of adapters. Every two deltas are
    compared head by head: their cosine, the overlap of their leading singular directions on the input side (what they
    read) and on the output side (what they write). Trainings on similar inputs share directions for that reason alone,
    so the measure of "alike" is how alike two runs of one training are: pass several runs of a name, and the runs'
    labels are permuted. The definitions are ours.

    Args:
        model_base: a HookedTransformer, TransformerBridge, transformers model, or what `weights_from` reads.
        models: name → model, or a list of runs of one training that differ in their seed. A model is what the base may
            be, or an adapter of it, whose change stays factored. All deltas of one matrix are in memory at a time.
        matrices: which; None: all that the base has.
        rank: how many leading singular directions of each delta are compared, where it has as many.
        seed: of the draws of chance and rounding.
        progress: show a progress bar.

    Returns:
        A `DeltaComparison`.

    Raises:
        ValueError: fewer than two deltas, other shapes, processed weights, weights that are not finite, a rank that is
            no proper subspace.

    Example:
        >>> from tl_asymmetry.demo import demo_model
        >>> deltas = {"DPO": aligned, "control": demo_model("control")}
        >>> result = compare_deltas(base, deltas, matrices=["W_out"], progress=False)
        >>> result.cosines().round(1).loc["DPO", "control"].item()
        0.0
    """
    notes = Notes()
    base = opened(model_base, None, runs=False)
    shelf = _shelf(models, base, notes)
    arguments = described(models=list(models), matrices=matrices, rank=rank, seed=seed, progress=progress)
    chosen = chosen_matrices(base, matrices)
    shorter = min(min(base.weight(0, matrix).shape[-2:]) for matrix in chosen)
    if not 0 < rank < shorter:
        raise ValueError(f"expected a rank from 1 to {shorter - 1}, got {rank!r}; pass rank=4 or such")
    hashes = {name: checked_hash(run.weights, f"model {name}", warn=notes.warn) for name, run in shelf.items()}
    base_hash = checked_hash(base, "base model", warn=notes.warn)
    _tell_twins(hashes | {"the base": base_hash}, notes)
    for weights in (base, *(run.weights for run in shelf.values())):
        for note in weights.notes:
            notes.add(note)
    work = [(layer, matrix) for layer in range(base.n_layers) for matrix in chosen]
    rows: list[pd.DataFrame] = []
    arrays: dict[str, Tensor] = {}
    turns: dict[str, dict[str, list[float]]] = {}
    for layer, matrix in tqdm(work, desc="deltas", unit="matrix", disable=not progress):
        found = _Matrix(base, shelf, layer, matrix, seed=seed)
        arrays[f"gram/{layer}/{matrix}"] = found.gram
        for name, values in found.cosines().items():
            turns.setdefault(name, {}).setdefault(matrix, []).extend(values)
        rows += found.pairs(rank)
    table = pd.concat(rows, ignore_index=True)
    table = _tested(table, seed)
    arms = [run.arm for run in shelf.values()]
    units: list[str | None] = [None, *chosen]
    cosines = {
        unit: cosines_of([x for name, x in arrays.items() if unit is None or name.endswith(f"/{unit}")])
        for unit in units
    }
    unlike = {name: them for name, turned in turns.items() if (them := unrelated(turned))}
    for name, matrices_of_it in unlike.items():
        notes.warn(strangers(matrices_of_it, of=f" of {name}"))
    config = {
        "arguments": arguments,
        "versions": versions(),
        "base": model_record(base, base_hash),
        "models": {name: model_record(run.weights, hashes[name]) for name, run in shelf.items()},
        "arms": arms,
        "order": _order(cosines[None]),
        "shape": shape_record(base),
        "matrices": list(chosen),
        "rank": rank,
        "unrelated": unlike,
    }
    return DeltaComparison(
        table=table, arms=_arm_table(cosines, arms), config=config, notes=tuple(notes.lines),
        arrays=arrays,
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    arm: str
    """The name that it was passed under, shared by the runs of one training."""
    weights: Weights


def _shelf(models: Mapping[str, Any], base: Weights, notes: Notes) -> dict[str, _Run]:
    """Every run under a name of its own, checked against the base."""
    if not isinstance(models, Mapping):
        raise ValueError(
            f"expected a mapping from names to models, got {type(models).__name__}; pass e.g. "
            '{"dpo": dpo, "kto": [kto_1, kto_2]}'
        )
    shelf: dict[str, _Run] = {}
    for arm, given in models.items():
        runs = list(given) if isinstance(given, list | tuple) else [given]
        for i, run in enumerate(runs):
            weights = opened(run, base, runs=False)
            check_shapes(base, weights)
            for warning in strange_families(base, weights, name=str(arm)):
                notes.warn(warning)
            shelf[str(arm) if len(runs) == 1 else f"{arm} [{i + 1}]"] = _Run(str(arm), weights)
    if len(shelf) < 2:
        raise ValueError(f"expected two models or more, got {len(shelf)}; pass several names, or several runs of one")
    return shelf


def _tell_twins(hashes: Mapping[str, str], notes: Notes) -> None:
    seen: dict[str, str] = {}
    for name, hashed in hashes.items():
        twin = seen.setdefault(hashed, name)
        if twin != name:
            notes.warn(f"{twin} and {name} are the same model, weight for weight")


class _Matrix:
    """One matrix of one layer in every model, heads side by side."""

    def __init__(self, base: Weights, shelf: Mapping[str, _Run], layer: int, matrix: str, *, seed: int) -> None:
        self.layer, self.matrix, self.shelf = layer, matrix, shelf
        self.W = W = heads_first(base.weight(layer, matrix))
        self.size = W.double().square().sum((-2, -1)).sqrt()
        self.changes = {name: change_of(base, run.weights, layer, matrix) for name, run in shelf.items()}
        changes = list(self.changes.values())
        self.gram: Float64[Tensor, "head run run"] = torch.stack(
            [torch.stack([a.times(b).cpu() for b in changes], -1) for a in changes], -2
        )
        self.rounding = {name: _rounding(W, change, seed) for name, change in self.changes.items()}

    def cosines(self) -> dict[str, list[float]]:
        """Of each head's weights with the base's, by model."""
        size = self.size.cpu()
        return {
            name: cosines_with_base(self.gram[:, i, i].sqrt() / size, change.inner(self.W).cpu() / size**2).tolist()
            for i, (name, change) in enumerate(self.changes.items())
        }

    def pairs(self, rank: int) -> Iterator[pd.DataFrame]:
        """One row for each head and two models."""
        names, norms = list(self.changes), self.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        headed = kind_of(self.matrix).heads is not None
        for i, j in combinations(range(len(names)), 2):
            a, b = (self.changes[names[at]] for at in (i, j))
            columns = _alike(a, b, rank) | {
                "cosine": self.gram[:, i, j] / (norms[:, i] * norms[:, j]),
                "rounding_share_a": self.rounding[names[i]],
                "rounding_share_b": self.rounding[names[j]],
                "delta_relative_norm_a": norms[:, i] / self.size.cpu(),
                "delta_relative_norm_b": norms[:, j] / self.size.cpu(),
            }
            frame = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
            heads = range(len(frame))
            yield frame.assign(
                a=names[i], b=names[j], same=self.shelf[names[i]].arm == self.shelf[names[j]].arm, layer=self.layer,
                head=pd.array(list(heads) if headed else [pd.NA] * len(frame), dtype="Int64"), matrix=self.matrix,
                pathway=kind_of(self.matrix).side,
            )  # fmt: skip


def _rounding(W: Tensor, change: Change, seed: int) -> Float64[Tensor, " head"]:
    if change.stored is None:
        return torch.where(change.energy > 0, 0.0, torch.nan)
    return rounding_noise(W, change.left, change.stored, seed=seed).share


def _alike(a: Change, b: Change, rank: int) -> dict[str, Tensor]:
    """What two deltas have in common, head by head; NaN where one of them is zero."""
    U, σ, V = zip(a.decomposed, b.decomposed, strict=True)
    sides = {"in": U[0].mT @ U[1], "out": V[0].mT @ V[1]}  # cosines of all singular directions
    energy = [s.square() for s in σ]
    # tr(AAᵀBBᵀ) and tr(AᵀABᵀB): the spread of the cosine of two deltas that share their covariances and no more
    shared = [(energy[0].unsqueeze(-2) @ c.square() @ energy[1].unsqueeze(-1)).flatten(-3) for c in sides.values()]
    sizes = energy[0].sum(-1) * energy[1].sum(-1)
    there = [(e[..., :rank] > SMALLEST_EIGENVALUE * e[..., :1]).sum(-1) for e in energy]
    n = torch.minimum(*there)
    n = torch.minimum(*((e[..., :rank] > SMALLEST_EIGENVALUE * e[..., :1]).sum(-1) for e in energy))
    kept = [torch.arange(e.shape[-1], device=n.device) < n.unsqueeze(-1) for e in energy]
    leading = sides["in"][..., 0, 0] * sides["out"][..., 0, 0]
    columns = {
        "cosine_sd": (shared[0] * shared[1]).sqrt() / sizes,
        "leading_cosine": torch.where(n > 0, leading, torch.nan),
        "directions": n,
    }
    for (side, cosines), axis in zip(sides.items(), (U[0].shape[-2], V[0].shape[-2]), strict=True):
        columns[f"overlap_{side}"] = (kept[0].unsqueeze(-1) * kept[1].unsqueeze(-2) * cosines.square()).sum(
            (-2, -1)
        ) / n
        columns[f"chance_{side}"] = n.double() / axis
    for name, e, own in zip("ab", energy, kept, strict=True):
        columns[f"share_{name}"] = (e * own).sum(-1) / e.sum(-1)
    return columns


def _tested(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """z, p and q of the overlaps against Haar-random spaces."""
    directions = torch.from_numpy(table["directions"].to_numpy(int, copy=True))
    for side in ("in", "out"):
        z, p = np.full(len(table), np.nan), np.full(len(table), np.nan)
        overlap = torch.from_numpy(table[f"overlap_{side}"].to_numpy(float, copy=True))
        axis = (directions / torch.from_numpy(table[f"chance_{side}"].to_numpy(float, copy=True))).round()
        for d in sorted({int(length) for length in axis[directions > 0].tolist()}):
            at = ((axis == d) & (directions > 0)).numpy()
            z[at], p[at], _ = overlap_by_chance(overlap[at], directions[at], IsotropicNull(d, seed=seed))
        table[f"z_{side}"], table[f"p_{side}"] = z, p
        groups = table.groupby(["a", "b", "matrix"], sort=False)[f"p_{side}"]
        table[f"q_{side}"] = groups.transform(lambda p: adjusted_p(p.to_numpy()))
    return table[list(DELTA_COLUMNS)]


def _order(cosines: np.ndarray) -> list[int]:
    """The leaves of average linkage on 1 − cosine, neighbours side by side; a model without a delta counts as 0."""
    distance = 1 - np.nan_to_num(cosines)
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False).clip(min=0)
    if len(cosines) < 3:
        return list(range(len(cosines)))
    tree = hierarchy.linkage(condensed, "average", optimal_ordering=True)
    return [int(leaf) for leaf in hierarchy.leaves_list(tree)]


def _arm_table(cosines: Mapping[str | None, np.ndarray], arms: Sequence[str]) -> pd.DataFrame:
    """Between two trainings and within each, of the whole model and of each matrix."""
    rows = []
    for first, second in combinations(dict.fromkeys(arms), 2):
        at = [i for i, arm in enumerate(arms) if arm in (first, second)]
        of_first = tuple(i for i, run in enumerate(at) if arms[run] == first)
        for matrix, values in cosines.items():
            rows.append(
                {"arm_a": first, "arm_b": second, "matrix": matrix, **_permuted(values[np.ix_(at, at)], of_first)}
            )
    return pd.DataFrame(rows, columns=list(ARM_COLUMNS)).astype({"matrix": object, "relabelings": "int64"})


def _permuted(cosines: np.ndarray, first: tuple[int, ...]) -> dict[str, float]:
    """The runs' labels exchanged in every way: how often runs are told apart at least as well as they are."""
    runs = len(cosines)

    def means(chosen: tuple[int, ...]) -> tuple[float, float]:
        label = np.isin(np.arange(runs), chosen)
        upper = np.triu(np.ones((runs, runs), dtype=bool), 1)
        same = (label[:, None] == label) & upper
        between = cosines[upper & ~same].mean()
        return float(between), float(cosines[same].mean()) if same.any() else float("nan")

    between, within = means(first)
    if runs < 3 or np.isnan(within - between) or runs > _MOST_RUNS:
        return {"cosine": between, "within": within, "separation": within - between, "p": np.nan, "relabelings": 1}
    apart = [inside - across for across, inside in map(means, combinations(range(runs), len(first)))]
    # Halves exchanged are the same labelling.
    ways = comb(runs, len(first)) // (2 if 2 * len(first) == runs else 1)
    p = float(np.mean(np.array(apart) >= within - between - 1e-12))
    return {"cosine": between, "within": within, "separation": within - between, "p": p, "relabelings": ways}
