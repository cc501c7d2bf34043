"""How to reach inside a TransformerBridge (transformer-lens 3.9 and 4.x). Used by `ModelView` alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from tl_asymmetry.models.routing import Hook, RoutingReader
from tl_asymmetry.models.running import hooked, own_positions
from tl_asymmetry.names import kind_of

_SUBMODULE = {"W_Q": "q", "W_K": "k", "W_V": "v", "W_O": "o", "W_in": "in", "W_gate": "gate", "W_out": "out"}


class _Stopped(Exception):
    """Raised after the last block wanted to leave out the unembedding, and caught again at once."""


@dataclass(frozen=True)
class Scaled:
    """Makes a live tensor times a number."""

    tensor: Callable[[], Tensor]
    """What is scaled."""
    factor: float
    """By what."""

    def __call__(self) -> Tensor:
        return self.tensor() * self.factor


def mlp_of(block: Any) -> Any:
    """A block's MLP, or None; Granite 4 calls it shared where there are no experts beside it."""
    mlp = _child(block, "mlp")
    return _child(block, "shared_mlp") if mlp is None and _child(block, "moe") is None else mlp


class BridgeAdapter:
    """Finds modules, matrices and parameters of a TransformerBridge under this package's names."""

    kind = "TransformerBridge"
    is_encoder = False
    norms_stream = False
    rescaled: tuple[str, ...] = ("W_O", "W_out")
    """Writing matrices whose output reaches the stream through a norm, in a model with such norms."""
    active_stream: int | None = None
    """Which of several streams its layers read; None: there is one."""
    remarks: tuple[str, ...] = ()
    """Sentences on what its layers have beside matrices, or have in common."""
    names = tuple(_SUBMODULE)
    """Matrices that its blocks may have."""
    has_unembedding = True
    """Whether it predicts tokens from its stream."""
    inputs_at_products = False
    """Whether the module of a `projection` is called with the matrix's own input."""
    names_hooks = True
    """Whether its blocks have TransformerLens's hook points."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cfg = model.cfg
        self.blocks: list[Any] = list(model.blocks)
        forward = inspect.signature(model.original_model.forward).parameters.values()
        self._takes_use_cache = any(p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in forward)

    # -- architecture ------------------------------------------------------------------------------

    @property
    def final_norm(self) -> str | None:
        """ "LN", "RMS" or None."""
        kind = self.cfg.normalization_type
        if kind is None or getattr(self.model, "ln_final", None) is None:
            return None
        return kind.removesuffix("Pre")

    tells_folded_norms = False
    """Whether the configuration does; else the weights must, see checks.check_raw."""
    norms_are_folded = False

    @property
    def may_be_processed(self) -> bool:
        """Whether its weights may have gone through TransformerLens's processing."""
        return bool(getattr(self.model, "_weights_processed", True))

    def raw_instead(self, flags: Sequence[str]) -> str:
        """How to load it without some flags of processing."""
        return "a TransformerBridge.boot_transformers(...) without enable_compatibility_mode or process_weights"

    @property
    def has_post_norms(self) -> bool:
        block = self.blocks[0]
        return _child(block, "ln1_post") is not None or bool(getattr(block, "mlp_reads_resid_directly", False))

    @property
    def has_qk_norm(self) -> bool:
        return _child(self.blocks[0].attn, "q_norm") is not None

    @property
    def has_sinks(self) -> bool:
        return bool(getattr(self.cfg, "use_attention_sinks", False)) or hasattr(
            getattr(self.blocks[0].attn, "original_component", None), "sinks"
        )

    @property
    def is_causal(self) -> bool:
        return getattr(self.cfg, "attention_dir", "causal") == "causal"

    @property
    def is_parallel(self) -> bool:
        return bool(getattr(self.cfg, "parallel_attn_mlp", False)) and self.has_mlp(0)

    def has_mlp(self, layer: int) -> bool:
        """Whether the layer has an MLP of any sort, mixture of experts included."""
        return mlp_of(self.blocks[layer]) is not None

    def unit(self, matrix: str) -> str | None:
        """What the first axis of a matrix counts: "head", "kv head", or None without such an axis."""
        heads = kind_of(matrix).heads
        return {"query": "head", "kv": "kv head"}[heads] if heads else None

    def is_moe(self, layer: int) -> bool:
        mlp = mlp_of(self.blocks[layer])
        return mlp is not None and (_child(mlp, "in") is None or _child(mlp, "out") is None)

    # -- matrices ----------------------------------------------------------------------------------

    def matrix(self, layer: int, matrix: str) -> Tensor | None:
        block = self.blocks[layer]
        if kind_of(matrix).part == "attn":
            return getattr(block.attn, matrix)
        mlp = mlp_of(block)
        if mlp is None or self.is_moe(layer) or _child(mlp, _SUBMODULE[matrix]) is None:
            return None
        return getattr(mlp, matrix)

    def rearranges(self, layer: int, matrix: str) -> bool:
        """Whether a matrix is a copy although its weights are raw."""
        return False

    def shape(self, layer: int, matrix: str) -> tuple[int, ...] | None:
        """Of `matrix`, without making it."""
        weight = self.matrix(layer, matrix)
        return None if weight is None else tuple(weight.shape)

    def bias(self, layer: int, name: str) -> Tensor | None:
        """The bias in TransformerLens shape, or None where the model has none."""
        block = self.blocks[layer]
        parent = block.attn if name in ("b_Q", "b_K", "b_V", "b_O") else mlp_of(block)
        component = _child(parent, _SUBMODULE["W" + name[1:]])
        bias = None if component is None else getattr(component, "bias", None)
        if bias is None or name in ("b_O", "b_in", "b_gate", "b_out"):
            return bias
        return bias.view(-1, self.cfg.d_head)

    def embedding(self) -> Tensor:
        return self.model.embed.weight

    def unembedding(self) -> Tensor:
        return self.model.unembed.W_U

    def final_gain(self) -> Tensor | None:
        norm = getattr(self.model, "ln_final", None)
        return None if getattr(norm, "weight", None) is None else self._gain(norm)

    def _gain(self, norm: Any) -> Tensor:
        """What the norm multiplies by: its weight, or 1 + weight in Gemma."""
        return 1 + norm.weight if getattr(self.cfg, "rmsnorm_uses_offset", False) else norm.weight

    @property
    def embedding_scale(self) -> float:
        """Gemma multiplies token embeddings by √d_model in forward; HookedTransformer keeps them
        multiplied."""
        return self.cfg.d_model**0.5 if str(self.cfg.architecture).startswith("Gemma") else 1.0

    @property
    def is_tied(self) -> bool:
        E, U = self.embedding(), self.unembedding()
        return E.untyped_storage().data_ptr() == U.untyped_storage().data_ptr()

    # -- modules -----------------------------------------------------------------------------------

    def point(self, layer: int, point: str) -> tuple[nn.Module, str] | None:
        """The module to watch and whether its "input" or its "output" is the wanted tensor."""
        block = self.blocks[layer]
        mlp = mlp_of(block)
        match point:
            case "attn_in":
                return block.attn.hook_in, "output"
            case "z":
                return block.attn.hook_z, "output"
            case "resid_pre" | "resid_post":
                return getattr(block, f"hook_{point}"), "output"
            case "resid_mid" if mlp is not None and not self.is_parallel:
                return block.hook_resid_mid, "output"
            case "mlp_in" if mlp is not None:
                return mlp.hook_in, "output"
            case "mlp_post" if mlp is not None and not self.is_moe(layer):
                return mlp.hook_post, "output"
        return None

    def projection(self, layer: int, matrix: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
        """The module whose output is `input @ matrix + bias`, and how to take that matrix's part of it: all."""
        block = self.blocks[layer]
        parent = block.attn if kind_of(matrix).part == "attn" else mlp_of(block)
        component = _child(parent, _SUBMODULE[matrix])
        return None if component is None else (component.hook_out, _itself)

    def routing(self, layer: int, show: RoutingReader) -> list[Hook]:
        """None: a Bridge of a mixture is seen through the model that it wraps."""
        return []

    @property
    def has_layer_in_head(self) -> bool:
        """Whether a layer of its own stands between the stream and the unembedding."""
        return False

    def norms(self, layer: int) -> dict[str, nn.Module]:
        """The layer's norms by where they stand: "attn_pre", "attn_post", "mlp_pre", "mlp_post"."""
        block = self.blocks[layer]
        names = {"attn_pre": "ln1", "mlp_pre": "ln2", "attn_post": "ln1_post", "mlp_post": "ln2_post"}
        if getattr(block, "mlp_reads_resid_directly", False):
            names = {"attn_post": "ln1", "mlp_post": "ln2"}
        elif self.is_parallel and _child(block, "ln2") is None:
            names["mlp_pre"] = "ln1"  # one norm serves both
        found = {where: _child(block, name) for where, name in names.items()}
        return {where: norm for where, norm in found.items() if hasattr(norm, "hook_scale")}

    def norm_form(self, norm: Any) -> tuple[Tensor | None, bool]:
        """A norm's gain as multiplied (None where it has none), and whether it subtracts the mean."""
        weight = getattr(norm, "weight", None)
        return None if weight is None else self._gain(norm), not norm.uses_rms_norm

    @property
    def splits_inputs(self) -> str | None:
        """Name of a switched-on option that gives every head its own copy of the attention input."""
        return next((f for f in ("use_attn_in", "use_split_qkv_input") if getattr(self.cfg, f, False)), None)

    # -- running -----------------------------------------------------------------------------------

    def run(self, tokens: Tensor, logits: bool, layers: int) -> Tensor | None:
        # without use_cache=False the Hugging Face model keeps the keys and values of every layer
        options = {"use_cache": False} if self._takes_use_cache else {}
        hooks: list[Any] = [(block.attn, "output", _forget_pattern) for block in self.blocks]
        hooks += own_positions(self.model, len(tokens))
        if not logits:
            # stop_at_layer stops before a block, so it cannot leave out what follows the last one
            hooks.append((self.blocks[layers - 1], "output", _stop))
        with hooked(hooks), suppress(_Stopped):
            return self.model(tokens, return_type="logits" if logits else None, **options)
        return None

    def run_block(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.blocks[layer](*args, **kwargs)
        finally:
            _forget_pattern(self.blocks[layer].attn)

    def all_modules(self) -> Iterator[nn.Module]:
        seen: set[int] = set()
        for root in (self.model, self.model.original_model):
            for module in root.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.named_parameters()

    # -- parameters without a head -----------------------------------------------------------------

    def headless(self) -> dict[str, Callable[[], Tensor]]:
        """Name → function giving the tensor, for all parameters that are none of the seven matrices.

        Names, shapes and conventions are HookedTransformer's: gains with Gemma's 1 added, Gemma's embeddings scaled,
        a missing attention or MLP bias as zeros.
        """
        model = self.model
        entries: dict[str, Callable[[], Tensor]] = {}
        covered = {_storage(p) for p in self._copied_from()}

        def cover(*tensors: Tensor | None) -> None:
            covered.update(_storage(t) for t in tensors if t is not None)

        def add_norm(name: str, norm: Any) -> None:
            weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
            cover(weight, bias)
            if weight is not None:
                entries[f"{name}.w"] = partial(self._gain, norm)
            if bias is not None:
                entries[f"{name}.b"] = lambda: norm.bias

        scale = self.embedding_scale
        entries["embed.W_E"] = self.embedding if scale == 1 else Scaled(self.embedding, scale)
        cover(self.embedding(), self.unembedding())
        if _child(model, "pos_embed") is not None and hasattr(model.pos_embed, "weight"):
            entries["pos_embed.W_pos"] = lambda: model.pos_embed.weight
            cover(model.pos_embed.weight)
        for layer, block in enumerate(self.blocks):
            prefix = f"blocks.{layer}"
            for norm in ("ln1", "ln1_post", "ln2", "ln2_post"):
                if _child(block, norm) is not None:
                    add_norm(f"{prefix}.{norm}", _child(block, norm))
            for norm in ("q_norm", "k_norm"):
                if _child(block.attn, norm) is not None:
                    add_norm(f"{prefix}.attn.{norm}", _child(block.attn, norm))
            slots = {"W_Q": "attn.b_Q", "W_K": "attn.b_K", "W_V": "attn.b_V", "W_O": "attn.b_O"}
            slots |= {"W_in": "mlp.b_in", "W_gate": "mlp.b_gate", "W_out": "mlp.b_out"}
            for matrix, slot in slots.items():
                weight = self.matrix(layer, matrix)
                bias = None if weight is None else self.bias(layer, slot.partition(".")[2])
                cover(weight, bias)
                if weight is not None and (bias is not None or matrix != "W_gate"):
                    entries[f"{prefix}.{slot}"] = partial(self._bias_or_zeros, layer, matrix, weight)
        if _child(model, "ln_final") is not None:
            add_norm("ln_final", model.ln_final)
        entries["unembed.W_U"] = self.unembedding
        entries["unembed.b_U"] = lambda: model.unembed.b_U
        cover(model.unembed.b_U)
        for name, parameter in model.named_parameters():
            if _storage(parameter) not in covered:  # experts, routers, attention sinks, ...
                entries[name.replace("_original_component.", "")] = partial(_itself, parameter)
        return entries

    def _bias_or_zeros(self, layer: int, matrix: str, weight: Tensor) -> Tensor:
        bias = self.bias(layer, "b" + matrix[1:])
        if bias is not None:
            return bias
        shape = (weight.shape[0], weight.shape[2]) if kind_of(matrix).output_axis == "head" else (weight.shape[-1],)
        return weight.new_zeros(shape)

    def _copied_from(self) -> Iterator[Tensor]:
        """Fused projections that the Bridge has split into copies: still registered, no longer used."""
        for block in self.blocks:
            for parent, fused in ((block.attn, "qkv"), (mlp_of(block), "gate_up")):
                component = None if parent is None else _child(parent, fused)
                if component is not None:
                    yield from component.parameters()
            split = getattr(mlp_of(block), "fused_attr", None)  # under the model's own name, with no component for it
            if split is not None and hasattr(mlp_of(block).original_component, split):
                yield from getattr(mlp_of(block).original_component, split).parameters()


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _stop(*_: Any) -> None:
    raise _Stopped


def _forget_pattern(attention: Any, *_: Any) -> None:
    # GPT-2's and NeoX's attention keeps its last pattern [batch, head, pos, pos], graph included, and never
    # uses it
    if getattr(attention, "_pattern", None) is not None:
        attention._pattern = None


def _child(module: Any, name: str) -> Any:
    """The registered submodule of that name, or None; never an alias or a property that fails."""
    children = getattr(module, "_modules", {})
    return children.get(name)
