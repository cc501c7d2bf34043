"""How to reach inside a HookedTransformer (transformer-lens up to 3.x). Used by `ModelView` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_asymmetry.models.routing import Hook, RoutingReader, of_choice
from tl_asymmetry.names import MATRICES, kind_of

_SHARED_NORM_ARCHITECTURES = frozenset({"GPTJForCausalLM", "PhiForCausalLM"})
"""Architectures with one norm per block, of which HookedTransformer keeps a second copy as ln2."""

_POST_NORM_ARCHITECTURES = frozenset({"Olmo2ForCausalLM", "Olmo3ForCausalLM"})
"""Architectures whose norms follow attention and MLP instead of preceding them."""


class HookedAdapter:
    """Finds modules, matrices and parameters of a HookedTransformer under this package's names."""

    kind = "HookedTransformer"
    is_encoder = False
    norms_stream = False
    has_layer_in_head = False
    rescaled: tuple[str, ...] = ("W_O", "W_out")
    """Writing matrices whose output reaches the stream through a norm, in a model with such norms."""
    active_stream: int | None = None
    """Which of several streams its layers read; None: there is one."""
    remarks: tuple[str, ...] = ()
    """Sentences on what its layers have beside matrices, or have in common."""
    names = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "W_router")
    """Matrices that its blocks may have."""
    has_unembedding = True
    inputs_at_products = False
    names_hooks = True
    """Whether its blocks have TransformerLens's hook points."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg
        self.blocks: list[Any] = list(model.blocks)

    # -- architecture ------------------------------------------------------------------------------

    @property
    def final_norm(self) -> str | None:
        """ "LN", "RMS" or None; the folded forms LNPre and RMSPre count as what they are folded from."""
        kind = self.cfg.normalization_type
        return None if kind is None else kind.removesuffix("Pre")

    tells_folded_norms = True
    """Whether the configuration does; else the weights must, see checks.check_raw."""
    may_be_processed = True
    """Whether its weights may have gone through TransformerLens's processing."""

    def raw_instead(self, flags: Sequence[str]) -> str:
        """How to load it without some flags of processing."""
        return "HookedTransformer.from_pretrained_no_processing(...), or load_and_process_state_dict with " + ", ".join(
            f"{flag}=False" for flag in flags
        )

    @property
    def norms_are_folded(self) -> bool:
        return bool(self.cfg.normalization_type and self.cfg.normalization_type.endswith("Pre"))

    @property
    def has_post_norms(self) -> bool:
        return (
            bool(self.cfg.use_normalization_before_and_after)
            or self.cfg.original_architecture in _POST_NORM_ARCHITECTURES
        )

    @property
    def has_qk_norm(self) -> bool:
        return getattr(self.blocks[0].attn, "q_norm", None) is not None

    @property
    def has_sinks(self) -> bool:
        return bool(getattr(self.cfg, "use_attention_sinks", False))

    @property
    def is_causal(self) -> bool:
        return self.cfg.attention_dir == "causal"

    @property
    def is_parallel(self) -> bool:
        return bool(self.cfg.parallel_attn_mlp) and not self.cfg.attn_only

    def has_mlp(self, layer: int) -> bool:
        """Whether the layer has an MLP of any sort, mixture of experts included."""
        return not self.cfg.attn_only

    def unit(self, matrix: str) -> str | None:
        """What the first axis of a matrix counts: "head", "kv head", "expert", or None without such an axis."""
        heads = kind_of(matrix).heads
        if heads is None and matrix != "W_router" and any(self.is_moe(layer) for layer in range(len(self.blocks))):
            return "expert"
        return {"query": "head", "kv": "kv head"}[heads] if heads else None

    def is_moe(self, layer: int) -> bool:
        return hasattr(getattr(self.blocks[layer], "mlp", None), "experts")

    # -- matrices ----------------------------------------------------------------------------------

    def matrix(self, layer: int, matrix: str) -> Tensor | None:
        """The parameter itself; under grouped-query attention the un-expanded one."""
        block = self.blocks[layer]
        if kind_of(matrix).part == "attn":
            return _unexpanded(block.attn, matrix)
        if not self.has_mlp(layer):
            return None
        if self.is_moe(layer):  # where W_gate is the library's name for the router
            if matrix == "W_router":
                return block.mlp.W_gate.weight.mT
            return torch.stack([getattr(expert, matrix).weight.mT for expert in block.mlp.experts])
        return getattr(block.mlp, matrix, None)

    def rearranges(self, layer: int, matrix: str) -> bool:
        """Whether a matrix is a copy although its weights are raw."""
        return self.unit(matrix) == "expert"

    def shape(self, layer: int, matrix: str) -> tuple[int, ...] | None:
        """Of `matrix`, without making it."""
        block = self.blocks[layer]
        if kind_of(matrix).part == "mlp" and self.is_moe(layer) and matrix != "W_router":
            return (len(block.mlp.experts), *getattr(block.mlp.experts[0], matrix).weight.mT.shape)
        weight = self.matrix(layer, matrix)
        return None if weight is None else tuple(weight.shape)

    def bias(self, layer: int, name: str) -> Tensor | None:
        block = self.blocks[layer]
        if name in ("b_Q", "b_K", "b_V", "b_O"):
            return _unexpanded(block.attn, name)
        if name == "b_in" and self.cfg.gated_mlp:
            return None  # added after the gate, not by the input projection
        return getattr(block.mlp, name, None)

    def embedding(self) -> Tensor:
        return self.model.embed.W_E

    def unembedding(self) -> Tensor:
        return self.model.unembed.W_U

    def final_gain(self) -> Tensor | None:
        return getattr(getattr(self.model, "ln_final", None), "w", None)

    @property
    def is_tied(self) -> bool:
        """Whether W_U is the transpose of W_E, up to Gemma's factor √d_model (which is rounded, so not bit
        for bit)."""
        E, U = self.embedding(), self.unembedding()
        if E.shape != U.mT.shape:
            return False
        gemma = str(self.cfg.original_architecture).startswith("Gemma")
        rounding = max(1e-6, torch.finfo(E.dtype).eps)
        for i in range(0, len(E), 4096):  # in slices: no second copy of a large embedding
            e, u = E[i : i + 4096], U[:, i : i + 4096].mT
            if not (
                torch.allclose(e, u * self.cfg.d_model**0.5, rtol=rounding, atol=0) if gemma else torch.equal(e, u)
            ):
                return False
        return True

    # -- modules -----------------------------------------------------------------------------------

    def point(self, layer: int, point: str) -> tuple[nn.Module, str] | None:
        """The module to watch and whether its "input" or its "output" is the wanted tensor."""
        block = self.blocks[layer]
        has_mlp = self.has_mlp(layer)
        match point:
            case "attn_in":
                return block.attn, "input"
            case "z":
                return block.attn.hook_z, "output"
            case "resid_pre" | "resid_post":
                return getattr(block, f"hook_{point}"), "output"
            case "resid_mid":
                hook = getattr(block, "hook_resid_mid", None)
                return None if hook is None else (hook, "output")
            case "mlp_in" if has_mlp:
                return block.mlp, "input"
            case "mlp_post" if has_mlp and not self.is_moe(layer):
                return block.mlp.hook_post, "output"
        return None

    def projection(self, layer: int, matrix: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
        """The module whose output is `input @ matrix + bias`, and how to take that matrix's part of it: all."""
        block = self.blocks[layer]
        gated = bool(self.cfg.gated_mlp)
        match matrix:
            case "W_Q" | "W_K" | "W_V":
                return getattr(block.attn, f"hook_{matrix[-1].lower()}"), _itself
            case "W_O":
                return block.attn, _itself
            case "W_in":
                return (block.mlp.hook_pre_linear if gated else block.mlp.hook_pre), _itself
            case "W_gate":
                return block.mlp.hook_pre, _itself
            case "W_router" if self.is_moe(layer):
                return block.mlp.W_gate, _itself
            case "W_out":
                return block.mlp, _itself
        return None

    def routing(self, layer: int, show: RoutingReader) -> list[Hook]:
        """Hooks that show what the layer's router decides; none without a mixture."""
        if not self.is_moe(layer):
            return []
        mlp: Any = self.blocks[layer].mlp
        seen: dict[str, Tensor] = {}

        def read(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["hidden"] = (*args, *kwargs.values())[0]

        def weigh(_: nn.Module, __: tuple[Any, ...], weights: Tensor) -> None:
            seen["weights"] = weights

        def choose(_: nn.Module, __: tuple[Any, ...], index: Tensor) -> None:
            weights = seen["weights"].gather(-1, index)
            if self.cfg.norm_topk_prob:
                weights = weights / weights.sum(-1, keepdim=True)
            show(of_choice(seen["hidden"], index, weights, len(mlp.experts)))

        return [
            (mlp, "input", read),
            (mlp.hook_expert_weights, "output", weigh),
            (mlp.hook_expert_indices, "output", choose),
        ]

    def norms(self, layer: int) -> dict[str, nn.Module]:
        """The layer's norms by where they stand: "attn_pre", "attn_post", "mlp_pre", "mlp_post"."""
        names = {"attn_pre": "ln1", "mlp_pre": "ln2"}
        if self.cfg.original_architecture in _POST_NORM_ARCHITECTURES:
            names = {"attn_post": "ln1", "mlp_post": "ln2"}
        elif self.cfg.use_normalization_before_and_after:
            names |= {"attn_post": "ln1_post", "mlp_post": "ln2_post"}
        found: dict[str, Any] = {where: getattr(self.blocks[layer], name, None) for where, name in names.items()}
        return {where: norm for where, norm in found.items() if hasattr(norm, "hook_scale")}

    def norm_form(self, norm: nn.Module) -> tuple[Tensor | None, bool]:
        """A norm's gain as multiplied (None where it has none), and whether it subtracts the mean."""
        return getattr(norm, "w", None), type(norm).__name__.startswith("LayerNorm")

    @property
    def splits_inputs(self) -> str | None:
        """Name of a switched-on option that gives every head its own copy of the attention input."""
        return next((f for f in ("use_attn_in", "use_split_qkv_input") if getattr(self.cfg, f, False)), None)

    # -- running -----------------------------------------------------------------------------------

    def run(self, tokens: Tensor, logits: bool, layers: int) -> Tensor | None:
        options: dict[str, Any] = {}
        tokenizer = self.model.tokenizer
        if tokenizer is not None and tokenizer.padding_side == "left":
            # A left-padding tokenizer makes forward guess an attention mask from pad tokens, which are real
            # tokens here (the pad token often is the end-of-text token). This override is undone when forward
            # returns.
            options["padding_side"] = "right"
        if logits:
            return self.model(tokens, return_type="logits", **options)
        self.model(tokens, stop_at_layer=layers, **options)
        return None

    def run_block(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        return self.blocks[layer](*args, **kwargs)

    def all_modules(self) -> Iterator[nn.Module]:
        return self.model.modules()

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.named_parameters()

    # -- parameters without a head -----------------------------------------------------------------

    def headless(self) -> dict[str, Callable[[], Tensor]]:
        """Name → function giving the tensor, for all parameters that are none of the seven matrices."""
        shared_norm = self.cfg.original_architecture in _SHARED_NORM_ARCHITECTURES
        entries: dict[str, Callable[[], Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            leaf = name.rsplit(".", 1)[-1].removeprefix("_")
            owner = name.rsplit(".", 1)[0]
            if leaf in MATRICES and (kind_of(leaf).part == "attn" or owner.endswith(".mlp")):
                continue
            if owner.endswith(".mlp.W_gate") or ".mlp.experts." in name:  # a mixture's router and experts
                continue
            if shared_norm and ".ln2." in name:
                continue
            entries[f"{owner}.{leaf}"] = partial(_itself, parameter)
        return entries


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _unexpanded(attention: Any, name: str) -> Tensor:
    # Under grouped-query attention W_K is a property that repeats the parameter _W_K for every query head.
    return getattr(attention, f"_{name}" if hasattr(attention, f"_{name}") else name)
