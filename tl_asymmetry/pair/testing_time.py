"""How long the tests and tables of a pair will take: the same for ten texts as for ten thousand."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from tl_asymmetry.geometry.matched import MatchedLaw
from tl_asymmetry.geometry.nulls import IsotropicNull
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of
from tl_asymmetry.pair.plan import Plan

# Heads that a probe runs: two numbers, so that what a call costs and what a head costs are told apart.
_FEW, _MORE = 1, 8
# Directions of C before those of Q, and directions of Q, in the frame of a probe's law; see `MatchedLaw`.
_LEADING, _SOLVED = 16, 48
# Of ΔW and of ΔW − sW; the second of them under the laws with and without the mean input.
_DELTAS, _LAWS = 2, 2
# Frames of a matrix, subspace and rank, and their rows, and the laws of a layer: whatever the shapes.
_BLOCK_SECONDS, _ROW_SECONDS, _LAW_SECONDS = 0.02, 3e-5, 0.008


class ProbedTests:
    """Seconds of processor time, from short runs of the tests themselves at the pair's own sizes.

    Args:
        base: the model.
        plan: what is held against what.
        seed: of the probes' numbers.
    """

    def __init__(self, base: ModelView, plan: Plan, *, seed: int) -> None:
        self._base, self._plan, self._seed = base, plan, seed
        self._isotropic = lru_cache(None)(self._probed_isotropic)
        self._matched = lru_cache(None)(self._probed_matched)

    def of_tables(self) -> float:
        """Isotropic tails, tables and nulls: of all layers at once."""
        total, calls = 0.0, {}
        for _, heads, values, k in self._blocks():
            rows = heads * self._base.n_layers
            calls[values, k], head = self._isotropic(values, min(k, 2))
            total += _BLOCK_SECONDS + rows * _ROW_SECONDS + _DELTAS * rows * head
        return total + sum(calls.values())

    def of_layers(self) -> float:
        """Tails under the reference of a read matrix's own input: layer by layer."""
        total, calls = 0.0, {}
        for matrix, heads, values, k in self._blocks():
            if kind_of(matrix).reads:
                calls[values, min(k, _SOLVED)], head = self._matched(values, min(k, _SOLVED))
                pooled = heads + (heads > 1)
                total += self._base.n_layers * (_LAW_SECONDS + _DELTAS * _LAWS * pooled * head)
        return total + self._base.n_layers * sum(calls.values())

    def _blocks(self) -> list[tuple[str, int, int, int]]:
        """Matrix, heads, singular values of a head's delta, and rank, of everything that is tested."""
        base, plan = self._base, self._plan
        blocks = []
        for matrix in plan.matrices:
            heads = base.heads(matrix) or base.experts(matrix) or 1
            values = min(base.d_model, max(1, base.entries(matrix) // (heads * base.d_model)))
            ranks = [k for name in plan.targets[matrix] for k in plan.measured[name]]
            blocks += [(matrix, heads, values, k) for k in ranks]
        return blocks

    def _probed_isotropic(self, values: int, k: int) -> tuple[float, float]:
        null = IsotropicNull(self._base.d_model, seed=self._seed)
        # Far from the middle, where nothing is drawn.
        fraction = min(0.9, 3 * k / self._base.d_model)
        return _line(lambda spectrum: null.tails(spectrum, k, spectrum.new_full((len(spectrum),), fraction)), values)

    def _probed_matched(self, values: int, k: int) -> tuple[float, float]:
        d = self._base.d_model
        law = _a_law(d, min(_LEADING, d // 4), k, self._seed)
        fraction = min(0.9, 1.5 * float(law.expected(k)))
        return _line(lambda spectrum: law.tails(spectrum, k, spectrum.new_full((len(spectrum),), fraction)), values)


def _a_law(d: int, leading: int, k: int, seed: int) -> MatchedLaw:
    """A law of the pair's sizes: a covariance with eigenvalues 1/i, in a frame turned within the leading ones."""
    λ = 1 / torch.arange(1.0, d + 1, dtype=torch.float64)
    n = min(leading + k, d)
    turn = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    products = torch.stack([(turn * λ[:n] ** power) @ turn.mT for power in (1, 2, 3)])
    return MatchedLaw(d, leading, torch.stack([(λ**power).sum() for power in (1, 2, 3)]), products)


def _line(tails: Callable[[Tensor], object], values: int) -> tuple[float, float]:
    """Seconds of a call, and of each head in it, of this thread's own processor time."""
    few, more = (
        _seconds(tails, torch.linspace(2, 1, values, dtype=torch.float64).expand(n, -1)) for n in (_FEW, _MORE)
    )
    head = max(0.0, more - few) / (_MORE - _FEW)
    return max(0.0, few - head * _FEW), head


def _seconds(tails: Callable[[Tensor], object], spectrum: Tensor) -> float:
    """The better of two runs."""
    best = float("inf")
    for _ in range(2):
        start = time.thread_time()
        tails(spectrum)
        best = min(best, time.thread_time() - start)
    return best
