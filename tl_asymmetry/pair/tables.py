"""From projections to the tidy table of a pair: one row per layer × head or expert × matrix × subspace × rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_asymmetry.geometry.jackknife import Interval, log_jackknife_interval
from tl_asymmetry.geometry.nulls import IsotropicNull, isotropic_variance
from tl_asymmetry.geometry.rounding import without_rounding
from tl_asymmetry.geometry.spectrum import effective_rank
from tl_asymmetry.names import ROUNDING_DOMINATED, ROUNDING_FLAGGED, SMALL_EIGENGAP, kind_of
from tl_asymmetry.pair.bases import REFERENCES
from tl_asymmetry.pair.numbers import Measurements
from tl_asymmetry.pair.verdicts import VERDICTS, Evidence, Judged, Question, Tested, joined, judge, verdict
from tl_asymmetry.results.nulls import ISOTROPIC, NULL_COLUMNS

PAIR_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "expert": "expert of a mixture; NA for any other matrix",
    "matrix": "W_Q … W_out",
    "pathway": '"read" (d_model is the input) or "write" (d_model is the output)',
    "subspace": "name of the subspace the delta is held against",
    "rank": "k, the number of leading directions",
    "fraction": "share of the delta's squared norm in them, 0 to 1",
    "relative": "fraction · d/k; 1 is isotropic, d/k the most there can be",
    "isotropic_z": "standard deviations above the mean over Haar-random subspaces; NaN for a flat spectrum",
    "isotropic_p": "one-sided probability of a fraction this large in a Haar-random subspace",
    "p_method": '"exact", "beta", "draws", "saddlepoint", or "none" where p is NaN',
    "isotropic_q": "p corrected over families (matrix, subspace, rank), layers in them and heads in these",
    "activation_matched": "read: the fraction expected by chance under the chosen optimizer on this matrix's own "
    "inputs, cross-fitted over groups of texts, or weighted by their gradients where gradients are given; write: NaN",
    "excess": "fraction / activation_matched",
    "excess_low": "lower end of the 95 % interval of excess over texts",
    "excess_high": "upper end",
    "excess_p": "one-sided probability of a fraction this large under that reference, with or without the mean input, "
    "the larger of the two",
    "excess_q": "p corrected as isotropic_q is",
    "gradient_matched": "write, with gradients: the fraction expected by chance under the chosen optimizer on the "
    "output's gradients; else NaN",
    "gradient_excess": "fraction / gradient_matched",
    "ci_low": "lower end of the 95 % interval of relative over texts; NaN where the subspace needs no texts",
    "ci_high": "upper end",
    "vs_chance": '"above", "below" or "not told apart" from a random subspace; "" without a test',
    "vs_reference": "the same against what training by the chosen optimizer gives on these inputs",
    "verdict": "what both say together: " + ", ".join(VERDICTS),
    "eigengap": "(λ_k − λ_{k+1}) / λ_k of the subspace's spectrum",
    "delta_norm": "‖ΔW‖",
    "delta_relative_norm": "‖ΔW‖ / ‖W_base‖",
    "delta_shrink": "⟨ΔW, W_base⟩ / ‖W_base‖²",
    "delta_effective_rank": "exp(entropy) of the normalised eigenvalues of ΔW ΔWᵀ",
    "rounding_share": "share of ‖ΔW‖² that storage in bf16 or fp16 explains by itself",
    "fraction_unrounded": "fraction corrected for it; NaN above a share of 0.9",
    "flags": '"eigengap" (under 0.05 at a rank up to 4, or an interval over a factor 2), "biased" (the interval: bias '
    'over a standard error), "few_tokens" (under 10 for each dimension, or under 16 sequences), "decay" (found in ΔW, '
    'not in ΔW − sW), "rounding" (share from 0.1), "rounding_dominated" (from 0.5), comma-joined',
}
"""Columns of a pair's table, in this order, and what they mean."""

ROUNDING_HOPELESS = 0.9
# An interval wider than this factor says more than a small eigengap at a large rank, where gaps are always small.
_SMALL_RANK, _WIDE_INTERVAL = 4, 2.0


class PairTables(NamedTuple):
    """The three tables of a pair's fractions."""

    table: pd.DataFrame
    """`PairAnalysis.table`."""
    nulls: pd.DataFrame
    """`PairAnalysis.nulls`."""
    tests: pd.DataFrame
    """`PairAnalysis.tests`."""


def pair_tables(numbers: Measurements, *, optimizer: str, few: bool, seed: int) -> PairTables:
    """All rows of `PairAnalysis.table`, `.nulls` and `.tests`; what is tested together is one run of layers.

    Args:
        numbers: of one run of layers, or of several that the labels of their places tell apart, in that order.
        optimizer: whose reference stands in `activation_matched`.
        few: whether there were too few tokens or sequences to trust intervals, or to tell less than training gives.
        seed: of the isotropic null's draws.
    """
    null = IsotropicNull(numbers.layout.d, seed=seed)
    blocks = [
        _Block(numbers, matrix, subspace, column, optimizer=optimizer, null=null, few=few)
        for matrix, subspace in numbers.held
        for column, rank in enumerate(numbers.ranks_of(matrix, subspace))
        if rank in numbers.layout.measured[subspace] and bool(numbers.held[matrix, subspace].exists[:, column].any())
    ]
    runs = numbers.runs
    of_runs = [judge([block.tested(runs == run) for block in blocks]) for run in dict.fromkeys(runs.tolist())]
    finished = [block.finished(joined([judged[i] for judged, _ in of_runs])) for i, block in enumerate(blocks)]
    order = {matrix: i for i, matrix in enumerate(numbers.deltas)}

    def ordered(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(parts, ignore_index=True).sort_values(
            ["run", "matrix", "subspace", "layer", "head", "expert", "rank"],
            key=lambda c: c.map(order) if c.name == "matrix" else c,
            ignore_index=True,
            kind="stable",
        )

    table = ordered(table for table, _ in finished)
    nulls = ordered(nulls for _, nulls in finished)
    return PairTables(
        table[[*numbers.labels, *PAIR_COLUMNS]],
        nulls[[*numbers.labels, *NULL_COLUMNS]],
        pd.concat([tests for _, tests in of_runs], ignore_index=True),
    )


class _Block:
    """One matrix, subspace and rank, `[place, head]`: its numbers, its evidence, then its rows."""

    def __init__(
        self,
        numbers: Measurements,
        matrix: str,
        subspace: str,
        column: int,
        *,
        optimizer: str,
        null: IsotropicNull,
        few: bool,
    ) -> None:
        self.numbers, self.matrix, self.subspace, self.column = numbers, matrix, subspace, column
        self.null, self.few = null, few
        self.d, self.k = numbers.layout.d, numbers.layout.ranks[column]
        self.delta, self.held = numbers.deltas[matrix], numbers.held[matrix, subspace]
        self.reference = optimizer if self.held.weighted is None else "weighted"
        self.fraction = self.held.inside[..., column] / self.delta.energy
        self.exists = self.held.exists[:, column].numpy() > 0
        delta = self.delta
        self.evidence, self.method = self._evidence(
            self.held.inside, delta.energy, delta.spectrum, delta.pooled_spectrum, self.held.tails
        )
        self.unshrunk = self.evidence
        if delta.unshrunk_energy is not None and self.held.unshrunk_inside is not None:
            self.unshrunk, _ = self._evidence(
                self.held.unshrunk_inside, delta.unshrunk_energy, delta.unshrunk_spectrum,
                delta.unshrunk_pooled_spectrum, self.held.unshrunk_tails,
            )  # fmt: skip

    # -- evidence ------------------------------------------------------------------------------------------------

    def tested(self, places: np.ndarray) -> Tested:
        """The evidence of one run of layers."""
        family = self.matrix, self.subspace
        return Tested(family, self.k, *(
            {question: Evidence(one.heads[places], one.pooled[places]) for question, one in evidence.items()}
            for evidence in (self.evidence, self.unshrunk)
        ))  # fmt: skip

    def _evidence(
        self, inside: Tensor, energy: Tensor, spectrum: Tensor | None, pooled: Tensor | None, tails: Tensor | None
    ) -> tuple[dict[Question, Evidence], np.ndarray]:
        """p on both sides, against a random subspace and against the chosen optimiser's reference."""
        assert spectrum is not None
        inside = inside[..., self.column]
        places, heads = energy.shape
        missing = ~self.exists
        *by_chance, method = self.null.tails(spectrum.flatten(0, 1), self.k, (inside / energy).flatten())
        together: list[np.ndarray] = [np.full(places, np.nan)] * 2
        if pooled is not None:
            *together, _ = self.null.tails(pooled, self.k, inside.sum(-1) / energy.sum(-1))
        found = {}
        for i, side in enumerate(("above", "below")):
            of_heads = np.where(missing[:, None], np.nan, by_chance[i].reshape(places, heads))
            found[ISOTROPIC, side] = Evidence(of_heads, np.where(missing, np.nan, together[i]))
            if tails is not None:
                items = tails[:, i, :, self.column].numpy()
                if self.few and side == "below":
                    # In-sample the expected fraction is too high: above that is conservative, below it the reverse.
                    items = np.full_like(items, np.nan)
                whole = items[:, -1] if items.shape[1] > heads else np.full(places, np.nan)
                found[self.reference, side] = Evidence(items[:, :heads], whole)
        return found, method.reshape(places, heads)

    # -- rows ----------------------------------------------------------------------------------------------------

    def finished(self, judged: Judged) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Rows of the table and of the nulls, without those at ranks that do not exist."""
        heads = self.delta.energy.shape[1]
        # In one go: column by column pandas copies the list of names each time.
        keys = pd.DataFrame({
            **self.numbers.rows(heads, self.numbers.layout.units[self.matrix]),
            "matrix": self.matrix, "pathway": kind_of(self.matrix).side, "subspace": self.subspace, "rank": self.k,
        })  # fmt: skip
        columns, biased = self._columns(judged)
        frame = pd.DataFrame({**keys, **{name: np.ravel(value) for name, value in columns.items()}})
        sampled = frame["ci_low"].notna() | frame["excess_low"].notna()
        wide = frame["ci_high"] > _WIDE_INTERVAL * frame["ci_low"]
        frame["flags"] = _flags({
            "eigengap": (frame["eigengap"] < SMALL_EIGENGAP) & ((self.k <= _SMALL_RANK) | wide),
            "biased": biased.ravel(),
            "few_tokens": (sampled | frame["activation_matched"].notna()) & self.few,
            "decay": judged.decay.ravel(),
            "rounding": frame["rounding_share"] >= ROUNDING_FLAGGED,
            "rounding_dominated": frame["rounding_share"] >= ROUNDING_DOMINATED,
        })  # fmt: skip
        # A layer may lack the matrix, or have fewer heads than others.
        exists = np.repeat(self.exists, heads) & self.delta.energy.isfinite().flatten().numpy()
        return frame[exists], _null_rows(keys, frame["fraction"], self._nulls(frame), exists)

    def _columns(self, judged: Judged) -> tuple[dict[str, Tensor | np.ndarray], np.ndarray]:
        """Columns of the table, and where the bias of an interval is too large to trust it."""
        k, d, fraction, delta, held = self.k, self.d, self.fraction, self.delta, self.held
        heads = fraction.shape[1]
        share = delta.spectrum / delta.spectrum.sum(-1, keepdim=True)
        spread = isotropic_variance(share.square().sum(-1), d, k).sqrt()
        nan = torch.full_like(fraction, torch.nan)
        activation = nan if held.activation is None else _wide(held.activation[:, self.column], heads)
        gradient = nan if held.gradient is None else held.gradient[..., self.column]
        relative, excess = fraction * d / k, fraction / activation
        interval, of_excess = self._interval(relative), self._excess_interval(excess)
        biased = torch.where(interval.low.isfinite(), interval.biased, of_excess.biased).numpy() > 0
        λ, ρ = held.eigenvalues[:, self.column], delta.rounding
        tested = self.evidence.get((self.reference, "above"))
        chance = judged.versus[ISOTROPIC]
        reference = judged.versus.get(self.reference, np.full(fraction.shape, "", dtype=object))
        measurable = np.isfinite(self.evidence[ISOTROPIC, "above"].heads)
        return {
            "fraction": fraction,
            "relative": relative,
            # A flat spectrum has no spread, and nothing to be compared.
            "isotropic_z": torch.where(spread > 0, (fraction - k / d) / spread, torch.nan),
            "isotropic_p": self.evidence[ISOTROPIC, "above"].heads,
            "p_method": self.method,
            "isotropic_q": judged.q[ISOTROPIC, "above"],
            "activation_matched": activation,
            "excess": excess,
            "excess_low": of_excess.low,
            "excess_high": of_excess.high,
            "excess_p": nan if tested is None else tested.heads,
            "excess_q": judged.q.get((self.reference, "above"), nan.numpy()),
            "gradient_matched": gradient,
            "gradient_excess": fraction / gradient,
            "ci_low": interval.low,
            "ci_high": interval.high,
            "vs_chance": chance,
            "vs_reference": reference,
            "verdict": verdict(chance, reference, changed=(delta.energy > 0).numpy(), measurable=measurable),
            "eigengap": _wide(1 - λ[:, 1] / λ[:, 0], heads),
            "delta_norm": delta.energy.sqrt(),
            "delta_relative_norm": (delta.energy / delta.base_energy).sqrt(),
            "delta_shrink": delta.shrink,
            "delta_effective_rank": effective_rank(delta.spectrum),
            "rounding_share": ρ,
            "fraction_unrounded": without_rounding(
                fraction, ρ, held.noise[..., self.column], most=ROUNDING_HOPELESS
            ),
        }, biased  # fmt: skip

    def _nulls(self, frame: pd.DataFrame) -> dict[str, dict[str, Tensor | np.ndarray | pd.Series]]:
        held, heads = self.held, self.fraction.shape[1]
        nulls: dict[str, dict[str, Tensor | np.ndarray | pd.Series]] = {
            ISOTROPIC: {
                "expected": torch.full_like(self.fraction, self.k / self.d),
                "low": frame["ci_low"], "high": frame["ci_high"], "p": frame["isotropic_p"], "q": frame["isotropic_q"],
            },
            **{
                null: {"expected": _wide(of[:, self.column], heads)}
                for null in (*REFERENCES, "weighted", "lora")
                if (of := getattr(held, null)) is not None
            },
            "gradient": {"expected": frame["gradient_matched"]},
        }  # fmt: skip
        chosen = "lora" if "lora" in nulls else self.reference
        if chosen in nulls:
            names = {"low": "excess_low", "high": "excess_high", "p": "excess_p", "q": "excess_q"}
            nulls[chosen] |= {field: frame[column] for field, column in names.items()}
        if held.permuted is not None:  # [place, value, head] → [value, place, head]
            mean, low, high = held.permuted[..., self.column].transpose(0, 1)
            nulls["permutation"] = {"expected": mean, "low": self.fraction / high, "high": self.fraction / low}
        return nulls

    def _interval(self, relative: Tensor) -> Interval:
        """Of relative, over groups of texts."""
        if self.held.replicates is None:
            return _no_interval(relative)
        return log_jackknife_interval(relative, self._replicates() * self.d / self.k, corrected=True)

    def _excess_interval(self, excess: Tensor) -> Interval:
        """Of fraction over its cross-fitted reference: both move with the texts."""
        if self.held.activation_replicates is None:
            return _no_interval(excess)
        # [place, group] → [group, place, 1]
        references = self.held.activation_replicates[..., self.column].mT.unsqueeze(-1)
        fractions = self.fraction if self.held.replicates is None else self._replicates()
        return log_jackknife_interval(excess, fractions / references, corrected=False)

    def _replicates(self) -> Tensor:
        """Fractions with one group of texts left out, `[group, place, head]`."""
        assert self.held.replicates is not None
        return self.held.replicates[..., self.column].transpose(0, 1) / self.delta.energy


def _no_interval(quantity: Tensor) -> Interval:
    nan = torch.full_like(quantity, torch.nan)
    return Interval(nan, nan, torch.zeros_like(quantity))


def _null_rows(
    keys: pd.DataFrame,
    fraction: pd.Series,
    nulls: Mapping[str, Mapping[str, Tensor | np.ndarray | pd.Series]],
    exists: np.ndarray,
) -> pd.DataFrame:
    """Rows of `PairAnalysis.nulls` for the rows of a block: where a null applies, which is where it expects something.

    Args:
        keys: what tells the rows of the table apart, one for each layer and head.
        fraction: their fractions.
        nulls: by null, what there is of `expected, low, high, p, q`, each of as many numbers as there are rows.
        exists: which of the rows there are.
    """

    def values(name: str) -> np.ndarray:
        nothing = np.full(len(keys), np.nan)
        return np.concatenate([np.ravel(given[name]) if name in given else nothing for given in nulls.values()])

    repeated = pd.concat([keys] * len(nulls), ignore_index=True)
    expected = values("expected")
    rows = pd.DataFrame({
        **repeated,
        "null": np.repeat(list(nulls), len(keys)),
        "expected": expected,
        "excess": np.tile(fraction, len(nulls)) / expected,
        **{name: values(name) for name in ("low", "high", "p", "q")},
    })  # fmt: skip
    return rows[np.tile(exists, len(nulls)) & np.isfinite(expected)]


def _flags(conditions: Mapping[str, pd.Series | np.ndarray]) -> list[str]:
    names = np.array(list(conditions))
    return [",".join(names[row]) for row in np.stack([np.asarray(c, dtype=bool) for c in conditions.values()], axis=1)]


def _wide(per_layer: Tensor, heads: int) -> Tensor:
    return per_layer.unsqueeze(-1).expand(-1, heads)
