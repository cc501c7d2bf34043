"""The published experiment in plain torch and NumPy modules, step by step. Nothing here comes from tl_asymmetry."""

from __future__ import annotations

import random
import warnings
from collections import deque

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

RESULTS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "sq": lambda a, b: a * a + b * b,
}


class PlainModel(nn.Module):
    """torch's own encoder, its modules in the published order (so that a seed gives the published weights)."""

    def __init__(self, p=97, d=128, heads=4, d_mlp=256, layers=2, outputs=1):
        super().__init__()
        self.tok = nn.Embedding(p, d)
        self.pos = nn.Parameter(torch.randn(2, d) / d**0.5)
        layer = nn.TransformerEncoderLayer(d, heads, d_mlp, 0.0, "gelu", batch_first=True, norm_first=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors, which norm_first switches off
            self.encoder = nn.TransformerEncoder(layer, layers)
        self.ln = nn.LayerNorm(d)
        self.readouts = nn.ModuleList(nn.Linear(d, p) for _ in range(outputs))

    def forward(self, pairs):
        h = self.ln(self.encoder(self.tok(pairs) + self.pos)[:, 0])
        return torch.stack([readout(h) for readout in self.readouts], 1)

    def attention(self):
        return [w for n, w in self.named_parameters() if "self_attn" in n and n.endswith("weight")]


def split(op, p, seed, fraction=0.5):
    low = 1 if op == "mul" else 0
    pairs = [(a, b) for a in range(low, p) for b in range(low, p)]
    random.Random(seed).shuffle(pairs)
    cut = int(fraction * len(pairs))
    return pairs[:cut], pairs[cut:]


def train(model, op, p, seed, steps, *, batch=512, mode=None, window=20, k=3):
    """`steps` steps of the published loop; mode "keep" or "remove" projects the clipped attention gradient."""
    pairs = torch.tensor(split(op, p, seed)[0])
    stream = np.random.RandomState(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0, foreach=False)
    buffer: deque = deque(maxlen=window)
    for _ in range(steps):
        chosen = pairs[torch.from_numpy(stream.randint(0, len(pairs), size=batch))]
        targets = RESULTS[op](chosen[:, 0], chosen[:, 1]) % p
        loss = F.cross_entropy(model(chosen)[:, 0], targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if mode:
            g = np.concatenate([w.grad.double().numpy().ravel() for w in model.attention()])
            if len(buffer) == window:
                V = np.linalg.svd(np.stack(buffer), full_matrices=False)[2][:k]
                kept = V.T @ (V @ g)
                g = kept if mode == "keep" else g - kept
                at = 0
                for w in model.attention():
                    w.grad.copy_(torch.from_numpy(g[at : at + w.numel()]).view_as(w))
                    at += w.numel()
            buffer.append(g)
        optimizer.step()


def lens_weights(model, heads=4):
    """The same weights under HookedTransformer's names and in its shapes."""
    d = model.tok.weight.shape[1]
    weights = {"embed.W_E": model.tok.weight, "pos_embed.W_pos": model.pos}
    for i, layer in enumerate(model.encoder.layers):
        attn, name = layer.self_attn, f"blocks.{i}."
        for j, letter in enumerate("QKV"):
            rows = attn.in_proj_weight[j * d : (j + 1) * d]
            weights[f"{name}attn.W_{letter}"] = torch.stack([r.T for r in rows.chunk(heads)])
            weights[f"{name}attn.b_{letter}"] = torch.stack(attn.in_proj_bias[j * d : (j + 1) * d].chunk(heads))
        weights[f"{name}attn.W_O"] = torch.stack([c.T for c in attn.out_proj.weight.chunk(heads, 1)])
        weights[f"{name}attn.b_O"] = attn.out_proj.bias
        weights[f"{name}mlp.W_in"], weights[f"{name}mlp.b_in"] = layer.linear1.weight.T, layer.linear1.bias
        weights[f"{name}mlp.W_out"], weights[f"{name}mlp.b_out"] = layer.linear2.weight.T, layer.linear2.bias
        for ours, theirs in (("ln1", layer.norm1), ("ln2", layer.norm2)):
            weights[f"{name}{ours}.w"], weights[f"{name}{ours}.b"] = theirs.weight, theirs.bias
    weights["ln_final.w"], weights["ln_final.b"] = model.ln.weight, model.ln.bias
    weights["unembed.W_U"] = torch.cat([r.weight.T for r in model.readouts], 1)
    weights["unembed.b_U"] = torch.cat([r.bias for r in model.readouts])
    return {name: value.detach() for name, value in weights.items()}


def seeded(seed, **sizes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PlainModel(**sizes)
