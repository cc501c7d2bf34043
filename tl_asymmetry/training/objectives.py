"""Training objectives as small callables: `objective(model, batch)` is the scalar loss.

One batch type per kind of data (`TokenBatch` for plain text, `PreferenceBatch` for preferences) and one function
that turns logits into log-probabilities of tokens. An objective is a frozen dataclass of its settings: it holds no
optimiser and keeps no state, so the same object serves training, gradients at a fixed point and a test against a
formula. The model is anything that maps token ids to logits: HookedTransformer, TransformerBridge, or a Hugging
Face model, whose output carries `.logits`.

    >>> from tl_asymmetry.demo import demo_texts, demo_tokenizer
    >>> rows = demo_tokenizer()(demo_texts(2, seed=0), padding=True, return_tensors="pt")
    >>> batch = TokenBatch(rows["input_ids"], rows["attention_mask"].bool())
    >>> loss = CrossEntropy(temperature=2.0)(model, batch)
    >>> loss.backward()  # as in any training loop
    >>> model.zero_grad(set_to_none=True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.training.batches import PreferenceBatch, TokenBatch

__all__ = [
    "DPO",
    "ORPO",
    "CrossEntropy",
    "InfoNCE",
    "LanguageModel",
    "Mix",
    "Objective",
    "PreferenceBatch",
    "TokenBatch",
    "next_token_logits",
    "objective_name",
    "sequence_log_probs",
]

LanguageModel = Callable[[Tensor], Any]
"""Maps token ids `[batch, pos]` to logits `[batch, pos, vocab]`, or to an object with such `.logits`."""

BatchT = TypeVar("BatchT", contravariant=True)


@runtime_checkable
class Objective(Protocol[BatchT]):
    """What every objective is: a scalar loss, in nats, of a model on a batch, differentiable in the model."""

    def __call__(self, model: LanguageModel, batch: BatchT) -> Float[Tensor, ""]:
        """The loss: a mean over `count(batch)` terms."""
        ...

    @property
    def batch_type(self) -> type[Any]:
        """`TokenBatch` or `PreferenceBatch`."""
        ...

    @property
    def passes(self) -> tuple[str, ...]:
        """Names of the forward passes with gradients that one call makes, in their order; "" where there is one."""
        ...

    @property
    def additive(self) -> bool:
        """Whether loss × count, summed over the parts of a split batch, is that of the whole.

        False where rows of a batch meet (InfoNCE's negatives), or means over different things are added: there the
        batch is part of the objective's definition.
        """
        ...

    def count(self, batch: BatchT) -> int:
        """How many terms the loss is the mean of: tokens, pairs or sequences."""
        ...

    def token_weights(self, batch: BatchT) -> tuple[Float[Tensor, "batch _pos"], ...]:
        """How each token enters the loss, one tensor for each of `passes`.

        The weight of the token's log-probability (for InfoNCE of its hidden state in the pooled mean), before
        whatever non-linear function of a row or a pair follows.
        """
        ...


def next_token_logits(model: LanguageModel, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch targets vocab"]:
    """Logits of the tokens from the second position on (`targets = pos - 1`), in at least float32.

    Half-precision logits are widened first: a log-softmax over a vocabulary loses three digits in bfloat16.

    Raises:
        ValueError: when the model returns neither logits nor an object with `.logits`.
    """
    pads_left = getattr(getattr(model, "tokenizer", None), "padding_side", None) == "left"
    if pads_left and hasattr(model, "blocks") and not isinstance(model, ModelView):
        # A HookedTransformer with such a tokenizer would take pad tokens within the text for padding.
        model = ModelView(model)
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
    per_token, counted = _log_probs(model, batch)
    return (per_token * counted).sum(-1)


def _log_probs(model: LanguageModel, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of every token from the second position on, and which of them count; `[batch, pos - 1]`."""
    logits = next_token_logits(model, batch.tokens)
    _require_outputs(batch.tokens[:, 1:], logits.shape[-1])
    targets = batch.tokens[:, 1:].to(logits.device)
    counted = batch.mask[:, 1:].to(logits.device)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0], counted


def _require_outputs(targets: Tensor, outputs: int) -> None:
    """Refuse tokens that a model reads but cannot predict."""
    largest = int(targets.max()) if targets.numel() else 0
    if largest >= outputs:
        raise ValueError(
            f"expected targets that the model can predict, tokens 0 to {outputs - 1}, got token {largest}; pass a "
            "model that predicts the tokens it reads, or an objective without targets such as InfoNCE"
        )


def _targets(batch: TokenBatch) -> Tensor:
    """1.0 at every token that counts: the mask without the first position."""
    weights = batch.mask.double()
    weights[:, 0] = 0
    return weights


@checked
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
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"expected temperature > 0, got {self.temperature}; pass 1.0 for the plain loss")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"expected 0 <= label_smoothing < 1, got {self.label_smoothing}; pass 0.0 for the plain loss"
            )

    def __call__(self, model: LanguageModel, batch: TokenBatch) -> Float[Tensor, ""]:
        _require(batch, TokenBatch, "CrossEntropy")
        logits = next_token_logits(model, batch.tokens) / self.temperature
        _require_outputs(batch.tokens[:, 1:][batch.mask[:, 1:]], logits.shape[-1])
        counted = batch.mask[:, 1:].to(logits.device)
        targets = batch.tokens[:, 1:].to(logits.device)
        return F.cross_entropy(logits[counted], targets[counted], label_smoothing=self.label_smoothing)

    @property
    def batch_type(self) -> type[TokenBatch]:
        return TokenBatch

    @property
    def passes(self) -> tuple[str, ...]:
        return ("",)

    @property
    def additive(self) -> bool:
        return True

    def count(self, batch: TokenBatch) -> int:
        """Counted tokens."""
        return int(batch.mask[:, 1:].sum())

    def token_weights(self, batch: TokenBatch) -> tuple[Float[Tensor, "batch _pos"], ...]:
        return (_targets(batch) / -self.count(batch),)


@checked
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
        if not callable(self.reference):
            raise ValueError(f"expected reference as a model, got {shown(self.reference)}; pass one, not its name")
        if not 0 < self.beta < float("inf"):
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
        _require(batch, PreferenceBatch, "DPO")
        # logsigmoid, not log(sigmoid): finite for margins of any size.
        return -F.logsigmoid(self.margins(model, batch)).mean()

    @property
    def batch_type(self) -> type[PreferenceBatch]:
        return PreferenceBatch

    @property
    def passes(self) -> tuple[str, ...]:
        return ("chosen", "rejected")

    @property
    def additive(self) -> bool:
        return True

    def count(self, batch: PreferenceBatch) -> int:
        """Pairs."""
        return len(batch)

    def token_weights(self, batch: PreferenceBatch) -> tuple[Float[Tensor, "batch _pos"], ...]:
        """±β at the continuations' tokens: the token's weight in its pair's margin."""
        return self.beta * _targets(batch.chosen), -self.beta * _targets(batch.rejected)


@checked
@dataclass(frozen=True)
class ORPO:
    """Odds-ratio preference optimisation: cross-entropy on the chosen text less β log σ(log odds ratio), in nats.

    The odds of a continuation are p / (1 − p), with log p the mean log-probability of its tokens (Hong, Lee & Thorne
    2024, "ORPO: Monolithic Preference Optimization without Reference Model", eqs. 3–7). No reference model.

    The cross-entropy is a mean over the batch's tokens and the odds term a mean over its pairs, as in trl; so halves of
    a batch whose rows differ in length do not add up to the whole (`additive`).

    Raises:
        ValueError: for a beta that is not positive.

    Example:
        >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 8)
        >>> rows = TokenBatch(torch.tensor([[1, 2, 3]]), torch.tensor([[False, False, True]]))
        >>> ORPO(beta=0.1)(uniform, PreferenceBatch(rows, rows))  # log 8 + 0.1 log 2
        tensor(2.1488)
    """

    beta: float = 0.1
    """Weight of the odds-ratio term (λ in the paper)."""
    prompt_loss: bool = True
    """Whether the cross-entropy also counts the prompt's tokens, as trl does; False counts the continuation alone, as
    the paper writes it."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"expected beta > 0, got {self.beta}; pass 0.1 for the usual strength")

    def __call__(self, model: LanguageModel, batch: PreferenceBatch) -> Float[Tensor, ""]:
        _require(batch, PreferenceBatch, "ORPO")
        of_chosen, counted = _log_probs(model, batch.chosen)
        spoken = self._spoken(batch.chosen)[:, 1:].to(of_chosen.device)
        cross_entropy = -of_chosen[spoken].mean()
        log_p_c = (of_chosen * counted).sum(-1) / counted.sum(-1)
        of_rejected, counted = _log_probs(model, batch.rejected)
        log_p_r = (of_rejected * counted).sum(-1) / counted.sum(-1)
        # A probability that rounds to 1 has infinite odds, and two of them no ratio.
        certain = -torch.finfo(log_p_c.dtype).eps
        log_p_c, log_p_r = log_p_c.clamp(max=certain), log_p_r.clamp(max=certain)
        log_odds_ratio = (log_p_c - log_p_r) - (_log1mexp(log_p_c) - _log1mexp(log_p_r))
        return cross_entropy - self.beta * F.logsigmoid(log_odds_ratio).mean()

    def _spoken(self, chosen: TokenBatch) -> Tensor:
        """The tokens of the cross-entropy: all up to the last one that counts, or those that count."""
        if not self.prompt_loss:
            return chosen.mask
        positions = torch.arange(chosen.mask.shape[1], device=chosen.mask.device)
        return positions < chosen.lengths.unsqueeze(1)

    @property
    def batch_type(self) -> type[PreferenceBatch]:
        return PreferenceBatch

    @property
    def passes(self) -> tuple[str, ...]:
        return ("chosen", "rejected")

    @property
    def additive(self) -> bool:
        return False

    def count(self, batch: PreferenceBatch) -> int:
        """Pairs."""
        return len(batch)

    def token_weights(self, batch: PreferenceBatch) -> tuple[Float[Tensor, "batch _pos"], ...]:
        """1 / length at the continuations' tokens, negative for the rejected: the weights in the log-odds ratio."""
        chosen, rejected = (_targets(half) for half in (batch.chosen, batch.rejected))
        return chosen / chosen.sum(1, keepdim=True), -rejected / rejected.sum(1, keepdim=True)


@checked
@dataclass(frozen=True)
class InfoNCE:
    """Contrast of two crops of each sequence against the crops of all others in the batch, in nats.

    Every row's counted tokens are cut in two contiguous halves of about one length. Each crop is run by itself (the
    first with what precedes it, the second behind the row's first token, so that neither sees the other), and its
    residual stream is averaged over the crop's counted tokens. The loss is the mean over rows of
    `−log softmax_j(cos(h_i, h'_j) / τ)` at j = i (van den Oord, Li & Vinyals 2018, eq. 4; crops as views: Izacard et
    al. 2022). What is pooled, and where, is our choice.

    The rows of a batch are each other's negatives, so the batch is part of the definition.

    Raises:
        ValueError: for a temperature that is not positive; when called with a model that is none of TransformerLens's,
            with one row, or with a row of one counted token.

    Example:
        >>> tokens = torch.arange(4, 44).view(2, 20)
        >>> loss = InfoNCE(temperature=0.5)(model, TokenBatch(tokens, tokens > 0))
        >>> bool(0 < loss < 4)
        True
    """

    temperature: float = 0.1
    """Cosines are divided by it: small is sharp."""
    layer: int | None = None
    """The block whose output is pooled, before any final norm; None for the last."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"expected temperature > 0, got {self.temperature}; pass 0.1 for the usual sharpness")

    def __call__(self, model: LanguageModel, batch: TokenBatch) -> Float[Tensor, ""]:
        _require(batch, TokenBatch, "InfoNCE")
        if len(batch) < 2:
            raise ValueError(
                "expected two sequences or more for InfoNCE, got one: without others there is nothing to contrast "
                "with; pass a larger batch"
            )
        view = model if isinstance(model, ModelView) else ModelView(model)
        first, second = (F.normalize(self._pooled(view, crop), dim=-1) for crop in _crops(batch))
        similarities = first @ second.mT / self.temperature
        return F.cross_entropy(similarities, torch.arange(len(batch), device=similarities.device))

    def _pooled(self, view: ModelView, crop: TokenBatch) -> Float[Tensor, "batch d_model"]:
        layer = view.n_layers - 1 if self.layer is None else self.layer
        seen: list[Tensor] = []
        with view.hooks({("resid_post", layer): seen.append}):
            view.run(crop.tokens)
        x = seen[0] if seen[0].dtype == torch.float64 else seen[0].float()
        weights = crop.mask.to(x)
        return (weights.unsqueeze(1) @ x)[:, 0] / weights.sum(1, keepdim=True)

    @property
    def batch_type(self) -> type[TokenBatch]:
        return TokenBatch

    @property
    def passes(self) -> tuple[str, ...]:
        return ("first crop", "second crop")

    @property
    def additive(self) -> bool:
        return False

    def count(self, batch: TokenBatch) -> int:
        """Sequences."""
        return len(batch)

    def token_weights(self, batch: TokenBatch) -> tuple[Float[Tensor, "batch _pos"], ...]:
        """1 / length at the counted tokens of each crop, in the crop's own positions."""
        crops = (crop.mask.double() for crop in _crops(batch))
        return tuple(mask / mask.sum(1, keepdim=True) for mask in crops)


def _crops(batch: TokenBatch) -> tuple[TokenBatch, TokenBatch]:
    """The two halves of every row's counted tokens, each a batch of its own, padded with token 0."""
    halves: tuple[list[Tensor], list[Tensor]] = [], []
    masks: tuple[list[Tensor], list[Tensor]] = [], []
    for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
        counted = mask.clone()
        counted[0] = False
        places = counted.nonzero()[:, 0]
        if len(places) < 2:
            raise ValueError(
                "expected two counted tokens or more in every row for InfoNCE, got a row of one; pass longer texts"
            )
        middle = int(places[len(places) // 2])
        end = int(places[-1]) + 1
        for side, kept in enumerate(
            (torch.arange(middle), torch.cat([torch.zeros(1).long(), torch.arange(middle, end)]))
        ):
            kept = kept.to(tokens.device)
            halves[side].append(tokens[kept])
            masks[side].append(counted[kept])
    padded = torch.nn.utils.rnn.pad_sequence
    first, second = (
        TokenBatch(padded(h, batch_first=True, padding_value=0), padded(m, batch_first=True, padding_value=False))
        for h, m in zip(halves, masks, strict=True)
    )
    return first, second


def _is_part(given: Any) -> bool:
    """Whether this is a weight and an objective."""
    return (
        isinstance(given, Sequence) and len(given) == 2 and isinstance(given[0], int | float) and is_objective(given[1])
    )


@dataclass(frozen=True)
class Mix:
    """A weighted sum of objectives on one batch, e.g. `Mix((0.9, CrossEntropy()), (0.1, InfoNCE()))`.

    Args:
        parts: pairs (weight, objective), one after another or in one sequence.

    Raises:
        ValueError: no parts, parts that want different batches, or weights that are not positive.

    Example:
        >>> uniform = lambda tokens: torch.zeros(*tokens.shape, 8)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> half = Mix((0.25, CrossEntropy()), (0.25, CrossEntropy(temperature=2.0)))
        >>> half(uniform, TokenBatch(tokens, tokens > 0))  # log 8 / 2
        tensor(1.0397)
    """

    parts: tuple[tuple[float, Any], ...]
    """Weights and objectives; all of one `batch_type`."""

    def __init__(self, *parts: Any) -> None:
        pairs = parts[0] if len(parts) == 1 and not _is_part(parts[0]) else parts
        if not isinstance(pairs, Iterable) or not all(map(_is_part, pairs := list(pairs))):
            raise ValueError(f"expected parts (weight, objective), got {shown(parts)}; pass e.g. (0.9, CrossEntropy())")
        object.__setattr__(self, "parts", tuple((float(weight), objective) for weight, objective in pairs))
        if not self.parts:
            raise ValueError("expected at least one part, got none; pass (weight, objective) pairs")
        if any(not 0 < weight < float("inf") for weight, _ in self.parts):
            raise ValueError(
                f"expected weights > 0, got {[weight for weight, _ in self.parts]}; leave a part of no weight out"
            )
        kinds = {objective.batch_type.__name__ for _, objective in self.parts}
        if len(kinds) > 1:
            raise ValueError(
                f"expected parts that read one kind of batch, got {sorted(kinds)}; mix objectives of a kind"
            )

    def __call__(self, model: LanguageModel, batch: Any) -> Float[Tensor, ""]:
        _require(batch, self.batch_type, "this Mix")
        return torch.stack([weight * objective(model, batch) for weight, objective in self.parts]).sum()

    @property
    def batch_type(self) -> type[Any]:
        return self.parts[0][1].batch_type

    @property
    def passes(self) -> tuple[str, ...]:
        return tuple(name for _, objective in self.parts for name in objective.passes)

    @property
    def additive(self) -> bool:
        # Means over the same things add up like their terms; a mean over tokens and one over rows do not.
        kinds = {type(objective) for _, objective in self.parts}
        return len(kinds) == 1 and all(objective.additive for _, objective in self.parts)

    def count(self, batch: Any) -> int:
        """The parts' common number of terms, or rows where they count different things."""
        counts = {objective.count(batch) for _, objective in self.parts}
        return counts.pop() if len(counts) == 1 else len(batch)

    def token_weights(self, batch: Any) -> tuple[Float[Tensor, "batch _pos"], ...]:
        """Those of the parts, times their weights."""
        return tuple(weight * w for weight, objective in self.parts for w in objective.token_weights(batch))


def is_objective(given: Any) -> bool:
    """Whether something has an objective's methods; a class of objectives, not called yet, is none."""
    return isinstance(given, Objective) and not isinstance(given, type)


def class_described(given: Any) -> str:
    """What something is, for a message: "int", "the class DPO"."""
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__


def objective_name(objective: Any) -> str:
    """What to call an objective in a table: its class, and the settings that are not the default ones.

    Example:
        >>> objective_name(CrossEntropy(temperature=2.0))
        'CrossEntropy(temperature=2)'
        >>> objective_name(Mix([(0.5, CrossEntropy()), (0.5, InfoNCE())]))
        'Mix(0.5 CrossEntropy + 0.5 InfoNCE)'
    """
    kind = type(objective).__name__
    if isinstance(objective, Mix):
        return f"{kind}({' + '.join(f'{weight:g} {objective_name(part)}' for weight, part in objective.parts)})"
    settings = []
    for setting in fields(objective) if is_dataclass(objective) else ():
        value = getattr(objective, setting.name)
        if isinstance(value, int | float) and value != setting.default:
            settings.append(f"{setting.name}={value:g}" if not isinstance(value, bool) else f"{setting.name}={value}")
    return f"{kind}({', '.join(settings)})" if settings else kind


def _require(batch: Any, kind: type[Any], name: str) -> None:
    if not isinstance(batch, kind):
        hint = "prompts with a chosen and a rejected continuation each" if kind is PreferenceBatch else "texts"
        raise ValueError(f"expected a {kind.__name__} for {name}, got {type(batch).__name__}; pass {hint}")


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − exp(x)) for x < 0, to full precision near both ends (Mächler 2012)."""
    near = x > -0.6931471805599453
    # where on the arguments too: the branch not taken must not send NaN back
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, close, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
