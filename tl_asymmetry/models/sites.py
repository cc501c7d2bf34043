"""Which linear maps each layer of a transformers model has: their names, and how they lie in the parameters.

A site is one matrix of one layer. Separate projections, fused ones, stacked experts and latent attention are rows of
the tables below; any other linear map whose name says which of its sides is the stream's is listed under its path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from tl_asymmetry.names import Side, reads_latent, side_by_name

Unit = Literal["head", "kv head", "expert"]
Split = Callable[[Tensor], Tensor]
"""From `[..., in, out]` to TransformerLens orientation, heads first; a view wherever strides can say it."""

WRAPPED = "_original_component"
"""Under this name a TransformerBridge keeps the module that it has wrapped."""

_PROJECTIONS = {
    "W_Q": ("q_proj", "query", "query_proj", "q_lin", "q"),
    "W_K": ("k_proj", "key", "key_proj", "k_lin", "k"),
    "W_V": ("v_proj", "value", "value_proj", "v_lin", "v"),
    "W_O": ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "Wo", "o"),
    "W_attn_gate": ("gate_proj", "g_proj"),
    "W_DQ": ("q_a_proj",),
    "W_DKV": ("kv_a_proj_with_mqa",),
    "W_UQ": ("q_b_proj",),
    "W_UK": ("kv_b_proj",),
}
_FUSED_PROJECTIONS = ("c_attn", "qkv_proj", "query_key_value", "Wqkv")
_MLP = {
    "W_in": ("up_proj", "c_fc", "fc_in", "fc1", "dense_h_to_4h", "w3", "lin1", "ffn", "intermediate.dense"),
    "W_gate": ("gate_proj", "w1"),
    "W_out": ("down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h", "w2", "lin2", "ffn_output", "output.dense",
              "output_linear", "Wo"),
}  # fmt: skip
_FUSED_MLP = {"gate_up_proj": ("W_gate", "W_in"), "input_linear": ("W_gate", "W_in"), "Wi": ("W_in", "W_gate")}
"""Both projections of a gated MLP in one, and which half is which."""
_ROUTERS = ("gate", "gate.wg", "router", "router.gate", "router.layer")
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention|SelfAttention|temporal_block|mixer)(\.|$)")
_OTHER_MIXER = re.compile(r"(^|\.)(linear_attn|mamba|mamba_decoder|indexer|compressor|altup|laurel|conv|rg_lru)(\.|$)")
_ASIDE = re.compile(r"(^|\.)(shared_transformer|encoder_attn|crossattention)(\.|$)")
"""What works beside the stream: Zamba2's shared transformer is heard by the mixer alone, through a map of its own;
attention to an encoder's states is silent where there is no encoder."""
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")
_SHARED = re.compile(r"(^|\.)(shared_experts?|shared_mlp)(\.|$)")
_HEAD_WIDTHS = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
_EXPERTS_IN_OUT = ("Llama4", "GptOss", "Aria")
"""Beginnings of the classes whose stacked experts lie as `[expert, in, out]`; all others as `[expert, out, in]`."""


@dataclass(frozen=True)
class Site:
    """One matrix of one layer, and where the model keeps it."""

    matrix: str
    """The field's name, or the path of the module in its block."""
    side: Side
    """Which of its sides is the residual stream's (or a latent's): the input of a reading matrix, the output of a
    writing one."""
    module: nn.Module
    """The module that holds the parameter; what comes in there is what the matrix multiplies."""
    parameter: str
    """The parameter's name there."""
    transposed: bool
    """Whether the parameter lies as `[out, in]`, as in `nn.Linear`."""
    split: Split
    """From the parameter as `[..., in, out]` to this matrix."""
    unit: Unit | None = None
    """What the first axis counts; None for a matrix without such an axis."""

    @property
    def weight(self) -> Tensor:
        """`[unit, d_model, other]` (read) or `[unit, other, d_model]` (write); without a unit, without that axis."""
        stored = getattr(self.module, self.parameter).detach()
        return self.split(stored.mT if self.transposed else stored)

    def part_of_output(self, y: Tensor) -> Tensor:
        """This matrix's part of what the module gives: `[..., unit, other]` (read) or `[..., d_model]` (write)."""
        if self.side == "write":
            return y
        part = self.split(y)
        return part if self.unit is None else part.movedim(0, -2)

    @property
    def bias(self) -> Tensor | None:
        """What is added to the output, `[unit, other]` (read) or `[d_model]` (write); None where nothing is."""
        bias = getattr(self.module, "bias" if self.parameter == "weight" else f"{self.parameter}_bias", None)
        if not isinstance(bias, Tensor) or self.side == "write":
            return None if bias is None else bias.detach()
        return self.split(bias.detach().unsqueeze(-2)).squeeze(-2)


def layer_sites(block: nn.Module, *, d_model: int, n_heads: int) -> dict[str, Site]:
    """All matrices of a block that have a residual side, by name.

    Args:
        block: a layer of a transformers model, as it is or inside a TransformerBridge.
        d_model: width of the residual stream.
        n_heads: query heads by the configuration, for attention modules that do not tell the width of a head.
    """
    maps = dict(linear_maps(block))
    attention = _Attention.of(block, maps, n_heads)
    mixture = any(_EXPERTS.search(path) or getattr(module, name).ndim == 3 for path, (module, name) in maps.items())
    found: dict[str, Site] = {}
    for path, (module, parameter) in maps.items():
        if _ASIDE.search(path):
            continue
        named = list(_named(path, module, parameter, attention, mixture))
        for site in named or _by_path(path, module, parameter):
            if reads_latent(site.matrix) or site.weight.shape[-2 if site.side == "read" else -1] == d_model:
                found.setdefault(site.matrix, site)
    return found


def linear_maps(block: nn.Module) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Path → module and parameter of all that multiplies: `nn.Linear`, `Conv1D`, routers, stacks of experts."""
    for name, module in block.named_modules():
        path = ".".join(part for part in name.split(".") if part != WRAPPED)
        for parameter, value in module._parameters.items():
            if value is None or "bias" in parameter or isinstance(module, nn.Embedding | nn.Conv1d):
                continue
            if value.ndim == 2 and parameter == "weight" and not type(module).__name__.endswith("Norm"):
                yield path, (module, parameter)
            elif value.ndim == 3 and (parameter == "weight" or _EXPERTS.search(path)):
                yield path if parameter == "weight" else f"{path}.{parameter}", (module, parameter)


@dataclass(frozen=True)
class _Attention:
    """What is needed to recognise an attention's projections and to take them apart."""

    roots: frozenset[str]
    """Paths of the modules that have queries; a state-space mixer of the same name has none."""
    module: Any
    """The module that knows the width of a head; None where the block has no attention."""
    d_head: int
    """Width of a head's output."""
    n_heads: int
    """Query heads."""
    d_key: int
    """Width of a head's query and key; that of the output unless the model tells the two apart (MiMo)."""

    @classmethod
    def of(cls, block: nn.Module, maps: Mapping[str, tuple[Any, str]], n_heads: int) -> _Attention:
        """Heads by the output projection, whose input is all of them side by side."""
        queries = (*_PROJECTIONS["W_Q"], *_PROJECTIONS["W_DQ"], *_FUSED_PROJECTIONS)
        roots = frozenset(_attention_root(path) for path in maps if path.rpartition(".")[2] in queries) - {""}
        nothing = cls(roots, None, 1, 0, 1)
        outputs = [module for path, (module, _) in maps.items() if nothing.leaf(path) in _PROJECTIONS["W_O"]]
        if not outputs:
            return nothing
        width = outputs[0].weight.shape[1 if _lies_out_in(outputs[0]) else 0]
        queries_out = next(
            (module.weight.shape[0 if _lies_out_in(module) else 1] for path, (module, _) in maps.items()
             if nothing.leaf(path) in _PROJECTIONS["W_Q"]), 0,
        )  # fmt: skip

        def told(module: Any, d_head: int, n: int) -> _Attention:
            said = getattr(module, "head_dim", None)
            if isinstance(said, int) and queries_out == n * said:
                return cls(roots, module, d_head, n, said)
            own = queries_out % (n * d_head) != 0 and queries_out % n == 0  # a multiple: a gate beside each query
            return cls(roots, module, d_head, n, queries_out // n if own else d_head)

        for word in _HEAD_WIDTHS:
            for name, module in block.named_modules():
                d_head = getattr(module, word, None)
                if isinstance(d_head, int) and not _OTHER_MIXER.search(name):
                    return told(module, d_head, width // d_head)
        return told(block, width // n_heads, n_heads)

    def leaf(self, path: str) -> str | None:
        """The last word of a projection of attention heads, None for any other path."""
        leaf = path.rpartition(".")[2]
        known = leaf in _FUSED_PROJECTIONS or any(leaf in leaves for leaves in _PROJECTIONS.values())
        return leaf if known and _attention_root(path) in self.roots else None


def _named(path: str, module: Any, parameter: str, attention: _Attention, mixture: bool) -> Iterator[Site]:
    """The sites of a parameter that the tables know."""
    leaf = attention.leaf(path)
    transposed = _lies_out_in(module)
    if _OTHER_MIXER.search(path):
        return
    if getattr(module, parameter).ndim == 3:
        yield from _expert_sites(path, module, parameter)
    elif leaf in _FUSED_PROJECTIONS:
        for matrix, (split, unit) in _fused(leaf, module, attention).items():
            yield Site(matrix, "read", module, parameter, transposed, split, unit)
    elif leaf is not None:
        yield from _attention_sites(leaf, module, attention)
    else:
        yield from _mlp_sites(path, module, mixture)


def _attention_sites(leaf: str, module: Any, attention: _Attention) -> Iterator[Site]:
    transposed, d_head = _lies_out_in(module), attention.d_head
    matrix = next((name for name, leaves in _PROJECTIONS.items() if leaf in leaves), None)
    outputs = module.weight.shape[0 if transposed else 1]
    if matrix == "W_O":
        yield Site("W_O", "write", module, "weight", transposed, partial(_input_heads, d_head=d_head), "head")
    elif matrix == "W_Q" and outputs == 2 * attention.n_heads * d_head:  # Qwen3-Next: each head's query, then its gate
        for name, part in (("W_Q", 0), ("W_attn_gate", 1)):
            split = partial(_interleaved, parts=2, part=part, d_head=d_head)
            yield Site(name, "read", module, "weight", transposed, split, "head")
    elif matrix in ("W_Q", "W_K", "W_V"):
        width = d_head if matrix == "W_V" else attention.d_key
        unit: Unit = "kv head" if matrix != "W_Q" else "head"
        yield Site(matrix, "read", module, "weight", transposed, partial(_heads, d_head=width), unit)
    elif matrix == "W_attn_gate":
        split = partial(_heads, d_head=max(outputs // attention.n_heads, 1))
        yield Site(matrix, "read", module, "weight", transposed, split, "head")
    elif matrix == "W_UQ":
        yield Site(matrix, "read", module, "weight", transposed, partial(_of_heads, n=attention.n_heads), "head")
    elif matrix == "W_UK":  # of each head what makes its key from the latent, then what makes its value
        key = outputs // attention.n_heads - d_head
        for name, start, stop in (("W_UK", 0, key), ("W_UV", key, None)):
            split = partial(_of_heads, n=attention.n_heads, start=start, stop=stop)
            yield Site(name, "read", module, "weight", transposed, split, "head")
    elif matrix == "W_DQ":
        yield Site(matrix, "read", module, "weight", transposed, _whole)
    elif matrix == "W_DKV":
        rotary = int(getattr(attention.module, "qk_rope_head_dim", 0))
        yield Site("W_DKV", "read", module, "weight", transposed, partial(_columns, stop=outputs - rotary))
        if rotary:
            yield Site("W_KR", "read", module, "weight", transposed, partial(_columns, start=outputs - rotary))


def _fused(leaf: str, module: Any, attention: _Attention) -> dict[str, tuple[Split, Unit]]:
    """How queries, keys and values lie in one projection."""
    kind, d_head, n = type(attention.module).__name__, attention.d_head, attention.n_heads
    outputs = module.weight.shape[0 if _lies_out_in(module) else 1]
    kv = (outputs // d_head - n) // 2
    grouped = bool(getattr(attention.module, "new_decoder_architecture", False))  # Falcon 40B
    if kind.startswith("CodeGen"):  # four blocks, each with its heads' queries, values and keys
        order = {"W_Q": 0, "W_V": 1, "W_K": 2}
        return {m: (partial(_blocked, blocks=4, parts=3, part=i, d_head=d_head), "head") for m, i in order.items()}
    if grouped:
        share = n // kv
        return {
            "W_Q": (partial(_grouped, per_group=share + 2, start=0, stop=share, d_head=d_head), "head"),
            "W_K": (partial(_grouped, per_group=share + 2, start=share, stop=share + 1, d_head=d_head), "kv head"),
            "W_V": (partial(_grouped, per_group=share + 2, start=share + 1, stop=share + 2, d_head=d_head), "kv head"),
        }
    per_head = leaf == "query_key_value" or (kind.startswith("GPTBigCode") and leaf == "c_attn")
    if per_head and kv == n:  # each head's query, key and value side by side
        order = {"W_Q": 0, "W_K": 1, "W_V": 2}
        return {m: (partial(_interleaved, parts=3, part=i, d_head=d_head), "head") for m, i in order.items()}
    q, k = n * d_head, kv * d_head
    ranges = {"W_Q": (0, q), "W_K": (q, q + k), "W_V": (q + k, q + 2 * k)}
    return {
        matrix: (partial(_heads, d_head=d_head, start=start, stop=stop), "head" if matrix == "W_Q" else "kv head")
        for matrix, (start, stop) in ranges.items()
    }


def _mlp_sites(path: str, module: Any, mixture: bool) -> Iterator[Site]:
    transposed = _lies_out_in(module)
    # A "shared" MLP without experts beside it (Granite 4) is the layer's MLP.
    suffix = "_shared" if mixture and _SHARED.search(path) else ""
    leaf = _leaf(path, [*_FUSED_MLP, *_ROUTERS, *(each for leaves in _MLP.values() for each in leaves)])
    if leaf in _FUSED_MLP:
        half = module.weight.shape[0 if transposed else 1] // 2
        for name, start in zip(_FUSED_MLP[leaf], (0, half), strict=True):
            yield Site(
                name + suffix, "read", module, "weight", transposed, partial(_columns, start=start, stop=start + half)
            )
    elif leaf in _ROUTERS:
        if mixture:
            yield Site("W_router", "read", module, "weight", transposed, _whole)
    elif leaf is not None:
        matrix = next(name for name, leaves in _MLP.items() if leaf in leaves)
        yield Site(matrix + suffix, "write" if matrix == "W_out" else "read", module, "weight", transposed, _whole)


def _expert_sites(path: str, module: Any, parameter: str) -> Iterator[Site]:
    """Experts stacked in one parameter `[expert, …, …]`; a mixture of attention heads (JetMoe) goes by its path."""
    if _ATTENTION.search(path):
        return
    transposed = not type(module).__name__.startswith(_EXPERTS_IN_OUT)
    leaf = path.rpartition(".")[2]
    if leaf in _FUSED_MLP:
        half = getattr(module, parameter).shape[1 if transposed else 2] // 2
        for i, name in enumerate(_FUSED_MLP[leaf]):
            columns = partial(_columns, start=i * half, stop=(i + 1) * half)
            if type(module).__name__.startswith("GptOss"):  # entry by entry in turn
                columns = partial(_columns, start=i, step=2)
            yield Site(name, "read", module, parameter, transposed, columns, "expert")
    elif leaf in _MLP["W_out"]:
        yield Site("W_out", "write", module, parameter, transposed, _whole, "expert")
    elif leaf in _MLP["W_in"]:
        yield Site("W_in", "read", module, parameter, transposed, _whole, "expert")


def _by_path(path: str, module: Any, parameter: str) -> Iterator[Site]:
    """A map that the tables do not know, under its path, where that says which of its sides is the stream's."""
    side = side_by_name(path)
    if side is not None and getattr(module, parameter).ndim == 2:
        yield Site(path, side, module, parameter, _lies_out_in(module), _whole)


# -- paths -----------------------------------------------------------------------------------------------------------


def _attention_root(path: str) -> str:
    """The path up to the word that says attention; empty where none does, or where it is another mixer's."""
    match = _ATTENTION.search(path)
    if match is None or _OTHER_MIXER.search(path) or _EXPERTS.search(path):
        return ""
    return path[: match.end()].removesuffix(".")


def _leaf(path: str, known: list[str]) -> str | None:
    """The end of a path, one or two words, that a table knows."""
    last_two = ".".join(path.split(".")[-2:])
    return next((end for end in (last_two, path.rpartition(".")[2]) if end in known), None)


def _lies_out_in(module: nn.Module) -> bool:
    """Whether a module keeps its weight as `[out, in]`; GPT-2's Conv1D alone does not."""
    return type(module).__name__ != "Conv1D"


# -- layouts: from [..., in, out] to heads first ---------------------------------------------------------------------


def _whole(x: Tensor) -> Tensor:
    return x


def _columns(x: Tensor, *, start: int = 0, stop: int | None = None, step: int = 1) -> Tensor:
    return x[..., start:stop:step]


def _heads(x: Tensor, *, d_head: int, start: int = 0, stop: int | None = None) -> Tensor:
    return x[..., start:stop].unflatten(-1, (-1, d_head)).movedim(-2, 0)


def _of_heads(x: Tensor, *, n: int, start: int = 0, stop: int | None = None) -> Tensor:
    return x.unflatten(-1, (n, -1))[..., start:stop].movedim(-2, 0)


def _interleaved(x: Tensor, *, parts: int, part: int, d_head: int) -> Tensor:
    return x.unflatten(-1, (-1, parts, d_head))[..., part, :].movedim(-2, 0)


def _grouped(x: Tensor, *, per_group: int, start: int, stop: int, d_head: int) -> Tensor:
    return x.unflatten(-1, (-1, per_group, d_head))[..., start:stop, :].flatten(-3, -2).movedim(-2, 0)


def _blocked(x: Tensor, *, blocks: int, parts: int, part: int, d_head: int) -> Tensor:
    return x.unflatten(-1, (blocks, parts, -1, d_head))[..., part, :, :].flatten(-3, -2).movedim(-2, 0)


def _input_heads(x: Tensor, *, d_head: int) -> Tensor:
    return x.unflatten(-2, (-1, d_head))
