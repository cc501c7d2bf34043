"""Jacobians the plain way: `torch.func.jacrev` over whole functions, central differences. Nothing here is
tl_asymmetry's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ENDS = {
    "block": ("hook_resid_pre", "hook_resid_post"),
    "attn": ("hook_resid_pre", "hook_attn_out"),
}
"""Where a part begins and ends, by TransformerLens's hook names."""


def part_function(model: Any, tokens: Tensor, layer: int, part: str, until: int | None = None) -> Callable:
    """One part as a function `[pos, d] → [pos, d]`, by TransformerLens's own hooks; and its input in the model.

    `until`: read the stream behind that layer instead of behind the part.
    """
    begin, finish = ENDS[part]
    finish = f"blocks.{layer}.{finish}" if until is None else f"blocks.{until}.hook_resid_post"
    seen = {}

    def keep(name):
        def hook(value, hook):
            seen[name] = value

        return hook

    def function(x: Tensor) -> Tensor:
        model.run_with_hooks(
            tokens,
            return_type=None,
            fwd_hooks=[(f"blocks.{layer}.{begin}", lambda value, hook: x.unsqueeze(0)), (finish, keep("out"))],
        )
        return seen["out"][0]

    with torch.no_grad():
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(f"blocks.{layer}.{begin}", keep("in"))])
    return function, seen["in"][0].detach()


def jacobian(function: Callable, x: Tensor) -> Tensor:
    """∂ out[t, i] / ∂ in[s, j], `[t, i, s, j]`."""
    return torch.func.jacrev(function)(x)


def same_position(full: Tensor) -> Tensor:
    return torch.stack([full[t, :, t] for t in range(len(full))])


def summed_sources(full: Tensor) -> Tensor:
    return full.sum(2)


def central_difference(function: Callable, x: Tensor, direction: Tensor, step: float) -> Tensor:
    with torch.no_grad():
        return (function(x + step * direction) - function(x - step * direction)) / (2 * step)


# --- a block written out, to hold the factors against ------------------------------------------------------------


def layer_norm(x: Tensor, gain: Tensor | None, centered: bool, eps: float) -> Tensor:
    if centered:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if gain is None else x * gain


def scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Of one head, with a soft cap, so that a score is no bilinear form."""
    S = 2.0 * torch.tanh(q @ k.mT / q.shape[-1] ** 0.5 / 2.0)
    if causal:
        S = S.masked_fill(torch.ones_like(S).triu(1).bool(), -torch.inf)
    return S


def attention(x: Tensor, W: dict[str, Tensor], causal: bool) -> Tensor:
    out = torch.zeros_like(x)
    for h in range(len(W["W_Q"])):
        A = torch.softmax(scores(x @ W["W_Q"][h], x @ W["W_K"][h], causal), -1)
        out = out + A @ (x @ W["W_V"][h]) @ W["W_O"][h]
    return out


def attention_factors(x: Tensor, W: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """The factors of the same-position Jacobian, by loops and the softmax's derivative written out."""
    n, heads, e = len(x), len(W["W_Q"]), W["W_Q"].shape[-1]
    own = x.new_zeros(n, heads)
    query, out, into = x.new_zeros(n, heads, e, e), x.new_zeros(n, heads, e), x.new_zeros(n, heads, e)
    for h in range(heads):
        q, k, v = x @ W["W_Q"][h], x @ W["W_K"][h], x @ W["W_V"][h]
        S = scores(q, k, causal)
        A = torch.softmax(S, -1)
        z = A @ v
        slope = (1 - (S / 2.0).square()) / e**0.5  # of the soft cap, over the root of d_head
        for t in range(n):
            own[t, h] = A[t, t]
            for s in range(t + 1 if causal else n):
                query[t, h] += A[t, s] * slope[t, s] * torch.outer(v[s] - z[t], k[s])
            out[t, h] = A[t, t] * slope[t, t] * (v[t] - z[t])
            into[t, h] = q[t]
    return {"own_weight": own, "query": query, "key_out": out, "key_in": into}


def mlp(x: Tensor, W: dict[str, Tensor]) -> Tensor:
    """Gated where there is a W_gate."""
    if "W_gate" in W:
        return (torch.nn.functional.silu(x @ W["W_gate"]) * (x @ W["W_in"])) @ W["W_out"]
    return torch.tanh(x @ W["W_in"]) @ W["W_out"]


def mlp_slopes(x: Tensor, W: dict[str, Tensor]) -> list[Tensor]:
    """For W_in, and for W_gate where there is one."""
    if "W_gate" in W:
        g, pre = x @ W["W_gate"], x @ W["W_in"]
        σ = torch.sigmoid(g)
        return [g * σ, pre * (σ + g * σ * (1 - σ))]
    return [1 - torch.tanh(x @ W["W_in"]).square()]
