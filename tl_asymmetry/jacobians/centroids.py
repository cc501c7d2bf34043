"""Centroids: the gradient of a network's output, summed or of one logit, with respect to its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry.arguments import check_draws, checked, shown
from tl_asymmetry.geometry.precision import exact_products, with_fresh_settings
from tl_asymmetry.models.block_jacobians import part_ends
from tl_asymmetry.models.checks import check_unedited
from tl_asymmetry.models.graphs import Edit, Side, frozen, place, run_edited
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.notes import warn

KINDS = ("full", "logit")


@checked
@with_fresh_settings
def centroids(
    model: Any,
    texts: Any = None,
    *,
    tokens: Any = None,
    mask: Any = None,
    max_tokens: int | None = None,
    values: Float[Tensor, "batch pos d_model"] | None = None,
    part: str = "model",
    layer: int | None = None,
    kind: str = "full",
    targets: Int[Tensor, " batch"] | None = None,
    position: int | None = None,
    noise: float = 0.0,
    draws: int = 1,
    seed: int = 0,
    create_graph: bool = False,
) -> Float[Tensor, "batch pos d_model"]:
    """The centroid of each input: which way it would have to move for the output to grow most.

    `kind="full"`: `J_f(x)ᵀ 1`, the gradient of the sum of f's outputs. `kind="logit"`: `∂ logit_y / ∂ x`, y the target.
    Both forms are arXiv 2604.25143's; there f is the whole model and x the token embeddings, with the logit read at
    position 0.

    What f is, by `part`, and x with it:

    - "model": from the stream entering the first block (token and position embeddings added, so that this is the
      gradient for a token's embedding as added) to the logits.
    - "block", "attn", "mlp" (of one `layer`): from the stream entering it to what leaves it, or to what attention or
      the MLP adds, norms included: as in `layer_jacobians`. With `kind="logit"` x is the same, the logit the model's.

    With `noise`, the local centroid: the mean over `draws` inputs x + noise · N(0, I).

    Args:
        model: a HookedTransformer or TransformerBridge.
        texts: strings or lists of chat messages, of as many tokens each; without texts, tokens and values the package's
            calibration texts.
        tokens: token ids instead, `[batch, pos]`, or what a tokenizer returns.
        mask: which tokens are real, of the shape of `tokens`: False at padding.
        max_tokens: use no more tokens than this.
        values: the values of x themselves (embeddings, hidden states) instead of texts or tokens.
        part: "model", "block", "attn" or "mlp".
        layer: which layer, for a part of one.
        kind: "full" or "logit".
        targets: token ids y, one for each sequence (kind "logit"); the model's own first choice by default.
        position: where the output is read. Default: everywhere (the sum) for "full", the last position for "logit".
        noise: standard deviation of the noise, per coordinate.
        draws: noisy inputs to average over.
        seed: of the noise, drawn on the CPU in float64: the same on every device.
        create_graph: keep the graph, so that the centroids can be differentiated by the model's parameters.

    Returns:
        `[batch, pos, d_model]`, in the model's dtype and on its device.

    Raises:
        ValueError: an unknown part or kind, a layer or position out of range, targets of another shape, draws < 1.

    Example:
        >>> tokens = torch.arange(4, 28).view(2, 12)
        >>> centroids(model, tokens=tokens, part="mlp", layer=1).shape
        torch.Size([2, 12, 64])
        >>> local = centroids(model, tokens=tokens, kind="logit", noise=0.01, draws=4)
    """
    view = ModelView(model)
    for warning in check_unedited(view):
        warn(warning)
    if values is None:
        read, given = _rectangle(token_sequences(view, texts, tokens, mask, max_tokens=max_tokens, notes=warn)), None
    else:
        read, given = _placeholders(view, values, texts, tokens)
    begin, finish = _ends(view, part, layer)
    if kind not in KINDS:
        raise ValueError(f'expected kind "full" or "logit", got {kind!r}; pass kind="full"')
    n = read.shape[1]
    if position is not None and not -n <= position < n:
        raise ValueError(f"expected a position from 0 to {n - 1}, got {position}; pass such a position")
    if targets is not None and not isinstance(targets, Tensor):
        raise ValueError(f"expected targets as a tensor of token ids, got {shown(targets)}; pass one, or leave it out")
    if targets is not None and (kind != "logit" or targets.shape != (len(read),) or targets.is_floating_point()):
        raise ValueError(
            f"expected targets as {len(read)} token ids with kind='logit', got {list(targets.shape)} {targets.dtype} "
            f"with kind={kind!r}; pass one id for each sequence"
        )
    if targets is not None and not 0 <= int(targets.min()) <= int(targets.max()) < view.unembedding()[0].shape[1]:
        raise ValueError(
            f"expected targets from 0 to {view.unembedding()[0].shape[1] - 1}, got {int(targets.min())} to "
            f"{int(targets.max())}; pass token ids of this model"
        )
    read_logits = kind == "logit" or part == "model"
    where = -1 if position is None and kind == "logit" else position

    def output(x: Tensor) -> Tensor:
        return _output(view, read, x, begin, None if read_logits else finish)

    def score(out: Tensor) -> Tensor:
        if kind == "full":
            return (out if where is None else out[:, where]).sum()
        logits = out[:, where]
        y = logits.detach().argmax(-1) if targets is None else targets.to(logits.device)
        return logits.gather(-1, y.unsqueeze(-1)).sum()

    with exact_products(view.device), view.evaluating(), _maybe_frozen(view, not create_graph):
        if given is None:
            given = _value_at(view, read, begin)
        return local_centroids(
            output, given, score=score, noise=noise, draws=draws, seed=seed, create_graph=create_graph
        )  # fmt: skip


@checked
@with_fresh_settings
def local_centroids(
    function: Callable[[Tensor], Tensor],
    inputs: Float[Tensor, "batch ..."],
    *,
    score: Callable[[Tensor], Tensor] | None = None,
    noise: float = 0.0,
    draws: int = 1,
    seed: int = 0,
    create_graph: bool = False,
) -> Float[Tensor, "batch ..."]:
    """Gradient of a score of `function(inputs)` with respect to the inputs, averaged over noisy inputs.

    Of any differentiable function; the inputs of a batch must not see each other.

    Args:
        function: from inputs to outputs.
        inputs: `[batch, …]`.
        score: from outputs to one number, a sum over the batch. Default: the sum of the outputs, `J_f(x)ᵀ 1`.
        noise, draws, seed, create_graph: as in `centroids`.

    Raises:
        ValueError: draws < 1, negative noise, or a score that is no single number.

    Example:
        >>> W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> local_centroids(lambda x: x @ W, torch.zeros(1, 2))
        tensor([[3., 7.]])
    """
    check_draws(draws, usual=1)
    for name, given in (("function", function), ("score", score)):
        if not callable(given) and not (name == "score" and given is None):
            raise ValueError(f"expected {name} as a function of a tensor, got {shown(given)}; pass one")
    if not noise >= 0:
        raise ValueError(f"expected noise >= 0, got {noise}; pass noise=0.0 for the input itself")
    generator = torch.Generator().manual_seed(seed)
    total: Tensor | None = None
    with torch.enable_grad():
        for _ in range(draws):
            x = inputs.detach().clone()
            if noise:
                x += noise * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
            x.requires_grad_()
            out = function(x)
            if score is None and not isinstance(out, Tensor):
                raise ValueError(f"expected a function whose output is a tensor, got {shown(out)}; pass score= as well")
            value = out.sum() if score is None else score(out)
            if not isinstance(value, Tensor) or value.ndim:
                raise ValueError(f"expected one number as the score, got {shown(value)}; pass score= with a sum")
            (grad,) = torch.autograd.grad(value, x, create_graph=create_graph)
            total = grad if total is None else total + grad
    assert total is not None
    return total / draws


def _rectangle(sequences: Sequence[Int[Tensor, " _pos"]]) -> Int[Tensor, "batch pos"]:
    lengths = {len(sequence) for sequence in sequences}
    if len(lengths) > 1:
        raise ValueError(
            f"expected sequences of one length, got lengths from {min(lengths)} to {max(lengths)}; pass those of one "
            "length in each call"
        )
    return torch.stack(list(sequences))


def _placeholders(view: ModelView, values: Any, texts: Any, tokens: Any) -> tuple[Tensor, Tensor]:
    """Token ids to run, which do not matter, and the values of x that take their place."""
    if texts is not None or tokens is not None:
        raise ValueError("expected values, texts or tokens, got several of them; pass one of the three")
    if (
        not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim != 3
        or values.shape[-1] != view.d_model or not 1 <= values.shape[1] <= view.n_ctx
    ):  # fmt: skip
        got = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"expected values [batch, pos, {view.d_model}] with pos up to {view.n_ctx}, got {got}; pass hidden states "
            "or embeddings of this model"
        )
    return torch.zeros(values.shape[:2], dtype=torch.int64), values.to(view.device, view.dtype)


def _ends(view: ModelView, part: str, layer: int | None) -> tuple[Side, Side | None]:
    if part not in ("model", "block", "attn", "mlp"):
        raise ValueError(f"expected a part among model, block, attn, mlp, got {part!r}; pass one of these")
    if part == "model":
        if layer is not None:
            raise ValueError(f'expected no layer with part "model", got {layer}; pass part="block" or leave it out')
        begin = place(view, 0, "resid_pre")
        assert begin is not None
        return begin, None
    if layer is None or not -view.n_layers <= layer < view.n_layers:
        raise ValueError(f"expected a layer from 0 to {view.n_layers - 1}, got {layer}; pass layer= with part={part!r}")
    return part_ends(view, layer % view.n_layers, part)[:2]


def _output(view: ModelView, tokens: Tensor, x: Tensor, begin: Side, finish: Side | None) -> Tensor:
    """What the part (or the model: its logits) makes of x put in the place of its input."""
    edits: dict[Side, Edit] = {begin: lambda _: x}
    if finish is None:
        logits = run_edited(view, tokens, edits, logits=True)
        assert logits is not None
        return logits
    seen: list[Tensor] = []
    run_edited(view, tokens, {**edits, finish: seen.append}, last=finish)
    return seen[0]


def _value_at(view: ModelView, tokens: Tensor, begin: Side) -> Tensor:
    """What the model itself has at the part's input."""
    seen: list[Tensor] = []
    with torch.no_grad():
        run_edited(view, tokens, {begin: seen.append}, last=begin)
    return seen[0]


@contextmanager
def _maybe_frozen(view: ModelView, wanted: bool) -> Iterator[None]:
    if wanted:
        with frozen(view):
            yield
    else:
        yield
