"""The transformer of arXiv:2604.25143: as a plain module that trains fast, as HookedTransformer and as Bridge.

The three are one function with parameters of the same names and shapes; the plain module leaves out what position 0's
readout never sees (the second position of the last layer) and every hook.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.grokking.modular import ModularArithmetic
from tl_asymmetry.models.loading import hooked_transformer, native_bridge
from tl_asymmetry.names import nearest

_EPS, _LARGEST = 1e-5, 100_000
POSITIONS = 2
"""Tokens of an input: a and b."""


@checked
@dataclass(frozen=True)
class GrokShape:
    """Sizes of the published model, with one head of `p` outputs for each operation.

    Raises:
        ValueError: heads that do not divide the width.
    """

    p: int = 97
    """Tokens, and outputs of a head."""
    heads_out: int = 1
    """Readout heads: one for each operation."""
    n_layers: int = 2
    """Blocks."""
    d_model: int = 128
    """Width of the residual stream."""
    n_heads: int = 4
    """Attention heads a layer."""
    d_mlp: int = 256
    """Hidden width of the MLP."""

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if not 1 <= size <= _LARGEST:
                raise ValueError(f"expected {name} from 1 to {_LARGEST:,}, got {size}; pass e.g. {name}=2")
        if self.d_model % self.n_heads:
            raise ValueError(f"expected n_heads to divide d_model = {self.d_model}, got {self.n_heads}; pass 4 for 128")

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


class GrokTransformer(nn.Module):
    """Two tokens in, residues out: pre-norm, bidirectional attention, exact GELU, final LayerNorm, read at position 0.

    Parameters have HookedTransformer's names and shapes (`blocks.0.attn.W_Q`: `[head, d_model, d_head]`, …). Several
    heads stand side by side in one unembedding.

    Args:
        shape: sizes.
        seed: of the initial weights, which are those that the author's modules draw after `torch.manual_seed(seed)`:
            token embedding N(0, 1), positions N(0, 1/d), `nn.TransformerEncoderLayer`'s own initialisation, **the
            same for every layer** (`nn.TransformerEncoder` copies one), linear heads. The global state is untouched.

    Example:
        >>> model = GrokTransformer(GrokShape(p=7, d_model=16, d_mlp=32), seed=0)
        >>> tuple(model(torch.tensor([[2, 3], [4, 4]])).shape)
        (2, 1, 7)
    """

    @checked
    def __init__(self, shape: GrokShape = GrokShape(), *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        tensors = published_weights(shape, seed)
        self.embed: Any = _Bag(tensors, "embed.")
        self.pos_embed: Any = _Bag(tensors, "pos_embed.")
        self.blocks = nn.ModuleList(_Block(tensors, f"blocks.{i}.") for i in range(shape.n_layers))
        self.ln_final: Any = _Bag(tensors, "ln_final.")
        self.unembed: Any = _Bag(tensors, "unembed.")

    def forward(self, pairs: Int[Tensor, "batch 2"]) -> Float[Tensor, "batch heads_out p"]:
        """Logits at position 0, one row for each readout head."""
        return self.from_embeddings(self.embeddings(pairs))

    def embeddings(self, pairs: Int[Tensor, "batch 2"]) -> Float[Tensor, "batch 2 d_model"]:
        """What enters the first block: token plus position."""
        return self.embed.W_E[pairs] + self.pos_embed.W_pos

    def from_embeddings(self, x: Float[Tensor, "batch 2 d_model"]) -> Float[Tensor, "batch heads_out p"]:
        """The rest of the model."""
        for block in self.blocks:
            x = block(x, only_first=block is self.blocks[-1])
        x = _norm(x[:, 0], self.ln_final)
        logits = torch.addmm(self.unembed.b_U, x, self.unembed.W_U)
        return logits.unflatten(-1, (self.shape.heads_out, self.shape.p))

    def attention_parameters(self) -> dict[str, nn.Parameter]:
        """θ_attn of the paper: W_Q, W_K, W_V, W_O of every layer, no biases."""
        return {
            f"blocks.{i}.attn.{name}": getattr(block.attn, name)
            for i, block in enumerate(self.blocks)
            for name in ("W_Q", "W_K", "W_V", "W_O")
        }


def published_weights(shape: GrokShape, seed: int) -> dict[str, Tensor]:
    """Initial weights under HookedTransformer's names, drawn as the author's modules draw them."""
    d, e, heads = shape.d_model, shape.d_head, shape.n_heads
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        embed = nn.Embedding(shape.p, d).weight
        positions = torch.randn(POSITIONS, d) / d**0.5
        layer = nn.TransformerEncoderLayer(d, heads, shape.d_mlp, 0.0, "gelu", batch_first=True, norm_first=True)
        readouts = [nn.Linear(d, shape.p) for _ in range(shape.heads_out)]
        W = dict(zip("QKV", layer.self_attn.in_proj_weight.split(d), strict=True))
        block = {f"attn.W_{name}": w.view(heads, e, d).mT for name, w in W.items()}
        block |= {f"attn.b_{name}": torch.zeros(heads, e) for name in "QKV"}
        block |= {
            "attn.W_O": layer.self_attn.out_proj.weight.mT.reshape(heads, e, d),
            "attn.b_O": layer.self_attn.out_proj.bias,
            "mlp.W_in": layer.linear1.weight.mT,
            "mlp.b_in": layer.linear1.bias,
            "mlp.W_out": layer.linear2.weight.mT,
            "mlp.b_out": layer.linear2.bias,
        }
        norm = {"w": torch.ones(d), "b": torch.zeros(d)}
        block |= {f"{ln}.{name}": value for ln in ("ln1", "ln2") for name, value in norm.items()}
        weights = {"embed.W_E": embed, "pos_embed.W_pos": positions}
        weights |= {f"blocks.{i}.{name}": value for i in range(shape.n_layers) for name, value in block.items()}
        weights |= {f"ln_final.{name}": value for name, value in norm.items()}
        weights["unembed.W_U"] = torch.cat([readout.weight.mT for readout in readouts], 1)
        weights["unembed.b_U"] = torch.cat([readout.bias for readout in readouts])
        return {name: value.detach().contiguous().clone() for name, value in weights.items()}


def shape_of(task: ModularArithmetic, sizes: Mapping[str, int]) -> GrokShape:
    """The published sizes for a task; other sizes by name."""
    if not isinstance(sizes, Mapping):
        raise ValueError(f"expected sizes by name, got {shown(sizes)}; pass e.g. sizes={{'d_model': 64}}")
    known = [field.name for field in fields(GrokShape) if field.name not in ("p", "heads_out")]
    if unknown := sorted(sizes.keys() - set(known)):
        raise ValueError(
            f"expected sizes among {', '.join(known)}, got {unknown[0]!r}; pass {nearest(unknown[0], known)}"
        )
    return GrokShape(p=task.p, heads_out=len(task.names), **sizes)


@checked
def hooked_model(model: GrokTransformer) -> Any:
    """The same function as a HookedTransformer (transformer-lens 3.x), float32, on CPU.

    Its logits have a position axis and all heads side by side, `[batch, 2, heads_out · p]`; read position 0.

    Raises:
        ImportError: transformer-lens 4 and later has no HookedTransformer; use `bridge_model`.
    """
    hooked = hooked_transformer(_settings(model.shape) | {"use_attn_result": False})
    missing, unexpected = hooked.load_state_dict(model.state_dict(), strict=False)
    left = [name for name in missing if not name.endswith(("mask", "IGNORE"))]
    if left or unexpected:
        raise RuntimeError(f"HookedTransformer's parameters have changed: {left + list(unexpected)}")
    return hooked


@checked
def bridge_model(model: GrokTransformer) -> Any:
    """The same function as a native TransformerBridge, float32, on CPU; logits as in `hooked_model`."""
    bridge = native_bridge(_settings(model.shape))
    tensors = model.state_dict()
    with torch.no_grad():
        bridge.embed.weight.copy_(tensors["embed.W_E"])
        bridge.pos_embed.weight.copy_(tensors["pos_embed.W_pos"])
        for i, block in enumerate(bridge.blocks):
            ours = {name.removeprefix(f"blocks.{i}."): value for name, value in tensors.items()}
            for ln in ("ln1", "ln2"):
                _set_norm(getattr(block, ln), ours[f"{ln}.w"], ours[f"{ln}.b"])
            for name in "QKV":
                linear = getattr(block.attn, name.lower())
                linear.weight.copy_(ours[f"attn.W_{name}"].mT.flatten(0, 1))
                linear.bias.copy_(ours[f"attn.b_{name}"].flatten())
            block.attn.o.weight.copy_(ours["attn.W_O"].flatten(0, 1).mT)
            block.attn.o.bias.copy_(ours["attn.b_O"])
            for side in ("in", "out"):
                linear = getattr(block.mlp, side)
                linear.weight.copy_(ours[f"mlp.W_{side}"].mT)
                linear.bias.copy_(ours[f"mlp.b_{side}"])
        _set_norm(bridge.ln_final, tensors["ln_final.w"], tensors["ln_final.b"])
        # The native model is built without an unembedding bias; the Bridge gives it one of zeros to be filled.
        bridge.unembed.W_U.copy_(tensors["unembed.W_U"])
        bridge.unembed.b_U.copy_(tensors["unembed.b_U"])
    return bridge


def shape_record(shape: GrokShape) -> dict[str, int]:
    """Sizes as JSON can hold them."""
    return asdict(shape)


def _settings(shape: GrokShape) -> dict[str, Any]:
    return {
        "n_layers": shape.n_layers, "d_model": shape.d_model, "n_heads": shape.n_heads, "d_head": shape.d_head,
        "d_mlp": shape.d_mlp, "d_vocab": shape.p, "d_vocab_out": shape.p * shape.heads_out, "n_ctx": POSITIONS,
        "act_fn": "gelu", "normalization_type": "LN", "eps": _EPS, "attention_dir": "bidirectional",
        "positional_embedding_type": "standard", "device": "cpu", "model_name": "grokking-2604.25143",
    }  # fmt: skip


def _set_norm(norm: Any, gain: Tensor, bias: Tensor) -> None:
    norm.weight.copy_(gain)
    norm.bias.copy_(bias)


class _Bag(nn.Module):
    """Parameters by name."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        for name, value in tensors.items():
            if name.startswith(prefix) and "." not in name[len(prefix) :]:
                self.register_parameter(name[len(prefix) :], nn.Parameter(value.clone()))


class _Block(nn.Module):
    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        super().__init__()
        for part in ("ln1", "attn", "ln2", "mlp"):
            self.add_module(part, _Bag(tensors, f"{prefix}{part}."))

    def forward(self, x: Tensor, only_first: bool) -> Tensor:
        """The block's output, of the first position alone where nothing else is read of it."""
        h = _norm(x, self.ln1)
        attn: Any = self.attn
        heads, d, e = attn.W_Q.shape
        if only_first:
            x = x[:, :1]
            q = h[:, :1] @ _flat(attn.W_Q) + attn.b_Q.flatten()
            W, b = torch.cat([_flat(attn.W_K), _flat(attn.W_V)], 1), torch.cat([attn.b_K, attn.b_V]).flatten()
            k, v = (h @ W + b).split(heads * e, -1)
        else:
            W = torch.cat([_flat(attn.W_Q), _flat(attn.W_K), _flat(attn.W_V)], 1)
            q, k, v = (h @ W + torch.cat([attn.b_Q, attn.b_K, attn.b_V]).flatten()).split(heads * e, -1)
        q, k, v = (t.unflatten(-1, (heads, e)) for t in (q, k, v))
        # Two positions: sums of products beat thousands of 2 × 2 matrix products.
        scores = (q[:, :, None] * k[:, None]).sum(-1) / e**0.5  # [batch, query, key, head]
        z = (scores.softmax(2)[..., None] * v[:, None]).sum(2)
        x = x + z.flatten(-2) @ attn.W_O.reshape(heads * e, d) + attn.b_O
        mlp: Any = self.mlp
        return x + F.gelu(_norm(x, self.ln2) @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.w, norm.b, _EPS)


def _flat(W: Tensor) -> Tensor:
    """[head, d_model, d_head] as [d_model, head · d_head]."""
    return W.transpose(0, 1).flatten(1)
