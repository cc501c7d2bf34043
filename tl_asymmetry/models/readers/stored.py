"""Parameters of an architecture that are in files: its matrices and extras by TransformerLens's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.readers.base import WeightSource
from tl_asymmetry.models.readers.blueprint import Blueprint
from tl_asymmetry.models.view import Parameters

DIMENSIONS = (
    "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "norm", "positional", "parallel",
    "causal",
)  # fmt: skip
"""What a source knows of its architecture, as a view of a loaded model does."""


class StoredParameters:
    """Matrices and extras out of stored parameters.

    Args:
        blueprint: of the architecture.
        files: where the tensors are.
        names: parameter → its name in the files.
    """

    def __init__(self, blueprint: Blueprint, files: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._blueprint, self._files, self._names = blueprint, files, names

    def has(self, parameter: str | None) -> bool:
        """Whether a parameter is in the files."""
        return parameter in self._names

    def read(self, parameter: str, *, as_stored: bool = False) -> Tensor:
        """A stored parameter in float32, or float64 if stored so; or in the type it is stored in."""
        return read_float(self._files, self._names[parameter], as_stored=as_stored)

    def matrix(self, layer: int, matrix: str) -> Tensor:
        """A matrix in TransformerLens orientation."""
        return self._blueprint.layouts[matrix].take(self.read(self._blueprint.parameter(layer, matrix)))

    def has_matrix(self, layer: int, matrix: str) -> bool:
        """Whether the parameter that a matrix lies in is in the files."""
        return self.has(self._blueprint.parameter(layer, matrix))

    def extra(self, name: str, parameter: str | None) -> Tensor:
        """An extra (by its name in layer 0) out of the parameter it lies in in its own layer."""
        as_stored = self._blueprint.extras[name].as_stored
        return self._blueprint.extra(name, None if parameter is None else self.read(parameter, as_stored=as_stored))

    def extras(self, *, include_tied: bool, tied: bool) -> Parameters:
        """All extras that the files have, biases that the architecture lacks as zeros."""
        makers: dict[str, Callable[[], Tensor]] = {}
        for name, extra in self._blueprint.extras.items():
            for layer, own in self._blueprint.everywhere(name):
                stored = None if extra.parameter is None else self._blueprint.skeleton.at(extra.parameter, layer)
                lacking = stored is None and extra.index is not None
                if lacking or self.has(stored):
                    makers[own] = partial(self.extra, name, stored)
        if tied and not include_tied:
            makers.pop("unembed.W_U", None)
        return Parameters(makers)

    def plain_extras(self, *, include_tied: bool, tied: bool) -> Parameters:
        """All parameters in the files that are no matrix, as stored, by transformers' names but for the embeddings."""
        known = {name: self._blueprint.extras.get(name) for name in ("embed.W_E", "unembed.W_U")}
        vocabulary = {name: None if extra is None else extra.parameter for name, extra in known.items()}
        makers: dict[str, Callable[[], Tensor]] = {}
        for parameter in self._names:
            if parameter == vocabulary["embed.W_E"]:  # the parameter itself: Gemma's Bridge shows it multiplied
                makers["embed.W_E"] = partial(self.read, parameter)
            if parameter == vocabulary["unembed.W_U"]:  # it may be the same one
                makers["unembed.W_U"] = partial(self.extra, "unembed.W_U", parameter)
            if parameter not in vocabulary.values() and not any(self._blueprint.matrices_in(parameter)):
                makers[parameter] = partial(self.read, parameter)
        if tied and not include_tied:
            makers.pop("unembed.W_U", None)
        return Parameters(makers)


def read_float(files: Mapping[str, Tensor], name: str, *, as_stored: bool = False) -> Tensor:
    """A stored tensor in float32, or float64 if stored so; or in the type it is stored in.

    Raises:
        ValueError: integers, or fewer than 16 bits.
    """
    tensor = files[name]
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise ValueError(
            f"expected floating-point weights of 16 bits or more, got {tensor.dtype} in {name}; pass weights saved "
            "without quantisation"
        )
    return tensor if as_stored else tensor.to(product_dtype(tensor))


def take_dimensions(source: WeightSource, blueprint: Blueprint) -> None:
    """Give a source the dimensions and kinds of its architecture."""
    source.n_layers = blueprint.n_layers
    for field in DIMENSIONS:
        setattr(source, field, getattr(blueprint.view, field))
