"""All that imports TransformerLens: opening models with raw weights, on every supported version of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from tl_asymmetry.models.readers.hub import at_home, fetched, local_or_hub
from tl_asymmetry.notes import warn

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
)  # fmt: skip
_ANSWERS_OF_TRANSFORMER_LENS = (
    OSError, ValueError, KeyError, NotImplementedError, AttributeError, RuntimeError, TypeError, ImportError,
)  # fmt: skip


_PROBE_TOKENS = 6


class NotWrappedError(ValueError):
    """TransformerLens cannot wrap a model."""


def open_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str = torch.float32,
    *,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """A model with raw weights, from a local Hugging Face directory or a name on the Hub.

    A TransformerBridge where TransformerLens knows the architecture and, on a few tokens, computes what transformers
    does; transformers' own model where not, with a warning where the two differ.

    Args:
        name_or_path: a directory with config.json and weights, or a name such as "EleutherAI/pythia-160m".
        dtype: of the weights; "auto" for the one they are stored in.
        device: where to put it; CUDA if there is one, else the CPU.
        tokenizer: of a directory without one; there None leaves the model without, and only tokens can be read.
        trust_remote_code: run the Python files that its configuration names; without this they are never read, nor is
            anyone asked whether they may be.

    Raises:
        ValueError: no such directory, a directory that holds no model or only a part of its weights, a name that cannot
            be loaded; a multimodal model where torchvision is missing.

    Example:
        >>> from tl_asymmetry.demo import demo_gpt2
        >>> demo_gpt2("base").save_pretrained("checkpoint")
        >>> open_model("checkpoint").cfg.n_layers
        4
    """
    model, notes = opened_model(
        name_or_path, dtype, device=device, tokenizer=tokenizer, trust_remote_code=trust_remote_code
    )
    for note in notes:
        warn(note)
    return model


def opened_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    at_least: torch.dtype | None = None,
    device: str | torch.device | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    wrap: bool = True,
) -> tuple[Any, tuple[str, ...]]:
    """What `open_model` opens, and what its reader must know.

    Args:
        name_or_path: as `open_model`.
        dtype: of the weights; "auto" for the one they are stored in.
        at_least: widen it to this one, where it is narrower.
        device, tokenizer, trust_remote_code: as `open_model`.
        wrap: False for transformers' own model in any case.
    """
    path = local_or_hub(name_or_path)
    name = str(at_home(name_or_path))
    if path is not None and not (path / "config.json").is_file():
        raise ValueError(
            f"expected a Hugging Face model directory with config.json, got {str(path)!r}; pass a directory "
            "written by save_pretrained, or a name on the Hub"
        )
    # Code of its own is fetched only where it may be run, and then by transformers.
    source = name if path is not None or trust_remote_code else str(fetched(name, None, None, None))
    config = _configuration(source, name, trust_remote_code=trust_remote_code)
    if wrap:
        _refuse_to_install(config, name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    own = None
    if path is None or has_tokenizer(path):
        own = _tokenizer(source, name, trust_remote_code=trust_remote_code)

    def loaded() -> Any:
        model = transformers_model(source, dtype, trust_remote_code=trust_remote_code)
        wide = model.dtype if at_least is None else torch.promote_types(model.dtype, at_least)
        if (wide, device) != (model.dtype, model.device):  # a quantised model refuses to be moved at all
            model = model.to(device, wide)
        model.name_or_path = name  # not the path of a cache
        return model

    def plain(model: Any) -> Any:
        model.tokenizer = tokenizer if own is None else own
        return model

    model = loaded()
    if not wrap:
        return plain(model), ()
    tokens = torch.arange(_PROBE_TOKENS, device=device).unsqueeze(0) * 37 % model.get_input_embeddings().weight.shape[0]
    expected = None  # of what is not run on tokens alone, which is refused where it is run
    with torch.no_grad(), suppress(*_ANSWERS_OF_TRANSFORMER_LENS):
        expected = model(input_ids=tokens)[0]  # logits, or the last stream where nothing is predicted
    try:
        bridge = bridge_around(model, name, tokenizer=own, device=device, dtype=model.dtype)
    except NotWrappedError:
        return plain(loaded()), ()  # wrapping may have got some way
    if own is None:  # no stand-in, and a given one as it is
        bridge.tokenizer = tokenizer
    difference = None if expected is None else _difference(bridge, tokens, expected)
    if difference is None:
        return bridge, ()
    del model, bridge
    return plain(loaded()), (f"{name!r} is read as transformers has it, since its TransformerBridge {difference}",)


def _difference(bridge: Any, tokens: torch.Tensor, expected: torch.Tensor) -> str | None:
    """How a TransformerBridge computes otherwise than the model did before it was wrapped; None where it does not."""
    tolerance = {torch.float64: 1e-8, torch.float32: 5e-3}.get(expected.dtype, 5e-2)
    try:
        with torch.no_grad():
            found = bridge(tokens, return_type="logits")
    except _ANSWERS_OF_TRANSFORMER_LENS as error:
        return f"does not run ({type(error).__name__}: {error})"
    apart = float((found - expected).abs().max() / expected.abs().max())
    if apart <= tolerance or not bool(expected.isfinite().all()):  # weights that are not finite are named elsewhere
        return None
    return f"computes other logits (up to {apart:.2g} of the largest apart, on {_PROBE_TOKENS} tokens)"


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"expected a language model that transformers can load, got {name!r}: {error}; pass a directory written by "
            "save_pretrained, or the name of a supported model"
        ) from error


def transformers_model(
    name_or_path: str | Path, dtype: torch.dtype | str = "auto", *, trust_remote_code: bool = False
) -> Any:
    """A model of transformers as it is, on the CPU, in evaluation mode, of an architecture that TransformerLens need
    not know; without its head where the files hold none, which transformers would draw at random.

    Args:
        name_or_path: a local directory, or a name on the Hub.
        dtype: of the weights; "auto" for the one they are stored in.
        trust_remote_code: as `open_model`.

    Raises:
        ValueError: a directory that holds no language model or only a part of its weights, or a name that cannot be
            loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    name = str(at_home(name_or_path))
    config = _configuration(name, name, trust_remote_code=trust_remote_code)
    kind = AutoModelForMaskedLM if predicts_masked_tokens(config) else AutoModelForCausalLM
    with _loading(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened: Any = kind.from_pretrained(
            name, dtype=dtype, attn_implementation="eager", trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )  # fmt: skip
    model, told = opened
    missing = sorted(told["missing_keys"])
    inside = [key for key in missing if key.startswith(f"{model.base_model_prefix}.")]
    if inside or (missing and model.base_model is model):
        raise ValueError(
            f"expected every parameter of {type(model).__name__} in {name!r}, got none for {len(missing)} of them, the "
            f"first being {[*inside, *missing][0]}; pass the weights that belong to this configuration"
        )
    return (model.base_model if missing else model).eval()


def _configuration(source: str, name: str, *, trust_remote_code: bool) -> Any:
    """A model's configuration; refused where only code of its own could build it and that is not trusted."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

    with _loading(name):
        told, _ = PretrainedConfig.get_config_dict(source)
    own = {} if trust_remote_code else told.get("auto_map") or {}
    if own and told.get("model_type") not in CONFIG_MAPPING:
        raise _brings_code(name, own.get("AutoModelForCausalLM") or next(iter(own.values())))
    with _loading(name):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    if "AutoModelForCausalLM" in own and type(config) not in AutoModelForCausalLM._model_mapping:
        raise _brings_code(name, own["AutoModelForCausalLM"])
    return config


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def _tokenizer(source: str, name: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer as TransformerLens sets it up, which puts its begin-of-sequence token first where it has one."""
    from transformers import AutoTokenizer

    with _loading(name):
        try:
            return AutoTokenizer.from_pretrained(source, add_bos_token=True, trust_remote_code=trust_remote_code)
        except ValueError:  # without such a token
            return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)


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


def _brings_code(name: str, own: str) -> ValueError:
    """What is said of a model that only code of its own could build: transformers would ask whether to run it."""
    return ValueError(
        f"expected an architecture that transformers itself knows, got {name!r}, which brings code of its own ({own}); "
        "pass tl_asymmetry.models.loading.open_model(…, trust_remote_code=True) if you have read that code and trust it"
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
