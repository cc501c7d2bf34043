"""Subspaces of the residual stream that have a name: what is read weakly, what no one reads, what two texts differ in.

Those of `READY` need weights alone and are known to `analyze_pair` by name; the others need texts. All are ordered, the
most typical direction first; the definitions are ours, the names' owners stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.precision import exact_products, with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace, ordered_eigh, principal_subspace
from tl_asymmetry.models.capture import capture_moments
from tl_asymmetry.models.prediction import prediction_gram, vocabulary_moments
from tl_asymmetry.models.texts import batches, token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of
from tl_asymmetry.notes import warn

POSITIONS = ("last", "all")


def embedding_subspace(model: Any) -> Subspace:
    """Principal directions of the token embeddings about their mean; eigenvalues: their variance.

    Args:
        model: a HookedTransformer, TransformerBridge or `ModelView`.

    Example:
        >>> embedding_subspace(model).truncate(4).rank
        4
    """
    gram, mean = vocabulary_moments(_view(model).embedding().mT)
    n = len(_view(model).embedding())
    return principal_subspace(gram / n - torch.outer(mean, mean), name="embedding")


def weak_readout_subspace(model: Any) -> Subspace:
    """The directions that the logits read least: `prediction_subspace` from its far end.

    Where LayerNorm takes the mean out, the first of them is the mean itself. Eigenvalues: by how much less than the
    strongest direction's each one's squared gain on the logits is. ("Dark" subspace: Cancedda 2024, arXiv 2402.09221,
    of the plain unembedding.)

    Args:
        model: as in `embedding_subspace`.

    Example:
        >>> from tl_asymmetry.geometry import prediction_subspace
        >>> weak, strong = weak_readout_subspace(model).truncate(4), prediction_subspace(model).truncate(4)
        >>> round(weak.overlap(strong), 6)
        0.0
    """
    λ, Q = ordered_eigh(prediction_gram(_view(model)))
    return Subspace(Q.flip(-1), (λ[0] - λ).flip(-1).clamp(min=0), "weak_readout")


def suppressed_subspace(model: Any) -> Subspace:
    """What W_U alone would read and the logits do not: taken out by the final norm's gain and centring, or by softmax.

    Leading directions of G/tr G − G'/tr G', G = W_U W_Uᵀ and G' that of the prediction matrix (`prediction_subspace`).
    Eigenvalues: the difference of the two shares; directions in which it is negative do not exist.

    Args:
        model: as in `embedding_subspace`.
    """
    view = _view(model)
    return _contrast(prediction_gram(view, fold_norm=False, centered=False), prediction_gram(view), "suppressed")


@with_fresh_settings
def written_not_read_subspaces(model: Any) -> list[Subspace]:
    """After each block: what the blocks so far write and what no later block and no logit reads.

    Leading directions of W/tr W − R/tr R: W = Σ of the write matrices' WᵀW up to that block, R = Σ of the read
    matrices' WWᵀ behind it, each behind its norm's gain, plus the prediction matrix's. Weights alone: nothing is said
    of how often a direction is used. Eigenvalues: the difference of the two shares; directions that are read more than
    written do not exist.

    Args:
        model: as in `embedding_subspace`.

    Returns:
        One for each layer.
    """
    view = _view(model)
    written, read = (torch.zeros(view.n_layers, view.d_model, view.d_model, dtype=torch.float64) for _ in range(2))
    gains = view.headless()
    for layer in range(view.n_layers):
        for matrix in view.matrices:
            kind, W = kind_of(matrix), view.weight(layer, matrix).detach().double()
            with exact_products(W.device):
                gram = (W.mT @ W if kind.writes else W @ W.mT).cpu()
            gram = gram.sum(0) if gram.ndim == 3 else gram
            if kind.writes:
                written[layer] += gram
                continue
            own, first = (f"blocks.{layer}.{norm}.w" for norm in (("ln1" if kind.part == "attn" else "ln2"), "ln1"))
            named = own if own in gains else first  # where one norm serves both
            γ = gains[named].double().cpu() if named in gains else torch.ones(view.d_model, dtype=torch.float64)
            read[layer] += γ.unsqueeze(-1) * gram * γ
    so_far = written.cumsum(0)
    later = read.sum(0) - read.cumsum(0) + prediction_gram(view)
    return [_contrast(W, R, "written_not_read") for W, R in zip(so_far, later, strict=True)]


@checked
def massive_coordinates(
    model: Any,
    texts: Any = None,
    *,
    tokens: Any = None,
    mask: Any = None,
    point: str = "resid_post",
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> list[Subspace]:
    """The stream's coordinates, those of the largest mean square first, the first position of each text included.

    Massive activations (Sun et al. 2024, arXiv 2402.17762) sit in a few fixed coordinates, mostly at the first
    position. How massive they are say the eigenvalues, the mean squares: compare the leading ones with their median.

    Args:
        model: a HookedTransformer or TransformerBridge.
        texts, tokens, mask, max_tokens, batch_size, progress: as in `capture_moments`.
        point: which stream.

    Returns:
        One for each layer; truncate them, all to one rank.

    Raises:
        ValueError: what `capture_moments` refuses.

    Example:
        >>> first = massive_coordinates(model, max_tokens=200, progress=False)[0]
        >>> first.truncate(2).basis.sum(0).tolist()
        [1.0, 1.0]
    """
    moments = capture_moments(
        model, point, texts, tokens=tokens, mask=mask, max_tokens=max_tokens, exclude_first=False,
        batch_size=batch_size, progress=progress,
    )  # fmt: skip
    found = []
    for moment in moments.values():
        squares = moment.second_moment.diagonal()
        order = squares.argsort(descending=True, stable=True)
        found.append(
            Subspace(torch.eye(len(squares), dtype=torch.float64)[:, order], squares[order], "massive_coordinates")
        )
    return found


@checked
@with_fresh_settings
def difference_of_means(
    model: Any,
    texts: Any,
    other_texts: Any,
    *,
    point: str = "resid_post",
    position: str = "last",
    name: str = "difference",
    batch_size: int = 8,
) -> list[Subspace]:
    """The direction in which two sets of texts differ, layer by layer: a refusal direction, or a simple probe.

    mean(texts) − mean(other texts) of the stream, to unit length, its sign kept (Arditi et al. 2024, arXiv 2406.11717,
    whose refusal direction is this of harmful and harmless instructions).

    Args:
        model: a HookedTransformer or TransformerBridge.
        texts, other_texts: strings or chats of either kind; or token ids, `[batch, pos]` or a list of sequences.
        point: which stream.
        position: "last" (of each text) or "all" (but the first).
        name: how tables call it.
        batch_size: sequences per forward pass; the result does not depend on it.

    Returns:
        One direction for each layer: pass `subspaces={"refusal": …}` to `analyze_pair`.

    Raises:
        ValueError: another position, texts that cannot be read, a layer in which the means are the same.

    Example:
        >>> refusal = difference_of_means(model, ["Mira was happy."], ["Tom was sad."], name="mood")
        >>> len(refusal), refusal[0]
        (4, Subspace(mood: 1 of 64 dimensions, no eigenvalues))
    """
    if position not in POSITIONS:
        raise ValueError(f"expected position 'last' or 'all', got {position!r}; pass one of the two")
    view = _view(model)
    means = [_means(view, given, point, position, batch_size) for given in (texts, other_texts)]
    found = []
    for layer, direction in enumerate(means[0] - means[1]):
        if not bool(direction.norm() > 0):
            raise ValueError(f"expected texts that differ at {point}, got equal means in layer {layer}; pass others")
        found.append(Subspace((direction / direction.norm()).unsqueeze(-1), None, name))
    return found


def _means(view: ModelView, given: Any, point: str, position: str, batch_size: int) -> Float64[Tensor, "layer d"]:
    if not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise ValueError(f"expected texts, or token ids, got {shown(given)}; pass a list of strings")
    given = given if isinstance(given, Tensor | str) else list(given)
    spoken = isinstance(given, str) or any(
        isinstance(part, str | Mapping) for first in given[:1] if isinstance(first, Iterable) for part in first
    )
    sequences = token_sequences(view, *((given, None) if spoken else (None, given)), notes=warn)
    sums = torch.zeros(view.n_layers, view.d_model, dtype=torch.float64)
    counted = 0
    with torch.no_grad(), view.evaluating():
        for tokens, mask in batches(sequences, batch_size, causal=view.causal):
            kept = mask.clone()
            kept[:, 0] = False
            if position == "last":
                kept = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
            counted += int(kept.sum())
            here = kept.to(view.device)

            def reader(layer: int, here: Tensor = here) -> Callable[[Tensor], None]:
                def read(x: Tensor) -> None:
                    sums[layer] += x[here].double().sum(0).cpu()

                return read

            with view.hooks({(point, layer): reader(layer) for layer in range(view.n_layers)}):
                view.run(tokens.to(view.device), layers=view.n_layers)
    if not counted:
        raise ValueError("expected texts of two tokens or more with position='all', got shorter ones; pass longer ones")
    return sums / counted


def _contrast(more: Float64[Tensor, "d d"], less: Float64[Tensor, "d d"], name: str) -> Subspace:
    """Directions by how much larger a share of one Gram matrix they hold than of another."""
    λ, Q = ordered_eigh(more / more.trace() - less / less.trace())
    return Subspace(Q, λ.clamp(min=0), name)


def _view(model: Any) -> ModelView:
    return model if isinstance(model, ModelView) else ModelView(model)


def _everywhere(make: Callable[[Any], Subspace]) -> Callable[[ModelView], list[Subspace]]:
    return lambda view: [make(view)] * view.n_layers


READY: Mapping[str, Callable[[ModelView], list[Subspace]]] = MappingProxyType(
    {
        "embedding": _everywhere(embedding_subspace),
        "weak_readout": _everywhere(weak_readout_subspace),
        "suppressed": _everywhere(suppressed_subspace),
        "written_not_read": written_not_read_subspaces,
    }
)
"""Those that weights alone give, by name: what makes them, one for each layer."""
