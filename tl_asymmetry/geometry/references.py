"""What a fraction would be if the update read nothing but its input's covariance: one reference for each optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tl_asymmetry.geometry.fraction import gram_energy


def correlation(moment: Float[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """D^{-1/2} Σ D^{-1/2}, D = diag Σ: what Adam's division by every entry's own size leaves of Σ.

    A coordinate that is always 0 stays 0.

    Example:
        >>> correlation(torch.tensor([[4.0, 1.0], [1.0, 1.0]])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    Σ = moment.double()
    scale = inverse_size(Σ.diagonal())
    return scale.unsqueeze(-1) * Σ * scale


def inverse_size(diagonal: Float[Tensor, " d"]) -> Float64[Tensor, " d"]:
    """D^{-1/2}; 0 where a coordinate is always 0."""
    return torch.where(diagonal > 0, diagonal.double().clamp(min=1e-300).rsqrt(), 0.0)


def sign_limit(moment: Float[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """(2/π) arcsin R entrywise: the covariance of sign(a), which one step of Adam, Lion or sign descent leaves.

    Exact for Gaussian a and a single step (the arcsine law, Van Vleck & Middleton 1966); persistent gradients tend
    to it.
    """
    R = correlation(moment).clamp(-1, 1)
    # The arcsine is so steep at 1 that a last digit of R becomes 1e-8: what is 1 by definition is set to it.
    R.diagonal().copy_(moment.diagonal() > 0)
    return 2 / math.pi * torch.arcsin(R)


def orthogonalized(moment: Float[Tensor, "d d"], columns: int) -> Float64[Tensor, "d d"]:
    """Σ (Σ + cI)⁻¹ with its trace equal to `columns`: the left covariance of an orthogonalised update (Muon). [ours]

    The identity where there are as many columns as rows: nothing is left of Σ then.
    """
    Σ = moment.double()
    d = len(Σ)
    if columns >= d:
        return torch.eye(d, dtype=Σ.dtype, device=Σ.device)
    λ, V = torch.linalg.eigh(Σ)
    λ = λ.clamp(min=0)
    if columns >= int((λ > 1e-12 * λ[-1]).sum()):
        return V[:, λ > 1e-12 * λ[-1]] @ V[:, λ > 1e-12 * λ[-1]].mT
    low, high = 0.0, float(λ.sum()) / columns
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if float((λ / (λ + c)).sum()) > columns else (low, c)
    return (V * (λ / (λ + high))) @ V.mT


def input_covariance(moment: Float[Tensor, "d d"], optimizer: str, *, columns: int) -> Float64[Tensor, "d d"]:
    """Left covariance, up to its scale, of an update by chance under an optimiser.

    Args:
        moment: Σ, the input's second moment.
        optimizer: "sgd": Σ; "adam": its correlation; "muon": `orthogonalized`.
        columns: of the matrix that the optimiser sees, all heads together; matters for Muon.

    Raises:
        ValueError: an unknown optimiser.
    """
    if optimizer == "sgd":
        return moment.double()
    if optimizer == "adam":
        return correlation(moment)
    if optimizer == "muon":
        return orthogonalized(moment, columns)
    raise ValueError(f"expected an optimizer of sgd, adam, muon, got {optimizer!r}; pass one of them")


def expected_fraction(covariance: Float[Tensor, "d d"], basis: Float[Tensor, "d k"]) -> Float64[Tensor, " k"]:
    """tr(QᵀCQ)/tr C for the leading 1 … k columns of a basis; NaN where C is zero, on CPU.

    Example:
        >>> expected_fraction(torch.diag(torch.tensor([3.0, 1.0])), torch.eye(2)).tolist()
        [0.75, 1.0]
    """
    C = covariance.double()
    trace = C.trace()
    share = gram_energy(C, basis).cumsum(0) / trace
    return torch.where(trace > 0, share, torch.nan).cpu()


@dataclass(frozen=True)
class AdapterCovariance:
    """What a LoRA adapter's update is by chance, in coordinates of the r directions that its A reads.

    ΔW = A B with A on the residual stream: B gathers Aᵀ Σ_t a_t δ_tᵀ, so the left covariance of ΔW is A B₂ Aᵀ, with
    B₂ = AᵀΣA under SGD and its correlation under Adam. From merged weights A is unknowable. [ours]
    """

    frame: Float64[Tensor, "d r"]
    """Orthonormal basis of A's columns."""
    covariance: Float64[Tensor, "r r"]
    """Left covariance in that basis."""
    mean: Float64[Tensor, " r"]
    """The mean input in that basis, scaled as the update is."""

    @classmethod
    def of(
        cls,
        reading: Float[Tensor, "d r"],
        moment: Float[Tensor, "d d"],
        mean: Float[Tensor, " d"],
        optimizer: str,
    ) -> AdapterCovariance:
        """From A, the input's second moment and its mean; "sign" is Adam's sign limit, and anything else but "sgd" is
        taken as Adam."""
        A = reading.double()
        frame, R = torch.linalg.qr(A)
        Σ = moment.to(A)
        inner, mean = A.mT @ Σ @ A, A.mT @ mean.to(A)
        if optimizer != "sgd":
            mean = inverse_size(inner.diagonal()) * mean
            inner = sign_limit(inner) if optimizer == "sign" else correlation(inner)
        return cls(frame, R @ inner @ R.mT, R @ mean)


def added_up(sums: Sequence[Float[Tensor, "d d"]]) -> Float[Tensor, "d d"]:
    """All added up, one held at a time."""
    added = sums[0].clone()
    for group in range(1, len(sums)):
        added += sums[group]
    return added


@dataclass
class CrossFit:
    """References of one input, the directions always fitted without the tokens that they are held against.

    In-sample, the leading directions of few tokens hold more of these tokens' variance than of any others': at 30
    tokens a delta by chance has 0.66 of the in-sample reference and 1.03 of this one. Give every group in turn.

    Example:
        >>> sums = [torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([5.0, 3.0]))]
        >>> fit = CrossFit(sums)
        >>> for group in range(2):
        ...     fit.add(group, torch.eye(2, dtype=torch.float64))
        >>> fit.expected("sgd").tolist()
        [0.6666666666666666, 1.0]
    """

    sums: Sequence[Float[Tensor, "d d"]]
    """Σ a aᵀ over each group's tokens."""
    replicated: Sequence[str] = ("sgd", "adam")
    """Of which references replicates are wanted."""
    whole: Float[Tensor, "d d"] | None = None
    """All of them together, where that is known."""
    _inside: dict[str, list[Tensor]] = field(default_factory=lambda: {"sgd": [], "adam": []})
    _total: dict[str, list[Tensor]] = field(default_factory=lambda: {"sgd": [], "adam": []})
    _replicates: dict[str, list[Tensor]] = field(default_factory=lambda: {"sgd": [], "adam": []})

    def __post_init__(self) -> None:
        self._whole = added_up(self.sums) if self.whole is None else self.whole

    def add(self, group: int, basis: Float[Tensor, "d k"]) -> None:
        """Take in one group with the directions fitted on all others."""
        for name in self._inside:
            self._take(name, group, basis)

    def add_all(self, basis: Float[Tensor, "d k"]) -> None:
        """Take in every group with directions that come from none of them."""
        for name in self._inside:
            if name == "sgd" and name not in self.replicated:  # what the groups hold adds up
                self._inside[name].append(gram_energy(self._whole, basis).cumsum(0))
                self._total[name].append(self._whole.trace().double())
                continue
            for group in range(len(self.sums)):
                self._take(name, group, basis)

    def _take(self, name: str, group: int, basis: Float[Tensor, "d k"]) -> None:
        S = self.sums[group]
        rest = self._whole.diagonal() - S.diagonal()
        scale = inverse_size(rest).to(S) if name == "adam" else torch.ones_like(rest)
        Q = basis.to(S) * scale.unsqueeze(-1)
        inside = gram_energy(S, Q).cumsum(0)
        self._inside[name].append(inside)
        self._total[name].append((S.diagonal() * scale.square()).sum().double())
        if name in self.replicated:
            whole = gram_energy(self._whole, Q).cumsum(0)
            self._replicates[name].append((whole - inside) / (rest * scale.square()).sum().double())

    def expected(self, optimizer: str) -> Float64[Tensor, " k"]:
        """Σ_g tr(Q_{−g}ᵀ S_g Q_{−g}) / Σ_g tr S_g for "sgd"; for "adam" with S_g scaled by the other groups' sizes."""
        return torch.stack(self._inside[optimizer]).sum(0) / torch.stack(self._total[optimizer]).sum()

    def replicates(self, optimizer: str) -> Float64[Tensor, "group k"]:
        """The reference without each group in turn, for an interval."""
        return torch.stack(self._replicates[optimizer])
