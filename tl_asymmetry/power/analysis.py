"""How large a mark must be to be found: directions of known size planted in deltas of the pair's own making."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.nulls import IsotropicNull
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.rounding import storage_dtype
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.prediction import predictions_of
from tl_asymmetry.models.processes import ALONE
from tl_asymmetry.models.strangers import warn_of_strangers
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import WeightSource
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.analysis import captured
from tl_asymmetry.pair.bases import LayerBases
from tl_asymmetry.pair.deltas import LiveDelta, measure_delta, residual_first
from tl_asymmetry.pair.memory_plan import plan_memory
from tl_asymmetry.pair.plan import Plan, check_asked, counted_tokens, grouped_sequences, make_plan
from tl_asymmetry.pair.reference_tests import reference_tails
from tl_asymmetry.power.planting import by_chance, directions_within, lone_threshold, planted
from tl_asymmetry.power.result import PowerAnalysis, power_tables
from tl_asymmetry.results.nulls import ISOTROPIC
from tl_asymmetry.results.provenance import described, pair_record, shape_record, versions
from tl_asymmetry.settings import OpenPair, PairSettings, open_pair

SIZES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
"""Shares planted unless others are asked for."""
_NUMBERS = 1 << 25
"""Of changes that are tested at once."""


@checked
@with_fresh_settings
def detection_power(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    sizes: Sequence[float] | None = None,
    plants: int = 200,
    power: float = 0.8,
    matrices: Sequence[str] | None = None,
    rank: int | None = None,
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None,
    optimizer: str = "adam",
    exclude_first: bool = True,
    batch_size: int = 8,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PowerAnalysis:
    """How large must a mark be for `analyze_pair` to find it in this pair, with these texts and this storage?

    A head's ΔW is replaced by one that is chance: of the same norm, of the spectrum of its own ΔW in random frames
    (for the isotropic null), or of the spectrum that its own ΔW has once whitened by the input, in a random frame, put
    through the input's covariance again (for the reference of the chosen optimizer). A share of its energy is then
    moved into one random direction of the subspace. The sum is added to the base's weights, stored in the format of
    the aligned ones, and measured and tested as `analyze_pair` does. A plant is found where its p, with weight decay
    and without, is one that the hierarchy calls in a single head while every other test of the pair has p = 1: what
    other heads, or the layer as a whole, might add is not counted. The definitions are ours.

    Args:
        model_base: a HookedTransformer, TransformerBridge or transformers model with raw weights, or its folder or name
            on the Hub.
        model_aligned: the same, or anything `weights_from` reads but an adapter.
        texts: strings or chats; the package's calibration texts without texts and tokens.
        tokens, mask: token ids instead of texts, and which of them count.
        sizes: shares of ‖ΔW‖² to plant, 0 to 1; 0, which says how often nothing is found, is always among them.
        plants: how many of each size, at least, for each matrix, subspace and null.
        power: the share of plants found from which on a size counts as found.
        matrices: which; None: all that every layer has. The fewer are tested, the weaker is the correction.
        rank: of the subspaces; None: the one that `analyze_pair` shows.
        subspaces: as in `analyze_pair`.
        optimizer: whose reference is tested, "adam", "sgd" or "muon".
        exclude_first: leave the first position of each sequence out.
        batch_size: sequences per pass.
        max_tokens: use no more tokens of the texts than this.
        seed: of all draws.
        progress: show progress bars.

    Returns:
        A frozen `PowerAnalysis`.

    Raises:
        ValueError: what `analyze_pair` refuses; shares outside 0 to 1; no plants; an adapter; a pair without a change.

    Example:
        >>> from tl_asymmetry.demo import demo_texts
        >>> found = detection_power(
        ...     base, aligned, demo_texts(20, seed=1), matrices=["W_O"], subspaces=["prediction"], sizes=[1], plants=16,
        ...     progress=False,
        ... )
        >>> found.table[["size", "plants", "found"]].values.tolist()
        [[0.0, 16.0, 0.0], [1.0, 16.0, 16.0]]
    """
    settings = PairSettings(
        matrices=matrices, ranks=None if rank is None else [rank], subspaces=subspaces, optimizer=optimizer,
        exclude_first=exclude_first, batch_size=batch_size, max_tokens=max_tokens, groups=1, distributed=False,
        seed=seed, progress=progress,
    )  # fmt: skip
    shares = _shares(sizes)
    if plants < 1:
        raise ValueError(f"expected plants of at least 1, got {plants}; pass plants=200")
    if not 0 < power < 1:
        raise ValueError(f"expected a power above 0 and below 1, got {power}; pass power=0.8")
    arguments = described(texts=texts, tokens=tokens, mask=mask) | settings.described()
    pair = open_pair(
        model_base, model_aligned, texts, tokens, mask, max_tokens=max_tokens,
        check=lambda base: check_asked(base, settings),
    )  # fmt: skip
    base, notes = pair.base, pair.notes
    plan = make_plan(base, settings, pair.sequences, notes)
    hashes = pair.checked_hashes()
    warn_of_strangers(base, pair.aligned, notes)
    changed = _changed(pair, plan)
    unchanged = [matrix for matrix, heads in changed.items() if not heads.any()]
    if len(unchanged) == len(changed):
        raise ValueError(
            "expected a pair in which a matrix changed, got none; pass a base and what was trained from it"
        )
    if unchanged:
        notes.add(f"{', '.join(unchanged)} are the same in both models: nothing is planted there")
    memory = plan_memory(base, plan, pair.sequences, settings, ALONE)
    grouped, _ = grouped_sequences(pair.sequences, settings, notes)
    work = _Work(pair, plan, settings, shares, {m: _repeats(plants, heads) for m, heads in changed.items()})
    with torch.no_grad():
        given = {**predictions_of(base), **plan.given}
        for few in memory.passes:
            sources = captured(pair, grouped, plan, few, settings, ALONE, intervals=False)
            for layer in tqdm(few, desc="planting", unit="layer", disable=not progress):
                bases = LayerBases(
                    layer, sources.groups, given, centered=False, exact=base.dtype == torch.float64,
                    softmax_centres_keys=base.key_shift_invariant, optimizer=optimizer,
                )  # fmt: skip
                for matrix in plan.matrices:
                    if changed[matrix][layer].any():
                        work.plant(matrix, bases)
    found = _found(work, base.n_layers)
    if not found:
        raise ValueError(f"expected a subspace with {plan.shown_rank} directions, got none; pass a smaller rank")
    table, smallest = power_tables(found, shares, power)
    config = {
        "arguments": arguments | described(sizes=shares, plants=plants, power=power, rank=rank),
        "versions": versions(),
        "models": pair_record(base, pair.aligned, hashes),
        "shape": shape_record(base),
        "power": power,
        "optimizer": optimizer,
        "tokens": counted_tokens(pair.sequences, settings),
        "sequences": len(pair.sequences),
    }
    return PowerAnalysis(table=table, smallest=smallest, config=config, notes=tuple(notes.lines), arrays={})


Key = tuple[str, str, int, str]
"""Matrix, subspace, rank, null."""


@dataclass
class _Work:
    """Plants one layer after the other, and keeps their p."""

    pair: OpenPair
    plan: Plan
    settings: PairSettings
    shares: Sequence[float]
    repeats: Mapping[str, int]
    p: dict[Key, dict[int, np.ndarray]] = field(default_factory=dict)
    """By layer, `[size, repeat, head]`; NaN where there is nothing to plant."""

    def plant(self, matrix: str, bases: LayerBases) -> None:
        """All plants of a matrix in one layer."""
        W, trained = (weights.weight(bases.layer, matrix) for weights in (self.pair.base, self.pair.aligned))
        change = measure_delta(matrix, W, trained, seed=self.settings.seed)
        covariance = None
        if kind_of(matrix).reads:
            covariance = bases.matched(matrix, columns=change.numbers.columns)
        whitened, root = None, None
        if covariance is not None:
            whitened = (
                covariance.whitened_spectra(change.factors()[0])
                if change.gram is None
                else covariance.whitened_gram_spectra(change.gram)
            )[0]
            root = covariance.root
        for name in self.plan.targets[matrix]:
            subspace, k = bases.subspace(name), _rank_of(self.plan, name)
            if subspace.existing < k:
                continue
            basis = subspace.basis[:, :k]
            key = matrix, name, k
            at = self.p.setdefault((*key, ISOTROPIC), {})
            made = self._made(change, W, trained, basis, change.numbers.spectrum, None, (*key, bases.layer, ISOTROPIC))
            null = IsotropicNull(len(basis), seed=self.settings.seed)
            at[bases.layer] = self._folded(matrix, _against_chance(made, basis, null))
            if whitened is not None:
                optimizer = self.settings.optimizer
                at = self.p.setdefault((*key, optimizer), {})
                made = self._made(change, W, trained, basis, whitened, root, (*key, bases.layer, optimizer))
                at[bases.layer] = self._folded(matrix, _against_reference(made, bases, name, k))

    def _made(
        self,
        change: LiveDelta,
        W: Tensor,
        trained: Tensor,
        basis: Tensor,
        spectrum: Tensor,
        root: Tensor | None,
        key: tuple[str | int, ...],
    ) -> Iterator[LiveDelta]:
        """Every repeat at every size: the same chance and the same direction at each size."""
        before, stored = residual_first(change.matrix, W), storage_dtype(trained)
        heads, d, other = before.shape
        norm = change.numbers.energy.sqrt()[:, None, None]
        for repeat in range(self.repeats[change.matrix]):
            generator = seeded(self.settings.seed, "plant", *key, repeat)
            background = by_chance(spectrum, d, other, generator, root)
            u = directions_within(basis, heads, generator)
            v = directions_within(torch.eye(other), heads, generator)
            for share in self.shares:
                # A head that did not change has no background: it stays as it is, and is no test.
                delta = (norm * planted(background, u, v, share)).nan_to_num().to(before.device)
                after = (before.double() + delta).to(stored).to(trained.dtype)
                after = after.mT if kind_of(change.matrix).writes else after
                yield measure_delta(change.matrix, W, after.reshape(W.shape), seed=self.settings.seed)

    def _folded(self, matrix: str, p: Float[np.ndarray, "made head"]) -> np.ndarray:
        return p.reshape(self.repeats[matrix], len(self.shares), -1).swapaxes(0, 1)


def _against_chance(made: Iterator[LiveDelta], basis: Tensor, null: IsotropicNull) -> Float[np.ndarray, "made head"]:
    """p of each delta's heads against a random subspace, with weight decay and without, the larger one."""
    spectra: list[Tensor] = []
    fractions: list[Tensor] = []
    for live in made:
        for one in (live, live.unshrunk or live):
            spectra.append(one.numbers.spectrum)
            fractions.append(one.energies(basis).sum(-1) / one.numbers.energy)
    p, _ = null.tail(torch.cat(spectra), basis.shape[1], torch.cat(fractions))
    return p.reshape(len(fractions) // 2, 2, -1).max(1)


def _against_reference(
    made: Iterator[LiveDelta], bases: LayerBases, name: str, k: int
) -> Float[np.ndarray, "made head"]:
    """The same against the chosen optimizer's reference, of as many at once as there is room for."""
    found: list[Tensor] = []
    for first in made:
        others = max(0, _NUMBERS // first.numbers.noise_rows.shape[1] // max(1, first.numbers.columns) - 1)
        some = [first, *islice(made, others)]
        versions = [[one for one in (live, live.unshrunk) if one is not None] for live in some]
        tails = iter(reference_tails([(one, [name]) for of in versions for one in of], bases, [k]))
        above = [[next(tails)[name][0, : len(first.numbers.energy), 0] for _ in of] for of in versions]
        found += [torch.stack(of).amax(0) for of in above]
    return torch.stack(found).numpy()


def _found(work: _Work, n_layers: int) -> dict[Key, tuple[np.ndarray, float]]:
    """Whether each plant is found, `[size, plant]`, and the smallest p over layers at which one is."""
    tested = {}
    for key, layers in work.p.items():
        heads = next(iter(layers.values())).shape[-1]
        mask = np.zeros((n_layers, heads), dtype=bool)
        for layer, p in layers.items():
            mask[layer] = np.isfinite(p).any((0, 1))
        if mask.any():
            tested[key] = mask
    found = {}
    for key, mask in tested.items():
        # `analyze_pair` corrects over all that it holds at this rank against this null, shown here or not.
        together = {of: m for of, m in tested.items() if key[2] in work.plan.measured[of[1]] and of[3] == key[3]}
        called, thresholds = [], []
        for layer in np.flatnonzero(mask.any(1)).tolist():
            thresholds.append(lone_threshold(together, key, layer))
            called.append((work.p[key][layer][..., mask[layer]] <= thresholds[-1]).reshape(len(work.shares), -1))
        found[key] = np.concatenate(called, 1), min(thresholds)
    return found


def _shares(sizes: Any) -> list[float]:
    listed = SIZES if sizes is None else [sizes] if isinstance(sizes, Real) else sizes
    if isinstance(listed, str | bytes | Mapping) or not hasattr(listed, "__iter__"):
        raise ValueError(f"expected sizes as a list of shares, got {shown(sizes)}; pass sizes=[0.1, 0.2, 0.5]")
    shares = list(listed)
    wrong = [s for s in shares if isinstance(s, bool) or not isinstance(s, Real) or not 0 <= float(s) <= 1]
    if wrong or not shares:
        got = shown(wrong[0]) if wrong else "none"
        raise ValueError(f"expected sizes as shares from 0 to 1, got {got}; pass sizes=[0.1, 0.2, 0.5]")
    return sorted({0.0, *map(float, shares)})


def _repeats(plants: int, changed: Bool[np.ndarray, "layer head"]) -> int:
    return math.ceil(plants / max(1, int(changed.sum())))


def _rank_of(plan: Plan, subspace: str) -> int:
    ranks = plan.measured[subspace]
    return plan.shown_rank if plan.shown_rank in ranks else ranks[-1]


def _changed(pair: OpenPair, plan: Plan) -> dict[str, Bool[np.ndarray, "layer head"]]:
    """Which heads of which layers differ; an adapter is refused."""
    base: ModelView = pair.base
    if isinstance(pair.aligned, WeightSource) and any(
        pair.aligned.factors(layer, matrix) is not None for matrix in plan.matrices for layer in range(base.n_layers)
    ):
        raise ValueError(
            f"expected whole weights, got the adapter {pair.aligned.name!r}, in whose few directions nothing can be "
            "planted; pass the merged model"
        )
    return {
        matrix: np.stack([
            (residual_first(matrix, pair.aligned.weight(layer, matrix)).to(base.device) != residual_first(matrix, W))
            .flatten(1).any(1).cpu().numpy()
            for layer in range(base.n_layers)
            for W in [base.weight(layer, matrix)]
        ])
        for matrix in plan.matrices
    }  # fmt: skip
