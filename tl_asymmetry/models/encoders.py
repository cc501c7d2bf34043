"""How to reach inside a BERT or RoBERTa, as a TransformerBridge or a HookedEncoder. Used by `ModelView` alone.

Their blocks are post-norm: `mid = ln1(x + attention(x))`, `out = ln2(mid + mlp(mid))`. So W_Q, W_K and W_V read the
stream itself, W_in reads what the first norm gives, and what a block hands on is what its second norm gives. A
`resid_mid` in the sense of a decoder, the bare sum the MLP's output is added to, does not exist.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tl_asymmetry.models.bridge import BridgeAdapter
from tl_asymmetry.models.hooked import HookedAdapter

_FAMILIES = ("Bert", "Roberta")
"""Beginnings of the Hugging Face classes of encoders; transformer-lens has RoBERTa from version 4."""

_HEADS = ("ForMaskedLM", "ForPreTraining")
"""Endings of the Hugging Face classes that carry a masked-language-model head."""


def is_encoder(model: Any) -> bool:
    """Whether a model is one of the encoders this module knows: HookedEncoder, or a Bridge of a BERT or RoBERTa."""
    if hasattr(model, "adapter") and hasattr(model, "original_model"):
        # The configuration of transformer-lens 3.9 calls a BERT causal: only the class tells.
        return is_encoder_class(type(model.original_model).__name__)
    return any(base.__name__ == "HookedEncoder" for base in type(model).__mro__)


def is_encoder_class(name: str) -> bool:
    """Whether a class of transformers, by its name, is a BERT or RoBERTa of whatever head."""
    return name.startswith(_FAMILIES)


def encoder_adapter(model: Any) -> EncoderBridgeAdapter | HookedEncoderAdapter:
    """The adapter for what `is_encoder` has recognised."""
    return EncoderBridgeAdapter(model) if hasattr(model, "adapter") else HookedEncoderAdapter(model)


class EncoderBridgeAdapter(BridgeAdapter):
    """A BERT or RoBERTa inside a TransformerBridge."""

    is_encoder = True
    norms_stream = True

    @property
    def has_layer_in_head(self) -> bool:
        return self.has_masked_lm_head

    @property
    def has_masked_lm_head(self) -> bool:
        return type(self.model.original_model).__name__.endswith(_HEADS)

    @property
    def has_post_norms(self) -> bool:
        return True

    @property
    def is_causal(self) -> bool:
        return False

    def point(self, layer: int, point: str) -> tuple[nn.Module, str] | None:
        """The module to watch and whether its "input" or its "output" is the wanted tensor."""
        block = self.blocks[layer]
        match point:
            case "resid_mid":
                return None
            case "mlp_in":  # the Bridge has no module for the whole MLP, and mlp.hook_in stays silent in 3.9
                return getattr(block.mlp, "in").hook_in, "output"
            case "mlp_post":
                return block.mlp.out.hook_in, "output"
        return super().point(layer, point)


class HookedEncoderAdapter(HookedAdapter):
    """A HookedEncoder (transformer-lens up to 3.x)."""

    kind = "HookedEncoder"
    is_encoder = True
    norms_stream = True
    has_layer_in_head = True
    has_masked_lm_head = True
    may_be_processed = False

    @property
    def has_post_norms(self) -> bool:
        return True

    @property
    def is_causal(self) -> bool:
        return False

    def embedding(self) -> Tensor:
        return self.model.embed.embed.W_E

    def final_gain(self) -> Tensor | None:
        return self.model.mlm_head.ln.w

    def point(self, layer: int, point: str) -> tuple[nn.Module, str] | None:
        """The module to watch and whether its "input" or its "output" is the wanted tensor."""
        match point:
            case "resid_mid":
                return None
            case "resid_post":
                return self.blocks[layer].hook_normalized_resid_post, "output"
        return super().point(layer, point)

    def run(self, tokens: Tensor, logits: bool, layers: int) -> Tensor | None:
        if logits:
            return self.model(tokens, return_type="logits")
        resid = self.model.hook_full_embed(self.model.embed(tokens))
        for block in self.blocks[:layers]:
            resid = block(resid)
        return None
