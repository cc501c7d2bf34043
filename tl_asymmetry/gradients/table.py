"""From captured moments to the tidy tables of a gradient covariance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.fraction import gram_energy
from tl_asymmetry.geometry.jackknife import MINIMUM_GROUPS, log_jackknife_interval
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.nearby import FLOAT32_WIDTH
from tl_asymmetry.geometry.side_moments import HeadMoments, SketchedMoments
from tl_asymmetry.geometry.spectrum import effective_rank, marchenko_pastur_edge, participation_ratio, stable_rank
from tl_asymmetry.gradients.capture import Captured, Measured, Moments
from tl_asymmetry.models.backward import Outer
from tl_asymmetry.names import kind_of

GRADIENT_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "matrix": "W_Q … W_out, or the path of a further linear map; of a layer's experts together, each token as often as "
    "it has experts",
    "pathway": '"read" (d_model is the input) or "write" (d_model is the output)',
    "side": '"input" (a, what the matrix multiplies) or "gradient" (δ, the loss\'s gradient at its product)',
    "half": '"all", or the forward pass ("chosen", "rejected") where these are told apart',
    "axis": '"residual" (d_model), "head" (d_head), "mlp" (d_mlp), or the part of the block whose inner axis it is',
    "shared": "whether all heads of the layer have this side in common, and so the same row",
    "dimension": "length of a or δ",
    "tokens": "n: gradient: tokens with δ ≠ 0; input: tokens at which a matrix that reads this input has δ ≠ 0",
    "trace": "Σλ, the mean of ‖a‖² or ‖δ‖² over these tokens, δ of the summed loss",
    "rank": "k, of the two energies: a sixteenth of the dimension",
    "effective_rank": "exp(entropy(λ / Σλ)); NaN on a sketched axis",
    "effective_rank_low": "lower end of its 95 % interval over texts",
    "effective_rank_high": "upper end",
    "participation_ratio": "(Σλ)² / Σλ²; estimated on a sketched axis",
    "participation_ratio_low": "lower end of its 95 % interval over texts",
    "participation_ratio_high": "upper end",
    "stable_rank": "Σλ / λ_max",
    "stable_rank_low": "lower end of its 95 % interval over texts",
    "stable_rank_high": "upper end",
    "top_energy": "share of the trace in the side's own k leading directions; k/dimension if flat",
    "top_energy_low": "lower end of its 95 % interval over texts",
    "top_energy_high": "upper end",
    "prediction_energy": "gradient of W_O, W_out: share of the trace in the k leading prediction directions",
    "prediction_energy_low": "lower end of its 95 % interval over texts",
    "prediction_energy_high": "upper end",
    "prediction_relative": "prediction_energy · d/k; 1 is isotropic",
    "mp_edge": "Marchenko–Pastur edge of n independent tokens of the bulk's variance",
    "spikes": "eigenvalues above it; descriptive, since tokens are dependent",
}
"""Columns of `GradientCovariance.table`, in this order, and what they mean."""

CROSS_COLUMNS = {
    "layer": "layer, from 0",
    "head": "as in the table",
    "expert": "which expert; NA outside mixtures",
    "matrix": "as in the table",
    "pathway": '"read" or "write"',
    "input_trace": "Σλ of the input side",
    "gradient_trace": "Σλ of the gradient side",
    "tokens": "tokens at which this matrix has δ ≠ 0; of an expert those that are routed to it",
    "gradient_norm": "‖Σ_t a_t δ_tᵀ‖, the norm of the summed loss's gradient in this matrix (estimated from the "
    "sketch where a side lies on d_mlp, unless full moments were asked for)",
    "coherence": "‖Σ_t a_t δ_tᵀ‖² / Σ_t ‖a_t‖² ‖δ_t‖²: 1 if different tokens' outer products are orthogonal on "
    "average, more where they add up, less where they cancel",
}
"""Columns of `GradientCovariance.gradients`."""

_INTERVALS = ("effective_rank", "participation_ratio", "stable_rank", "top_energy", "prediction_energy")


@dataclass(frozen=True)
class Side:
    """One side of one matrix in one layer, in one half of the passes; float64 on CPU."""

    axis: str
    """"residual", "head", or the part of the block whose inner axis it is, as "mlp"."""
    dimension: int
    """Length of the vectors."""
    tokens: int
    """How many were taken in."""
    numbers: dict[str, Float64[Tensor, " head"]]
    """Columns of the table by name."""
    spectrum: Float64[Tensor, "head r"]
    """Eigenvalues, descending; on a sketched axis the leading ones."""
    moment: Float64[Tensor, "head d d"] | None
    """The second moment; None on a sketched axis, or without tokens."""


def layer_sides(
    captured: Captured,
    layer: int,
    measured: Mapping[Outer, Measured],
    prediction: Float[Tensor, "d d"] | None,
    *,
    exact: bool,
) -> dict[tuple[str, str, str], Side]:
    """The sides of one layer, by (half, side, matrix or point): inputs by point, gradients by matrix.

    Args:
        captured: moments of all groups and passes.
        layer: which layer.
        measured: what was captured.
        prediction: prediction directions, all d of them; None of a model that predicts nothing.
        exact: float64 in replicates on wide axes too.
    """
    halves = {"all": captured.passes or ("",)} | {name: (name,) for name in captured.passes}
    groups = sorted({group for group, _ in captured.parts})
    sides: dict[tuple[str, str, str], Side] = {}
    here = {matrix: how for (at, matrix), how in measured.items() if at == layer}
    points = {how.point: kind_of(matrix).input_axis for matrix, how in here.items()}
    for half, wanted in halves.items():
        for point, axis in points.items():
            held = [
                _merged(captured.parts[g, n].inputs.get((point, layer)) for n in wanted if (g, n) in captured.parts)
                for g in groups
            ]
            sides[half, "input", point] = _side(held, axis, None, exact=exact)
        for matrix in here:
            held = [
                _merged(captured.parts[g, n].gradients.get((layer, matrix)) for n in wanted if (g, n) in captured.parts)
                for g in groups
            ]
            P = prediction if kind_of(matrix).writes else None
            sides[half, "gradient", matrix] = _side(held, kind_of(matrix).output_axis, P, exact=exact)
    return sides


def shown_rank(dimension: int) -> int:
    """k of `top_energy` and `prediction_energy`: a sixteenth of the dimension, at least 1."""
    return max(dimension // 16, 1)


def gradient_table(
    layers: Sequence[dict[tuple[str, str, str], Side]], measured: Mapping[Outer, Measured]
) -> pd.DataFrame:
    """All rows: layer × head × matrix × side, for all halves together and for each that is told apart."""
    rows = []
    for layer, sides in enumerate(layers):
        for half in dict.fromkeys(half for half, _, _ in sides):
            for matrix, how in ((matrix, how) for (at, matrix), how in measured.items() if at == layer):
                for kind, key in (("input", how.point), ("gradient", matrix)):
                    side = sides[half, kind, key]
                    shared = how.heads is not None and side.axis == "residual"
                    for head in range(how.heads or 1):
                        numbers = {n: float(v[head if len(v) > 1 else 0]) for n, v in side.numbers.items()}
                        rows.append(
                            {
                                "layer": layer,
                                "head": None if how.heads is None else head,
                                "matrix": matrix,
                                "pathway": kind_of(matrix).side,
                                "side": kind,
                                "half": half,
                                "axis": side.axis,
                                "shared": shared,
                                "dimension": side.dimension,
                                "tokens": side.tokens,
                                "rank": shown_rank(side.dimension),
                                **numbers,
                            }
                        )
    table = pd.DataFrame(rows, columns=list(GRADIENT_COLUMNS))
    floats = [c for c in GRADIENT_COLUMNS if c not in _INTEGERS | _WORDS]
    return table.astype(dict.fromkeys(_INTEGERS, "Int64") | dict.fromkeys(floats, "float64"))


_INTEGERS = {"layer", "head", "dimension", "tokens", "rank"}
_WORDS = {"matrix", "pathway", "side", "half", "axis", "shared"}


def cross_table(
    captured: Captured,
    layers: Sequence[dict[tuple[str, str, str], Side]],
    measured: Mapping[Outer, Measured],
) -> pd.DataFrame:
    """One row per layer × head or expert × matrix: how large the gradient itself is, beside its two sides."""
    rows = []
    for (layer, matrix), how in measured.items():
        a, δ = layers[layer]["all", "input", how.point], layers[layer]["all", "gradient", matrix]
        count = how.experts or how.heads or 1
        nan = torch.full((count,), torch.nan, dtype=torch.float64)
        squared = captured.squared_norms.get((layer, matrix), nan)
        products = captured.products.get((layer, matrix), nan)
        traces = {"input_trace": a.numbers["trace"], "gradient_trace": δ.numbers["trace"]}
        tokens = torch.tensor([δ.tokens])
        if how.experts is not None:
            sums = captured.routed.get((layer, matrix), dict.fromkeys(("tokens", "inputs", "gradients"), 0 * nan))
            tokens = sums["tokens"].nan_to_num()
            traces = {"input_trace": sums["inputs"] / tokens, "gradient_trace": sums["gradients"] / tokens}
        for unit in range(count):
            rows.append(
                {
                    "layer": layer,
                    "head": None if how.heads is None else unit,
                    "expert": None if how.experts is None else unit,
                    "matrix": matrix,
                    "pathway": kind_of(matrix).side,
                    **{name: float(each[unit if len(each) > 1 else 0]) for name, each in traces.items()},
                    "tokens": int(tokens[unit if len(tokens) > 1 else 0]),
                    "gradient_norm": float(squared[unit]) ** 0.5,
                    "coherence": float(squared[unit] / products[unit]),
                }
            )
    return pd.DataFrame(rows, columns=list(CROSS_COLUMNS)).astype(
        dict.fromkeys(("layer", "head", "expert", "tokens"), "Int64")
    )


def _merged(parts: Iterable[Moments | None]) -> Moments | None:
    """All parts together, in an object of their own; None where there are none."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    first = there[0]
    total: Moments
    if isinstance(first, StreamingMoments):
        total = StreamingMoments(first.d)
    elif isinstance(first, HeadMoments):
        total = HeadMoments(first.heads, first.d)
    else:
        total = SketchedMoments(first.test)
    for part in there:
        total.merge(part)  # type: ignore[arg-type]  # all of one kind
    return total


def _side(groups: Sequence[Moments | None], axis: str, P: Tensor | None, *, exact: bool) -> Side:
    total = _merged(groups)
    if total is None or total.count == 0:
        dimension = 0 if total is None else len(total.test) if isinstance(total, SketchedMoments) else total.d
        return _nothing(axis, dimension)
    if isinstance(total, SketchedMoments):
        return _sketched(total, axis)
    M = _matrix(total)
    n, d = total.count, M.shape[-1]
    k = shown_rank(d)
    λ = torch.linalg.eigvalsh(M).flip(-1).clamp(min=0)
    numbers = _shape(λ, M, P, k)
    numbers["trace"] = λ.sum(-1)
    intervals = len(groups) >= MINIMUM_GROUPS and all(g is not None and g.count > 0 for g in groups)
    replicates: dict[str, list[Tensor]] = {}
    if intervals:
        narrow = d >= FLOAT32_WIDTH and not exact  # replicates show sampling error alone
        for group in groups:
            if group is None or isinstance(group, SketchedMoments):  # cannot happen: as the total
                raise RuntimeError("a group without moments")
            m = group.count
            rest = (n * M - m * _matrix(group)) / (n - m)
            solved = torch.linalg.eigvalsh(rest.float() if narrow else rest).double().flip(-1).clamp(min=0)
            for name, value in _shape(solved, rest, P, k).items():
                replicates.setdefault(name, []).append(value)
    nan = torch.full_like(λ[:, 0], torch.nan)
    for name in _INTERVALS:
        low, high = nan, nan
        if name in replicates:
            interval = log_jackknife_interval(numbers[name], torch.stack(replicates[name]), corrected=False)
            low, high = interval.low, interval.high
        numbers[f"{name}_low"], numbers[f"{name}_high"] = low, high
    numbers["prediction_relative"] = numbers["prediction_energy"] * d / k
    edges = [marchenko_pastur_edge(row, n) if bool(row[0] > 0) else torch.nan for row in λ]
    numbers["mp_edge"] = torch.tensor(edges, dtype=torch.float64)
    above = (λ > numbers["mp_edge"].unsqueeze(-1)).sum(-1).double()
    numbers["spikes"] = torch.where(numbers["mp_edge"].isnan(), torch.nan, above)
    return Side(axis, d, n, numbers, λ, M)


def _shape(λ: Tensor, M: Tensor, P: Tensor | None, k: int) -> dict[str, Tensor]:
    """The numbers that have intervals, for each head."""
    energy = torch.full_like(λ[:, 0], torch.nan)
    if P is not None:
        inside = torch.stack([gram_energy(moment, P[:, :k]).sum() for moment in M])
        energy = inside / M.diagonal(dim1=-2, dim2=-1).sum(-1)
    return {
        "effective_rank": effective_rank(λ),
        "participation_ratio": participation_ratio(λ),
        "stable_rank": stable_rank(λ),
        "top_energy": λ[:, :k].sum(-1) / λ.sum(-1),
        "prediction_energy": energy,
    }


def _matrix(moments: StreamingMoments | HeadMoments) -> Tensor:
    second = moments.second_moment
    return second if second.ndim == 3 else second.unsqueeze(0)


def _sketched(moments: SketchedMoments, axis: str) -> Side:
    """What a sketch can tell: the trace exactly, the rest estimated, no interval, no effective rank."""
    trace, d = moments.trace, len(moments.test)
    λ = moments.leading_eigenvalues
    k = shown_rank(d)
    numbers = _empty_numbers()
    numbers["trace"] = torch.tensor([trace], dtype=torch.float64)
    if trace > 0:
        numbers["participation_ratio"] = torch.tensor([trace**2 / moments.squared_norm], dtype=torch.float64)
        numbers["stable_rank"] = trace / λ[:1]
        if k <= len(λ):
            numbers["top_energy"] = λ[:k].sum(0, keepdim=True) / trace
    return Side(axis, d, moments.count, numbers, λ.unsqueeze(0), None)


def _nothing(axis: str, dimension: int) -> Side:
    """A side that no gradient reached."""
    return Side(axis, dimension, 0, _empty_numbers(), torch.zeros(1, 0, dtype=torch.float64), None)


def _empty_numbers() -> dict[str, Tensor]:
    ends = [f"{name}_{end}" for name in _INTERVALS for end in ("low", "high")]
    nan = torch.full((1,), torch.nan, dtype=torch.float64)
    return dict.fromkeys(["trace", *_INTERVALS, *ends, "prediction_relative", "mp_edge", "spikes"], nan)
