"""The main job: one base model, one aligned model, one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from tl_asymmetry.asymmetry import asymmetry_table
from tl_asymmetry.bases import LayerBases
from tl_asymmetry.circuits import layer_circuits
from tl_asymmetry.deltas import Delta, measure_delta, stacked
from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.headless import other_changes, unmatched_parameters
from tl_asymmetry.models.capture import balanced_groups, capture
from tl_asymmetry.models.checks import check_finite, check_pair, check_raw, check_token_count
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.view import WRITE, ModelView
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair_result import PairAnalysis
from tl_asymmetry.plan import Plan, Sources, make_plan, token_sequences
from tl_asymmetry.projections import GradientMoments, Projection, project
from tl_asymmetry.provenance import described_arguments, model_record, shape_record, versions, weights_hash
from tl_asymmetry.sensitivity import SensitivityProfiles
from tl_asymmetry.side_by_side import side_by_side
from tl_asymmetry.tables import pair_table

_SELF_CHECK_TOKENS = 16


def analyze_pair(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    matrices: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None,
    exclude_first: bool = True,
    centered: bool = False,
    batch_size: int = 8,
    max_tokens: int | None = None,
    groups: int = 8,
    activations: str = "base",
    gradient: GradientMoments | None = None,
    sensitivity: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> PairAnalysis:
    """Which heads' weights changed along which directions of the residual stream, and is that more than chance.

    For every head (and MLP) matrix: the share of ΔW = W_aligned − W_base that lies in the leading k directions of a
    subspace, relative to k/d, beside two nulls (a Haar-random subspace; the variance of the matrix's own input), a
    delete-one-group interval and the share that rounding explains. The question is that of arXiv 2605.16600 ("Where
    pretraining writes and alignment reads"); the definitions are ours, since the paper's are not public.

    Both models come back exactly as they were; activations are taken in evaluation mode.

    Args:
        model_base: a HookedTransformer or TransformerBridge with raw weights (`from_pretrained_no_processing`).
        model_aligned: the same, or a local Hugging Face directory or hub name.
        texts: strings, or lists of chat messages, read with the base's tokenizer and cut into windows; without texts
            and tokens the package's calibration texts are used and the result says so.
        tokens: token ids instead of texts, `[batch, pos]` or sequences of different lengths; every one counts, so no
            padding.
        matrices: default all the model has of W_Q, W_K, W_V, W_O, W_in, W_gate, W_out.
        ranks: default the distinct values of 1, 4, 16, 64, d//16, d//4 below d.
        subspaces: names out of attn_in, mlp_in, resid_pre, resid_mid, resid_post, prediction, or a mapping from names
            to a `Subspace` (or one for each layer); every matrix is then held against each. Default: a read matrix
            against its own input, a write matrix against the stream it writes into, all against "prediction".
        exclude_first: leave the first position of each sequence out, whose attention-sink activations would dominate.
        centered: principal directions of the covariance instead of the uncentred second moment.
        batch_size: sequences per forward pass.
        max_tokens: use no more tokens than this.
        groups: groups of sequences for the jackknife; 1 switches intervals off (less memory, less time).
        activations: whose activations define the subspaces: "base", "aligned" or "both".
        gradient: output-gradient second moments for the matched reference of W_O and W_out: a `GradientCovariance` of
            the base (with its `permutations`, also for the permutation range of read matrices), or any object with
            `gradient_moment(layer, matrix, head)`.
        sensitivity: also keep moments and projections under the other choices of subspace, for `.sensitivity()`.
        seed: of the null's draws and of the rounding calibration.
        progress: show progress bars.

    Returns:
        A frozen `PairAnalysis`.

    Raises:
        ValueError: models that cannot be compared, processed or non-finite weights, texts or tokens that cannot be
            read, ranks out of range: before anything heavy runs, saying what to pass instead.

    Example:
        >>> from tl_asymmetry.demo import demo_pair, demo_texts
        >>> result = analyze_pair(*demo_pair(), demo_texts(20, seed=1), ranks=[1, 4], progress=False)
        >>> row = result.table.query("matrix == 'W_Q' and subspace == 'attn_in' and rank == 4").iloc[0]
        >>> bool(0 < row.fraction < 1)
        True
    """
    arguments = described_arguments(locals())
    base, notes = ModelView(model_base), Notes()
    if gradient is not None and not isinstance(gradient, GradientMoments):
        raise ValueError(
            f"expected gradient with a method gradient_moment(layer, matrix, head), got {type(gradient).__name__}; "
            "pass a gradient covariance"
        )
    plan = make_plan(base, matrices, ranks, subspaces, groups=groups, activations=activations, batch_size=batch_size)
    sequences = token_sequences(base, texts, tokens, max_tokens, notes=notes.add)
    check_token_count(sum(len(s) - exclude_first for s in sequences), plan.ranks)
    if isinstance(model_aligned, str | Path):
        model_aligned = open_model(model_aligned, device=base.device)
    aligned = ModelView(model_aligned)
    for name, held in plan.given.items():
        if held[0].rank < max(plan.ranks):
            notes.warn(f"ranks above {held[0].rank} are left out for {name!r}, which has no more directions", level=3)
    hashes = _check_models(base, aligned, sequences, notes)
    _check_gradient(gradient, base, hashes, plan, notes)

    with torch.no_grad():
        sources = _captured(
            base, aligned, sequences, plan, notes,
            activations=activations, exclude_first=exclude_first, sensitivity=sensitivity,
            groups=groups, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        given = {"prediction": [prediction_subspace(base)] * base.n_layers, **plan.given}
        profiles = SensitivityProfiles(base, aligned, sources) if sensitivity else None

    moments = sources.groups

    def analyse(layer: int) -> _Layer:
        bases = LayerBases(layer, moments, given, centered=centered, exact=base.dtype == torch.float64)
        weights = {matrix: base.weight(layer, matrix) for matrix in plan.matrices}
        measured = {
            matrix: measure_delta(matrix, weight, aligned.weight(layer, matrix), seed=seed)
            for matrix, weight in weights.items()
        }
        projections = [
            projection
            for name in plan.subspaces
            for projection in project(
                [measured[matrix] for matrix in plan.matrices if name in plan.targets[matrix]], name, bases, plan.ranks,
                intervals=sources.intervals, softmax_centres_keys=base.score_shift_invariant, gradient=gradient,
            )
        ]  # fmt: skip
        return _Layer(
            deltas={matrix: delta.numbers for matrix, delta in measured.items()},
            projections={(projection.matrix, projection.subspace): projection for projection in projections},
            circuits=layer_circuits(layer, weights, measured, bases, plan.ranks),
            variants={} if profiles is None else profiles.of_layer(layer, measured, plan),
        )

    layers = side_by_side(analyse, base.n_layers, device=base.device, description="layers", progress=progress)
    deltas = {matrix: [layer.deltas[matrix] for layer in layers] for matrix in plan.matrices}
    projections = {key: [layer.projections[key] for layer in layers] for key in layers[0].projections}
    same = [matrix for matrix, changes in deltas.items() if bool((stacked(changes, "energy") == 0).all())]
    if same and hashes["base"] != hashes["aligned"]:
        if len(same) == len(deltas):
            notes.warn(
                "the analysed matrices are the same in both models: every delta is zero and every fraction NaN", level=3
            )
        else:
            notes.add(f"{', '.join(same)} are the same in both models: their rows are NaN")
    return PairAnalysis.assemble(
        table=pair_table(
            deltas, projections, plan.ranks,
            d=base.d_model, headed={m: base.heads(m) is not None for m in plan.matrices}, seed=seed,
        ),
        asymmetry=asymmetry_table(deltas, projections, plan.ranks, d=base.d_model, n_heads=base.n_heads),
        other_changes=other_changes(base, aligned),
        circuits=[layer.circuits for layer in layers],
        deltas=deltas,
        projections=projections,
        variants={} if profiles is None else profiles.arrays([layer.variants for layer in layers]),
        sequences=sequences,
        config={
            "arguments": arguments,
            "versions": versions(),
            "models": {
                "base": model_record(base, hashes["base"]),
                "aligned": model_record(aligned, hashes["aligned"]),
            },
            "shape": shape_record(base),
            **plan.described(),
            "tokens": sources.tokens,
            "sequences": len(sequences),
        },
        notes=notes.lines,
        model_base=model_base,
    )  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """What one layer contributes."""

    deltas: dict[str, Delta]
    projections: dict[tuple[str, str], Projection]
    circuits: pd.DataFrame
    variants: dict[str, Tensor]


def _check_models(base: ModelView, aligned: ModelView, sequences: Sequence[Tensor], notes: Notes) -> dict[str, str]:
    """Refuse what cannot be compared, note what the reader must know, and return both hashes."""
    for warning in check_pair(base, aligned):
        notes.warn(warning)
    for view, role in ((base, "base model"), (aligned, "aligned model")):
        check_finite(view, role)
        for warning in check_raw(view):
            notes.warn(warning)
    for note in base.notes:
        notes.add(note)
    for name in unmatched_parameters(base, aligned):
        notes.add(f"{name} exists in one of the two models only and is left out")
    if base.score_shift_invariant:
        notes.add(
            "activation_matched on W_K rows uses the input's covariance within sequences: softmax ignores what all "
            "keys of a sequence share"
        )
    else:
        notes.add(
            "activation_matched on W_K rows uses the uncentred input: with rotary positions, a query-key norm or a "
            "soft cap, softmax removes what all keys share only in part, so there the reference is an approximation"
        )
    for view in (base, aligned):
        view.self_check(sequences[0][:_SELF_CHECK_TOKENS].unsqueeze(0))
    hashes = {"base": weights_hash(base), "aligned": weights_hash(aligned)}
    if hashes["base"] == hashes["aligned"]:
        notes.warn("the two models are identical, weight for weight: every delta is zero and every fraction NaN")
    return hashes


def _check_gradient(
    gradient: GradientMoments | None, base: ModelView, hashes: Mapping[str, str], plan: Plan, notes: Notes
) -> None:
    """Refuse gradients of a model of another shape; say where they are of other weights than the base's."""
    config = getattr(gradient, "config", None)
    if not isinstance(config, Mapping) or not {"model", "shape", "matrices"} <= set(config):
        return  # a user's own moments
    ours, theirs = shape_record(base), config["shape"]
    if ours != theirs:
        different = next(name for name in ours if ours[name] != theirs.get(name))
        raise ValueError(
            f"expected gradients of a model like the base, got {different} {theirs.get(different)} "
            f"({config['model']['name']!r}) against {ours[different]} ({base.name!r}); pass "
            "gradient_covariance(base, ...)"
        )
    missing = [matrix for matrix in plan.matrices if matrix in WRITE and matrix not in config["matrices"]]
    if missing:
        raise ValueError(
            f"expected gradients of {', '.join(missing)}, got only {', '.join(config['matrices'])}; pass "
            "gradient_covariance(..., matrices=None), or matrices without these"
        )
    name, weights = config["model"]["name"], config["model"]["weights_xxh3"]
    if weights == hashes["aligned"] != hashes["base"]:
        notes.add("the gradients were measured at the aligned model, not at the base")
    elif weights != hashes["base"]:
        notes.warn(
            f"the gradients were measured on other weights ({name!r}) than those compared here: their references "
            "describe that model",
            level=4,
        )


def _captured(
    base: ModelView,
    aligned: ModelView,
    sequences: Sequence[Tensor],
    plan: Plan,
    notes: Notes,
    *,
    activations: str,
    exclude_first: bool,
    sensitivity: bool,
    groups: int,
    batch_size: int,
    progress: bool,
) -> Sources:
    """Run the texts through the model(s) whose activations are asked for."""
    grouped = balanced_groups(sequences, groups)
    intervals = groups > 1 and len(grouped) >= MINIMUM_GROUPS
    if groups > 1 and not intervals:
        notes.warn(
            f"intervals need at least {MINIMUM_GROUPS} groups of sequences, got {len(grouped)}: ci_low and ci_high are "
            "NaN; pass more sequences or groups=8"
        )
    wanted = ("base", "aligned") if sensitivity or activations == "both" else (activations,)
    views = {"base": base, "aligned": aligned}
    captures = {
        name: capture(
            views[name], grouped, [(point, layer) for point in plan.points for layer in range(base.n_layers)],
            exclude_first=exclude_first, first_positions=sensitivity,
            sequence_means=base.score_shift_invariant, batch_size=batch_size, progress=progress,
        )
        for name in wanted
    }  # fmt: skip
    return Sources(captures, activations, exclude_first=exclude_first, intervals=intervals)
