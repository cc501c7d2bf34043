"""Weights from wherever they are: a directory, shards, an adapter, a state dict; streamed, never a second model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_asymmetry.models.readers.adapter import LoraWeights
from tl_asymmetry.models.readers.base import Factors, Weights, WeightSource, as_weights
from tl_asymmetry.models.readers.files import ADAPTER_FILES, TensorFiles, open_files, read_json
from tl_asymmetry.models.readers.folder import HuggingFaceWeights, read_config
from tl_asymmetry.models.readers.hub import local_or_hub
from tl_asymmetry.models.readers.state_dict import MARK, StateWeights
from tl_asymmetry.models.view import ModelView

__all__ = ["Factors", "WeightSource", "Weights", "as_weights", "opened", "weights_from"]

_ADAPTER = "adapter_config.json"
_DOWNLOADED = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]


def weights_from(
    source: str | Path | Mapping[str, Tensor] | WeightSource, *, base: Any = None, revision: str | None = None
) -> WeightSource:
    """Open weights in TransformerLens orientation without building a model; tensors are read one at a time.

    Reads a Hugging Face directory or hub name (one file or shards), a `.safetensors` file with its config.json beside
    it, a PEFT LoRA adapter, and TransformerLens state dicts (a file, with a tl_config.json beside it or a base; or a
    mapping). How an architecture lays out its matrices is asked of TransformerLens itself, so what is read here is
    what a loaded model would show. Names and shapes are checked on opening, from the files' headers.

    Args:
        source: where the weights are; a `WeightSource` is given back as it is.
        base: the model they are to be compared with: a HookedTransformer, TransformerBridge, `ModelView`, another
            source or its path, or a transformers configuration. An adapter needs it where its
            base_model_name_or_path cannot be found.
        revision: branch, tag or commit of a hub name.

    Raises:
        ValueError: no source at all, a revision of something local, nothing there, files that are damaged, tensors that
            do not fit the architecture, adapters whose change is not scale · B A (DoRA and others): saying which and
            what to pass instead.

    Example:
        >>> from tl_asymmetry.demo import demo_gpt2
        >>> demo_gpt2("dpo").save_pretrained("checkpoint")
        >>> weights = weights_from("checkpoint")
        >>> tuple(weights.weight(0, "W_Q").shape), tuple(weights.delta(0, "W_O", model).shape)
        ((4, 64, 16), (4, 16, 64))
    """
    if isinstance(source, WeightSource):
        return source
    if isinstance(base, str | Path):
        base = weights_from(base)
    if isinstance(source, Mapping):
        return _state("state dict", source, 0, {}, base)
    path = _found(source, revision)
    name = str(source)
    if path.is_dir():
        if (path / _ADAPTER).is_file():
            return _adapter(name, path, open_files(path, ADAPTER_FILES), base)
        if (path / "config.json").is_file():
            return HuggingFaceWeights(name, read_config(path), open_files(path), path)
        if not any(path.glob("*.safetensors")):
            raise ValueError(
                f"expected a Hugging Face model directory with config.json, got {name!r}; pass a directory written by "
                "save_pretrained, an adapter's, or a name on the Hub"
            )
    files, folder = open_files(path), path if path.is_dir() else path.parent
    if any(MARK.fullmatch(key) for key in files):
        return _state(name, files, files.bytes, _told(folder), base)
    if any(".lora_A" in key for key in files) and (folder / _ADAPTER).is_file():
        return _adapter(name, folder, files, base)
    if (folder / "config.json").is_file():
        return HuggingFaceWeights(name, read_config(folder), files, folder)
    config = _config_of(base)
    if config is None:
        raise ValueError(
            f"expected config.json (or adapter_config.json) beside {name!r}, got none; pass the directory that "
            "save_pretrained wrote, or base="
        )
    return HuggingFaceWeights(name, config, files, None)


def opened(model_aligned: Any, base: ModelView, *, runs: bool) -> Weights:
    """The aligned model: a view of a loaded one, or a source that reads it tensor by tensor."""
    if not isinstance(model_aligned, str | Path | Mapping | WeightSource):
        return ModelView(model_aligned)
    if runs:
        raise ValueError(
            'expected a loaded aligned model where its activations are wanted (activations="aligned" or "both", '
            f"sensitivity=True), got weights ({type(model_aligned).__name__}); pass "
            "TransformerBridge.boot_transformers(name_or_directory)"
        )
    return weights_from(model_aligned, base=base)


def _found(source: str | Path, revision: str | None) -> Path:
    """A local path, or what the Hub has under that name."""
    if not isinstance(source, str | Path):
        raise ValueError(
            f"expected a path, a name on the Hub, a state dict or a WeightSource, got {type(source).__name__}; pass "
            "one of these, or a loaded model to analyze_pair itself"
        )
    path = local_or_hub(source)
    if path is not None:
        if revision is not None:
            raise ValueError(
                f"expected a name on the Hub for revision={revision!r}, got the local {str(source)!r}; leave revision "
                "out, or pass the directory of that revision"
            )
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_DOWNLOADED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"expected a local path or a name that the Hub knows, got {source!r}: {error}; pass a local directory, or "
            "check the name and the network"
        ) from error


def _adapter(name: str, folder: Path, files: TensorFiles, base: Any) -> LoraWeights:
    adapter = read_json(folder / _ADAPTER)
    config = _config_of(base)
    trained_from = adapter.get("base_model_name_or_path")
    if config is None and trained_from:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(trained_from)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"expected the adapter's base {trained_from!r} to be found for its configuration, got {error}; pass "
                "base= (a model, or a transformers configuration)"
            ) from error
    if config is None:
        raise ValueError(f"expected a base for the adapter {name!r}, which names none; pass base=")
    weights = None if base is None or _is_config(base) else as_weights(base)
    return LoraWeights(name, adapter, files, config, weights)


def _state(name: str, tensors: Mapping[str, Tensor], size: int, config: Mapping[str, Any], base: Any) -> StateWeights:
    if not any(MARK.fullmatch(key) for key in tensors):
        raise ValueError(
            "expected TransformerLens's parameter names (blocks.0.attn.W_Q, …), got others; pass a HookedTransformer's "
            "state_dict(), or a directory"
        )
    view = None if base is None or _is_config(base) else as_weights(base)
    return StateWeights(name, tensors, size, config, view)


def _told(folder: Path) -> dict[str, Any]:
    """The TransformerLens configuration beside a state dict, or nothing."""
    path = folder / "tl_config.json"
    return read_json(path) if path.is_file() else {}


def _is_config(base: Any) -> bool:
    return hasattr(base, "model_type") and hasattr(base, "to_dict")


def _config_of(base: Any) -> Any:
    """The transformers configuration of a base, if it has one (a HookedTransformer has none)."""
    if _is_config(base):
        return base
    if isinstance(base, HuggingFaceWeights):
        return base.config
    model = base.model if isinstance(base, ModelView) else base
    return getattr(getattr(model, "original_model", None), "config", None)
