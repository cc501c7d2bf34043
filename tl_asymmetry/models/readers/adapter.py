"""A PEFT LoRA adapter: its change of every matrix as two thin factors, never multiplied out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.geometry.factored import factored_svd
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.geometry.spectrum import effective_rank, stable_rank
from tl_asymmetry.models.readers.base import Factors, Weights, WeightSource
from tl_asymmetry.models.readers.blueprint import Blueprint
from tl_asymmetry.models.readers.files import TensorFiles
from tl_asymmetry.models.readers.folder import StoredParameters, refuse_quantised, take_dimensions
from tl_asymmetry.models.view import Parameters

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")

# Options under which W' − W is not scale · B A, and what it is instead.
_NOT_A_PRODUCT = {
    "use_dora": "DoRA rescales every column of W + BA, so its change needs W and has full rank",
    "lora_bias": "lora_bias adds to the layer's bias through B",
    "use_qalora": "QALoRA pools its input first",
    "layer_replication": "replicated layers are no layers of the base",
    "alora_invocation_tokens": "an activated adapter acts behind its invocation tokens only",
    "target_parameters": "adapters on bare parameters (experts) belong to no matrix analysed here",
    "trainable_token_indices": "trained token rows are stored apart from the embedding",
    "use_bdlora": "block-diagonal factors are stored otherwise",
    "arrow_config": "a router mixes several adapters, token by token",
    "monteclora_config": "its factors are drawn at random",
    "kasa_config": "KaSA truncates the base as well",
    "velora_config": "VeLoRA compresses activations in training",
    "megatron_config": "Megatron's parallel layers are stored otherwise",
}
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Pair:
    """One adapted module."""

    A: str
    """Name of A `[r, in]` in the files."""
    B: str
    """Name of B `[out, r]`."""
    scale: float
    """α/r, or α/√r (rsLoRA)."""


class LoraWeights(WeightSource):
    """The change that a LoRA adapter makes, and with a base the adapted weights.

    Args:
        name: what to call it.
        adapter: its adapter_config.json.
        files: its tensors.
        config: the base's transformers configuration.
        base: the base's weights, for `weight`; deltas need none.

    Raises:
        ValueError: another kind of adapter, options whose change is no product of two factors, factors that fit no
            parameter of the base's architecture.
    """

    kind = "LoRA adapter"
    only_changes = True

    def __init__(
        self, name: str, adapter: Mapping[str, Any], files: TensorFiles, config: Any, base: Weights | None = None
    ) -> None:
        _refuse_other_adapters(adapter, name)
        refuse_quantised(config, name)
        self.name, self.bytes, self._base, self._files = name, files.bytes, base, files
        self._blueprint = blueprint = Blueprint(config)
        self.n_layers = blueprint.n_layers
        take_dimensions(self, blueprint)
        self.matrices = tuple(blueprint.layouts) if base is None else base.matrices
        self.tied = blueprint.view.tied
        self._pairs, replaced = self._sorted(adapter)
        self._replaced = StoredParameters(blueprint, files, replaced, only_some=True)
        of_matrices = {
            blueprint.at(layout.parameter, layer)
            for layout in blueprint.layouts.values()
            for layer in range(self.n_layers)
        }  # fmt: skip
        others = [parameter for parameter in self._pairs if parameter not in of_matrices]
        if others:
            raise ValueError(
                f"expected an adapter of attention and MLP matrices, got one that also adapts {others[0]} "
                f"({len(others)} such modules); pass the merged model"
            )
        self.notes = (
            f"deltas come from the factors of the adapter {name!r}, not from subtracting stored weights: "
            "rounding_share is 0",
        )
        trained_from = adapter.get("base_model_name_or_path")
        if base is not None and trained_from and Path(trained_from).name != Path(base.name).name:
            self.notes += (
                f"the adapter says that it was trained from {trained_from!r}; the base here is {base.name!r}",
            )

    # -- deltas ----------------------------------------------------------------------------------------------------

    def factors(self, layer: int, matrix: str) -> Factors | None:
        """ΔW as two thin factors in float32 (no columns where the adapter leaves the matrix alone).

        None for a matrix that the adapter replaces whole (`modules_to_save`).
        """
        self._require(layer, matrix)
        layout = self._blueprint.layouts[matrix]
        parameter = self._blueprint.at(layout.parameter, layer)
        if self._replaced.has(parameter):
            return None
        rows, columns = self._sides(parameter)
        residual, other = (columns, rows) if layout.residual_axis == 1 else (rows, columns)
        other = layout.rows(other)
        return Factors(residual, other if other.ndim == 3 else other.unsqueeze(0))

    def delta(self, layer: int, matrix: str, base: Any = None) -> Tensor:
        """scale · B A in TransformerLens orientation; needs no base unless the adapter replaces the matrix whole."""
        factors = self.factors(layer, matrix)
        return super().delta(layer, matrix, base) if factors is None else factors.product(matrix)

    def weight(self, layer: int, matrix: str) -> Tensor:
        self._require(layer, matrix)
        factors = self.factors(layer, matrix)
        if factors is None:
            return self._replaced.matrix(layer, matrix)
        if self._base is None:
            raise ValueError(
                f"expected a base to add the adapter {self.name!r} to, got none; pass base= to weights_from, or ask "
                "for delta"
            )
        W = self._base.weight(layer, matrix)
        change = factors.product(matrix)
        return W.to(product_dtype(W)) + change.to(W.device, product_dtype(W))

    def headless(self, *, include_tied: bool = False) -> Parameters:
        """Only what the adapter replaces (trained biases, `modules_to_save`); all else is the base's."""
        return self._replaced.headless(include_tied=include_tied, tied=self.tied)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter's own tensors, as they are stored, and the scale of each module."""
        yield from self._files.items()
        for parameter, pair in self._pairs.items():
            yield f"{parameter}.scale", torch.tensor(pair.scale, dtype=torch.float64)

    def modules(self) -> pd.DataFrame:
        """One row per adapted module, fused ones whole: `module, rank, scale, delta_norm, stable_rank, effective_rank`.

        The ranks are of the eigenvalues of ΔW ΔWᵀ.
        """
        rows = []
        for parameter, pair in self._pairs.items():
            left, right = self._sides(parameter)
            λ = factored_svd(left, right)[1].square()
            numbers = (λ.sum().sqrt().item(), stable_rank(λ).item(), effective_rank(λ).item())
            rows.append((parameter.removesuffix(".weight"), left.shape[1], pair.scale, *numbers))
        columns = ["module", "rank", "scale", "delta_norm", "stable_rank", "effective_rank"]
        return pd.DataFrame(rows, columns=columns)

    # -- reading ---------------------------------------------------------------------------------------------------

    def _sides(self, parameter: str) -> tuple[Float[Tensor, "rows r"], Float[Tensor, "columns r"]]:
        """The change of a stored parameter as rows · columnsᵀ."""
        if parameter not in self._pairs:
            rows, columns = self._blueprint.shapes[parameter]
            return torch.zeros(rows, 0), torch.zeros(columns, 0)
        pair = self._pairs[parameter]
        A, B = self._files[pair.A], self._files[pair.B]
        dtype = product_dtype(A, B)
        # Linear holds [out, in] = B A; GPT-2's Conv1D [in, out] = (B A)ᵀ.
        into, out = A.mT.to(dtype), pair.scale * B.to(dtype)
        return (into, out) if self._is_conv1d(parameter) else (out, into)

    def _is_conv1d(self, parameter: str) -> bool:
        return parameter in self._blueprint.conv1d

    def _sorted(self, adapter: Mapping[str, Any]) -> tuple[dict[str, _Pair], dict[str, str]]:
        """Adapted parameters with their factors, and replaced parameters with their names in the files."""
        sides: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        for name in self._files:
            found = _LORA.fullmatch(name)
            if found is not None:
                sides.setdefault(found["module"].removeprefix(_PREFIX), {})[found["side"]] = name
                continue
            parameter = name.removeprefix(_PREFIX).replace(".modules_to_save.default", "").replace(".base_layer", "")
            if parameter in {*self._blueprint.tied, *self._blueprint.tied.values()}:
                raise ValueError(
                    f"expected an adapter that leaves a tied embedding alone, got {name}, which may or may not untie "
                    "it; pass the merged model (merge_and_unload, save_pretrained)"
                )
            if parameter not in self._blueprint.shapes or "lora_" in name:
                raise ValueError(
                    f"expected LoRA factors of {self._blueprint.architecture} or whole parameters of it, got {name}; "
                    "pass an adapter that was trained from this base, or the merged model"
                )
            self._fits(name, self._files.shape(name), self._blueprint.shapes[parameter])
            replaced[parameter] = name
        if not sides and not replaced:
            raise ValueError(f"expected LoRA factors in {self.name!r}, got no tensors; pass a trained adapter")
        pairs = {}
        for module, names in sorted(sides.items(), key=lambda item: _natural(item[0])):
            if set(names) != {"A", "B"}:
                raise ValueError(
                    f"expected both factors of {module} in {self.name!r}, got lora_{''.join(names)} alone; pass the "
                    "adapter saved again"
                )
            pairs[self._adapted(module, names)] = _Pair(names["A"], names["B"], self._scale(adapter, module, names))
        return pairs, replaced

    def _adapted(self, module: str, names: Mapping[str, str]) -> str:
        parameter = f"{module}.weight"
        if parameter not in self._blueprint.shapes:
            raise ValueError(
                f"expected an adapter for {self._blueprint.architecture}, got one for {module}, which that "
                "architecture does not have; pass the adapter of this base"
            )
        out, into = self._blueprint.shapes[parameter]
        if self._is_conv1d(parameter):
            out, into = into, out
        A, B = self._files.shape(names["A"]), self._files.shape(names["B"])
        rank = A[0]
        self._fits(names["A"], A, (rank, into))
        self._fits(names["B"], B, (out, rank))
        return parameter

    def _fits(self, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if got != expected:
            raise ValueError(
                f"expected {name} of shape {expected} for {self._blueprint.architecture} of this size, got {got}; pass "
                "the adapter of this base"
            )

    def _scale(self, adapter: Mapping[str, Any], module: str, names: Mapping[str, str]) -> float:
        """α/r, by PEFT's rules for patterns: the first that matches the end of the module's name."""
        rank = self._files.shape(names["A"])[0]
        stated = _by_pattern(adapter.get("rank_pattern"), module, adapter.get("r", 8))
        if rank != stated:
            raise ValueError(
                f"expected factors of rank {stated} for {module} by adapter_config.json, got {rank}; pass the "
                "configuration that belongs to these factors"
            )
        α = _by_pattern(adapter.get("alpha_pattern"), module, adapter.get("lora_alpha", 8))
        return α / math.sqrt(rank) if adapter.get("use_rslora") else α / rank


def _natural(name: str) -> list[tuple[int, str]]:
    """h.2 before h.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refuse_other_adapters(adapter: Mapping[str, Any], name: str) -> None:
    if adapter.get("peft_type") != "LORA":
        raise ValueError(
            f"expected a LoRA adapter, got peft_type {adapter.get('peft_type')!r} in {name!r}; pass the merged model"
        )
    for option, reason in _NOT_A_PRODUCT.items():
        if adapter.get(option):
            raise ValueError(
                f"expected an adapter whose change is scale · B A, got {option} in {name!r} ({reason}); pass the "
                "merged model (merge_and_unload, save_pretrained)"
            )
    start = adapter.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"expected an adapter that starts from the unchanged base, got init_lora_weights={start!r} in {name!r}, "
            "which takes its start out of the base's weights; pass it converted to plain LoRA "
            "(path_initial_model_for_weight_conversion), or the merged model"
        )
