"""What objectives are fed with: token ids and the ones that count, plain or in pairs of preference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_asymmetry.arguments import shown


@dataclass(frozen=True)
class TokenBatch:
    """Token ids and which of them count. Padding goes on the right and is left out by the mask.

    Raises:
        ValueError: when shapes differ, or a row has nothing to predict.
    """

    tokens: Int[Tensor, "batch pos"]
    """Token ids."""
    mask: Bool[Tensor, "batch pos"]
    """True where a token is a target, predicted from the tokens before it. The first position is never one,
    whatever the mask says there: nothing comes before it."""

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tensor) or not isinstance(self.mask, Tensor):
            raise ValueError(
                f"expected tokens and mask as tensors [batch, pos], got {shown(self.tokens)} and {shown(self.mask)}; "
                "pass torch.tensor(...)"
            )
        if self.tokens.dtype == torch.bool or self.tokens.is_floating_point() or self.tokens.is_complex():
            raise ValueError(f"expected tokens as whole numbers, got {shown(self.tokens)}; pass token ids")
        if self.tokens.ndim != 2 or self.tokens.shape != self.mask.shape:
            raise ValueError(
                f"expected tokens and mask of one shape [batch, pos], got {tuple(self.tokens.shape)} and "
                f"{tuple(self.mask.shape)}; pass one mask entry per token"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"expected a boolean mask, got {self.mask.dtype}; pass mask.bool()")
        if not bool(self.mask[:, 1:].any(dim=1).all()):
            raise ValueError(
                "expected at least one target per row after the first position, got a row without; "
                "pass mask=True where a token is to be predicted, and no empty rows"
            )

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.tokens)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each row up to its last target: what follows is padding, or might as well be."""
        positions = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        return (self.mask * positions).amax(1)

    def rows(self, index: slice) -> TokenBatch:
        """Some of the rows."""
        return TokenBatch(self.tokens[index], self.mask[index])

    def to(self, device: torch.device) -> TokenBatch:
        """The batch on a device, as tensors that a gradient may depend on (none of inference mode)."""
        return TokenBatch(*((x.clone() if x.is_inference() else x).to(device) for x in (self.tokens, self.mask)))


@dataclass(frozen=True)
class PreferenceBatch:
    """Row i of `chosen` and row i of `rejected` continue the same prompt; the masks cover the continuations.

    Raises:
        ValueError: when the two halves differ in the number of rows.
    """

    chosen: TokenBatch
    """The preferred continuation of each prompt, prompt included in the tokens, left out by the mask."""
    rejected: TokenBatch
    """The other one."""

    def __post_init__(self) -> None:
        for half in (self.chosen, self.rejected):
            if not isinstance(half, TokenBatch):
                raise ValueError(f"expected chosen and rejected as TokenBatch, got {shown(half)}; pass two of them")
        chosen, rejected = len(self.chosen.tokens), len(self.rejected.tokens)
        if chosen != rejected:
            raise ValueError(
                f"expected as many chosen rows as rejected, got {chosen} and {rejected}; "
                "pass one rejected continuation for each chosen one"
            )

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.chosen)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each pair, both halves together."""
        return self.chosen.lengths + self.rejected.lengths

    def rows(self, index: slice) -> PreferenceBatch:
        """Some of the pairs."""
        return PreferenceBatch(self.chosen.rows(index), self.rejected.rows(index))

    def to(self, device: torch.device) -> PreferenceBatch:
        """Both halves on a device."""
        return PreferenceBatch(self.chosen.to(device), self.rejected.to(device))


Batch = TokenBatch | PreferenceBatch
"""Either of the two."""
