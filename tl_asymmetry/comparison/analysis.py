"""Analyses that share a base, held against each other: alignment against a control that any training would pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_asymmetry._lazy import pd, special
from tl_asymmetry.arguments import checked
from tl_asymmetry.comparison.result import ASYMMETRY_COLUMNS, OVERLAP_COLUMNS, TABLE_COLUMNS, Comparison
from tl_asymmetry.geometry.hierarchy import hierarchy
from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS
from tl_asymmetry.geometry.nulls import IsotropicNull, adjusted_p
from tl_asymmetry.geometry.overlap import overlap_by_chance
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.two_samples import separation
from tl_asymmetry.models.strangers import strangers
from tl_asymmetry.names import SIGNIFICANT, SMALLEST_EIGENVALUE
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.asymmetry import READ_SIDE
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.results.provenance import versions

_KEYS = ["layer", "head", "expert", "matrix", "subspace", "rank"]
_SAME_SETTINGS = ("optimizer", "exclude_first", "centered", "groups", "activations")

Runs = tuple[PairAnalysis, ...]
"""The analyses of one arm: trained alike from one base, each from a seed of its own."""


@checked
@with_fresh_settings
def compare(
    *results: PairAnalysis | Mapping[str, PairAnalysis | Sequence[PairAnalysis]],
    names: Sequence[str] | None = None,
    directions: int = 5,
) -> Comparison:
    """Two or more analyses of one base side by side: where do they differ, and do their deltas lie along each other.

    An alignment that reads more than a control trained as long on plain text is the strongest answer to "any training
    does this". The definitions are ours.

    Two runs of one recipe differ too, so a head counts as different only beyond the spread between the runs of one
    arm: pass several, `compare({"dpo": [run, run, run], "sft": [run, run, run]})`. With one run an arm differences are
    shown, and none is counted.

    Subspaces are the same in all of them, so the intervals over texts are of a paired jackknife: both relative
    fractions are taken without the same group of texts, and their log ratio (or difference) is what varies. They cover
    which texts define the subspaces, for these very deltas. On rows against weights alone (prediction) they are NaN.

    Args:
        results: from `analyze_pair`, two or more of the same base, the same texts and the same choices of activations,
            centring, first position and groups; or one mapping from names of arms to an analysis, or to those of
            several runs.
        names: what to call them where no mapping does; by default the aligned models' names.
        directions: how many leading residual directions of each delta to hold against each other, at most 5.

    Returns:
        A frozen `Comparison`: differences, asymmetry and overlaps for each pair of arms.

    Raises:
        ValueError: analyses of different bases, texts or choices, one run given twice in an arm, or no row in common.

    Example:
        >>> from tl_asymmetry import analyze_pair
        >>> from tl_asymmetry.demo import demo_model, demo_texts
        >>> base, texts = demo_model("base"), demo_texts(12)
        >>> dpo, control = (analyze_pair(base, demo_model(name), texts, ranks=[4], groups=3, progress=False)
        ...                 for name in ("dpo", "control"))
        >>> compare(dpo, control, names=["DPO", "control"]).table[["a", "b"]].iloc[0].tolist()
        ['DPO', 'control']
    """
    arms = _arms(results, names)
    if not 1 <= directions <= 5:
        raise ValueError(f"expected directions from 1 to 5, got {directions}; pass directions=5")
    notes = _check(arms)
    pairs = list(combinations(arms, 2))
    table = pd.concat([_differences(a, arms[a], b, arms[b]) for a, b in pairs], ignore_index=True)
    if not len(table):
        raise ValueError(
            "expected analyses with a matrix, subspace and rank in common, got none; analyse the same matrices and "
            "ranks"
        )
    for name, runs in arms.items():
        rows = len(runs[0].table) - len(table[(table["a"] == name) | (table["b"] == name)]) // (len(arms) - 1)
        if rows > 0:
            notes.append(f"{rows} rows of {name} have no counterpart in every other analysis and are left out")
    ranks = sorted({int(k) for k in table["rank"].unique()})
    first = next(iter(arms.values()))[0]
    shown = first.config["shown_rank"]
    return Comparison(
        table=table,
        asymmetry=pd.concat([_asymmetry(a, arms[a], b, arms[b]) for a, b in pairs], ignore_index=True),
        overlap=pd.concat([_overlaps(a, arms[a], b, arms[b], directions) for a, b in pairs], ignore_index=True),
        config={
            "names": list(arms),
            "runs": {name: len(runs) for name, runs in arms.items()},
            "directions": directions,
            "versions": versions(),
            "base": first.config["models"]["base"],
            "aligned": {name: [run.config["models"]["aligned"] for run in runs] for name, runs in arms.items()},
            "shape": first.config["shape"],
            "ranks": ranks,
            "shown_rank": shown if shown in ranks else ranks[len(ranks) // 2],
            "tokens": first.config["tokens"],
            "sequences": first.config["sequences"],
            "arguments": {name: [run.config["arguments"] for run in runs] for name, runs in arms.items()},
            "unrelated": {
                name: list(dict.fromkeys(matrix for run in runs for matrix in run.config["unrelated"]))
                for name, runs in arms.items()
            },
        },
        notes=tuple(notes),
        arrays={},
    )


def _arms(results: Sequence[Any], names: Sequence[str] | None) -> dict[str, Runs]:
    """The runs of each arm by its name."""
    if len(results) == 1 and isinstance(results[0], Mapping):
        if names is not None:
            raise ValueError(f"expected names from the mapping alone, got names={list(names)!r} too; leave names out")
        arms = {
            str(name): (runs,) if isinstance(runs, PairAnalysis) else tuple(runs) for name, runs in results[0].items()
        }
    else:
        for result in results:
            _require_analysis(result)
        arms = {name: (result,) for name, result in zip(_names(results, names), results, strict=True)}
    for name, runs in arms.items():
        if not runs:
            raise ValueError(f"expected at least one analysis in {name}, got none; pass one, or leave the arm out")
        for run in runs:
            _require_analysis(run)
    if len(arms) < 2:
        raise ValueError(
            f"expected two analyses or more, got {', '.join(arms) or 'none'}; pass another, or a mapping of two arms"
        )
    return arms


def _require_analysis(result: Any) -> None:
    if not isinstance(result, PairAnalysis):
        raise ValueError(f"expected results of analyze_pair, got {type(result).__name__}; pass PairAnalysis objects")


def _names(results: Sequence[PairAnalysis], names: Sequence[str] | None) -> list[str]:
    given = [str(r.config["models"]["aligned"]["name"]) for r in results] if names is None else [str(n) for n in names]
    if len(given) != len(results):
        raise ValueError(f"expected {len(results)} names, got {len(given)}; pass one for each analysis")
    if len(set(given)) != len(given):
        if names is not None:
            raise ValueError(f"expected names that differ, got {', '.join(given)}; pass other names")
        given = [f"{name} [{i + 1}]" for i, name in enumerate(given)]
    return given


def _check(arms: Mapping[str, Runs]) -> list[str]:
    """Refuse what cannot be compared; lines for the reader."""
    named: dict[str, PairAnalysis] = {}
    arm_of: dict[str, str] = {}
    for arm, runs in arms.items():
        for i, run in enumerate(runs):
            name = arm if len(runs) == 1 else f"{arm} (run {i + 1})"
            named[name], arm_of[name] = run, arm
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
        if twin == name:
            continue
        if arm_of[twin] == arm_of[name]:
            raise ValueError(
                f"expected runs of their own in an arm, got the same weights in {twin} and {name}; pass each run once"
            )
        notes.warn(f"{twin} and {name} are the same model, weight for weight")
    for name, result in named.items():
        if unlike := result.config["unrelated"]:
            notes.warn(strangers(unlike, of=f" of {name}"))
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


def _differences(name_a: str, a: Runs, name_b: str, b: Runs) -> pd.DataFrame:
    sides = [_arm_table(runs) for runs in (a, b)]
    pathway = a[0].table[[*_KEYS, "pathway"]]
    rows = pathway.merge(sides[0], on=_KEYS, how="inner", sort=False)
    both = rows.merge(sides[1], on=_KEYS, suffixes=("_a", "_b"), how="inner", sort=False)
    if both.empty:
        return pd.DataFrame(columns=list(TABLE_COLUMNS))
    both = both.assign(a=name_a, b=name_b, runs_a=len(a), runs_b=len(b))
    intervals = {
        column: np.full(len(both), np.nan) for column in ("ci_low", "ci_high", "difference_low", "difference_high")
    }
    relative = [both[f"relative_{side}"].to_numpy(float) for side in "ab"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(relative[0] / relative[1])
    difference = relative[0] - relative[1]
    for (matrix, subspace, rank), block in both.groupby(["matrix", "subspace", "rank"], sort=False):
        held = [_arm_replicates(runs, str(matrix), str(subspace), int(str(rank)), block) for runs in (a, b)]
        if held[0] is None or held[1] is None:
            continue
        at = block.index.to_numpy()
        d = a[0].width(str(matrix))
        one, two = (part * d / int(str(rank)) for part in held if part is not None)
        of_ratio = _jackknife(torch.from_numpy(ratio[at]), torch.log2(one / two))
        of_difference = _jackknife(torch.from_numpy(difference[at]), one - two)
        for column, values in zip(intervals, (*of_ratio, *of_difference), strict=True):
            intervals[column][at] = values
    logs = [np.stack(both[f"log2_{side}"].to_list(), 1) for side in "ab"]  # [run, row]
    seeds = separation(*logs)
    both = both.assign(log2_ratio=ratio, difference=difference, **intervals)
    both = both.assign(seed_low=seeds.low, seed_high=seeds.high, seed_p=seeds.p)
    both["seed_q"] = _corrected(both)
    found = both["seed_q"] <= SIGNIFICANT
    both["vs_other"] = np.select(
        [both["seed_q"].isna(), found & (both["log2_ratio"] > 0), found], ["", "larger", "smaller"], "not told apart"
    )
    return both[list(TABLE_COLUMNS)]


def _arm_table(runs: Runs) -> pd.DataFrame:
    """What an arm's runs have in common: geometric means, the largest q and rounding share, log2 of every run."""
    columns = ["relative", "excess", "isotropic_q", "rounding_share", "delta_relative_norm"]
    first, *others = (run.table[[*_KEYS, *columns]] for run in runs)
    for i, other in enumerate(others, 1):
        first = first.merge(other, on=_KEYS, suffixes=("", f"#{i}"), how="inner", sort=False)
    names = {column: [column, *(f"{column}#{i}" for i in range(1, len(runs)))] for column in columns}
    values = {column: first[several].to_numpy(float) for column, several in names.items()}
    arm = first[_KEYS].copy()
    for column in ("relative", "excess", "delta_relative_norm"):
        arm[column] = _geometric_mean(values[column].T)
    for column in ("isotropic_q", "rounding_share"):
        arm[column] = values[column].max(1)
    with np.errstate(divide="ignore"):
        arm["log2"] = list(np.log2(values["relative"]))
    return arm


def _geometric_mean(values: np.ndarray) -> np.ndarray:
    """Over runs, the first axis: what a mean of logarithms is the logarithm of."""
    if len(values) == 1:
        return values[0]
    with np.errstate(divide="ignore"):
        return np.exp2(np.log2(values).mean(0))


def _corrected(rows: pd.DataFrame) -> np.ndarray:
    """q of `seed_p`: families (matrix, subspace) of a rank, the layers in them, the heads in these."""
    q = np.full(len(rows), np.nan)
    unit = rows["head"].fillna(rows["expert"]).fillna(0).to_numpy(int)
    layer = rows["layer"].to_numpy(int)
    for _, of_rank in rows.groupby("rank"):
        families = {key: block.index.to_numpy() for key, block in of_rank.groupby(["matrix", "subspace"], sort=False)}
        heads: dict[Any, np.ndarray] = {}
        for family, at in families.items():
            heads[family] = np.full((layer.max() + 1, unit[at].max() + 1), np.nan)
            heads[family][layer[at], unit[at]] = rows["seed_p"].to_numpy(float)[at]
        tree = hierarchy(heads, {family: np.full(len(p), np.nan) for family, p in heads.items()})
        for family, at in families.items():
            q[at] = tree.head_q[family][layer[at], unit[at]]
    return q


def _arm_replicates(runs: Runs, matrix: str, subspace: str, rank: int, rows: pd.DataFrame) -> Tensor | None:
    """Geometric means over the runs of fractions with one group left out `[group, row]`; None where there are none."""
    held = [found for run in runs if (found := _replicates(run, matrix, subspace, rank, rows)) is not None]
    if len(held) < len(runs):
        return None
    return torch.from_numpy(_geometric_mean(torch.stack(held).numpy()))


def _replicates(result: PairAnalysis, matrix: str, subspace: str, rank: int, rows: pd.DataFrame) -> Tensor | None:
    """Fractions of some heads with one group left out `[group, row]`; None where there are none."""
    held = result.arrays.get(f"replicates/{matrix}/{subspace}")
    if held is None:
        return None
    column = result.config["ranks"].index(rank)
    layer = torch.from_numpy(rows["layer"].to_numpy(int))
    unit = torch.from_numpy(rows["head"].fillna(rows["expert"]).fillna(0).to_numpy(int))
    return held[layer, :, unit, column].mT


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


def _asymmetry(name_a: str, a: Runs, name_b: str, b: Runs) -> pd.DataFrame:
    """Mean log2(read/write) of both and its difference; the interval over texts covers the read sides."""
    keys = ["layer", "head", "rank"]
    left, right = (_arm_asymmetry(runs, keys) for runs in (a, b))
    both = left.merge(right, on=keys, suffixes=("_a", "_b"), how="inner", sort=False)
    if both.empty:
        return pd.DataFrame(columns=list(ASYMMETRY_COLUMNS))
    both = both.assign(a=name_a, b=name_b, runs_a=len(a), runs_b=len(b))
    both["difference"] = both["log2_ratio_a"] - both["log2_ratio_b"]
    seeds = separation(*(np.stack(both[f"ratios_{side}"].to_list(), 1) for side in "ab"))
    low, high = np.full(len(both), np.nan), np.full(len(both), np.nan)
    for rank, rows in both.groupby("rank", sort=False):
        held = [[_read_replicates(run, int(str(rank))) for run in runs] for runs in (a, b)]
        if any(read is None for reads in held for read in reads):
            continue
        at = rows.index.to_numpy()
        layer = rows["layer"].to_numpy(int)
        head = rows["head"].fillna(-1).to_numpy(int)  # the last column is the whole layer
        logs = [torch.stack([torch.log2(read) for read in reads if read is not None]).mean(0) for reads in held]
        change = (logs[0] - logs[1])[:, layer, head]
        full = torch.tensor((rows["log2_read_a"] - rows["log2_read_b"]).tolist(), dtype=torch.float64)
        below, above = _jackknife(full, change)
        write = rows["difference"].to_numpy(float) - full.numpy()
        low[at], high[at] = below + write, above + write
    both = both.assign(ci_low=low, ci_high=high, seed_low=seeds.low, seed_high=seeds.high)
    return both[list(ASYMMETRY_COLUMNS)]


def _arm_asymmetry(runs: Runs, keys: list[str]) -> pd.DataFrame:
    """Means over the runs of log2(read/write) and of log2 read, and the former of every run."""
    first, *others = (run.asymmetry[[*keys, "read", "log2_ratio"]] for run in runs)
    for i, other in enumerate(others, 1):
        first = first.merge(other, on=keys, suffixes=("", f"#{i}"), how="inner", sort=False)
    suffixes = ["", *(f"#{i}" for i in range(1, len(runs)))]
    ratios = first[[f"log2_ratio{suffix}" for suffix in suffixes]].to_numpy(float)
    with np.errstate(divide="ignore"):
        reads = np.log2(first[[f"read{suffix}" for suffix in suffixes]].to_numpy(float))
    return first[keys].assign(log2_ratio=ratios.mean(1), log2_read=reads.mean(1), ratios=list(ratios))


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


def _overlaps(name_a: str, a: Runs, name_b: str, b: Runs, most: int) -> pd.DataFrame:
    """How far the leading residual directions of two arms' deltas span the same space, head by head."""
    frames = []
    first = a[0]
    for matrix, rows in first.table.groupby("matrix", sort=False):
        if any(f"directions/{matrix}" not in run.arrays for run in (*a, *b)):
            continue
        null = IsotropicNull(first.width(str(matrix)), seed=first.config["arguments"]["seed"])
        unit = next((axis for axis in ("head", "expert") if rows[axis].notna().any()), None)
        across = [_overlap(str(matrix), x.arrays, y.arrays, most, null, unit) for x, y in product(a, b)]
        within = [
            _overlap(str(matrix), x.arrays, y.arrays, most, null, unit)["overlap"]
            for runs in (a, b)
            for x, y in combinations(runs, 2)
        ]
        frames.append(_joined(across).assign(within=np.mean(within, 0) if within else np.nan))
    if not frames:
        return pd.DataFrame(columns=list(OVERLAP_COLUMNS))
    return pd.concat(frames, ignore_index=True).assign(a=name_a, b=name_b)[list(OVERLAP_COLUMNS)]


def _joined(pairs: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Overlaps of several pairs of runs as one: means, and the weakest evidence, so that p speaks for every pair."""
    joined = pairs[0].copy()
    for column in ("overlap", "chance", "cosine", "leading_cosine", "share_a", "share_b"):
        joined[column] = np.mean([pair[column] for pair in pairs], 0)
    weakest = np.argmax([pair["p"].fillna(-1) for pair in pairs], 0)
    for column in ("z", "p", "p_method"):
        joined[column] = np.stack([pair[column].to_numpy() for pair in pairs])[weakest, np.arange(len(joined))]
    joined["directions"] = np.min([pair["directions"] for pair in pairs], 0)
    joined["q"] = adjusted_p(joined["p"].to_numpy(float))
    return joined


def _overlap(
    matrix: str,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    most: int,
    null: IsotropicNull,
    unit: str | None,
) -> pd.DataFrame:
    U, V, λ = ([arrays[f"{name}/{matrix}"] for arrays in (a, b)] for name in ("directions", "partners", "spectrum"))
    layers, heads = λ[0].shape[:2]
    λ = [part.double() for part in λ]
    # As many as both deltas have: of ΔW ΔWᵀ in float32 a weaker direction is rounding, not the delta's.
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
    for axis in ("head", "expert"):
        numbers = np.tile(np.arange(heads), layers) if axis == unit else [pd.NA] * (layers * heads)
        frame[axis] = pd.array(numbers, dtype="Int64")
    frame["matrix"] = matrix
    frame["directions"] = n.flatten().numpy()
    frame["z"], frame["p"], frame["p_method"] = z, p, method
    return frame
