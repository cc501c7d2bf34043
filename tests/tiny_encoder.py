"""A tiny BERT or RoBERTa with random weights, as every kind of encoder; nothing touches the network."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from tests import tiny

ENCODER_KINDS: tuple[str, ...] = ("hooked", "bridge") if tiny.HOOKED_AVAILABLE else ("bridge", "roberta")
"""The kinds of encoder this environment can build: a HookedEncoder, a TransformerBridge of a BERT or of a RoBERTa."""

MASK_TOKEN = 3
_SPECIAL = ("<pad>", "[CLS]", "[SEP]", "[MASK]", "<unk>")


def _config(family: str) -> Any:
    import transformers

    return getattr(transformers, f"{family}Config")(
        vocab_size=tiny.D_VOCAB, hidden_size=tiny.D_MODEL, num_hidden_layers=tiny.N_LAYERS,
        num_attention_heads=tiny.N_HEADS, intermediate_size=tiny.D_MLP, max_position_embeddings=tiny.N_CTX,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip


@functools.cache
def encoder_directory(seed: int = 0, head: str = "BertForMaskedLM") -> Path:
    """A Hugging Face directory of a BERT or RoBERTa with that head, random weights, gains and biases."""
    import transformers

    directory = tiny._temporary_directory() / f"encoder_{head.lower()}_{seed}"
    with torch.random.fork_rng():
        model = getattr(transformers, head)(_config("Roberta" if head.startswith("Roberta") else "Bert"))
    tiny.randomize_(model, seed)
    model.save_pretrained(directory)
    return directory


def hf_encoder(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, *, head: str | None = None) -> Any:
    """The Hugging Face model that `encoder` of that kind is made of."""
    import transformers

    head = head or ("RobertaForMaskedLM" if kind == "roberta" else "BertForMaskedLM")
    directory = encoder_directory(seed, head)
    return getattr(transformers, head).from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def encoder(
    kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, *, head: str | None = None, tokenizer: bool = False
) -> Any:
    """A fresh encoder: "bridge" or "roberta" for a TransformerBridge, "hooked" for a HookedEncoder of the same BERT."""
    if kind == "hooked":
        return _hooked(encoder_directory(seed), dtype)
    from transformer_lens.model_bridge import TransformerBridge

    hf_model = hf_encoder(kind, dtype, seed, head=head)
    model = TransformerBridge.boot_transformers(
        hf_model.name_or_path, hf_model=hf_model, device="cpu", dtype=dtype,
        tokenizer=_tokenizer() if tokenizer else None,
    )  # fmt: skip
    if not tokenizer:
        model.tokenizer = None  # transformers makes up a tokenizer for a BERT that was saved without one
    return model.to(dtype)


def encoder_tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random sequences between [CLS] and [SEP]."""
    tokens = torch.randint(len(_SPECIAL), tiny.D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0], tokens[:, -1] = 1, 2
    return tokens


def _hooked(directory: Path, dtype: torch.dtype) -> Any:
    from transformer_lens import HookedEncoder, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_bert_weights
    from transformers import BertForMaskedLM, BertForPreTraining

    cfg = HookedTransformerConfig(
        n_layers=tiny.N_LAYERS, d_model=tiny.D_MODEL, n_heads=tiny.N_HEADS, d_head=tiny.D_HEAD, d_mlp=tiny.D_MLP,
        n_ctx=tiny.N_CTX, d_vocab=tiny.D_VOCAB, act_fn="gelu", normalization_type="LN",
        attention_dir="bidirectional", eps=1e-12, device="cpu", dtype=dtype, model_name="tiny-bert",
        original_architecture="BertForMaskedLM",
    )  # fmt: skip
    with torch.random.fork_rng():
        model = HookedEncoder(cfg)
        both_heads = BertForPreTraining(_config("Bert"))
    both_heads.load_state_dict(BertForMaskedLM.from_pretrained(directory).state_dict(), strict=False)
    model.load_state_dict(convert_bert_weights(both_heads, cfg), strict=False)
    return model.to(dtype).eval()


@functools.cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = tiny._temporary_directory() / "tokenizer_encoder"
    words = [*_SPECIAL, *(f"w{i}" for i in range(tiny.D_VOCAB - len(_SPECIAL)))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="<unk>",
    ).save_pretrained(directory)  # fmt: skip
    return AutoTokenizer.from_pretrained(directory)
