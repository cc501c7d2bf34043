"""Ordered orthonormal bases of R^d and how two of them lie to each other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.tridiagonal import leading_eigenvectors
from tl_asymmetry.names import SMALLEST_EIGENVALUE

_SMALLEST_ON_GPU, _LARGEST_TRIED, _WIDEST = 256, 1024, 1_000_000
# From here on half an eigensolve takes less time than a whole one.
_SMALLEST_REDUCED = 256
# Of the mean square: what rounding float32 rows leaves of the variance of equal ones (4e-15 was seen).
_ROUNDING = 1e-13


@checked
@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis, its columns in order of importance.

    Example:
        >>> plane = random_subspace(8, 2, seed=0)
        >>> plane.truncate(1).rank, plane.complement().rank, round(plane.overlap(plane), 6)
        (1, 6, 1.0)
        >>> plane
        Subspace(random[0]: 2 of 8 dimensions, no eigenvalues)

    Raises:
        ValueError: columns that are not orthonormal (to 1e-4), more columns than rows, or eigenvalues that do not fit
            or do not descend.
    """

    basis: Float[Tensor, "d k"]
    """Orthonormal columns `[d, k]`."""
    eigenvalues: Float[Tensor, " column"] | None = None
    """Variance along each column `[k]`, descending; None where none is defined (a random or given basis)."""
    name: str = ""
    """How tables and plots call it."""

    def __post_init__(self) -> None:
        if self.basis.ndim != 2:
            raise ValueError(
                f"expected a basis [d, k], got {list(self.basis.shape)}; pass as_subspace(vector) for directions"
            )
        d, k = self.basis.shape
        if k > d:
            raise ValueError(f"expected at most {d} columns in R^{d}, got {k}; pass the basis as [d, k]")
        if self.eigenvalues is not None and self.eigenvalues.shape != (k,):
            raise ValueError(f"expected {k} eigenvalues, got {tuple(self.eigenvalues.shape)}; pass one for each column")
        if self.eigenvalues is not None and _ascends(self.eigenvalues):
            raise ValueError(
                "expected eigenvalues that descend, so that the first columns lead, got others; pass the columns in "
                "that order, or eigenvalues=None"
            )
        Q = self.basis.detach().double()
        # QᵀQ v = v for a random v: as sure as QᵀQ = I, at the cost of two matrix-vector products.
        v = torch.randn(k, dtype=Q.dtype, generator=torch.Generator().manual_seed(0), device="cpu").to(Q)
        off = (Q.mT @ (Q @ v) - v).abs().max().item() if k else 0.0
        if not off <= 1e-4 * k**0.5:
            raise ValueError(
                f"expected orthonormal columns, got columns off by {off:.2g}; pass torch.linalg.qr(basis).Q"
            )

    def __repr__(self) -> str:
        known = "no eigenvalues" if self.eigenvalues is None else "eigenvalues known"
        return f"Subspace({self.name or 'unnamed'}: {self.rank} of {self.d} dimensions, {known})"

    @property
    def d(self) -> int:
        """Dimension of the surrounding space."""
        return self.basis.shape[0]

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.basis.shape[1]

    @property
    def existing(self) -> int:
        """Columns that exist: those with at least 1e-6 of the leading eigenvalue, all where there are none.

        A centred unembedding has d_vocab − 1 directions at most, few tokens fewer than d; beyond them an eigensolver
        gives directions of rounding.
        """
        return self.rank if self.eigenvalues is None else existing_directions(self.eigenvalues)

    def truncate(self, k: int) -> Subspace:
        """The first k columns.

        Raises:
            ValueError: k outside 1 … rank.
        """
        if not 1 <= k <= self.rank:
            raise ValueError(f"expected a rank from 1 to {self.rank}, got {k}; pass a smaller k or a fuller basis")
        eigenvalues = None if self.eigenvalues is None else self.eigenvalues[:k]
        return Subspace(self.basis[:, :k], eigenvalues, self.name)

    def complement(self) -> Subspace:
        """An orthonormal basis of all that is orthogonal to this one: d − rank columns, without eigenvalues."""
        full = torch.linalg.qr(self.basis.double(), mode="complete").Q
        return Subspace(full[:, self.rank :].to(self.basis.dtype), None, f"complement of {self.name}".strip())

    def overlap(self, other: Any) -> float:
        """‖Q₁ᵀQ₂‖²_F / min(k₁, k₂): 1 if one contains the other, 0 if orthogonal, max(k₁, k₂)/d by chance.

        Raises:
            ValueError: neither a subspace nor directions of this space.
        """
        other = as_subspace(other, self.d)
        cosines = self._cosines(other)
        return cosines.square().sum().item() / min(self.rank, other.rank)

    def principal_angles(self, other: Any) -> Float[Tensor, " angles"]:
        """Angles in radians, ascending, min(k₁, k₂) of them, float64.

        Small angles from sines, large ones from cosines, so that both keep their digits (Björck & Golub 1973;
        Knyazev & Argentati 2002).

        Raises:
            ValueError: neither a subspace nor directions of this space.
        """
        other = as_subspace(other, self.d)
        small, large = (self, other) if self.rank <= other.rank else (other, self)
        Q1 = large.basis.double()
        Q2 = small.basis.to(Q1)
        cosines = self._cosines(other).clamp(max=1)
        sines = torch.linalg.svdvals(Q2 - Q1 @ (Q1.mT @ Q2)).clamp(max=1).flip(0)
        return torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))

    def _cosines(self, other: Subspace) -> Tensor:
        Q1 = self.basis.double()
        return torch.linalg.svdvals(Q1.mT @ other.basis.to(Q1))


def _ascends(eigenvalues: Float[Tensor, " column"]) -> bool:
    """Whether one is larger than the one before it, by more than rounding of the largest."""
    λ = eigenvalues.detach()
    return len(λ) > 1 and bool((λ.diff() > 1e-6 * λ.abs().amax()).any())


@checked
def as_subspace(given: Any, d: int, *, name: str = "") -> Subspace:
    """Directions in whatever form, as a subspace of R^d: what they span, at their own number.

    Args:
        given: a `Subspace`, a vector `[d]`, a matrix `[d, k]` with directions as columns, or a list of vectors. They
            need be neither of unit length nor orthogonal; unless a `Subspace` says so, none comes before another.
        d: the dimension of the space.
        name: how tables call it.

    Raises:
        ValueError: another dimension, numbers that are not finite, directions that depend on each other.

    Example:
        >>> as_subspace([torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])], 3, name="mine")
        Subspace(mine: 2 of 3 dimensions, no eigenvalues)
    """
    what = f"{name!r} as directions" if name else "directions"
    if not isinstance(given, Subspace):
        try:
            vectors = given if hasattr(given, "shape") else torch.stack([torch.as_tensor(v) for v in given], -1)
            matrix = torch.as_tensor(vectors).detach().cpu()
            if matrix.is_complex():
                raise TypeError("complex numbers")
            matrix = matrix.double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"expected {what} [{d}], [{d}, k] or a list of vectors, got {type(given).__name__}; pass a tensor"
            ) from error
        matrix = matrix.unsqueeze(-1) if matrix.ndim == 1 else matrix
        if matrix.ndim != 2 or len(matrix) != d or not 1 <= matrix.shape[1] <= d:
            raise ValueError(f"expected {what} [{d}, k] in columns, got {list(matrix.shape)}; pass them so")
        if not bool(matrix.isfinite().all()):
            raise ValueError(f"expected {what} that are finite, got NaN or infinity; pass sound ones")
        σ = torch.linalg.svdvals(matrix / matrix.norm(dim=0).clamp_min(torch.finfo(matrix.dtype).tiny))
        if not bool(σ[-1] > 1e-6):
            raise ValueError(f"expected {what} independent of each other and not zero, got others; pass fewer")
        return Subspace(torch.linalg.qr(matrix).Q, None, name)
    if given.d != d:
        raise ValueError(f"expected {what} in R^{d}, got a subspace of R^{given.d}; pass bases of this model")
    return given


def existing_directions(eigenvalues: Float[Tensor, " d"]) -> int:
    """How many eigenvalues are at least 1e-6 of the largest.

    Example:
        >>> existing_directions(torch.tensor([2.0, 1.0, 1e-9]))
        2
    """
    return int((eigenvalues > SMALLEST_EIGENVALUE * eigenvalues.max()).sum())


def ordered_eigh(
    symmetric: Float[Tensor, "*batch d d"],
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d d"]]:
    """Eigenvalues in descending order and their eigenvectors, on CPU, in the dtype of the matrix.

    Solved on the CPU, or on a GPU that was measured to be faster at this size. Each vector's largest entry is made
    positive, so that the same matrix gives the same basis everywhere.
    """
    solver = faster_solver(symmetric.shape[-1], symmetric.dtype)
    λ, Q = (part.cpu().flip(-1) for part in torch.linalg.eigh(symmetric.to(solver)))
    largest = Q.gather(-2, Q.abs().argmax(-2, keepdim=True))
    return λ, Q * torch.where(largest < 0, -1.0, 1.0).to(Q.dtype)


def leading_directions(symmetric: Float[Tensor, "d d"], k: int) -> Float[Tensor, "d k"]:
    """The k eigenvectors of the largest eigenvalues, the largest first, on CPU; their signs are as they come."""
    d = len(symmetric)
    solver = faster_solver(d, symmetric.dtype)
    if symmetric.dtype == torch.float32 and solver.type == "cpu" and d >= _SMALLEST_REDUCED and k <= d // 2:
        found = leading_eigenvectors(symmetric.cpu(), k)
        if found is not None:
            return found
    return torch.linalg.eigh(symmetric.to(solver))[1][:, -k:].flip(-1).cpu()


@lru_cache(maxsize=16)
def faster_solver(d: int, dtype: torch.dtype) -> torch.device:
    """Where one d × d eigensolve takes less time: tried once for each size, where there is a GPU to try.

    What is faster at 1,024 is so beyond: there a try of full size would take minutes.
    """
    cpu = torch.device("cpu")
    if d < _SMALLEST_ON_GPU or not torch.cuda.is_available():
        return cpu
    if d > _LARGEST_TRIED:
        return faster_solver(_LARGEST_TRIED, dtype)
    probe = torch.diag(torch.arange(1, d + 1, dtype=dtype)) + torch.ones(d, d, dtype=dtype)
    seconds = {}
    for device in (torch.device("cuda"), cpu):
        torch.linalg.eigh(probe[:64, :64].to(device))  # the first call sets the library up
        start = time.perf_counter()
        torch.linalg.eigh(probe.to(device))[1].cpu()
        seconds[device] = time.perf_counter() - start
    return min(seconds, key=lambda device: seconds[device])


@checked
def principal_subspace(
    moments: StreamingMoments | Float[Tensor, "d d"], *, centered: bool = False, name: str = ""
) -> Subspace:
    """All d principal directions of a second moment, the strongest first: `truncate(k)` for the top k.

    Args:
        moments: streaming moments, or a symmetric matrix `[d, d]` taken as it is.
        centered: use the covariance instead of the uncentred second moment (not for a given matrix).

    Returns:
        Float64 subspace on CPU with its eigenvalues, which are clamped at 0; of a covariance also those that are only
        rounding beside the mean are 0.
    """
    floor = 0.0
    if isinstance(moments, Tensor):
        if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or not len(moments):
            raise ValueError(f"expected a symmetric matrix [d, d], got {list(moments.shape)}; pass a second moment")
        if centered:
            raise ValueError("expected StreamingMoments with centered=True, got a matrix; pass the covariance itself")
        matrix = moments.double()
    else:
        matrix = moments.covariance if centered else moments.second_moment
        floor = _ROUNDING * moments.mean_square * moments.d if centered else 0.0
    λ, Q = ordered_eigh(matrix)
    return Subspace(Q, torch.where(λ > floor, λ, 0.0), name)


@checked
def random_subspace(d: int, k: int, seed: int) -> Subspace:
    """A Haar-random k-dimensional subspace of R^d (float64, CPU): QR of a Gaussian matrix.

    Raises:
        ValueError: k outside 1 … d.
    """
    if not 1 <= d <= _WIDEST:
        raise ValueError(f"expected d from 1 to {_WIDEST:,}, got {d}; pass the width of a model")
    if not 1 <= k <= d:
        raise ValueError(f"expected a rank from 1 to {d}, got {k}; pass 1 <= k <= d")
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64, generator=generator))
    # LAPACK ties the sign of a column to its first entry; undone, the columns too are Haar (Mezzadri 2007).
    return Subspace(Q * R.diagonal().sign(), None, f"random[{seed}]")
