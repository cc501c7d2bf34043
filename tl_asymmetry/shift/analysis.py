"""Mean activations of two models on the same tokens, beside what the change of the weights alone predicts of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor
from torch.autograd import forward_ad
from tqdm.auto import tqdm

from tl_asymmetry._lazy import pd, special
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.strangers import warn_of_strangers
from tl_asymmetry.models.texts import batches
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import MATRICES, kind_of
from tl_asymmetry.results.provenance import described, pair_names, pair_record, shape_record, versions
from tl_asymmetry.rewinding.units import same_parameters
from tl_asymmetry.settings import open_pair
from tl_asymmetry.shift.result import HEAD_COLUMNS, SHIFT_COLUMNS, ActivationShift


@checked
@with_fresh_settings
def activation_shift(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    max_tokens: int | None = None,
    names: Sequence[str] | None = None,
    progress: bool = True,
) -> ActivationShift:
    """How far a pair's mean activations are apart at each point of the stream, and how much of that ΔW foretells.

    Δμ is the mean over tokens of the aligned model's stream less that of the base's, on the same tokens. Beside it
    stand the *direct write* term, what ΔW of the write matrices up to there does to the base's own mean inputs, head by
    head; the *first order*, the derivative of the mean stream in the direction of all parameters' change (one
    forward-mode pass); and the cosine of Δμ with the leading direction that ΔW of the layer writes, beside that of a
    random direction. The definitions are ours.

    Args:
        model_base: a HookedTransformer, TransformerBridge or transformers model with raw weights, or its folder or name
            on the Hub.
        model_aligned: the same.
        texts: strings or chats; the package's calibration texts without texts and tokens.
        tokens, mask: token ids instead of texts, and which of them count.
        exclude_first: leave the first position of each sequence out of the means.
        batch_size: sequences per pass.
        max_tokens: use no more tokens of the texts than this.
        names: what to call the two models, such as `("base", "dpo")`; by default what they call themselves.
        progress: show progress bars.

    Returns:
        A frozen `ActivationShift`.

    Raises:
        ValueError: models that cannot be compared, tokens that cannot be read.

    Example:
        >>> from tl_asymmetry.demo import demo_texts
        >>> found = activation_shift(base, aligned, demo_texts(4, seed=1), progress=False)
        >>> bool((found.table["first_order_cosine"] > found.table["direct_cosine"]).mean() > 0.5)
        True
    """
    arguments = described(
        texts=texts, tokens=tokens, mask=mask, exclude_first=exclude_first, batch_size=batch_size,
        max_tokens=max_tokens, names=names, progress=progress,
    )  # fmt: skip
    named = pair_names(names)
    pair = open_pair(model_base, model_aligned, texts, tokens, mask, max_tokens=max_tokens, run_aligned=True)
    (base, aligned), notes = pair.loaded, pair.notes
    hashes = pair.checked_hashes()
    warn_of_strangers(base, aligned, notes)
    read = _Reader(pair.sequences, batch_size, exclude_first, progress)
    ours, theirs = read.means(base, "base"), read.means(aligned, "aligned")
    if same_parameters(base, aligned):
        changes = {
            name: (after.detach().to(before.device) - before.detach()).to(before)
            for (name, before), after in zip(base.model.named_parameters(), aligned.model.parameters(), strict=True)
        }
        with _tangents(base, changes):
            slopes = read.means(base, "first order", tangents=True)
    else:
        slopes = None
        notes.add("the models' parameters have other names or shapes (two kinds of model): no first-order prediction")
    rows, heads, arrays = _tables(base, aligned, ours, theirs, slopes)
    config = {
        "arguments": arguments,
        "versions": versions(),
        "models": pair_record(base, aligned, hashes, named),
        "shape": shape_record(base),
        "tokens": ours.count,
        "sequences": len(pair.sequences),
    }
    return ActivationShift(
        table=pd.DataFrame(rows, columns=list(SHIFT_COLUMNS)),
        heads=pd.DataFrame(heads, columns=list(HEAD_COLUMNS)).astype({"head": "Int64"}),
        config=config,
        notes=tuple(notes.lines),
        arrays=arrays,
    )


@dataclass
class _Means:
    """Sums over tokens at points of every layer."""

    count: int = 0
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def of(self, point: str, layer: int) -> Float64[Tensor, "*width"]:
        """The mean there, float64 on CPU."""
        return self.sums[point, layer] / self.count


@dataclass(frozen=True)
class _Reader:
    """Runs models over the same tokens."""

    sequences: Sequence[Tensor]
    batch_size: int
    exclude_first: bool
    progress: bool

    def means(self, view: ModelView, what: str, *, tangents: bool = False) -> _Means:
        """Means of the stream and of the inputs of write matrices; or of their tangents."""
        found = _Means()
        points = [p for p in ("resid_mid", "resid_post", "z", "mlp_post") if view.has_point(p)]
        batched = list(batches(self.sequences, self.batch_size))
        with torch.no_grad(), view.evaluating():
            for tokens, mask in tqdm(batched, desc=what, unit="batch", disable=not self.progress):
                counted = mask.clone()
                if self.exclude_first:
                    counted[:, 0] = False
                readers = {
                    (point, layer): self._adds(found, point, layer, counted, tangents)
                    for point in points
                    for layer in range(view.n_layers)
                }
                with view.hooks(readers):
                    view.run(tokens)
                found.count += int(counted.sum())
        return found

    @staticmethod
    def _adds(found: _Means, point: str, layer: int, counted: Tensor, tangents: bool) -> Any:
        def add(x: Tensor) -> None:
            value = forward_ad.unpack_dual(x)
            seen = value.tangent if tangents else value.primal
            if seen is None:  # nothing below this point changed
                seen = torch.zeros_like(value.primal)
            total = seen[counted.to(seen.device)].double().sum(0).cpu()
            found.sums[point, layer] = found.sums.get((point, layer), 0) + total

        return add


@contextmanager
def _tangents(view: ModelView, changes: Mapping[str, Tensor]) -> Iterator[None]:
    """Every parameter carries its change as a tangent inside; the very same parameters are back afterwards."""
    named = {id(parameter): name for name, parameter in view.model.named_parameters()}
    slots = [
        (module, name, parameter)
        for module in view.all_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in named
    ]
    duals: dict[int, Any] = {}

    def put() -> None:
        for module, name, parameter in slots:
            if id(parameter) not in duals:  # tied weights are one
                duals[id(parameter)] = forward_ad.make_dual(parameter.detach(), changes[named[id(parameter)]])
            module._parameters[name] = duals[id(parameter)]

    def take() -> None:
        for module, name, parameter in slots:
            module._parameters[name] = parameter

    with forward_ad.dual_level(), temporarily(put, take):
        yield


def _tables(
    base: ModelView, aligned: ModelView, ours: _Means, theirs: _Means, slopes: _Means | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Tensor]]:
    rows: list[dict[str, Any]] = []
    heads: list[dict[str, Any]] = []
    arrays: dict[str, Tensor] = {}
    direct = torch.zeros(base.d_model, dtype=torch.float64)
    writes = [matrix for matrix in base.matrices if kind_of(matrix).writes]
    for layer in range(base.n_layers):
        for point in ("resid_mid", "resid_post"):
            here = [matrix for matrix in writes if base.residual_point(matrix) == point]
            if not base.has_point(point):
                continue
            shift = theirs.of(point, layer) - ours.of(point, layer)
            deltas = {m: _delta(base, aligned, layer, m) for m in here}
            for matrix, ΔW in deltas.items():
                inputs = ours.of(MATRICES[matrix].point, layer).reshape(len(ΔW), -1)
                written = torch.einsum("hi,hid->hd", inputs, ΔW)
                direct = direct + written.sum(0)
                headed = base.heads(matrix) is not None
                heads += [
                    {
                        "layer": layer, "head": head if headed else None, "matrix": matrix, "point": point,
                        "write_norm": own.norm().item(), "cosine": _cosine(own, shift),
                        "share": _over((own @ shift).item(), shift.square().sum().item()),
                    }
                    for head, own in enumerate(written)
                ]  # fmt: skip
            slope = None if slopes is None else slopes.of(point, layer)
            leading = (
                _leading_cosine(torch.cat([ΔW.flatten(0, 1) for ΔW in deltas.values()]), shift) if deltas else math.nan
            )
            rows.append(
                {
                    "layer": layer, "point": point, "shift_norm": shift.norm().item(),
                    "relative": _over(shift.norm().item(), ours.of(point, layer).norm().item()),
                    **_beside("direct", direct, shift), **_beside("first_order", slope, shift),
                    "leading_cosine": leading, "leading_expected": _expected_cosine(base.d_model),
                    "leading_p": _cosine_p(leading, base.d_model),
                }
            )  # fmt: skip
            arrays |= {f"shift/{point}/{layer}": shift, f"direct/{point}/{layer}": direct}
            if slope is not None:
                arrays[f"first_order/{point}/{layer}"] = slope
    return rows, heads, arrays


def _delta(base: ModelView, aligned: ModelView, layer: int, matrix: str) -> Float64[Tensor, "head inputs d_model"]:
    ΔW = aligned.weight(layer, matrix).double().cpu() - base.weight(layer, matrix).double().cpu()
    return ΔW if ΔW.ndim == 3 else ΔW.unsqueeze(0)


def _beside(name: str, predicted: Tensor | None, shift: Tensor) -> dict[str, float]:
    if predicted is None:
        return dict.fromkeys((f"{name}_norm", f"{name}_cosine", f"{name}_explained"), math.nan)
    left = (shift - predicted).square().sum().item()
    return {
        f"{name}_norm": predicted.norm().item(),
        f"{name}_cosine": _cosine(predicted, shift),
        f"{name}_explained": 1 - _over(left, shift.square().sum().item()),
    }


def _leading_cosine(ΔW: Float64[Tensor, "rows d_model"], shift: Tensor) -> float:
    """|cosine| of the shift with the leading direction that the matrices of one point write."""
    if not bool(ΔW.any()):
        return math.nan
    leading = torch.linalg.eigh(ΔW.mT @ ΔW).eigenvectors[:, -1]
    return abs(_cosine(leading, shift))


def _expected_cosine(d: int) -> float:
    """Mean |cosine| of a Haar-random direction with a fixed one: Γ(d/2) / (√π Γ((d + 1)/2))."""
    return math.exp(math.lgamma(d / 2) - math.lgamma((d + 1) / 2)) / math.sqrt(math.pi)


def _cosine_p(cosine: float, d: int) -> float:
    """How often a Haar-random direction comes as near: cos² is Beta(1/2, (d − 1)/2)."""
    return math.nan if math.isnan(cosine) else float(special.betaincc(0.5, (d - 1) / 2, min(1.0, cosine**2)))


def _cosine(first: Tensor, second: Tensor) -> float:
    return _over((first @ second).item(), (first.norm() * second.norm()).item())


def _over(value: float, size: float) -> float:
    return value / size if size > 0 else math.nan
