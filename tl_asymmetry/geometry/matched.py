"""Is there more in a subspace than the covariance of a matrix's own input puts there? A test by rotation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

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
# Numbers of spectra at once.
_NUMBERS = 1 << 22
# A share of a sum that its rounding may be.
_DIGITS = 1e-13
# Tails below this are found at the head's own fraction, the others to first order about the expected one.
_SETTLED = 0.1


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
        self, change: Float[Tensor, "head d other"], *, pooled: bool = False
    ) -> list[Float64[Tensor, "item r"]]:
        """Squared singular values of Y = C^{-1/2} ΔW of each head, descending, on CPU; then those without the mean.

        `pooled`: several heads are followed by all of them as one delta, zeros behind the shorter spectra.
        """
        heads, d, other = change.shape
        flat = torch.linalg.solve_triangular(
            self.root, change.to(self.root).transpose(0, 1).reshape(d, heads * other), upper=False
        )
        own = self._spectra(flat.unflatten(1, (heads, other)).transpose(0, 1))
        if not pooled or heads == 1:
            return own
        return [_one_below_another(both) for both in zip(own, self._spectra(flat.unsqueeze(0)), strict=True)]

    def _spectra(self, Y: Float64[Tensor, "head d other"]) -> list[Tensor]:
        d, other = Y.shape[1:]
        gram = Y.mT @ Y if other <= d else Y @ Y.mT
        spectra = [_eigenvalues(gram)]
        if (m := self.whitened_mean) is not None:
            # (PCP)⁺ on the complement of μ is C⁻¹ less its part along C^{-1/2}μ.
            if other <= d:
                along = m @ Y
                gram = gram - along.unsqueeze(-1) * along.unsqueeze(-2)
            else:
                gram = _without(_without(gram, m).mT, m)
            spectra.append(_eigenvalues(gram)[..., : d - 1])
        return spectra

    def whitened_gram_spectra(
        self, gram: Float[Tensor, "head d d"], *, pooled: bool = False
    ) -> list[Float64[Tensor, "item r"]]:
        """The same from ΔW ΔWᵀ, where ΔW itself is wider than high."""
        # Any factor of the Gram does: Y Yᵀ = L⁻¹ ΔW ΔWᵀ L⁻ᵀ.
        half = torch.linalg.solve_triangular(self.root, gram.to(self.root), upper=False)
        whitened = torch.linalg.solve_triangular(self.root, half.mT, upper=False)
        if pooled and len(gram) > 1:
            whitened = torch.cat([whitened, whitened.sum(0, keepdim=True)])
        spectra = [_eigenvalues(whitened)]
        if (m := self.whitened_mean) is not None:
            spectra.append(_eigenvalues(_without(_without(whitened, m).mT, m))[..., :-1])
        return spectra

    def laws(self, basis: Float[Tensor, "d k"]) -> list[MatchedLaw]:
        """The laws of fractions in the leading columns of a basis: as it is; then without the mean input."""
        frame = torch.cat([self.leading, basis.to(self.matrix)], 1)
        if self.mean is not None:
            frame = torch.cat([self.mean.unsqueeze(-1), frame], 1)
        with exact_products(frame.device):
            once = self.matrix @ frame
            twice = self.matrix @ once
            products = [(a.mT @ b).cpu() for a, b in ((frame, frame), (frame, once), (once, once), (once, twice))]
        m, d = self.leading.shape[1], len(self.matrix)
        if self.mean is None:
            return [MatchedLaw(d, m, self.traces, torch.stack(products[1:]))]
        whole = MatchedLaw(d, m, self.traces, torch.stack([product[1:, 1:] for product in products[1:]]))
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
        B1, B2 = self.products[:2, span, span]
        T1, T2, T3 = self.products[:, m : m + k, m : m + k]
        # An orthonormal basis of the span of C^{1/2}B, and in it C^{1/2}QQᵀC^{1/2} and C.
        ν, V = torch.linalg.eigh(B1)
        reached = ν > _UNREACHED * ν[-1]
        frame = V[:, reached] / ν[reached].sqrt()
        inside = frame.mT @ self.products[0, span, m : m + k]
        inside, whole = inside @ inside.mT, frame.mT @ B2 @ frame
        c1, c2, c3 = self.traces
        nothing = torch.zeros_like(c1)
        traces = (
            (T1.trace(), -c1, nothing, nothing),
            (T1.square().sum(), -2 * T2.trace(), c2, nothing),
            (((T1 @ T1) * T1).sum(), -3 * (T1 * T2).sum(), 3 * T3.trace(), -c3),
        )
        return LawAtRank(self.d, inside, whole, T1.trace() / c1, torch.stack([torch.stack(of) for of in traces]))

    def tails(
        self, spectrum: Float[Tensor, "head r"], k: int, fraction: Float[Tensor, " head"]
    ) -> Float64[Tensor, "2 head"]:
        """P(fraction ≥) and P(fraction ≤ the observed one), as `matched_tails`."""
        return matched_tails([(self.at(k), spectrum, fraction)])[0]

    def expected(self, k: int) -> Float64[Tensor, ""]:
        """The expected fraction in the leading k columns."""
        return self.at(k).expected


@dataclass(frozen=True)
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
    expected: Float64[Tensor, ""]
    """The expected fraction."""
    traces: Float64[Tensor, "3 4"]
    """tr ((QQᵀ − f) C)ⁿ for n = 1, 2, 3: coefficients of 1, f, f², f³."""

    @cached_property
    def _about_expected(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of H at the expected fraction, and how fast they fall with it."""
        θ, V = torch.linalg.eigh(self.inside - self.expected * self.whole)
        return θ, ((self.whole @ V) * V).sum(0)

    def solved(self, fraction: Float64[Tensor, " item"], *, exact: bool) -> Float64[Tensor, "item n"]:
        """Eigenvalues of H on the span; not `exact`: to first order about the expected fraction."""
        if exact:
            return torch.linalg.eigvalsh(self.inside - fraction[:, None, None] * self.whole)
        at, slope = self._about_expected
        return at - (fraction - self.expected).unsqueeze(-1) * slope


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
    asked = [(law, spectrum, fraction.double().cpu()) for law, spectrum, fraction in asked]
    tails = _rotated(asked, exact=False)
    near = [(p < _SETTLED).any(0) for p in tails]
    again = [i for i, at in enumerate(near) if bool(at.any())]
    settled = _rotated([(asked[i][0], asked[i][1][near[i]], asked[i][2][near[i]]) for i in again], exact=True)
    for i, p in zip(again, settled, strict=True):
        tails[i][:, near[i]] = p
    return tails


def _rotated(asked: Sequence[Asked], *, exact: bool) -> list[Tensor]:
    if not asked:
        return []
    sizes = [len(f) for *_, f in asked]

    def of_items(of_laws: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(of_laws)).repeat_interleave(torch.tensor(sizes), 0)

    f = torch.cat([f for *_, f in asked])
    θ = _one_below_another([law.solved(f.nan_to_num(), exact=exact) for law, _, f in asked])
    d, solved = of_items([torch.tensor((law.d, len(law.whole)), dtype=torch.float64) for law, *_ in asked]).unbind(-1)
    powers = f.nan_to_num().unsqueeze(-1) ** torch.arange(4)
    # What the eigenvalues leave of the traces.
    left = (of_items([law.traces for law, *_ in asked]) @ powers.unsqueeze(-1)).squeeze(-1)
    left = left - torch.stack([θ.pow(n).sum(-1) for n in (1, 2, 3)], -1)
    values, copies = _two_values(d - solved, left, θ)
    once = (torch.arange(θ.shape[-1]) < solved.unsqueeze(-1)).double()
    s = _one_below_another([s for _, s, _ in asked])
    p = rotation_tails(torch.cat([values, θ], -1), torch.cat([copies, once], -1), s, d)
    return list(torch.where(f.isfinite(), p, torch.nan).split(sizes, 1))


def _law_without_first(products: list[Tensor], traces: Tensor, d: int, m: int) -> MatchedLaw:
    """The law of PCP and PB, P the projector off the frame's first (unit) column μ, from μ's own products."""
    G0, G1, G2, G3 = products
    along = G0[0, 1:]

    def freed(G: Tensor) -> tuple[Tensor, Tensor]:
        """(PB)ᵀ Cⁿ (PB) and (PB)ᵀ Cⁿ μ."""
        towards = G[1:, 0] - along * G[0, 0]
        full = G[1:, 1:] - torch.outer(along, G[0, 1:]) - torch.outer(G[1:, 0], along)
        return full + G[0, 0] * torch.outer(along, along), towards

    (F1, u1), (F2, u2), (F3, _) = map(freed, (G1, G2, G3))
    a1, a2, a3 = (G[0, 0] for G in (G1, G2, G3))
    c1, c2, c3 = traces
    second = F2 - torch.outer(u1, u1)
    third = F3 - torch.outer(u2, u1) - torch.outer(u1, u2) + a1 * torch.outer(u1, u1)
    left = torch.stack([c1 - a1, c2 - 2 * a2 + a1**2, c3 - 3 * a3 + 3 * a1 * a2 - a1**3])
    return MatchedLaw(d - 1, m, left, torch.stack([F1, second, third]))


def _leading(C: Tensor) -> Tensor:
    """About the leading eigenvectors of C: subspace iteration from a fixed start."""
    count = min(_LEADING, len(C) // 4)
    start = torch.randn(len(C), count, dtype=C.dtype, generator=torch.Generator().manual_seed(0))
    V = torch.linalg.qr(C @ start.to(C.device)).Q
    for _ in range(3):
        V = torch.linalg.qr(C @ (C @ V)).Q
    return V


def _without(x: Tensor, unit: Tensor) -> Tensor:
    return x - unit.unsqueeze(-1) * (unit @ x).unsqueeze(-2)


def _eigenvalues(symmetric: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(symmetric).flip(-1).clamp(min=0).cpu()


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
