"""The tangent analysis done the long way: Hugging Face models, one sequence at a time, `backward()`, numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F

from tests.oracles import reference, reference_tangents


class NaiveCheckpoint:
    """Activations, weight gradients and per-token gradients of one model, token by token.

    Args:
        model: GPT2LMHeadModel, BertForMaskedLM or RobertaForMaskedLM in float64.
        inputs, originals, targets: token ids read and meant, and which are predicted, one entry per sequence.
    """

    def __init__(self, model: Any, inputs: list[Any], originals: list[Any], targets: list[Any]) -> None:
        self.encoder = hasattr(model.base_model, "encoder")
        self.blocks = model.base_model.encoder.layer if self.encoder else model.base_model.h
        self.n_heads = model.config.num_attention_heads
        model.zero_grad()
        self.activations: dict[tuple[str, int], list[Any]] = {}
        self.gradients: dict[int, list[Any]] = {layer: [] for layer in range(len(self.blocks))}
        for x, y, t in zip(inputs, originals, targets, strict=True):
            self._one(model, x, y, t)
        count = sum(int(t.sum()) for t in targets)
        self.weights = {
            (layer, m): W / count for layer in range(len(self.blocks)) for m, W in self._weight_gradients(layer).items()
        }

    def _one(self, model: Any, x: Any, y: Any, t: Any) -> None:
        outputs: dict[int, Any] = {}
        handles = []
        for layer, block in enumerate(self.blocks):
            places = (
                {"attn_in": (block.attention.self.query, 0), "mlp_in": (block.intermediate.dense, 0)}
                if self.encoder
                else {"attn_in": (block.ln_1, 1), "mlp_in": (block.ln_2, 1)}
            )
            for point, (module, side) in places.items():
                handles.append(module.register_forward_hook(self._keep(point, layer, side)))
            handles.append(block.register_forward_hook(self._keep_output(outputs, layer)))
        logits = model(x.unsqueeze(0)).logits[0]
        for handle in handles:
            handle.remove()
        predicted = logits[t] if self.encoder else logits[:-1]
        labels = y[t] if self.encoder else y[1:]
        F.cross_entropy(predicted, labels, reduction="sum").backward()
        for layer, output in outputs.items():
            self.gradients[layer].append(reference.float64(output.grad[0]))
            self.activations.setdefault(("resid_post", layer), []).append(reference.float64(output[0]))

    def _keep(self, point: str, layer: int, side: int) -> Any:
        def keep(_module: Any, args: Any, output: Any) -> None:
            self.activations.setdefault((point, layer), []).append(reference.float64((args[0], output)[side][0]))

        return keep

    def _keep_output(self, outputs: dict[int, Any], layer: int) -> Any:
        def keep(_module: Any, _args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            x.retain_grad()
            outputs[layer] = x

        return keep

    def _weight_gradients(self, layer: int) -> dict[str, Any]:
        """Rows along the outputs, columns along d_model."""
        block = self.blocks[layer]
        if self.encoder:
            own = block.attention.self
            matrices = {"W_Q": own.query, "W_K": own.key, "W_V": own.value, "W_in": block.intermediate.dense}
            return {name: reference.float64(module.weight.grad) for name, module in matrices.items()}
        qkv = reference.float64(block.attn.c_attn.weight.grad).T
        return dict(zip(("W_Q", "W_K", "W_V"), np.split(qkv, 3), strict=True)) | {
            "W_in": reference.float64(block.mlp.c_fc.weight.grad).T
        }


def pca_basis(rows: Any, rank: int) -> Any:
    """Leading right singular vectors of rows, uncentred."""
    return np.linalg.svd(rows, full_matrices=False)[2][:rank].T


def measured(G: Any, Q: Any, rank: int) -> dict[str, float]:
    """What a row of the table says of gradients in rows and a basis."""
    λ = np.linalg.svd(G, compute_uv=False) ** 2
    return {
        "energy": reference_tangents.energy(G, Q),
        "largest_energy": λ[:rank].sum() / λ.sum(),
        "isotropy": reference.isoscore_star(G),
        "anisotropy": reference_tangents.anisotropy(G, Q),
    }
