"""Analyses that share a base, held against each other: alignment against a control that any training would pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import special
from torch import Tensor

from tl_asymmetry.comparison.result import ASYMMETRY_COLUMNS, OVERLAP_COLUMNS, TABLE_COLUMNS, Comparison
from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS
from tl_asymmetry.geometry.nulls import IsotropicNull, adjusted_p
from tl_asymmetry.geometry.overlap import overlap_by_chance
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.names import SMALLEST_EIGENVALUE
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.asymmetry import READ_SIDE
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.results.provenance import versions

_KEYS = ["layer", "head", "matrix", "subspace", "rank"]
_SAME_SETTINGS = ("optimizer", "exclude_first", "centered", "groups", "activations")
# Of ΔW ΔWᵀ in float32: a direction weaker than this beside the first one is rounding, not the delta's.


@with_fresh_settings
def compare(
    result_a: PairAnalysis,
    result_b: PairAnalysis,
    *more: PairAnalysis,
    names: Sequence[str] | None = None,
    directions: int = 5,
) -> Comparison:
    """Two or more analyses of one base side by side: where do they differ, and do their deltas lie along each other.

    An alignment that reads more than a control trained as long on plain text is the strongest answer to "any training
    does this". The definitions are ours.

    Subspaces are the same in all of them, so the intervals are of a paired jackknife: both relative fractions are
    taken without the same group of texts, and their log ratio (or difference) is what varies. They cover which texts
    define the subspaces, for these very deltas; not training seeds, training data or the number of steps. On rows
    against weights alone (prediction) they are NaN.

    Args:
        result_a, result_b, more: from `analyze_pair`, of the same base, the same texts and the same choices of
            activations, centring, first position and groups.
        names: what to call them; by default the aligned models' names.
        directions: how many leading residual directions of each delta to hold against each other, at most 5.

    Returns:
        A frozen `Comparison`: differences, asymmetry and overlaps for each pair of analyses.

    Raises:
        ValueError: analyses of different bases, texts or choices, or that have no row in common.

    Example:
        >>> from tl_asymmetry import analyze_pair
        >>> from tl_asymmetry.demo import demo_model, demo_texts
        >>> base, texts = demo_model("base"), demo_texts(12)
        >>> dpo, control = (analyze_pair(base, demo_model(name), texts, ranks=[4], groups=3, progress=False)
        ...                 for name in ("dpo", "control"))
        >>> compare(dpo, control, names=["DPO", "control"]).table[["a", "b"]].iloc[0].tolist()
        ['DPO', 'control']
    """
    results = [result_a, result_b, *more]
    named = _named(results, names)
    if not 1 <= directions <= 5:
        raise ValueError(f"expected directions from 1 to 5, got {directions}; pass directions=5")
    notes = _check(named)
    pairs = list(combinations(named, 2))
    table = pd.concat([_differences(a, named[a], b, named[b]) for a, b in pairs], ignore_index=True)
    if not len(table):
        raise ValueError(
            "expected analyses with a matrix, subspace and rank in common, got none; analyse the same matrices and "
            "ranks"
        )
    for name, result in named.items():
        rows = len(result.table) - len(table[(table["a"] == name) | (table["b"] == name)]) // (len(named) - 1)
        if rows > 0:
            notes.append(f"{rows} rows of {name} have no counterpart in every other analysis and are left out")
    ranks = sorted({int(k) for k in table["rank"].unique()})
    shown = result_a.config["shown_rank"]
    return Comparison(
        table=table,
        asymmetry=pd.concat([_asymmetry(a, named[a], b, named[b]) for a, b in pairs], ignore_index=True),
        overlap=pd.concat([_overlaps(a, named[a], b, named[b], directions) for a, b in pairs], ignore_index=True),
        config={
            "names": list(named),
            "directions": directions,
            "versions": versions(),
            "base": result_a.config["models"]["base"],
            "aligned": {name: result.config["models"]["aligned"] for name, result in named.items()},
            "shape": result_a.config["shape"],
            "ranks": ranks,
            "shown_rank": shown if shown in ranks else ranks[len(ranks) // 2],
            "tokens": result_a.config["tokens"],
            "sequences": result_a.config["sequences"],
            "arguments": {name: result.config["arguments"] for name, result in named.items()},
        },
        notes=tuple(notes),
        arrays={},
    )


def _named(results: Sequence[PairAnalysis], names: Sequence[str] | None) -> dict[str, PairAnalysis]:
    for result in results:
        if not isinstance(result, PairAnalysis):
            raise ValueError(
                f"expected results of analyze_pair, got {type(result).__name__}; pass PairAnalysis objects"
            )
    given = [str(r.config["models"]["aligned"]["name"]) for r in results] if names is None else [str(n) for n in names]
    if len(given) != len(results):
        raise ValueError(f"expected {len(results)} names, got {len(given)}; pass one for each analysis")
    if len(set(given)) != len(given):
        if names is not None:
            raise ValueError(f"expected names that differ, got {', '.join(given)}; pass other names")
        given = [f"{name} [{i + 1}]" for i, name in enumerate(given)]
    return dict(zip(given, results, strict=True))


def _check(named: Mapping[str, PairAnalysis]) -> list[str]:
    """Refuse what cannot be compared; lines for the reader."""
    first, *others = named
    ours = named[first]
    for name in others:
        theirs = named[name]
        bases = [r.config["models"]["base"]["weights_xxh3"] for r in (ours, theirs)]
        if bases[0] != bases[1]:
            raise ValueError(
                f"expected analyses of one base, got {first} from {ours.config['models']['base']['name']} and {name} "
                f"from {theirs.config['models']['base']['name']}, whose weights differ; pass analyses of one base"
            )
        for array in ("lengths", "tokens"):
            if not torch.equal(ours.arrays[array], theirs.arrays[array]):
                raise ValueError(
                    f"expected analyses on the same texts, got other tokens in {first} than in {name}; analyse both "
                    "with the same texts"
                )
        for setting in _SAME_SETTINGS:
            a, b = (r.config["arguments"][setting] for r in (ours, theirs))
            if a != b:
                raise ValueError(
                    f"expected analyses with the same choices, got {setting}={a!r} in {first} and {b!r} in {name}; "
                    "analyse both with the same"
                )
        given = [_given(r) for r in (ours, theirs)]
        if given[0] != given[1]:
            raise ValueError(
                f"expected analyses against the same given subspaces, got others in {first} than in {name}; pass the "
                "same mapping to both"
            )
    notes = Notes()
    hashes: dict[str, str] = {}
    for name, result in named.items():
        twin = hashes.setdefault(result.config["models"]["aligned"]["weights_xxh3"], name)
        if twin != name:
            notes.warn(f"{twin} and {name} are the same model, weight for weight")
    if ours.config["arguments"]["activations"] != "base":
        notes.warn(
            "the analyses' subspaces come from different activations (activations is not 'base'): a difference may be "
            "one of subspaces rather than of deltas"
        )
    if not any(name.startswith("replicates/") for name in ours.arrays):
        notes.add("the analyses were made without intervals (or by an earlier version), so differences have none")
    return notes.lines


def _given(result: PairAnalysis) -> list[Any]:
    """What was passed as own directions, which the arguments tell by size and hash."""
    said = result.config["arguments"]["subspaces"]
    entries = [said] if said is None or isinstance(said, str | Mapping) else said
    return [entry for entry in entries if entry is not None and not isinstance(entry, str)]


# --- fractions ------------------------------------------------------------------------------------------------------


def _differences(name_a: str, a: PairAnalysis, name_b: str, b: PairAnalysis) -> pd.DataFrame:
    columns = [*_KEYS, "relative", "excess", "isotropic_q", "rounding_share", "delta_relative_norm"]
    left = a.table[[*columns[: len(_KEYS)], "pathway", *columns[len(_KEYS) :]]]
    both = left.merge(b.table[columns], on=_KEYS, suffixes=("_a", "_b"), how="inner", sort=False)
    both.insert(0, "a", name_a)
    both.insert(1, "b", name_b)
    ratio, low, high, difference, below, above = (np.full(len(both), np.nan) for _ in range(6))
    d = a.config["shape"]["d_model"]
    for (matrix, subspace, rank), rows in both.groupby(["matrix", "subspace", "rank"], sort=False):
        at = rows.index.to_numpy()
        estimate = [torch.from_numpy(rows[f"relative_{side}"].to_numpy(float, copy=True)) for side in "ab"]
        ratio[at] = torch.log2(estimate[0] / estimate[1]).numpy()
        difference[at] = (estimate[0] - estimate[1]).numpy()
        replicates = [_replicates(r, str(matrix), str(subspace), int(str(rank)), rows) for r in (a, b)]
        if replicates[0] is None or replicates[1] is None:
            continue
        held = [part * d / int(str(rank)) for part in replicates if part is not None]
        low[at], high[at] = _jackknife(torch.log2(estimate[0] / estimate[1]), torch.log2(held[0] / held[1]))
        below[at], above[at] = _jackknife(estimate[0] - estimate[1], held[0] - held[1])
    both = both.assign(
        log2_ratio=ratio, ci_low=low, ci_high=high, difference=difference, difference_low=below, difference_high=above
    )
    return both[list(TABLE_COLUMNS)]


def _replicates(result: PairAnalysis, matrix: str, subspace: str, rank: int, rows: pd.DataFrame) -> Tensor | None:
    """Fractions of some heads with one group left out `[group, row]`; None where there are none."""
    held = result.arrays.get(f"replicates/{matrix}/{subspace}")
    if held is None:
        return None
    column = result.config["ranks"].index(rank)
    layer = torch.from_numpy(rows["layer"].to_numpy(int))
    head = torch.from_numpy(rows["head"].fillna(0).to_numpy(int))
    return held[layer, :, head, column].mT


def _jackknife(estimate: Tensor, replicates: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """θ̂ ± t √v from delete-one-group replicates of the same quantity (Shao & Tu 1995, ch. 2); NaN under 3 groups."""
    g = len(replicates)
    if g < MINIMUM_GROUPS:
        nan = np.full(len(estimate), np.nan)
        return nan, nan
    v = (g - 1) / g * (replicates - replicates.mean(0)).square().sum(0)
    half = float(special.stdtrit(g - 1, 0.975)) * v.sqrt()
    return (estimate - half).numpy(), (estimate + half).numpy()


# --- asymmetry ------------------------------------------------------------------------------------------------------


def _asymmetry(name_a: str, a: PairAnalysis, name_b: str, b: PairAnalysis) -> pd.DataFrame:
    """log2(read/write) of both and its difference; the interval covers the read sides."""
    keys = ["layer", "head", "rank"]
    left, right = (r.asymmetry[[*keys, "read", "write", "log2_ratio"]] for r in (a, b))
    if not len(left) or not len(right):
        return pd.DataFrame(columns=list(ASYMMETRY_COLUMNS))
    both = left.merge(right, on=keys, suffixes=("_a", "_b"), how="inner", sort=False)
    both.insert(0, "a", name_a)
    both.insert(1, "b", name_b)
    both["difference"] = both["log2_ratio_a"] - both["log2_ratio_b"]
    low, high = np.full(len(both), np.nan), np.full(len(both), np.nan)
    for rank, rows in both.groupby("rank", sort=False):
        k = int(str(rank))
        reads = [_read_replicates(r, k) for r in (a, b)]
        if reads[0] is None or reads[1] is None:
            continue
        at = rows.index.to_numpy()
        layer = rows["layer"].to_numpy(int)
        head = rows["head"].fillna(-1).to_numpy(int)  # the last column is the whole layer
        change = torch.log2(reads[0] / reads[1])[:, layer, head]
        full = torch.from_numpy(np.log2(rows["read_a"].to_numpy(float) / rows["read_b"].to_numpy(float)))
        write = np.log2(rows["write_a"].to_numpy(float) / rows["write_b"].to_numpy(float))
        below, above = _jackknife(full, change)
        low[at], high[at] = below - write, above - write
    both["ci_low"], both["ci_high"] = low, high
    return both[list(ASYMMETRY_COLUMNS)]


def _read_replicates(result: PairAnalysis, rank: int) -> Tensor | None:
    """Relative read fractions with one group left out `[group, layer, head + 1]`, the whole layer last."""
    shape = result.config["shape"]
    inside, energy = [], []
    for matrix, subspace in READ_SIDE:
        held = result.arrays.get(f"replicates/{matrix}/{subspace}")
        if held is None:
            return None
        E = result.arrays[f"spectrum/{matrix}"].sum(-1)  # ‖ΔW‖² [layer, head]
        fraction = held[..., result.config["ranks"].index(rank)].transpose(0, 1)  # [group, layer, head]
        inside.append(fraction * E)
        energy.append(E)
    heads = shape["n_heads"]

    def per_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // x.shape[-1], -1)

    by_head = sum(map(per_head, inside)) / sum(map(per_head, energy))
    whole = sum(x.sum(-1) for x in inside) / sum(x.sum(-1) for x in energy)
    read = torch.cat([torch.as_tensor(by_head), torch.as_tensor(whole).unsqueeze(-1)], -1)
    return read * shape["d_model"] / rank


# --- directions -----------------------------------------------------------------------------------------------------


def _overlaps(name_a: str, a: PairAnalysis, name_b: str, b: PairAnalysis, most: int) -> pd.DataFrame:
    """How far the leading residual directions of two deltas span the same space, head by head."""
    frames = []
    null = IsotropicNull(a.config["shape"]["d_model"], seed=a.config["arguments"]["seed"])
    headed = a.table.groupby("matrix", sort=False)["head"].agg(lambda heads: bool(heads.notna().all()))
    for matrix, has_heads in headed.items():
        if f"directions/{matrix}" in b.arrays:
            frames.append(_overlap(str(matrix), a.arrays, b.arrays, most, null, headed=bool(has_heads)))
    if not frames:
        return pd.DataFrame(columns=list(OVERLAP_COLUMNS))
    return pd.concat(frames, ignore_index=True).assign(a=name_a, b=name_b)[list(OVERLAP_COLUMNS)]


def _overlap(
    matrix: str,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    most: int,
    null: IsotropicNull,
    *,
    headed: bool,
) -> pd.DataFrame:
    U, V, λ = ([arrays[f"{name}/{matrix}"] for arrays in (a, b)] for name in ("directions", "partners", "spectrum"))
    layers, heads = λ[0].shape[:2]
    λ = [part.double() for part in λ]
    # as many as both deltas have
    counts = [(part[..., :most] > SMALLEST_EIGENVALUE * part[..., :1]).sum(-1) for part in λ]
    n = torch.minimum(*counts)
    kept = torch.arange(U[0].shape[-2]) < n.unsqueeze(-1)  # [layer, head, direction]
    first, second = (part.double() * kept.unsqueeze(-1) for part in U)
    cosines = first @ second.mT  # [layer, head, i, j]
    partners = (V[0].double() * kept.unsqueeze(-1)) @ (V[1].double() * kept.unsqueeze(-1)).mT
    overlap = cosines.square().sum((-2, -1)) / n
    σ = [part[..., : U[0].shape[-2]].sqrt() * kept for part in λ]
    inner = (σ[0].unsqueeze(-1) * σ[1].unsqueeze(-2) * cosines * partners).sum((-2, -1))
    cosine = inner / (σ[0].norm(dim=-1) * σ[1].norm(dim=-1))
    share = [(part[..., : U[0].shape[-2]] * kept).sum(-1) / part.sum(-1) for part in λ]
    z, p, method = overlap_by_chance(overlap.flatten(), n.flatten(), null)
    nothing = n.flatten().numpy() == 0
    columns = {
        "overlap": overlap,
        "chance": n / null.d,
        "cosine": cosine,
        "leading_cosine": cosines[..., 0, 0].abs(),
        "share_a": share[0],
        "share_b": share[1],
    }
    frame = pd.DataFrame({name: np.where(nothing, np.nan, x.flatten().numpy()) for name, x in columns.items()})
    frame["layer"] = pd.array(np.repeat(np.arange(layers), heads), dtype="Int64")
    frame["head"] = pd.array(np.tile(np.arange(heads), layers) if headed else [pd.NA] * layers, dtype="Int64")
    frame["matrix"] = matrix
    frame["directions"] = n.flatten().numpy()
    frame["z"], frame["p"], frame["p_method"], frame["q"] = z, p, method, adjusted_p(p)
    return frame
