"""The table of a pair, once more and naively: run_with_cache, loops over tokens and heads, d × d projectors, float64.

Nothing here comes from tl_asymmetry. Inputs of matrices are rebuilt from the cached normalised activations and the
norm's own gain and bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy import stats

from tests.oracles import reference
from tests.oracles.reference import Array, float64

READ_POINT = {"W_Q": "attn_in", "W_K": "attn_in", "W_V": "attn_in", "W_in": "mlp_in", "W_gate": "mlp_in"}
Key = tuple[str, str, int, int | None, int]
"""matrix, subspace, layer, head, rank"""


@dataclass
class NaivePair:
    """One analysis, by brute force.

    `groups` holds sequences of token ids; `gradient` is a function (layer, matrix, head) → second moment, `weighted`
    the same of inputs weighted by their gradients; `given` maps names to one basis per layer.
    """

    base: Any
    aligned: Any
    groups: Sequence[Sequence[torch.Tensor]]
    ranks: Sequence[int]
    positional: str = "standard"
    layer_norm: bool = True
    parallel: bool = False
    exclude_first: bool = True
    centered: bool = False
    activations: str = "base"
    optimizer: str = "adam"
    gradient: Callable[[int, str, int | None], Any] | None = None
    weighted: Callable[[int, str, int | None], Any] | None = None
    given: dict[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_layers = len(self.base.blocks)
        self.d = self.base.cfg.d_model
        models = {"base": [self.base], "aligned": [self.aligned], "both": [self.base, self.aligned]}[self.activations]
        # one list of (token × d) arrays per group, one array per sequence and model
        self.rows = [
            [points for model in models for points in (self._activations(model, s) for s in group)]
            for group in self.groups
        ]
        self.prediction = self._prediction()
        for name in ("weight", "basis", "eigengap", "effective_rank", "matched_inputs", "gradient_matched"):
            setattr(self, name, cache(getattr(self, name)))  # every row asks again

    # -- the model -----------------------------------------------------------------------------------------------

    def _activations(self, model: Any, sequence: torch.Tensor) -> dict[tuple[str, int], Array]:
        with torch.no_grad():
            _, cache = model.run_with_cache(sequence.unsqueeze(0))
        first = 1 if self.exclude_first else 0
        found = {}
        for layer, block in enumerate(model.blocks):
            for point, norm in (("attn_in", "ln1"), ("mlp_in", "ln2")):
                module = getattr(block, norm)
                gain, bias = (_first(module, *names) for names in (("w", "weight"), ("b", "bias")))
                if bias is None and hasattr(model, "adapter"):
                    # Hugging Face's RMS norm works in float32 even in a float64 model: only its own output is exact
                    x = float64(cache[f"blocks.{layer}.{norm}.hook_out"][0])
                else:
                    x = float64(cache[f"blocks.{layer}.{norm}.hook_normalized"][0]) * float64(gain)
                    x = x if bias is None else x + float64(bias)
                found[point, layer] = x[first:]
                found[f"whole {point}", layer] = x
            for point in ("resid_pre", "resid_post", *(() if self.parallel else ("resid_mid",))):
                found[point, layer] = float64(cache[f"blocks.{layer}.hook_{point}"][0])[first:]
        return found

    def weight(self, model: Any, layer: int, matrix: str) -> Array:
        """Heads first (one for the MLP), then the residual axis, then the other."""
        block = model.blocks[layer]
        parent = block.mlp if matrix in ("W_in", "W_gate", "W_out") else block.attn
        own = f"_{matrix}" if f"_{matrix}" in dict(parent.named_parameters(recurse=False)) else matrix
        W = float64(getattr(parent, own))
        W = W if W.ndim == 3 else W[None]
        return W.transpose(0, 2, 1) if matrix in ("W_O", "W_out") else W

    def _prediction(self) -> Array:
        W_U = float64(self.base.unembed.W_U)
        W = W_U - W_U.mean(axis=1, keepdims=True)
        W = float64(_first(self.base.ln_final, "w", "weight"))[:, None] * W
        if self.layer_norm:
            W = (np.eye(self.d) - np.ones((self.d, self.d)) / self.d) @ W
        return np.linalg.svd(W)[0]

    # -- subspaces -----------------------------------------------------------------------------------------------

    def moment(self, point: str, layer: int, leave_out: int | None = None, *, centred: bool) -> Array:
        rows = [s[point, layer] for g, group in enumerate(self.rows) if g != leave_out for s in group]
        stacked = np.concatenate(rows)
        return reference.covariance(stacked) if centred else reference.second_moment(stacked)

    def basis(self, subspace: str, layer: int, leave_out: int | None = None) -> Array:
        if subspace in self.given:
            return float64(self.given[subspace][layer])
        if subspace == "prediction":
            return self.prediction
        λ, Q = np.linalg.eigh(self.moment(subspace, layer, leave_out, centred=self.centered))
        return Q[:, np.argsort(-λ)]

    def eigengap(self, subspace: str, layer: int, k: int) -> float:
        if subspace in self.given:
            return float("nan")
        if subspace == "prediction":
            W_U = float64(self.base.unembed.W_U)
            W = float64(_first(self.base.ln_final, "w", "weight"))[:, None] * (W_U - W_U.mean(axis=1, keepdims=True))
            W = W - W.mean(axis=0) if self.layer_norm else W
            λ = np.linalg.svd(W, compute_uv=False) ** 2
        else:
            λ = np.sort(np.linalg.eigvalsh(self.moment(subspace, layer, centred=self.centered)))[::-1]
        return (λ[k - 1] - λ[k]) / λ[k - 1]

    def replicated(self, subspace: str) -> bool:
        return subspace not in self.given and subspace != "prediction" and len(self.groups) >= 3

    def activation_matched(self, matrix: str, subspace: str, layer: int, k: int, head: int | None = None) -> float:
        if matrix not in READ_POINT:
            return float("nan")
        if self.weighted is not None and (Σ_w := self.weighted(layer, matrix, head)) is not None:
            return self._share(float64(Σ_w), self.basis(subspace, layer)[:, :k])
        return self.matched_inputs(matrix, subspace, layer, k)

    def matched_inputs(self, matrix: str, subspace: str, layer: int, k: int) -> float:
        """The same for all heads."""
        # Keys and values learn at every position; keys about each sequence's mean where softmax ignores it.
        point = ("whole " if matrix in ("W_K", "W_V") else "") + READ_POINT[matrix]
        centred = matrix == "W_K" and self.positional == "standard"
        groups = [
            np.concatenate([s[point, layer] - (s[point, layer].mean(0) if centred else 0) for s in group])
            for group in self.rows
        ]
        if len(groups) < 3:
            return self._share(reference.second_moment(np.concatenate(groups)), self.basis(subspace, layer)[:, :k])
        crossed = self.replicated(subspace)
        bases = [self.basis(subspace, layer, leave_out=g if crossed else None) for g in range(len(groups))]
        return reference.cross_fitted(groups, bases, k, adam=self.optimizer == "adam")

    def _share(self, Σ: Array, Q: Array) -> float:
        """Of what the optimiser makes of Σ."""
        D = np.diag(1 / np.sqrt(np.diag(Σ))) if self.optimizer == "adam" else np.eye(self.d)
        return np.trace(Q.T @ D @ Σ @ D @ Q) / np.trace(D @ Σ @ D)

    def gradient_matched(self, matrix: str, subspace: str, layer: int, head: int | None, k: int) -> float:
        if self.gradient is None or matrix not in ("W_O", "W_out"):
            return float("nan")
        return self._share(float64(self.gradient(layer, matrix, head)), self.basis(subspace, layer)[:, :k])

    def effective_rank(self, matrix: str, layer: int, head: int | None) -> float:
        W, W_new = (self.weight(m, layer, matrix)[head or 0] for m in (self.base, self.aligned))
        return reference.effective_rank(np.linalg.svd(W_new - W, compute_uv=False) ** 2)

    # -- tables --------------------------------------------------------------------------------------------------

    def row(self, matrix: str, subspace: str, layer: int, head: int | None, k: int) -> dict[str, float]:
        W, W_new = (self.weight(m, layer, matrix)[head or 0] for m in (self.base, self.aligned))
        ΔW, d = W_new - W, self.d
        f = reference.subspace_fraction(ΔW, self.basis(subspace, layer)[:, :k])
        energy = (ΔW**2).sum()
        M = ΔW @ ΔW.T / energy
        variance = 2 * k * (d - k) * (d * np.trace(M @ M) - 1) / (d**2 * (d - 1) * (d + 2))
        low = high = float("nan")
        if self.replicated(subspace):
            g = len(self.groups)
            without = [
                reference.subspace_fraction(ΔW, self.basis(subspace, layer, leave_out=i)[:, :k]) for i in range(g)
            ]
            t = stats.t.ppf(0.975, g - 1)
            low, high, _ = reference.log_jackknife(f * d / k, [r * d / k for r in without], t, corrected=True)
        matched = self.activation_matched(matrix, subspace, layer, k, head)
        of_gradient = self.gradient_matched(matrix, subspace, layer, head, k)
        return {
            "fraction": f,
            "relative": f * d / k,
            "isotropic_z": (f - k / d) / variance**0.5,
            "activation_matched": matched,
            "excess": f / matched,
            "gradient_matched": of_gradient,
            "gradient_excess": f / of_gradient,
            "ci_low": low,
            "ci_high": high,
            "eigengap": self.eigengap(subspace, layer, k),
            "delta_norm": energy**0.5,
            "delta_relative_norm": (energy / (W**2).sum()) ** 0.5,
            "delta_shrink": (ΔW * W).sum() / (W**2).sum(),
            "delta_effective_rank": self.effective_rank(matrix, layer, head),
        }

    def table(self, targets: dict[str, Sequence[str]]) -> dict[Key, dict[str, float]]:
        """All rows, by key."""
        rows = {}
        for matrix, subspaces in targets.items():
            for layer in range(self.n_layers):
                headless = matrix in ("W_in", "W_gate", "W_out")
                heads: Any = [None] if headless else range(len(self.weight(self.base, layer, matrix)))
                for subspace in subspaces:
                    size = self.basis(subspace, layer).shape[1]
                    for head in heads:
                        for k in self.ranks:
                            if k <= size:
                                rows[matrix, subspace, layer, head, k] = self.row(matrix, subspace, layer, head, k)
        return rows

    def asymmetry(self, *, mlp: bool) -> dict[tuple[int, int | None, int], dict[str, float]]:
        """Rows by (layer, head or None, rank)."""
        rows = {}
        for layer in range(self.n_layers):
            ΔQ, ΔK, ΔO, Δout = (
                self.weight(self.aligned, layer, m) - self.weight(self.base, layer, m) if m != "W_out" or mlp else None
                for m in ("W_Q", "W_K", "W_O", "W_out")
            )
            served = len(ΔQ) // len(ΔK)
            for k in self.ranks:
                for head in (None, *range(len(ΔQ))):
                    # (delta, matrix, head for its references)
                    if head is None:
                        read = [(x, "W_Q", i) for i, x in enumerate(ΔQ)] + [(x, "W_K", i) for i, x in enumerate(ΔK)]
                        write = [(x, "W_O", i) for i, x in enumerate(ΔO)] + ([(Δout[0], "W_out", None)] if mlp else [])
                    else:
                        read = [(ΔQ[head], "W_Q", head), (ΔK[head // served], "W_K", head // served)]
                        write = [(ΔO[head], "W_O", head)]
                    rows[layer, head, k] = self._asymmetry_row(read, write, layer, k)
        return rows

    def _asymmetry_row(self, read: list[Any], write: list[Any], layer: int, k: int) -> dict[str, float]:
        def relative(parts: list[Any], Q: Array) -> float:
            inside = sum(((Q[:, :k].T @ Δ) ** 2).sum() for Δ, _, _ in parts)
            return inside / sum((Δ**2).sum() for Δ, _, _ in parts) * self.d / k

        def expected(parts: list[Any], of: Callable[[str, int | None], float]) -> float:
            return sum((Δ**2).sum() * of(m, h) for Δ, m, h in parts) / sum((Δ**2).sum() for Δ, _, _ in parts)

        written = relative(write, self.basis("prediction", layer))
        reading = relative(read, self.basis("attn_in", layer))
        by_chance = expected(read, lambda m, h: self.activation_matched(m, "attn_in", layer, k, h))
        if self.gradient is None:
            by_chance *= self.d / k
        else:
            by_chance /= expected(write, lambda m, h: self.gradient_matched(m, "prediction", layer, h, k))
        low = high = float("nan")
        if self.replicated("attn_in"):
            g = len(self.groups)
            without = [relative(read, self.basis("attn_in", layer, leave_out=i)) / written for i in range(g)]
            t = stats.t.ppf(0.975, g - 1)
            low, high = np.log2(reference.log_jackknife(reading / written, without, t, corrected=True)[:2])
        return {
            "read": reading,
            "write": written,
            "log2_ratio": np.log2(reading / written),
            "log2_expected": np.log2(by_chance),
            "log2_excess": np.log2(reading / written / by_chance),
            "ci_low": low,
            "ci_high": high,
        }


def _first(module: Any, *names: str) -> Any:
    """The parameter under the first of the names that the module has, or None."""
    parameters = dict(module.named_parameters())
    found = [p for name in names for path, p in parameters.items() if path.split(".")[-1] == name]
    return found[0] if found else None
