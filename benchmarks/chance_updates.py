"""Updates that know nothing of their inputs but their covariance, as each optimiser makes them: the nulls of the tests.

Tokens are rows; a change is `[head, d, columns]`, all heads of one layer made from the same tokens. Everything is drawn
from one generator in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SEQUENCE = 8
"""Tokens of a sequence, in which inputs and upstream gradients may be correlated."""

Law = Callable[[Tensor, int, Generator], Tensor]
"""Upstream gradients δ `[token, columns]` for inputs a `[token, d]`."""


@dataclass(frozen=True)
class Inputs:
    """A population of inputs: Gaussian, with a mean that holds `mean_share` of the second moment."""

    root: Tensor
    """Its covariance is root · rootᵀ."""
    mean: Tensor
    """Its mean."""
    shared: float = 0.0
    """Correlation of two tokens of one sequence."""

    @classmethod
    def of(cls, kind: str, d: int = 64, *, mean_share: float = 0.2, shared: float = 0.0) -> Inputs:
        """Of a kind: variances 1/i along "rotated" directions or along the coordinates ("axis-aligned"), the latter
        with three coordinates 10 to 30 times as large as the rest ("massive"), or with no gap after the fourth
        ("close")."""
        generator = torch.Generator().manual_seed(4)
        rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        λ = torch.arange(1, d + 1).float() ** -1
        if kind == "close":
            λ[4] = 0.99 * λ[3]
        root = rotation * λ.sqrt()
        if kind == "axis-aligned":
            root = torch.diag(λ.sqrt())
        if kind == "massive":
            scale = torch.ones(d)
            scale[:3] = torch.tensor([30.0, 20.0, 10.0])
            root = scale.unsqueeze(-1) * root
        mean = root @ torch.randn(d, generator=generator)
        mean *= (mean_share / (1 - mean_share) * root.square().sum()).sqrt() / mean.norm()
        return cls(root, mean, shared)

    @property
    def moment(self) -> Tensor:
        """The second moment, float64."""
        return (self.root @ self.root.T + torch.outer(self.mean, self.mean)).double()

    def draw(self, tokens: int, generator: Generator) -> Tensor:
        """Rows, in sequences of `SEQUENCE`."""
        z = correlated(tokens, self.root.shape[1], self.shared, generator)
        return z @ self.root.T + self.mean


def correlated(tokens: int, columns: int, share: float, generator: Generator) -> Tensor:
    """Standard Gaussian rows of which two in one sequence have correlation `share`."""
    z = torch.randn(tokens, columns, generator=generator)
    if share == 0:
        return z
    common = torch.randn(-(-tokens // SEQUENCE), columns, generator=generator).repeat_interleave(SEQUENCE, 0)[:tokens]
    return share**0.5 * common + (1 - share) ** 0.5 * z


def gaussian(a: Tensor, columns: int, generator: Generator) -> Tensor:
    """Independent entries."""
    return torch.randn(len(a), columns, generator=generator)


def rank_one(a: Tensor, columns: int, generator: Generator, heads: int = 16) -> Tensor:
    """One direction for each head, so that the change has rank 1."""
    direction = torch.randn(heads, columns // heads, generator=generator)
    size = torch.randn(len(a), heads, 1, generator=generator)
    return (size * direction).flatten(1)


def heavy_tailed(a: Tensor, columns: int, generator: Generator) -> Tensor:
    """Sizes of tokens log-normal with σ 1.5: a tenth of them hold about four fifths of the energy."""
    return gaussian(a, columns, generator) * torch.exp(1.5 * torch.randn(len(a), 1, generator=generator))


def sized_by_input(a: Tensor, columns: int, generator: Generator) -> Tensor:
    """‖δ‖ in proportion to ‖a‖²: no longer independent of a."""
    return gaussian(a, columns, generator) * a.square().sum(-1, keepdim=True)


def sized_by_head(a: Tensor, columns: int, generator: Generator, *, directions: Tensor) -> Tensor:
    """Each head's ‖δ‖ in proportion to a along a direction of its own, a row for each head."""
    by_head = gaussian(a, columns, generator).unflatten(1, (len(directions), -1))
    return (by_head * (a @ directions.T).unsqueeze(-1)).flatten(1)


def with_mean(a: Tensor, columns: int, generator: Generator) -> Tensor:
    """Every entry has a mean of 0.1 standard deviations."""
    return gaussian(a, columns, generator) + 0.1 * torch.randn(columns, generator=generator)


def within_sequences(a: Tensor, columns: int, generator: Generator) -> Tensor:
    """Correlation 0.3 between the tokens of a sequence."""
    return correlated(len(a), columns, 0.3, generator)


def sgd(a: Tensor, law: Law, heads: int, columns: int, generator: Generator) -> Tensor:
    """Σ a δᵀ."""
    return by_head(a.T @ law(a, heads * columns, generator), heads)


def adam(
    inputs: Inputs,
    law: Law,
    heads: int,
    columns: int,
    generator: Generator,
    *,
    steps: int,
    batch: int = 32,
    full: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Tensor:
    """Adam at a constant rate. `full`: every step the same tokens, with δ the same but for a third of its size."""
    batches = _Batches(inputs, law, heads * columns, generator, batch, full)
    state = AdamState(betas)
    change = torch.zeros(len(inputs.mean), heads * columns)
    for _ in range(steps):
        change -= state.step(batches.gradient())
    return by_head(change, heads)


def muon(
    inputs: Inputs, heads: int, columns: int, generator: Generator, *, steps: int, together: bool, batch: int = 256
) -> Tensor:
    """Momentum 0.95, orthogonalised: all heads as one matrix (`together`), or each by itself."""
    batches = _Batches(inputs, gaussian, heads * columns, generator, batch, full=False)
    momentum = torch.zeros(len(inputs.mean), heads * columns)
    change = torch.zeros_like(momentum if together else by_head(momentum, heads))
    for _ in range(steps):
        momentum = 0.95 * momentum + batches.gradient()
        change = change - orthogonal(momentum if together else by_head(momentum, heads))
    return by_head(change, heads) if together else change


def lora(
    inputs: Inputs, heads: int, columns: int, generator: Generator, *, steps: int, rank: int, rate: float
) -> tuple[Tensor, Tensor]:
    """A of an adapter whose heads share it, and the change A B. B starts at 0; A learns at `rate`, B at 1e-3.

    Both by Adam. The upstream gradient δ of the matrix is drawn by chance, A's is Σ a (B δ)ᵀ.
    """
    d = len(inputs.mean)
    A, B = torch.randn(d, rank, generator=generator) / d**0.5, torch.zeros(rank, heads * columns)
    of_A, of_B = AdamState(), AdamState()
    for _ in range(steps):
        a = inputs.draw(32, generator)
        δ = gaussian(a, heads * columns, generator)
        gradient_A, gradient_B = a.T @ (δ @ B.T), (a @ A).T @ δ
        B = B - 1e-3 * of_B.step(gradient_B)
        if rate > 0:
            A = A - rate * of_A.step(gradient_A)
    return A, by_head(A @ B, heads)


class AdamState:
    """Both moving averages of one tensor."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.betas = betas
        self.count = 0
        self.first = self.second = torch.zeros(())

    def step(self, gradient: Tensor) -> Tensor:
        """The step against a gradient, at rate 1."""
        (β1, β2), self.count = self.betas, self.count + 1
        self.first = β1 * self.first + (1 - β1) * gradient
        self.second = β2 * self.second + (1 - β2) * gradient.square()
        size = (self.second / (1 - β2**self.count)).sqrt() + 1e-12
        return self.first / (1 - β1**self.count) / size


class _Batches:
    """Gradients of one batch after the other."""

    def __init__(self, inputs: Inputs, law: Law, columns: int, generator: Generator, batch: int, full: bool) -> None:
        self.inputs, self.law, self.columns, self.generator, self.batch = inputs, law, columns, generator, batch
        self.kept = None
        if full:
            a = inputs.draw(batch, generator)
            self.kept = a, law(a, columns, generator)

    def gradient(self) -> Tensor:
        """Σ a δᵀ of the next batch."""
        if self.kept is None:
            a = self.inputs.draw(self.batch, self.generator)
            return a.T @ self.law(a, self.columns, self.generator)
        a, δ = self.kept
        return a.T @ (δ + self.law(a, self.columns, self.generator) / 3)


def orthogonal(matrix: Tensor) -> Tensor:
    """U Vᵀ of its singular value decomposition, through the smaller Gram matrix."""
    wide = matrix.shape[-1] > matrix.shape[-2]
    tall = matrix.mT if wide else matrix
    λ, V = torch.linalg.eigh((tall.mT @ tall).double())
    half = (V / λ.clamp(min=1e-300).sqrt().unsqueeze(-2)) @ V.mT
    done = (tall.double() @ half).float()
    return done.mT if wide else done


def by_head(change: Tensor, heads: int) -> Tensor:
    """`[d, heads · columns]` as `[head, d, columns]`."""
    return change.unflatten(1, (heads, -1)).transpose(0, 1)


def planted(change: Tensor, basis: Tensor, share: float, generator: Generator) -> Tensor:
    """The change with `share` of its energy moved into random directions of a basis, each head at its own norm."""
    norm = change.flatten(1).norm(dim=1)[:, None, None]
    inside = basis @ torch.randn(len(change), basis.shape[1], change.shape[2], generator=generator)
    inside = inside / inside.flatten(1).norm(dim=1)[:, None, None]
    return (1 - share) ** 0.5 * change + share**0.5 * norm * inside
