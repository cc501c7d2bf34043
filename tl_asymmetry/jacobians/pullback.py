"""The prediction subspace pulled back to a layer: what a layer's stream must hold for the logits to see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.memory import free_memory
from tl_asymmetry.geometry.precision import exact_products, with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace
from tl_asymmetry.geometry.token_jacobians import TokenJacobian
from tl_asymmetry.jacobians.pullback_result import PredictionPullback, overlap_table, pullback_table
from tl_asymmetry.jacobians.work import (
    METHODS,
    SOURCES,
    Request,
    chosen_layers,
    chosen_positions,
    closed_forms,
    tolerance_of,
    working_dtype,
)
from tl_asymmetry.models.block_jacobians import NoClosedForm, stream_graph
from tl_asymmetry.models.checks import check_finite, check_unedited
from tl_asymmetry.models.prediction import check_d_vocab, prediction_gram
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.notes import Notes
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions, weights_hash

_MOST_BYTES = 1 << 29
_CPU_ROWS = 8
"""Backward passes at once on a CPU, where more leave its cache: 35 took 1.3 to 1.8 times as long at GPT-2's width."""
_CHECK_TOKENS = 12


@checked
@with_fresh_settings
def prediction_pullback(
    model: Any,
    texts: Any = None,
    *,
    tokens: Any = None,
    mask: Any = None,
    max_tokens: int | None = None,
    layers: int | Sequence[int] | None = None,
    sources: str = "same",
    jacobians: Any = None,
    rank: int | None = None,
    positions: int | Sequence[int] | None = None,
    method: str = "auto",
    d_vocab: int | None = None,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PredictionPullback:
    """The directions of every layer's output that matter for prediction, by the mean Jacobian to the final stream.

    Left singular vectors of J̄_lᵀ · C diag(γ) W_U (its mean over the vocabulary taken out; see `prediction_subspace`),
    with J̄_l the mean over tokens of ∂ resid_final / ∂ resid_post_l, resid_final being what enters the final norm. In
    the last layer J̄ = I and it is the prediction subspace itself. The definition is ours.

    `sources="same"`: same-position ∂ resid_final[t] / ∂ resid_post_l[t]. In a causal model nothing leads from t to a
    later position and back, so this is exactly the product of the blocks' same-position Jacobians, and each token's is
    computed in factors: about `rank` backward passes for all tokens and layers together. Where attention looks both
    ways, or has no closed form, autograd needs `rank` backward passes for every single token.
    `sources="sum"`: Σ_s ∂ resid_final[t] / ∂ resid_post_l[s], `rank` backward passes in all. This is the quantity of
    TransformerLens 4's `JacobianLens` (which takes both t and s from its valid positions).

    Args:
        model: a HookedTransformer or TransformerBridge with raw weights.
        texts: strings or lists of chat messages; without texts and tokens the package's calibration texts.
        tokens: token ids instead, `[batch, pos]`, sequences of different lengths, or what a tokenizer returns.
        mask: which tokens are real, of the shape of `tokens`: False at padding.
        max_tokens: use no more tokens than this.
        layers: which layers; all by default, which is what `analyze_pair(subspaces={"pullback": …})` takes. Negative
            ones count from the end.
        sources: "same" or "sum".
        jacobians: mean Jacobians computed elsewhere: a `JacobianLens`, or a mapping from layers to [d_model, d_model].
        rank: pull back only the leading directions of the prediction subspace (d_model of them by default): for large
            models. What follows is exact for a W_U cut to that rank.
        positions: target positions t; all by default. Negative ones count from the end.
        method: "auto", "einsum" (closed form) or "autograd"; only "autograd" exists for `sources="sum"`.
        d_vocab: use the first so many tokens of the vocabulary only.
        chunk: prediction directions pulled back at once; chosen from free memory by default.
        seed: of the vectors the check uses.
        progress: show a progress bar.

    Returns:
        A frozen `PredictionPullback`, a sequence of one `Subspace` per layer.

    Raises:
        ValueError: layers, positions or rank out of range, Jacobians that do not fit, more memory needed than there is.

    Example:
        >>> from tl_asymmetry import analyze_pair
        >>> tokens = torch.arange(48).view(4, 12)
        >>> pulled = prediction_pullback(base, tokens=tokens, progress=False)
        >>> own = {"pullback": pulled}
        >>> pair = analyze_pair(base, aligned, tokens=tokens, ranks=[4], subspaces=own, progress=False)
        >>> "pullback" in pair.table["subspace"].unique()
        True
    """
    arguments = described(
        tokens=tokens, layers=layers, sources=sources, jacobians=jacobians, rank=rank, positions=positions,
        method=method, d_vocab=d_vocab, chunk=chunk, seed=seed, progress=progress,
    )  # fmt: skip
    view = ModelView(model)
    chosen, notes, d = chosen_layers(view, layers), Notes(), view.d_model
    if rank is not None and not 1 <= rank <= d:
        raise ValueError(f"expected a rank from 1 to {d}, got {rank}; pass such a rank or None for all directions")
    if sources not in SOURCES:
        raise ValueError(f'expected sources "same" or "sum", got {sources!r}; pass sources="same"')
    if method not in METHODS:
        raise ValueError(f"expected a method among {', '.join(METHODS)}, got {method!r}; pass one of these")
    check_finite(view)
    for warning in check_unedited(view):
        notes.warn(warning)
    check_d_vocab(view, d_vocab)
    G = prediction_gram(view, d_vocab=d_vocab)
    prediction = principal_subspace(G, name="prediction")
    assert prediction.eigenvalues is not None
    if rank is None:
        rows = torch.eye(d, dtype=torch.float64)
    else:
        rows = (prediction.basis[:, :rank] * prediction.eigenvalues[:rank].sqrt()).mT

    memory: dict[str, int] = {}
    if jacobians is not None:
        pulled = {layer: rows @ J for layer, J in _given(jacobians, chosen, view).items()}
        used, count, sources = "given", 0, "given"
    else:
        sequences = token_sequences(view, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add)
        asked = [chosen_positions(len(sequence), positions) for sequence in sequences]
        longest = max(range(len(sequences)), key=lambda i: len(sequences[i]))
        with exact_products(view.device):
            used = _method(view, sequences[longest], chosen, sources, method, notes, seed=seed)
        rows = rows.to(view.device, working_dtype(view))
        runs = [_Run(view, chosen, where, sources, rows) for where in asked]
        at_once = runs[longest].chunk(len(sequences[longest]), used, chunk)
        memory = {"chunk": at_once}
        pulled = dict.fromkeys(chosen, torch.zeros(len(rows), d, dtype=torch.float64))
        count = sum(map(len, asked))
        steps = sum(run.steps(used, at_once) for run in runs)
        bar = tqdm(total=steps, desc="pullback", unit="step", disable=not progress)
        with bar, exact_products(view.device):
            for sequence, run in zip(sequences, runs, strict=True):
                way = run.factored if used == "einsum" else run.by_autograd
                mean = way(sequence, at_once, advance=bar.update)
                pulled = {layer: pulled[layer] + len(run.where) / count * mean[layer] for layer in chosen}
    subspaces = [_subspace(X.mT @ G @ X if rank is None else X.mT @ X, rank, layer) for layer, X in pulled.items()]
    arrays = {
        "basis": torch.stack([subspace.basis for subspace in subspaces]),
        "eigenvalues": torch.stack([subspace.eigenvalues for subspace in subspaces]),  # type: ignore[misc]
        "layers": torch.tensor(chosen),
        "prediction": prediction.basis,
        "prediction_eigenvalues": prediction.eigenvalues,
    }
    if rank is None:
        arrays["mean"] = torch.stack([pulled[layer] for layer in chosen]).to(working_dtype(view))
    return PredictionPullback(
        table=pullback_table(arrays),
        overlaps=overlap_table(arrays),
        config={
            "arguments": arguments, "versions": versions(), "model": model_record(view, weights_hash(view)),
            "shape": shape_record(view), "sources": sources, "method": used, "memory": memory, "tokens": count,
            "rank": rank or d,
        },
        notes=tuple(notes.lines),
        arrays=arrays,
    )  # fmt: skip


def _subspace(gram: Float[Tensor, "d d"], rank: int | None, layer: int) -> Subspace:
    found = principal_subspace((gram + gram.mT) / 2, name=f"pullback L{layer}")
    return found if rank is None else found.truncate(rank)


def _given(jacobians: Any, layers: Sequence[int], view: ModelView) -> dict[int, Float[Tensor, "d d"]]:
    """Mean Jacobians from elsewhere, by layer; the last layer's is the identity."""
    held = getattr(jacobians, "jacobians", jacobians)
    if not isinstance(held, Mapping):
        raise ValueError(
            f"expected a JacobianLens or a mapping from layers to matrices, got {type(jacobians).__name__}; pass one"
        )
    last, d, found = view.n_layers - 1, view.d_model, {}
    for layer in layers:
        if layer == last and layer not in held:
            found[layer] = torch.eye(d, dtype=torch.float64)
            continue
        if layer not in held:
            raise ValueError(
                f"expected Jacobians of layers {', '.join(map(str, layers))}, got none of layer {layer}; pass "
                f"layers={sorted(i for i in held if isinstance(i, int))}"
            )
        J = torch.as_tensor(held[layer]).detach().double().cpu()
        if J.shape != (d, d):
            raise ValueError(f"expected Jacobians [{d}, {d}], got {list(J.shape)} in layer {layer}; pass such matrices")
        found[layer] = J
    return found


def _method(
    view: ModelView, tokens: Int[Tensor, " pos"], layers: Sequence[int], sources: str, method: str, notes: Notes, *,
    seed: int,
) -> str:  # fmt: skip
    """ "einsum" where the product of blocks holds and agrees with autograd, else "autograd"."""
    if sources == "sum":
        if method == "einsum":
            raise ValueError('expected method "auto" or "autograd" for sources="sum", got "einsum"; pass method="auto"')
        return "autograd"
    if method == "autograd":
        return method
    fault = None
    if not view.causal:
        fault = "attention looks both ways, so that paths through other positions count"
    else:
        short = tokens[:_CHECK_TOKENS]
        try:
            error, tolerance = _disagreement(view, short, layers, seed=seed), tolerance_of(view.dtype)
            if not error <= tolerance:
                fault = f"it is {error:.2g} off autograd (relative; at most {tolerance:g})"
        except NoClosedForm as found:
            fault = str(found)
    if fault is None:
        return "einsum"
    if method == "einsum":
        raise ValueError(f"expected a product of blocks in closed form, but {fault}; pass method='autograd'")
    notes.warn(f"same-position Jacobians take autograd, `rank` backward passes per token, since {fault}")
    return "autograd"


def _disagreement(view: ModelView, tokens: Int[Tensor, " pos"], layers: Sequence[int], *, seed: int) -> float:
    """Relative difference between the product of blocks and autograd, for a random direction at a few positions."""
    where = tuple(sorted({0, len(tokens) // 2, len(tokens) - 1}))
    row = torch.randn(1, view.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    run = _Run(view, tuple(layers), where, "same", row.to(view.device, working_dtype(view)))
    mine, other = run.factored(tokens, 1), run.by_autograd(tokens, 1)
    return max(float((mine[i] - other[i]).norm() / other[i].norm().clamp_min(1e-300)) for i in layers)


class _Run:
    """One call's work on one sequence after the other.

    Args:
        view: the model.
        layers: pull back to their outputs.
        where: target positions.
        sources: "same" or "sum".
        rows: what to pull back, `[r, d]`.
    """

    def __init__(
        self, view: ModelView, layers: tuple[int, ...], where: tuple[int, ...], sources: str, rows: Float[Tensor, "r d"]
    ) -> None:
        self.view, self.layers, self.where, self.sources, self.rows = view, layers, where, sources, rows

    def chunk(self, length: int, method: str, chunk: int | None) -> int:
        """Rows pulled back at once.

        Raises:
            ValueError: chunk < 1, or not even one row fits into memory.
        """
        if chunk is not None and chunk < 1:
            raise ValueError(f"expected a chunk of at least 1, got {chunk}; pass None to have it chosen")
        view, size = self.view, self.rows.element_size()
        d, inner, m = view.d_model, view.n_heads * view.d_head, view.d_mlp or 4 * view.d_model
        above = view.n_layers - 1 - min(self.layers)
        scores = view.n_heads * length * length
        if method == "einsum":
            held = above * length * (6 * d + 6 * inner + inner * view.d_head + 3 * m) + above * 4 * scores
            each = len(self.where) * (3 * d + 4 * inner + 2 * m)
        else:
            held = above * (length * (10 * d + 4 * inner + 4 * m) + 4 * scores)
            each = length * ((len(self.layers) + 10) * d + 4 * m + 4 * inner) + 4 * scores
        free = free_memory(view.device)
        if free is not None and size * (held + (chunk or 1) * each) > free:
            raise ValueError(
                f"expected a call that fits into {free / 1e9:.3g} GB, got one that needs about "
                f"{size * (held + (chunk or 1) * each) / 1e9:.3g} GB; pass shorter sequences, fewer positions or "
                "layers, or a smaller chunk"
            )
        budget = _MOST_BYTES if free is None else min(_MOST_BYTES, (free - size * held) // 4)
        most = _CPU_ROWS if method == "autograd" and view.device.type == "cpu" else len(self.rows)
        return chunk or int(max(1, min(most, len(self.rows), budget // (size * each))))

    def steps(self, method: str, chunk: int) -> int:
        """How often `factored` or `by_autograd` calls `advance`: chunks of rows, times blocks or backward passes."""
        chunks = -(-len(self.rows) // chunk)
        if method == "einsum":
            return chunks * (self.view.n_layers - 1 - min(self.layers))
        return chunks * (1 if self.sources == "sum" else len(self.where))

    def factored(
        self, tokens: Int[Tensor, " pos"], chunk: int, *, advance: Callable[[int], object] = lambda _: None
    ) -> dict[int, Float[Tensor, "r d"]]:
        """Mean over the positions of rows · Π J_m[t], m running down from the last block, in factors."""
        first, last = min(self.layers), self.view.n_layers - 1
        total = {layer: torch.zeros_like(self.rows, dtype=torch.float64, device="cpu") for layer in self.layers}
        above = tuple(range(first + 1, last + 1))
        request = Request(self.view, above, "block", "same", self.where, self.where)
        blocks = dict(closed_forms(request, tokens)) if above else {}
        for start in range(0, len(self.rows), chunk):
            part = slice(start, start + chunk)
            X = self.rows[part].expand(len(self.where), -1, -1)
            for layer in range(last, first - 1, -1):
                if layer in total:
                    total[layer][part] = X.mean(0, dtype=torch.float64).cpu()
                if layer > first:
                    block = blocks[layer]
                    assert isinstance(block, TokenJacobian)
                    with torch.no_grad():
                        X = block.pull(X)
                    advance(1)
        return total

    def by_autograd(
        self, tokens: Int[Tensor, " pos"], chunk: int, *, advance: Callable[[int], object] = lambda _: None
    ) -> dict[int, Float[Tensor, "r d"]]:
        """The same for any architecture, and summed over sources: backward passes from the final stream."""
        graph = stream_graph(self.view, tokens, self.layers)
        where = torch.tensor(self.where, device=graph.final.device)
        rows = self.rows.to(graph.final.dtype)
        total = {layer: torch.zeros(self.rows.shape, dtype=torch.float64) for layer in self.layers}
        targets = [where] if self.sources == "sum" else where.split(1)
        for target in targets:
            for start in range(0, len(rows), chunk):
                part = slice(start, start + chunk)
                cotangents = rows.new_zeros(len(rows[part]), *graph.final.shape)
                cotangents[:, 0, target] = rows[part].unsqueeze(1)
                for layer, grad in graph.pull(cotangents, chunk=chunk).items():
                    seen = grad[:, 0] if self.sources == "sum" else grad[:, 0, target]
                    total[layer][part] += seen.sum(1, dtype=torch.float64).cpu() / len(where)
                advance(1)
        return total
