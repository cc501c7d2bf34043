"""Refusals before anything heavy runs: models that cannot be compared, weights and tokens that would mislead.

Every check raises ValueError("expected ..., got ...; pass ...") or returns the warnings a result should
carry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.models.configurations import strange_families
from tl_asymmetry.models.put_in import refuse_elsewhere
from tl_asymmetry.models.readers.base import Weights, WeightSource
from tl_asymmetry.models.texts import vocabulary_fingerprint
from tl_asymmetry.models.view import ModelView

_SHAPES = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp")
_ARCHITECTURE = ("norm", "positional", "parallel", "causal", "matrices")

_PIECE = 1 << 24
"""Entries of a tensor that are summed at once."""

_NAMED = 4
"""So many hooks are named in a warning."""

_PROBES = (
    "The quick brown fox, it's said, jumped over 12,345 lazy dogs!",
    "def f(x):\n    return {'a': x ** 2}  # naïve café – 東京 🙂",
    "  leading spaces\tand tabs\n\nand blank lines",
)
"""Texts on which two tokenizers of one vocabulary must agree."""


# --- weights --------------------------------------------------------------------------------------


def check_raw(view: Weights) -> list[str]:
    """Refuse processed weights: a difference of processed weights is no difference of the models.

    Evidence is taken from the weights, so that a model trained from scratch, with gains of one and biases of
    zero, is not refused.

    Returns:
        Warnings: what cannot be told from the weights, and what `check_unedited` says.

    Raises:
        ValueError: names every processing flag found and says how to load without.
    """
    flags, warnings = (stored_processing_flags(view), []) if isinstance(view, WeightSource) else processing_flags(view)
    if not flags:
        return warnings + (check_unedited(view) if isinstance(view, ModelView) else [])
    if isinstance(view, WeightSource):
        instead = "the state dict of a model loaded with from_pretrained_no_processing"
    else:
        instead = view._adapter.raw_instead(flags)
    raise ValueError(
        f"expected raw weights, got {view.kind} {view.name!r} with processed weights ({', '.join(flags)}); "
        f"pass {instead}"
    )


def check_unedited(view: ModelView) -> list[str]:
    """A warning that names the hooks, and the modules in hook points, with which a model does not compute as loaded."""
    found = view.foreign_hooks()
    if not found:
        return []
    listed = ", ".join(found[:_NAMED]) + (f" and {len(found) - _NAMED} more" if len(found) > _NAMED else "")
    return [
        f"{view.name!r} is analysed with what has been put into it: {listed}; where that edits activations the numbers "
        "are those of the edited model (model.reset_hooks() takes hooks off)"
    ]


def check_predicts_its_tokens(view: ModelView) -> None:
    """Refuse a model without an output for every token that it reads: nothing says which output a token is.

    Raises:
        ValueError: how many there are of each.
    """
    outputs = view.unembedding()[0].shape[1]
    if outputs < view.d_vocab:
        raise ValueError(
            f"expected a model that predicts the tokens it reads, got {outputs} outputs for {view.d_vocab} tokens in "
            f"{view.name!r}; pass a language model, or an objective without next tokens such as InfoNCE"
        )


def stored_processing_flags(source: WeightSource) -> list[str]:
    """The processing flags for which weights in files show evidence: only TransformerLens's own can have any."""
    if source.kind != "TransformerLens weights":
        return []
    layers = sorted({0, source.n_layers // 2, source.n_layers - 1})
    W_O, W_V = (torch.cat([source.weight(i, matrix).double() for i in layers]) for matrix in ("W_O", "W_V"))
    flags = []
    if source.norm == "LN" and _is_centred(W_O, dim=-1, dtype=source.dtype):
        flags.append("center_writing_weights")
    W_U = source.headless(include_tied=True).get("unembed.W_U")
    if W_U is not None and _is_centred(W_U[:128].double(), dim=-1, dtype=source.dtype):
        flags.append("center_unembed")
    if _is_refactored(W_O, W_V):
        flags.append("refactor_factored_attn_matrices")
    return flags


def processing_flags(view: ModelView) -> tuple[list[str], list[str]]:
    """The processing flags for which the model shows evidence, by TransformerLens's names, and warnings."""
    adapter = view._adapter
    # processing touches every layer and row alike: three layers and some rows tell, without a second copy of it all
    layers = sorted({0, view.n_layers // 2, view.n_layers - 1})

    def stacked(matrix: str) -> Tensor:
        return torch.cat([view._weight(i, matrix).double().flatten(0, -3) for i in layers])

    flags, warnings = [], []
    if not adapter.may_be_processed:
        return [], []

    if adapter.tells_folded_norms:
        if adapter.norms_are_folded and view.norm == "LN":
            # Folding a LayerNorm also centres what reads from it; a model trained without gains is not
            # centred.
            if _is_centred(stacked("W_Q"), dim=-2, dtype=view.dtype):
                flags.append("fold_ln")
        elif adapter.norms_are_folded:
            if getattr(view.model.cfg, "original_architecture", None) is not None:
                flags.append("fold_ln")
            else:
                warnings.append(
                    f"{view.name!r} has RMS norms without gains: right for a model trained so, but if the gains were "
                    "folded into the weights (fold_ln), differences of weights are distorted"
                )
    elif all(_is_neutral(gain) for gain in _block_gains(view)):
        flags.append("fold_ln")

    W_O = stacked("W_O")
    if view.norm == "LN" and _is_centred(W_O, dim=-1, dtype=view.dtype):
        flags.append("center_writing_weights")
    if _is_centred(view.unembedding()[0][:128].double(), dim=-1, dtype=view.dtype):
        flags.append("center_unembed")
    if _is_refactored(W_O, stacked("W_V")):
        flags.append("refactor_factored_attn_matrices")  # explains zero value biases as well
    elif _value_biases_are_folded(view):
        flags.append("fold_value_biases")
    return flags, warnings


def _block_gains(view: ModelView) -> list[Tensor]:
    headless = view.headless()
    return [headless[name] for name in headless if name.endswith((".ln1.w", ".ln2.w"))]


def _is_neutral(gain: Tensor) -> bool:
    return bool((gain == 1).all())


def _is_centred(W: Tensor, dim: int, dtype: torch.dtype) -> bool:
    """Whether the mean over `dim` is rounding error: for random entries ‖mean‖ · n / ‖W‖ is about 1."""
    norm = W.norm()
    if norm == 0:
        return False
    threshold = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    return bool(W.mean(dim).norm() * W.shape[dim] / norm < threshold)


def _value_biases_are_folded(view: ModelView) -> bool:
    def biases(matrix: str) -> list[Tensor]:
        return [b for i in range(view.n_layers) if (b := view.bias(i, matrix)) is not None]

    values, outputs = biases("W_V"), biases("W_O")
    if not values or any(b.any() for b in values) or not any(b.any() for b in outputs):
        return False
    # GPT-Neo has an output bias, but neither query, key nor value biases: there nothing was folded
    return any(b.any() for b in biases("W_Q") + biases("W_K"))


def _is_refactored(W_O: Tensor, W_V: Tensor) -> bool:
    """W_O with orthonormal rows and W_V with orthogonal columns of falling norm, as the SVD of W_V W_O leaves
    them."""
    if W_O.shape[0] != W_V.shape[0]:
        return False
    identity = torch.eye(W_O.shape[1], dtype=W_O.dtype, device=W_O.device)
    if not torch.allclose(W_O @ W_O.mT, identity.expand(len(W_O), -1, -1), atol=1e-3):
        return False
    G = W_V.mT @ W_V
    squares = G.diagonal(dim1=-2, dim2=-1)
    scale = squares.amax(-1)
    off = (G - torch.diag_embed(squares)).abs().amax((-2, -1))
    falling = (squares.diff(dim=-1) <= 1e-3 * scale[:, None]).all()
    unequal = (squares[:, -1] < 0.999 * squares[:, 0]).any()
    return bool((off <= 1e-3 * scale).all() and falling and unequal)


def check_finite(weights: Weights, role: str = "model") -> None:
    """Refuse NaN and infinite weights, and such as are not there, naming the first tensor that has some.

    Args:
        weights: a model, or weights in files.
        role: what to call it in the message, such as "base model".
    """
    check = finite_check(weights, role)
    for name, weight, _ in weights.unscaled_weights():
        check(name, weight)


def finite_check(weights: Weights, role: str = "model") -> Callable[[str, Tensor], None]:
    """The check of one tensor at a time: a function of its name and the tensor that raises.

    Float32 sums decide, of pieces: a sum in another type copies what it adds up, and an embedding is large. Only a
    tensor with a sum that is not finite is looked at entry by entry.
    """

    def check(name: str, weight: Tensor) -> None:
        refuse_elsewhere(name, weight, f"the {role} ({weights.name!r})")
        rows = max(1, _PIECE * len(weight) // max(1, weight.numel())) if weight.ndim else 0
        pieces = weight.split(rows) if weight.ndim else [weight]
        if not weight.is_floating_point() or all(
            bool(torch.isfinite(piece.sum(dtype=torch.float32))) for piece in pieces
        ):
            return
        nan, infinite = int(weight.isnan().sum()), int(weight.isinf().sum())
        if nan or infinite:  # else the sum of finite numbers overflowed
            raise ValueError(
                f"expected finite weights, got {nan} NaN and {infinite} infinite values in {name} of the {role} "
                f"({weights.name!r}); pass a model whose training did not diverge, loaded in a type wide enough "
                "(dtype=torch.float32)"
            )

    return check


# --- pairs ----------------------------------------------------------------------------------------


def check_subtractable(view: ModelView) -> None:
    """Refuse a quantised model where weights are to be subtracted: activations are all that it can give.

    Raises:
        ValueError: naming the first matrix.
    """
    for name, weight, _ in view.unscaled_weights():
        if weight.ndim > 1 and not weight.is_floating_point():
            raise ValueError(
                f"expected weights that can be subtracted, got the quantised {view.name!r} ({weight.dtype} in {name}), "
                "of which a difference shows the quantisation; pass the model loaded without it (this one can give "
                "activations: capture_moments)"
            )


def check_pair(base: ModelView, aligned: Weights, read: Collection[int] | None = None) -> list[str]:
    """Refuse two models whose matrices cannot be subtracted entry by entry.

    Args:
        base: the base.
        aligned: the aligned model.
        read: the token ids that texts were read as, empty where ids were given, for weights that are compared and not
            run: tokenizers that differ in no others are noted, not refused, and of two vocabularies the rows count that
            both have. None: every token counts.

    Returns:
        Warnings: two families of architectures, rows of a vocabulary that only one of the two has, tokenizers that
            could not be compared, or differ in what is not used.

    Raises:
        ValueError: different shapes, architectures, or tokenizers of the texts.
    """
    check_shapes(base, aligned)
    return [*strange_families(base, aligned), *check_tokenizers(base, aligned, read)]


def check_shapes(base: Weights, aligned: Weights) -> None:
    """Refuse two models of different shapes or architectures; no tokenizer is asked for."""
    for field in _SHAPES + _ARCHITECTURE:
        ours, theirs = getattr(base, field), getattr(aligned, field)
        if ours != theirs:
            raise ValueError(
                f"expected two models of one architecture, got {field} {ours} (base, {base.name!r}) and {theirs} "
                f"(aligned, {aligned.name!r}); pass the base that the aligned model was trained from"
            )
    if base.positional == "standard" and base.n_ctx != aligned.n_ctx:
        raise ValueError(
            f"expected as many positions in both models, got n_ctx {base.n_ctx} (base) and {aligned.n_ctx} (aligned); "
            "pass the base that the aligned model was trained from"
        )


def check_tokenizers(base: ModelView, aligned: Weights, read: Collection[int] | None = None) -> list[str]:
    """Refuse models that read texts differently; the part of `check_pair` about vocabularies."""
    warnings = []
    if aligned.d_vocab < base.d_vocab and read is None:
        raise ValueError(
            f"expected an aligned vocabulary that begins with the base's {base.d_vocab} tokens, got {aligned.d_vocab}; "
            "pass the base that the aligned model was trained from"
        )
    if aligned.d_vocab != base.d_vocab:
        apart = aligned.d_vocab - base.d_vocab
        more, whose = ("more", "its") if apart > 0 else ("fewer", "the base's")
        warnings.append(
            f"the aligned model has {abs(apart)} {more} tokens than the base ({aligned.d_vocab} and {base.d_vocab}): "
            f"these rows of {whose} embedding and unembedding are left out"
        )
    ours, theirs = base.tokenizer, aligned.tokenizer
    if isinstance(aligned, WeightSource) and aligned.only_changes:
        return warnings  # an adapter reads texts with its base's tokenizer
    if ours is None or theirs is None:
        if (ours is None) != (theirs is None):
            warnings.append(f"the {'base' if ours is None else 'aligned'} model has no tokenizer: vocabularies were "
                            "compared by size only")  # fmt: skip
        return warnings
    if vocabulary_fingerprint(ours) != vocabulary_fingerprint(theirs):
        base_vocabulary, aligned_vocabulary = ours.get_vocab(), theirs.get_vocab()
        moved = [t for t, i in base_vocabulary.items() if aligned_vocabulary.get(t) != i]
        in_use = moved if read is None else [token for token in moved if base_vocabulary[token] in read]
        if moved:
            token = min(in_use or moved, key=base_vocabulary.__getitem__)
            there = aligned_vocabulary.get(token, "missing")
            difference = (
                f"{len(in_use or moved)} that differ, the first being {token!r}: {base_vocabulary[token]} (base) and "
                f"{there} (aligned)"
            )
            if in_use:
                raise ValueError(
                    f"expected tokenizers with the same tokens, got {difference}; pass models with one tokenizer, the "
                    "aligned one with tokens added at the end at most, or tokens= made by the base's"
                )
            warnings.append(f"the tokenizers have {difference}; none of them is used here")
        added = len(set(aligned_vocabulary) - set(base_vocabulary))
        warnings.append(f"the aligned tokenizer has {added} added tokens; texts are read with the base's tokenizer")
    for probe in () if read is not None and not read else _PROBES:  # ids that were given are not split
        a, b = (t.encode(probe, add_special_tokens=False) for t in (ours, theirs))
        if a != b:
            raise ValueError(
                f"expected tokenizers that split texts alike, got {len(a)} tokens (base) and {len(b)} (aligned), not "
                f"the same ones, for {probe!r}; pass models with one tokenizer"
            )
    return warnings


# --- ranks -----------------------------------------------------------------------------


def check_ranks(ranks: Any, d: int) -> tuple[int, ...]:
    """The distinct ranks in rising order; refuses what is no integer from 1 to d - 1, or a list of them."""
    listed: Any = [ranks] if isinstance(ranks, Real) and not isinstance(ranks, bool) else ranks
    listed = list(listed) if isinstance(listed, Iterable) and not isinstance(listed, str | bytes) else []
    if not listed:
        raise ValueError(f"expected a list of ranks, got {ranks!r}; pass ranks=[1, 4, 16] or leave it out")
    for rank in listed:
        number = rank if isinstance(rank, Real) and not isinstance(rank, bool) else math.nan
        if not 0 < float(number) < d or float(number) % 1:
            raise ValueError(f"expected ranks from 1 to {d - 1} (d_model - 1), got {rank!r}; pass such ranks")
    return tuple(sorted({int(rank) for rank in listed}))


def check_token_count(count: int, ranks: Sequence[int]) -> None:
    """Refuse fewer tokens than the largest rank: a subspace of rank k needs k of them at least."""
    largest = max(ranks)
    if count < largest:
        raise ValueError(
            f"expected at least as many tokens as the largest rank ({largest}), got {count} after exclusions; "
            "pass more texts or smaller ranks"
        )
