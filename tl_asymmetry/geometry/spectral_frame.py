"""The frame that a weight's own singular vectors are, and how far another weight's frame is turned from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64
from scipy import fft, linalg
from torch import Tensor

from tl_asymmetry.geometry.precision import exact_products

_DEGENERATE = 1e-6
"""Share of the leading singular value under which a weight has no direction."""
_LARGE = 256
"""Length of a shorter axis from which leading vectors alone are quicker than all."""
_ROUNDS = 3
_FIRST_ORDER = 0.02
"""sin² of a single pair of directions up to which first-order perturbation is taken at its word."""


@dataclass(frozen=True)
class Frame:
    """W = U S Vᵀ of each head, with all that comparisons of frames ask of it. Float64 on the weight's device.

    Made by `spectral_frame`, which has all singular vectors of the shorter axis, or by `leading_frame`.
    """

    weight: Float[Tensor, "head m n"]
    """W itself."""
    values: Float64[Tensor, "head r"]
    """Singular values, descending: all min(m, n), or the leading ones."""
    shorter: Float64[Tensor, "head short r"]
    """Their singular vectors of the shorter axis, in columns."""
    longer: Float64[Tensor, "head long k"]
    """The leading singular vectors of the longer axis, as many as were asked for."""

    @property
    def left_is_shorter(self) -> bool:
        """Whether the shorter axis is that of the rows."""
        return self.weight.shape[-2] <= self.weight.shape[-1]

    def left(self, k: int) -> Float64[Tensor, "head m k"]:
        """The k leading left singular vectors."""
        return (self.shorter if self.left_is_shorter else self.longer)[..., :k]

    def right(self, k: int) -> Float64[Tensor, "head n k"]:
        """The k leading right singular vectors."""
        return (self.longer if self.left_is_shorter else self.shorter)[..., :k]

    def left_cosines(self, vectors: Float64[Tensor, "head m k"]) -> Float64[Tensor, "head k r"]:
        """|cos| of unit vectors with each of the frame's left singular vectors; 0 with one that W does not have."""
        return self._cosines(vectors, of_shorter=self.left_is_shorter)

    def right_cosines(self, vectors: Float64[Tensor, "head n k"]) -> Float64[Tensor, "head k r"]:
        """The same with the right singular vectors."""
        return self._cosines(vectors, of_shorter=not self.left_is_shorter)

    def _cosines(self, vectors: Tensor, *, of_shorter: bool) -> Tensor:
        with exact_products(self.weight.device):
            if of_shorter:
                return (vectors.mT @ self.shorter).abs()
            # v · (Wᵀu_j / σ_j): the r long vectors are never laid out.
            products = (_towards_longer(self.weight).mT.double() @ vectors).mT @ self.shorter
        there = self.values > _DEGENERATE * self.values[..., :1]
        σ = torch.where(there, self.values, torch.inf)
        return (products / σ.unsqueeze(-2)).abs()


def spectral_frame(weight: Float[Tensor, "head m n"], longer: int | None = None) -> Frame:
    """The singular values and vectors of each head, through the Gram matrix of the shorter axis.

    Gram matrix and eigensolve are in float64: singular values down to 1e-7 of the first are exact to half of
    float32's digits, at a fraction of the time of an SVD of W.

    Args:
        weight: W.
        longer: how many leading singular vectors of the longer axis; None: as many as of the shorter one.

    Example:
        >>> frame = spectral_frame(torch.diag(torch.tensor([2.0, 5.0])).unsqueeze(0))
        >>> frame.values.tolist(), frame.left(1).abs().flatten().tolist()
        ([[5.0, 2.0]], [0.0, 1.0])
    """
    W = weight.detach().double()
    λ, vectors = torch.linalg.eigh(_gram(W))
    return _frame(weight, W, λ, vectors, longer)


def leading_frame(weight: Float[Tensor, "head m n"], k: int) -> Frame:
    """The k leading singular values and vectors alone: those of `spectral_frame`, at less than half of its time.

    The eigensolve of a large Gram matrix stops after k vectors (LAPACK's syevr, on the CPU), which leaves out no digit.

    Example:
        >>> leading_frame(torch.diag(torch.tensor([2.0, 5.0, 1.0])).unsqueeze(0), 2).values.tolist()
        [[5.0, 2.0]]
    """
    W = weight.detach().double()
    gram = _gram(W)
    r = gram.shape[-1]
    if gram.device.type == "cpu" and r >= _LARGE and 4 * k <= r:
        solved = [linalg.eigh(one, subset_by_index=(r - k, r - 1), check_finite=False) for one in gram.numpy()]
        λ, vectors = (torch.from_numpy(np.stack(part)) for part in zip(*solved, strict=True))
    else:
        λ, vectors = (part[..., -k:] for part in torch.linalg.eigh(gram))
    return _frame(weight, W, λ, vectors, k)


def _gram(W: Float64[Tensor, "head m n"]) -> Float64[Tensor, "head r r"]:
    with exact_products(W.device):
        return W @ W.mT if W.shape[-2] <= W.shape[-1] else W.mT @ W


def _frame(weight: Tensor, W: Tensor, λ: Tensor, vectors: Tensor, longer: int | None) -> Frame:
    """A frame of eigenvalues and eigenvectors in ascending order."""
    shorter = vectors.flip(-1)
    with exact_products(W.device):
        image = _towards_longer(W) @ shorter[..., :longer]
    # In order, so that a direction which W does not have is made up at right angles to those before it.
    Q, R = torch.linalg.qr(image)
    signs = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return Frame(weight.detach(), λ.flip(-1).clamp(min=0).sqrt(), shorter, Q * signs.unsqueeze(-2))


def _towards_longer(W: Tensor) -> Tensor:
    """W laid out so that it takes the shorter axis to the longer one."""
    return W.mT if W.shape[-2] <= W.shape[-1] else W


def rotation(first: Float64[Tensor, "head d k"], second: Float64[Tensor, "head d k"]) -> Float64[Tensor, " head"]:
    """Mean sin² of the principal angles between two k-dimensional subspaces: 0 the same, 1 at right angles.

    Example:
        >>> rotation(torch.eye(3)[None, :, :1].double(), torch.eye(3)[None, :, 1:2].double()).item()
        1.0
    """
    with exact_products(first.device):
        inner = (first.mT @ second).square().sum((-2, -1))
    return (1 - inner / first.shape[-1]).clamp(0, 1)


def expected_rotation(
    values: Float64[Tensor, "head r"], energy: Float64[Tensor, " head"], m: int, n: int, k: int
) -> tuple[Float64[Tensor, " head"], Float64[Tensor, " head"]]:
    """The rotation of the leading left and right subspaces under a small delta of that energy at Haar orientation.

    First order in the delta (Stewart & Sun 1990, ch. V), each entry of UᵀΔW V of mean square ‖ΔW‖²/(mn): a direction
    of the k leading ones turns towards each further one by (σ_i² + σ_j²)/(σ_i² − σ_j²)², and on the longer axis
    towards the |m − n| directions that W does not have by 1/σ_i². Divided by k, as `rotation` is.

    Args:
        values: singular values of W, descending.
        energy: ‖ΔW‖².
        m, n: rows and columns.
        k: dimension of the subspaces.

    Returns:
        Left and right; infinite where one pair of directions would turn by more than sin² = 0.02, which is beyond
        first order.
    """
    σ2 = values.square()
    lead, rest = σ2[..., :k, None], σ2[..., None, k:]
    turns = (lead + rest) / (lead - rest).square() * (energy / (m * n))[..., None, None]
    beyond = abs(m - n) / σ2[..., :k].clamp(min=1e-300) * (energy / (m * n)).unsqueeze(-1)
    # One pair of nearly equal singular values can turn far while the mean over all stays small.
    far = torch.maximum(turns.amax((-2, -1)), beyond.amax(-1)) > _FIRST_ORDER
    shorter = torch.where(far, torch.inf, turns.sum((-2, -1)) / k)
    longer = shorter + beyond.sum(-1) / k
    return (shorter, longer) if m <= n else (longer, shorter)


def intruders(cosines: Float64[Tensor, "head k r"], threshold: float = 0.5) -> Float64[Tensor, "head k"]:
    """Which of k leading singular vectors resemble none of another weight's: 1 where the largest |cos| is below.

    Shuttleworth et al. 2024 ("LoRA vs Full Fine-tuning: An Illusion of Equivalence", arXiv 2410.21228, Algorithm 1).

    Example:
        >>> intruders(torch.tensor([[[0.9, 0.1], [0.3, 0.4]]], dtype=torch.float64)).tolist()
        [[0.0, 1.0]]
    """
    return (cosines.amax(-1) < threshold).double()


def at_random_orientation(
    delta: Float[Tensor, "*head m n"], generator: np.random.Generator, *, axes: tuple[int, ...] = (-2, -1)
) -> Float[Tensor, "*head m n"]:
    """The delta turned by random orthogonal maps: its singular values at an orientation of chance.

    Signs, a cosine transform and a permutation, three times on each axis: what a Haar rotation does to leading
    subspaces, without the m × m matrix of one. All heads are turned alike.

    Args:
        delta: ΔW, or a factor of it.
        generator: of signs and permutations.
        axes: which are turned, −2 and −1 of ΔW, −2 of a factor.

    Example:
        >>> turned = at_random_orientation(torch.eye(8)[None, :, :2], np.random.default_rng(0))
        >>> bool(torch.allclose(torch.linalg.svdvals(turned), torch.ones(1, 2)))
        True
    """
    turned = delta.detach().cpu().numpy()
    for axis in axes:
        length = turned.shape[axis]
        shape = (length, 1) if axis == -2 else (length,)
        for _ in range(_ROUNDS):
            signs = generator.choice(np.array([-1, 1], dtype=turned.dtype), length).reshape(shape)
            turned = fft.dct(turned * signs, axis=axis, norm="ortho").take(generator.permutation(length), axis=axis)
    return torch.from_numpy(turned).to(delta.device)
