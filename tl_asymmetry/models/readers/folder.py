"""A model directory as transformers writes it, single file or shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.models.readers.base import WeightSource
from tl_asymmetry.models.readers.blueprint import Blueprint
from tl_asymmetry.models.readers.files import TensorFiles
from tl_asymmetry.models.view import Parameters

_DIMENSIONS = (
    "d_model", "n_heads", "n_kv_heads", "d_head", "d_mlp", "d_vocab", "n_ctx", "norm", "positional", "parallel",
    "causal", "matrices",
)  # fmt: skip


class StoredParameters:
    """Parameters of an architecture found in files: matrices and extras by TransformerLens's names.

    Args:
        blueprint: of the architecture.
        files: where the tensors are.
        names: parameter → its name in the files.
        only_some: whether the files may hold some parameters only (an adapter's).

    Raises:
        ValueError: a parameter that is not there, or has another shape.
    """

    def __init__(
        self, blueprint: Blueprint, files: Mapping[str, Tensor], names: Mapping[str, str], *, only_some: bool = False
    ) -> None:
        self._blueprint, self._files, self._names, self._only_some = blueprint, files, names, only_some

    def has(self, parameter: str | None) -> bool:
        """Whether a parameter is in the files."""
        return parameter in self._names

    def read(self, parameter: str, *, as_stored: bool = False) -> Tensor:
        """A stored parameter in float32, or float64 if stored so; or in the type it is stored in."""
        tensor = self._files[self._names[parameter]]
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ValueError(
                f"expected floating-point weights of 16 bits or more, got {tensor.dtype} in {self._names[parameter]}; "
                "pass weights saved without quantisation"
            )
        return tensor if as_stored else tensor.to(product_dtype(tensor))

    def matrix(self, layer: int, matrix: str) -> Tensor:
        """A matrix in TransformerLens orientation."""
        layout = self._blueprint.layouts[matrix]
        return layout.take(self.read(self._blueprint.at(layout.parameter, layer)))

    def has_matrix(self, layer: int, matrix: str) -> bool:
        """Whether the parameter that a matrix lies in is in the files."""
        return self.has(self._blueprint.at(self._blueprint.layouts[matrix].parameter, layer))

    def headless(self, *, include_tied: bool, tied: bool) -> Parameters:
        """All extras that the files have; biases that the architecture lacks as zeros, unless only part is expected."""
        makers: dict[str, Callable[[], Tensor]] = {}
        for name, extra in self._blueprint.extras.items():
            for layer, own in self._blueprint.everywhere(name):
                stored = None if extra.parameter is None else self._blueprint.at(extra.parameter, layer)
                lacking = stored is None and extra.index is not None and not self._only_some
                if lacking or self.has(stored):
                    makers[own] = partial(self._extra, name, stored)
        if tied and not include_tied:
            makers.pop("unembed.W_U", None)
        return Parameters(makers)

    def _extra(self, name: str, stored: str | None) -> Tensor:
        as_stored = self._blueprint.extras[name].as_stored
        return self._blueprint.extra(name, None if stored is None else self.read(stored, as_stored=as_stored))


class HuggingFaceWeights(WeightSource):
    """Weights of a transformers model in files.

    Args:
        name: what to call them.
        config: the model's transformers configuration.
        files: its tensors.
        folder: where its tokenizer lies, if anywhere.

    Raises:
        ValueError: a missing parameter or one of another shape, quantised weights.
    """

    kind = "Hugging Face weights"

    def __init__(self, name: str, config: Any, files: TensorFiles, folder: Path | None) -> None:
        refuse_quantised(config, name)
        self.name = name
        self.config = config
        self.bytes = files.bytes
        self._blueprint = blueprint = Blueprint(config)
        self.n_layers = blueprint.n_layers
        take_dimensions(self, blueprint)
        names, converted = blueprint.stored_as(files)
        self._check(files, names, converted)
        self._stored = StoredParameters(blueprint, files, names)
        self.matrices = tuple(
            matrix
            for matrix in blueprint.layouts
            if all(self._stored.has_matrix(layer, matrix) for layer in range(self.n_layers))
        )
        self.tied = bool(blueprint.tied) and blueprint.view.tied
        if converted:
            self.notes = (
                f"{len(converted)} tensors of {name!r} that transformers converts on loading (experts) are not "
                "read and left out of other_changes",
            )
        self.tokenizer = None if folder is None else read_tokenizer(folder)

    def _check(self, files: TensorFiles, names: Mapping[str, str], converted: set[str]) -> None:
        missing = [name for name in self._blueprint.shapes if name not in names and name not in converted]
        if missing:
            raise ValueError(
                f"expected every parameter of {self._blueprint.architecture} in {self.name!r}, got none for "
                f"{len(missing)} of them, the first being {missing[0]}; pass the weights that belong to this "
                "configuration"
            )
        for name, shape in self._blueprint.shapes.items():
            if name in names and files.shape(names[name]) != shape:
                raise ValueError(
                    f"expected {name} of shape {shape} by the configuration, got {files.shape(names[name])} in "
                    f"{self.name!r}; pass the weights that belong to this configuration"
                )

    def weight(self, layer: int, matrix: str) -> Tensor:
        self._require(layer, matrix)
        return self._stored.matrix(layer, matrix)

    def headless(self, *, include_tied: bool = False) -> Parameters:
        return self._stored.headless(include_tied=include_tied, tied=self.tied)


def take_dimensions(source: WeightSource, blueprint: Blueprint) -> None:
    """Give a source the dimensions and kinds of its architecture."""
    for field in _DIMENSIONS:
        setattr(source, field, getattr(blueprint.view, field))


def refuse_quantised(config: Any, name: str) -> None:
    """Refuse weights that are no floating-point numbers."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"expected weights without quantisation, got {name!r} with a quantization_config; pass the model saved "
            "in 16 bits or more"
        )


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights, or None where there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"expected a tokenizer that transformers can load in {str(folder)!r}, got {error}; pass a folder with a "
            "whole one, or with none"
        ) from error


def read_config(folder: Path) -> Any:
    """The transformers configuration in a folder.

    Raises:
        ValueError: none there, or one transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"expected a model configuration that transformers knows in {str(folder)!r}, got {error}; pass a folder "
            "written by save_pretrained"
        ) from error
