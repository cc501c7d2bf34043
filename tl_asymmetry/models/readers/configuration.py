"""Configurations in files: held against the tensors beside them before anything is built by them."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tl_asymmetry.models.readers.base import Weights, WeightSource, as_weights
from tl_asymmetry.models.readers.files import in_short, read_json
from tl_asymmetry.models.readers.hub import local_or_hub
from tl_asymmetry.models.view import ModelView

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = (
    *_LAYERS, "hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "n_head", "n_heads", "num_heads",
)  # fmt: skip
_SIZES_OR_NOTHING = (
    "num_key_value_heads", "head_dim", "intermediate_size", "ffn_dim", "n_inner", "n_positions",
    "max_position_embeddings", "num_local_experts", "num_experts",
)  # fmt: skip
_MOST, _MOST_LAYERS = 2**31, 2**12
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def read_config(folder: Path, names: Iterable[str] = ()) -> Any:
    """The transformers configuration in a folder.

    Args:
        folder: where config.json is.
        names: of the tensors beside it, which tell how many layers there are.

    Raises:
        ValueError: none there, sizes that cannot be, more layers than the tensors have, or a model that transformers
            does not know; naming the file.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json"
    document = read_json(path)
    _check_sizes(document, path, layers_of(names))
    if document.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"expected a model_type that transformers {transformers.__version__} knows in {str(path)!r}, got "
            f"{str(document.get('model_type'))[:80]!r} (code that comes with a checkpoint is not run); pass a loaded "
            "model, or one of a known type"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a configuration's own code, and classes that vary by version
        raise ValueError(
            f"expected a model configuration that transformers can read in {str(path)!r}, got {in_short(error)}; pass "
            "a folder written by save_pretrained"
        ) from error


def layers_of(names: Iterable[str]) -> int | None:
    """How many layers tensors have by their names; None where they name none."""
    return max((int(found[1]) + 1 for name in names if (found := _LAYER.search(name))), default=None)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """An adapter_config.json whose numbers and patterns are of the kinds that PEFT writes.

    Raises:
        ValueError: they are not, naming the file.
    """
    adapter = read_json(path)
    for key in ("r", "lora_alpha"):
        value = adapter.get(key)
        if value is not None and not (_is_size(value) if key == "r" else _is_number(value)):
            raise _unlike(path, key, "a number" if key == "lora_alpha" else "a whole number", value)
    for key, kind in (("rank_pattern", "ranks"), ("alpha_pattern", "numbers")):
        patterns = adapter.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise _unlike(path, key, f"{kind} by pattern", patterns)
        for pattern, value in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise _unlike(path, key, f"{kind} by regular expressions", f"{pattern!r} ({error})") from error
            if not (_is_number(value) or isinstance(value, list)):
                raise _unlike(path, key, f"{kind} by pattern", f"{value!r} for {pattern!r}")
    for key, kinds, words in (
        ("peft_type", str, "a name"), ("base_model_name_or_path", str, "a name"), ("modules_to_save", list, "names"),
    ):  # fmt: skip
        if adapter.get(key) is not None and not isinstance(adapter[key], kinds):
            raise _unlike(path, key, words, adapter[key])
    return adapter


def is_config(base: Any) -> bool:
    """Whether it is a transformers configuration."""
    return hasattr(base, "model_type") and hasattr(base, "to_dict")


def config_of(base: Any) -> Any:
    """The transformers configuration of a base, or None where it has none of its own (a HookedTransformer)."""
    if is_config(base):
        return base
    if isinstance(base, WeightSource):
        return base.config
    model = base.model if isinstance(base, ModelView) else base
    config = getattr(getattr(model, "original_model", model), "config", None)
    return config if is_config(config) else None


def config_beside(trained_from: str | None, name: str, folder: Path, base: Any) -> Any:
    """The configuration of an adapter's base, where the base given has none.

    With a base given nothing is fetched: the folder that the adapter names counts, if it is there, else a configuration
    made of the base's own sizes.

    Args:
        trained_from: what the adapter says it was trained from; a relative path is one from the adapter's folder.
        name: the adapter's.
        folder: where it is.
        base: the base that was given, or None.

    Raises:
        ValueError: none can be found or made.
    """
    for place in (folder / trained_from, Path(trained_from)) if trained_from else ():
        if (place / "config.json").is_file():
            return read_config(place)
    if base is not None:
        return config_like(as_weights(base))
    if not trained_from:
        raise ValueError(
            f"expected a base for the adapter {name!r}, got none, given or named by it; pass weights_from(adapter, "
            "base=...), a model or a transformers configuration"
        )
    from transformers import AutoConfig

    try:
        if local_or_hub(trained_from) is None:
            warnings.warn(
                f"fetching the configuration of {trained_from!r}, the base that the adapter {name!r} names, from the "
                "Hub or its cache; with base= nothing is fetched",
                stacklevel=2,
            )
        return AutoConfig.from_pretrained(trained_from, trust_remote_code=False)
    except Exception as error:  # the Hub's client, a configuration's own code
        raise ValueError(
            f"expected the adapter's base {trained_from!r} to be found for its configuration, got {in_short(error)}; "
            "pass weights_from(adapter, base=...), a model or a transformers configuration"
        ) from error


def config_like(base: Weights) -> Any:
    """A transformers configuration with the sizes of a model that has none, by the architecture it was made from.

    Raises:
        ValueError: an architecture that transformers does not know.
    """
    import transformers

    cfg = getattr(base.model, "cfg", None) if isinstance(base, ModelView) else None
    architecture = str(getattr(cfg, "original_architecture", None))
    kind = getattr(getattr(transformers, architecture, None), "config_class", None)
    if kind is None:
        raise ValueError(
            f"expected a base that says which transformers architecture it has, got {base.name!r} with "
            f"{architecture}; pass weights_from(adapter, base=...) with a transformers configuration"
        )
    sizes = {
        "hidden_size": base.d_model, "num_hidden_layers": base.n_layers, "num_attention_heads": base.n_heads,
        "num_key_value_heads": base.n_kv_heads, "head_dim": base.d_head, "intermediate_size": base.d_mlp,
        "n_inner": base.d_mlp, "vocab_size": base.d_vocab, "max_position_embeddings": base.n_ctx,
        "use_parallel_residual": base.parallel, "num_local_experts": getattr(cfg, "num_experts", None),
        "tie_word_embeddings": base.tied,
    }  # fmt: skip
    known = kind()
    words = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}  # those of the architecture may be out of range
    return kind(**{name: size for name, size in sizes.items() if size is not None and hasattr(known, name)}, **words)


def _check_sizes(document: Mapping[str, Any], path: Path, layers: int | None) -> None:
    inner = isinstance(document.get("text_config"), Mapping)
    for key, value in _entries(document):
        required = key in _SIZES and not inner
        if key not in (*_SIZES, *_SIZES_OR_NOTHING) or (value is None and not required):
            continue
        several = value if isinstance(value, list) else [value]  # one for each layer
        if not all(_is_size(size) for size in several) or (key in _SIZES and value == 0):
            raise _unlike(path, key, f"a whole number from 1 to {_MOST}", value)
    text = document.get("text_config")
    stated = next((d[key] for d in (text, document) if isinstance(d, Mapping) for key in _LAYERS if key in d), None)
    if stated is None or isinstance(stated, list):
        return
    if layers is not None and stated > layers:
        raise ValueError(
            f"expected as many layers as the tensors beside it have ({layers}) in {str(path)!r}, got {stated}; pass "
            "the configuration that belongs to these weights"
        )
    if stated > _MOST_LAYERS:
        raise _unlike(path, "the number of layers", f"at most {_MOST_LAYERS}", stated)


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a configuration and of those inside it."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        else:
            yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return _is_number(value) and value == int(value) and 0 <= value < _MOST


def _unlike(path: Path, key: str, expected: str, got: Any) -> ValueError:
    shown = got if isinstance(got, str) else repr(got)
    return ValueError(
        f"expected {key} to be {expected} in {str(path)!r}, got {shown[:80]}; pass the configuration that belongs to "
        "these weights"
    )
