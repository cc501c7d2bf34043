"""A model directory as transformers writes it, single file or shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.models.loading import has_tokenizer
from tl_asymmetry.models.readers.base import WeightSource
from tl_asymmetry.models.readers.blueprint import Skeleton, blueprint_of, skeleton_of, untied
from tl_asymmetry.models.readers.files import TensorFiles, in_short
from tl_asymmetry.models.readers.resolution import Resolution, leftovers_note, nearest, wrappers_note
from tl_asymmetry.models.readers.stored import StoredParameters, take_dimensions
from tl_asymmetry.models.view import Parameters


class HuggingFaceWeights(WeightSource):
    """Weights of a transformers model in files: what transformers would show after loading them.

    Args:
        name: what to call them.
        config: the model's transformers configuration; of a multimodal one the language model is read.
        files: its tensors.
        folder: where its tokenizer lies, if anywhere.
        plain: call what is no matrix by transformers' own names, as a plain model of transformers does.

    Raises:
        ValueError: a missing parameter or one of another shape, quantised weights.
    """

    kind = "Hugging Face weights"

    def __init__(self, name: str, config: Any, files: TensorFiles, folder: Path | None, *, plain: bool = False) -> None:
        refuse_quantised(config, name)
        self.name, self.bytes, self._plain = name, files.bytes, plain
        skeleton, resolved = _resolved(name, config, files)
        if _has_two_heads(skeleton, resolved, files):
            config = untied(config)
            skeleton, resolved = _resolved(name, config, files)
            self.notes += (
                f"the configuration of {name!r} ties the unembedding to the embedding, but its files hold two that "
                "differ: both are read, as transformers does",
            )
        _check(name, skeleton, resolved, files)
        self.config = config
        self._blueprint = blueprint = blueprint_of(config)
        take_dimensions(self, blueprint)
        self._stored = StoredParameters(blueprint, files, resolved.found)
        self.matrices = tuple(
            matrix
            for matrix in blueprint.layouts
            if all(self._stored.has_matrix(layer, matrix) for layer in range(self.n_layers))
        )
        self.tied = bool(skeleton.tied) and blueprint.view.tied
        self.notes += (*_notes(name, skeleton, resolved),)
        self.tokenizer = None if folder is None else read_tokenizer(folder)

    def weight(self, layer: int, matrix: str) -> Tensor:
        self._require(layer, matrix)
        return self._stored.matrix(layer, matrix)

    def headless(self, *, include_tied: bool = False) -> Parameters:
        extras = self._stored.plain_extras if self._plain else self._stored.extras
        return extras(include_tied=include_tied, tied=self.tied)


def _resolved(name: str, config: Any, files: TensorFiles) -> tuple[Skeleton, Resolution]:
    """The parameters of a configuration and where they are; of tied ones either name does."""
    skeleton = skeleton_of(config, name)
    resolved = skeleton.resolve(files)
    for tied, source in skeleton.tied.items():
        if source not in resolved.found and tied in resolved.found:
            resolved.found[source] = resolved.found[tied]
    return skeleton, resolved


def _has_two_heads(skeleton: Skeleton, resolved: Resolution, files: TensorFiles) -> bool:
    """Whether two parameters that the configuration ties are stored with different values."""
    for tied, source in skeleton.tied.items():
        one, other = (resolved.found.get(parameter) for parameter in (tied, source))
        if one is None or other is None or one == other:
            continue
        if files.shape(one) != files.shape(other) or not all(
            torch.equal(a, b) for a, b in zip(files.pieces(one), files.pieces(other), strict=True)
        ):
            return True
    return False


def _check(name: str, skeleton: Skeleton, resolved: Resolution, files: TensorFiles) -> None:
    empty = [stored for stored in resolved.found.values() if 0 in files.shape(stored)]
    if empty:
        raise ValueError(
            f"expected whole tensors in {name!r}, got {len(empty)} empty ones, the first being {empty[0]}: one "
            "process's part of a model that DeepSpeed ZeRO-3 spread over several; pass the folder that "
            "zero_to_fp32.py writes, or one saved with stage3_gather_16bit_weights_on_model_save"
        )
    missing = [
        parameter
        for parameter in skeleton.shapes
        if parameter not in resolved.found and parameter not in resolved.converted and parameter not in skeleton.head
    ]
    if missing:
        raise ValueError(
            f"expected every parameter of {skeleton.architecture} in {name!r}, got none for {len(missing)} of them, "
            f"the first being {missing[0]}{nearest(missing[0], resolved.left)}; pass the weights that belong to this "
            "configuration"
        )
    for parameter, shape in skeleton.shapes.items():
        stored = resolved.found.get(parameter)
        if stored is not None and files.shape(stored) != shape:
            turned = files.shape(stored) == shape[::-1]
            raise ValueError(
                f"expected {parameter} of shape {shape} by the configuration, got {files.shape(stored)} in {name!r}"
                f"{', its transpose, as other code than transformers lays it out' if turned else ''}; pass the weights "
                "that belong to this configuration"
            )


def _notes(name: str, skeleton: Skeleton, resolved: Resolution) -> list[str]:
    notes = wrappers_note(name, resolved.taken) + leftovers_note(name, resolved.left, skeleton.n_layers)
    there = {*resolved.found, *(tied for tied, source in skeleton.tied.items() if source in resolved.found)}
    if skeleton.head and not skeleton.head & there:
        notes.append(f"{name!r} holds no unembedding (a reward model, or one without a head): W_U is not compared")
    if resolved.converted:
        notes.append(
            f"{len(resolved.converted)} tensors of {name!r} that transformers converts on loading (experts) are not "
            "read and left out of other_changes"
        )
    return notes


def refuse_quantised(config: Any, name: str) -> None:
    """Refuse weights that are no floating-point numbers."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"expected weights without quantisation, got {name!r} with a quantization_config; pass the model saved "
            "in 16 bits or more"
        )


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer beside the weights, or None where there is none."""
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' and tokenizers' own classes, which vary by version
        raise ValueError(
            f"expected a tokenizer that transformers can load in {str(folder)!r}, got {in_short(error)}; pass a folder "
            "with a whole one, or with none"
        ) from error
