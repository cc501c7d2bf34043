"""The directions of the residual stream that the unembedding reads."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import exact_products, product_dtype, squares_fit, with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace, principal_subspace
from tl_asymmetry.models.view import ModelView

_VOCABULARY_CHUNK = 16_384


@checked
@with_fresh_settings
def prediction_subspace(
    model: Any, fold_norm: bool = True, centered: bool = True, *, d_vocab: int | None = None
) -> Subspace:
    """All d directions of the residual stream before the final norm, ordered by how strongly the logits read them.

    Left singular vectors of C · diag(γ) W_U minus its mean over the vocabulary, to which softmax is blind; γ is the
    final norm's gain, C = I − 11ᵀ/d for LayerNorm and I for RMSNorm. The definition is ours: arXiv 2605.16600 names
    the prediction subspace and the unembedding, but no formula of it is public.

    Args:
        model: a HookedTransformer or TransformerBridge with raw weights, or a `ModelView` of one.
        fold_norm: apply C · diag(γ); without it the plain W_U.
        centered: take the mean over the vocabulary out.
        d_vocab: use the first so many tokens only, where more were added to the vocabulary; all by default.

    Returns:
        Float64 subspace on CPU, named "prediction"; its eigenvalues are squared singular values. Truncate it for P_k.

    Example:
        >>> from tl_asymmetry.demo import demo_model
        >>> prediction_subspace(demo_model("base")).truncate(4).rank
        4
    """
    view = model if isinstance(model, ModelView) else ModelView(model)
    check_d_vocab(view, d_vocab)
    return principal_subspace(prediction_gram(view, fold_norm, centered, d_vocab=d_vocab), name="prediction")


def predictions_of(view: ModelView) -> dict[str, list[Subspace]]:
    """The prediction subspace under its name, for every layer; nothing where the model predicts no tokens."""
    return {"prediction": [prediction_subspace(view)] * view.n_layers} if view.has_unembedding else {}


def check_d_vocab(view: ModelView, d_vocab: int | None) -> None:
    """Refuse more tokens than the model predicts, or none."""
    most = view.unembedding()[0].shape[1]
    if d_vocab is not None and not 1 <= d_vocab <= most:
        raise ValueError(f"expected d_vocab from 1 to {most}, the tokens predicted, got {d_vocab}; pass None for all")


def prediction_gram(
    view: ModelView, fold_norm: bool = True, centered: bool = True, *, d_vocab: int | None = None
) -> Float[Tensor, "d_model d_model"]:
    """P Pᵀ of P = C · diag(γ) W_U minus its mean over the vocabulary, float64 on CPU; see `prediction_subspace`."""
    W_U, gain, subtracts_mean = view.unembedding()
    W_U = W_U[:, :d_vocab]
    gram, mean = vocabulary_moments(W_U)
    if centered:
        gram = gram - W_U.shape[1] * torch.outer(mean, mean)
    if fold_norm:
        if gain is not None:
            γ = gain.double().cpu()
            gram = γ.unsqueeze(-1) * gram * γ
        if subtracts_mean:
            gram = gram - gram.mean(0, keepdim=True)
            gram = gram - gram.mean(1, keepdim=True)
    return gram


def vocabulary_moments(
    W_U: Float[Tensor, "d_model d_vocab"], dtype: torch.dtype | None = None
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]:
    """W_U W_Uᵀ and the mean column, float64 on CPU; chunks, so that no second copy of W_U is made.

    In float64 where float32 cannot hold the products.
    """
    d, vocabulary = W_U.shape
    gram = torch.zeros(d, d, dtype=torch.float64, device=W_U.device)
    total = torch.zeros(d, dtype=torch.float64, device=W_U.device)
    for start in range(0, vocabulary, _VOCABULARY_CHUNK):
        chunk = W_U[:, start : start + _VOCABULARY_CHUNK]
        chunk = chunk.to(product_dtype(chunk) if dtype is None else dtype)
        with exact_products(W_U.device):
            gram += chunk @ chunk.mT
        total += chunk.sum(1, dtype=torch.float64)
    if dtype is None and not squares_fit(gram.trace() / W_U.numel()):
        return vocabulary_moments(W_U, torch.float64)
    return gram.cpu(), (total / vocabulary).cpu()
