"""The gradient side, measured: what directs a weight update, its inputs or what comes back from the loss?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.gradients.capture import Measured, capture_gradients, measured_at, rows_of
from tl_asymmetry.gradients.result import GradientCovariance
from tl_asymmetry.gradients.table import cross_table, gradient_table, layer_sides
from tl_asymmetry.models.backward import Outer, check_differentiable
from tl_asymmetry.models.capture import copies_noted
from tl_asymmetry.models.checks import check_finite, check_predicts_its_tokens, check_unedited
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.side_by_side import side_by_side
from tl_asymmetry.models.texts import check_tokens
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import canonical, kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.plan import chosen_matrices
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions, weights_hash
from tl_asymmetry.training.batches import Batch, PreferenceBatch
from tl_asymmetry.training.data import as_batches
from tl_asymmetry.training.objectives import (
    DPO,
    ORPO,
    CrossEntropy,
    Objective,
    class_described,
    is_objective,
    objective_name,
)

_SELF_CHECK_TOKENS = 16
_HEAD_WEIGHTS = 256e6
"""Bytes of weights of every head's own that are kept without being asked for."""


@checked
@with_fresh_settings
def gradient_covariance(
    model: Any,
    objective: Objective[Any],
    batches: Any,
    *,
    matrices: Sequence[str] | None = None,
    halves: bool = False,
    full_mlp: bool = False,
    permutations: int = 0,
    head_weights: bool | None = None,
    groups: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> GradientCovariance:
    """Second moments of both sides of every weight gradient, under any objective, in one pass over the data.

    The gradient of a matrix is a sum of outer products over tokens, `∂L/∂W = Σ_t a_t δ_tᵀ`, of its input a and the
    upstream gradient δ = ∂L/∂(a W + b). Each batch is run forward and backward once; a and δ become second moments
    inside the hooks and are gone. The model's parameters are frozen meanwhile; no gradient of theirs is made or
    touched. Memory is set by the model: d × d moments of both sides for each of `groups` groups of sequences, on the
    CPU; and `permutations` times the size of the read matrices where those are asked for.

    The question is that of arXiv 2605.16600 (deltas inherit direction from whichever side has a concentrated
    covariance); the definitions are ours, since the paper's are not public.

    Args:
        model: a HookedTransformer, TransformerBridge or transformers model, or its folder or name on the Hub; comes
            back as it was. Taken in evaluation mode.
        objective: what is differentiated: `CrossEntropy`, `DPO`, `ORPO`, `InfoNCE`, `Mix`, or any `Objective`. The loss
            is summed over its terms (tokens, pairs, sequences), so the result does not depend on how the data are
            batched, unless the objective's own value does (`objective.additive`).
        batches: `TokenBatch` or `PreferenceBatch` objects, or texts, chats, or rows of a dataset with trl's columns:
            see `training.data.as_batches`.
        matrices: default all whose product the model shows, layer by layer; of experts the moments are those of all of
            a layer's together, and `gradients` has a row for each.
        halves: keep the moments of an objective's passes (chosen and rejected) apart as well.
        full_mlp: also keep the whole moments on d_mlp, of δ of W_in and W_gate and of W_out's input, and on any other
            inner axis. Otherwise such an axis has its trace, estimates of its norm and leading eigenvalues from a
            sketch, and no interval.
        permutations: draws of the read matrices' gradients with δ permuted over the tokens of each sequence, for the
            range of fractions that `analyze_pair` then shows; 199 or more for a 95 % range.
        head_weights: also weigh the inputs of W_Q, W_K and W_V by every head's own gradients, which makes the reference
            of each head in `analyze_pair` its own: d × d numbers for each head of these in each layer, and as many
            products a token. False: by those of all heads of a matrix together. None: True where this takes no more
            than 256 MB.
        groups: groups of sequences for the jackknife; 1 switches intervals off (less memory, less time).
        batch_size: rows of a batch, where batches are made here.
        seed: of the permutations and the sketch.
        progress: show progress bars.

    Returns:
        A frozen `GradientCovariance`.

    Raises:
        ValueError: no objective, data that do not fit it, inference mode, a loss or gradient that is not finite (naming
            the batch).

    Example:
        >>> from tl_asymmetry.demo import demo_preferences
        >>> from tl_asymmetry.training.objectives import DPO
        >>> covariance = gradient_covariance(model, DPO(model), demo_preferences(8), matrices=["W_O"], progress=False)
        >>> tuple(covariance.gradient_moment(0, "W_O").shape)
        (64, 64)
        >>> bool(covariance.table.query("side == 'gradient' and layer == 0").effective_rank.iloc[0] > 1)
        True
    """
    arguments = described(
        objective=objective, matrices=matrices, halves=halves, full_mlp=full_mlp, permutations=permutations,
        head_weights=head_weights, groups=groups, batch_size=batch_size, seed=seed, progress=progress,
    )  # fmt: skip
    view, notes = ModelView(model), Notes()
    if not is_objective(objective):
        raise ValueError(
            f"expected an objective, got {class_described(objective)}; pass CrossEntropy(), DPO(reference), ORPO(), "
            "InfoNCE(), Mix(...) or an object with the methods of Objective"
        )
    if groups < 1:
        raise ValueError(f"expected groups >= 1, got {groups}; pass groups=1 for no intervals, 8 by default")
    if permutations < 0:
        raise ValueError(f"expected permutations >= 0, got {permutations}; pass 199 or more for a 95 % range, or 0")
    if halves and len(set(objective.passes)) < 2:
        raise ValueError(
            f"expected an objective with two kinds of passes to tell apart, got {objective_name(objective)}; leave out "
            "halves=True"
        )
    check_differentiable(view)
    if isinstance(objective, CrossEntropy | DPO | ORPO):
        check_predicts_its_tokens(view)
    chosen = chosen_matrices(view, matrices, canonical((*view.matrices, *view.irregular)))
    measured = _measured(view, chosen, notes, asked=matrices is not None)
    chosen = canonical([matrix for _, matrix in measured])
    held = as_batches(view, batches, objective.batch_type, batch_size=batch_size, note=notes.add, warn=notes.warn)
    for batch in held:
        for tokens in _tokens(batch):
            check_tokens(view, tokens)
    rows = sum(map(len, held))
    if groups > 1 and (note := copies_noted(rows_of(held))):
        notes.warn(note)
    intervals = min(groups, rows) >= MINIMUM_GROUPS
    if groups > 1 and not intervals:
        notes.warn(
            f"intervals need at least {MINIMUM_GROUPS} sequences and groups, got {rows} sequences: they are NaN; pass "
            "more data"
        )
    check_finite(view)
    for warning in check_unedited(view):
        notes.warn(warning)
    _describe(view, objective, notes, full_mlp=full_mlp, matrices=chosen)
    with torch.no_grad():
        view.self_check(_tokens(held[0])[0][:1, :_SELF_CHECK_TOKENS])

    if head_weights is None:
        size = _head_weights_size(view, measured)
        head_weights = size <= _HEAD_WEIGHTS
        if not head_weights:
            notes.add(
                "inputs are weighted by the gradients of all heads of a matrix together; head_weights=True weighs them "
                f"by each head's own and takes {size / 1e9:.1f} GB"
            )
    captured = capture_gradients(
        view, objective, held, measured,
        groups=groups, halves=halves, full_mlp=full_mlp, permutations=permutations, head_weights=head_weights,
        seed=seed, progress=progress,
    )  # fmt: skip
    prediction = prediction_subspace(view).basis if view.has_unembedding else None
    exact = view.dtype == torch.float64
    layers = side_by_side(
        lambda layer: layer_sides(captured, layer, measured, prediction, exact=exact),
        view.n_layers, device=view.device, description="spectra", progress=progress,
    )  # fmt: skip
    unreached = sorted({matrix for sides in layers for (_, side, matrix), s in sides.items()
                        if side == "gradient" and s.tokens == 0})  # fmt: skip
    if unreached:
        notes.add(f"no gradient reaches {', '.join(unreached)} in some layers: their rows are NaN there")
    return GradientCovariance.assemble(
        table=gradient_table(layers, measured),
        gradients=cross_table(captured, layers, measured),
        layers=layers,
        captured=captured,
        config={
            "arguments": arguments,
            "versions": versions(),
            "model": model_record(view, weights_hash(view)),
            "shape": shape_record(view),
            "objective": objective_name(objective),
            "matrices": list(chosen),
            "experts": sorted([layer, matrix] for (layer, matrix), how in measured.items() if how.experts is not None),
            "batches": len(held),
            "sequences": rows,
            "tokens": sum(int(batch.lengths.sum()) for batch in held),
            "terms": captured.terms,
            "loss": _mean_loss(objective, held, captured.losses),
            "data_xxh3": data_fingerprint(held),
        },
        notes=notes.lines,
    )


def _measured(view: ModelView, chosen: Sequence[str], notes: Notes, *, asked: bool) -> dict[Outer, Measured]:
    """Where a product of the chosen matrices can be seen, layer by layer.

    Raises:
        ValueError: a matrix that was asked for, of which the model shows no product; none at all.
    """
    found: dict[Outer, Measured] = {}
    hidden: dict[str, None] = {}
    for layer in range(view.n_layers):
        for matrix in chosen:
            if not view.has(layer, matrix):
                continue
            of_experts = view.unit(layer, matrix) == "expert"
            given = None if of_experts else view.projection(layer, matrix)
            if given is not None or view.multiplied(layer, matrix) is not None:
                found[layer, matrix] = measured_at(view, layer, matrix)
            else:
                hidden[matrix] = None
    if hidden and (asked or not found):
        raise ValueError(
            f"expected matrices whose products the model shows, got {', '.join(hidden)}; pass matrices without these"
        )
    if hidden:
        notes.add(f"left out, since the model shows no product of theirs: {', '.join(hidden)}")
    return found


def _head_weights_size(view: ModelView, measured: Mapping[Outer, Measured]) -> int:
    """Bytes of second moments of inputs weighted by each head's own gradients."""
    weighed = [
        how.heads * view.weight(layer, matrix).shape[-2] ** 2
        for (layer, matrix), how in measured.items()
        if how.heads and kind_of(matrix).reads and not (matrix == "W_K" and view.key_shift_invariant)
    ]
    return sum(weighed) * torch.float64.itemsize


def _describe(
    view: ModelView, objective: Objective[Any], notes: Notes, *, full_mlp: bool, matrices: Sequence[str]
) -> None:
    """What the reader must know of this model and objective."""
    for note in view.notes:
        notes.add(note)
    if not objective.additive:
        notes.add(
            f"{objective_name(objective)} depends on how the data are batched: the batches passed are part of what was "
            "measured"
        )
    axes = {axis for matrix in matrices for axis in (kind_of(matrix).input_axis, kind_of(matrix).output_axis)}
    wide = ["d_mlp" if axis == "mlp" else f"inner {axis}" for axis in sorted(axes - {"residual", "head"})]
    if wide and not full_mlp:
        notes.add(
            f"on the {' and the '.join(wide)} axis the trace is exact, norms and leading eigenvalues are estimated "
            "from a random sketch, and there is no effective rank and no interval (full_mlp=True keeps the whole "
            "moments)"
        )
    if view.dtype == torch.float16:
        notes.warn("small gradients underflow to zero in float16; pass the model in float32 or bfloat16")


def _mean_loss(objective: Objective[Any], batches: Sequence[Batch], losses: Sequence[float]) -> float:
    """The mean over all terms."""
    counts = [objective.count(batch) for batch in batches]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def _tokens(batch: Batch) -> list[torch.Tensor]:
    if isinstance(batch, PreferenceBatch):
        return [batch.chosen.tokens, batch.rejected.tokens]
    return [batch.tokens]


def data_fingerprint(batches: Sequence[Batch]) -> str:
    """XXH3 (128 bit) of all rows' tokens up to their last target, whatever the batches they come in."""
    digest = xxhash.xxh3_128()
    for batch in batches:
        halves = [batch.chosen, batch.rejected] if isinstance(batch, PreferenceBatch) else [batch]
        for row in range(len(batch)):
            for half in halves:
                length = int(half.lengths[row])
                digest.update(half.tokens[row, :length].cpu().numpy().tobytes())
                digest.update(half.mask[row, :length].cpu().numpy().tobytes())
    return digest.hexdigest()
