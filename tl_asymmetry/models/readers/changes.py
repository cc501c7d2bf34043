"""What an adapter can do to one stored parameter: `names` are the stored tensors that say it, `delta` is the change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_asymmetry.geometry.precision import exact_products, product_dtype
from tl_asymmetry.models.readers.stored import read_float
from tl_asymmetry.models.readers.tuners import merged


@dataclass(frozen=True)
class Product:
    """scale · B A: thin factors."""

    files: Mapping[str, Tensor]
    """Where they are."""
    A: str
    """Name of A `[r, in]`."""
    B: str
    """Name of B `[out, r]`."""
    scale: float
    """α/r, or α/√r (rsLoRA)."""
    turned: bool
    """Whether the parameter is stored `[in, out]`: GPT-2's Conv1D, and embeddings `[word, d]`."""

    @property
    def names(self) -> tuple[str, ...]:
        return self.A, self.B

    def sides(self) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "columns r"]]:
        """The change as rows · columnsᵀ."""
        A, B = (read_float(self.files, name) for name in self.names)
        dtype = product_dtype(A, B)
        into, out = A.mT.to(dtype), self.scale * B.to(dtype)
        return (into, out) if self.turned else (out, into)

    def delta(self, W: Callable[[], Tensor]) -> Tensor:
        """The change in the parameter's own layout."""
        rows, columns = self.sides()
        with exact_products(rows.device):
            return rows @ columns.mT


@dataclass(frozen=True)
class Whole:
    """Another tensor in the parameter's place."""

    files: Mapping[str, Tensor]
    """Where it is."""
    name: str
    """Its name."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Rows:
    """Some rows of an embedding trained by themselves (`trainable_token_indices`)."""

    files: Mapping[str, Tensor]
    """Where they are."""
    name: str
    """Their name."""
    indices: Int[Tensor, " token"]
    """Which words they are of."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Offset:
    """scale · b added to a bias (`lora_bias`)."""

    files: Mapping[str, Tensor]
    """Where b is."""
    name: str
    """Its name."""
    scale: float
    """As of the factors beside it."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def delta(self, W: Callable[[], Tensor]) -> Tensor:
        """The change of the bias."""
        return self.scale * read_float(self.files, self.name)


@dataclass(frozen=True)
class Rescaled:
    """A bias multiplied entry by entry (IA3 scales what a module gives)."""

    files: Mapping[str, Tensor]
    """Where the multipliers are."""
    name: str
    """Their name."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class Merged:
    """What PEFT itself makes of one module, in float32."""

    files: Mapping[str, Tensor]
    """Where the module's tensors are."""
    tensors: Mapping[str, str]
    """Their names without the module → as they are stored."""
    adapter: Mapping[str, Any]
    """The adapter's configuration."""
    module: str
    """The module's name in the model."""
    shape: tuple[int, int]
    """Of the parameter."""
    turned: bool
    """Whether it is stored `[in, out]`."""
    needs_base: bool
    """Whether the kind rescales or turns W."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors.values())

    def delta(self, W: Callable[[], Tensor]) -> Tensor:
        """The change in the parameter's own layout; W is asked for only where `needs_base`."""
        old = W() if self.needs_base else torch.zeros(self.shape)
        own = {_leaf(name, stored): read_float(self.files, stored) for name, stored in self.tensors.items()}
        return merged(self.adapter, self.module, own, old, turned=self.turned) - old


def _leaf(name: str, stored: str) -> str:
    """A tensor's name as PEFT wants it on loading: a module's own ".weight" stays, except where PEFT adds it."""
    return f"{name}.weight" if stored.endswith(".weight") and name != "lora_magnitude_vector" else name


Change = Product | Whole | Rows | Offset | Rescaled | Merged
"""A change of one stored parameter; its tensors are read when they are asked for."""
