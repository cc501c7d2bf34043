"""Every architecture that transformers knows, as a tiny pair of models, against fractions from its own modules.

    python benchmarks/architectures.py CONFIGURATIONS          # resumes; writes benchmarks/results/architectures.json
    python benchmarks/architectures.py CONFIGURATIONS --only qwen3_5 bert --again

CONFIGURATIONS is a Python file with a dictionary `A`: name → `cfg` (a configuration class of transformers), `kw` (its
arguments), and where attention and MLP lie (`q`, `qkv`, `o`, `mlp`). Causal language models of transformers' registry
that are not among them are built with small numbers where their configuration takes these.

Each pair is analysed live, from a folder, and through TransformerLens where it can wrap the model. The oracle knows
nothing of `tl_asymmetry.models.sites`: float64, forward-pre-hooks on the named modules of the Hugging Face model, heads
by lists of columns. Every row must be there and right; every map with a side on the stream must be a row or in a note.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

RESULTS = Path(__file__).parent / "results" / "architectures.json"
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
RANKS = (4,)
TOLERANCE = 1e-6
SEQUENCES, LENGTH = 8, 24
LARGEST = 3_000_000
"""Parameters from which a model of the registry is not tiny."""

PROJECTIONS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.query", "attention.key", "attention.value"),
    ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
    ("temporal_block.q_proj", "temporal_block.k_proj", "temporal_block.v_proj"),
    ("mamba.self_attn.q_proj", "mamba.self_attn.k_proj", "mamba.self_attn.v_proj"),
    ("norm_attn_norm.attn.q_proj", "norm_attn_norm.attn.k_proj", "norm_attn_norm.attn.v_proj"),
)
"""Where queries, keys and values may lie, unless the configuration says it."""
INPUTS = ("attn_in", "mlp_in", "q_latent", "kv_latent")
"""Subspaces of what enters a matrix."""
FUSED = (
    ("attn.Wqkv", "blocks"), ("norm_attn_norm.attn.Wqkv", "blocks"), ("self_attn.qkv_proj", "blocks"),
    ("attn.c_attn", "blocks"), ("self_attn.query_key_value", "neox"), ("attention.query_key_value", "neox"),
)  # fmt: skip
OUTPUTS = (
    "self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.o_proj", "attn.out_proj", "attn.Wo",
    "attn.c_proj", "attention.output.dense", "attention.dense", "attention.out_lin", "attention.o_proj",
    "mixer.o_proj", "temporal_block.o_proj", "norm_attn_norm.attn.out_proj", "attention.out_proj",
)  # fmt: skip
MLPS = (
    ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"), ("mlp.up_proj", None, "mlp.down_proj"),
    ("feed_forward.up_proj", "feed_forward.gate_proj", "feed_forward.down_proj"),
    ("feed_forward.w3", "feed_forward.w1", "feed_forward.w2"), ("intermediate.dense", None, "output.dense"),
    ("ffn.lin1", None, "ffn.lin2"), ("ffn", None, "ffn_output"), ("fc1", None, "fc2"), ("mlp.Wi", "in first", "mlp.Wo"),
    ("mlp_block.up_proj", "mlp_block.gate_proj", "mlp_block.down_proj"),
    ("mlp.gate_up_proj", "fused", "mlp.down_proj"), ("mlp.c_fc", None, "mlp.c_proj"), ("mlp.fc1", None, "mlp.fc2"),
    ("mixer.up_proj", None, "mixer.down_proj"), ("mlp.dense_h_to_4h", None, "mlp.dense_4h_to_h"),
)  # fmt: skip
"""Input, gate ("fused": gate and input in one; "in first": the other way round), output."""
SHARED = (
    "mlp.shared_expert", "mlp.shared_experts", "mlp.shared_mlp", "shared_mlp", "block_sparse_moe.shared_mlp",
    "feed_forward.shared_expert", "mixer.shared_experts",
)  # fmt: skip
SHARED_MAPS = (("up_proj", "down_proj"), ("input_linear", "output_linear"), ("gate_up_proj", "down_proj"))
ROUTERS = (
    "mlp.gate", "mlp.router", "block_sparse_moe.gate", "block_sparse_moe.router", "block_sparse_moe.router.layer",
    "feed_forward.router", "feed_forward.gate", "mlp.router.gate", "mlp.router.layer", "mlp.gate.wg",
    "ffn.router.layer", "mixer.gate", "router.proj",
)  # fmt: skip


# -- models ------------------------------------------------------------------------------------------------------------


def configurations(path: Path) -> dict[str, dict[str, Any]]:
    """The file's, and those of transformers' registry that it does not have."""
    loader = importlib.util.spec_from_file_location("configurations", path)
    if loader is None or loader.loader is None:
        raise ValueError(f"expected a file of configurations that Python can read, got {str(path)!r}; pass a .py file")
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = dict(module.A)
    known = {spec["cfg"] for spec in found.values()}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            cls = CONFIG_MAPPING[kind]
        except (KeyError, ImportError):
            continue
        if cls.__name__ not in known:
            known.add(cls.__name__)
            found[f"registry: {kind}"] = {"cfg": cls.__name__, "kw": small(cls)}
    return found


def small(cls: Any) -> dict[str, Any]:
    """Small numbers for what a configuration class counts."""
    sizes = {
        "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "intermediate_size": 96, "ffn_dim": 96,
        "n_inner": 96, "d_ff": 96, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2,
        "decoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
        "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
        "max_position_embeddings": 128, "n_positions": 128, "num_experts": 4, "num_local_experts": 4,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "embedding_size": 64,
        "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
        "shared_expert_intermediate_size": 48, "q_lora_rank": 24, "kv_lora_rank": 24, "n_group": 1, "topk_group": 1,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    import inspect

    takes = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__annotations__", {}))
    return {name: value for name, value in sizes.items() if name in takes}


def build(spec: Mapping[str, Any]) -> tuple[Any, dict[int, Tensor]]:
    """A model with random weights, norms and biases in float64, and what its vectors were before."""
    import transformers

    config = getattr(transformers, spec["cfg"])(**spec["kw"])
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part._experts_implementation = "eager"  # the others know no float64
    torch.manual_seed(0)
    loader = getattr(transformers, spec.get("auto", "AutoModelForCausalLM"))
    with torch.device("meta"):
        model = loader.from_config(config, attn_implementation="eager", dtype=torch.float64)
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        raise NotImplementedError("no small numbers for it")
    model = loader.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(1)
    before = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.double()
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                before[id(parameter)] = parameter.clone()
                parameter += 0.3 * noise
            elif not name.endswith(("A_log", "time_decay", "time_first")):  # a recurrence must not explode
                parameter.copy_(0.15 * noise)
    model.double()
    return model, before


def changed(model: Any) -> Any:
    """The same after a training that moved everything a little."""
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return twin


def tokens() -> Tensor:
    return torch.randint(20, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(2))


# -- the oracle --------------------------------------------------------------------------------------------------------


@dataclass
class Matrix:
    """One matrix of one head or expert, as the oracle finds it."""

    name: str
    unit: int | None
    side: str
    path: str
    """The module whose input it multiplies."""
    change: Tensor
    """ΔW `[in, out]`."""


def language_layers(model: Any) -> list[nn.Module]:
    """The list of layers that runs when tokens are read: the longest whose every member is called."""
    called: set[int] = set()
    handles = [m.register_forward_pre_hook(lambda m, _: called.add(id(m))) for m in model.modules()]
    with torch.no_grad():
        model(input_ids=tokens()[:1])
    for handle in handles:
        handle.remove()
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "experts" not in name]
    ran = [list(m) for m in lists if len(m) and all(id(block) in called for block in m)]
    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    ran.sort(key=lambda blocks: (len(blocks) == wanted, len(blocks), sum(p.numel() for p in blocks[0].parameters())))
    return ran[-1]


def weights(block: nn.Module) -> dict[str, Tensor]:
    """Path → `[in, out]` (or `[expert, in, out]`) of all linear maps, experts under their parameter's path."""
    found = {}
    for path, module in block.named_modules():
        kind = type(module).__name__
        for name, p in module._parameters.items():
            if p is None or "bias" in name or isinstance(module, nn.Embedding | nn.Conv1d) or kind.endswith("Norm"):
                continue
            if p.ndim == 2 and name == "weight":
                found[path] = p.detach() if kind == "Conv1D" else p.detach().mT
            elif p.ndim == 3 and (name == "weight" or "experts" in path):
                in_out = kind.startswith(("Llama4", "GptOss", "Aria"))
                found[path if name == "weight" else f"{path}.{name}"] = p.detach() if in_out else p.detach().mT
    return found


def matrices(spec: Mapping[str, Any], W: Mapping[str, Tensor], block: nn.Module, heads: int) -> Iterator[tuple]:
    """`(name, unit, side, path, columns)` of a layer; `columns` cuts `[in, out]`."""
    first = next((each for each in ([spec["q"]] if "q" in spec else PROJECTIONS) if each[0] in W), None)
    fused = next((each for each in ([spec["qkv"]] if "qkv" in spec else FUSED) if each[0] in W), None)
    out = next((o for o in (spec.get("o", ""), *OUTPUTS) if o in W), None)
    own = first or fused
    attends = own is not None and out is not None or "self_attn.kv_a_proj_with_mqa" in W
    d_head = W[out].shape[0] // heads if out and attends else 0
    if attends and out:
        root = (own[0] if own else out).rpartition(".")[0]
        module = block.get_submodule(root) if root else block
        said = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None)
        d_head = said if isinstance(said, int) and W[out].shape[0] % said == 0 else d_head
        n = W[out].shape[0] // d_head
        for h in range(n):
            yield "W_O", h, "write", out, ("rows", range(h * d_head, (h + 1) * d_head))
    if attends and first:
        for matrix, path in zip(("W_Q", "W_K", "W_V"), first, strict=True):
            if path not in W:
                continue
            width = W[path].shape[1]
            if matrix == "W_Q" and width == 2 * n * d_head:
                for h in range(n):
                    yield "W_Q", h, "read", path, ("columns", range(2 * h * d_head, (2 * h + 1) * d_head))
                    gate = range((2 * h + 1) * d_head, (2 * h + 2) * d_head)
                    yield "W_attn_gate", h, "read", path, ("columns", gate)
                continue
            key = W[first[0]].shape[1] // n  # as wide as the query, which a gate may stand beside
            each = d_head if matrix == "W_V" or key == 2 * d_head else key
            for h in range(width // each):
                yield matrix, h, "read", path, ("columns", range(h * each, (h + 1) * each))
        for leaf in ("gate_proj", "g_proj"):
            gate = f"{first[0].rpartition('.')[0]}.{leaf}"
            if gate in W:
                each = W[gate].shape[1] // n
                for h in range(n):
                    yield "W_attn_gate", h, "read", gate, ("columns", range(h * each, (h + 1) * each))
    elif attends and fused:
        for matrix, h, columns in fused_columns(fused[1], W[fused[0]].shape[1], n, d_head):
            yield matrix, h, "read", fused[0], ("columns", columns)
    if "self_attn.kv_a_proj_with_mqa" in W:
        rotary = block.get_submodule("self_attn").qk_rope_head_dim
        path, width = "self_attn.kv_a_proj_with_mqa", W["self_attn.kv_a_proj_with_mqa"].shape[1]
        yield "W_DKV", None, "read", path, ("columns", range(width - rotary))
        yield "W_KR", None, "read", path, ("columns", range(width - rotary, width))
        if "self_attn.q_a_proj" in W:
            yield "W_DQ", None, "read", "self_attn.q_a_proj", None
            path, each = "self_attn.q_b_proj", W["self_attn.q_b_proj"].shape[1] // n
            for h in range(n):
                yield "W_UQ", h, "read", path, ("columns", range(h * each, (h + 1) * each))
        path, each = "self_attn.kv_b_proj", W["self_attn.kv_b_proj"].shape[1] // n
        for h in range(n):  # of each head its key, then its value
            yield "W_UK", h, "read", path, ("columns", range(h * each, (h + 1) * each - d_head))
            yield "W_UV", h, "read", path, ("columns", range((h + 1) * each - d_head, (h + 1) * each))
    yield from mlp(spec, W)


def mlp(spec: Mapping[str, Any], W: Mapping[str, Tensor]) -> Iterator[tuple]:
    """A layer's dense MLP, router, shared and routed experts."""
    mixture = any(x.ndim == 3 and "attn" not in path and "attention" not in path for path, x in W.items())
    said = [spec["mlp"]] if "mlp" in spec else []
    found = next((each for each in (*said, *MLPS) if each[0] in W and each[2] in W), None)
    if found and not any(found[0].startswith(f"{shared}.") for shared in SHARED if mixture):
        yield from gated(found, W, "")
    for root in SHARED:
        up, down = next((pair for pair in SHARED_MAPS if f"{root}.{pair[0]}" in W), ("", ""))
        if up and (mixture or not found):
            gate = f"{root}.gate_proj" if f"{root}.gate_proj" in W else None
            gate = "fused" if up in ("input_linear", "gate_up_proj") else gate
            yield from gated((f"{root}.{up}", gate, f"{root}.{down}"), W, "_shared" if mixture else "")
    router = next((path for path in ROUTERS if path in W), None)
    if mixture and router:
        yield "W_router", None, "read", router, None
    for path, x in W.items():
        if x.ndim != 3 or "attn" in path or "attention" in path:
            continue
        leaf = path.rpartition(".")[2]
        source = router or path.rpartition(".")[0]
        for expert in range(len(x)):
            if leaf in ("gate_up_proj", "input_linear"):
                half = x.shape[2] // 2
                interleaved = spec["cfg"].startswith("GptOss")
                cuts = (range(half), range(half, 2 * half))
                cuts = (range(0, 2 * half, 2), range(1, 2 * half, 2)) if interleaved else cuts
                for name, cut in zip(("W_gate", "W_in"), cuts, strict=True):
                    yield name, expert, "read", source, ("expert", path, expert, cut)
            elif leaf in ("up_proj", "down_proj", "output_linear"):
                name, side = ("W_in", "read") if leaf == "up_proj" else ("W_out", "write")
                yield name, expert, side, source, ("expert", path, expert, range(x.shape[2]))


def gated(paths: tuple, W: Mapping[str, Tensor], suffix: str) -> Iterator[tuple]:
    into, gate, out = paths
    yield f"W_out{suffix}", None, "write", out, None
    if gate in ("fused", "in first", "fusedrev"):
        half = W[into].shape[1] // 2
        names = ("W_gate", "W_in") if gate == "fused" else ("W_in", "W_gate")
        for name, start in zip(names, (0, half), strict=True):
            yield name + suffix, None, "read", into, ("columns", range(start, start + half))
        return
    yield f"W_in{suffix}", None, "read", into, None
    if gate:
        yield f"W_gate{suffix}", None, "read", gate, None


def fused_columns(layout: str, width: int, n: int, d: int) -> Iterator[tuple[str, int, list[int]]]:
    """Which columns of a fused projection are which head's query, key or value."""
    kv = (width // d - n) // 2
    for matrix, part in (("W_Q", 0), ("W_K", 1), ("W_V", 2)):
        for h in range(n if matrix == "W_Q" else kv):
            if layout == "blocks":
                start = (h, n + h, n + kv + h)[part] * d
            elif layout == "neox":
                start = (3 * h + part) * d
            elif layout == "grouped":
                share = n // kv
                start = (
                    (h // share) * (share + 2) + h % share if part == 0 else h * (share + 2) + share + part - 1
                ) * d
            else:  # CodeGen: four blocks, queries, values, keys in each
                per = n // 4
                start = ((h // per) * 3 * per + (0, 2, 1)[part] * per + h % per) * d
            yield matrix, h, list(range(start, start + d))


def oracle(model: Any, twin: Any, spec: Mapping[str, Any]) -> tuple[list[list[Matrix]], list[dict[str, Tensor]], list]:
    """By layer: the matrices, the input moments by path, and all linear maps' shapes by path."""
    text = model.config.get_text_config()
    heads = next((getattr(text, n) for n in ("num_attention_heads", "n_head", "n_heads", "num_heads")
                  if isinstance(getattr(text, n, None), int)), 1)  # fmt: skip
    blocks, others = language_layers(model), language_layers(twin)
    layers, moments, shapes = [], [], []
    for block, other in zip(blocks, others, strict=True):
        W, V = weights(block), weights(other)
        found = []
        for name, unit, side, path, cut in matrices(spec, W, block, heads):
            source = cut[1] if cut and cut[0] == "expert" else path
            Δ = V[source] - W[source]
            if cut and cut[0] == "expert":
                Δ = Δ[cut[2]][:, list(cut[3])]
            elif cut:
                Δ = Δ[list(cut[1])] if cut[0] == "rows" else Δ[:, list(cut[1])]
            found.append(Matrix(name, unit, side, path, Δ))
        layers.append(found)
        shapes.append({path: (V[path] - x) for path, x in W.items()})
        moments.append(entered(block, {m.path for m in found} | set(W)))
    with torch.no_grad():
        for moment in moments:
            moment.start()
        model(input_ids=tokens())
        for moment in moments:
            moment.stop()
    return layers, [moment.seen for moment in moments], shapes


class entered:
    """What enters the modules of a block, and what leaves it; first positions left out."""

    def __init__(self, block: nn.Module, paths: set[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        self._block = block
        self._modules = {path: m for path, m in block.named_modules() if path in paths}
        self._handles: list[Any] = []

    def start(self) -> None:
        for path, module in self._modules.items():

            def see(_: Any, args: tuple, kwargs: dict, path: str = path) -> None:
                x = kwargs.get("hidden_states", args[0] if args else None)
                # Of a layer that is called several times (ALBERT's) the first call, as the notes say.
                fits = isinstance(x, Tensor) and x.numel() == SEQUENCES * LENGTH * x.shape[-1]
                if fits and "resid_post" not in self.seen:
                    x = x.reshape(SEQUENCES, LENGTH, -1)[:, 1:].flatten(0, 1)
                    self.seen[path] = self.seen.get(path, 0) + x.mT @ x  # a module may be called twice

            self._handles.append(module.register_forward_pre_hook(see, with_kwargs=True))

        def see_left(_: Any, __: Any, out: Any) -> None:
            x = out[0] if isinstance(out, tuple | list) else out
            x = x[0] if x.ndim == 4 else x  # Gemma 3n's active stream
            x = x[:, 1:].flatten(0, 1)
            self.seen.setdefault("resid_post", x.mT @ x)

        self._handles.append(self._block.register_forward_hook(see_left))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()


def prediction(model: Any, before: Mapping[int, Tensor]) -> Tensor | None:
    """Leading left singular vectors of C diag(γ) W_U; None where the last norm or the unembedding is not at hand."""
    head = model.get_output_embeddings()
    owners = [m for m in model.modules() if any(isinstance(x, nn.ModuleList) for x in m.children())]
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm")
    norm = next((getattr(o, n) for o in owners for n in names if isinstance(getattr(o, n, None), nn.Module)), None)
    d = getattr(getattr(norm, "weight", None), "shape", (None,))[0]
    if head is None or norm is None or head.weight.shape[1] != d:
        return None
    added = bool((before[id(norm.weight)] == 0).all()) or "1P" in type(norm).__name__
    γ = norm.weight.detach() + added
    P = γ.unsqueeze(-1) * (head.weight.detach().mT - head.weight.detach().mean(0).unsqueeze(-1))
    if "RMS" not in type(norm).__name__ and "LayerNorm" in type(norm).__name__:
        P = P - P.mean(0, keepdim=True)
    return torch.linalg.svd(P, full_matrices=False).U


# -- held against the tables -------------------------------------------------------------------------------------------


def compared(result: Any, found: tuple, P: Tensor | None) -> dict[str, Any]:
    """Whether a table has the oracle's rows and numbers."""
    layers, moments, shapes = found
    named = " ".join([*result.notes, *result.other_changes["parameter"]]) + " "
    rows = {}
    for row in result.table.itertuples(index=False):
        unit = row.expert if pd.notna(row.expert) else row.head if pd.notna(row.head) else None
        rows[int(row.layer), row.matrix, None if unit is None else int(unit), row.subspace, int(row.rank)] = row
    keys = {key[:3] for key in rows}
    worst, where, checked, problems = 0.0, "", set(), []

    def see(error: float, place: str) -> None:
        nonlocal worst, where
        if not error <= worst:
            worst, where = error, place

    for layer, matrices_there in enumerate(layers):
        bases = {path: torch.linalg.eigh(M).eigenvectors.flip(-1) for path, M in moments[layer].items()}
        by_path = [
            Matrix(name, None, row.pathway, name, shapes[layer][name])
            for (of, name, _), row in {key[:3]: row for key, row in rows.items()}.items()
            if of == layer and name in shapes[layer] and shapes[layer][name].ndim == 2
        ]
        covered = {m.path for m in (*matrices_there, *by_path)}
        d = result.config["shape"]["d_model"]
        for path, Δ in shapes[layer].items():
            if path not in covered and Δ.ndim == 2 and d in Δ.shape and f".{path}." not in named:
                problems.append(f"silent: L{layer} {path}")
        for m in (*matrices_there, *by_path):
            key = layer, m.name, m.unit
            if key not in keys:
                problems.append(f"no row: L{layer} {m.name} {m.unit if m.unit is not None else ''} ({m.path})")
                continue
            checked.add(key)
            total = m.change.square().sum()
            norm = next(row for k, row in rows.items() if k[:3] == key).delta_norm
            see(abs(norm / float(total.sqrt()) - 1), f"L{layer} {m.name} {m.unit} ‖ΔW‖")
            for rank in RANKS:
                for (*same, subspace, k), row in rows.items():
                    if tuple(same) != key or k != rank:
                        continue
                    if subspace == "prediction" and P is not None:
                        Q = P[:, :rank]
                    elif subspace == "resid_post":
                        Q = bases[subspace][:, :rank]
                    elif m.side == "read" and subspace in (*INPUTS, m.name) and m.path in bases:
                        Q = bases[m.path][:, :rank]
                    else:
                        continue
                    inside = Q.mT @ m.change if m.side == "read" else m.change @ Q
                    see(
                        abs(row.fraction - float(inside.square().sum() / total)),
                        f"L{layer} {m.name} {m.unit} {subspace}",
                    )
    problems += [f"unknown row: {key}" for key in sorted(keys - checked, key=str)]
    outcome = "right" if not problems and worst <= TOLERANCE else "wrong"
    return {
        "outcome": outcome, "rows": len(keys), "checked": len(checked), "worst": worst,
        **({"where": where} if worst > TOLERANCE else {}), **({"problems": problems[:12]} if problems else {}),
        "notes": [n for n in result.notes if "left out" in n or "exists in one" in n],
    }  # fmt: skip


def attempt(run: Any) -> dict[str, Any]:
    """An outcome: of a ValueError its words, of anything else where it came from."""
    try:
        return run()
    except ValueError as error:
        return {"outcome": "refused", "reason": str(error)}
    except Exception as error:
        frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-6:]
        return {"outcome": "traceback", "reason": f"{type(error).__name__}: {error}"[:400], "frames": frames}


WAYS = ("live", "folder", "TransformerLens")


def outcomes(spec: Mapping[str, Any], ways: Collection[str]) -> dict[str, Any]:
    """What came of a pair, by the way in which it was given."""
    from tl_asymmetry import analyze_pair
    from tl_asymmetry.models.loading import bridge_around

    try:
        model, before = build(spec)
        twin = changed(model)
        with torch.no_grad():
            two = {"decoder_input_ids": tokens()[:1]} if model.config.is_encoder_decoder else {}
            model(input_ids=tokens()[:1], **two)
    except Exception as error:
        return {"not built": f"{type(error).__name__}: {error}"[:300]}
    options: dict[str, Any] = {"tokens": tokens(), "ranks": list(RANKS), "groups": 1, "progress": False}
    found: list[Any] = []

    def held(base: Any, aligned: Any) -> dict[str, Any]:
        result = analyze_pair(base, aligned, **options)
        if not found:
            found.append((oracle(model, twin, spec), prediction(model, before)))
        return compared(result, *found[0])

    def folder() -> dict[str, Any]:
        with TemporaryDirectory() as room:
            twin.save_pretrained(room)
            return held(model, room)

    def bridge() -> dict[str, Any]:
        pair = []
        for each in (model, twin):
            try:
                pair.append(bridge_around(copy.deepcopy(each), "tiny", dtype=torch.float64))
                if hasattr(pair[-1], "blocks"):  # else two stacks, and refused by us
                    with torch.no_grad():
                        pair[-1].original_model(input_ids=tokens()[:1])
            except Exception as error:  # its answers, and what of its own fails in a forward pass
                return {"outcome": "not wrapped", "reason": f"{type(error).__name__}: {error}"[:200]}
        return held(*pair)

    runs = {"live": lambda: held(model, twin), "folder": folder, "TransformerLens": bridge}
    return {way: attempt(runs[way]) for way in WAYS if way in ways}


# -- running -----------------------------------------------------------------------------------------------------------


def work(path: Path, names: list[str], ways: list[str]) -> None:
    """Of a worker: one line for each name."""
    lines, sys.stdout = sys.stdout, sys.stderr  # libraries print
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    specs = configurations(path)
    for name in names:
        lines.write(json.dumps([name, outcomes(specs[name], ways)]) + "\n")
        lines.flush()


def results_of(path: Path, names: list[str], ways: list[str], limit: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Outcomes from a worker process; one that takes longer than the limit, or takes the worker with it, is said so."""
    left = list(names)
    while left:
        command = [sys.executable, __file__, str(path), "--ways", *ways, "--worker", *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as worker:
            timer = threading.Timer(limit + 60, worker.kill)  # the first includes the imports
            timer.start()
            for line in worker.stdout or ():
                timer.cancel()
                name, outcome = json.loads(line)
                left.remove(name)
                yield name, outcome
                timer = threading.Timer(limit, worker.kill)
                timer.start()
            timer.cancel()
        if left:
            ended = {"outcome": "traceback", "reason": f"the process ended, or took over {limit:g} s"}
            yield left.pop(0), dict.fromkeys(ways, ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configurations", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="these names, or all that begin so")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--again", action="store_true", help="also those that have an outcome")
    parser.add_argument("--limit", type=float, default=300, help="seconds for one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs="+", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.configurations, arguments.worker, arguments.ways)
        return
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"configurations": {}}
    done = record["configurations"]
    specs = configurations(arguments.configurations)
    names = [
        name for name in specs
        if (arguments.again or not {"not built", *arguments.ways} & set(done.get(name, {})))
        and any(name.startswith(wanted) for wanted in arguments.only or [""])
    ]  # fmt: skip
    for name, ways in results_of(arguments.configurations, names, arguments.ways, arguments.limit):
        kept = {} if "not built" in ways else {way: x for way, x in done.get(name, {}).items() if way in WAYS}
        done[name] = {"class": specs[name]["cfg"]} | kept | ways
        record |= {"versions": versions(), "totals": totals(done), "configurations": dict(sorted(done.items()))}
        arguments.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        sys.stdout.write(f"{name}: {outcome(done[name])}\n")
        sys.stdout.flush()
    if arguments.out == RESULTS:
        PAGE.write_text(page(record))
    sys.stdout.write(f"{record.get('totals')}\n")


OUTCOMES = ("traceback", "wrong", "refused", "right", "not built")


def outcome(ways: Mapping[str, Any]) -> str:
    """Of a configuration: the worst of its ways. What TransformerLens does not know is no outcome."""
    found = {ways[way]["outcome"] for way in WAYS if way in ways} | ({"not built"} & set(ways))
    return next(kind for kind in OUTCOMES if kind in found)


def totals(done: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many of each outcome."""
    kinds = [outcome(ways) for ways in done.values()]
    return {kind: kinds.count(kind) for kind in OUTCOMES}


# -- the page ----------------------------------------------------------------------------------------------------------

HEAD = """# Which models

Decoders and encoders of transformers: as transformers gives them, through TransformerLens, from a folder. This page
is made by `benchmarks/architectures.py` from `benchmarks/results/architectures.json`: tiny pairs of models of one
architecture after the other, with random gains and biases, analysed by `analyze_pair` and held against float64 from
the Hugging Face modules themselves (norms of the deltas, their fractions in their own input's leading directions and
in the prediction subspace). **Right** means that every head's, every expert's and every further map's row is there
and agrees to 10⁻⁶; what is no row must be in a note or among `other_changes`. An empty cell was not measured, and
nothing is said of an architecture that is not listed. All of it was measured on one commit.

Layers may differ. A matrix that some layers lack has rows where it is; a mixture has rows for each expert; linear
maps without a name (those of linear attention, of state-space layers, a shared expert's gate) have rows under their
module's path, where that says which of their sides is the stream's. Of latent attention, W_UQ, W_UK and W_UV have rows
for each head against the latent that they read, behind its norm. Other maps between two inner spaces (`dt_proj`) have
no side on the stream: how far they moved is in `other_changes`. `gradient_covariance` takes what `analyze_pair` takes,
routers included (of experts the tokens that are routed to each); trajectories, spectra, stages and interventions
take the matrices that every layer has in one shape, and say which they leave out.
"""


def page(record: Mapping[str, Any]) -> str:
    """The documentation's page."""
    done = {name: ways for name, ways in record["configurations"].items() if "not built" not in ways}
    of = record["versions"]
    count = ", ".join(f"{n} {kind}" for kind, n in totals(done).items() if n)
    lines = [
        HEAD,
        f"{len(done)} configurations with torch {of['torch']}, transformers {of['transformers']} and TransformerLens "
        f"{of['transformer-lens']}: **{count}**.",
        "",
        "| configuration | class | live | folder | TransformerLens | rows | worst error |",
        "|---|---|---|---|---|---|---|",
    ]
    reasons = []
    for name, ways in done.items():
        cells = [ways.get(way, {}).get("outcome", "") for way in WAYS]
        there = [ways[way] for way in WAYS if "worst" in ways.get(way, {})]
        rows = str(max(way["rows"] for way in there)) if there else ""
        worst = f"{max(way['worst'] for way in there):.0e}" if there else ""
        lines.append(f"| {name} | `{ways['class'].removesuffix('Config')}` | {' | '.join(cells)} | {rows} | {worst} |")
        reasons += [f"- {name}, {way}: {ways[way]['reason']}" for way, cell in zip(WAYS, cells, strict=True)
                    if cell in ("refused", "traceback")]  # fmt: skip
    said = ["", "## What is refused, in its own words", "", *reasons] if reasons else []
    return "\n".join([*lines, *said]) + "\n"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "transformer-lens")}


if __name__ == "__main__":
    main()
