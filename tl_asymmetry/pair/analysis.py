"""The main job: one base model, one aligned model, one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.capture import capture
from tl_asymmetry.models.prediction import predictions_of
from tl_asymmetry.models.processes import ALONE, Processes, present_processes, together
from tl_asymmetry.models.readers.hub import public_name
from tl_asymmetry.models.side_by_side import side_by_side
from tl_asymmetry.models.strangers import cosines_with_base, strangers, unrelated
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import Weights
from tl_asymmetry.names import EXPERT_INPUT, LATENTS, SMALLEST_EIGENVALUE, kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.asymmetry import asymmetry_table
from tl_asymmetry.pair.bases import LayerBases, Routed
from tl_asymmetry.pair.circuits import layer_circuits
from tl_asymmetry.pair.deltas import Delta, measure_change
from tl_asymmetry.pair.memory_plan import plan_memory
from tl_asymmetry.pair.non_matrix_parameters import other_changes, unmatched_parameters
from tl_asymmetry.pair.numbers import DeltaNumbers, Layout, Measurements, layer_tensors
from tl_asymmetry.pair.own_inputs import project_experts
from tl_asymmetry.pair.plan import (
    Plan,
    Sources,
    check_asked,
    counted_tokens,
    grouped_sequences,
    make_plan,
    matrices_of_both,
    too_few,
)
from tl_asymmetry.pair.projections import Projection, notes_of_kinds, project
from tl_asymmetry.pair.result import PairAnalysis
from tl_asymmetry.pair.saved_moments import SavedMoments
from tl_asymmetry.pair.sensitivity import SensitivityProfiles, prediction_variants, stacked_variants
from tl_asymmetry.pair.tables import pair_tables
from tl_asymmetry.results.provenance import described, pair_names, pair_record, shape_record, versions
from tl_asymmetry.settings import GradientMoments, OpenPair, PairSettings, open_pair


@checked
@together
@with_fresh_settings
def analyze_pair(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    moments: str | Path | None = None,
    matrices: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None,
    optimizer: str = "adam",
    exclude_first: bool = True,
    centered: bool = False,
    batch_size: int = 8,
    max_tokens: int | None = None,
    groups: int = 8,
    activations: str = "base",
    gradient: GradientMoments | None = None,
    sensitivity: bool = False,
    layers_per_pass: int | None = None,
    distributed: bool = True,
    names: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PairAnalysis:
    """Which heads' weights changed along which directions of the residual stream, and is that more than chance.

    For every head (and MLP) matrix: the share of ΔW = W_aligned − W_base that lies in the leading k directions of a
    subspace, relative to k/d, beside two nulls (a Haar-random subspace; the variance of the matrix's own input), a
    delete-one-group interval and the share that rounding explains. The question is that of arXiv 2605.16600 ("Where
    pretraining writes and alignment reads"); the definitions are ours, since the paper's are not public.

    Both models come back exactly as they were; activations are taken in evaluation mode. Of an aligned model in files
    one tensor is read at a time, and a LoRA adapter's change is never multiplied out.

    Where torch.distributed is set up (torchrun), all processes must make the same call: sequences and layers are
    shared out, and every process returns the same result.

    Args:
        model_base: a HookedTransformer or TransformerBridge with raw weights (`from_pretrained_no_processing`), a model
            of transformers, or a folder or name on the Hub, which is loaded in the dtype that it is stored in.
        model_aligned: the same, or anything `weights_from` reads, a tensor at a time: a folder or name on the Hub, a
            `.safetensors` file, shards, a LoRA adapter, a state dict of TransformerLens.
        texts: strings, or lists of chat messages, read with the base's tokenizer and cut into windows; without texts
            and tokens the package's calibration texts are used and the result says so.
        tokens: token ids instead of texts, `[batch, pos]` or sequences of different lengths; every one counts, unless
            a `mask` says otherwise.
        mask: which of `tokens` are real, `[batch, pos]`; padding stands at the ends of rows.
        moments: a folder of `save_moments`, instead of texts: what was captured of this base there, perhaps on another
            machine. No text is run, and the numbers are those of the direct call.
        matrices: default all the model has, layer by layer: W_Q, W_K, W_V, W_O, W_in, W_gate, W_out, of each expert of
            a mixture too, its router and shared experts, the maps of latent attention, and further linear maps of the
            stream under their module's path.
        ranks: default the distinct values of 1, 4, 16, 64, d//16, d//4 below d.
        subspaces: names out of attn_in, mlp_in, resid_pre, resid_mid, resid_post, prediction, embedding, weak_readout,
            suppressed, written_not_read (the last four: see `tl_asymmetry.geometry`), expert_in (of mixtures: each
            expert's matrices against the inputs that were routed to it, d² numbers an expert, layer and group while
            they are captured; NaN where these span fewer directions than the rank), and mappings from other names to
            own directions (a `Subspace`, a vector, a matrix `[d_model, k]`, a list of vectors; or a list with a
            `Subspace` or matrix for each layer), which are measured at their own number, and below it only where they
            have eigenvalues. Every matrix is then held against each. Default: a read matrix against its own input, a
            write matrix against the stream it writes into, all against "prediction"; W_UQ, W_UK and W_UV of latent
            attention against "q_latent" and "kv_latent", what they read behind its norm, and against nothing else (d is
            the latent's width there, and by default the ranks are those of such a width); a mapping alone comes beside
            these, in a list nothing else is measured.
        optimizer: the optimiser of the training in between, "sgd", "adam" or "muon": whose reference is tested.
        exclude_first: leave the first position of each sequence out, whose attention-sink activations would dominate.
        centered: principal directions of the covariance instead of the uncentred second moment.
        batch_size: sequences per forward pass.
        max_tokens: use no more tokens than this.
        groups: groups of sequences for the jackknife; 1 switches intervals off (less memory, less time).
        activations: whose activations define the subspaces: "base", "aligned" or "both".
        gradient: output-gradient second moments for the matched reference of W_O and W_out: a `GradientCovariance` of
            the base, by which the reference of each head of a read matrix weighs its inputs (and with its
            `permutations` draws a permutation range), or any object with `gradient_moment(layer, matrix, head)`.
        sensitivity: also keep moments and projections under the other choices of subspace, for `.sensitivity()`.
        layers_per_pass: hold the moments of so many layers at once, and run the texts again for the next ones (each
            time only as far as needed); by default as many as fit into the free memory, all of them if possible.
            The numbers do not depend on it.
        distributed: share the work with the other processes of torch.distributed, if there are any; False where one
            of them calls this alone.
        names: what to call the two models, such as `("base", "dpo")`; by default what they call themselves.
        seed: of the null's draws and of the rounding calibration.
        progress: show progress bars.

    Returns:
        A frozen `PairAnalysis`.

    Raises:
        ValueError: models that cannot be compared, processed or non-finite weights, texts or tokens that cannot be
            read, ranks out of range, too little memory: before anything heavy runs, saying what to pass instead.

    Example:
        >>> from tl_asymmetry.demo import demo_pair, demo_texts
        >>> result = analyze_pair(*demo_pair(), demo_texts(20, seed=1), ranks=[1, 4], progress=False)
        >>> row = result.table.query("matrix == 'W_Q' and subspace == 'attn_in' and rank == 4").iloc[0]
        >>> bool(0 < row.fraction < 1)
        True
    """
    settings = PairSettings(
        matrices=matrices, ranks=ranks, subspaces=subspaces, optimizer=optimizer, exclude_first=exclude_first,
        centered=centered, batch_size=batch_size, max_tokens=max_tokens, groups=groups, activations=activations,
        gradient=gradient, sensitivity=sensitivity, layers_per_pass=layers_per_pass, distributed=distributed,
        names=names, seed=seed, progress=progress,
    )  # fmt: skip
    arguments = described(texts=texts, tokens=tokens, mask=mask, moments=moments) | settings.described()
    saved = None if moments is None else SavedMoments(moments)
    if saved is not None and any(given is not None for given in (texts, tokens, mask)):
        raise ValueError("expected either moments or texts and tokens, got both; pass one of them")
    pair = open_pair(
        model_base, model_aligned, texts, tokens if saved is None else saved.sequences, mask,
        max_tokens=max_tokens, run_aligned="aligned" in settings.captured,
        check=lambda base: check_asked(base, settings),
    )  # fmt: skip
    base, aligned, sequences, notes = pair.base, pair.aligned, pair.sequences, pair.notes
    plan = make_plan(base, settings, sequences, notes, available=matrices_of_both(base, aligned, notes))
    for name in unmatched_parameters(base, aligned):
        notes.add(f"{name} exists in one of the two models only and is left out")
    for note in notes_of_kinds(base, plan.matrices):
        notes.add(note)
    processes = present_processes() if distributed else ALONE
    memory = plan_memory(base, plan, sequences, settings, processes)
    if saved is not None:
        saved.check(plan, settings, base.n_layers)
        for line in saved.notes:
            notes.add(line)
    hashes = pair.checked_hashes(run=saved is None)
    if saved is not None:
        saved.check_weights(hashes["base"])
    _check_gradient(gradient, base, hashes, plan, notes)
    processes.agree({"arguments": arguments, "weights": hashes, "tokens": sequences})
    grouped, intervals = grouped_sequences(sequences, settings, notes)
    with torch.no_grad():
        # Two passes over the vocabulary: of two processes each makes one.
        passes: list[Callable[[], Any]] = [lambda: predictions_of(base), lambda: other_changes(base, aligned)]
        prediction, changes = processes.gathered([make() for make in processes.share(passes)])
        given = {**prediction, **plan.given}
        predictions = {}
        if sensitivity and isinstance(aligned, ModelView) and base.has_unembedding and aligned.has_unembedding:
            predictions = prediction_variants(base, aligned)

    def of_pass(few: range) -> list[_Layer]:
        """Capture the moments of a few layers, and analyse these layers; the moments go when this returns."""
        own = processes.share(few)
        if saved is None:
            sources = captured(pair, grouped, plan, few, settings, processes, intervals=intervals)
        else:
            parts = {"base": saved.capture(own, plan, settings)}
            sources = Sources(parts, activations, exclude_first=exclude_first, intervals=intervals)
        profiles = SensitivityProfiles(predictions, sources) if sensitivity else None

        def analyse(layer: int) -> _Layer:
            bases = LayerBases(
                layer, sources.groups, given, centered=centered, exact=base.dtype == torch.float64,
                softmax_centres_keys=base.key_shift_invariant, optimizer=optimizer, gradient=gradient,
            )  # fmt: skip
            here = [matrix for matrix in plan.matrices if base.has(layer, matrix)]
            weights = {matrix: base.weight(layer, matrix) for matrix in here}
            measured = {matrix: measure_change(base, aligned, layer, matrix, seed=seed) for matrix in here}
            shared = {m: [name for name in plan.targets[m] if name != EXPERT_INPUT] for m in here}
            projections = project(
                list(measured.values()), shared, bases, plan.ranks, intervals=intervals, gradient=gradient
            )
            of_experts = [matrix for matrix in here if base.unit(layer, matrix) == "expert"]
            if apart := [measured[m] for m in of_experts if EXPERT_INPUT in plan.targets[m]]:
                projections += project_experts(apart, bases, plan.ranks, intervals=intervals, gradient=gradient)
            given_tokens = bases.routed()
            gains = {
                latent: (base.latent_gain(layer, latent), aligned.latent_gain(layer, latent))
                for latent in LATENTS
                if latent in plan.points and base.latent_width(layer, latent)
            }
            return _Layer(
                deltas={matrix: delta.numbers for matrix, delta in measured.items()},
                projections={(projection.matrix, projection.subspace): projection for projection in projections},
                circuits=layer_circuits(
                    layer, weights, measured, bases, plan.measured.get("attn_in", plan.ranks), gains
                ),
                variants={} if profiles is None else profiles.of_layer(layer, measured, plan),
                moments={} if profiles is None else profiles.moments_of_layer(layer),
                routed={} if given_tokens is None else dict.fromkeys(of_experts, given_tokens),
            )

        bars = progress and processes.is_first
        done = side_by_side(
            lambda i: analyse(own[i]),
            len(own),
            device=base.device,
            description="layers",
            progress=bars,
            workers=memory.workload.workers,
        )
        return processes.gathered(done)

    layers = [layer for few in memory.passes for layer in of_pass(few)]
    if len(memory.passes) > 1:
        notes.add(
            f"moments were captured in {len(memory.passes)} passes over the texts, {memory.layers_per_pass} layers at "
            "a time, to fit into memory; the numbers are those of one pass"
        )
    deltas = {matrix: [layer.deltas.get(matrix) for layer in layers] for matrix in plan.matrices}
    keys = dict.fromkeys(key for layer in layers for key in layer.projections)
    projections = {key: [layer.projections.get(key) for layer in layers] for key in keys}
    numbers = Measurements.of_layers(
        Layout.of(base, plan),
        [
            layer_tensors(layer.deltas, list(layer.projections.values()), plan.ranks, routed=layer.routed)
            for layer in layers
        ],
    )
    unrelated = _note_deltas(numbers.deltas, aligned, hashes, notes)
    shown_rank = _note_existing(numbers, plan, notes)
    counted = counted_tokens(sequences, settings) * (2 if activations == "both" else 1)
    tables = pair_tables(numbers, optimizer=optimizer, few=too_few(counted, len(sequences), base.d_model), seed=seed)
    return PairAnalysis.assemble(
        table=tables.table,
        nulls=tables.nulls,
        tests=tables.tests,
        asymmetry=asymmetry_table(numbers),
        other_changes=changes,
        circuits=[layer.circuits for layer in layers],
        deltas=deltas,
        projections=projections,
        variants={
            **(stacked_variants([layer.variants for layer in layers]) if sensitivity else {}),
            **{name: array for layer in layers for name, array in layer.moments.items()},
        },
        sequences=sequences,
        config={
            "arguments": arguments,
            "versions": versions(),
            "models": pair_record(base, aligned, hashes, pair_names(names)),
            "shape": shape_record(base),
            **plan.described(),
            "shown_rank": shown_rank,
            "unrelated": unrelated,
            "low_rank": _low_rank(numbers),
            "tokens": counted,
            "sequences": len(sequences),
            "layers_per_pass": memory.layers_per_pass,
            "processes": processes.count,
        },
        notes=notes.lines,
        model_base=base.model,
    )  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """What one layer contributes."""

    deltas: dict[str, Delta]
    projections: dict[tuple[str, str], Projection]
    circuits: pd.DataFrame
    variants: dict[str, Tensor]
    moments: dict[str, Tensor]
    routed: dict[str, Routed]


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
    missing = [matrix for matrix in plan.matrices if kind_of(matrix).writes and matrix not in config["matrices"]]
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
            "describe that model"
        )


def captured(
    pair: OpenPair,
    grouped: Sequence[Sequence[Tensor]],
    plan: Plan,
    layers: range,
    settings: PairSettings,
    processes: Processes,
    *,
    intervals: bool,
) -> Sources:
    """Run the texts through the model(s) whose activations are asked for, up to the last of these layers."""
    views = {"base": pair.base, "aligned": pair.aligned}
    with torch.no_grad():
        captures = {
            name: capture(
                view, grouped, [(p, layer) for p in plan.points for layer in layers if view.shows(layer, p)],
                exclude_first=settings.exclude_first, first_positions=settings.sensitivity,
                beside=plan.beside, batch_size=settings.batch_size,
                progress=settings.progress, processes=processes,
            )
            for name in settings.captured
            if isinstance(view := views[name], ModelView)
        }  # fmt: skip
    return Sources(captures, settings.activations, exclude_first=settings.exclude_first, intervals=intervals)


def _note_deltas(
    deltas: Mapping[str, DeltaNumbers],
    aligned: Weights,
    hashes: Mapping[str, str],
    notes: Notes,
) -> list[str]:
    """Say where nothing changed, and return where so much did that the weights may be of something else."""
    same = [matrix for matrix, changes in deltas.items() if bool((changes.energy.nan_to_num() == 0).all())]
    if same and hashes["base"] != hashes["aligned"]:
        if len(same) == len(deltas):
            notes.warn("the analysed matrices are the same in both models: every delta is zero and every fraction NaN")
        else:
            notes.add(f"{', '.join(same)} are the same in both models: their rows are NaN")
    unlike = unrelated(
        {
            matrix: cosines_with_base((changes.energy / changes.base_energy).sqrt().cpu(), changes.shrink.cpu())
            for matrix, changes in deltas.items()
        }
    )
    if unlike:
        notes.warn(f"{strangers(unlike, of=f' in {public_name(aligned.name)!r}')} Pass the base they were trained from")
    return unlike


def _low_rank(numbers: Measurements) -> dict[str, int]:
    """Read matrices whose delta has at most half the rank it could have in every layer, and the largest such rank.

    Training of whole matrices leaves full rank once there are as many tokens as dimensions. An adapter that is given as
    one has a reference of its own and is not listed.
    """
    found = {}
    for matrix, changes in numbers.deltas.items():
        adapted = any("lora" in held.expected for (m, _), held in numbers.held.items() if m == matrix)
        if kind_of(matrix).writes or adapted:
            continue
        whole = changes.spectrum[:, 0] if changes.pooled_spectrum is None else changes.pooled_spectrum
        changed = (changes.energy.nan_to_num() > 0).sum(1)
        most = (changed * changes.spectrum.shape[-1]).clamp(max=numbers.layout.width(matrix))
        rank = (whole > SMALLEST_EIGENVALUE * whole[:, :1]).sum(1)
        there = changed > 0
        if bool(there.any()) and bool((2 * rank <= most)[there].all()):
            found[matrix] = int(rank[there].max())
    return found


def _note_experts(numbers: Measurements, notes: Notes) -> None:
    """Say how many experts have too few tokens for a basis of their own, at which ranks."""
    held = next(held for (_, subspace), held in numbers.held.items() if subspace == EXPERT_INPUT)
    there = held.exists[held.exists[..., 0].isfinite()]  # [expert, rank]
    few = {k: int(n) for k, n in zip(numbers.layout.ranks, (there == 0).sum(0), strict=False) if n}
    if few:
        counts = ", ".join(f"{n} of {len(there)} at rank {k}" for k, n in few.items())
        notes.add(
            f"{EXPERT_INPUT!r}: experts whose own inputs span fewer directions than the rank have NaN there ({counts})"
        )


def _note_existing(numbers: Measurements, plan: Plan, notes: Notes) -> int:
    """Say at which ranks a subspace has no directions any more; the rank to show, which exists where it is shown."""
    everywhere = set(plan.ranks)
    for name in plan.subspaces:
        if name == EXPERT_INPUT:
            _note_experts(numbers, notes)
            continue
        exists = next(held.exists for (_, subspace), held in numbers.held.items() if subspace == name)
        exists = exists[exists.isfinite().all(1)] > 0  # of layers that have it
        ranks = numbers.layout.ranks[: exists.shape[1]]
        if name in plan.shown_first:
            everywhere &= {k for k, there in zip(ranks, exists.all(0).tolist(), strict=True) if there}
        missing = [k for k, there in zip(ranks, exists.all(0).tolist(), strict=True) if not there]
        if missing:
            layers = int((~exists[:, ranks.index(missing[0])]).sum())
            notes.add(
                f"{name!r} has fewer than {missing[0]} directions in {layers} of {len(exists)} layers (others hold "
                f"under a millionth of the leading one's variance): rows at ranks from {missing[0]} are left out there"
            )
    return min(everywhere or {plan.shown_rank}, key=lambda k: (abs(k - plan.shown_rank), k))
