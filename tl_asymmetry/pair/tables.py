"""From projections to the tidy table of a pair: one row per layer × head or expert × matrix × subspace × rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.jackknife import Interval, log_jackknife_interval
from tl_asymmetry.geometry.nulls import Asked, IsotropicNull, Told, isotropic_variance
from tl_asymmetry.geometry.rounding import without_rounding
from tl_asymmetry.geometry.spectrum import effective_rank
from tl_asymmetry.names import EXPERT_INPUT, ROUNDING_DOMINATED, ROUNDING_FLAGGED, SMALL_EIGENGAP, kind_of
from tl_asymmetry.pair.numbers import MATCHED, Measurements
from tl_asymmetry.pair.plan import TOKENS_PER_DIMENSION
from tl_asymmetry.pair.verdicts import VERDICTS, Evidence, Judged, Question, Tested, joined, judge, tests_table, verdict
from tl_asymmetry.results.nulls import ISOTROPIC

PAIR_COLUMNS = {
    "layer": "layer, from 0",
    "head": "head; the key-value head for W_K and W_V; NA for a matrix of the MLP",
    "expert": "expert of a mixture; NA for any other matrix",
    "matrix": "W_Q … W_out",
    "pathway": '"read" (d_model is the input) or "write" (d_model is the output)',
    "subspace": "name of the subspace the delta is held against",
    "rank": "k, the number of leading directions",
    "fraction": "share of the delta's squared norm in them, 0 to 1",
    "relative": "fraction · d/k; 1 is isotropic, d/k the most there can be; d is d_model, of W_UQ, W_UK and W_UV the "
    "width of the latent that they read",
    "isotropic_z": "standard deviations above the mean over Haar-random subspaces; NaN for a flat spectrum",
    "isotropic_p": "one-sided probability of a fraction this large in a Haar-random subspace",
    "p_method": '"exact", "beta", "draws", "saddlepoint", or "none" where p is NaN',
    "isotropic_q": "p corrected over families (matrix, subspace, rank), layers in them and heads in these",
    "activation_matched": "read: the fraction expected by chance under the chosen optimizer on this matrix's own "
    "inputs, cross-fitted over groups of texts, or weighted by the head's gradients where these are given; write: NaN",
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
    "tokens_routed": "tokens that count which the router gave this expert; NA outside mixtures, and where its choice "
    "cannot be seen",
    "routing_weight": "mean weight that the layer gave this expert's output on them; NaN likewise, or without tokens",
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
# What tells the rows of one run of layers apart, with the pathway.
_KEYS = list(PAIR_COLUMNS)[: list(PAIR_COLUMNS).index("rank") + 1]


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
    blocks = [
        _Block(numbers, matrix, subspace, column, optimizer=optimizer, few=few)
        for matrix, subspace in numbers.held
        for column, rank in enumerate(numbers.ranks_of(matrix, subspace))
        if rank in numbers.layout.measured[subspace]
        and (subspace == EXPERT_INPUT or bool(numbers.held[matrix, subspace].exists[:, column].any()))
    ]
    for d in dict.fromkeys(block.d for block in blocks):
        alike = [block for block in blocks if block.d == d]
        told = iter(IsotropicNull(d, seed=seed).tails_of([question for block in alike for question in block.asked()]))
        for block in alike:
            block.hear(told)
    ends = [*np.flatnonzero(np.diff(numbers.runs, prepend=-1)), len(numbers.runs)]
    of_runs = [judge([block.tested(slice(*run)) for block in blocks]) for run in pairwise(ends)]
    columns = [block.columns(joined([judged[i] for judged, _ in of_runs])) for i, block in enumerate(blocks)]
    # One frame for all blocks: pandas takes a millisecond or more for each, however few its rows.
    rows = pd.DataFrame({
        **numbers.rows([(block.heads, numbers.layout.units[block.matrix]) for block in blocks]),
        **{name: np.concatenate([np.ravel(of[name]) for of in columns]) for name in columns[0]},
    })  # fmt: skip
    rows["flags"] = _flags(rows)
    rows["tokens_routed"] = rows["tokens_routed"].astype("Int64")
    order = {matrix: i for i, matrix in enumerate(numbers.deltas)}
    rows = rows[rows["exists"]].sort_values(
        ["run", "matrix", "subspace", "layer", "head", "expert", "rank"],
        key=lambda c: c.map(order) if c.name == "matrix" else c,
        ignore_index=True,
        kind="stable",
    )
    return PairTables(
        rows[[*numbers.labels, *PAIR_COLUMNS]],
        _null_rows(rows, rows[[*numbers.labels, *_KEYS]]),
        tests_table([row for _, rows_of_run in of_runs for row in rows_of_run]),
    )


class _Version(NamedTuple):
    """Of a matrix in one subspace at one rank, `[place, head]`: its change, with weight decay or without."""

    inside: Tensor
    """Energy in the subspace."""
    energy: Tensor
    """Of the whole."""
    spectrum: Tensor
    """Eigenvalues of ΔW ΔWᵀ."""
    pooled: Tensor | None
    """Of the heads together."""
    tails: Tensor | None
    """Under the chosen optimiser's reference."""


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
        few: bool,
    ) -> None:
        self.numbers, self.matrix, self.subspace, self.column = numbers, matrix, subspace, column
        self.d, self.k = numbers.layout.width(matrix), numbers.layout.ranks[column]
        self.delta, self.held = numbers.deltas[matrix], numbers.held[matrix, subspace]
        self.reference = "weighted" if "weighted" in self.held.expected else optimizer
        self.fraction = self.held.inside[..., column] / self.delta.energy
        self.heads = self.fraction.shape[1]
        exists = self.held.exists[..., column]
        self.own = subspace == EXPERT_INPUT
        """Whether each expert has a subspace of its own."""
        self.exists = _wide(exists, self.heads).numpy() > 0
        # An expert with fewer tokens than the rank keeps its row, which says how many it had.
        self.rows = _wide(exists, self.heads).isfinite().numpy() if self.own else self.exists
        self.few = np.full(self.exists.shape, few)
        if self.own and self.delta.tokens_routed is not None:
            self.few |= (self.delta.tokens_routed < TOKENS_PER_DIMENSION * self.d).numpy()

    # -- evidence ------------------------------------------------------------------------------------------------

    def asked(self) -> list[Asked]:
        """What is asked of random subspaces: heads, and where there are several the heads pooled; ΔW, then ΔW − sW."""
        asked: list[Asked] = []
        for of in self._versions():
            asked.append((of.spectrum.flatten(0, 1), self.k, (of.inside / of.energy).flatten()))
            if of.pooled is not None:
                asked.append((of.pooled, self.k, of.inside.sum(-1) / of.energy.sum(-1)))
        return asked

    def hear(self, told: Iterator[Told]) -> None:
        """Take the answers, in the same order."""
        found = [self._evidence(of, told) for of in self._versions()]
        (self.evidence, self.method), (self.unshrunk, _) = found[0], found[-1]

    def tested(self, places: slice) -> Tested:
        """The evidence of one run of layers."""
        family = self.matrix, self.subspace
        evidence, unshrunk = (
            {question: Evidence(one.heads[places], one.pooled[places]) for question, one in of.items()}
            for of in (self.evidence, self.unshrunk)
        )
        return Tested(family, self.k, evidence, unshrunk, self._pooled()[places], self.k / self.d)

    def _pooled(self) -> np.ndarray:
        """Fraction of each place's heads as one delta."""
        there = self.delta.energy.isfinite()
        inside = self.held.inside[..., self.column].masked_fill(~there, 0)
        return (inside.sum(1) / self.delta.energy.masked_fill(~there, 0).sum(1)).numpy()

    def _versions(self) -> list[_Version]:
        """ΔW, and ΔW − sW where weight decay can make a difference."""
        delta, held = self.delta, self.held
        assert delta.spectrum is not None
        pooled, unshrunk_pooled = delta.pooled_spectrum, delta.unshrunk_pooled_spectrum
        if self.own:  # several subspaces, none of which the pooled change could be held against
            pooled = unshrunk_pooled = None
        versions = [_Version(held.inside[..., self.column], delta.energy, delta.spectrum, pooled, held.tails)]
        if delta.unshrunk_energy is not None and held.unshrunk_inside is not None:
            assert delta.unshrunk_spectrum is not None
            versions.append(_Version(
                held.unshrunk_inside[..., self.column], delta.unshrunk_energy, delta.unshrunk_spectrum,
                unshrunk_pooled, held.unshrunk_tails,
            ))  # fmt: skip
        return versions

    def _evidence(self, of: _Version, told: Iterator[Told]) -> tuple[dict[Question, Evidence], np.ndarray]:
        """p on both sides, against a random subspace and against the chosen optimiser's reference."""
        places, heads = of.energy.shape
        missing = ~self.exists
        *by_chance, method = next(told)
        together: list[np.ndarray] = [np.full(places, np.nan)] * 2
        if of.pooled is not None:
            *together, _ = next(told)
        found = {}
        for i, side in enumerate(("above", "below")):
            of_heads = np.where(missing, np.nan, by_chance[i].reshape(places, heads))
            found[ISOTROPIC, side] = Evidence(of_heads, np.where(missing.all(1), np.nan, together[i]))
            if of.tails is not None:
                items = of.tails[:, i, :, self.column].numpy()
                of_heads = items[:, :heads]
                whole = items[:, -1] if items.shape[1] > heads else np.full(places, np.nan)
                if side == "below":
                    # In-sample the expected fraction is too high: above that is conservative, below it the reverse.
                    # And weights of all heads together, where heads' own were not kept, make a head with other large
                    # gradients than its layer's seem below: half of them by chance in simulations.
                    untold = self.few | (self.reference == "weighted")
                    of_heads, whole = np.where(untold, np.nan, of_heads), np.where(untold.any(1), np.nan, whole)
                found[self.reference, side] = Evidence(of_heads, whole)
        return found, method.reshape(places, heads)

    # -- rows ----------------------------------------------------------------------------------------------------

    def columns(self, judged: Judged) -> dict[str, Tensor | np.ndarray]:
        """What `_flags` and `_null_rows` read and the rows' own columns, each `[place, head]`."""
        k, d, fraction, delta, held = self.k, self.d, self.fraction, self.delta, self.held
        share = delta.spectrum / delta.spectrum.sum(-1, keepdim=True)
        spread = isotropic_variance(share.square().sum(-1), d, k).sqrt()
        nan = torch.full_like(fraction, torch.nan)
        activation = self._expected(held.activation)
        gradient = nan if held.gradient is None else held.gradient[..., self.column]
        relative, excess = fraction * d / k, fraction / activation
        interval, of_excess = self._interval(relative), self._excess_interval(excess)
        λ, ρ = held.eigenvalues[..., self.column, :], delta.rounding
        tested = self.evidence.get((self.reference, "above"))
        chance = judged.versus[ISOTROPIC]
        reference = judged.versus.get(self.reference, np.full(fraction.shape, "", dtype=object))
        measurable = np.isfinite(self.evidence[ISOTROPIC, "above"].heads)
        kind = kind_of(self.matrix)
        same = {"matrix": self.matrix, "pathway": kind.side, "subspace": self.subspace, "rank": k, "d": d}
        mean, low, high = self._permuted()
        return {
            **{name: np.full(fraction.shape, value) for name, value in same.items()},
            # A layer may lack the matrix, or have fewer heads than others.
            "exists": self.rows & delta.energy.isfinite().numpy(),
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
            "eigengap": _wide(1 - λ[..., 1] / λ[..., 0], self.heads),
            "delta_norm": delta.energy.sqrt(),
            "delta_relative_norm": (delta.energy / delta.base_energy).sqrt(),
            "delta_shrink": delta.shrink,
            "delta_effective_rank": effective_rank(delta.spectrum),
            "tokens_routed": nan if delta.tokens_routed is None else delta.tokens_routed,
            "routing_weight": nan if delta.routing_weight is None else delta.routing_weight,
            "rounding_share": ρ,
            "fraction_unrounded": without_rounding(
                fraction, ρ, held.noise[..., self.column], most=ROUNDING_HOPELESS
            ),
            "biased": torch.where(interval.low.isfinite(), interval.biased, of_excess.biased) > 0,
            "decay": judged.decay,
            "few": self.few,
            **{f"expected/{null}": self._expected(held.expected.get(null)) for null in MATCHED},
            "expected/permutation": mean,
            "permutation_low": fraction / high,
            "permutation_high": fraction / low,
            "tested": np.full(fraction.shape, "lora" if "lora" in held.expected else self.reference),
        }  # fmt: skip

    def _expected(self, under_null: Tensor | None) -> Tensor:
        """What a null gives each head, by itself or as all of its layer; NaN where it does not apply."""
        if under_null is None:
            return torch.full_like(self.fraction, torch.nan)
        return _wide(under_null[..., self.column], self.heads)

    def _permuted(self) -> Tensor:
        """Mean and 95 % range over permutations, `[value, place, head]`."""
        if self.held.permuted is None:
            return torch.full((3, *self.fraction.shape), torch.nan)
        return self.held.permuted[..., self.column].transpose(0, 1)

    def _interval(self, relative: Tensor) -> Interval:
        """Of relative, over groups of texts."""
        if self.held.replicates is None:
            return _no_interval(relative)
        return log_jackknife_interval(relative, self._replicates() * self.d / self.k, corrected=True)

    def _excess_interval(self, excess: Tensor) -> Interval:
        """Of fraction over its cross-fitted reference: both move with the texts."""
        if self.held.activation_replicates is None:
            return _no_interval(excess)
        # [place, group, …] → [group, place, 1 or head]
        references = self.held.activation_replicates[..., self.column].transpose(0, 1)
        references = references if references.ndim == 3 else references.unsqueeze(-1)
        fractions = self.fraction if self.held.replicates is None else self._replicates()
        return log_jackknife_interval(excess, fractions / references, corrected=False)

    def _replicates(self) -> Tensor:
        """Fractions with one group of texts left out, `[group, place, head]`."""
        assert self.held.replicates is not None
        return self.held.replicates[..., self.column].transpose(0, 1) / self.delta.energy


def _no_interval(quantity: Tensor) -> Interval:
    nan = torch.full_like(quantity, torch.nan)
    return Interval(nan, nan, torch.zeros_like(quantity))


def _flags(rows: pd.DataFrame) -> list[str]:
    """The column `flags`."""
    sampled = rows["ci_low"].notna() | rows["excess_low"].notna()
    wide = rows["ci_high"] > _WIDE_INTERVAL * rows["ci_low"]
    conditions = {
        "eigengap": (rows["eigengap"] < SMALL_EIGENGAP) & ((rows["rank"] <= _SMALL_RANK) | wide),
        "biased": rows["biased"],
        "few_tokens": (sampled | rows["activation_matched"].notna()) & rows["few"],
        "decay": rows["decay"],
        "rounding": rows["rounding_share"] >= ROUNDING_FLAGGED,
        "rounding_dominated": rows["rounding_share"] >= ROUNDING_DOMINATED,
    }
    names = np.array(list(conditions))
    return [",".join(names[row]) for row in np.stack([c.to_numpy(bool) for c in conditions.values()], axis=1)]


def _null_rows(rows: pd.DataFrame, keys: pd.DataFrame) -> pd.DataFrame:
    """`PairAnalysis.nulls`: for each row of the table the nulls that apply, which are those that expect something."""
    of = {name: column.to_numpy() for name, column in rows.items()}
    reference = {"low": "excess_low", "high": "excess_high", "p": "excess_p", "q": "excess_q"}
    nulls: dict[str, dict[str, np.ndarray]] = {
        ISOTROPIC: {
            "expected": of["rank"] / of["d"],
            "low": of["ci_low"], "high": of["ci_high"], "p": of["isotropic_p"], "q": of["isotropic_q"],
        },
        **{
            null: {"expected": of[f"expected/{null}"]}
            | {name: np.where(of["tested"] == null, of[column], np.nan) for name, column in reference.items()}
            for null in MATCHED
        },
        "gradient": {"expected": of["gradient_matched"]},
        "permutation": {
            "expected": of["expected/permutation"], "low": of["permutation_low"], "high": of["permutation_high"],
        },
    }  # fmt: skip
    nothing = np.full(len(rows), np.nan)

    def values(name: str) -> np.ndarray:
        return np.stack([given.get(name, nothing) for given in nulls.values()], axis=1)

    expected = values("expected")
    row, null = np.nonzero(np.isfinite(expected))
    told = {name: values(name)[row, null] for name in ("low", "high", "p", "q")}
    excess = of["fraction"][row] / expected[row, null]
    return keys.iloc[row].assign(
        null=np.array(list(nulls))[null], expected=expected[row, null], excess=excess, **told
    ).reset_index(drop=True)  # fmt: skip


def _wide(numbers: Tensor, heads: int) -> Tensor:
    """Of layers, the same for each of their heads; of heads, themselves."""
    return numbers if numbers.ndim == 2 else numbers.unsqueeze(-1).expand(-1, heads)
