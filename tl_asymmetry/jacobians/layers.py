"""Per-layer Jacobians of a transformer: exact, per token or averaged, by closed form or by autograd."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import exact_products, with_fresh_settings
from tl_asymmetry.geometry.token_jacobians import BranchJacobian
from tl_asymmetry.jacobians.result import LayerJacobians, jacobian_table, token_table
from tl_asymmetry.jacobians.work import (
    POINTWISE,
    Closed,
    MemoryPlan,
    Request,
    by_autograd,
    chosen_method,
    closed_forms,
    make_request,
    mean_summed,
    plan_memory,
    summed_columns,
    working_dtype,
)
from tl_asymmetry.models.block_jacobians import GraphJacobian
from tl_asymmetry.models.checks import check_unedited
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.notes import Notes
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions, weights_hash


@checked
@with_fresh_settings
def layer_jacobians(
    model: Any,
    texts: Any = None,
    *,
    tokens: Any = None,
    mask: Any = None,
    max_tokens: int | None = None,
    layers: int | Sequence[int] | None = None,
    part: str = "block",
    positions: int | Sequence[int] | None = None,
    reduce: str | None = "mean",
    method: str = "auto",
    sources: str = "same",
    per_head: bool = False,
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LayerJacobians:
    """How what leaves a part of a layer moves with what enters it: `J[..., i, j] = ∂ out_i / ∂ in_j`.

    Two kinds, never mixed: `sources="same"` is the *same-position* Jacobian `∂ out[t] / ∂ in[t]`; `sources="sum"` is
    *summed over sources*, `Σ_s ∂ out[t] / ∂ in[s]`: the answer at t to one change made at every position.

    The parts, and what is in and out of each:

    - "block": from the stream entering the block to the stream leaving it, residual included.
    - "attn": from the stream entering the block to what attention adds to it: the norm before attention (and one after
      it, as in Gemma 2 and 3) included, the residual not.
    - "mlp": from the stream the MLP reads (after attention; before it in a parallel block) to what the MLP adds: its
      norms included, the residual not.
    - "ln": the norm before attention alone, from the stream to the attention input. "ln2": the norm before the MLP.

    So a block is (I + J_mlp)(I + J_attn), or I + J_attn + J_mlp where the two are parallel.

    By "einsum" a block is one forward pass, then matrix products: norms as a scaling and rank-one terms, attention per
    head through W_O, W_V, W_Q, W_K and the pattern's own derivative, the MLP through its two matrices. Only the core of
    attention (from q, k, v to the heads' outputs: rotation, query-key norm, soft cap, softmax) and the activation are
    differentiated by autograd, each alone, so every variant of them is exact. An average of "same" needs no d × d
    matrix per token: about the cost of d_head/3 forward passes. "autograd" does the same for any architecture, with
    batched backward passes: d of them per token.

    Args:
        model: a HookedTransformer or TransformerBridge; processed weights are fine.
        texts: strings or lists of chat messages; without texts and tokens the package's calibration texts.
        tokens: token ids instead, `[batch, pos]`, sequences of different lengths, or what a tokenizer returns.
        mask: which tokens are real, of the shape of `tokens`: False at padding.
        max_tokens: use no more tokens than this.
        layers: which layers; all by default. Negative ones count from the end.
        part: "block", "attn", "mlp", "ln" or "ln2".
        positions: which positions t; all by default. Negative ones count from the end. Sources are never restricted.
        reduce: "mean" over all sequences and positions, or None to keep every token's matrix as well (sequences of one
            length).
        method: "auto" takes "einsum" where it holds and agrees with autograd on a few tokens, else "autograd".
        sources: "same" or "sum".
        per_head: also average what each head adds (part "attn" or "block", same position, closed form): the heads sum
            to J_attn.
        chunk: how many tokens (columns, backward passes) are at work at once; chosen from free memory by default.
        seed: of the vectors the check uses; no result depends on it.
        progress: show a progress bar.

    Returns:
        A frozen `LayerJacobians`; `.config["method"]` and `.config["memory"]` say how it was computed.

    Raises:
        ValueError: positions or layers out of range, a part the model does not have, "einsum" where it does not hold,
            more memory needed than there is.

    Example:
        >>> jacobians = layer_jacobians(model, tokens=torch.arange(24).view(2, 12), layers=[0, 1], progress=False)
        >>> jacobians.mean(0).shape, jacobians.config["method"]
        (torch.Size([64, 64]), 'einsum')
    """
    if reduce not in ("mean", None):
        raise ValueError(f'expected reduce "mean" or None, got {reduce!r}; pass reduce="mean"')
    arguments = described(
        tokens=tokens, layers=layers, part=part, positions=positions, reduce=reduce, method=method, sources=sources,
        per_head=per_head, chunk=chunk, seed=seed, progress=progress,
    )  # fmt: skip
    view, notes = ModelView(model), Notes()
    sequences = token_sequences(view, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add)
    request = make_request(view, sequences, layers, part, sources, positions)
    longest = max(sequences, key=len)
    even = all(len(sequence) == len(longest) for sequence in sequences)
    if reduce is None and not even:
        raise ValueError(
            "expected sequences of one length with reduce=None, got several lengths; pass tokens=[batch, pos] without "
            'padding, or reduce="mean"'
        )
    if per_head and (part not in ("attn", "block") or sources != "same"):
        raise ValueError(
            f'expected part "attn" or "block" and sources "same" with per_head=True, got {part!r} and {sources!r}; '
            "pass these or per_head=False"
        )
    for warning in check_unedited(view):
        notes.warn(warning)
    requests = [request.of(len(sequence)) for sequence in sequences]
    L, kept = len(request.layers), sum(len(own.where) for own in requests)
    with exact_products(view.device):
        used = chosen_method(request, longest, method, notes, seed=seed)
    if per_head and used != "einsum":
        raise ValueError("expected a block with a closed form for per_head=True, got none; pass per_head=False")
    matrices = L * (1 + (kept if reduce is None else 0) + (view.n_heads if per_head else 0))
    memory = plan_memory(request, len(longest), used, matrices=matrices, chunk=chunk)
    _say_what_matters(request, used, notes)

    d, dtype = view.d_model, working_dtype(view)
    means: dict[int, Any] = {}
    every = torch.empty(L, kept if reduce is None else 0, d, d, dtype=dtype)
    heads = torch.zeros(L, view.n_heads if per_head else 0, d, d, dtype=torch.float64)
    index = {layer: i for i, layer in enumerate(request.layers)}
    bar = tqdm(total=len(sequences) * L, desc="jacobians", unit="layer", disable=not progress)
    with bar, exact_products(view.device):
        for i, (sequence, own) in enumerate(zip(sequences, requests, strict=True)):
            share = len(own.where) / kept
            for layer, jacobian in _of_sequence(own, sequence, used, memory):
                with torch.no_grad() if used == "einsum" else torch.enable_grad():
                    if reduce is None:
                        first = i * len(own.where)
                        mean = _kept(jacobian, every[index[layer], first : first + len(own.where)], own, memory)
                    else:
                        mean = _mean(jacobian, own, memory)
                    for head in range(heads.shape[1]):
                        branch = jacobian if part == "attn" else jacobian.attention  # type: ignore[union-attr]
                        assert isinstance(branch, BranchJacobian)
                        heads[index[layer], head] += share * branch.head(head).mean(memory.chunk).double().cpu()
                means[layer] = means.get(layer, 0) + share * mean.double().cpu()
                bar.update()
    J = torch.stack([means[layer] for layer in request.layers])
    arrays = {
        "mean": J.to(dtype),
        "singular_values": torch.stack([_singular_values(J[i], view.device) for i in range(L)]),
        "layers": torch.tensor(request.layers),
        "positions": torch.tensor(request.where if even else [t for own in requests for t in own.where]),
        "tokens": (torch.stack if even else torch.cat)(
            [s[list(r.where)] for s, r in zip(sequences, requests, strict=True)]
        ),
    }
    if reduce is None:
        arrays["per_token"] = every
    if per_head:
        arrays["heads"] = heads.to(dtype)
    return LayerJacobians(
        table=jacobian_table(arrays, request.layers, part=part, sources=sources),
        tokens=token_table(arrays, request.layers),
        config={
            "arguments": arguments,
            "versions": versions(),
            "model": model_record(view, weights_hash(view)),
            "shape": shape_record(view),
            "part": part,
            "sources": sources,
            "method": used,
            "memory": memory.described(),
            "tokens": kept,
            "sequences": len(sequences),
        },
        notes=tuple(notes.lines),
        arrays=arrays,
    )


@checked
@with_fresh_settings
def jacobian_sketch(
    model: Any,
    directions: Float[Tensor, "d_model c"],
    texts: Any = None,
    *,
    tokens: Any = None,
    mask: Any = None,
    max_tokens: int | None = None,
    layers: int | Sequence[int] | None = None,
    part: str = "block",
    positions: int | Sequence[int] | None = None,
    reduce: str | None = "mean",
    method: str = "auto",
    sources: str = "same",
    chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Float[Tensor, "layer *token d_model c"]:
    """`J V` for a few directions V, without forming J: what becomes of them on their way through a part.

    Args:
        model: a HookedTransformer or TransformerBridge.
        directions: V, in columns.
        texts, tokens, mask, max_tokens, layers, part, positions, method, sources, chunk, seed, progress: as in
            `layer_jacobians`.
        reduce: "mean" over all tokens, or None for every token's: the axis after the layers is then sequences ×
            positions, in that order.

    Returns:
        On CPU, float32 (float64 for a float64 model).

    Raises:
        ValueError: as `layer_jacobians`; directions of another width.

    Example:
        >>> directions = torch.eye(64)[:, :3]
        >>> jacobian_sketch(model, directions, tokens=torch.arange(12).view(1, 12), layers=[2], progress=False).shape
        torch.Size([1, 64, 3])
    """
    if reduce not in ("mean", None):
        raise ValueError(f'expected reduce "mean" or None, got {reduce!r}; pass reduce="mean"')
    view, notes = ModelView(model), Notes()
    sequences = token_sequences(view, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add)
    request = make_request(view, sequences, layers, part, sources, positions)
    longest = max(sequences, key=len)
    if directions.ndim != 2 or len(directions) != view.d_model:
        raise ValueError(
            f"expected directions [{view.d_model}, c], got {list(directions.shape)}; pass them in columns of R^d_model"
        )
    with exact_products(view.device):
        used = chosen_method(request, longest, method, notes, seed=seed)
    memory = plan_memory(request, len(longest), used, matrices=0, chunk=chunk)
    dtype = working_dtype(view)
    V = directions.to(view.device, dtype)
    found: dict[int, list[Tensor]] = {layer: [] for layer in request.layers}
    kept = sum(len(request.of(len(sequence)).where) for sequence in sequences)
    bar = tqdm(total=len(sequences) * len(request.layers), desc="sketches", unit="layer", disable=not progress)
    with bar, exact_products(view.device):
        for sequence in sequences:
            own = request.of(len(sequence))
            for layer, jacobian in _of_sequence(own, sequence, used, memory):
                with torch.no_grad() if used == "einsum" else torch.enable_grad():
                    JV = _pushed(jacobian, V, own, memory)
                found[layer].append(JV.double().sum(0).cpu() / kept if reduce else JV.cpu())
                bar.update()
    return torch.stack([
        torch.stack(parts).sum(0).to(dtype) if reduce else torch.cat(parts) for parts in found.values()
    ])  # fmt: skip


def _say_what_matters(request: Request, used: str, notes: Notes) -> None:
    view = request.view
    if view.dtype not in (torch.float32, torch.float64):
        notes.add(f"the model computes in {view.dtype}: its activations, and so its Jacobians, are rounded to that")
    if request.sources == "sum" and not request.summed:
        notes.add(f"part {request.part!r} acts token by token: summed over sources and same position are one")
    if used == "einsum" and request.part in ("block", "mlp") and "W_in" not in view.matrices:
        notes.add("the MLPs are mixtures of experts and are differentiated by autograd, each alone, token by token")


def _of_sequence(
    request: Request, sequence: Int[Tensor, " pos"], used: str, memory: MemoryPlan
) -> Iterator[tuple[int, Closed]]:
    if used == "einsum":
        return closed_forms(request, sequence, layers_at_once=memory.layers_at_once)
    return by_autograd(request, sequence, chunk=memory.chunk)


def _mean(jacobian: Closed, request: Request, memory: MemoryPlan) -> Float[Tensor, "d d"]:
    if request.summed:
        return mean_summed(jacobian, _identity(request.view), memory.chunk)  # type: ignore[arg-type]
    return jacobian.mean(memory.chunk)  # type: ignore[union-attr]


def _kept(
    jacobian: Closed, store: Float[Tensor, "token d d"], request: Request, memory: MemoryPlan
) -> Float[Tensor, "d d"]:
    """Write every token's matrix into `store` and return their mean."""
    if request.summed:
        at = 0
        for columns in summed_columns(jacobian, _identity(request.view), memory.chunk):  # type: ignore[arg-type]
            store[:, :, at : at + columns.shape[-1]] = columns
            at += columns.shape[-1]
    else:
        step = memory.chunk if memory.unit == "tokens" else len(store) if request.part in POINTWISE else 1
        for start in range(0, len(store), step):
            part = slice(start, min(start + step, len(store)))
            store[part] = jacobian.at(part).dense()  # type: ignore[union-attr]
    return store.mean(0, dtype=torch.float64)


def _pushed(jacobian: Closed, V: Tensor, request: Request, memory: MemoryPlan) -> Float[Tensor, "token d c"]:
    if request.summed:
        if isinstance(jacobian, GraphJacobian):
            return jacobian.push_everywhere(V)
        return torch.cat([jacobian.push(part) for part in V.split(memory.chunk, -1)], -1)
    return jacobian.push(V.expand(len(request.where), -1, -1))


def _identity(view: ModelView) -> Float[Tensor, "d d"]:
    return torch.eye(view.d_model, dtype=working_dtype(view), device=view.device)


def _singular_values(J: Float[Tensor, "d d"], device: torch.device) -> Float[Tensor, " d"]:
    """Float64, on the model's own device: minutes on a CPU at d = 4096, seconds on a GPU."""
    return torch.linalg.svdvals(J.double().to(device)).cpu()
