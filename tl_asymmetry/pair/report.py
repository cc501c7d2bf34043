"""The report of a pair: summary, figures, tables, methods."""

from __future__ import annotations

from tl_asymmetry._lazy import pd
from tl_asymmetry.pair.data import PairData
from tl_asymmetry.pair.summary import summary_table
from tl_asymmetry.results.report import FigureSection, Report, TableSection
from tl_asymmetry.results.top import at_rank

_SHOWN = (
    "layer", "head", "expert", "matrix", "subspace", "rank", "relative", "ci_low", "ci_high", "isotropic_q", "excess",
    "excess_low", "excess_high", "excess_q", "verdict", "delta_relative_norm", "rounding_share", "flags",
)  # fmt: skip
"""Columns of the table that stand on the page."""


def pair_report(result: PairData) -> Report:
    """Fill a `Report` from an analysis."""
    shape = result.config["shape"]
    return result._page(
        subtitle=(
            f"{shape['n_layers']} layers × {shape['n_heads']} heads, d_model {shape['d_model']}, "
            f"{result.config['tokens']} tokens"
        ),
        figures=_figures(result),
        tables=[
            TableSection("Medians by matrix", summary_table(result), "Over layers and heads.", "summary"),
            TableSection(
                "All rows",
                _ordered(result),
                "One row per layer, head, matrix, subspace and rank; those at rank "
                f"{result.config['shown_rank']} first, largest excess first.",
                "table",
                [name for name in _SHOWN if result.table[name].notna().any()],
            ),
            TableSection("Asymmetry", result.asymmetry, "Read against write; head empty = whole layer.", "asymmetry"),
            TableSection("Circuits", result.circuits, "Products that no choice of gauge changes.", "circuits"),
            TableSection("Other changes", result.other_changes, "Biases, gains, embeddings.", "other_changes"),
        ],
        methods=_methods(result),
    )


def _ordered(result: PairData) -> pd.DataFrame:
    """The rows in the order in which they are looked for."""
    shown = result.table.index.isin(at_rank(result.table, result.config["shown_rank"]).index)
    ordered = result.table.assign(_shown=shown).sort_values(
        ["_shown", "excess", "relative"], ascending=False, kind="stable", ignore_index=True
    )
    return ordered.drop(columns="_shown")


def _figures(result: PairData) -> list[FigureSection]:
    matrices = list(dict.fromkeys(result.table["matrix"]))
    figures: list[FigureSection] = []
    if result.table["fraction"].notna().any():
        figures.append(FigureSection("What the tests say", result.plot_heads(value="verdict", side_by_side=2)))
        figures.append(
            FigureSection(
                "Where each head changed", result.plot_heads(), "Hover a cell for its interval and every null."
            )
        )
        figures.append(FigureSection("Layer by layer", result.plot_layers()))
        curves = {f"{matrix}, layer {layer}": result.plot_rank_curve(matrix, layer)
                  for matrix in matrices for layer in _some_layers(result, matrix)}  # fmt: skip
        figures.append(FigureSection("Does the choice of rank matter?", curves))
        if len(result.asymmetry):
            figures.append(FigureSection("Read against write", result.plot_asymmetry()))
        if any(name.startswith("sensitivity/") for name in result.arrays):
            figures.append(FigureSection("Does the choice of subspace matter?", result.plot_sensitivity()))
    spectra = {name: result.plot_spectrum(name) for name in _spectra(result)}
    if spectra:
        figures.append(FigureSection("Spectra of the subspaces", spectra))
    return figures


def _some_layers(result: PairData, matrix: str) -> list[int]:
    """First, middle and last layer of those that have a matrix."""
    layers = sorted(int(layer) for layer in result.table.loc[result.table["matrix"] == matrix, "layer"].unique())
    return sorted({layers[0], layers[(len(layers) - 1) // 2], layers[-1]})


def _spectra(result: PairData) -> list[str]:
    names = (name.removeprefix("eigenvalues/") for name in result.arrays if name.startswith("eigenvalues/"))
    return [name for name in names if bool((result.arrays[f"eigenvalues/{name}"] > 0).any())]


def _methods(result: PairData) -> list[tuple[str, str]]:
    arguments = result.config["arguments"]
    return [
        ("Subspaces", "; ".join(f"{m}: {', '.join(names)}" for m, names in result.config["subspaces"].items())),
        ("Activations", f"of the {arguments['activations']} model, first position of each sequence "
         f"{'left out' if arguments['exclude_first'] else 'kept'}, "
         f"{'covariance' if arguments['centered'] else 'uncentred second moment'}"),
        ("Intervals", f"delete-one-group jackknife over at most {arguments['groups']} groups of sequences, on the log"),
        ("Null", f"Haar-random subspaces, seed {arguments['seed']}; q is corrected over families (a matrix, subspace "
         "and rank), the layers of those found and the heads of these"),
    ]  # fmt: skip
