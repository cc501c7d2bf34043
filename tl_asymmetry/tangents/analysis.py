"""Low-rank directions of early activations against true gradients, while a model trains or from its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.tangents.probe import TangentOptions, TangentProbe, early_until
from tl_asymmetry.tangents.result import TangentAnalysis
from tl_asymmetry.trajectory.checkpoints import Checkpoint, checkpoints_of


@checked
@with_fresh_settings
def analyze_tangents(
    checkpoints_or_model: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Any = None,
    mask: Any = None,
    rank: int | Sequence[int] = 16,
    method: str | Sequence[str] = "pca",
    basis_from: float = 0.3,
    draws: int = 20,
    control: str = "complement",
    gradients: Sequence[str] = ("weight", "activation"),
    strata: int = 5,
    frequencies: Float[Tensor, " d_vocab"] | Int[Tensor, " d_vocab"] | None = None,
    mask_token: int | None = None,
    mask_share: float = 0.15,
    exclude_first: bool = True,
    centered: bool = False,
    batch_size: int = 8,
    max_tokens: int | None = None,
    groups: int = 8,
    starts: int = 3,
    sample_rows: int = 4096,
    total_steps: int | None = None,
    store: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TangentAnalysis:
    """Do directions taken from early activations explain where gradients put their energy and their anisotropy.

    The question of arXiv 2604.08764 ("Revisiting anisotropy"). One basis Q_T for each place of each layer is fitted on
    the activations of the first checkpoints and then stays fixed. At every checkpoint the true, backpropagated
    gradients are held against it, beside random control subspaces of equal rank, and beside what the activations' own
    spectrum would give: energy ‖G Q‖²/‖G‖², and the anisotropy that goes when Q is taken out. Definitions the paper
    leaves open are ours; the report marks them.

    Two kinds of gradient, reported apart: "weight", ∂L/∂W of the matrices that read the residual stream (W_Q, W_K, W_V,
    W_in, W_gate) on their input side, against a basis of that same input; "activation", ∂L/∂x of every token at the
    block output, against a basis of the block output. Decoders are read with next-token cross-entropy, BERT-style
    encoders with masked-language-model loss, the mask drawn from the seed. Gradients are taken in evaluation mode.

    Args:
        checkpoints_or_model: checkpoints in the order of their steps (directories like `checkpoint-500`, pairs `(step,
            model)` as a mapping, list or generator; a model may be a TransformerLens model, a directory, a hub name or
            a function that makes one), or one model, which then gives both basis and gradients. Of encoders a
            TransformerBridge of a BERT or RoBERTa with masked-LM head, or a HookedEncoder.
        texts, tokens, mask, max_tokens: as in `analyze_pair`.
        rank: of the basis, one or several.
        method: "pca" or "semi_nmf" (the span of D in A ≈ Z D, Z ≥ 0), one or both.
        basis_from: share of the steps, counted from 0 to the last, whose checkpoints the basis is fitted on.
        draws: control subspaces per basis; the smallest p is 1 / (draws + 1).
        control: "complement", the paper's normal controls, orthogonal to the basis, whose rank test has a size of its
            own (column `size`); or "haar", unrestricted, whose rank test is exact.
        gradients: "weight", "activation" or both.
        strata: token-frequency strata of equal mass; 0 leaves them out.
        frequencies: how often each token id occurs in the training corpus; by default in the texts.
        mask_token: an encoder's mask token, where its tokenizer has none.
        mask_share: share of an encoder's tokens that it has to predict.
        exclude_first: leave the first position of each sequence (an encoder's special tokens) out of activations and
            per-token gradients. Weight gradients are of the whole loss.
        centered: fit the basis on centred activations.
        batch_size: sequences per pass; the result does not depend on it.
        groups: groups of sequences for the interval of the correlation.
        starts: of semi-NMF.
        sample_rows: activations that semi-NMF is fitted on, drawn from all.
        total_steps: length of the training; by default the last checkpoint's step. A generator needs it.
        store: folder that keeps every finished checkpoint, so that a run that was killed goes on. Until the basis is
            fixed it also holds the early checkpoints' gradients.
        seed: of controls, masks and starts.
        progress: show progress bars.

    Returns:
        A frozen `TangentAnalysis`.

    Raises:
        ValueError: no checkpoint in the early part, a rank that has no controls, texts too short for the strata, an
            encoder without a masked-language-model head or mask token, another bidirectional model, processed weights;
            before anything heavy runs. Later: a checkpoint whose weights, loss or gradients are not finite.

    Example:
        >>> from tl_asymmetry.demo import demo_model, demo_texts
        >>> run = {step: demo_model(f"step{step}") for step in (0, 50, 150)}
        >>> result = analyze_tangents(run, demo_texts(20, seed=1), rank=4, progress=False)
        >>> result.checkpoints[["step", "phase"]].to_numpy().tolist()
        [[0, 'early'], [50, 'late'], [150, 'late']]
    """
    options = TangentOptions(
        rank=rank, method=method, basis_from=basis_from, draws=draws, control=control, gradients=gradients,
        strata=strata, frequencies=frequencies, mask_token=mask_token, mask_share=mask_share,
        exclude_first=exclude_first, centered=centered, batch_size=batch_size, max_tokens=max_tokens, groups=groups,
        starts=starts, sample_rows=sample_rows, seed=seed, progress=progress,
    )  # fmt: skip
    options.check()
    if isinstance(checkpoints_or_model, nn.Module):
        plan = _Plan([Checkpoint(0, ModelView(checkpoints_or_model).name, _given(checkpoints_or_model))], 0)
    else:
        plan = _plan(checkpoints_or_model, total_steps, basis_from)
    with TangentProbe(
        texts, tokens=tokens, mask=mask, total_steps=plan.total_steps, store=store, options=options
    ) as probe:
        for checkpoint in tqdm(plan.checkpoints, desc="checkpoints", total=plan.known, disable=not progress):
            probe.take(checkpoint)
        return probe.result()


@dataclass(frozen=True)
class _Plan:
    checkpoints: Iterable[Checkpoint]
    total_steps: int

    @property
    def known(self) -> int | None:
        return len(self.checkpoints) if isinstance(self.checkpoints, Sequence) else None


def _plan(source: Any, total_steps: int | None, basis_from: float) -> _Plan:
    """The checkpoints in order, and the length of the training.

    Raises:
        ValueError: none, steps given twice, none in the early part, or a generator without total_steps.
    """
    if isinstance(source, Iterator):
        if total_steps is None:
            raise ValueError(
                "expected total_steps with a generator of checkpoints, whose last step nobody knows yet, got none; "
                "pass total_steps= or a list"
            )
        return _Plan(checkpoints_of(source), total_steps)
    checkpoints = sorted(checkpoints_of(source), key=lambda checkpoint: checkpoint.step)
    if not checkpoints:
        raise ValueError("expected at least one checkpoint, got none; pass checkpoints or a model")
    steps = [checkpoint.step for checkpoint in checkpoints]
    twice = next((a for a, b in zip(steps, steps[1:], strict=False) if a == b), None)
    if twice is not None:
        raise ValueError(f"expected one checkpoint a step, got several of step {twice}; pass each step once")
    total = steps[-1] if total_steps is None else total_steps
    if steps[-1] > total:
        raise ValueError(f"expected steps up to total_steps={total}, got {steps[-1]}; pass a larger total_steps")
    until = early_until(basis_from, total)
    early = sum(step <= until for step in steps)
    if early == 0 or early == len(steps):
        missing = "first" if early == 0 else "later"
        raise ValueError(
            f"expected checkpoints both in the first {basis_from:.0%} of {total} steps (up to {until:g}), where the "
            f"basis is fitted, and after it, got none in the {missing} part (steps {', '.join(map(str, steps))}); pass "
            "such checkpoints, another basis_from, or one model alone"
        )
    return _Plan(checkpoints, total)


def _given(model: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: nullcontext(model)
