"""How to reach inside a transformers model, as it is or inside a TransformerBridge. Used by `ModelView` alone.

Matrices come from `sites.layer_sites`. What a configuration may say wrongly is asked of the model itself, once, with a
few tokens (`anatomy.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from tl_asymmetry.models.anatomy import (
    Anatomy,
    is_multiple,
    layer_anatomy,
    norm_gain,
    seen_in,
    sees_later_tokens,
    subtracts_mean,
)
from tl_asymmetry.models.bridge import BridgeAdapter
from tl_asymmetry.models.routing import Hook, RoutingReader, routing_hooks
from tl_asymmetry.models.running import evaluation, hooked, own_positions
from tl_asymmetry.models.sites import WRAPPED, Site, layer_sites, linear_maps
from tl_asymmetry.names import ATTENTION, MATRICES, canonical, kind_of

_PROBE_TOKENS = 6
_MUTE_HOOKS = ("OPT", "OpenAIGPT")
"""Beginnings of the classes in which a Bridge's hooks stay silent, or see batch and positions in one."""
_FOREIGN = ("vision", "visual", "audio", "image", "mtp")
"""Parts of paths to lists of layers that are not the language model's."""
_FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "norm_f",
    "final_norm",
    "embedding_norm",
    "layer_norm",
)


class _Stopped(Exception):
    """Raised after the last wanted block, and caught again at once."""


@dataclass(frozen=True)
class _Configuration:
    """What `ModelView` reads of a configuration, under TransformerLens's names."""

    model_name: str
    d_model: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    n_ctx: int
    positional_embedding_type: str
    attn_scores_soft_cap: float | None


PLAIN = "transformers model"
"""The kind of a model that no class of TransformerLens wraps."""


class HuggingFaceAdapter:
    """Finds modules, matrices and parameters of a transformers model under this package's names.

    Args:
        model: a `PreTrainedModel`, or a TransformerBridge around one.
    """

    tells_folded_norms = False
    inputs_at_products = True
    """Whether the module of a `projection` is called with the matrix's own input."""
    may_be_processed = False
    """Whether its weights may have gone through TransformerLens's processing."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.inner: Any = getattr(model, "original_model", model)
        self.kind = "TransformerBridge" if self.inner is not model else PLAIN
        self.text_config = _text_config(self.inner)
        if getattr(self.inner.config, "is_encoder_decoder", False):
            raise ValueError(
                f"expected one residual stream, got the encoder-decoder {type(self.inner).__name__}; pass a decoder or "
                "an encoder"
            )
        self.d_model = _width(self.inner)
        self.blocks = _layers(self.inner)
        self.sites = _all_sites(self.inner)
        if others := _other_stacks(self.inner, self.blocks):
            raise ValueError(
                f"expected one stack of layers, got another one like it in {type(self.inner).__name__} "
                f"({', '.join(others)}): there is no one stream; pass a model whose layers follow one another"
            )
        if not any(self.sites):
            raise ValueError(
                f"expected linear maps whose names tell a side on the residual stream in the layers of "
                f"{type(self.inner).__name__}, got none; pass a transformer with named projections"
            )
        self.cfg = self._configuration()
        parameters = inspect.signature(self.inner.forward).parameters.values()
        self._takes_use_cache = any(
            p.name == "use_cache" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters
        )

    def _configuration(self) -> _Configuration:
        config, heads = self.text_config, _heads_said(self.inner)
        widths = [site.weight.shape[-1] for sites in self.sites for name, site in sites.items() if name == "W_Q"]
        counts = {name: [s[name].weight.shape[0] for s in self.sites if name in s] for name in ("W_Q", "W_K")}
        rotary = any(hasattr(config, name) for name in ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct"))
        alibi = getattr(config, "alibi", getattr(getattr(config, "attn_config", None), "alibi", None))
        alibi = config.model_type == "bloom" if alibi is None else bool(alibi)
        return _Configuration(
            model_name=str(getattr(self.inner, "name_or_path", "") or type(self.inner).__name__),
            d_model=self.d_model,
            n_heads=max(counts["W_Q"], default=heads),
            n_key_value_heads=max(counts["W_K"], default=heads),
            d_head=max(widths, default=self.d_model // heads),
            n_ctx=int(
                _first(config, ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"), 2**31 - 1)
            ),
            positional_embedding_type="alibi" if alibi else "rotary" if rotary else "standard",
            attn_scores_soft_cap=getattr(config, "attn_logit_softcapping", None),
        )

    def raw_instead(self, flags: Sequence[str]) -> str:
        """How to load it without some flags of processing."""
        return "the model as transformers loads it"

    # -- architecture ------------------------------------------------------------------------------

    @cached_property
    def _declared(self) -> BridgeAdapter | None:
        """What the Bridge's configuration says, for a model without weights: it cannot be asked by running it."""
        tensors = (*self.inner.parameters(), *self.inner.buffers())
        return BridgeAdapter(self.model) if any(tensor.is_meta for tensor in tensors) else None

    @property
    def names(self) -> tuple[str, ...]:
        """Matrices that its blocks have, in the order in which results list them."""
        return canonical(dict.fromkeys(name for sites in self.sites for name in sites))

    def unit(self, matrix: str) -> str | None:
        """What the first axis of a matrix counts: "head", "kv head", "expert", or None without such an axis."""
        return next((sites[matrix].unit for sites in self.sites if matrix in sites), None)

    @cached_property
    def _final(self) -> nn.Module | None:
        """The norm between the last block and the unembedding."""
        owner = _parent_of_layers(self.inner, self.blocks)
        for name in _FINAL_NORMS:
            norm = owner._modules.get(name)
            if norm is not None:
                return norm
        return None

    @property
    def final_norm(self) -> str | None:
        """ "LN", "RMS" or None, by what the norm does to a vector."""
        if self._declared is not None:
            return self._declared.final_norm
        if self._final is None:
            return None
        return "LN" if subtracts_mean(self._final, self.d_model) else "RMS"

    @property
    def norms_are_folded(self) -> bool:
        return False

    @property
    def has_post_norms(self) -> bool:
        if self._declared is not None:
            return self._declared.has_post_norms
        return any(layer.renormed or layer.rescaled for layer in self._anatomy)

    @property
    def remarks(self) -> list[str]:
        """Sentences on what its layers have beside matrices, or have in common."""
        found = []
        if shared := getattr(self.text_config, "num_kv_shared_layers", None):
            found.append(
                f"the last {shared} layers use keys and values of earlier layers, which alone have W_K and W_V for them"
            )
        names = [name for name, _ in self.inner.named_parameters() if "embed" in name and "per_layer" in name]
        if names:
            found.append(
                f"per-layer embeddings ({', '.join(names)}) enter each block beside the stream: they have no rows, and "
                "their change stands in other_changes"
            )
        return found

    @property
    def norms_stream(self) -> bool:
        """Whether the stream itself is normed after each addition, as in BERT."""
        return self._declared is None and any(layer.renormed for layer in self._anatomy)

    @property
    def rescaled(self) -> tuple[str, ...]:
        """Writing matrices whose output reaches the stream through a norm."""
        if self._declared is not None:
            return self._declared.rescaled
        found = {name for layer in self._anatomy for name in layer.rescaled}
        return tuple(name for name in self.names if name in found) or BridgeAdapter.rescaled

    @cached_property
    def has_layer_in_head(self) -> bool:
        """Whether a layer of its own stands between the stream, behind its last norm, and the unembedding."""
        head = self.inner.get_output_embeddings()
        if head is None or self._declared is not None:
            return False
        seen: list[Tensor] = []
        keep = (head, "input", lambda _, args, kwargs: seen.append(args[0].detach()))
        with torch.no_grad(), evaluation(self.model, self.all_modules()), hooked([keep]):
            self.run(self._probe_tokens(), True, len(self.blocks))
        stream = self._last_stream(self._probe_tokens())
        with torch.no_grad():
            read = stream if self._final is None else self._final(stream)
        return seen[0].numel() != read.numel() or not is_multiple(seen[0], read)

    @property
    def has_qk_norm(self) -> bool:
        return any(
            "norm" in name.rpartition(".")[2] and ("q_" in name or "k_" in name)
            for name, _ in self.inner.named_modules()
        )

    @property
    def has_sinks(self) -> bool:
        return any(name.endswith(".sinks") for name, _ in self.inner.named_parameters())

    @property
    def active_stream(self) -> int | None:
        """Of several streams (Gemma 3n) the number of that which attention and MLP read; None where there is one."""
        return getattr(self.text_config, "altup_active_idx", None)

    @property
    def repeats(self) -> int:
        """How often a pass goes through its layers: more than once where they share one set of weights (ALBERT)."""
        said = _first(self.text_config, ("num_hidden_layers", "n_layer", "num_layers", "n_layers"), len(self.blocks))
        return max(int(said) // len(self.blocks), 1) if hasattr(self.text_config, "num_hidden_groups") else 1

    @cached_property
    def is_causal(self) -> bool:
        """Whether a change of the last token leaves all earlier positions as they are."""
        if self._declared is not None:
            return self._declared.is_causal
        return not sees_later_tokens(self._last_stream, self._probe_tokens(), self.embedding().shape[0])

    @property
    def is_encoder(self) -> bool:
        """Whether every token sees every other: what such a model predicts are masked tokens, not next ones."""
        return not self.is_causal

    @property
    def has_masked_lm_head(self) -> bool:
        return self.is_encoder and self.inner.get_output_embeddings() is not None

    @property
    def is_parallel(self) -> bool:
        if self._declared is not None:
            return self._declared.is_parallel
        return any(layer.parallel for layer in self._anatomy)

    def has_mlp(self, layer: int) -> bool:
        return any(name.startswith(("W_in", "W_out")) for name in self.sites[layer])

    def is_moe(self, layer: int) -> bool:
        return any(site.unit == "expert" for site in self.sites[layer].values())

    # -- matrices ----------------------------------------------------------------------------------

    def matrix(self, layer: int, matrix: str) -> Tensor | None:
        """The matrix in TransformerLens orientation, heads or experts first; None where the layer has none."""
        site = self.sites[layer].get(matrix)
        return None if site is None else site.weight

    def rearranges(self, layer: int, matrix: str) -> bool:
        """Whether a matrix is a copy although its weights are raw: heads in an order that strides cannot give."""
        site = self.sites[layer][matrix]
        return _storage(site.weight) != _storage(getattr(site.module, site.parameter))

    def shape(self, layer: int, matrix: str) -> tuple[int, ...] | None:
        """Of `matrix`, without making it."""
        site = self.sites[layer].get(matrix)
        return None if site is None else tuple(site.weight.shape)

    def bias(self, layer: int, name: str) -> Tensor | None:
        site = self.sites[layer].get("W" + name[1:])
        return None if site is None else site.bias

    def embedding(self) -> Tensor:
        return self.inner.get_input_embeddings().weight

    def unembedding(self) -> Tensor:
        head = self.inner.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"expected a model with an unembedding, got {type(self.inner).__name__} without; pass subspaces of the "
                "stream only, or the class that ends in ForCausalLM"
            )
        W_U = head.weight.mT
        if not self.has_unembedding:
            raise ValueError(
                f"expected an unembedding that reads the stream of width {self.d_model}, got one of width {len(W_U)} "
                f"in {type(self.inner).__name__}; pass a model whose head is linear"
            )
        narrowing: Any = getattr(_parent_of_layers(self.inner, self.blocks), "project_out", None)
        # OPT 350M predicts from a narrower space, into which it projects the stream.
        return W_U if len(W_U) == self.d_model else getattr(narrowing, WRAPPED, narrowing).weight.mT @ W_U

    @property
    def has_unembedding(self) -> bool:
        """Whether the unembedding multiplies the stream, or a linear map of it."""
        head = self.inner.get_output_embeddings()
        narrowed = getattr(_parent_of_layers(self.inner, self.blocks), "project_out", None) is not None
        return head is not None and (head.weight.shape[1] == self.d_model or narrowed)

    def final_gain(self) -> Tensor | None:
        return None if self._final is None else norm_gain(self._final, self.d_model)

    @property
    def is_tied(self) -> bool:
        head = self.inner.get_output_embeddings()
        return head is not None and _storage(head.weight) == _storage(self.embedding())

    # -- modules -----------------------------------------------------------------------------------

    def point(self, layer: int, point: str) -> tuple[nn.Module, str] | None:
        """The module to watch and whether its "input" or its "output" is the wanted tensor."""
        hooked_there = None if self._hooked is None else self._hooked.point(layer, point)
        if hooked_there is not None:
            return hooked_there
        sites = self.sites[layer]

        def entrance(*names: str) -> tuple[nn.Module, str] | None:
            return next(((sites[n].module, "input") for n in names if n in sites), None)

        match point:
            case "resid_pre":
                return self.blocks[layer], "input"
            case "resid_post":
                return self.blocks[layer], "output"
            case "resid_mid":
                return self._anatomy[layer].mid
            case "attn_in":
                return entrance("W_Q", "W_DQ", "W_DKV", *(n for n in sites if kind_of(n).point == "attn_in"))
            case "mlp_in":
                return entrance("W_router", "W_in", "W_gate", "W_in_shared")
            case "z":
                return entrance("W_O")
            case "q_latent":
                return entrance("W_UQ")
            case "kv_latent":
                return entrance("W_UK")
            case "mlp_post":
                return None if self.is_moe(layer) else entrance("W_out")
            case "mlp_post_shared":
                return entrance("W_out_shared")
        return entrance(point)

    def latent_gain(self, layer: int, latent: str) -> Tensor | None:
        """What the norm behind the map into a latent multiplies by; None where there is no such norm."""
        into = "W_DQ" if latent == "q_latent" else "W_DKV"
        out_of = self.sites[layer].get("W_UQ" if latent == "q_latent" else "W_UK")
        if into not in self.sites[layer] or out_of is None:
            return None
        width = out_of.weight.shape[-2]
        for module in self.blocks[layer].modules():
            if out_of.module in module.children():
                norm = getattr(module, f"{'q' if latent == 'q_latent' else 'kv'}_a_layernorm", None)
                gain = None if norm is None else norm_gain(norm, width)
                # As stored where that is the gain: asked of the norm it has float32's digits, and gains are subtracted.
                stored = getattr(norm, "weight", None)
                same = gain is not None and stored is not None and torch.allclose(gain, stored, rtol=1e-3, atol=1e-6)
                return stored if same else gain
        return None

    def routing(self, layer: int, show: RoutingReader) -> list[Hook]:
        """Hooks that show what the layer's router decides; none without a mixture, or where it cannot be seen."""
        sites = self.sites[layer]
        stacked = next((site for site in sites.values() if site.unit == "expert"), None)
        if stacked is None:
            return []
        router = sites["W_router"].module if "W_router" in sites else None
        return routing_hooks(stacked.module, len(stacked.weight), router, show)

    def projection(self, layer: int, matrix: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]] | None:
        """The module whose output holds `input @ matrix + bias`, and how to take that matrix's part of it."""
        site = self.sites[layer].get(matrix)
        if site is None:
            return None
        kind = type(site.module)
        gives_product = kind.forward is nn.Linear.forward or kind.__name__ == "Conv1D"
        return (site.module, site.part_of_output) if gives_product else None  # others: experts, most routers

    @cached_property
    def _hooked(self) -> BridgeAdapter | None:
        """The Bridge with its own hook points, where only the MLPs are out of the ordinary (a mixture)."""
        if self.inner is self.model or type(self.inner).__name__.startswith(_MUTE_HOOKS):
            return None
        if has_like_layers(self.inner):  # then it is the Bridge that lacks a part of the MLP
            return None
        attention = [{n: s.weight.shape for n, s in sites.items() if n in ATTENTION} for sites in self.sites]
        like = all(len(shapes) == len(ATTENTION) and shapes == attention[0] for shapes in attention)
        further = {n for sites in self.sites for n in sites if n in MATRICES and kind_of(n).part == "attn"}
        return BridgeAdapter(self.model) if like and further == {*ATTENTION} else None

    @property
    def names_hooks(self) -> bool:
        """Whether its blocks have TransformerLens's hook points."""
        return self._hooked is not None

    def norms(self, layer: int) -> dict[str, nn.Module]:
        """The layer's norms by where they stand; none where TransformerLens does not name them."""
        return {} if self._hooked is None else self._hooked.norms(layer)

    def norm_form(self, norm: nn.Module) -> tuple[Tensor | None, bool]:
        """A norm's gain as multiplied (None where it has none), and whether it subtracts the mean."""
        return norm_gain(norm, self.d_model), subtracts_mean(norm, self.d_model)

    @property
    def splits_inputs(self) -> str | None:
        return None if self._hooked is None else self._hooked.splits_inputs

    # -- running -----------------------------------------------------------------------------------

    def run(self, tokens: Tensor, logits: bool, layers: int) -> Tensor | None:
        options: dict[str, Any] = {"use_cache": False} if self._takes_use_cache else {}
        hooks: list[Any] = own_positions(self.model, len(tokens))
        if not logits:
            hooks.append((self.blocks[layers - 1], "output", _stop))
        with hooked(hooks), suppress(_Stopped):
            found = self.inner(input_ids=tokens, **options)
            return found.logits if logits else None
        return None

    def run_block(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        return self.blocks[layer](*args, **kwargs)

    def all_modules(self) -> Iterator[nn.Module]:
        seen: set[int] = set()
        for root in (self.model, self.inner):
            for module in root.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        return self.inner.named_parameters()

    # -- parameters that are no matrices -------------------------------------------------------------

    def headless(self) -> dict[str, Callable[[], Tensor]]:
        """Name → function giving the tensor, for all parameters that no site covers.

        Where a TransformerBridge has a name for them (norms, biases, embeddings beside whole attentions), that one, so
        that a HookedTransformer of the same model has it too; transformers' own elsewhere.
        """
        covered = {_storage(getattr(site.module, site.parameter)) for sites in self.sites for site in sites.values()}
        if self._hooked is not None:
            entries = self._hooked.headless()
            return {name: made for name, made in entries.items() if _storage(made()) not in covered}
        entries = {"embed.W_E": self.embedding}
        head = self.inner.get_output_embeddings()
        if self.has_unembedding:
            entries["unembed.W_U"] = self.unembedding
        covered |= {_storage(self.embedding()), *([] if head is None else [_storage(head.weight)])}
        for name, parameter in self.inner.named_parameters():
            if _storage(parameter) not in covered:
                entries[".".join(part for part in name.split(".") if part != WRAPPED)] = partial(_itself, parameter)
        return entries

    # -- what a few tokens show ----------------------------------------------------------------------

    @cached_property
    def _anatomy(self) -> list[Anatomy]:
        watching = seen_in(self.blocks, self.active_stream or 0)
        with torch.no_grad(), evaluation(self.model, self.all_modules()), watching as seen:
            self.run(self._probe_tokens(), False, len(self.blocks))
        return [
            layer_anatomy(block, self.sites[i], self.point(i, "attn_in"), self.point(i, "mlp_in"), seen)
            for i, block in enumerate(self.blocks)
        ]

    def _last_stream(self, tokens: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, out: Any) -> None:
            kept.append(out[0] if isinstance(out, tuple | list) else out)

        last = (self.blocks[-1], "output", keep)
        with torch.no_grad(), evaluation(self.model, self.all_modules()), hooked([last]):
            self.run(tokens, False, len(self.blocks))
        return kept[0]

    def _probe_tokens(self) -> Tensor:
        ids = torch.arange(_PROBE_TOKENS, device=self.embedding().device) * 37 + 5
        return (ids % self.embedding().shape[0]).unsqueeze(0)


# -- recognising ------------------------------------------------------------------------------------------------------


def is_transformers_model(model: Any) -> bool:
    """Whether a model is one of transformers: it has a configuration and embeddings for tokens."""
    return isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "get_input_embeddings")


def is_regular(bridge: Any) -> bool:
    """Whether a TransformerBridge has the seven matrices of a transformer, in one shape and with hooks of their own.

    Hybrids, mixtures, latent attention and further maps are seen through the model that it wraps; so are those whose
    hooks do not show what the modules work on.
    """
    inner = bridge.original_model
    if not hasattr(bridge, "blocks") or not all(hasattr(block, "attn") for block in bridge.blocks):
        return False
    if not is_transformers_model(inner) or type(inner).__name__.startswith("GPT2"):
        return True
    if type(inner).__name__.startswith(_MUTE_HOOKS):
        return False
    sites = _all_sites(inner)
    return _alike(sites) and _shows_whole_mlps(BridgeAdapter(bridge), sites[0])


def _shows_whole_mlps(adapter: BridgeAdapter, sites: dict[str, Site]) -> bool:
    """Whether a Bridge has the MLP's matrices that the model has, no two of them as one and none left out."""
    there = {name: tuple(site.weight.shape) for name, site in sites.items() if kind_of(name).part == "mlp"}
    shown = {name: adapter.shape(0, name) for name in adapter.names if kind_of(name).part == "mlp"}
    return there == {name: shape for name, shape in shown.items() if shape is not None}


def has_like_layers(model: Any) -> bool:
    """Whether all layers of a transformers model have the same matrices of those that any transformer has, no others.

    Weights are not looked at: a model on the meta device will do.
    """
    return _alike(_all_sites(model))


def _alike(layers: list[dict[str, Site]]) -> bool:
    shapes = [{name: (site.unit, tuple(site.weight.shape)) for name, site in sites.items()} for sites in layers]
    experts = any(unit == "expert" for layer in shapes for unit, _ in layer.values())
    return set(shapes[0]) <= set(BridgeAdapter.names) and not experts and all(layer == shapes[0] for layer in shapes)


# -- finding -----------------------------------------------------------------------------------------------------------


def _text_config(model: Any) -> Any:
    """The configuration of the language model, where another one wraps it."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def _width(model: Any) -> int:
    names = ("hidden_size", "n_embd", "d_model", "dim")
    return int(_first(_text_config(model), names, model.get_input_embeddings().weight.shape[-1]))


def _heads_said(model: Any) -> int:
    return int(_first(_text_config(model), ("num_attention_heads", "n_head", "n_heads", "num_heads"), 1) or 1)


def _all_sites(model: Any) -> list[dict[str, Site]]:
    d, heads = _width(model), _heads_said(model)
    return [layer_sites(block, d_model=d, n_heads=heads) for block in _layers(model)]


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    return next((v for v in (getattr(config, n, None) for n in names) if v is not None), default)


def _layers(model: Any) -> list[Any]:
    """The blocks of the language model: the longest list of modules with linear maps that is not another tower's."""
    wanted = _first(_text_config(model), ("num_hidden_layers", "n_layer", "num_layers", "n_layers"), None)
    # BERT's layers lie in its "encoder"; those of an encoder-decoder are another stream's.
    foreign = (*_FOREIGN, "encoder.") if getattr(model.config, "is_encoder_decoder", False) else _FOREIGN
    best: list[Any] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or ".experts" in name or any(w in f"{name}." for w in foreign):
            continue
        if not any(True for block in module for _ in linear_maps(block)):
            continue
        if len(module) == wanted:
            return list(module)
        best = list(module) if len(module) > len(best) else best
    if not best:
        raise ValueError(
            f"expected a list of layers in {type(model).__name__}, got none; pass a transformer of transformers"
        )
    return best


def _other_stacks(model: Any, blocks: list[Any]) -> list[str]:
    """Lists of layers of the same class beside the language model's: recurrent models call several in turns."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not any(word in f"{name}." for word in _FOREIGN)
        and any(type(block) is type(blocks[0]) for block in module)
        and all(block is not blocks[0] for block in module)
    ]


def _parent_of_layers(model: Any, blocks: list[Any]) -> nn.Module:
    for module in model.modules():
        for held in module._modules.values():
            if isinstance(held, nn.ModuleList) and len(held) == len(blocks) and held[0] is blocks[0]:
                return module
    raise ValueError(f"expected the layers of {type(model).__name__} in one list, got none; pass a whole model")


def _stop(*_: Any) -> None:
    raise _Stopped


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
