"""Training objectives as small callables: `objective(model, batch)` is the scalar loss.

One batch type per kind of data (`TokenBatch` for plain text, `PreferenceBatch` for preferences) and one function
that turns logits into log-probabilities of tokens. An objective is a frozen dataclass of its settings: it holds no
optimiser and keeps no state, so the same object serves training, gradients at a fixed point and a test against a
formula. The model is anything that maps token ids to logits: HookedTransformer, TransformerBridge, or a Hugging
Face model, whose output carries `.logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

LanguageModel = Callable[[Tensor], Any]
"""Maps token ids `[batch, pos]` to logits `[batch, pos, vocab]`, or to an object with such `.logits`."""

BatchT = TypeVar("BatchT", contravariant=True)


@runtime_checkable
class Objective(Protocol[BatchT]):
    """What every objective is: a scalar loss, in nats, of a model on a batch, differentiable in the model."""

    def __call__(self, model: LanguageModel, batch: BatchT) -> Float[Tensor, ""]: ...


@dataclass(frozen=True)
class TokenBatch:
    """Token ids and which of them count. Padding goes on the right and is left out by the mask.

    Raises:
        ValueError: when shapes differ, or a row has nothing to predict.
    """

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    mask: Bool[Tensor, "batch pos"]
    """True where a token is a target, predicted from the tokens before it. The first position is never one,
    whatever the mask says there: nothing comes before it."""

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape != self.mask.shape:
            raise ValueError(
                f"expected tokens and mask of one shape [batch, pos], got {tuple(self.tokens.shape)} and "
                f"{tuple(self.mask.shape)}; pass one mask entry per token"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"expected a boolean mask, got {self.mask.dtype}; pass mask.bool()")
        if not bool(self.mask[:, 1:].any(dim=1).all()):
            raise ValueError(
                "expected at least one target per row after the first position, got a row without; "
                "pass mask=True where a token is to be predicted, and no empty rows"
            )


@dataclass(frozen=True)
class PreferenceBatch:
    """Row i of `chosen` and row i of `rejected` continue the same prompt; the masks cover the continuations.

    Raises:
        ValueError: when the two halves differ in the number of rows.
    """

    chosen: TokenBatch
    """The preferred continuation of each prompt, prompt included in the tokens, left out by the mask."""
    rejected: TokenBatch
    """The other one."""

    def __post_init__(self) -> None:
        chosen, rejected = len(self.chosen.tokens), len(self.rejected.tokens)
        if chosen != rejected:
            raise ValueError(
                f"expected as many chosen rows as rejected, got {chosen} and {rejected}; "
                "pass one rejected continuation for each chosen one"
            )


def next_token_logits(model: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch targets vocab"]:
    """Logits of the tokens from the second position on (`targets = pos - 1`), in at least float32.

    Half-precision logits are widened first: a log-softmax over a vocabulary loses three digits in bfloat16.

    Raises:
        ValueError: when the model returns neither logits nor an object with `.logits`.
    """
    output = model(tokens)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"expected logits [batch, pos, vocab] for tokens {tuple(tokens.shape)}, got {got}; "
            "pass a model that maps token ids to logits"
        )
    logits = logits[:, :-1]
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def sequence_log_probs(model: LanguageModel, batch: TokenBatch) -> Float[Tensor, " batch"]:
    """Log-probability of each row's counted tokens given those before them, summed, in nats.

    Example:
        >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 8)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> sequence_log_probs(uniform, TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        tensor([-4.1589])
    """
    logits = next_token_logits(model, batch.tokens)
    targets = batch.tokens[:, 1:].to(logits.device)
    counted = batch.mask[:, 1:].to(logits.device)
    per_token = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return (per_token * counted).sum(-1)


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy, the mean over all counted tokens of the batch, in nats.

    Raises:
        ValueError: for a temperature that is not positive or a label smoothing outside [0, 1).

    Example:
        >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 8)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> CrossEntropy()(uniform, TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool)))
        tensor(2.0794)
    """

    temperature: float = 1.0
    """Logits are divided by it before the softmax."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the vocabulary."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"expected temperature > 0, got {self.temperature}; pass 1.0 for the plain loss")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"expected 0 <= label_smoothing < 1, got {self.label_smoothing}; pass 0.0 for the plain loss"
            )

    def __call__(self, model: LanguageModel, batch: TokenBatch) -> Float[Tensor, ""]:
        logits = next_token_logits(model, batch.tokens) / self.temperature
        counted = batch.mask[:, 1:].to(logits.device)
        targets = batch.tokens[:, 1:].to(logits.device)
        return F.cross_entropy(logits[counted], targets[counted], label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation: the mean of -log σ(margin) over pairs, in nats.

    The margin of a pair is `β [(log π(c) - log π_ref(c)) - (log π(r) - log π_ref(r))]`, with c chosen and r
    rejected (Rafailov et al. 2023, "Direct Preference Optimization", eq. 7). The reference runs without grad and
    is left as it is; the policy may be the reference itself, whose gradient is then that of the first step.

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 8)
        >>> rows = TokenBatch(torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]]))
        >>> DPO(reference=uniform, beta=0.1)(uniform, PreferenceBatch(rows, rows))
        tensor(0.6931)
    """

    reference: LanguageModel
    """The frozen model the policy is held near, usually the one it started from."""
    beta: float = 0.1
    """How strongly: the inverse temperature of the implicit reward."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"expected beta > 0, got {self.beta}; pass 0.1 for the usual strength")

    def margins(self, model: LanguageModel, batch: PreferenceBatch) -> Float[Tensor, " pair"]:
        """Implicit reward of chosen less that of rejected, per pair, in nats; positive where the pair is ranked
        as preferred. Exactly zero where the model equals the reference."""
        with torch.no_grad():
            ref_c = sequence_log_probs(self.reference, batch.chosen)
            ref_r = sequence_log_probs(self.reference, batch.rejected)
        π_c = sequence_log_probs(model, batch.chosen)
        π_r = sequence_log_probs(model, batch.rejected)
        return self.beta * ((π_c - ref_c) - (π_r - ref_r))

    def __call__(self, model: LanguageModel, batch: PreferenceBatch) -> Float[Tensor, ""]:
        # logsigmoid, not log(sigmoid): finite for margins of any size.
        return -F.logsigmoid(self.margins(model, batch)).mean()
