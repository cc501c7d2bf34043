"""`analyze_spectra`: a weight delta in the base weight's own frame. No texts, one matrix at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked, listed
from tl_asymmetry.geometry.nulls import adjusted_p
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.models.checks import check_shapes
from tl_asymmetry.models.configurations import strange_families
from tl_asymmetry.models.strangers import cosines_with_base, strangers, unrelated
from tl_asymmetry.models.weights import opened
from tl_asymmetry.names import kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.plan import chosen_matrices, note_left_out
from tl_asymmetry.results.provenance import described, pair_names, pair_record, shape_record, versions
from tl_asymmetry.settings import checked_hash
from tl_asymmetry.spectra.matrix import matrix_rows
from tl_asymmetry.spectra.result import SPECTRAL_COLUMNS, SpectralAnalysis

_RANKS = (1, 4, 16, 64)


@checked
@with_fresh_settings
def analyze_spectra(
    model_base: Any,
    model_aligned: Any,
    *,
    matrices: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SpectralAnalysis:
    """Where each head's weight change lies in the base weight's own singular frame, beside chance.

    For W = U S Vᵀ of the base (`y = x W`: left is the input side) and the leading k vectors of each side: the share of
    ΔW between them ("on principal"), both one-sided shares, intruder dimensions, rotation of the leading subspaces,
    and the share of stored entries that moved, each beside what a delta of the same size at a random orientation, or
    a dense one, would give (science: arXiv 2511.08567, 2606.07082, 2410.21228, 2505.11711; the chance levels are ours).
    Weights alone are read, one matrix at a time; both models may be files.

    Args:
        model_base: a HookedTransformer, TransformerBridge, transformers model, or what `weights_from` reads: a folder,
            a hub name, a state dict.
        model_aligned: the same, or an adapter of the base, whose delta stays factored.
        matrices: which; None: all that the model has.
        ranks: numbers of leading singular vectors; None: those of 1, 4, 16, 64 below the shorter axis of each matrix.
            A rank that is no proper subspace of some matrix has no row there, with a note.
        names: what to call the two models, such as `("base", "dpo")`; by default what they call themselves.
        seed: of the deltas at random orientation, and of the draws of rounding.
        progress: show a progress bar.

    Returns:
        A `SpectralAnalysis`; its `table` has one row per layer, matrix, head and rank.

    Raises:
        ValueError: models of different shapes, processed weights, weights that are not finite, unknown matrices, ranks
            that fit no matrix.

    Example:
        >>> result = analyze_spectra(base, aligned, matrices=["W_out"], ranks=[4], progress=False)
        >>> bool((result.table["on_principal"] < 0.05).all()), bool((result.table["on_principal_relative"] > 1).all())
        (True, True)
    """
    arguments = described(matrices=matrices, ranks=ranks, names=names, seed=seed, progress=progress)
    named, notes = pair_names(names), Notes()
    base = opened(model_base, None, runs=False)
    aligned = opened(model_aligned, base, runs=False)
    check_shapes(base, aligned)
    for warning in strange_families(base, aligned):
        notes.warn(warning)
    chosen = chosen_matrices(base, matrices)
    note_left_out(base, notes)
    shorter = {matrix: min(base.weight(0, matrix).shape[-2:]) for matrix in chosen}
    ranks_of = _ranks(shorter, ranks, notes)
    chosen = tuple(ranks_of)
    pair = (("base", base), ("aligned", aligned))
    hashes = {role: checked_hash(weights, f"{role} model", warn=notes.warn) for role, weights in pair}
    if hashes["base"] == hashes["aligned"]:
        notes.warn("the two models are identical, weight for weight: every share is NaN")
    for weights in (base, aligned):
        for note in weights.notes:
            notes.add(note)
    if any(kind_of(matrix).heads for matrix in chosen):
        notes.add(
            "the frame of one head's W_Q and W_K is a choice of coordinates (W_Q A, W_K A⁻ᵀ compute the same scores, "
            "and so for W_V and W_O): shares of single heads describe the weights as they are, not what they compute"
        )
    work = [(layer, matrix) for layer in range(base.n_layers) for matrix in chosen]
    rows = [
        row
        for layer, matrix in tqdm(work, desc="spectra", unit="matrix", disable=not progress)
        for row in matrix_rows(base, aligned, layer, matrix, ranks_of[matrix], seed=seed)
    ]
    table = pd.DataFrame(rows)
    turned = table.groupby("matrix", sort=False)
    unlike = unrelated(
        {str(matrix): cosines_with_base(of["delta_relative_norm"], of["shrink"]) for matrix, of in turned}
    )
    if unlike:
        notes.warn(strangers(unlike))
    config = {
        "arguments": arguments,
        "versions": versions(),
        "models": pair_record(base, aligned, hashes, named),
        "shape": shape_record(base),
        "ranks": sorted({rank for ranks in ranks_of.values() for rank in ranks}),
        "shown_rank": {matrix: _shown(ranks_of[matrix], shorter[matrix]) for matrix in chosen},
        "unrelated": unlike,
    }
    return SpectralAnalysis(table=_table(table), config=config, notes=tuple(notes.lines), arrays={})


def _ranks(shorter: Mapping[str, int], ranks: Sequence[int] | None, notes: Notes) -> dict[str, list[int]]:
    """The ranks of each matrix that are proper subspaces of both its axes.

    Raises:
        ValueError: no list of whole numbers, or none that fits.
    """
    if ranks is None:
        return {matrix: [k for k in _RANKS if k < axis] or [1] for matrix, axis in shorter.items()}
    largest = max(shorter.values()) - 1
    wanted = listed("ranks", ranks, int, instead=f"ranks from 1 to {largest}")
    if not wanted or not all(0 < k <= largest for k in wanted):
        raise ValueError(
            f"expected ranks from 1 to {largest}, got {ranks!r}; pass a list of ranks below a matrix's shorter axis"
        )
    fitting = {matrix: sorted({int(k) for k in wanted if k < axis}) for matrix, axis in shorter.items()}
    for matrix, kept in fitting.items():
        left_out = sorted({int(k) for k in wanted} - set(kept))
        if left_out:
            notes.add(
                f"{matrix} has a shorter axis of {shorter[matrix]}: no row at rank {', '.join(map(str, left_out))}"
            )
    return {matrix: kept for matrix, kept in fitting.items() if kept}


def _shown(ranks: Sequence[int], axis: int) -> int:
    """The largest rank up to a quarter of the shorter axis."""
    return max((k for k in ranks if 4 * k <= axis), default=min(ranks))


def _table(table: pd.DataFrame) -> pd.DataFrame:
    groups = table.groupby(["matrix", "rank"], sort=False)["on_principal_p"]
    table["on_principal_q"] = groups.transform(lambda p: adjusted_p(p.to_numpy()))
    integers = dict.fromkeys(("layer", "head", "expert", "rank"), "Int64")
    return table[list(SPECTRAL_COLUMNS)].astype(integers)
