"""Is there more in a subspace than the covariance of a matrix's own input puts there? A test by rotation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_asymmetry._lazy import lapack
from tl_asymmetry.geometry.memory import batches
from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.geometry.references import sign_limit
from tl_asymmetry.geometry.saddlepoint import rotation_tails

# Eigenvalues of C below this share of its norm carry nothing: without a floor they would be divided by.
_FLOOR = 1e-6
# Directions of a frame that hold less than this share of the largest are spanned by the others.
_UNREACHED = 1e-9
# Leading directions of C, and columns of Q, in whose span H is solved; what is left goes into two values.
_LEADING, _SOLVED = 16, 48
# From here on one tridiagonal form for two spectra takes less time than two solves; heads go through these at once.
_ONE_REDUCTION = 256
# Numbers of spectra at once.
_NUMBERS = 1 << 22
# A share of a sum that its rounding may be.
_DIGITS = 1e-13
# Tails below this are found at the head's own fraction, the others to first order about the expected one. So many
# standard deviations away no tail is larger (Cantelli: 1/(1 + 3²)).
_SETTLED, _FAR = 0.1, 3.0


@dataclass(frozen=True)
class MatchedCovariance:
    """The left covariance C that a delta has by chance, ready to whiten deltas of that input.

    Under a mean-zero δ that is uncorrelated over tokens and independent of the input, C is the input's second moment
    for SGD and its correlation matrix for Adam, and Y = C^{-1/2} ΔW is invariant under rotations from the left. A δ
    whose own mean is not zero shows along the mean input only: everything is also made without that direction. [ours]
    """

    matrix: Float64[Tensor, "d d"]
    """C with its eigenvalues lifted by 1e-6 of its norm."""
    root: Float64[Tensor, "d d"]
    """Its lower Cholesky factor."""
    leading: Float64[Tensor, "d m"]
    """About its leading eigenvectors."""
    traces: Float64[Tensor, " 3"]
    """tr C, tr C², tr C³; on CPU."""
    mean: Float64[Tensor, " d"] | None
    """Unit direction of the mean input; None where it has none."""

    @classmethod
    def of(cls, covariance: Float[Tensor, "d d"], mean: Float[Tensor, " d"] | None = None) -> MatchedCovariance:
        """From C and the mean input in the same coordinates (under Adam scaled as C is)."""
        C = covariance.double()
        C = C + _FLOOR * torch.linalg.matrix_norm(C) * torch.eye(len(C), dtype=C.dtype, device=C.device)
        with exact_products(C.device):
            cubed = ((C @ C) * C).sum()
        return cls(
            matrix=C,
            root=torch.linalg.cholesky(C),
            leading=_leading(C),
            traces=torch.stack([C.trace(), C.square().sum(), cubed]).cpu(),
            mean=None if mean is None or not bool(mean.norm() > 0) else mean.to(C) / mean.to(C).norm(),
        )

    @cached_property
    def persistent(self) -> MatchedCovariance:
        """The same where C is Adam's correlation matrix and gradients persist, as over one step: its sign limit."""
        return MatchedCovariance.of(sign_limit(self.matrix), self.mean)

    @cached_property
    def whitened_mean(self) -> Float64[Tensor, " d"] | None:
        """Unit direction of C^{-1/2}μ, along which the whitened delta of inputs without their mean has nothing."""
        if self.mean is None:
            return None
        m = torch.linalg.solve_triangular(self.root, self.mean.unsqueeze(-1), upper=False).squeeze(-1)
        return m / m.norm()

    def whitened_spectra(
        self,
        change: Float[Tensor, "head d other"],
        *,
        pooled: bool = False,
        only: Bool[Tensor, " _item"] | None = None,
    ) -> list[Float64[Tensor, "item r"]]:
        """Squared singular values of Y = C^{-1/2} ΔW of each head, descending, on CPU; then those without the mean.

        Args:
            change: ΔW.
            pooled: several heads are followed by all of them as one delta, zeros behind the shorter spectra.
            only: which of these items are wanted; None: all.
        """
        heads, d, other = change.shape
        of_heads, together = _wanted(heads, pooled, only)
        if not together and len(of_heads) < heads:
            change = change[of_heads]
        flat = torch.linalg.solve_triangular(
            self.root, change.to(self.root).transpose(0, 1).reshape(d, len(change) * other), upper=False
        )
        Y = flat.unflatten(1, (len(change), other)).transpose(0, 1)
        Y = Y[of_heads] if len(of_heads) < len(Y) else Y
        parts = [Y] * bool(len(of_heads)) + [flat.unsqueeze(0)] * together
        return [_one_below_another(both) for both in zip(*map(self._spectra, parts), strict=True)]

    def _spectra(self, Y: Float64[Tensor, "head d other"]) -> list[Tensor]:
        d, other = Y.shape[1:]
        if other > d:
            return self._gram_spectra(Y @ Y.mT)
        gram = Y.mT @ Y
        if (m := self.whitened_mean) is None:
            return [_eigenvalues(gram)]
        # (PCP)⁺ on the complement of μ is C⁻¹ less its part along C^{-1/2}μ.
        both = _eigenvalues_with_and_without(gram, m @ Y, inside=False)
        return [spectrum[..., : d - i] for i, spectrum in enumerate(both)]

    def _gram_spectra(self, gram: Float64[Tensor, "head d d"]) -> list[Tensor]:
        if (m := self.whitened_mean) is None:
            return [_eigenvalues(gram)]
        return _eigenvalues_with_and_without(gram, m.expand(len(gram), -1), inside=True)

    def whitened_gram_spectra(
        self, gram: Float[Tensor, "head d d"], *, pooled: bool = False, only: Bool[Tensor, " _item"] | None = None
    ) -> list[Float64[Tensor, "item r"]]:
        """The same from ΔW ΔWᵀ, where ΔW itself is wider than high."""
        of_heads, together = _wanted(len(gram), pooled, only)
        chosen = gram[of_heads] if len(of_heads) < len(gram) else gram
        if together:
            chosen = torch.cat([chosen, gram.sum(0, keepdim=True)])
        # Any factor of the Gram does: Y Yᵀ = L⁻¹ ΔW ΔWᵀ L⁻ᵀ.
        half = torch.linalg.solve_triangular(self.root, chosen.to(self.root), upper=False)
        return self._gram_spectra(torch.linalg.solve_triangular(self.root, half.mT, upper=False))

    def laws(self, basis: Float[Tensor, "d k"]) -> list[MatchedLaw]:
        """The laws of fractions in the leading columns of a basis: as it is; then without the mean input."""
        frame = torch.cat([self.leading, basis.to(self.matrix)], 1)
        if self.mean is not None:
            frame = torch.cat([self.mean.unsqueeze(-1), frame], 1)
        with exact_products(frame.device):
            once = self.matrix @ frame
            twice = self.matrix @ once
            products = torch.stack([
                (a.mT @ b).cpu() for a, b in ((frame, frame), (frame, once), (once, once), (once, twice))
            ])  # fmt: skip
        m, d = self.leading.shape[1], len(self.matrix)
        if self.mean is None:
            return [MatchedLaw(d, m, self.traces, products[1:])]
        whole = MatchedLaw(d, m, self.traces, products[1:, 1:, 1:].contiguous())
        return [whole, _law_without_first(products, self.traces, d, m)]


@dataclass(frozen=True)
class MatchedLaw:
    """How fractions fall in the leading columns of Q where ΔW = C^{1/2} G √S Vᵀ, G Haar-random."""

    d: int
    """Dimension."""
    leading: int
    """Columns of the frame B that come before those of Q."""
    traces: Float64[Tensor, " 3"]
    """tr C, tr C², tr C³."""
    products: Float64[Tensor, "3 n n"]
    """BᵀCB, BᵀC²B, BᵀC³B."""

    def at(self, k: int) -> LawAtRank:
        """In the leading k."""
        m = self.leading
        span = slice(0, m + min(k, _SOLVED))
        B1, B2 = self.products[:2, span, span].unbind()
        T1, T2, T3 = self.products[:, m : m + k, m : m + k].unbind()
        # An orthonormal basis of the span of C^{1/2}B, and in it C^{1/2}QQᵀC^{1/2} and C.
        ν, V = torch.linalg.eigh(B1)
        first = len(ν) - int((ν > _UNREACHED * ν[-1]).sum())
        frame = V[:, first:].contiguous() / ν[first:].sqrt()
        inside = frame.mT @ self.products[0, span, m : m + k]
        inside, whole = inside @ inside.mT, frame.mT @ B2 @ frame
        c1, c2, c3 = self.traces.tolist()
        t1, t2, t3 = (float(T.trace()) for T in (T1, T2, T3))
        t11, t12, t111 = (float(product.sum()) for product in (T1.square(), T1 * T2, (T1 @ T1) * T1))
        traces = ((t1, -c1, 0, 0), (t11, -2 * t2, c2, 0), (t111, -3 * t12, 3 * t3, -c3))
        expected = float(T1.trace() / self.traces[0])  # NaN where C is zero
        return LawAtRank(self.d, inside, whole, expected, torch.tensor(traces, dtype=torch.float64))

    def tails(
        self, spectrum: Float[Tensor, "head r"], k: int, fraction: Float[Tensor, " head"]
    ) -> Float64[Tensor, "2 head"]:
        """P(fraction ≥) and P(fraction ≤ the observed one), as `matched_tails`."""
        return matched_tails([(self.at(k), spectrum, fraction)])[0]

    def expected(self, k: int) -> float:
        """The expected fraction in the leading k columns."""
        return self.at(k).expected


@dataclass(frozen=True, eq=False)
class LawAtRank:
    """How the fraction falls in k directions: it reaches f where tr(H G S Gᵀ) ≥ 0, H = C^{1/2} (QQᵀ − fI) C^{1/2}.

    H is solved on the span of C^{1/2}Q and of C's leading directions, and the rest becomes two values that keep tr Hⁿ
    exact for n ≤ 3: no eigensolve of d × d.
    """

    d: int
    """Dimension."""
    inside: Float64[Tensor, "n n"]
    """C^{1/2}QQᵀC^{1/2} in an orthonormal basis of that span."""
    whole: Float64[Tensor, "n n"]
    """C in it."""
    expected: float
    """The expected fraction."""
    traces: Float64[Tensor, "3 4"]
    """tr ((QQᵀ − f) C)ⁿ for n = 1, 2, 3: coefficients of 1, f, f², f³."""

    @cached_property
    def about_expected(self) -> Float64[Tensor, "n 2"]:
        """Eigenvalues of H at the expected fraction, and how fast they fall with it."""
        θ, V = torch.linalg.eigh(self.inside - self.expected * self.whole)
        return torch.stack([θ, ((self.whole @ V) * V).sum(0)], -1)


def laws_at(
    covariance: MatchedCovariance, basis: Float[Tensor, "d k"], ranks: Sequence[int]
) -> list[dict[int, LawAtRank]]:
    """The laws of fractions in the leading columns of a basis, by rank: as it is; then without the mean input."""
    if not ranks:
        return [{}] * (1 + (covariance.mean is not None))
    return [{k: law.at(k) for k in ranks} for law in covariance.laws(basis[:, : max(ranks)])]


Asked = tuple[LawAtRank, Float[Tensor, "_item _r"], Float[Tensor, " _item"]]
"""A law, spectra of whitened deltas, and the fractions observed of them."""


def matched_tails(asked: Sequence[Asked]) -> list[Float64[Tensor, "2 _item"]]:
    """P(fraction ≥) and P(fraction ≤ the observed one) of each; NaN where nothing can vary. See `rotation_tails`.

    As many at once as there is room for: what a call costs by itself is more than what a head adds to it.
    """
    longest = max((spectrum.shape[-1] for _, spectrum, _ in asked), default=0)
    sizes = [longest * len(fraction) for *_, fraction in asked]
    return [tails for batch in batches(sizes, _NUMBERS) for tails in _tails([asked[i] for i in batch])]


def _tails(asked: Sequence[Asked]) -> list[Tensor]:
    items = _Items.of(asked)
    tails = torch.full((2, len(items.fraction)), torch.nan, dtype=torch.float64)
    far = items.fraction.isfinite() & (items.deviations().abs() > _FAR)
    if not bool(far.all()):
        near = items.at(~far)
        tails[:, ~far] = near.tails(near.nearly_solved())
    settled = far | (tails < _SETTLED).any(0)
    if bool(settled.any()):
        few = items.at(settled)
        tails[:, settled] = few.tails(few.solved())
    return list(tails.split([len(fraction) for *_, fraction in asked], 1))


@dataclass(frozen=True)
class _Items:
    """All deltas that are asked for, one below another."""

    laws: Sequence[LawAtRank]
    """Each once."""
    law: Int[Tensor, " item"]
    """Which of these is an item's."""
    spectrum: Float[Tensor, "item r"]
    """Zeros behind the shorter ones."""
    length: Int[Tensor, " item"]
    """How many come before these."""
    fraction: Float64[Tensor, " item"]
    """NaN where the delta is zero."""
    traces: Float64[Tensor, "item 3"]
    """tr Hⁿ for n = 1, 2, 3."""

    @classmethod
    def of(cls, asked: Sequence[Asked]) -> _Items:
        number = {law: i for i, law in enumerate(dict.fromkeys(law for law, *_ in asked))}
        numbers = torch.tensor([(number[law], s.shape[-1], len(f)) for law, s, f in asked])
        law, length = numbers[:, :2].repeat_interleave(numbers[:, 2], 0).unbind(-1)
        f = torch.cat([fraction.double().cpu() for *_, fraction in asked])
        powers = f.nan_to_num().unsqueeze(-1) ** torch.arange(4)
        traces = torch.stack([one.traces for one in number])[law] @ powers.unsqueeze(-1)
        spectra = _one_below_another([spectrum for _, spectrum, _ in asked])
        return cls(list(number), law, spectra, length, f, traces.squeeze(-1))

    def at(self, chosen: Bool[Tensor, " item"]) -> _Items:
        """Some of these, and their laws."""
        used, law = self.law[chosen].unique(return_inverse=True)
        length = self.length[chosen]
        spectrum = self.spectrum[chosen, : int(length.max())]
        laws = [self.laws[i] for i in used.tolist()]
        return _Items(laws, law, spectrum, length, self.fraction[chosen], self.traces[chosen])

    def deviations(self) -> Float64[Tensor, " item"]:
        """Mean of tr(H G S Gᵀ) in its standard deviations (Muirhead 1982, ch. 7)."""
        d = torch.tensor([law.d for law in self.laws], dtype=torch.float64)[self.law]
        h, h2, _ = self.traces.unbind(-1)
        s, s2 = self.spectrum.sum(-1), self.spectrum.square().sum(-1)
        variance = 2 * (h2 - h.square() / d) * (s2 - s.square() / d) / ((d - 1) * (d + 2))
        return h * s / d / variance.clamp(min=0).sqrt()

    def solved(self) -> Float64[Tensor, "item n"]:
        """Eigenvalues of H on the span."""
        θ = torch.zeros(len(self.law), max(len(law.whole) for law in self.laws), dtype=torch.float64)
        for i, law in enumerate(self.laws):
            mine = self.law == i
            H = law.inside - self.fraction[mine, None, None] * law.whole
            θ[mine, : len(law.whole)] = torch.linalg.eigvalsh(H)
        return θ

    def nearly_solved(self) -> Float64[Tensor, "item n"]:
        """The same to first order about the expected fraction."""
        θ, slope = pad_sequence([law.about_expected for law in self.laws], batch_first=True)[self.law].unbind(-1)
        expected = torch.tensor([law.expected for law in self.laws], dtype=torch.float64)[self.law]
        away = self.fraction.nan_to_num() - expected
        return θ - away.unsqueeze(-1) * slope

    def tails(self, θ: Float64[Tensor, "item n"]) -> Float64[Tensor, "2 item"]:
        """Both tails, from the eigenvalues on the span."""
        sizes = torch.tensor([(law.d, len(law.whole)) for law in self.laws], dtype=torch.float64)
        d, solved = sizes[self.law].unbind(-1)
        # What the eigenvalues leave of the traces.
        left = self.traces - torch.stack([θ.pow(n).sum(-1) for n in (1, 2, 3)], -1)
        values, copies = _two_values(d - solved, left, θ)
        once = (torch.arange(θ.shape[-1]) < solved.unsqueeze(-1)).double()
        p = rotation_tails(torch.cat([values, θ], -1), torch.cat([copies, once], -1), self.spectrum, d)
        return torch.where(self.fraction.isfinite(), p, torch.nan)


def _law_without_first(products: Tensor, traces: Tensor, d: int, m: int) -> MatchedLaw:
    """The law of PCP and PB, P the projector off the frame's first (unit) column μ, from μ's own products."""
    along, G = products[0, 0, 1:], products[1:]
    # (PB)ᵀ Cⁿ (PB) and (PB)ᵀ Cⁿ μ for n = 1, 2, 3.
    a, row, column = G[:, :1, :1], G[:, :1, 1:], G[:, 1:, :1]
    F = G[:, 1:, 1:] - along.unsqueeze(-1) * row - column * along + a * torch.outer(along, along)
    u1, u2, _ = (column.squeeze(-1) - along * a.squeeze(-1)).unbind()
    a1, a2, a3 = a.flatten()
    c1, c2, c3 = traces
    second = F[1] - torch.outer(u1, u1)
    third = F[2] - torch.outer(u2, u1) - torch.outer(u1, u2) + a1 * torch.outer(u1, u1)
    left = torch.stack([c1 - a1, c2 - 2 * a2 + a1**2, c3 - 3 * a3 + 3 * a1 * a2 - a1**3])
    return MatchedLaw(d - 1, m, left, torch.stack([F[0], second, third]))


def _leading(C: Tensor) -> Tensor:
    """About the leading eigenvectors of C: subspace iteration from a fixed start."""
    count = min(_LEADING, len(C) // 4)
    start = torch.randn(len(C), count, dtype=C.dtype, generator=torch.Generator().manual_seed(0))
    V = torch.linalg.qr(C @ start.to(C.device)).Q
    for _ in range(3):
        V = torch.linalg.qr(C @ (C @ V)).Q
    return V


def _wanted(heads: int, pooled: bool, only: Bool[Tensor, " _item"] | None) -> tuple[Int[Tensor, " wanted"], bool]:
    """Which heads, and whether the heads pooled."""
    several = pooled and heads > 1
    if only is None:
        return torch.arange(heads), several
    return only[:heads].nonzero().flatten(), several and bool(only[-1])


def _without(x: Tensor, unit: Tensor) -> Tensor:
    return x - unit.unsqueeze(-1) * (unit.unsqueeze(-2) @ x)


def _outer(v: Tensor) -> Tensor:
    return v.unsqueeze(-1) * v.unsqueeze(-2)


def _eigenvalues(symmetric: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric).flip(-1).clamp(min=0).cpu()


def _eigenvalues_with_and_without(
    gram: Float64[Tensor, "item n n"], direction: Float64[Tensor, "item n"], *, inside: bool
) -> list[Float64[Tensor, "item r"]]:
    """Eigenvalues of a Gram matrix, descending; then of what is left of it without a direction, on CPU.

    That is PGP with P = I − vvᵀ for a unit v where the direction lies `inside` the Gram's own space, its zero left out;
    else G − vvᵀ. Householder's reduction that begins at v gives one tridiagonal form for both: the second lacks the
    first row, or has ‖v‖² less in its first entry (Golub & Van Loan, ch. 8.3).
    """
    if gram.device.type != "cpu" or gram.shape[-1] < _ONE_REDUCTION:
        rest = _without(_without(gram, direction).mT, direction) if inside else gram - _outer(direction)
        without = _eigenvalues(rest)
        return [_eigenvalues(gram), without[..., :-1] if inside else without]
    spectra = [_of_one_reduction(*one, inside=inside) for one in zip(gram.numpy(), direction.numpy(), strict=True)]
    return [torch.from_numpy(np.stack(of)) for of in zip(*spectra, strict=True)]


def _of_one_reduction(gram: np.ndarray, v: np.ndarray, *, inside: bool) -> tuple[np.ndarray, np.ndarray]:
    size = float(np.linalg.norm(v))
    # H = I − 2wwᵀ takes v to the first axis: HGH in two rank-one steps.
    w = v / size if size > 0 else np.eye(1, len(v))[0]
    sign = math.copysign(1.0, w[0])
    w = w + sign * np.eye(1, len(w))[0]
    w /= np.linalg.norm(w)
    u = 2 * (gram @ w)
    u -= (w @ u) * w
    turned = gram - np.outer(u, w) - np.outer(w, u)
    lwork = int(lapack.dsytrd_lwork(len(w), lower=1)[0])
    _, diagonal, off, _, _ = lapack.dsytrd(turned, lower=1, lwork=lwork, overwrite_a=1)
    rest = diagonal[1:] if inside else diagonal - size**2 * np.eye(1, len(w))[0]
    found = lapack.dsterf(diagonal, off), lapack.dsterf(rest, off[1:] if inside else off)
    if any(info for _, info in found):
        raise RuntimeError(f"dsterf found no eigenvalues of a {len(w)} × {len(w)} matrix")
    return tuple(λ[::-1].clip(min=0) for λ, _ in found)


def _one_below_another(parts: Sequence[Float[Tensor, "_item _r"]]) -> Float[Tensor, "item r"]:
    """Rows of different lengths, zeros behind the shorter ones."""
    longest = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in parts])


def _two_values(count: Tensor, left: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
    """Two values and their weights with given power sums: the Gauss quadrature of a measure of mass `count`.

    Args:
        count: 0 where nothing is left.
        left: sums of the first three powers, `[item, 3]`.
        solved: the eigenvalues that they were taken from: what rounding leaves of these is nothing.
    """
    there = (count >= 1).unsqueeze(-1)
    m1, m2, m3 = (left / count.unsqueeze(-1)).unbind(-1)
    digit2, digit3 = (_DIGITS * solved.abs().pow(n).sum(-1) / count for n in (2, 3))
    sd = torch.where((variance := m2 - m1.square()) > digit2, variance, 0.0).sqrt()
    third = m3 - 3 * m1 * sd.square() - m1.pow(3)
    γ = torch.where((sd > 0) & (third.abs() > digit3), third / sd.pow(3).clamp(min=1e-300), 0.0)
    root = (γ.square() / 4 + 1).sqrt()
    # From the larger of the two: the other is minus its inverse.
    large = γ / 2 + torch.where(γ < 0, -root, root)
    small = -1 / large
    share = 1 / (1 + large.square())
    values = torch.stack([m1 + sd * large, m1 + sd * small], -1)
    copies = count.unsqueeze(-1) * torch.stack([share, 1 - share], -1)
    return torch.where(there, values, 0.0), torch.where(there, copies, 0.0)
