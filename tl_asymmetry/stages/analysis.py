"""A chain of checkpoints, base → SFT → DPO → …: each stage's delta, head by head, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.ledger import cosine_spread, leading_overlap, ledger, step_gram, storage_product
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.rounding import storage_dtype
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.interventions.analysis import predictable
from tl_asymmetry.interventions.runs import evaluation_batches, measure
from tl_asymmetry.models.checks import check_pair
from tl_asymmetry.models.strangers import strangers, unrelated
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import Weights, opened
from tl_asymmetry.names import kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.plan import chosen_matrices, note_left_out
from tl_asymmetry.results.provenance import described, versions
from tl_asymmetry.settings import checked_hash
from tl_asymmetry.stages.result import LEDGER_COLUMNS, PAIR_COLUMNS, PREDICTION_COLUMNS, StageAnalysis

_FEWEST, _MOST = 2, 6


@checked
@with_fresh_settings
def analyze_stages(
    stages: Mapping[str, Any],
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    matrices: Sequence[str] | str | None = None,
    rank: int = 4,
    batch_size: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> StageAnalysis:
    """What each stage of a chain did to the weights, and how much of it the later stages kept, undid or turned.

    For every head and matrix the deltas Δ_i between consecutive checkpoints are held against each other: the share of
    each that the whole way keeps, the share that later stages take back, the cosine of every two beside what chance
    gives, the overlap of their leading directions on the residual side. Storage in 16 bits writes the same noise with
    opposite signs into two stages that meet: its simulated size stands beside every number, and is subtracted.

    Args:
        stages: names and models in order of training, two to six: loaded models, or whatever `weights_from` reads,
            which is streamed one tensor at a time.
        texts: with them (or tokens) the stages' predictions are compared too; all must be models then, and those in
            folders or on the Hub are loaded.
        tokens, mask: token ids instead of texts, and which of them count.
        matrices: which; default all that the models have.
        rank: how many leading directions are compared.
        batch_size: sequences per pass.
        max_tokens: use no more tokens of the texts than this.
        seed: of the simulated storage noise.
        progress: show a progress bar.

    Returns:
        A frozen `StageAnalysis`.

    Raises:
        ValueError: fewer than two stages or more than six, models that cannot be compared, weights that are not raw or
            not finite, texts where a stage is weights alone.

    Example:
        >>> there_and_back = analyze_stages({"base": base, "dpo": aligned, "back": base}, progress=False)
        >>> first = there_and_back.table[there_and_back.table["stage"] == "dpo"]
        >>> bool((first["kept"].abs() < 1e-9).all()), bool((first["undone"] - 1).abs().max() < 1e-9)
        (True, True)
    """
    arguments = described(
        texts=texts, tokens=tokens, mask=mask, matrices=matrices, rank=rank, batch_size=batch_size,
        max_tokens=max_tokens, seed=seed, progress=progress,
    )  # fmt: skip
    notes = Notes()
    read = texts is not None or tokens is not None
    models = _opened(stages, notes, runs=read)
    first = next(iter(models.values()))
    names = list(chosen_matrices(first, matrices))
    if not 1 <= rank < first.d_model:
        raise ValueError(f"expected a rank from 1 to {first.d_model - 1}, got {rank}; pass rank=4 for the usual one")
    note_left_out(first, notes)
    views = {name: weights for name, weights in models.items() if isinstance(weights, ModelView)}
    sequences = []
    if read and isinstance(first, ModelView):
        sequences = predictable(
            token_sequences(first, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add), notes
        )
    hashes = {
        name: checked_hash(weights, f"model of stage {name}", warn=notes.warn) for name, weights in models.items()
    }
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    arrays: dict[str, Tensor] = {}
    turns: dict[str, dict[str, list[float]]] = {}
    units = [(layer, matrix) for layer in range(first.n_layers) for matrix in names]
    for layer, matrix in tqdm(units, desc="stages", unit="matrix", disable=not progress):
        found = _Matrix(
            list(models), layer, matrix, [weights.weight(layer, matrix) for weights in models.values()], seed
        )
        rows += found.ledger_rows()
        pairs += found.pair_rows(rank)
        arrays[f"gram/{layer}/{matrix}"] = found.gram
        for stage, values in found.cosines().items():
            turns.setdefault(stage, {}).setdefault(matrix, []).extend(values)
    table = pd.DataFrame(rows, columns=list(LEDGER_COLUMNS)).astype({"layer": "int64", "head": "Int64"})
    pair_table = pd.DataFrame(pairs, columns=list(PAIR_COLUMNS)).astype({"layer": "int64", "head": "Int64"})
    if bool((table["rounding"] > 0).any()):
        notes.add(
            "16-bit checkpoints: what storage makes of two stages that meet, simulated, is taken out of what is called "
            "unrounded; a stage that was trained on from the stored checkpoint itself has less of it"
        )
    unlike = {stage: them for stage, turned in turns.items() if (them := unrelated(turned))}
    for stage, matrices_of_it in unlike.items():
        notes.warn(strangers(matrices_of_it, of=f" of {stage}", than="the stage's before"))
    predictions = _predictions(views, sequences, batch_size) if sequences else []
    config = {
        "arguments": arguments,
        "versions": versions(),
        "stages": list(models),
        "models": {name: {"name": w.name, "weights_xxh3": hashes[name]} for name, w in models.items()},
        "shape": {"n_layers": first.n_layers, "d_model": first.d_model},
        "matrices": names,
        "rank": rank,
        "unrelated": unlike,
        "tokens": sum(map(len, sequences)),
    }
    return StageAnalysis(
        table=table,
        pairs=pair_table,
        predictions=pd.DataFrame(predictions, columns=list(PREDICTION_COLUMNS)),
        config=config,
        notes=tuple(notes.lines),
        arrays=arrays,
    )


class _Matrix:
    """One matrix of one layer in every checkpoint, heads side by side."""

    def __init__(self, names: list[str], layer: int, matrix: str, weights: Sequence[Tensor], seed: int) -> None:
        self.names, self.layer, self.matrix = names, layer, matrix
        stored = [storage_dtype(W) for W in weights]
        wide = [W.to(device="cpu", dtype=torch.promote_types(W.dtype, torch.float32)) for W in weights]
        self.headed = wide[0].ndim == 3
        wide = [W if self.headed else W.unsqueeze(0) for W in wide]
        self.wide = wide
        self.base = wide[0].double().square().sum((-2, -1)).sqrt()
        self.steps = torch.stack(
            [after.double() - before.double() for before, after in zip(wide, wide[1:], strict=False)]
        )
        self.gram = step_gram(self.steps)
        self.norms = self.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        # What storage makes of ⟨Δ_i, Δ_{i+1}⟩ at the checkpoint in which they meet, `[checkpoint, head]`.
        self.noise = torch.stack(
            [
                storage_product(
                    wide[i], self.norms[:, i - 1], self.norms[:, i], stored[i],
                    seed=seeded(seed, layer, matrix, i).initial_seed(),
                )
                for i in range(1, len(wide) - 1)
            ]
            or [torch.zeros_like(self.base)]
        )  # fmt: skip

    def cosines(self) -> dict[str, list[float]]:
        """Of each head's weights with those of the checkpoint before, by stage."""
        return {
            name: torch.cosine_similarity(before.flatten(-2), after.flatten(-2), dim=-1).tolist()
            for name, before, after in zip(self.names[1:], self.wide, self.wide[1:], strict=False)
        }

    def ledger_rows(self) -> Iterator[dict[str, Any]]:
        """One row for each head and stage."""
        found, stages = ledger(self.gram), self.names[1:]
        for head, i in ((h, i) for h in range(len(self.base)) for i in range(len(stages))):
            own = self.norms[head, i].item() ** 2
            # A stage meets the one before it at checkpoint i and the next one at checkpoint i + 1.
            meets = [j for j in (i - 1, i) if 0 <= j < len(stages) - 1]
            noise = -sum(self.noise[j, head].item() for j in meets) / own if own else math.nan
            kept = found.kept[head, i].item()
            yield {
                **self._place(head), "stage": stages[i], "norm": own**0.5,
                "relative_norm": own**0.5 / self.base[head].item() if self.base[head] > 0 else math.nan,
                "kept": kept, "undone": found.undone[head, i].item(), "turned": found.turned[head, i].item(),
                "rounding": noise, "kept_unrounded": kept + noise,
                "total_norm": self.gram[head].sum().clamp(min=0).sqrt().item(),
            }  # fmt: skip

    def pair_rows(self, rank: int) -> Iterator[dict[str, Any]]:
        """One row for each head and two stages."""
        stages = self.names[1:]
        residual_first = self.steps if kind_of(self.matrix).reads else self.steps.mT
        rows, columns = residual_first.shape[-2:]
        k = min(rank, columns)
        for i, j in combinations(range(len(stages)), 2):
            A, B = residual_first[i], residual_first[j]
            spread, sizes = cosine_spread(A, B), self.norms[:, i] * self.norms[:, j]
            overlap = leading_overlap(A, B, k)
            for head in range(len(self.base)):
                size = sizes[head].item()
                cosine = self.gram[head, i, j].item() / size if size else math.nan
                floor = self.noise[i, head].item() / size if j == i + 1 and size else (0.0 if size else math.nan)
                yield {
                    **self._place(head), "first": stages[i], "second": stages[j], "cosine": cosine,
                    "cosine_sd_free": 1 / (rows * columns) ** 0.5, "cosine_sd": spread[head].item(),
                    "rounding_cosine": floor, "cosine_unrounded": cosine - floor,
                    "overlap": overlap[head].item() if size else math.nan, "overlap_expected": k / rows,
                }  # fmt: skip

    def _place(self, head: int) -> dict[str, Any]:
        side = kind_of(self.matrix).side
        return {"layer": self.layer, "head": head if self.headed else None, "matrix": self.matrix, "pathway": side}


def _opened(stages: Mapping[str, Any], notes: Notes, *, runs: bool) -> dict[str, Weights]:
    if not isinstance(stages, Mapping) or not _FEWEST <= len(stages) <= _MOST:
        got = f"{len(stages)} stages" if isinstance(stages, Mapping) else type(stages).__name__
        raise ValueError(
            f"expected a mapping from names to models, {_FEWEST} to {_MOST} in order of training, got {got}; pass e.g. "
            '{"base": base, "sft": sft, "dpo": dpo}'
        )
    found: dict[str, Weights] = {}
    for name, model in stages.items():
        base = next(iter(found.values())) if found else None
        weights = opened(model, base, runs=runs)
        if isinstance(base, ModelView):
            for warning in check_pair(base, weights):
                notes.warn(f"{name}: {warning}")
        elif base is not None and _shape(base) != _shape(weights):
            raise ValueError(
                f"expected checkpoints of one architecture, got {_shape(weights)} for {name} after {_shape(base)}; "
                "pass stages of one run"
            )
        found[str(name)] = weights
    return found


def _shape(weights: Weights) -> tuple[Any, ...]:
    return weights.n_layers, weights.d_model, weights.n_heads, weights.n_kv_heads, weights.d_head, weights.d_mlp


def _predictions(views: Mapping[str, ModelView], sequences: Sequence[Tensor], batch_size: int) -> list[dict[str, Any]]:
    """How far every two checkpoints' predictions are apart, and the cross-entropy of the later one."""
    evaluated = evaluation_batches(sequences, None, batch_size)
    outputs = min(view.unembedding()[0].shape[1] for view in views.values())
    rows = []
    for first, second in combinations(views, 2):
        _, found = measure(views[second], views[first], (), evaluated, outputs=outputs)
        ce = -found.sums["log_prob"] / found.places
        rows.append(
            {
                "first": first, "second": second, "kl": found.sums["kl_other"] / found.places,
                "ce_first": ce - found.sums["gain"] / found.places, "ce_second": ce,
            }
        )  # fmt: skip
    return rows
