"""The table of truth: how often every p, q and interval that the package prints is wrong where the truth is known.

    python -m benchmarks.calibration                # all cells not yet in benchmarks/results/calibration.json
    python -m benchmarks.calibration --share 0.3    # the same with fewer draws
    python -m benchmarks.calibration --quick        # 2 % of the draws, to see that all of them run; into another file
    python -m benchmarks.calibration --only tool    # cells whose name holds a word
    python -m benchmarks.calibration --page         # docs/calibration.md from the JSON

A cell is one null (or plant) and one number of the package; it has a seed of its own, is written to the JSON as soon as
it is done, and is not run again while the JSON has it with as many draws (`--again` runs it). Shares have standard
errors: the binomial one, or that between simulated layers where the heads of a layer share their inputs and so are not
independent, whichever is larger. Simulated at d 64, rank 4, 16 columns a head, unless the cell says otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from benchmarks import calibration_page, chance_updates, whole_tool
from benchmarks.chance_updates import SEQUENCE, Inputs, Law, planted
from tl_asymmetry.geometry.fraction import projected_energy, subspace_fraction
from tl_asymmetry.geometry.hierarchy import hierarchy
from tl_asymmetry.geometry.jackknife import log_jackknife_interval
from tl_asymmetry.geometry.matched import Asked, MatchedCovariance, laws_at, matched_tails
from tl_asymmetry.geometry.nulls import PERMUTATIONS, IsotropicNull, order_range
from tl_asymmetry.geometry.references import (
    AdapterCovariance,
    CrossFit,
    correlation,
    expected_fraction,
    input_covariance,
    inverse_size,
)
from tl_asymmetry.geometry.rounding import rounding_noise
from tl_asymmetry.geometry.subspace import ordered_eigh
from tl_asymmetry.geometry.two_samples import separation
from tl_asymmetry.geometry.two_sided import two_sided_share, two_sided_tail
from tl_asymmetry.interventions.design import matched_controls, removal_edit
from tl_asymmetry.interventions.tables import standing
from tl_asymmetry.names import SIGNIFICANT, SMALL_EIGENGAP

RESULTS = Path(__file__).parent / "results" / "calibration.json"
PAGE = Path(__file__).parent.parent / "docs" / "calibration.md"
LEVELS = (0.05, 0.01, 1e-4)
D, K, HEADS, COLUMNS = 64, 4, 16, 16
TRAINED = 2048
"""Tokens of an SGD update."""
TEXTS = 1024
"""Tokens of the texts that the pair is analysed on: others than those it was trained on, unless a cell says so."""
ENOUGH = 5
"""Hits expected by chance without which a level is not reported."""

Found = Mapping[str, np.ndarray]
"""Of one run: p-values, or whether something held, by name; the first name is the one that the bound is on."""


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    section: str
    """Which part of the page."""
    name: str
    """What is simulated."""
    run: Callable[[Generator], Found]
    """One simulated layer, or a batch of independent draws."""
    runs: int
    """How many of them."""
    kind: str = "size"
    """What the numbers are: "size" (p under a null), "power" (p of a plant), "coverage", "at most", "at least"."""
    bound: float | None = None
    """For "at most" and "at least"."""
    exception: str = ""
    """Why it may break its bound, where that is inherent and the package says so."""

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return f"{self.section}: {self.name}"


def measure(cell: Cell, runs: int, *, progress: bool = True) -> dict[str, Any]:
    """Run a cell from its own seed, and what the page needs of it."""
    generator = Generator().manual_seed(zlib.crc32(cell.key.encode()))
    start = time.perf_counter()
    done = [cell.run(generator) for _ in tqdm(range(runs), desc=cell.key[:60], leave=False, disable=not progress)]
    found: dict[str, Any] = {}
    for name in done[0]:
        parts = [np.asarray(one[name], dtype=float).ravel() for one in done]
        if name.startswith("median"):
            found[name] = float(np.nanmedian(np.concatenate(parts)))
        elif cell.kind in ("size", "power"):
            found[name] = _shares_below(parts)
        else:
            found[name] = _share(parts)
    return {
        "section": cell.section,
        "name": cell.name,
        "kind": cell.kind,
        "bound": cell.bound,
        "exception": cell.exception,
        "runs": runs,
        "found": found,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _shares_below(parts: Sequence[np.ndarray]) -> dict[str, dict[str, float | None]]:
    count = sum(int(np.isfinite(part).sum()) for part in parts)
    return {
        f"{level:g}": _share([np.where(np.isfinite(part), part <= level, np.nan) for part in parts])
        for level in LEVELS
        if level == LEVELS[0] or count * level >= ENOUGH
    }


def _share(parts: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Mean over all that is not NaN and its standard error."""
    everything = np.concatenate(parts)
    count = int(np.isfinite(everything).sum())
    if not count:
        return {"share": None, "error": None, "of": 0}
    share = float(np.nanmean(everything))
    error = np.sqrt(max(share * (1 - share), 1 / count) / count)
    # Runs of several numbers: their sums over the expected ones vary between runs, however many there are in each.
    if len(parts) > 1 and count > len(parts):
        residuals = np.array([np.nansum(part - share) for part in parts])
        error = max(error, float(np.sqrt(residuals.var() * len(parts)) / count))
    return {"share": share, "error": float(error), "of": count}


# -- the isotropic null ------------------------------------------------------------------------------------------


def isotropic(generator: Generator, *, spectrum: Tensor | None, k: int, d: int = D, draws: int = 2000) -> Found:
    """Deltas of one spectrum in Haar-random directions, or (None) Gaussian ones, against the first k coordinates."""
    r = COLUMNS if spectrum is None else len(spectrum)
    G = torch.randn(draws, d, r, generator=generator, dtype=torch.float64)
    if spectrum is None:
        λ = torch.linalg.eigvalsh(G.mT @ G).flip(-1)
        fraction = G[:, :k].square().sum((1, 2)) / G.square().sum((1, 2))
    else:
        λ = spectrum.double().expand(draws, -1)
        R = torch.linalg.cholesky(G.mT @ G)
        Q = torch.linalg.solve_triangular(R, G[:, :k].mT, upper=False).mT  # the first k rows of a Haar frame
        fraction = (Q.square() @ spectrum.double().unsqueeze(-1)).sum((1, 2)) / spectrum.double().sum()
    above, below, _ = IsotropicNull(d, seed=0).tails(λ, k, fraction)
    return {"above": above, "below": below}


# -- the test against what training gives on the inputs ----------------------------------------------------------


def excess(
    moment: Tensor, mean: Tensor, changes: Tensor, *, optimizer: str, k: int = K, basis: Tensor | None = None,
    columns: int = HEADS * COLUMNS, noise: Tensor | None = None,
) -> Found:  # fmt: skip
    """The package's test of every head, and its two halves: as it is, and without the mean input."""
    Q = ordered_eigh(moment)[1][:, :k] if basis is None else basis.double()
    C = input_covariance(moment, optimizer, columns=columns)
    μ = mean.double()
    if optimizer == "adam":
        μ = inverse_size(moment.diagonal()) * μ
    covariance = MatchedCovariance.of(C, μ)
    return under(covariance, covariance.persistent if optimizer == "adam" else None, changes, Q, noise)


def under(
    covariance: MatchedCovariance,
    limit: MatchedCovariance | None,
    changes: Tensor,
    Q: Tensor,
    noise: Tensor | None = None,
) -> Found:
    """The same from the left covariance by chance and, under Adam, from that of gradients that persist.

    `noise`: energy of storage noise in the rows of every head.
    """
    halves, ratio = _halves(covariance, changes, Q, noise)
    above, below = torch.maximum(*halves)
    if limit is not None:
        below = torch.maximum(below, torch.maximum(*_halves(limit, changes, Q, noise)[0])[1])
    return {
        "above": above.numpy(),
        "below": below.numpy(),
        "as it is": halves[0][0].numpy(),
        "without the mean": halves[1][0].numpy(),
        "median excess": ratio.numpy(),
    }


def _halves(
    covariance: MatchedCovariance, changes: Tensor, Q: Tensor, noise: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Both tails as it is and without the mean input; and the fraction over its reference."""
    halves = _asked(covariance, changes, Q, noise)
    law, _, fraction = halves[0][0]
    return [reduce(torch.maximum, matched_tails(half)) for half in halves], fraction / law.expected


def _asked(covariance: MatchedCovariance, changes: Tensor, Q: Tensor, noise: Tensor | None = None) -> list[list[Asked]]:
    """What is asked of the changes as they are and without the mean input, of each without storage noise too."""
    k, mean = Q.shape[1], covariance.mean
    assert mean is not None
    off = torch.eye(len(mean), dtype=torch.float64) - torch.outer(mean, mean)
    halves = []
    for X, frame, kept, spectrum, laws in zip(
        (changes.double(), off @ changes.double()),
        (Q, off @ Q),
        (torch.ones_like(mean), off.diagonal()),
        covariance.whitened_spectra(changes),
        laws_at(covariance, Q, [k]),
        strict=True,
    ):
        inside, whole = projected_energy(X, frame)
        law, fraction = laws[k], inside.sum(-1) / whole
        told = [fraction]
        if noise is not None:
            told.append(fraction + (noise @ kept * law.expected - noise @ frame.square().sum(-1)) / whole)
        halves.append([(law, spectrum, f) for f in told])
    return halves


def _texts(inputs: Inputs, tokens: int, generator: Generator) -> tuple[Tensor, Tensor]:
    a = inputs.draw(tokens, generator).double()
    return a.T @ a / tokens, a.mean(0)


def sgd_null(
    generator: Generator, *, inputs: Inputs, law: Law = chance_updates.gaussian, texts: int = TEXTS,
    own: bool = False, k: int = K, columns: int = COLUMNS,
) -> Found:  # fmt: skip
    """One step of SGD; `own`: analysed on the very tokens that it was trained on."""
    a = inputs.draw(texts if own else TRAINED, generator)
    changes = chance_updates.sgd(a, law, HEADS, columns, generator)
    moment, mean = ((a.T @ a / len(a)).double(), a.mean(0)) if own else _texts(inputs, texts, generator)
    return excess(moment, mean, changes, optimizer="sgd", k=k)


def adam_null(
    generator: Generator, *, inputs: Inputs, steps: int, law: Law = chance_updates.gaussian, texts: int = TEXTS,
    optimizer: str = "adam", **how: Any,
) -> Found:  # fmt: skip
    """Adam, analysed with the reference of an optimizer."""
    changes = chance_updates.adam(inputs, law, HEADS, COLUMNS, generator, steps=steps, **how)
    return excess(*_texts(inputs, texts, generator), changes, optimizer=optimizer)


def muon_null(generator: Generator, *, inputs: Inputs, steps: int, together: bool) -> Found:
    """Muon on all heads as one matrix, or on matrices of 16 columns."""
    changes = chance_updates.muon(inputs, HEADS, COLUMNS, generator, steps=steps, together=together)
    columns = HEADS * COLUMNS if together else COLUMNS
    return excess(*_texts(inputs, TEXTS, generator), changes, optimizer="muon", columns=columns)


def lora_null(generator: Generator, *, inputs: Inputs, rate: float, merged: bool = False) -> Found:
    """An adapter of rank 8 whose heads share A, tested within what A reads; `merged`: tested as any other change."""
    A, changes = chance_updates.lora(inputs, HEADS, COLUMNS, generator, steps=24, rank=8, rate=rate)
    moment, mean = _texts(inputs, TEXTS, generator)
    if merged:
        return excess(moment, mean, changes, optimizer="adam")
    own, limit = (AdapterCovariance.of(A, moment, mean, optimizer) for optimizer in ("adam", "sign"))
    Q = ordered_eigh(moment)[1][:, :K]
    covariances = (MatchedCovariance.of(adapter.covariance, adapter.mean) for adapter in (own, limit))
    return under(*covariances, own.frame.mT @ changes.double(), own.frame.mT @ Q)


def decay_null(generator: Generator, *, inputs: Inputs, share: float) -> Found:
    """An isotropic change, and a decay of weights that lie along the inputs with `share` of the energy.

    "above" is what the package counts: found in ΔW and in ΔW − sW.
    """
    shape = HEADS, D, COLUMNS
    W = inputs.root @ torch.randn(shape, generator=generator)
    noise = torch.randn(shape, generator=generator)
    ΔW = (1 - share) ** 0.5 * noise - share**0.5 * noise.norm() / W.norm() * W
    s = (ΔW * W).sum() / W.square().sum()
    Q = ordered_eigh(inputs.moment)[1][:, :K]
    with_it, without = (_against_chance(change, Q)["above"] for change in (ΔW, ΔW - s * W))
    return {"above": np.maximum(with_it, without), "of ΔW": with_it, "of ΔW − sW": without}


def _against_chance(changes: Tensor, Q: Tensor) -> Found:
    λ, fraction = _spectrum_and_fraction(changes, Q)
    above, below, _ = IsotropicNull(changes.shape[1], seed=0).tails(λ, Q.shape[1], fraction)
    return {"above": above, "below": below}


def stored(generator: Generator, *, inputs: Inputs, size: float, chance: str, rows: float = 0.0) -> Found:
    """A change of `size` times the weights, stored in bf16; rows of the weights log-normal with σ `rows`."""
    shape = HEADS, D, COLUMNS
    W = torch.randn(shape, generator=generator) * torch.exp(rows * torch.randn(D, 1, generator=generator))
    W = W.bfloat16().float()
    if chance == "sgd":
        ΔW = chance_updates.sgd(inputs.draw(TRAINED, generator), chance_updates.gaussian, HEADS, COLUMNS, generator)
    else:
        ΔW = torch.randn(shape, generator=generator)
    ΔW = (W + size * W.norm() / ΔW.norm() * ΔW).bfloat16().float() - W
    rounding = rounding_noise(W, ΔW, torch.bfloat16, seed=0)
    if chance == "sgd":
        noise = (rounding.share * ΔW.double().square().sum((1, 2))).unsqueeze(-1) * rounding.rows
        found = dict(excess(*_texts(inputs, TEXTS, generator), ΔW, optimizer="sgd", noise=noise))
    else:
        Q = torch.eye(D, dtype=torch.float64)[:, :K] if rows else ordered_eigh(inputs.moment)[1][:, :K]
        found = dict(_against_chance(ΔW, Q))
    return {**found, "median rounding share": rounding.share.numpy()}


# -- plants --------------------------------------------------------------------------------------------------------


def plant(generator: Generator, *, inputs: Inputs, share: float, against: str) -> Found:
    """An update by chance with a share of its energy moved into the leading directions."""
    moment, mean = _texts(inputs, TEXTS, generator)
    Q = ordered_eigh(moment)[1][:, :K]
    if against == "chance":
        return _against_chance(
            planted(torch.randn(HEADS, D, COLUMNS, generator=generator), Q.float(), share, generator), Q
        )
    if against == "sgd":
        changes = chance_updates.sgd(
            inputs.draw(TRAINED, generator), chance_updates.gaussian, HEADS, COLUMNS, generator
        )
    else:
        changes = chance_updates.adam(inputs, chance_updates.gaussian, HEADS, COLUMNS, generator, steps=24)
    return excess(moment, mean, planted(changes, Q.float(), share, generator), optimizer=against)


@dataclass(frozen=True)
class Forest:
    """A whole pair at kernel level: 4 families of 4 layers of 8 heads, tested and corrected as the package does."""

    against: str
    """"chance" or "sgd"."""
    plants: int
    """Heads of the first layer of the first family, 0.8 of whose energy lies in the leading directions."""
    families: int = 4
    layers: int = 4
    heads: int = 8

    def __call__(self, generator: Generator) -> Found:
        """Whether anything true is rejected, and the false share of what is found."""
        at = [(family, layer) for family in range(self.families) for layer in range(self.layers)]
        layers = [self._layer(generator, self.plants * (place == (0, 0))) for place in at]
        tests = np.stack(layers if self.against == "sgd" else self._by_chance(layers))
        tests = tests.reshape(self.families, self.layers, self.heads + 1)
        tree = hierarchy(
            {str(i): p[:, :-1] for i, p in enumerate(tests)}, {str(i): p[:, -1] for i, p in enumerate(tests)}
        )
        found = np.stack([tree.head_q[family] <= SIGNIFICANT for family in tree.head_q])
        true = np.zeros_like(found)
        true[0, 0, : self.plants] = True
        false, all_found = (found & ~true).sum((1, 2)), found.sum((1, 2))
        selected = np.array([q <= SIGNIFICANT for q in tree.family_q.values()])
        proportions = (false / np.maximum(all_found, 1))[selected]
        if not self.plants:
            return {"a family found": np.array([selected.any()]), "a head found": np.array([found.any()])}
        return {
            "false share of families found": np.array([selected[1:].sum() / max(selected.sum(), 1)]),
            "false share of heads, mean over families found": np.array([proportions.mean() if selected.any() else 0.0]),
            "plants found": found[true],
        }

    def _layer(self, generator: Generator, plants: int) -> Any:
        """p of the heads and of these pooled; against chance what `_by_chance` needs."""
        inputs = Inputs.of("rotated")
        moment, mean = _texts(inputs, TEXTS, generator)
        Q = ordered_eigh(moment)[1][:, :K]
        if self.against == "chance":
            changes = torch.randn(self.heads, D, COLUMNS, generator=generator)
        else:
            a = inputs.draw(TRAINED, generator)
            changes = chance_updates.sgd(a, chance_updates.gaussian, self.heads, COLUMNS, generator)
        if plants:
            moved = planted(changes[:plants], Q.float(), 0.8, generator)
            changes = torch.cat([moved, changes[plants:]])
        together = changes.transpose(0, 1).flatten(1).unsqueeze(0)
        if self.against == "chance":
            return [_spectrum_and_fraction(X, Q) for X in (changes, together)]
        return np.concatenate([excess(moment, mean, X, optimizer="sgd")["above"] for X in (changes, together)])

    def _by_chance(self, layers: Sequence[Any]) -> list[np.ndarray]:
        """All layers at once: the null's draws are the same."""
        null, p = IsotropicNull(D, seed=0), []
        for part in zip(*layers, strict=True):
            λ, f = (torch.cat(pieces) for pieces in zip(*part, strict=True))
            p.append(null.tail(λ, K, f)[0].reshape(len(layers), -1))
        return list(np.concatenate(p, axis=1))


def _spectrum_and_fraction(changes: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    X = changes.double()
    gram = X.mT @ X if X.shape[2] <= X.shape[1] else X @ X.mT
    return torch.linalg.eigvalsh(gram).flip(-1), subspace_fraction(X, Q)


def inside_of_many(generator: Generator, *, rank: int) -> Found:
    """One head of 1,024 wholly inside U_4, the others isotropic: whether its q is below 1e-6."""
    layers = heads = 32
    changes = torch.randn(layers * heads, D, COLUMNS, generator=generator)
    Q = torch.linalg.qr(torch.randn(D, K, generator=generator, dtype=torch.float64)).Q
    factor = torch.randn(K, rank, generator=generator) @ torch.randn(rank, COLUMNS, generator=generator)
    changes[0] = Q.float() @ factor
    found = _against_chance(changes, Q)["above"].reshape(layers, heads)
    X = changes.unflatten(0, (layers, heads)).transpose(1, 2).flatten(2).double()
    energy, whole = projected_energy(X, Q)
    pooled = IsotropicNull(D, seed=0).tail(torch.linalg.eigvalsh(X @ X.mT).flip(-1), K, energy.sum(-1) / whole)[0]
    q = hierarchy({"W_Q": found}, {"W_Q": pooled}).head_q["W_Q"]
    return {"q below 1e-6": np.array([q[0, 0] < 1e-6]), "another found": (q.ravel()[1:] <= SIGNIFICANT)}


# -- intervals -----------------------------------------------------------------------------------------------------


def intervals(generator: Generator, *, inputs: Inputs, sequences: int, k: int = K, groups: int = 8) -> Found:
    """Whether intervals over texts hold what infinitely many texts would give, wherever no flag warns.

    A third of the deltas is isotropic, a third an SGD update, a third has plants.
    """
    a = inputs.draw(sequences * SEQUENCE, generator).double()
    sums = [part.mT @ part for part in a.chunk(groups)]
    truth = ordered_eigh(inputs.moment)[1][:, :k]
    changes = chance_updates.sgd(inputs.draw(TRAINED, generator), chance_updates.gaussian, 12, COLUMNS, generator)
    changes = torch.cat([
        torch.randn(4, D, COLUMNS, generator=generator), changes[:4],
        planted(changes[8:], truth.float(), 0.4, generator),
    ]).double()  # fmt: skip
    whole = sum(sums[1:], sums[0])
    λ, Q = ordered_eigh(whole)
    fit = CrossFit(sums)
    replicates = []
    for group, S in enumerate(sums):
        rest = ordered_eigh(whole - S)[1][:, :k]
        fit.add(group, rest)
        replicates.append(subspace_fraction(changes, rest))
    fraction, population = subspace_fraction(changes, Q[:, :k]), subspace_fraction(changes, truth)
    interval = log_jackknife_interval(fraction, torch.stack(replicates), corrected=True)
    few = len(a) < 10 * D or sequences < 16
    gap = bool(1 - λ[k] / λ[k - 1] < SMALL_EIGENGAP)
    wide = interval.high > 2 * interval.low
    flagged = (interval.biased > 0) | torch.full_like(wide, few) | (gap & (wide | (k <= 4)))
    covered = {"relative": (interval.low <= population) & (population <= interval.high)}
    for optimizer in ("sgd", "adam"):
        C = input_covariance(inputs.moment, optimizer, columns=D)
        reference = fit.replicates(optimizer)[:, k - 1].unsqueeze(-1)
        of = log_jackknife_interval(
            fraction / fit.expected(optimizer)[k - 1], torch.stack(replicates) / reference, corrected=False
        )
        ratio = population / expected_fraction(C, truth)[k - 1]
        covered[f"excess over {optimizer}'s"] = (of.low <= ratio) & (ratio <= of.high)
    unflagged = {name: np.where(flagged.numpy(), np.nan, held.numpy()) for name, held in covered.items()}
    everywhere = {f"{name}, flagged too": held.double().numpy() for name, held in covered.items()}
    return {**unflagged, **everywhere, "unflagged": (~flagged).double().numpy()}


def permutation(generator: Generator, *, law: Law, sequences: int = 32) -> Found:
    """Whether the range over permuted gradients holds the gradient itself, δ exchangeable within sequences."""
    inputs = Inputs.of("rotated", shared=0.3)
    a = inputs.draw(sequences * SEQUENCE, generator)
    Q = ordered_eigh(inputs.moment)[1][:, :K].float()
    δ = law(a, HEADS * COLUMNS, generator)
    order = torch.rand(PERMUTATIONS, sequences, SEQUENCE, generator=generator).argsort(-1)
    order = (order + SEQUENCE * torch.arange(sequences).unsqueeze(-1)).flatten(1)
    drawn = torch.stack([subspace_fraction(chance_updates.by_head(a.T @ δ[one], HEADS), Q) for one in order])
    low, high = order_range(drawn)
    own = subspace_fraction(chance_updates.by_head(a.T @ δ, HEADS), Q)
    return {"covered": ((low <= own) & (own <= high)).double().numpy()}


# -- other analyses ------------------------------------------------------------------------------------------------


def two_sided(generator: Generator, *, rank: int, n: int, k: int, decay: float = 0.0, draws: int = 2000) -> Found:
    """The share of a delta between two Haar-random frames (`analyze_spectra`)."""
    s = torch.arange(1, rank + 1).double() ** -decay
    frames = [torch.randn(draws, axis, k, generator=generator, dtype=torch.float64) for axis in (D, n)]
    U, V = (torch.linalg.solve_triangular(torch.linalg.cholesky(G.mT @ G), G.mT, upper=False).mT for G in frames)
    delta = torch.zeros(D, n, dtype=torch.float64)
    delta.diagonal()[:rank] = s
    purity = (s.pow(4).sum() / s.square().sum().square()).expand(draws)
    return {"above": two_sided_tail(two_sided_share(delta, U, V), purity, D, n, k, k).numpy()}


def undoing(generator: Generator, *, direction: str) -> Found:
    """A rank-1 removal against 19 controls that undo as much, outcomes quadratic in what is left or displaced."""
    inputs = Inputs.of("rotated")
    ΔW = torch.randn(D, COLUMNS, generator=generator, dtype=torch.float64)
    q = torch.randn(D, generator=generator, dtype=torch.float64)
    if direction == "top":
        q = torch.linalg.svd(ΔW).U[:, 0]
    edit = removal_edit(0, "W_Q", 0, ΔW, q)
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    controls = matched_controls(edit, "undo_matched", 19, seed, delta=ΔW)
    C = inputs.moment
    outcomes: dict[str, Callable[[Tensor], float]] = {
        "displacement": lambda change: float(((C @ change) * change).sum()),
        "undone": lambda change: -float(((C @ (ΔW + change)) * (ΔW + change)).sum()),
    }
    return {
        name: np.array([standing(outcome(edit.change()), np.array([outcome(c) for c in changes]), "kl")["p"]])
        for changes in [[control.change() for control in controls]]
        for name, outcome in outcomes.items()
    }


# -- the cells -----------------------------------------------------------------------------------------------------

ISOTROPIC, REFERENCE, STORAGE = "isotropic", "reference", "decay and storage"
POWER, CORRECTED, INTERVALS, OTHERS, TOOL = "power", "corrected", "intervals", "other analyses", "whole tool"


def cells() -> list[Cell]:
    """The whole table."""
    return [*_isotropic_cells(), *_reference_cells(), *_storage_cells(), *_power_cells(), *_corrected_cells(),
            *_interval_cells(), *_other_cells(), *_tool_cells()]  # fmt: skip


def _isotropic_cells() -> list[Cell]:
    powers = torch.arange(1, COLUMNS + 1).double()
    spectra = {
        "rank 1": torch.ones(1),
        "rank 2": torch.tensor([2.0, 1.0]),
        "variances 1/i²": powers**-2,
        "one direction of 0.9": torch.cat([torch.tensor([0.9]), torch.full((15,), 0.1 / 15)]),
    }
    gaussian = [
        Cell(
            ISOTROPIC, f"Gaussian, d {d}, rank {k}", partial(isotropic, spectrum=None, k=k, d=d), 100 if d == D else 30
        )
        for d, k in ((64, 1), (64, 4), (64, 16), (256, 4))
    ]
    return gaussian + [
        Cell(ISOTROPIC, f"{name}, rank {k}", partial(isotropic, spectrum=spectrum, k=k), 25)
        for name, spectrum in spectra.items()
        for k in (1, 4, 16)
    ]


def _reference_cells() -> list[Cell]:
    rotated, massive, aligned = (Inputs.of(kind) for kind in ("rotated", "massive", "axis-aligned"))
    laws: dict[str, Law] = {
        "δ of rank 1": chance_updates.rank_one,
        "δ heavy-tailed": chance_updates.heavy_tailed,
        "δ with a mean of 0.1 sd": chance_updates.with_mean,
        "δ correlated 0.3 within sequences": chance_updates.within_sequences,
    }
    within = Inputs.of("rotated", shared=0.3)
    of_heads: Law = partial(chance_updates.sized_by_head, directions=rotated.root[:, :HEADS].T)
    sized = "‖δ‖ follows ‖a‖: the reference does not know it; pass gradients for what is known of δ"
    cells = [Cell(REFERENCE, "SGD, δ flat", partial(sgd_null, inputs=rotated), 2500)]
    cells += [
        Cell(REFERENCE, f"SGD, δ flat, {tokens} tokens of text", partial(sgd_null, inputs=rotated, texts=tokens), 150)
        for tokens in (64, 256, 4096)
    ]
    cells += [
        Cell(
            REFERENCE,
            f"SGD, δ flat, analysed on its own {n} tokens",
            partial(sgd_null, inputs=rotated, texts=n, own=True),
            150,
        )
        for n in (256, 2048)
    ]
    cells += [Cell(REFERENCE, f"SGD, δ flat, rank {k}", partial(sgd_null, inputs=rotated, k=k), 150) for k in (1, 16)]
    cells += [Cell(REFERENCE, f"SGD, δ flat, {kind} inputs", partial(sgd_null, inputs=x), 150)
              for kind, x in (("axis-aligned", aligned), ("massive", massive))]  # fmt: skip
    cells += [
        Cell(REFERENCE, f"SGD, {name}", partial(sgd_null, inputs=rotated, law=law), 250) for name, law in laws.items()
    ]
    cells += [
        Cell(REFERENCE, "SGD, inputs and δ correlated 0.3 within sequences",
             partial(sgd_null, inputs=within, law=chance_updates.within_sequences), 250),
        Cell(REFERENCE, "SGD, ‖δ‖ in proportion to ‖a‖²",
             partial(sgd_null, inputs=rotated, law=chance_updates.sized_by_input), 250, exception=sized),
        Cell(REFERENCE, "SGD, ‖δ‖ in proportion to ‖a‖², inputs weighted by each head's gradients",
             partial(weighted_null, inputs=rotated, law=chance_updates.sized_by_input), 200),
        Cell(REFERENCE, "SGD, each head's ‖δ‖ follows its own direction of a, inputs weighted by each head's gradients",
             partial(weighted_null, inputs=rotated, law=of_heads), 200),
        Cell(REFERENCE, "SGD, each head's ‖δ‖ follows its own direction of a, inputs weighted by all heads' gradients",
             partial(weighted_null, inputs=rotated, law=of_heads, apart=False), 200,
             exception="without `head_weights` the weights are of all heads together: the first head's gradients "
             "follow the leading direction of its inputs, the other heads' do not"),
        Cell(REFERENCE, "Adam, 24 steps, ‖δ‖ in proportion to ‖a‖², massive inputs weighted by each head's gradients",
             partial(weighted_null, inputs=massive, law=chance_updates.sized_by_input, steps=24), 60),
        Cell(REFERENCE, "SGD, 80 columns on 64 dimensions", partial(sgd_null, inputs=rotated, columns=80), 60),
    ]  # fmt: skip
    kinds = {"rotated": rotated, "axis-aligned": aligned, "massive": massive}
    cells += [
        Cell(REFERENCE, f"Adam, {steps} step{'s' * (steps > 1)}, {kind} inputs",
             partial(adam_null, inputs=x, steps=steps), {1: 250, 24: 200, 400: 100}[steps])
        for steps in (1, 24, 400)
        for kind, x in kinds.items()
    ]  # fmt: skip
    full = {"steps": 24, "full": True, "batch": 512}
    cells += [
        Cell(REFERENCE, f"Adam, 24 full batches, {kind} inputs", partial(adam_null, inputs=kinds[kind], **full), 150)
        for kind in ("rotated", "massive")
    ]
    cells += [
        Cell(REFERENCE, "Adam, 400 steps, β₂ 0.95, massive inputs",
             partial(adam_null, inputs=massive, steps=400, betas=(0.9, 0.95)), 80),
        Cell(REFERENCE, "Adam, 24 steps, δ with a mean of 0.1 sd, massive inputs",
             partial(adam_null, inputs=massive, steps=24, law=chance_updates.with_mean), 150),
        Cell(REFERENCE, "Adam, 24 steps, δ heavy-tailed, massive inputs",
             partial(adam_null, inputs=massive, steps=24, law=chance_updates.heavy_tailed), 150),
        Cell(REFERENCE, "Adam, 24 steps, 256 tokens of text, massive inputs",
             partial(adam_null, inputs=massive, steps=24, texts=256), 150),
        Cell(REFERENCE, "Muon, 24 steps, 16 columns",
             partial(muon_null, inputs=rotated, steps=24, together=False), 100),
        Cell(REFERENCE, "Muon, 1 step, 16 columns", partial(muon_null, inputs=rotated, steps=1, together=False), 150),
        Cell(REFERENCE, "Muon, 24 steps, 256 columns",
             partial(muon_null, inputs=rotated, steps=24, together=True), 100),
        Cell(REFERENCE, "LoRA, A held", partial(lora_null, inputs=massive, rate=0.0), 150),
        Cell(REFERENCE, "LoRA, A trained", partial(lora_null, inputs=massive, rate=1e-3), 150),
        Cell(REFERENCE, "LoRA merged, tested as any change by Adam",
             partial(lora_null, inputs=massive, rate=1e-3, merged=True), 150,
             exception="from merged weights the adapter's A is unknowable: analyse the adapter itself"),
        Cell(REFERENCE, "Adam, 24 steps, massive inputs, tested against SGD's reference",
             partial(adam_null, inputs=massive, steps=24, optimizer="sgd"), 100,
             exception="the wrong optimizer's reference: pass the one that trained"),
        Cell(REFERENCE, "SGD, massive inputs, tested against Adam's reference",
             partial(_wrong_reference, inputs=massive), 100,
             exception="the wrong optimizer's reference: pass the one that trained"),
    ]  # fmt: skip
    return cells


def weighted_null(
    generator: Generator, *, inputs: Inputs, law: Law, steps: int = 0, apart: bool = True, share: float = 0.0
) -> Found:
    """An update (of Adam in so many steps, or of SGD) whose ‖δ‖ follows a, tested as `analyze_pair(gradient=)` does:
    the texts' inputs weighted by the norms of the gradients there, of each head by its own, or (not `apart`) by those
    of all heads together; the heads pooled always by the latter. `share`: planted in the leading directions."""
    if steps:
        changes = chance_updates.adam(inputs, law, HEADS, COLUMNS, generator, steps=steps)
    else:
        changes = chance_updates.sgd(inputs.draw(TRAINED, generator), law, HEADS, COLUMNS, generator)
    a = inputs.draw(TEXTS, generator).double()
    δ = law(a.float(), HEADS * COLUMNS, generator).double()
    Q = ordered_eigh(a.T @ a)[1][:, :K]
    if share:
        changes = planted(changes, Q.float(), share, generator)

    def asked(changes: Tensor, sizes: Tensor) -> list[Asked]:
        sized = sizes.unsqueeze(-1) * a
        moment, mean = sized.T @ sized / sizes.square().sum(), sized.mean(0)
        C, mean = (correlation(moment), inverse_size(moment.diagonal()) * mean) if steps else (moment, mean)
        return [one for half in _asked(MatchedCovariance.of(C, mean), changes, Q) for one in half]

    whole, by_head = δ.norm(dim=1), δ.unflatten(1, (HEADS, -1)).norm(dim=-1).T
    parts = [asked(changes.transpose(0, 1).flatten(1).unsqueeze(0), whole)]
    parts += [asked(changes[h : h + 1], by_head[h]) for h in range(HEADS)] if apart else [asked(changes, whole)]
    told = matched_tails([half for halves in parts for half in halves])  # two halves of each part, one call for all
    pooled, *own = [torch.maximum(*told[i : i + 2])[0] for i in range(0, len(told), 2)]
    ratio = torch.cat([fraction / law.expected for (law, _, fraction), _ in parts[1:]])
    above = torch.cat(own).numpy()
    return {
        "above": above, "first head above": above[:1], "heads pooled above": pooled.numpy(),
        "median excess": ratio.numpy(),
    }  # fmt: skip


def arms_null(generator: Generator, *, inputs: Inputs, runs: tuple[int, int], steps: int = 0) -> Found:
    """Two arms of one recipe with runs of their own: how often `compare` tells a head's fractions apart."""
    Q = ordered_eigh(inputs.moment)[1][:, :K]

    def run() -> np.ndarray:
        if steps:
            changes = chance_updates.adam(inputs, chance_updates.gaussian, HEADS, COLUMNS, generator, steps=steps)
        else:
            a = inputs.draw(TRAINED, generator)
            changes = chance_updates.sgd(a, chance_updates.gaussian, HEADS, COLUMNS, generator)
        return np.log2(subspace_fraction(changes.double(), Q).numpy())

    return {"told apart": separation(*(np.stack([run() for _ in range(count)]) for count in runs)).p}


def _wrong_reference(generator: Generator, *, inputs: Inputs) -> Found:
    changes = chance_updates.sgd(inputs.draw(TRAINED, generator), chance_updates.gaussian, HEADS, COLUMNS, generator)
    return excess(*_texts(inputs, TEXTS, generator), changes, optimizer="adam")


def _storage_cells() -> list[Cell]:
    rotated = Inputs.of("rotated")
    cells = [
        Cell(STORAGE, f"isotropic change, {share:.0%} of its energy weight decay",
             partial(decay_null, inputs=rotated, share=share), 150)
        for share in (0.02, 0.05, 0.09)
    ]  # fmt: skip
    cells += [
        Cell(STORAGE, f"{name}, stored in bf16, change {size:g} of W",
             partial(stored, inputs=rotated, size=size, chance=chance), 100)
        for chance, name in (("isotropic", "isotropic"), ("sgd", "SGD by its reference"))
        for size in (3e-3, 1e-3)
    ]  # fmt: skip
    return [
        *cells,
        Cell(STORAGE, "SGD by its reference, stored in bf16, change 0.001 of W, rows of unequal size",
             partial(stored, inputs=rotated, size=1e-3, chance="sgd", rows=1.0), 100),
        Cell(STORAGE, "isotropic, stored in bf16, change 0.001 of W, rows of unequal size, coordinates as directions",
             partial(stored, inputs=rotated, size=1e-3, chance="isotropic", rows=1.0), 100,
             exception="storage noise follows |W| and has few large entries, which single coordinates see: such "
             "rows are flagged `rounding`"),
    ]  # fmt: skip


def _power_cells() -> list[Cell]:
    rotated, massive = Inputs.of("rotated"), Inputs.of("massive")
    shares = (0.05, 0.1, 0.2, 0.4, 0.8)
    return [
        *(Cell(POWER, f"{share:.0%} of the energy planted, against {name}",
               partial(plant, inputs=inputs, share=share, against=against), 60, "power")
          for against, name, inputs in (("chance", "a random subspace", rotated), ("sgd", "SGD's reference", rotated),
                                        ("adam", "Adam's reference", massive))
          for share in shares),
        *(Cell(POWER, f"{share:.0%} of the energy planted, ‖δ‖ in proportion to ‖a‖², against SGD's reference with "
               "inputs weighted by each head's gradients",
               partial(weighted_null, inputs=rotated, law=chance_updates.sized_by_input, share=share), 40, "power")
          for share in shares),
    ]  # fmt: skip


def _corrected_cells() -> list[Cell]:
    names = {"chance": "a random subspace", "sgd": "SGD's reference"}
    cells = [
        Cell(CORRECTED, f"16 layers of 8 heads by chance, against {name}", Forest(against, 0), 100, "at most",
             calibration_page.LOOSE * SIGNIFICANT)
        for against, name in names.items()
    ]  # fmt: skip
    cells += [
        Cell(CORRECTED, f"the same with one planted head, against {name}", Forest(against, 1), 100, "at most",
             calibration_page.LOOSE * SIGNIFICANT)
        for against, name in names.items()
    ]  # fmt: skip
    return cells + [
        Cell(CORRECTED, f"one head of 1,024 wholly in U₄, of rank {rank}", partial(inside_of_many, rank=rank), 20,
             "at least", 1.0)
        for rank in (1, 4)
    ]  # fmt: skip


def _interval_cells() -> list[Cell]:
    kinds = {
        "independent tokens": Inputs.of("rotated"),
        "tokens correlated 0.3": Inputs.of("rotated", shared=0.3),
        "no gap after rank 4": Inputs.of("close"),
    }
    cells = [
        Cell(INTERVALS, f"{name}, {sequences} sequences of {SEQUENCE}",
             partial(intervals, inputs=inputs, sequences=sequences), 250, "coverage")
        for name, inputs in kinds.items()
        for sequences in (32, 128, 512)
    ]  # fmt: skip
    cells += [
        Cell(INTERVALS, f"independent tokens, 512 sequences of {SEQUENCE}, rank {k}",
             partial(intervals, inputs=Inputs.of("rotated"), sequences=512, k=k), 150, "coverage")
        for k in (1, 16)
    ]  # fmt: skip
    return cells + [
        Cell(INTERVALS, f"permutation null, {name}", partial(permutation, law=law), 120, "coverage")
        for name, law in (("δ flat", chance_updates.gaussian), ("δ heavy-tailed", chance_updates.heavy_tailed))
    ]


def _other_cells() -> list[Cell]:
    frames = {
        "rank 1": {"rank": 1, "n": 16}, "flat, rank 16": {"rank": 16, "n": 16},
        "σ 1/i": {"rank": 16, "n": 16, "decay": 1.0}, "σ 1/i, 64 columns": {"rank": 64, "n": 64, "decay": 1.0},
    }  # fmt: skip
    spectra = [
        Cell(OTHERS, f"on-principal share, {name}, rank {k}", partial(two_sided, k=k, **frame), 4)
        for name, frame in frames.items()
        for k in (1, 4)
    ]
    return [
        *spectra,
        *(Cell(OTHERS, f"two arms of one recipe by SGD, {a} and {b} runs",
               partial(arms_null, inputs=Inputs.of("rotated"), runs=(a, b)), 150) for a, b in ((3, 3), (2, 5))),
        Cell(OTHERS, "two arms of one recipe by 24 steps of Adam, 3 and 3 runs",
             partial(arms_null, inputs=Inputs.of("massive"), runs=(3, 3), steps=24), 40),
        Cell(OTHERS, "rank-1 removal along a random direction", partial(undoing, direction="random"), 2000),
        Cell(OTHERS, "rank-1 removal along the top singular direction", partial(undoing, direction="top"), 2000,
             exception="a top direction of ΔW is not exchangeable with random ones in what it displaces: read its "
             "effect beside the controls', not its p"),
    ]  # fmt: skip


def _tool_cells() -> list[Cell]:
    nulls = {
        "SGD null": {"optimizer": "sgd", "steps": 1},
        "Adam null, 24 steps": {"optimizer": "adam", "steps": 24},
        "Adam null, 1 step": {"optimizer": "adam", "steps": 1},
        "Adam null, 24 steps, W_in learns at the first position too": {"optimizer": "adam", "steps": 24, "first": True},
    }
    return [
        *(Cell(TOOL, f"heads called beyond, {name}", partial(whole_tool.beyond, **how), 12 if i < 2 else 6, "at most",
               SIGNIFICANT) for i, (name, how) in enumerate(nulls.items())),
        Cell(TOOL, "two seeds of one recipe: warned of", whole_tool.strangers, 5, "at least", 1.0),
    ]  # fmt: skip


# -- running them --------------------------------------------------------------------------------------------------

QUICK = 0.02
"""Share of the draws."""


def read(path: Path) -> dict[str, Any]:
    """What a file holds so far."""
    if path.exists():
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return held
    return {"cells": {}}


def write(path: Path, document: Mapping[str, Any]) -> None:
    """The JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(path)


def run(path: Path, chosen: Sequence[Cell], *, share: float = 1.0, again: bool = False, progress: bool = True) -> None:
    """Run a share of the draws of those cells of which a file has fewer, and write it after each."""
    document = read(path)
    document["versions"] = {package: version(package) for package in ("torch", "tl-asymmetry")}
    for cell in tqdm(chosen, desc="calibration", unit="cell", disable=not progress):
        runs = max(1, round(share * cell.runs))
        if again or document["cells"].get(cell.key, {"runs": 0})["runs"] < runs:
            document["cells"][cell.key] = measure(cell, runs, progress=progress)
            write(path, document)


def main() -> None:
    """Measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"one in {1 / QUICK:.0f} of the draws")
    parser.add_argument("--share", type=float, default=1.0, help="of the draws; a later run with more replaces them")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--again", action="store_true", help="also cells that the JSON has")
    parser.add_argument("--page", action="store_true", help="write docs/calibration.md from the JSON and stop")
    parser.add_argument("--out", type=Path, help="another JSON")
    options = parser.parse_args()
    out = options.out or (RESULTS.with_stem("calibration-quick") if options.quick else RESULTS)
    if not options.page:
        torch.set_num_threads(1)
        chosen = [cell for cell in cells() if options.only in cell.key]
        run(out, chosen, share=QUICK if options.quick else options.share, again=options.again)
    page = calibration_page.page(read(out), [cell.key for cell in cells()])
    if options.page:
        PAGE.write_text(page, encoding="utf-8")
    else:
        sys.stdout.write(page)


if __name__ == "__main__":
    main()
