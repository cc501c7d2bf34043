"""One view of HookedTransformer and TransformerBridge: matrices, exact inputs, hook points, parameters.

The rest of the package knows a model only through `ModelView`. What differs between the two kinds is in
`hooked.HookedAdapter` and `bridge.BridgeAdapter`; neither TransformerLens class is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_asymmetry.geometry.precision import exact_products, product_dtype
from tl_asymmetry.models.bridge import BridgeAdapter, Scaled
from tl_asymmetry.models.encoders import encoder_adapter, is_encoder
from tl_asymmetry.models.hooked import HookedAdapter
from tl_asymmetry.models.huggingface import PLAIN, HuggingFaceAdapter, is_regular, is_transformers_model
from tl_asymmetry.models.loading import opened_model
from tl_asymmetry.models.put_in import foreign_hooks, foreign_modules, refuse_elsewhere, refuse_packed, refuse_unmerged
from tl_asymmetry.models.readers.hub import public_name
from tl_asymmetry.models.routing import RoutingReader
from tl_asymmetry.models.running import evaluation, hooked
from tl_asymmetry.models.sites import Site
from tl_asymmetry.names import EXPERT_INPUT, LATENTS, MATRICES, POINTS, ROUTING, kind_of, reads_latent
from tl_asymmetry.notes import warn

Reader = Callable[[Tensor], None]

Projection = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A module, and from its output the part that is one matrix's."""


@dataclass(frozen=True)
class Slot:
    """Where a model keeps a parameter: `Module.to` and `load_state_dict(assign=True)` put another tensor there."""

    module: nn.Module
    """Its module."""
    name: str
    """Its name there."""

    def shares(self, tensor: Tensor) -> bool:
        """Whether a tensor is a view of what is there now."""
        parameter = self.module._parameters.get(self.name)
        return parameter is not None and _address(parameter) == _address(tensor)


class Parameters(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for, so that a scaled embedding is not held for nothing."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]().detach()

    def unscaled(self, name: str) -> tuple[Tensor, float]:
        """A tensor and what it is to be multiplied by: of a scaled embedding no copy is made."""
        maker = self._makers[name]
        return (maker.tensor().detach(), maker.factor) if isinstance(maker, Scaled) else (self[name], 1.0)

    def __contains__(self, name: object) -> bool:
        return name in self._makers  # Mapping's own would make the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __repr__(self) -> str:
        return f"Parameters({list(self)})"


class ModelView:
    """A HookedTransformer, a TransformerBridge or a model of transformers, seen the same way.

    Nothing is copied and nothing in the model is changed: `weight` gives live views, `hooks` removes what it
    added.

    Args:
        model: a HookedTransformer (transformer-lens 3.x), a TransformerBridge (3.9 and later), a `PreTrainedModel` of
            transformers, decoder or encoder; or a folder or name on the Hub, which is opened in the dtype that it is
            stored in (`loading.open_model`).
        like: where `model` is opened here, open it as this one is: on its device, at least as wide, and as transformers
            has it where this one is.

    Raises:
        ValueError: for anything else, encoder-decoders and models with un-merged adapters included.

    Example:
        >>> view = ModelView(model)
        >>> tuple(view.weight(0, "W_Q").shape)
        (4, 64, 16)
        >>> seen = []
        >>> with view.hooks({("attn_in", 0): lambda x: seen.append(tuple(x.shape))}):
        ...     view.run(torch.zeros(2, 8, dtype=torch.int64))
        >>> seen
        [(2, 8, 64)]
    """

    model: Any
    """The model itself."""
    kind: str
    """"HookedTransformer", "TransformerBridge" or "HookedEncoder"."""
    name: str
    """The model's name as its configuration has it; a directory for a local model."""
    n_layers: int
    """Number of blocks."""
    d_model: int
    """Width of the residual stream."""
    n_heads: int
    """Query heads per layer."""
    n_kv_heads: int
    """Key and value heads per layer; fewer than `n_heads` under grouped-query attention."""
    d_head: int
    """Width of one head."""
    d_mlp: int | None
    """Hidden width of the MLP; None where the model has no dense MLP."""
    d_vocab: int
    """Number of token embeddings."""
    n_ctx: int
    """Longest sequence the model takes, in tokens."""
    norm: str | None
    """Kind of the final norm: "LN", "RMS", or None for no norm."""
    positional: str
    """Positional embedding: "standard", "rotary", "alibi", ..."""
    parallel: bool
    """Whether attention and MLP read the same stream, so that there is no `resid_mid`."""
    causal: bool
    """Whether a position sees only itself and earlier ones."""
    encoder: bool
    """Whether every token sees every other, so that it predicts masked tokens, if any."""
    key_shift_invariant: bool
    """Whether a shift of all keys by one vector leaves attention unchanged: no rotary embedding, query-key norm, score
    soft cap or attention sink."""
    matrices: tuple[str, ...]
    """Those of `MATRICES` that every layer of this model has, in one shape."""
    irregular: tuple[str, ...]
    """Those that some layers lack or have in another shape, of which each expert has its own, that read a latent, or
    that have no name but their module's path."""
    notes: tuple[str, ...]
    """Plain sentences about what the reader of a result must know of this model."""

    def __init__(self, model: Any, *, like: ModelView | None = None) -> None:
        opening: tuple[str, ...] = ()
        if isinstance(model, str | Path):
            model, opening = _opened_like(model, like)
            for note in opening:
                warn(note)
        refuse_unmerged(model)
        refuse_packed(model)
        try:
            self._read(model)
        except (AttributeError, TypeError) as error:  # of a module that lacks what the model's own has
            found = foreign_modules(model) if isinstance(model, nn.Module) else []
            if not found:
                raise
            raise ValueError(
                f"expected the model's own modules, got {', '.join(found[:3])} ({error}); pass the model with its own"
            ) from error
        self.notes = (*opening, *self.notes)

    def _read(self, model: Any) -> None:
        self.model = model
        self._adapter = adapter = _adapter_for(model)
        self._slots: dict[tuple[int, str], Slot] = {}
        cfg = adapter.cfg
        self.kind = adapter.kind
        self.name = public_name(getattr(cfg, "model_name", None) or "unnamed")
        self.n_layers = len(adapter.blocks)
        self.d_model, self.d_head, self.n_heads = int(cfg.d_model), int(cfg.d_head), int(cfg.n_heads)
        self.n_kv_heads = int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads)
        self.d_vocab = adapter.embedding().shape[0]
        self.n_ctx = int(cfg.n_ctx)
        self.norm = adapter.final_norm
        self.positional = str(cfg.positional_embedding_type)
        self.parallel = adapter.is_parallel
        self.causal = adapter.is_causal
        self.encoder = adapter.is_encoder
        cap = getattr(cfg, "attn_scores_soft_cap", None)
        self.key_shift_invariant = not (
            self.positional == "rotary" or adapter.has_qk_norm or adapter.has_sinks or (cap is not None and cap > 0)
        )
        shapes = {m: [adapter.shape(layer, m) for layer in range(self.n_layers)] for m in adapter.names}
        self._shapes = {matrix: each for matrix, each in shapes.items() if any(shape is not None for shape in each)}
        regular = [m for m, each in self._shapes.items() if len(set(each)) == 1 and adapter.unit(m) != "expert"]
        self.matrices = tuple(m for m in regular if m in MATRICES and not reads_latent(m))
        self.irregular = tuple(m for m in self._shapes if m not in self.matrices)
        W_in = self._shapes["W_in"][0] if "W_in" in self.matrices else None
        self.d_mlp = None if W_in is None else W_in[1]
        self.notes = self._notes()
        if self.positional == "shortformer":
            raise ValueError(
                "expected positional embeddings that enter the residual stream or the scores, got 'shortformer'; "
                "pass a model whose queries, keys and values have one common input"
            )

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers, d_model {self.d_model}, {self.n_heads} heads"
        return f"ModelView({self.kind} {self.name!r}, {shape})"

    def _notes(self) -> tuple[str, ...]:
        adapter, notes = self._adapter, self._irregularities()
        repeats = getattr(adapter, "repeats", 1)
        if repeats > 1:
            notes.append(
                f"each pass goes through the layers {repeats} times: inputs and streams are those of the first time"
            )
        if adapter.active_stream is not None:
            notes.append(
                "several residual streams side by side: resid_pre and resid_post show the one that attention and MLP "
                "read; the logits come from the mean of all"
            )
        if not self.has_unembedding:
            notes.append("no unembedding: nothing is held against what the model predicts")
        if adapter.is_encoder and adapter.norms_stream:
            notes.append(
                "post-norm encoder: W_Q, W_K and W_V read the stream itself, W_in what the block's first norm gives; a "
                "block's output is what its second norm gives"
            )
        elif adapter.has_post_norms:
            *others, last = adapter.rescaled
            several = f"{', '.join(others)} and {last} are" if others else f"{last} is"
            notes.append(
                f"{several} followed by a norm before the residual stream: what is written is rescaled there, "
                "direction by direction, so write fractions describe the norm's input"
            )
        if adapter.is_encoder and adapter.has_layer_in_head:
            notes.append(
                "the head has a layer of its own between the stream and the unembedding: prediction directions are "
                "those that the unembedding reads behind that layer, and directions of the stream only as far as it "
                "leaves them as they are"
            )
        return (*notes, *adapter.remarks)

    def _irregularities(self) -> list[str]:
        """Which layers have the matrices that are not the same everywhere, what is alike said once."""
        alike: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for matrix in self.irregular:
            by_unit: dict[str | None, dict[int, tuple[int, ...]]] = {}
            for layer, shape in enumerate(self._shapes[matrix]):
                if shape is not None:
                    by_unit.setdefault(self.unit(layer, matrix), {})[layer] = shape
            if reads_latent(matrix) and len(set(self._shapes[matrix])) == 1:
                continue  # every layer has it; what it reads is said where it is measured
            for unit, of_layers in by_unit.items():
                layers, shapes = tuple(of_layers), [*of_layers.values()]
                experts = sorted({shape[0] for shape in shapes}) if unit == "expert" else []
                each = f", one for each of {' or '.join(map(str, experts))} experts" if experts else ""
                widths = "" if experts or len(set(shapes)) == 1 else ", not all of one shape"
                alike.setdefault((layers, each or widths), []).append(matrix)
        return [
            f"{self._layers_in_words(layers)} {', '.join(matrices)}{which}"
            for (layers, which), matrices in alike.items()
        ]

    def _layers_in_words(self, layers: Sequence[int]) -> str:
        """Which layers have something, as the beginning of a sentence."""
        if len(layers) == self.n_layers:
            return "every layer has"
        return f"layer {layers[0]} alone has" if len(layers) == 1 else f"{len(layers)} of {self.n_layers} layers have"

    # -- where things are --------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the embedding."""
        return self._adapter.embedding().dtype

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where tokens go."""
        return self._adapter.embedding().device

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def has_masked_lm_head(self) -> bool:
        """Whether an encoder can predict masked tokens; False for a decoder."""
        return getattr(self._adapter, "has_masked_lm_head", False)

    @property
    def has_unembedding(self) -> bool:
        """Whether it predicts tokens from its stream: an encoder of sentences may not."""
        return self._adapter.has_unembedding

    @property
    def tied(self) -> bool:
        """Whether the unembedding is the embedding (one storage, or equal bit for bit)."""
        return self._adapter.is_tied

    def heads(self, matrix: str) -> int | None:
        """Number of heads of a matrix: `n_heads`, `n_kv_heads`, or None for a matrix without heads.

        Where layers differ, the most that one has.
        """
        self._require_matrix(matrix)
        return max(shape[0] for shape in self._shapes[matrix] if shape is not None) if kind_of(matrix).heads else None

    def experts(self, matrix: str) -> int | None:
        """Number of experts that have a matrix of their own, in the layer with the most; None where none has."""
        self._require_matrix(matrix)
        shapes = enumerate(self._shapes[matrix])
        counts = [shape[0] for layer, shape in shapes if shape is not None and self.unit(layer, matrix) == "expert"]
        return max(counts, default=None)

    def expert_count(self, layer: int) -> int:
        """Number of experts of a layer that have matrices of their own; 0 without a mixture."""
        there = [m for m in self.irregular if self.has(layer, m) and self.unit(layer, m) == "expert"]
        return max(((self._shapes[m][layer] or (0,))[0] for m in there), default=0)

    def unit(self, layer: int, matrix: str) -> str | None:
        """What a layer has several of in one matrix: "head", "expert", or None."""
        if kind_of(matrix).heads:
            return "head"
        shape = self._shapes[matrix][layer] if self.has(layer, matrix) else None
        return "expert" if shape is not None and len(shape) == 3 else None

    def entries(self, matrix: str) -> int:
        """Entries of a matrix, all heads or experts together, in the layer where it is largest."""
        self._require_matrix(matrix)
        return max(math.prod(shape) for shape in self._shapes[matrix] if shape is not None)

    def has(self, layer: int, matrix: str) -> bool:
        """Whether a layer has a matrix of that name."""
        self._require_layer(layer)
        return matrix in self._shapes and self._shapes[matrix][layer] is not None

    def kv_head(self, head: int) -> int:
        """The key and value head that serves query head `head`."""
        if not 0 <= head < self.n_heads:
            raise ValueError(f"expected a head from 0 to {self.n_heads - 1}, got {head}; pass a query head's index")
        return head // (self.n_heads // self.n_kv_heads)

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in order."""
        return self._adapter.blocks

    # -- matrices ----------------------------------------------------------------------------------

    def weight(self, layer: int, matrix: str) -> Tensor:
        """A matrix in TransformerLens orientation, as a live view without gradient history.

        Shapes: W_Q `[n_heads, d_model, d_head]`; W_K, W_V `[n_kv_heads, d_model, d_head]`, never expanded
            to the query heads; W_O `[n_heads, d_head, d_model]`; W_in, W_gate `[d_model, d_mlp]`; W_out
            `[d_mlp, d_model]`; W_UQ, W_UK, W_UV `[n_heads, latent, width]`. Editing it in place edits the model.

        Raises:
            ValueError: no such layer or matrix; a quantised matrix; a copy (what the wrapper computed on
                the fly).
        """
        weight = self._weight(layer, matrix)
        # Fake and meta tensors have no address, so there a copy cannot be told from a view.
        if _address(weight) and not self._adapter.rearranges(layer, matrix):
            self._slot(layer, matrix, weight)
        return weight

    def weight_and_slot(self, layer: int, matrix: str) -> tuple[Tensor, Slot]:
        """What `weight` gives, and where the model keeps the parameter that it is a view of.

        Raises:
            ValueError: as `weight`.
        """
        weight = self._weight(layer, matrix)
        return weight, self._slot(layer, matrix, weight)

    def _slot(self, layer: int, matrix: str, weight: Tensor) -> Slot:
        slot = self._slots.get((layer, matrix))
        if slot is None or not slot.shares(weight):
            modules = self._adapter.blocks[layer].modules()
            places = (Slot(module, name) for module in modules for name in module._parameters)
            slot = next((place for place in places if place.shares(weight)), None)
            if slot is None:
                instead = "a model with raw weights (a TransformerBridge without enable_compatibility_mode)"
                if self._adapter.rearranges(layer, matrix):
                    instead = "another matrix: the model keeps this one's heads in an order that no view can give"
                raise ValueError(f"expected a live view of blocks.{layer} {matrix}, got a copy; pass {instead}")
            self._slots[layer, matrix] = slot
        return slot

    def _weight(self, layer: int, matrix: str) -> Tensor:
        self._require_layer(layer)
        self._require_matrix(matrix)
        weight = self._adapter.matrix(layer, matrix)
        if weight is None:
            there = ", ".join(m for m in (*self.matrices, *self.irregular) if self.has(layer, m))
            raise ValueError(f"expected a matrix that layer {layer} has, got {matrix!r}; pass one of {there}")
        weight = weight.detach()
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(
                f"expected floating-point weights of 16 bits or more, got {weight.dtype} in blocks.{layer} {matrix}; "
                "pass the model loaded without quantisation"
            )
        expected = self._shapes[matrix][layer]
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"expected blocks.{layer} {matrix} of shape {expected}, got {tuple(weight.shape)}; "
                "pass a model whose layers all have the same shape"
            )
        return weight

    def bias(self, layer: int, matrix: str) -> Tensor | None:
        """The bias added after `input @ matrix` (`[head, d_head]` for W_Q, W_K, W_V), or None if the model
        has none."""
        self._require_layer(layer)
        self._require_matrix(matrix)
        bias = self._adapter.bias(layer, "b" + matrix[1:])
        return None if bias is None else bias.detach()

    def is_live(self, tensor: Tensor) -> bool:
        """Whether a tensor shares storage with a parameter of the model, so that editing it edits the
        model."""
        return _shares_storage(tensor, (p for _, p in self._adapter.parameters()))

    def unembedding(self) -> tuple[Float[Tensor, "d_model d_vocab"], Float[Tensor, " d_model"] | None, bool]:
        """The prediction matrix and the norm before it: `(W_U, gain, center)`.

        W_U is live. `gain` is what the final norm multiplies by (Gemma's 1 + w), None without gain. `center`
        says whether that norm subtracts the mean over d_model (LayerNorm).
        """
        gain = self._adapter.final_gain()
        return (
            self._adapter.unembedding().detach(),
            None if gain is None else gain.detach(),
            self.norm == "LN",
        )

    def embedding(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding W_E, live; as stored (Gemma multiplies it by √d_model in the forward pass)."""
        return self._adapter.embedding().detach()

    # -- other parameters --------------------------------------------------------------------------

    def headless(self, *, include_tied: bool = False) -> Parameters:
        """All parameters that belong to none of `MATRICES`: biases, norm gains, embeddings, positions, experts.

        Keys are HookedTransformer's on both kinds (`blocks.0.ln1.w`, `blocks.0.attn.b_Q`, `embed.W_E`, `unembed.b_U`,
        ...), with its conventions: gains as multiplied, Gemma's embeddings times √d_model, missing biases as
        zeros, key and value biases per KV head. Parameters without such a name (experts) keep the model's
        own.

        Args:
            include_tied: list `unembed.W_U` also when it is the embedding. For a pair in which only one model is tied,
                ask for it on both.
        """
        makers = self._adapter.headless()
        if not include_tied and self.tied:
            makers.pop("unembed.W_U", None)
        return Parameters(makers)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter once, the matrices first (`blocks.0.attn.W_Q`, ...), then those of `headless`."""
        for name, weight, scale in self.unscaled_weights():
            yield name, weight if scale == 1 else weight * scale

    def unscaled_weights(self) -> Iterator[tuple[str, Tensor, float]]:
        """The same as they lie, and what each is to be multiplied by: of a scaled embedding no copy is made."""
        for layer in range(self.n_layers):
            for matrix in self._adapter.names:
                weight = self._adapter.matrix(layer, matrix)
                if weight is not None:
                    part = f"{kind_of(matrix).part}." if matrix in MATRICES else ""
                    yield f"blocks.{layer}.{part}{matrix}", weight.detach(), 1.0
        others = self.headless()
        for name in others:
            yield name, *others.unscaled(name)

    def latent_width(self, layer: int, latent: str) -> int:
        """Width of a latent; 0 where a layer has none."""
        matrix = "W_UQ" if latent == "q_latent" else "W_UK"
        shape = self._shapes[matrix][layer] if self.has(layer, matrix) else None
        return 0 if shape is None else shape[-2]

    def latent_gain(self, layer: int, latent: str) -> Tensor | None:
        """What the norm between a latent and what reads it multiplies by; None without a norm."""
        adapter = self._adapter
        gain = adapter.latent_gain(layer, latent) if isinstance(adapter, HuggingFaceAdapter) else None
        return None if gain is None else gain.detach()

    def stamp(self) -> tuple[tuple[int, int], ...] | None:
        """Address and version of every parameter: another one when weights were moved or changed in place, at no cost.

        Torch counts no change made through `.data`. None where a parameter has no version (inference tensors).
        """
        weights = [weight for _, weight in self._adapter.parameters()]
        if any(weight.is_inference() for weight in weights):
            return None
        return tuple((weight.data_ptr(), weight._version) for weight in weights)

    # -- running -----------------------------------------------------------------------------------

    def shows(self, layer: int, point: str) -> bool:
        """Whether a layer has that point; "routing" and an expert's input where it has experts and their router's
        choice can be seen."""
        if point == ROUTING or point.startswith(EXPERT_INPUT):
            expert = 0 if point == ROUTING else int(point.rpartition(":")[2])
            return expert < self.expert_count(layer) and bool(self._adapter.routing(layer, lambda routing: None))
        return self._adapter.point(layer, point) is not None

    def has_point(self, point: str) -> bool:
        """Whether every layer of the model has that point."""
        if point not in POINTS:
            raise ValueError(f"expected a point among {', '.join(POINTS)}, got {point!r}; pass one of these")
        return all(self._adapter.point(layer, point) is not None for layer in range(self.n_layers))

    def residual_point(self, matrix: str) -> str:
        """Where a matrix's residual side is seen: its input, or the stream it writes into (W_O: after attention, or
        after the block where attention and MLP are parallel)."""
        if kind_of(matrix).reads:
            return kind_of(matrix).point
        return "resid_mid" if kind_of(matrix).part == "attn" and self.has_point("resid_mid") else "resid_post"

    def hooks(self, readers: Mapping[tuple[str, int], Reader]) -> AbstractContextManager[None]:
        """Show readers the tensors that pass certain points, until the context ends.

        A reader gets `[batch, pos, d_model]`, for "z" `[batch, pos, n_heads, d_head]`, for "mlp_post"
        `[batch, pos, d_mlp]`: the tensor the model goes on with, with its gradient history, to be read at
        once and not edited. "attn_in" and "mlp_in" are behind the norm, gain and bias included: the exact
        inputs of W_Q, W_K, W_V and of W_in, W_gate. Whatever ends the context, an exception and Ctrl-C
        included, these hooks are removed, and no others. Passes of other threads are not shown.

        Args:
            readers: `{(point, layer): function of the tensor}`.

        Raises:
            ValueError: no such point or layer, or heads that each have their own attention input.
        """
        leading: dict[int, torch.Size] = {}
        watches = [self._watch(point, layer, reader, leading) for (point, layer), reader in readers.items()]
        notes = [self._note_leading(layer, leading) for layer in {layer for _, layer in readers}]
        return hooked([*notes, *watches])

    def routings(self, readers: Mapping[int, RoutingReader]) -> AbstractContextManager[None]:
        """Show readers what routers decide, until the context ends.

        Args:
            readers: by layer, functions of a `Routing`.

        Raises:
            ValueError: a layer without a mixture whose routing can be seen.
        """
        hooks = []
        for layer, show in readers.items():
            of_layer = self._adapter.routing(layer, show)
            if not of_layer:
                raise ValueError(f"expected a layer whose routing can be seen, got {layer}; pass one of a mixture")
            hooks += of_layer
        return hooked(hooks)

    def _note_leading(self, layer: int, leading: dict[int, torch.Size]) -> tuple[nn.Module, str, Callable[..., None]]:
        """Note `[batch, pos]` of what comes into a block: some modules inside see the two in one."""

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            leading[layer] = self._active(first_tensor(args, kwargs)).shape[:2]

        return self.blocks[layer], "input", note

    def _active(self, x: Tensor) -> Tensor:
        """Of several streams that come one after the other, `[stream, batch, pos, d_model]`, the one that is read."""
        stream = self._adapter.active_stream
        return x if stream is None or x.ndim < 4 else x[stream]

    def _watch(
        self, point: str, layer: int, reader: Reader, leading: Mapping[int, torch.Size]
    ) -> tuple[nn.Module, str, Callable[..., None]]:
        self._require_layer(layer)
        if point not in POINTS and point not in self._shapes:
            raise ValueError(f"expected a point among {', '.join(POINTS)}, got {point!r}; pass one of these")
        split = self._adapter.splits_inputs
        if split is not None and point == "attn_in":
            raise ValueError(f"expected one attention input for all heads, got {split}=True; pass a model with it off")
        where = self._adapter.point(layer, point)
        if where is None:
            present = ", ".join(p for p in POINTS if self._adapter.point(layer, p) is not None)
            raise ValueError(f"expected a point that layer {layer} has, got {point!r}; pass one of {present}")
        module, side = where
        outputs = self._shapes.get("W_O", [None])[layer if "W_O" in self._shapes else 0]
        heads = (self.n_heads, self.d_head) if outputs is None else outputs[:2]  # layers may differ

        def show(x: Tensor) -> None:
            x = self._active(x)
            if point.startswith("resid") and x.ndim == 4:
                raise ValueError(
                    f"expected one residual stream, got {x.shape[-2]} side by side in {self.name!r}; pass a model with "
                    "one"
                )
            x = x.unflatten(0, leading[layer]) if x.ndim == 2 else x
            x = x.reshape(*leading[layer], -1) if point in LATENTS else x  # some keep an axis for the one latent "head"
            # the Bridge passes the heads' outputs side by side
            reader(x.unflatten(-1, heads) if point == "z" and x.ndim == 3 else x)

        def see_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            show(first_tensor(args, kwargs))

        def see_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            show(output[0] if isinstance(output, tuple | list) else output)

        return module, side, see_input if side == "input" else see_output

    def module_at(self, point: str, layer: int) -> tuple[nn.Module, str]:
        """The module behind a point, and whether the point is its "input" or its "output".

        Raises:
            ValueError: no such point or layer.
        """
        module, side, _ = self._watch(point, layer, lambda x: None, {})
        return module, side

    @property
    def inputs_at_products(self) -> bool:
        """Whether the module of a `projection` is called with the matrix's own input."""
        return self._adapter.inputs_at_products

    def projection(self, layer: int, matrix: str) -> Projection | None:
        """The module whose (first) output holds `input @ matrix + bias`, and how to take it from there; None where the
        model hides that product."""
        self._require_layer(layer)
        self._require_matrix(matrix)
        return self._adapter.projection(layer, matrix)

    def multiplied(self, layer: int, matrix: str) -> Site | None:
        """Where the model keeps a matrix whose product is no module's output: a layer's experts, all of them in one
        parameter, or a router; None for any other."""
        if not isinstance(self._adapter, HuggingFaceAdapter) or self.projection(layer, matrix) is not None:
            return None
        return self._adapter.sites[layer].get(matrix)

    def all_modules(self) -> Iterator[nn.Module]:
        """Every module of the model, the wrapped Hugging Face model's included, each once."""
        return self._adapter.all_modules()

    def foreign_hooks(self) -> list[str]:
        """Hooks and modules that a user has put into the model, in words."""
        return [*foreign_hooks(self.model), *foreign_modules(self.model)]

    def __call__(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits, as `run(tokens, logits=True)`: a view is a language model to any objective."""
        logits = self.run(tokens, logits=True)
        if logits is None:  # cannot happen: logits were asked for
            raise RuntimeError("the model returned no logits")
        return logits

    def run(
        self, tokens: Int[Tensor, "batch pos"], *, logits: bool = False, layers: int | None = None
    ) -> Tensor | None:
        """One forward pass in the mode (training or not, gradients or not) the caller has set.

        No attention mask is made from pad tokens: in a causal model, padding on the right leaves every
        earlier position as it is, and a pad token that occurs in the text is a token like others.

        Args:
            tokens: token ids.
            logits: return the logits `[batch, pos, d_vocab]`. Otherwise the final norm and the
                unembedding are left out.
            layers: without logits, run this many blocks and stop; all by default.
        """
        if layers is not None and (logits or not 1 <= layers <= self.n_layers):
            raise ValueError(
                f"expected layers from 1 to {self.n_layers}, without logits, got {layers}; pass None for the whole "
                "model"
            )
        return self._adapter.run(tokens.to(self.device), logits, self.n_layers if layers is None else layers)

    def run_block(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Call one block as the model was seen to call it; what it keeps of the call is dropped, as `run` does."""
        self._require_layer(layer)
        return self._adapter.run_block(layer, *args, **kwargs)

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode (no dropout) inside, and none of the options under which tensors pass other hooks
        (`running.HOOK_FLAGS`); afterwards the model is as it was."""
        return evaluation(self.model, self._adapter.all_modules())

    def self_check(self, tokens: Int[Tensor, "batch pos"]) -> float:
        """Verify on a few tokens that each matrix meets its exact input: `q = attn_in @ W_Q + b_Q` and so for all.

        Checks every layer and every matrix whose product the model exposes, W_O and W_out included.

        Returns:
            The largest error, relative to the largest entry of the product it occurs in.

        Raises:
            ValueError: an error beyond what the model's data type explains, activations that overflow.
        """
        tolerance = {torch.float64: 1e-8, torch.float32: 5e-3}.get(self.dtype, 5e-2)
        worst, where = 0.0, ""
        with torch.no_grad(), self.evaluating():
            for site, error in self._projection_errors(tokens):
                if not math.isfinite(error):
                    raise ValueError(overflowed(self, f"the product of {site}"))
                if error > worst:
                    worst, where = error, site
        if not worst <= tolerance:
            raise ValueError(
                f"expected {where} times its input to give what the model computes (relative error up to {tolerance:g} "
                f"in {self.dtype}), got {worst:.3g}; pass a model without edited hooks or weight processing"
            )
        return worst

    def _projection_errors(self, tokens: Tensor) -> Iterator[tuple[str, float]]:
        """For each layer and matrix with a visible product, the error of input times matrix; one forward pass."""
        sites = {
            (layer, matrix): projection
            for layer in range(self.n_layers)
            for matrix in (*self.matrices, *(m for m in self.irregular if reads_latent(m) and self.has(layer, m)))
            if (projection := self._adapter.projection(layer, matrix)) is not None
        }
        inputs: dict[tuple[str, int], Tensor] = {}
        outputs: dict[tuple[int, str], Tensor] = {}

        def keep(store: dict[Any, Tensor], key: Any) -> Callable[..., None]:
            def see(*arguments: Any) -> None:
                output = arguments[-1]
                output = (output[0] if isinstance(output, tuple) else output).detach()
                # A copy: some layers go on to add to a module's output in place.
                store[key] = output.to(product_dtype(output), copy=True)

            return see

        points = {(kind_of(matrix).point, layer) for layer, matrix in sites}
        products = [(module, "output", keep(outputs, site)) for site, (module, _) in sites.items()]
        with self.hooks({point: keep(inputs, point) for point in points}), hooked(products):
            self.run(tokens)
        for layer, matrix in sites:
            if (layer, matrix) not in outputs or (kind_of(matrix).point, layer) not in inputs:
                raise ValueError(
                    f"expected a model that computes with the modules that its matrices lie in, got {self.name!r}, "
                    f"where that of {matrix} in layer {layer} never ran; pass the model of transformers itself"
                )
            x, y = inputs[kind_of(matrix).point, layer], sites[layer, matrix][1](outputs[layer, matrix])
            W = self._weight(layer, matrix).to(x.dtype)
            if x.shape[-1] != W.shape[-2]:
                raise ValueError(
                    f"expected what enters {matrix} of layer {layer} in rows of {W.shape[-2]}, got {x.shape[-1]} in "
                    f"{self.name!r}; pass a model with one residual stream, whose heads lie side by side"
                )
            with exact_products(x.device):
                if kind_of(matrix).output_axis == "head":
                    expected = torch.einsum("bpd,hde->bphe", x, W)
                elif kind_of(matrix).heads:
                    expected = torch.einsum("bphe,hed->bpd", x, W)
                else:
                    expected = x @ W
            bias = self.bias(layer, matrix)
            expected = expected if bias is None else expected + bias.to(x.dtype)
            scale = expected.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
            yield f"blocks.{layer} {matrix}", float((y.reshape(expected.shape) - expected).abs().max() / scale)

    # -- refusals ----------------------------------------------------------------------------------

    def _require_layer(self, layer: int) -> None:
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"expected a layer from 0 to {self.n_layers - 1}, got {layer}; pass one of these")

    def _require_matrix(self, matrix: str) -> None:
        there = (*self.matrices, *self.irregular)
        if matrix not in there:
            raise ValueError(f"expected a matrix among {', '.join(there)}, got {matrix!r}; pass one this model has")


def _opened_like(name_or_path: str | Path, like: ModelView | None) -> tuple[Any, tuple[str, ...]]:
    if like is None:
        return opened_model(name_or_path)
    return opened_model(name_or_path, at_least=like.dtype, device=like.device, wrap=like.kind != PLAIN)


def _adapter_for(model: Any) -> HookedAdapter | BridgeAdapter | HuggingFaceAdapter:
    if is_encoder(model):
        return encoder_adapter(model)
    if hasattr(model, "adapter") and hasattr(model, "original_model"):
        return BridgeAdapter(model) if is_regular(model) else HuggingFaceAdapter(model)
    if any(base.__name__ == "HookedTransformer" for base in type(model).__mro__):
        return HookedAdapter(model)
    if is_transformers_model(model):
        for name, weight in model.named_parameters():
            refuse_elsewhere(name, weight, "the model")
        return HuggingFaceAdapter(model)
    raise ValueError(
        f"expected a HookedTransformer, a TransformerBridge or a model of transformers, got {type(model).__name__}; "
        "pass TransformerBridge.boot_transformers(name_or_directory)"
    )


def overflowed(view: ModelView, where: str) -> str:
    """What is said where a model's activations are not finite, or too large to be multiplied."""
    wider = "float32" if view.dtype in (torch.float16, torch.bfloat16) else "float64"
    return (
        f"expected activations within what {str(view.dtype).removeprefix('torch.')} can hold and multiply, got an "
        f"overflow in {where}; pass the model loaded with dtype=torch.{wider}, or weights that did not diverge"
    )


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a module works on, however it was called."""
    for name in ("query_input", "hidden_states"):
        if name in kwargs:
            return kwargs[name]
    return args[0]


def _shares_storage(tensor: Tensor, parameters: Iterator[Tensor]) -> bool:
    address = _address(tensor)
    return address == 0 or any(_address(p) == address for p in parameters)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
