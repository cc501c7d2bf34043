"""Is there more in a subspace than the covariance of a matrix's own input puts there? A test by rotation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.precision import exact_products
from tl_asymmetry.geometry.references import sign_limit
from tl_asymmetry.geometry.saddlepoint import rotation_tails

# Eigenvalues of C below this share of its norm carry nothing: without a floor they would be divided by.
_FLOOR = 1e-6
# Directions of a frame that hold less than this share of the largest are spanned by the others.
_UNREACHED = 1e-9
# Leading directions of C, and columns of Q, in whose span H is solved; what is left goes into two values.
_LEADING, _SOLVED = 16, 48
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

    def whitened_spectra(self, change: Float[Tensor, "head d other"]) -> list[Float64[Tensor, "head r"]]:
        """Squared singular values of Y = C^{-1/2} ΔW of each head, descending, on CPU; then those without the mean."""
        heads, d, other = change.shape
        columns = change.to(self.root).transpose(0, 1).reshape(d, heads * other)
        Y = torch.linalg.solve_triangular(self.root, columns, upper=False).unflatten(1, (heads, other)).transpose(0, 1)
        gram = Y.mT @ Y if other <= d else Y @ Y.mT
        spectra = [_eigenvalues(gram)]
        if self.mean is not None:
            # (PCP)⁺ on the complement of μ is C⁻¹ less its part along C^{-1/2}μ.
            m = torch.linalg.solve_triangular(self.root, self.mean.unsqueeze(-1), upper=False).squeeze(-1)
            m = m / m.norm()
            if other <= d:
                along = m @ Y
                gram = gram - along.unsqueeze(-1) * along.unsqueeze(-2)
            else:
                gram = _without(_without(gram, m).mT, m)
            spectra.append(_eigenvalues(gram)[..., : d - 1])
        return spectra

    def whitened_gram_spectra(self, gram: Float[Tensor, "head d d"]) -> list[Float64[Tensor, "head r"]]:
        """The same from ΔW ΔWᵀ, where ΔW itself is wider than high."""
        # Any factor of the Gram does: Y Yᵀ = L⁻¹ ΔW ΔWᵀ L⁻ᵀ.
        half = torch.linalg.solve_triangular(self.root, gram.to(self.root), upper=False)
        whitened = torch.linalg.solve_triangular(self.root, half.mT, upper=False)
        spectra = [_eigenvalues(whitened)]
        if self.mean is not None:
            m = torch.linalg.solve_triangular(self.root, self.mean.unsqueeze(-1), upper=False).squeeze(-1)
            m = m / m.norm()
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
    """How a fraction falls in the leading k columns of Q where ΔW = C^{1/2} G √S Vᵀ, G Haar-random.

    It reaches f where tr(H G S Gᵀ) ≥ 0, H = C^{1/2} (QQᵀ − fI) C^{1/2}. H is solved on the span of C^{1/2}Q and of C's
    leading directions, and the rest becomes two values that keep tr Hⁿ exact for n ≤ 3: no eigensolve of d × d.
    """

    d: int
    """Dimension."""
    leading: int
    """Columns of the frame B that come before those of Q."""
    traces: Float64[Tensor, " 3"]
    """tr C, tr C², tr C³."""
    products: Float64[Tensor, "3 n n"]
    """BᵀCB, BᵀC²B, BᵀC³B."""

    def tails(
        self, spectrum: Float[Tensor, "head r"], k: int, fraction: Float[Tensor, " head"]
    ) -> Float64[Tensor, "2 head"]:
        """P(fraction ≥) and P(fraction ≤ the observed one); NaN where nothing can vary. See `rotation_tails`.

        Args:
            spectrum: S, of the whitened deltas.
            k: rank.
            fraction: observed.
        """
        f = fraction.double().cpu()
        p = self._tails(spectrum, k, f, exact=False)
        near = (p < _SETTLED).any(0)
        if bool(near.any()):
            p[:, near] = self._tails(spectrum[near], k, f[near], exact=True)
        return p

    def expected(self, k: int) -> Float64[Tensor, ""]:
        """The expected fraction in the leading k columns."""
        span = slice(self.leading, self.leading + k)
        return self.products[0, span, span].trace() / self.traces[0]

    def spectrum(
        self, k: int, fraction: Float64[Tensor, " head"], *, exact: bool = True
    ) -> tuple[Float64[Tensor, "head n"], Float64[Tensor, "head n"]]:
        """Eigenvalues of H and how often each counts; not `exact`: to first order about the expected fraction."""
        f, m = fraction, self.leading
        span = slice(0, m + min(k, _SOLVED))
        B1, B2 = self.products[:2, span, span]
        T1, T2, T3 = self.products[:, m : m + k, m : m + k]
        c1, c2, c3 = self.traces
        # An orthonormal basis of the span of C^{1/2}B, and in it C^{1/2}QQᵀC^{1/2} and C.
        ν, V = torch.linalg.eigh(B1)
        reached = ν > _UNREACHED * ν[-1]
        frame = V[:, reached] / ν[reached].sqrt()
        inside = frame.mT @ self.products[0, span, m : m + k]
        inside, whole = inside @ inside.mT, frame.mT @ B2 @ frame
        if exact:
            θ = torch.linalg.eigvalsh(inside - f[:, None, None] * whole)
        else:
            expected = self.expected(k)
            θ, V = torch.linalg.eigh(inside - expected * whole)
            θ = θ - (f - expected).unsqueeze(-1) * ((whole @ V) * V).sum(0)
        # Traces of ((QQᵀ − f) C)ⁿ, less what these eigenvalues account for.
        traces = (
            T1.trace() - f * c1,
            T1.square().sum() - 2 * f * T2.trace() + f**2 * c2,
            ((T1 @ T1) * T1).sum() - 3 * f * (T1 * T2).sum() + 3 * f**2 * T3.trace() - f**3 * c3,
        )
        left = [trace - θ.pow(n).sum(-1) for n, trace in enumerate(traces, 1)]
        values, copies = _two_values(self.d - θ.shape[-1], *left)
        return torch.cat([θ, values], -1), torch.cat([torch.ones_like(θ), copies], -1)

    def _tails(self, spectrum: Tensor, k: int, f: Tensor, *, exact: bool) -> Tensor:
        h, copies = self.spectrum(k, f.nan_to_num(), exact=exact)
        p = rotation_tails(h, copies, spectrum, self.d)
        return torch.where(f.isfinite(), p, torch.nan)


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


def _two_values(count: int, m1: Tensor, m2: Tensor, m3: Tensor) -> tuple[Tensor, Tensor]:
    """Two values and their weights with these power sums: the Gauss quadrature of a measure of mass `count`."""
    if count < 1:
        return torch.zeros(len(m1), 2, dtype=m1.dtype), torch.zeros(len(m1), 2, dtype=m1.dtype)
    mean = m1 / count
    sd = (m2 / count - mean.square()).clamp(min=0).sqrt()
    third = m3 / count - 3 * mean * sd.square() - mean.pow(3)
    γ = torch.where(sd > 0, third / sd.pow(3).clamp(min=1e-300), 0.0)
    root = (γ.square() / 4 + 1).sqrt()
    # From the larger of the two: the other is minus its inverse.
    large = γ / 2 + torch.where(γ < 0, -root, root)
    small = -1 / large
    share = 1 / (1 + large.square())
    values = torch.stack([mean + sd * large, mean + sd * small], -1)
    return values, count * torch.stack([share, 1 - share], -1)
