"""Modular arithmetic as a task for small transformers: two tokens in, one residue out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_asymmetry.arguments import checked, listed

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "sq": lambda a, b: a * a + b * b,
}
"""What each operation computes before it is taken modulo p."""

_LARGEST = 2000  # all p² pairs are listed

_NONZERO = frozenset({"mul"})
"""Operations whose operands are invertible residues: 1 … p − 1 under multiplication."""


@checked
@dataclass(frozen=True)
class ModularArithmetic:
    """All pairs (a, b) and their result modulo p under one operation, or several at once; split by seed.

    The split is the one of the author's public code for arXiv:2604.25143 (`random.Random(seed).shuffle` of the pairs
    in lexicographic order, the first part for training), so that a published seed means the published split. With
    several operations all share one table of pairs, which leaves zero out if one of them does.

    Raises:
        ValueError: an unknown operation, p < 2, "mul" with p not prime (products of nonzero residues would vanish),
            or a train fraction that leaves a side empty.

    Example:
        >>> task = ModularArithmetic("add", p=97, seed=42)
        >>> len(task.train), len(task.test), task.targets(torch.tensor([[90, 10]])).tolist()
        (4704, 4705, [[3]])
    """

    ops: str | tuple[str, ...] = "add"
    """One of "add" (a + b), "sub" (a − b), "mul" (a b), "sq" (a² + b²), or a tuple of several: one head for each."""
    p: int = 97
    """The modulus; also the number of tokens."""
    train_fraction: float = 0.5
    """Share of the pairs that is trained on, rounded down."""
    seed: int = 42
    """Of the split."""

    def __post_init__(self) -> None:
        names = listed("ops", self.ops, str, instead="ops='add'")
        if not names or len(set(names)) != len(names) or not set(names) <= set(OPERATIONS):
            raise ValueError(f"expected operations among {', '.join(OPERATIONS)}, got {self.ops!r}; pass ops='add'")
        if not 2 <= self.p <= _LARGEST:
            raise ValueError(f"expected p from 2 to {_LARGEST:,}, got {self.p}; pass a modulus such as 97")
        if _NONZERO & set(self.names) and not _is_prime(self.p):
            raise ValueError(
                f"expected a prime p for 'mul', whose operands are invertible, got {self.p}; pass a prime such as 97"
            )
        if not 0 < self.train_fraction < 1 or not 0 < int(self.train_fraction * len(self._pairs)) < len(self._pairs):
            raise ValueError(
                f"expected a train fraction that leaves pairs on both sides, got {self.train_fraction}; pass 0.5"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The operations, in the order of the model's heads."""
        return (self.ops,) if isinstance(self.ops, str) else tuple(self.ops)

    @property
    def lowest(self) -> int:
        """Smallest operand: 1 where an operation needs invertible ones, else 0."""
        return 1 if _NONZERO & set(self.names) else 0

    @property
    def train(self) -> Int[Tensor, "pairs 2"]:
        """Pairs trained on."""
        return self._pairs[: self._cut]

    @property
    def test(self) -> Int[Tensor, "pairs 2"]:
        """Pairs held out."""
        return self._pairs[self._cut :]

    def targets(self, pairs: Int[Tensor, "pairs 2"]) -> Int[Tensor, "pairs ops"]:
        """Results modulo p, one column for each operation."""
        a, b = pairs.unbind(-1)
        return torch.stack([OPERATIONS[name](a, b) % self.p for name in self.names], -1)

    def sample(self, count: int, *, seed: int) -> Int[Tensor, "pairs 2"]:
        """Pairs drawn from the whole table with replacement, training pairs and held-out ones alike.

        Drawn as the author's code draws its probes (all a, then all b, from NumPy's legacy generator), so that one
        seed means the same probes.

        Raises:
            ValueError: count < 1.
        """
        if count < 1:
            raise ValueError(f"expected count >= 1, got {count}; pass how many pairs to draw")
        stream = legacy_stream(seed)
        a, b = (torch.from_numpy(stream.randint(self.lowest, self.p, size=count).astype(np.int64)) for _ in range(2))
        return torch.stack([a, b], -1)

    @property
    def _cut(self) -> int:
        return int(self.train_fraction * len(self._pairs))

    @cached_property
    def _pairs(self) -> Tensor:
        residues = range(self.lowest, self.p)
        pairs = [(a, b) for a in residues for b in residues]
        random.Random(self.seed).shuffle(pairs)
        return torch.tensor(pairs)


def legacy_stream(seed: int) -> np.random.RandomState:
    """NumPy's legacy generator, local: its stream is what published seeds refer to."""
    if not 0 <= seed < 2**32:
        raise ValueError(
            f"expected seed from 0 to {2**32 - 1:,}, which NumPy's legacy generator takes, got {seed}; pass such"
        )
    return np.random.RandomState(seed)


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % q for q in range(2, int(p**0.5) + 1))
