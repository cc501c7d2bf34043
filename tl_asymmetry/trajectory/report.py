"""A trajectory in words, and its report."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from tl_asymmetry._lazy import pd
from tl_asymmetry.models.strangers import cosines_with_base, strangers, unrelated
from tl_asymmetry.names import FOUND, SIGNIFICANT, kind_of
from tl_asymmetry.pair.summary import tested_count, told
from tl_asymmetry.results.nulls import NULLS
from tl_asymmetry.results.report import DEFINITIONS, Definition, FigureSection, Report, TableSection
from tl_asymmetry.trajectory.data import TrajectoryData

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST_ROWS = 16
_PLACE = ["layer", "head", "matrix", "subspace"]

TRAJECTORY_DEFINITIONS = (
    Definition(
        "Cumulative and interval delta (reference)", "[choice]",
        "W_t minus W of the first checkpoint (\"first\"), or minus W of the checkpoint before (\"previous\"). The "
        "subspaces come from the first checkpoint, from each checkpoint, or from one fixed model: see the settings.",
    ),
    Definition(
        "Pooled curve", "[ours]",
        "All layers and heads of a matrix together, weighted by their energy: the sum of the squared norms inside the "
        "subspaces over the sum of the squared norms, divided by k/d. The interval leaves out one group of texts at a "
        "time.",
    ),
    Definition(
        "Emergence", "[ours]",
        "The first checkpoint from which a head's q against the isotropic null stays at or below the level to the end. "
        "q is adjusted over heads within a checkpoint, not over checkpoints. Activations alone concentrate any "
        "gradient: emergence against the isotropic null says since when a head differs from a random subspace, not "
        "why.",
    ),
)  # fmt: skip
"""What the words of a trajectory mean, besides those of a pair."""


def summary_table(result: TrajectoryData) -> pd.DataFrame:
    """One row per checkpoint and reference at the shown rank: pooled read and write, and how many heads beat chance."""
    k = result.config["shown_rank"]
    curves = result.curves[result.curves["rank"] == k]
    own = _own(result.table[result.table["rank"] == k])
    sides = _sides(curves)
    rows = []
    for step in _some(result.steps):
        for reference in result.config["references"]:
            here = curves[(curves["step"] == step) & (curves["reference"] == reference)]
            heads = own[(own["step"] == step) & (own["reference"] == reference)]
            row = {"step": step, "delta from": reference}
            for side, (matrix, subspace) in sides.items():
                found = here[(here["matrix"] == matrix) & (here["subspace"] == subspace)]
                if len(found):
                    row |= _numbers(side, found.iloc[0])
            for pathway in ("read", "write"):
                block = heads[heads["pathway"] == pathway]
                if len(block):
                    row[f"{pathway} {FOUND}"] = f"{int((block['isotropic_q'] <= SIGNIFICANT).sum())}/{len(block)}"
            rows.append(row)
    return pd.DataFrame(rows)


def elsewhere(table: pd.DataFrame) -> Iterator[str]:
    """Which weights point elsewhere than the checkpoint's that they are held against, and since when."""
    for reference, rows in table.groupby("reference", sort=False):
        found = {}
        for block in (of for _, of in rows[rows["delta_norm"] > 0].groupby("step")):
            turned = {
                str(matrix): cosines_with_base(of["delta_relative_norm"], of["delta_shrink"])
                for matrix, of in block.groupby("matrix", sort=False)
            }
            if unlike := unrelated(turned):
                found[int(block["step"].iloc[0])] = unlike
        if found:
            matrices = dict.fromkeys(matrix for unlike in found.values() for matrix in unlike)
            when = f" at step {min(found)}{' or later' if len(found) > 1 else ''}"
            than = "the first checkpoint's" if reference == "first" else "the checkpoint's before"
            yield strangers(list(matrices), of=when, than=than)


def headline(result: TrajectoryData) -> list[str]:
    """Sentences on what the tables show, at the shown rank."""
    k, last = result.config["shown_rank"], result.steps[-1]
    reference = result.config["references"][0]
    curves = result.curves[(result.curves["rank"] == k) & (result.curves["reference"] == reference)]
    if result.table["fraction"].isna().all():
        return ["No matrix differs between the checkpoints: nothing to be located."]
    change = "since the first checkpoint" if reference == "first" else "since the checkpoint before"
    sentences = list(elsewhere(result.table))
    for side, (matrix, subspace) in _sides(curves).items():
        run = curves[(curves["matrix"] == matrix) & (curves["subspace"] == subspace)].sort_values("step")
        if not len(run) or run["relative"].isna().all():
            continue
        end = run.iloc[-1]
        begin = f"{run['relative'].iloc[0]:.2f} at step {int(run['step'].iloc[0])} and " if len(run) > 1 else ""
        interval = ""
        if not np.isnan(end["ci_low"]):
            interval = f" (95 % interval over texts {end['ci_low']:.2f} to {end['ci_high']:.2f})"
        matched = end["activation_matched"] if side == "read" else end["gradient_matched"]
        chance = "its matched reference is unknown without gradients"
        if not np.isnan(matched):
            whose = {"base": "the first checkpoint's", "each": "its own"}.get(
                str(result.config["subspaces_from"]), "that model's"
            )
            chance = f"{whose} inputs alone" if side == "read" else "its own gradients alone"
            chance = f"{chance} would give {matched:.2f}"
        sentences.append(
            f"{'Reading' if side == 'read' else 'Writing'} ({matrix} in {subspace}, rank {k}): the change {change} has "
            f"a pooled relative fraction of {begin}{end['relative']:.2f} at step {last}{interval}; {chance} "
            "(1 = isotropic). No test stands behind these numbers."
        )
    shown = _own(result.table[(result.table["rank"] == k) & (result.table["reference"] == reference)])
    ending = shown[(shown["step"] == last) & (shown["pathway"] == "read")]
    if (ending["vs_reference"] != "").any():
        sentences.append(
            f"At step {last}, held against what training gives on these inputs by chance "
            f"({NULLS[result.config['optimizer']].label}; {tested_count(ending['vs_reference'])}): "
            f"{told(ending['vs_reference'], 'that', below=not ending['flags'].str.contains('few_tokens').any())}."
        )
    tested = shown[shown["isotropic_q"].notna()].drop_duplicates(_PLACE)[_PLACE]
    since = _own(result.emergence())
    since = since[(since["rank"] == k) & (since["reference"] == reference)].merge(tested, on=_PLACE)
    for pathway in ("read", "write"):
        block = since[since["pathway"] == pathway]
        if len(block):
            there = np.sort(block["step"].dropna().to_numpy(int))
            when = f", half of them by step {there[(len(there) - 1) // 2]}" if len(there) else ""
            sentences.append(
                f"{len(there)} of {len(block)} {pathway} heads and matrices are more concentrated than a random "
                f"subspace ({FOUND}) from some checkpoint to the last one{when}; q is corrected within each "
                "checkpoint, not over them."
            )
    return sentences


def trajectory_report(result: TrajectoryData) -> Report:
    """Fill a `Report` from a trajectory."""
    arguments, config = result.config["arguments"], result.config
    source = config["subspaces_from"]
    return result._page(
        figures=_figures(result),
        tables=[
            TableSection("Summary", summary_table(result), "Heads pooled by energy.", "summary"),
            TableSection("Emergence", result.emergence(), f"Since which step {FOUND}.", "emergence"),
            TableSection("Curves", result.curves, "Layers and heads pooled by energy.", "curves"),
            TableSection("All rows", result.table, "One row per step, reference, layer, head, matrix, subspace, rank.",
                         "table"),
            TableSection("Asymmetry", result.asymmetry, "Read against write; head empty = whole layer.", "asymmetry"),
            TableSection("Checkpoints", result.checkpoints, "Which weights were measured.", "checkpoints"),
        ],
        methods=[
            ("Subspaces", f"from {source if isinstance(source, str) else 'one fixed model'}; "
             + "; ".join(f"{m}: {', '.join(names)}" for m, names in config["targets"].items())),
            ("Activations", f"first position of each sequence {'left out' if config['exclude_first'] else 'kept'}, "
             f"{'covariance' if config['centered'] else 'uncentred second moment'}"),
            ("Intervals", f"delete-one-group jackknife, at most {config['groups']} groups of sequences, on the log"),
            ("Null", f"Haar-random subspaces, seed {config['seed']}; q by Benjamini–Hochberg over the layers and heads "
             "of one matrix, subspace and rank, at each checkpoint by itself"),
            ("Gradients", "none" if config["gradient"] is None else f"from {arguments['gradient']}"),
        ],
        definitions=(*DEFINITIONS, *TRAJECTORY_DEFINITIONS),
    )  # fmt: skip


def _figures(result: TrajectoryData) -> list[FigureSection]:
    if result.table["fraction"].isna().all():
        return []
    references = result.config["references"]
    headed = list(dict.fromkeys(result.table.loc[result.table["head"].notna(), "matrix"]))
    every = list(dict.fromkeys(result.table["matrix"]))

    def each(make: str, names: list[str], **options: object) -> dict[str, go.Figure]:
        return {
            f"{name}, from {reference}" if len(references) > 1 else name: getattr(result, make)(
                name, reference=reference, **options
            )
            for name in names
            for reference in references
        }

    curves = {
        f"from {reference}": result.plot_curves(reference=reference) for reference in references
    }  # fmt: skip
    layers = range(result.config["shape"]["n_layers"])
    some = sorted({0, len(layers) // 2, len(layers) - 1})
    heads = {
        f"{matrix}, layer {layer}": result.plot_head_curves(matrix, layer) for matrix in headed[:2] for layer in some
    }
    sections = [
        FigureSection("Read and write over training", curves, "Hover a point for its interval and references."),
        FigureSection("The heads in motion", each("plot_animation", every), "Play, or drag the slider of steps."),
        FigureSection("When heads emerged", each("plot_emergence", every)),
    ]
    if heads:
        sections.append(FigureSection("Head by head", heads))
    return sections


def _numbers(side: str, row: pd.Series) -> dict[str, float]:
    matched = "activation_matched" if side == "read" else "gradient_matched"
    numbers = {side: row["relative"]}
    if not np.isnan(row["ci_low"]):
        numbers |= {f"{side} low": row["ci_low"], f"{side} high": row["ci_high"]}
    if not np.isnan(row[matched]):
        numbers[f"{side} matched"] = row[matched]
    return numbers | {f"{side} |ΔW|/|W|": row["delta_relative_norm"]}


def _sides(curves: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """The pooled curve that stands for each pathway: its largest pool against the input, or the prediction space."""
    sides = {}
    for pathway, candidates in (
        ("read", (("W_Q+W_K", "attn_in"), ("W_Q", "attn_in"), ("W_K", "attn_in"), ("W_in", "mlp_in"))),
        ("write", (("W_O+W_out", "prediction"), ("W_O", "prediction"), ("W_out", "prediction"))),
    ):
        there = set(zip(curves["matrix"], curves["subspace"], strict=True))
        block = curves[curves["pathway"] == pathway]
        others = list(zip(block["matrix"], block["subspace"], strict=True))
        chosen = [pair for pair in (*candidates, *others) if pair in there]
        if chosen:
            sides[pathway] = chosen[0]
    return sides


def _own(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of reads against their own input and of writes against the prediction subspace; all, if there are none."""
    own = table[
        (
            (table["pathway"] == "read")
            & (table["subspace"] == table["matrix"].map(lambda matrix: kind_of(matrix).point))
        )
        | ((table["pathway"] == "write") & (table["subspace"] == "prediction"))
    ]
    return own if len(own) else table


def _some(steps: list[int]) -> list[int]:
    if len(steps) <= _MOST_ROWS:
        return steps
    return [steps[i] for i in np.linspace(0, len(steps) - 1, _MOST_ROWS).round().astype(int)]
