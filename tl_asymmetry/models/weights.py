"""Weights from wherever they are: a directory, shards, an adapter, a state dict; streamed, never a second model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.models.encoders import is_encoder_class
from tl_asymmetry.models.huggingface import PLAIN
from tl_asymmetry.models.loading import NotWrappedError, predicts_masked_tokens
from tl_asymmetry.models.readers.adapter import AdapterWeights
from tl_asymmetry.models.readers.base import Factors, Weights, WeightSource, as_weights
from tl_asymmetry.models.readers.blueprint import skeleton_of
from tl_asymmetry.models.readers.configuration import (
    config_beside,
    config_of,
    is_config,
    read_adapter_config,
    read_config,
)
from tl_asymmetry.models.readers.files import (
    ADAPTER_FILES,
    MODEL_FILES,
    TensorFiles,
    open_files,
    read_json,
    refuse_foreign,
)  # fmt: skip
from tl_asymmetry.models.readers.folder import HuggingFaceWeights, refuse_quantised
from tl_asymmetry.models.readers.hub import fetched, local_or_hub
from tl_asymmetry.models.readers.loaded import adapted, loaded_folder
from tl_asymmetry.models.readers.state_dict import MARK, StateWeights
from tl_asymmetry.models.view import ModelView

__all__ = ["Factors", "WeightSource", "Weights", "as_weights", "opened", "weights_from"]

_ADAPTER = "adapter_config.json"
_FACTORS, _WRAPPED = ".lora_A", ".base_layer."


@checked
def weights_from(
    source: str | Path | Mapping[str, Tensor] | WeightSource,
    base: Any = None,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> WeightSource:
    """Open weights in TransformerLens orientation without building a model; tensors are read one at a time.

    Reads a Hugging Face directory or hub name (one file or shards), a `.safetensors` file with its config.json beside
    it, a PEFT adapter, and TransformerLens state dicts (a file, with a tl_config.json beside it or a base; or a
    mapping). How an architecture lays out its matrices is asked of TransformerLens itself, so what is read here is
    what a loaded model would show: transformers' after loading, PEFT's after merging. Names and shapes are checked on
    opening, from the files' headers; what was stripped off names or left aside is in the source's `notes`.

    Args:
        source: where the weights are; a `WeightSource` is given back as it is (an adapter without a base, on `base`).
        base: the model they are to be compared with: a HookedTransformer, TransformerBridge, `ModelView`, another
            source or its path, or a transformers configuration. Without one the configuration of an adapter's own base
            is looked for, on the Hub if it must be; with one nothing is fetched for it.
        revision: branch, tag or commit of a hub name.
        subfolder: folder inside a hub repository or a local directory.
        token: for private repositories on the Hub; by default the one that is stored on this machine.

    Raises:
        ValueError: no source at all, a revision of something local, nothing there, files that are damaged, tensors that
            do not fit the architecture, adapters that cannot be merged one matrix at a time: saying which and what to
            pass instead.

    Example:
        >>> from tl_asymmetry.demo import demo_gpt2
        >>> demo_gpt2("dpo").save_pretrained("checkpoint")
        >>> weights = weights_from("checkpoint")
        >>> tuple(weights.weight(0, "W_Q").shape), tuple(weights.delta(0, "W_O", model).shape)
        ((4, 64, 16), (4, 16, 64))
    """
    if isinstance(base, str | Path):
        base = weights_from(base)
    elif base is not None and not is_config(base) and not isinstance(base, Weights | torch.nn.Module):
        raise ValueError(f"expected base as a model, a path or a configuration, got {shown(base)}; pass one of these")
    if isinstance(source, WeightSource):
        return source if base is None or is_config(base) else source.onto(as_weights(base))
    if isinstance(source, Mapping):
        return _state("state dict", source, 0, {}, base)
    path = _found(source, revision, subfolder, token)
    return _from_folder(str(source), path, base) if path.is_dir() else _from_file(str(source), path, base)


def _from_folder(name: str, folder: Path, base: Any) -> WeightSource:
    """An adapter or a model, whichever transformers would see in a folder."""
    has_adapter = any((folder / file).is_file() for file in ADAPTER_FILES)
    has_model = any((folder / file).is_file() for file in MODEL_FILES)
    has_config = (folder / "config.json").is_file()
    if (folder / _ADAPTER).is_file() or (has_adapter and not has_model):
        if has_adapter and has_model and has_config:
            raise ValueError(
                f"expected a model or an adapter, got both in {name!r} (transformers adds the adapter to the weights "
                "beside it, a merged model has it already); pass the file of the one that is meant "
                f"({ADAPTER_FILES[0]} or {MODEL_FILES[0]})"
            )
        files = open_files(folder, ADAPTER_FILES if has_adapter else (*ADAPTER_FILES, *MODEL_FILES))
        if has_adapter or _is_tuned(files) or not has_config:
            return _adapter(name, folder, files, base)
        source = _model(name, folder, files, base)
        source.notes += (f"{name!r} holds whole weights beside an {_ADAPTER} without an adapter's: they are read",)
        return source
    if has_config:
        files = open_files(folder)
        if _is_tuned(files) and any(_WRAPPED in key for key in files):  # beside plain weights, factors are left over
            return _adapter(name, folder, files, base)
        return _model(name, folder, files, base)
    if not any(folder.glob("*.safetensors")) and not has_model:
        refuse_foreign(folder)
        raise ValueError(
            f"expected a Hugging Face model directory with config.json, got {name!r}; pass a directory written by "
            "save_pretrained, an adapter's, or a name on the Hub"
        )
    return _from_files(name, open_files(folder), folder, base)


def _model(name: str, folder: Path, files: TensorFiles, base: Any) -> WeightSource:
    """A model directory: read tensor by tensor where all layers are alike, loaded whole where they are not, and where
    TransformerLens does not name them."""
    config = read_config(folder, files)
    refuse_quantised(config, name)
    plain = isinstance(base, ModelView) and base.kind == PLAIN
    skeleton = None if predicts_masked_tokens(config) else skeleton_of(config, name)
    # A plain post-norm encoder with a causal head has no final norm; its Bridge calls the last block's one so.
    if skeleton is not None and skeleton.has_like_layers and not (plain and is_encoder_class(skeleton.architecture)):
        with suppress(NotWrappedError):
            return HuggingFaceWeights(name, config, files, folder, plain=plain)
    return loaded_folder(name, folder, base)


def _from_file(name: str, path: Path, base: Any) -> WeightSource:
    refuse_foreign(path)
    files = open_files(path)
    if _is_tuned(files) or path.name in ADAPTER_FILES:
        return _adapter(name, path.parent, files, base)
    return _from_files(name, files, path.parent, base)


def _from_files(name: str, files: TensorFiles, folder: Path, base: Any) -> WeightSource:
    """Tensors by themselves: TransformerLens's, or a model's whose configuration is beside them or the base's."""
    if any(MARK.fullmatch(key) for key in files):
        return _state(name, files, files.bytes, _told(folder), base)
    if (folder / "config.json").is_file():
        return HuggingFaceWeights(name, read_config(folder, files), files, folder)
    config = config_of(base)
    if config is None:
        raise ValueError(
            f"expected config.json (or {_ADAPTER}) beside {name!r}, got none; pass the directory that save_pretrained "
            "wrote, or base="
        )
    return HuggingFaceWeights(name, config, files, None)


def opened(model_aligned: Any, base: Weights | None, *, runs: bool) -> Weights:
    """A model, aligned where there is a base: a view of a loaded one, or a source that reads it tensor by tensor.

    Args:
        model_aligned: a model, or whatever `weights_from` reads.
        base: the base, if this is not it.
        runs: it will be run: a folder or name on the Hub is loaded, as the base is.

    Raises:
        ValueError: weights that no model can be made of, where one is to be run.
    """
    weights = isinstance(model_aligned, Mapping | WeightSource)
    if runs and weights:
        raise ValueError(
            "expected an aligned model that can be run, got weights alone "
            f"({type(model_aligned).__name__}); pass a loaded model, a folder or a name on the Hub"
        )
    if weights or (isinstance(model_aligned, str | Path) and not runs):
        return weights_from(model_aligned, base=base)
    return ModelView(model_aligned, like=base if isinstance(base, ModelView) else None)


def _found(source: str | Path, revision: str | None, subfolder: str | None, token: str | None) -> Path:
    """A local path, or what the Hub has under that name."""
    if not isinstance(source, str | Path):
        raise ValueError(
            f"expected a path, a name on the Hub, a state dict or a WeightSource, got {type(source).__name__}; pass "
            "one of these, or a loaded model to analyze_pair itself"
        )
    path = local_or_hub(source)
    if path is None:
        return fetched(str(source), revision, subfolder, token)
    if revision is not None:
        raise ValueError(
            f"expected a name on the Hub for revision={revision!r}, got the local {str(source)!r}; leave revision out, "
            "or pass the directory of that revision"
        )
    if subfolder is not None and not (path / subfolder).is_dir():
        raise ValueError(f"expected a folder {subfolder!r} in {str(source)!r}, got none; pass one that is there")
    return path if subfolder is None else path / subfolder


def _is_tuned(files: TensorFiles) -> bool:
    return any(_FACTORS in key for key in files)


def _adapter(name: str, folder: Path, files: TensorFiles, base: Any) -> WeightSource:
    path = folder / _ADAPTER
    if not path.is_file():
        raise ValueError(
            f"expected {_ADAPTER} beside the factors in {name!r}, got none (their scale α/r is not in the tensors); "
            "put it there, or pass the merged model (merge_and_unload, save_pretrained)"
        )
    adapter = read_adapter_config(path)
    config = config_of(base)
    if config is None:
        config = config_beside(adapter.get("base_model_name_or_path"), name, folder, base)
    weights = None if base is None or is_config(base) else as_weights(base)
    alike = not predicts_masked_tokens(config) and skeleton_of(config, name).has_like_layers
    if not alike and isinstance(weights, ModelView) and weights.kind == PLAIN:
        return adapted(name, folder, str(adapter.get("peft_type")), weights.model)
    return AdapterWeights(name, adapter, files, config, weights)


def _state(name: str, tensors: Mapping[str, Tensor], size: int, config: Mapping[str, Any], base: Any) -> StateWeights:
    if not any(MARK.fullmatch(key) for key in tensors):
        raise ValueError(
            "expected TransformerLens's parameter names (blocks.0.attn.W_Q, …), got others; pass a HookedTransformer's "
            "state_dict(), or a directory"
        )
    view = None if base is None or is_config(base) else as_weights(base)
    return StateWeights(name, tensors, size, config, view)


def _told(folder: Path) -> dict[str, Any]:
    """The TransformerLens configuration beside a state dict, or nothing."""
    path = folder / "tl_config.json"
    return read_json(path) if path.is_file() else {}
