"""All that imports TransformerLens: opening models with raw weights, on every supported version of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tl_asymmetry.models.readers.hub import at_home, local_or_hub

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
_ANSWERS_OF_TRANSFORMER_LENS = (
    OSError, ValueError, KeyError, NotImplementedError, AttributeError, RuntimeError, TypeError, ImportError,
)  # fmt: skip


class NotWrappedError(ValueError):
    """TransformerLens cannot wrap a model."""


def open_model(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """A TransformerBridge with raw weights, from a local Hugging Face directory or a name on the Hub.

    Args:
        name_or_path: a directory with config.json and weights, or a name such as "EleutherAI/pythia-160m".
        dtype: of the weights.
        device: where to put it; CUDA if there is one, else the CPU.
        tokenizer: of a directory without one; there None leaves the model without, and only tokens can be read.
        trust_remote_code: run the Python files that its configuration names; without this they are never read, nor is
            anyone asked whether they may be.

    Raises:
        ValueError: no such directory, a directory that holds no model, a name that cannot be loaded; a multimodal model
            where torchvision is missing.

    Example:
        >>> from tl_asymmetry.demo import demo_gpt2
        >>> demo_gpt2("base").save_pretrained("checkpoint")
        >>> open_model("checkpoint").cfg.n_layers
        4
    """
    path = local_or_hub(name_or_path)
    name_or_path = at_home(name_or_path)
    if path is not None and not (path / "config.json").is_file():
        raise ValueError(
            f"expected a Hugging Face model directory with config.json, got {str(path)!r}; pass a directory "
            "written by save_pretrained, or a name on the Hub"
        )
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _loading(str(name_or_path)):
        config = AutoConfig.from_pretrained(str(name_or_path), trust_remote_code=trust_remote_code)
    _refuse_to_install(config, str(name_or_path))
    if not trust_remote_code:
        _refuse_remote_code(config, str(name_or_path))
    if path is not None and not any((path / file).is_file() for file in _TOKENIZER_FILES):
        return _without_tokenizer(path, dtype, device, tokenizer, trust_remote_code=trust_remote_code)
    with _loading(str(name_or_path)):
        return TransformerBridge.boot_transformers(
            str(name_or_path), device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )


def _without_tokenizer(
    path: Path, dtype: torch.dtype, device: str | torch.device, tokenizer: Any, *, trust_remote_code: bool
) -> Any:
    """A model from a directory that a training wrote without a tokenizer."""
    from transformers import AutoModelForCausalLM

    with _loading(str(path)):
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    bridge = bridge_around(model.to(device), str(path), device=device, dtype=dtype)
    bridge.tokenizer = tokenizer
    return bridge


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"expected a causal language model that TransformerLens can load, got {name!r}: {error}; pass a directory "
            "written by save_pretrained, or the name of a supported model"
        ) from error


def transformers_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """A model of transformers as it is, in evaluation mode: of an architecture that TransformerLens need not know.

    Args:
        name_or_path: a local directory, or a name on the Hub.
        dtype: of the weights; "auto" for the one they are stored in.
        device: where to put it.
        trust_remote_code: as `open_model`.

    Raises:
        ValueError: a directory that holds no language model, or a name that cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    name = str(at_home(name_or_path))
    with _loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if not trust_remote_code:
        _refuse_remote_code(config, name)
    masked = predicts_masked_tokens(config)
    with _loading(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = (AutoModelForMaskedLM if masked else AutoModelForCausalLM).from_pretrained(
            name, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
        return model.to(device).eval()


def predicts_masked_tokens(config: Any) -> bool:
    """Whether a configuration is that of an encoder with a masked-language-model head."""
    kinds = getattr(config, "architectures", None) or ()
    return any(kind.endswith(("ForMaskedLM", "ForPreTraining")) for kind in kinds)


def bridge_around(
    hf_model: Any,
    name: str,
    *,
    tokenizer: Any = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A TransformerBridge around a transformers model, which is wrapped in place; nothing is looked up anywhere.

    Args:
        hf_model: the model, with attn_implementation="eager".
        name: what to call it.
        tokenizer: of the texts; a stand-in of one word where there is none.
        device: where the model is.
        dtype: of its weights.

    Raises:
        NotWrappedError: an architecture that TransformerLens does not know.
        ValueError: a multimodal model where torchvision is missing.
    """
    from transformer_lens.model_bridge import TransformerBridge

    _refuse_to_install(hf_model.config, name)
    if not hf_model.config.architectures:  # only saving writes it, and TransformerLens knows a model by nothing else
        hf_model.config.architectures = [type(hf_model).__name__]
    tokenizer = stand_in_tokenizer() if tokenizer is None else tokenizer
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # split projections draw weights
        try:
            return TransformerBridge.boot_transformers(
                name, hf_model=hf_model, tokenizer=tokenizer, device=str(device), dtype=dtype
            )
        except _ANSWERS_OF_TRANSFORMER_LENS as error:
            raise NotWrappedError(
                f"expected an architecture that TransformerLens knows, got {type(hf_model).__name__}: {error}; pass a "
                "model of a supported one"
            ) from error


def native_bridge(settings: Mapping[str, Any]) -> Any:
    """An untrained TransformerBridge of TransformerLens's own architecture, by fields of its configuration."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    native: Any = TransformerBridge  # gets `boot_native` only when its package is imported
    with torch.random.fork_rng(devices=[]):  # its constructor draws weights
        return native.boot_native(TransformerBridgeConfig(**settings, architecture="TransformerLensNative"))


def has_hooked_transformer() -> bool:
    """Whether the installed TransformerLens has HookedTransformer (3.x).

    Raises:
        ImportError: TransformerLens itself cannot be imported.
    """
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:  # "removed in 4.0" and "cannot be imported" arrive alike
        import transformer_lens  # noqa: F401

        return False
    return True


def hooked_transformer(settings: Mapping[str, Any], tokenizer: Any = None) -> Any:
    """An untrained HookedTransformer by fields of its configuration.

    Raises:
        ImportError: TransformerLens 4 and later have none.
    """
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # its constructor draws weights
        # The notice that HookedTransformer goes away is for those who write its name.
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        return HookedTransformer(HookedTransformerConfig(**settings), tokenizer=tokenizer)


def stand_in_tokenizer() -> Any:
    """A tokenizer of one word, that TransformerLens accepts without asking the Hub for another."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="a", eos_token="a", unk_token="a", pad_token="a"
    )
    tokenizer.init_kwargs |= {"add_bos_token": True, "name_or_path": ""}
    return tokenizer


def _refuse_remote_code(config: Any, name: str) -> None:
    """Refuse a model that only code of its own could build: transformers would ask on standard input whether to run it.

    Raises:
        ValueError: naming the code.
    """
    from transformers import AutoModelForCausalLM

    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own is not None and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"expected an architecture that transformers itself knows, got {name!r}, which brings code of its own "
            f"({own}); pass open_model(…, trust_remote_code=True) if you have read that code and trust it"
        )


def _refuse_to_install(config: Any, name: str) -> None:
    """Refuse what would make TransformerLens install torchvision by itself, which may replace torch while it runs."""
    if config.get_text_config() is config:
        return
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a build for another torch fails in its own ways
        raise ValueError(
            f"expected torchvision for the multimodal model {name!r}, got {type(error).__name__}: {error}; install the "
            f"one made for torch {torch.__version__} (pip install torchvision, with the same index as torch) and start "
            "Python again, or pass the model's text part (AutoModelForCausalLM.from_config of get_text_config())"
        ) from error
