"""Tiny models with random weights for the tests: every architecture family, both kinds of wrapper.

Norm gains and biases are random as well, so that no test passes only because a gain is one or a bias is zero.
Everything is built from a seed and lives in a temporary directory of the test process; nothing touches the
network.
"""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

D_MODEL, N_HEADS, N_KV_HEADS, D_HEAD, D_MLP, N_LAYERS, D_VOCAB, N_CTX = 48, 4, 2, 12, 96, 2, 96, 64


def _hooked_available() -> bool:
    # transformer-lens 4 raises ImportError on the name itself, also inside hasattr
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        return False
    return True


HOOKED_AVAILABLE = _hooked_available()
"""True where transformer-lens still has HookedTransformer (3.x)."""

KINDS: tuple[str, ...] = ("hooked", "bridge") if HOOKED_AVAILABLE else ("bridge",)
"""The kinds of model that this environment can build."""


# --- Hugging Face models --------------------------------------------------------------------------

_LLAMA_SHAPE: dict[str, Any] = dict(
    hidden_size=D_MODEL,
    intermediate_size=D_MLP,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=N_HEADS,
    num_key_value_heads=N_KV_HEADS,
    vocab_size=D_VOCAB,
    max_position_embeddings=N_CTX,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_CTX, vocab_size=D_VOCAB, n_inner=None,
        n_ctx=N_CTX, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _neox() -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS,
        vocab_size=D_VOCAB, max_position_embeddings=N_CTX, rotary_pct=0.5, use_parallel_residual=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_LLAMA_SHAPE)


def _mistral() -> Any:
    from transformers import MistralConfig

    return MistralConfig(**_LLAMA_SHAPE, head_dim=D_HEAD, sliding_window=None)


def _mixtral() -> Any:
    from transformers import MixtralConfig

    shape = _LLAMA_SHAPE | dict(intermediate_size=40)
    return MixtralConfig(**shape, num_local_experts=3, num_experts_per_tok=2, sliding_window=None)


def _qwen2() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**_LLAMA_SHAPE)


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_LLAMA_SHAPE, head_dim=16)


def _gemma1() -> Any:
    from transformers import GemmaConfig

    shape = _LLAMA_SHAPE | dict(num_key_value_heads=1, tie_word_embeddings=True)
    return GemmaConfig(**shape, head_dim=16)


def _gemma2() -> Any:
    from transformers import Gemma2Config

    shape = _LLAMA_SHAPE | dict(tie_word_embeddings=True)
    return Gemma2Config(**shape, head_dim=16, query_pre_attn_scalar=16, sliding_window=32)


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    shape = _LLAMA_SHAPE | dict(tie_word_embeddings=True)
    return Gemma3TextConfig(
        **shape, head_dim=16, query_pre_attn_scalar=16, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def _phi() -> Any:
    from transformers import PhiConfig

    shape = {k: v for k, v in _LLAMA_SHAPE.items() if k not in ("num_key_value_heads", "rms_norm_eps")}
    return PhiConfig(**shape, partial_rotary_factor=0.5)


def _gptj() -> Any:
    from transformers import GPTJConfig

    return GPTJConfig(
        n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=N_CTX, vocab_size=D_VOCAB, n_inner=None,
        rotary_dim=6, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip


def _neox_sequential() -> Any:
    config = _neox()
    config.use_parallel_residual = False
    return config


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "neox": _neox,
    "neox_sequential": _neox_sequential,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma1": _gemma1,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi": _phi,
    "gptj": _gptj,
    "mixtral": _mixtral,
}
ARCHITECTURES: tuple[str, ...] = tuple(CONFIGS)
"""Names of the architecture families, the first argument of `hf_directory`, `bridge`, `hooked` and
`build`."""


def randomize_(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter random values: norm gains scatter about their neutral value, biases about zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim >= 2:
                # columns of unit length or so whatever the orientation; embeddings a little larger
                scale = 0.7 if any(e in name for e in ("emb", "wte", "wpe")) else 1.2 / parameter.shape[-1] ** 0.5
                value = scale * noise
            elif bool((parameter == 1).all()):
                value = 1 + 0.25 * noise
            else:
                value = 0.25 * noise
            parameter.copy_(value.to(parameter.dtype))


@functools.cache
def _temporary_directory() -> Path:
    # a name of our own: TransformerLens guesses the architecture from "llama" or "gemma" in a path
    path = Path(tempfile.mkdtemp(prefix="tiny_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


WORDS: tuple[str, ...] = ("<s>", "</s>", "<unk>") + tuple(f"w{i}" for i in range(D_VOCAB - 3))
"""Vocabulary of `tokenizer()`: ids 0, 1, 2 are begin, end (and padding), unknown; `w0` is id 3."""


def tokenizer(
    words: tuple[str, ...] = WORDS, *, bos: bool = True, chat_template: str | None = None, name: str = "words"
) -> Any:
    """A word-level Hugging Face tokenizer, saved once to a directory and read back as a user would."""
    digest = hashlib.sha256(repr((words, bos, chat_template)).encode()).hexdigest()[:12]
    directory = _temporary_directory() / f"tokenizer_{name}_{digest}"
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not directory.exists():
        inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = WhitespaceSplit()
        special = {"bos_token": "<s>"} if bos else {}
        outer = PreTrainedTokenizerFast(
            tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="<unk>", **special
        )
        if chat_template is not None:
            outer.chat_template = chat_template
        outer.save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@functools.cache
def hf_directory(architecture: str, seed: int = 0, delta: float = 0.0) -> Path:
    """A Hugging Face model directory (float32 safetensors, config, tokenizer) with random weights.

    `delta` adds noise of that relative size to every parameter: `delta=0.01` is an aligned model for `delta=0`, the
    same one whichever way it is loaded (`perturbed` gives the two kinds different noise).
    """
    from transformers import AutoModelForCausalLM

    directory = _temporary_directory() / f"m{ARCHITECTURES.index(architecture):02d}_{seed}_{delta}"
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(CONFIGS[architecture](), attn_implementation="eager")
    randomize_(model, seed)
    perturb_(model, delta, seed + 1)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def bridge(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, delta: float = 0.0) -> Any:
    """A fresh TransformerBridge of that architecture, raw weights: a copy of one that is booted once."""
    if architecture == "gpt2":  # its copy would no longer have its split attention among its original modules
        return _booted(architecture, dtype, seed, delta)
    return copy.deepcopy(_bridge(architecture, dtype, seed, delta))


def _booted(architecture: str, dtype: torch.dtype, seed: int, delta: float) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    directory, hf_model = hf_directory(architecture, seed, delta), copy.deepcopy(_hf(architecture, dtype, seed, delta))
    return TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=dtype, hf_model=hf_model)


_bridge = functools.cache(_booted)


@functools.cache
def _hf(architecture: str, dtype: torch.dtype, seed: int, delta: float) -> Any:
    """As `boot_transformers` opens it by itself; to be copied."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "attn_implementation": "eager", "output_attentions": True}
    if architecture == "mixtral" and dtype == torch.float64:
        options["experts_implementation"] = "eager"  # the default kernel for experts knows no float64
    return AutoModelForCausalLM.from_pretrained(hf_directory(architecture, seed, delta), **options)


def hooked(
    architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, delta: float = 0.0, **processing: bool
) -> Any:
    """A fresh HookedTransformer of that architecture with the same weights as `bridge`: a copy of one made once.

    `processing` switches on flags of `load_and_process_state_dict` (`fold_ln=True`, ...); all are off by
    default.
    """
    return copy.deepcopy(_hooked(architecture, dtype, seed, delta, **processing))


@functools.cache
def _hooked(architecture: str, dtype: torch.dtype, seed: int, delta: float, **processing: bool) -> Any:
    from transformer_lens import HookedTransformer

    cfg, state = _hooked_state(architecture, dtype, seed, delta)
    model = HookedTransformer(copy.deepcopy(cfg), tokenizer=tokenizer(), move_to_device=False)
    model.load_and_process_state_dict(copy.deepcopy(state), **dict.fromkeys(PROCESSING_FLAGS, False) | processing)
    return model.to(dtype)


@functools.cache
def _hooked_state(architecture: str, dtype: torch.dtype, seed: int, delta: float) -> tuple[Any, dict[str, Any]]:
    from transformer_lens import loading_from_pretrained
    from transformers import AutoModelForCausalLM

    directory = str(hf_directory(architecture, seed, delta))
    if architecture in ("phi", "gemma1", "gemma2", "gemma3"):
        # TransformerLens reads no local configuration of these
        cfg = _hooked_config(architecture, dtype)
    else:
        cfg = loading_from_pretrained.get_pretrained_model_config(directory, device="cpu", dtype=dtype)
    cfg.n_ctx = N_CTX  # TransformerLens reads 2048 for some whatever the directory says
    hf_model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    state = loading_from_pretrained.get_pretrained_state_dict(directory, cfg, hf_model, dtype=dtype)
    return cfg, {name: tensor.detach() for name, tensor in state.items()}


def _hooked_config(architecture: str, dtype: torch.dtype) -> Any:
    from transformer_lens import HookedTransformerConfig

    config = CONFIGS[architecture]()
    gemma = architecture.startswith("gemma")
    shape: dict[str, Any] = dict(
        n_layers=N_LAYERS, d_model=D_MODEL, n_ctx=N_CTX, n_heads=N_HEADS, d_mlp=D_MLP, d_vocab=D_VOCAB,
        d_head=16 if gemma else D_HEAD, device="cpu", dtype=dtype, positional_embedding_type="rotary",
        original_architecture=config.architectures[0] if config.architectures else None, model_name=architecture,
        act_fn=config.hidden_act if not gemma else "gelu_pytorch_tanh",
    )  # fmt: skip
    if architecture == "phi":
        shape |= dict(
            normalization_type="LN", eps=config.layer_norm_eps, rotary_dim=D_HEAD // 2, parallel_attn_mlp=True,
            original_architecture="PhiForCausalLM",
        )  # fmt: skip
    else:
        shape |= dict(
            normalization_type="RMS", eps=1e-6, n_key_value_heads=config.num_key_value_heads, gated_mlp=True,
            final_rms=True, rotary_dim=16, original_architecture=f"{type(config).__name__[:-6]}ForCausalLM",
        )  # fmt: skip
    if architecture in ("gemma2", "gemma3"):
        shape |= dict(
            use_normalization_before_and_after=True, window_size=32, use_local_attn=True,
            attn_types=["local", "global"],
        )  # fmt: skip
    if architecture == "gemma2":
        shape |= dict(attn_scores_soft_cap=50.0, output_logits_soft_cap=30.0)
    if architecture == "gemma3":
        shape |= dict(
            use_qk_norm=True, rotary_base=1_000_000, rotary_base_local=10_000,
            original_architecture="Gemma3ForCausalLM",
        )  # fmt: skip
    return HookedTransformerConfig(**shape)


PROCESSING_FLAGS: tuple[str, ...] = (
    "fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices",
)  # fmt: skip


def build(architecture: str, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, delta: float = 0.0) -> Any:
    """`hooked` or `bridge` by name, for parametrised tests."""
    return {"hooked": hooked, "bridge": bridge}[kind](architecture, dtype, seed, delta)


# --- toys of a TransformerLens configuration ------------------------------------------------------

TOYS: dict[str, dict[str, Any]] = {
    "plain": dict(normalization_type="LN", positional_embedding_type="standard", act_fn="gelu"),
    "rms_rotary_gated_gqa": dict(
        normalization_type="RMS", positional_embedding_type="rotary", rotary_dim=D_HEAD, act_fn="silu",
        gated_mlp=True, final_rms=True, n_key_value_heads=N_KV_HEADS,
    ),
    "alibi": dict(normalization_type="LN", positional_embedding_type="alibi", act_fn="relu"),
    "parallel": dict(
        normalization_type="LN", positional_embedding_type="rotary", rotary_dim=6, act_fn="gelu",
        parallel_attn_mlp=True,
    ),
    "no_norm": dict(normalization_type=None, positional_embedding_type="standard", act_fn="relu"),
    "attn_only": dict(normalization_type="LN", positional_embedding_type="standard", attn_only=True),
}  # fmt: skip
"""Fields of HookedTransformerConfig and TransformerBridgeConfig, the first argument of `toy`."""

NATIVE_TOYS: tuple[str, ...] = ("plain", "rms_rotary_gated_gqa", "attn_only")
"""Those of `TOYS` that `TransformerBridge.boot_native` can build as well."""


def toy(
    name: str = "plain", kind: str = KINDS[0], dtype: torch.dtype = torch.float32, seed: int | None = 0, **over: Any
) -> Any:
    """A model built from a TransformerLens configuration, without Hugging Face; weights as in `randomize_`.

    Args:
        name: key of `TOYS`.
        kind: "hooked", or "bridge" for `TransformerBridge.boot_native`.
        dtype: of the weights.
        seed: of the weights; None leaves TransformerLens's own initial weights (gains one, biases zero).
        over: further configuration fields.
    """
    fields = dict(
        n_layers=N_LAYERS, d_model=D_MODEL, n_heads=N_HEADS, d_head=D_HEAD, d_mlp=D_MLP, n_ctx=N_CTX, d_vocab=D_VOCAB,
        dtype=dtype, device="cpu", seed=0,
    )  # fmt: skip
    fields |= TOYS[name] | over
    if fields.get("attn_only"):
        fields["d_mlp"] = None
    if kind == "hooked":
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        with torch.random.fork_rng():
            model = HookedTransformer(HookedTransformerConfig(**fields), move_to_device=False).to(dtype)
    else:
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge

        with torch.random.fork_rng():
            model = TransformerBridge.boot_native(TransformerBridgeConfig(**fields), dtype=dtype)
    if seed is not None:
        randomize_(model, seed)
    return model


def perturbed(model: Any, relative: float = 0.01, seed: int = 1, dtype: torch.dtype | None = None) -> Any:
    """A deep copy whose every parameter differs by independent noise of `relative` times its root mean square.

    Args:
        dtype: convert the copy to this type (after the noise is added); None keeps the model's.
    """
    for module in model.modules():
        if getattr(module, "_pattern", None) is not None:
            module._pattern = None  # the Bridge keeps its last pattern, with its graph: not copyable
    other = copy.deepcopy(model)
    perturb_(other, relative, seed)
    return other if dtype is None else other.to(dtype)


def perturb_(module: torch.nn.Module, relative: float, seed: int) -> None:
    """Add to every parameter independent noise of `relative` times its root mean square."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = relative * parameter.double().square().mean().sqrt()
            parameter.add_((scale * noise).to(parameter.dtype))


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`, special tokens left out."""
    return torch.randint(3, D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
