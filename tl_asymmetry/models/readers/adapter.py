"""A PEFT adapter: what it does to every parameter, read from its files; LoRA's as two thin factors, never multiplied.

Several stored tensors may speak of one parameter. The first of these that is there decides:

1. a copy of the module that was trained whole (`modules_to_save`);
2. the adapter's own tensors: factors, magnitudes, rotations, on top of the base given;
3. single rows that were trained (`trainable_token_indices`);
4. a plain copy: biases trained beside, embeddings saved because they grew;
5. nothing: the parameter is the base's.

What PEFT froze (`base_layer`, `original_module`, a plain copy beside factors) decides nothing: it is held against the
base given and said. No parameter is both replaced and factored, and what decided nothing is listed in a note.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.geometry.factored import factored_svd
from tl_asymmetry.geometry.precision import product_dtype
from tl_asymmetry.geometry.spectrum import effective_rank, stable_rank
from tl_asymmetry.models.readers.base import Factors, Weights, WeightSource, as_weights
from tl_asymmetry.models.readers.blueprint import Blueprint, Skeleton, blueprint_of, skeleton_of, untied
from tl_asymmetry.models.readers.changes import Change, Merged, Offset, Product, Rescaled, Rows, Whole
from tl_asymmetry.models.readers.files import TensorFiles
from tl_asymmetry.models.readers.hub import public_name
from tl_asymmetry.models.readers.resolution import candidates, leftovers_note, nearest
from tl_asymmetry.models.readers.stored import read_float, take_dimensions
from tl_asymmetry.models.readers.tuners import TUNERS
from tl_asymmetry.models.view import Parameters

_REFUSED_OPTIONS = {
    "use_qalora": "QALoRA pools its input first",
    "layer_replication": "replicated layers are no layers of the base",
    "alora_invocation_tokens": "an activated adapter acts behind its invocation tokens only",
    "use_bdlora": "block-diagonal factors are stored otherwise",
    "arrow_config": "a router mixes several adapters, token by token",
    "monteclora_config": "its factors are drawn at random",
    "kasa_config": "KaSA truncates the base as well",
    "velora_config": "VeLoRA compresses activations in training",
    "megatron_config": "Megatron's parallel layers are stored otherwise",
}
"""Options of LoRA under which nothing can be merged into one matrix, and why."""

_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_STARTS_FROM_BASE = ("pissa", "olora")
"""Starts that take their factors out of the base's weights, always the same ones."""

_FROZEN = re.compile(r"(?P<module>.+?)\.(base_layer|original_module|token_adapter\.base_layer)\.(?P<leaf>weight|bias)")
_SAVED = re.compile(
    r"(?P<module>.+?)\.(modules_to_save|ln_tuning_layers)(\.(?P<adapter>[^.]+))?\.(?P<leaf>weight|bias)"
)
_ROWS = re.compile(r"(?P<module>.+?)\.(token_adapter\.)?trainable_tokens_delta(\.(?P<adapter>[^.]+))?")
_PLAIN = re.compile(r"(?P<module>.+?)\.(?P<leaf>weight|bias)")
_DEFAULT = "default"


@dataclass
class _Sorted:
    """Stored names by what they say of which parameter or module."""

    tuned: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module → the adapter's tensors by their name in it → as stored."""
    saved: dict[str, str] = field(default_factory=dict)
    """Parameter → its copy that was trained whole."""
    rows: dict[str, str] = field(default_factory=dict)
    """Parameter → some rows of it."""
    plain: dict[str, str] = field(default_factory=dict)
    """Parameter → a plain copy."""
    frozen: dict[str, str] = field(default_factory=dict)
    """Parameter → a copy that was not trained."""
    shared: dict[str, str] = field(default_factory=dict)
    """Tensors that all modules share, by their name."""
    left: list[str] = field(default_factory=list)
    """What has no place in the model."""
    others: dict[str, int] = field(default_factory=dict)
    """Further adapters in the same files, and how many tensors they have."""


class AdapterWeights(WeightSource):
    """The change that an adapter makes, and with a base the adapted weights.

    Args:
        name: what to call it.
        adapter: its adapter_config.json.
        files: its tensors.
        config: the base's transformers configuration.
        base: the base's weights, for `weight`; deltas of LoRA need none.

    Raises:
        ValueError: a kind of adapter or an option that cannot be merged into one matrix at a time, tensors that fit no
            parameter of the base's architecture.
    """

    only_changes = True

    def __init__(
        self, name: str, adapter: Mapping[str, Any], files: TensorFiles, config: Any, base: Weights | None = None
    ) -> None:
        kind = str(adapter.get("peft_type"))
        _refuse_what_cannot_be_merged(adapter, name)
        self.kind = f"{'LoRA' if kind == 'LORA' else kind} adapter"
        self.name, self.bytes, self._base, self._files, self._adapter = name, files.bytes, base, files, adapter
        self.config = config
        skeleton = skeleton_of(config, name)
        known = _sorted(files, skeleton, adapter)
        self.tied = bool(skeleton.tied) and not _unties(known, skeleton, adapter)
        if skeleton.tied and not self.tied:
            skeleton = skeleton_of(untied(config), name)
        self._blueprint = blueprint = blueprint_of(skeleton.config)
        take_dimensions(self, blueprint)
        self.matrices = tuple(blueprint.layouts) if base is None else base.matrices
        if base is not None:
            _check_base(self, base, blueprint)
        notes = []
        if kind == "LORA" and not _is_merged(adapter):
            notes.append(
                f"deltas come from the factors of the adapter {name!r}, not from subtracting stored weights: "
                "rounding_share is 0"
            )
        notes += _origin_note(adapter, base) + self._settle(known, skeleton, adapter)
        self._changes = self._changes_of(known, skeleton, adapter)
        if not self._changes:
            raise ValueError(f"expected an adapter's tensors in {name!r}, got none; pass a trained adapter")
        self.d_vocab = self._words_known()
        self.notes = (*notes, *self._unread_notes(known, skeleton))

    def onto(self, base: Any) -> AdapterWeights:
        if self._base is not None:
            return self
        return AdapterWeights(self.name, self._adapter, self._files, self.config, base)

    # -- deltas ----------------------------------------------------------------------------------------------------

    def factors(self, layer: int, matrix: str) -> Factors | None:
        """ΔW as two thin factors in float32 (no columns where the adapter leaves the matrix alone).

        None for a matrix that the adapter changes otherwise: replaced whole, or not by a product of two factors.
        """
        self._require(layer, matrix)
        layout = self._blueprint.layouts[matrix]
        parameter = self._blueprint.parameter(layer, matrix)
        change = self._changes.get(parameter)
        if change is None:
            rows, columns = (torch.zeros(n, 0) for n in self._blueprint.skeleton.shapes[parameter])
        elif isinstance(change, Product):
            rows, columns = change.sides()
        else:
            return None
        residual, other = (columns, rows) if layout.residual_axis == 1 else (rows, columns)
        other = layout.rows(other)
        return Factors(residual, other if other.ndim == 3 else other.unsqueeze(0))

    def factored(self, layer: int, matrix: str) -> tuple[Tensor, Factors] | None:
        """A matrix of the base and what the adapter adds to it; None where that is no product of two factors."""
        factors = self.factors(layer, matrix)
        return None if factors is None else (self._weights_of_base(None).weight(layer, matrix), factors)

    def delta(self, layer: int, matrix: str, base: Any = None) -> Tensor:
        """The change in TransformerLens orientation.

        Needs a base only where the adapter replaces the matrix whole, or rescales or turns it (DoRA, IA3, OFT).
        """
        factors = self.factors(layer, matrix)
        if factors is not None:
            return factors.product(matrix)
        parameter = self._blueprint.parameter(layer, matrix)
        change: Any = self._changes[parameter]
        if isinstance(change, Whole):
            return super().delta(layer, matrix, base)
        return self._blueprint.layouts[matrix].take(change.delta(partial(self._stored_base, parameter, base)))

    def weight(self, layer: int, matrix: str) -> Tensor:
        self._require(layer, matrix)
        change = self._changes.get(self._blueprint.parameter(layer, matrix))
        if isinstance(change, Whole):
            return self._blueprint.layouts[matrix].take(read_float(self._files, change.name))
        W, ΔW = self._weights_of_base(None).weight(layer, matrix), self.delta(layer, matrix)
        return W.to(product_dtype(W)) + ΔW.to(W.device, product_dtype(W))

    def headless(self, *, include_tied: bool = False) -> Parameters:
        """Only what the adapter changes, as far as that can be told without a base where none is given."""
        makers: dict[str, Callable[[], Tensor]] = {}
        for parameter, change in self._changes.items():
            if self._base is None and not isinstance(change, Whole):
                continue
            for name, own in self._blueprint.extras_in(parameter):
                makers[own] = partial(self._extra, name, own, parameter)
        if self.tied and not include_tied:
            makers.pop("unembed.W_U", None)
        return Parameters(makers)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter's own tensors, as they are stored, and the scale of each module."""
        for name in dict.fromkeys(name for change in self._changes.values() for name in change.names):
            yield name, self._files[name]
        for parameter, change in self._changes.items():
            if isinstance(change, Product):
                yield f"{parameter}.scale", torch.tensor(change.scale, dtype=torch.float64)

    def modules(self) -> pd.DataFrame:
        """One row per module with factors, fused ones whole: `module, rank, scale, delta_norm, stable_rank,
        effective_rank`. The ranks are of the eigenvalues of ΔW ΔWᵀ."""
        rows = []
        for parameter, change in self._changes.items():
            if not isinstance(change, Product):
                continue
            left, right = change.sides()
            λ = factored_svd(left, right)[1].square()
            numbers = (λ.sum().sqrt().item(), stable_rank(λ).item(), effective_rank(λ).item())
            rows.append((parameter.removesuffix(".weight"), left.shape[1], change.scale, *numbers))
        columns = ["module", "rank", "scale", "delta_norm", "stable_rank", "effective_rank"]
        return pd.DataFrame(rows, columns=columns)

    # -- the base --------------------------------------------------------------------------------------------------

    def _weights_of_base(self, base: Any) -> Weights:
        if base is not None:
            return as_weights(base)
        if self._base is None:
            raise ValueError(
                f"expected a base to add the adapter {self.name!r} to, got none; pass base= to weights_from, or ask "
                "for delta with a base"
            )
        return self._base

    def _stored_base(self, parameter: str, base: Any = None) -> Tensor:
        """A parameter of the base as it is stored, put together from its matrices."""
        return self._blueprint.stored(parameter, self._weights_of_base(base).weight).cpu()

    def _extra(self, name: str, own: str, parameter: str) -> Tensor:
        change = self._changes[parameter]
        if isinstance(change, Whole):
            as_stored = self._blueprint.extras[name].as_stored
            return self._blueprint.extra(name, read_float(self._files, change.name, as_stored=as_stored))
        old = self._weights_of_base(None).headless(include_tied=True)[own].cpu()
        if isinstance(change, Rows):
            # Only those rows, with the embedding's own scale.
            rows = torch.zeros(self._blueprint.skeleton.shapes[parameter])
            rows[change.indices] = read_float(self._files, change.name).to(rows)
            new, old = self._blueprint.extra(name, rows), old.to(product_dtype(old)).clone()
            if name == "unembed.W_U":
                old[:, change.indices] = new[:, change.indices]
            else:
                old[change.indices] = new[change.indices]
            return old
        if isinstance(change, Rescaled):
            return old * self._blueprint.extra(name, read_float(self._files, change.name).flatten()).to(old)
        Δ = self._blueprint.extra(name, change.delta(partial(self._stored_base, parameter)))
        common = tuple(slice(0, min(sizes)) for sizes in zip(old.shape, Δ.shape, strict=True))  # of a grown vocabulary
        return old[common].to(product_dtype(old)) + Δ[common]

    # -- sorting ---------------------------------------------------------------------------------------------------

    def _settle(self, known: _Sorted, skeleton: Skeleton, adapter: Mapping[str, Any]) -> list[str]:
        """Decide about copies that may be frozen or trained; what was found, in words."""
        full = bool(known.frozen) or any(f"{module}.weight" in known.plain for module in known.tuned)
        if full:  # one process's part of a ZeRO-3 model: what was frozen is empty there
            known.frozen = {p: stored for p, stored in known.frozen.items() if 0 not in self._files.shape(stored)}
            known.plain = {p: stored for p, stored in known.plain.items() if 0 not in self._files.shape(stored)}
        _refuse_empty(known, self.name, self._files)
        for parameter in [p for p in known.plain if p.removesuffix(".weight") in known.tuned or p in known.saved]:
            known.frozen.setdefault(parameter, known.plain.pop(parameter))
        bias = adapter.get("bias", "none")
        for parameter in [p for p in known.frozen if p.endswith(".bias") and bias != "none"]:
            known.plain.setdefault(parameter, known.frozen.pop(parameter))
        if not full:
            return []
        # A whole state dict: of plain copies only those were trained that the configuration lists, or that differ.
        doubtful = {p: s for p, s in known.plain.items() if not (p.endswith(".bias") and bias != "none")}
        equal: list[str] = []
        different: list[str] = []
        unknown: list[str] = []
        for parameter, stored in {**known.frozen, **doubtful}.items():
            same = self._is_the_bases(_canonical(parameter, skeleton), stored)
            (unknown if same is None else equal if same else different).append(parameter)
        for parameter in doubtful:
            if parameter not in different:
                del known.plain[parameter]
        return self._words(known, equal, different, unknown)

    def _words(self, known: _Sorted, equal: list[str], different: list[str], unknown: list[str]) -> list[str]:
        notes = []
        replaced = [parameter for parameter in different if parameter in known.plain]
        frozen = [parameter for parameter in different if parameter not in known.plain]
        if equal:
            notes.append(
                f"{len(equal)} copies of frozen weights in {self.name!r} equal the base's up to their storage: they "
                "are left aside"
            )
        if frozen:
            notes.append(
                f"{len(frozen)} copies of frozen weights in {self.name!r} differ from the base's, the first being "
                f"{frozen[0]}: is this the base that it was trained from? Deltas are its factors' all the same"
            )
        if replaced:
            notes.append(
                f"{len(replaced)} parameters of {self.name!r} differ from the base's though its configuration lists "
                f"them nowhere, the first being {replaced[0]}: they are read as replaced"
            )
        if unknown:
            notes.append(
                f"{len(unknown)} copies of frozen weights in {self.name!r} are left aside without being compared"
                + ("; pass base= to have them compared" if self._base is None else "")
            )
        return notes

    def _is_the_bases(self, parameter: str, stored: str) -> bool | None:
        """Whether a stored copy is the base's own, up to the coarser of the two formats; None where there is nothing of
        the base to hold it against."""
        expected = self._blueprint.skeleton.shapes.get(parameter)
        if self._base is None or expected is None or self._files.shape(stored)[1:] != expected[1:]:
            return None  # packed into fewer bits, for one
        copy = self._files[stored]
        if not copy.is_floating_point():
            return None
        pairs = [
            (self._blueprint.layouts[matrix].take(copy), self._base.weight(layer, matrix))
            for layer, matrix in self._blueprint.matrices_in(parameter)
            if matrix in self._base.matrices
        ]
        theirs = self._base.headless(include_tied=True)
        pairs += [
            (self._blueprint.extra(name, copy.to(product_dtype(copy))), theirs[own])
            for name, own in self._blueprint.extras_in(parameter)
            if own in theirs
        ]
        return all(_equal_as_stored(ours, base.cpu(), copy.dtype) for ours, base in pairs) if pairs else None

    def _changes_of(self, known: _Sorted, skeleton: Skeleton, adapter: Mapping[str, Any]) -> dict[str, Change]:
        changes: dict[str, Change] = {}
        for module, tensors in sorted(known.tuned.items(), key=lambda item: _natural(item[0])):
            parameter = _canonical(f"{module}.weight", skeleton)
            if f"{module}.weight" in known.saved:
                known.left += tensors.values()
                continue
            bias = tensors.pop("lora_B.bias", None)
            change = changes[parameter] = self._tuned(module, parameter, tensors, known.shared, adapter)
            if bias is not None and isinstance(change, Product):
                changes[f"{module}.bias"] = Offset(self._files, bias, change.scale)
            scaled = tensors.get("ia3_l")
            if scaled is not None and self._files.shape(scaled)[1] == 1 and f"{module}.bias" in skeleton.shapes:
                changes[f"{module}.bias"] = Rescaled(self._files, scaled)
        for parameter, stored in known.rows.items():
            indices = _token_indices(adapter, parameter)
            changes.setdefault(_canonical(parameter, skeleton), Rows(self._files, stored, torch.tensor(indices)))
        for copies in (known.saved, known.plain):
            for parameter, stored in copies.items():
                parameter = _canonical(parameter, skeleton)
                if parameter not in changes:
                    self._fits_whole(stored, parameter)
                    changes[parameter] = Whole(self._files, stored)
        return changes

    def _tuned(
        self,
        module: str,
        parameter: str,
        tensors: dict[str, str],
        shared: Mapping[str, str],
        adapter: Mapping[str, Any],
    ) -> Change:
        rows, columns = self._blueprint.skeleton.shapes[parameter]
        conv1d = parameter in self._blueprint.skeleton.conv1d
        embedding = "lora_embedding_A" in tensors
        turned = conv1d or embedding
        if adapter["peft_type"] != "LORA" or _is_merged(adapter):
            if adapter.get("use_dora") and "lora_magnitude_vector" not in tensors:
                raise _incomplete(module, tensors, self.name)
            additive = TUNERS[adapter["peft_type"]].additive and adapter["peft_type"] != "LORA"
            return Merged(
                self._files, {**tensors, **shared}, adapter, module, (rows, columns), conv1d, needs_base=not additive
            )
        wanted = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        if set(tensors) != set(wanted):
            raise _incomplete(module, tensors, self.name)
        A, B = (tensors[side] for side in wanted)
        out, into = (columns, rows) if turned else (rows, columns)
        rank = self._files.shape(A)[0]
        if embedding and self._files.shape(A)[1] != into:  # resized
            into = self._files.shape(A)[1]
        self._fits(A, (rank, into))
        self._fits(B, (out, rank))
        return Product(self._files, A, B, self._scale(adapter, module, rank), turned)

    def _fits_whole(self, stored: str, parameter: str) -> None:
        shape = self._blueprint.skeleton.shapes[parameter]
        got = self._files.shape(stored)
        longer = parameter in _vocabulary(self._blueprint) and got[1:] == shape[1:]
        if not longer:
            self._fits(stored, shape)

    def _fits(self, stored: str, expected: tuple[int, ...]) -> None:
        got = self._files.shape(stored)
        if got != expected:
            raise ValueError(
                f"expected {stored} of shape {expected} for {self._blueprint.skeleton.architecture} of this size, got "
                f"{got}; pass the adapter of this base"
            )

    def _scale(self, adapter: Mapping[str, Any], module: str, rank: int) -> float:
        """α/r, by PEFT's rules for patterns: the first that matches the end of the module's name."""
        stated = _by_pattern(adapter.get("rank_pattern"), module, adapter.get("r", 8))
        if rank != stated:
            raise ValueError(
                f"expected factors of rank {stated} for {module} by the configuration of {self.name!r}, got {rank}; "
                "pass the configuration that belongs to these factors"
            )
        α = _by_pattern(adapter.get("alpha_pattern"), module, adapter.get("lora_alpha", 8))
        return α / math.sqrt(rank) if adapter.get("use_rslora") else α / rank

    def _words_known(self) -> int:
        """Number of token embeddings, where the adapter brings its own as many as those are."""
        for parameter in _vocabulary(self._blueprint) & set(self._changes):
            change = self._changes[parameter]
            if isinstance(change, Whole):
                return self._files.shape(change.name)[0]
            if isinstance(change, Product) and change.turned:
                return self._files.shape(change.A)[1]
        return self.d_vocab

    def _unread_notes(self, known: _Sorted, skeleton: Skeleton) -> list[str]:
        notes = leftovers_note(self.name, known.left, self.n_layers)
        for other, count in known.others.items():
            notes.append(f"{self.name!r} holds {count} tensors of a further adapter {other!r}, which is left aside")
        apart = [
            parameter
            for parameter in self._changes
            if not any(self._blueprint.matrices_in(parameter)) and not parameter.endswith(".bias")
        ]
        if apart:
            notes.append(
                f"{self.name!r} also changes {', '.join(apart[:4])}{' …' if len(apart) > 4 else ''}: in other_changes, "
                "not in the main table"
            )
        return notes


# -- sorting names -----------------------------------------------------------------------------------------------------


def _sorted(files: TensorFiles, skeleton: Skeleton, adapter: Mapping[str, Any]) -> _Sorted:
    """Sort the stored names by what they say; those of another architecture are refused, not left aside."""
    known = _Sorted()
    strangers: list[str] = []
    kind = TUNERS[str(adapter["peft_type"])]
    mark = re.compile(rf"(?P<module>.+?)\.(?P<tensor>{re.escape(kind.prefix)}\w+)(?P<rest>(\.[^.]+)*)")
    chosen = _chosen_adapter(files, mark)
    for stored in files:
        shared = next((tensor for tensor in kind.shared if tensor in stored.split(".")), None)
        if shared is not None:
            known.shared[shared] = stored
            continue
        for name, _ in candidates(stored):
            if _take(name, stored, known, skeleton, mark, chosen, adapter):
                break
        else:
            (strangers if mark.fullmatch(stored) else known.left).append(stored)
    outside = [name for name in strangers if _layer(name, skeleton) >= skeleton.n_layers]
    if strangers and (outside or not known.tuned):
        raise ValueError(
            f"expected an adapter for {skeleton.architecture} of {skeleton.n_layers} layers, got one for "
            f"{(outside or strangers)[0]}, which that does not have{nearest(strangers[0], skeleton.shapes)}; pass the "
            "adapter of this base"
        )
    known.left += strangers
    return known


def _take(
    name: str,
    stored: str,
    known: _Sorted,
    skeleton: Skeleton,
    mark: re.Pattern[str],
    chosen: str,
    adapter: Mapping[str, Any],
) -> bool:
    """Put a name under what it says; False where it says nothing of this model."""
    for pattern, place in ((_FROZEN, known.frozen), (_SAVED, known.saved), (_ROWS, known.rows), (_PLAIN, known.plain)):
        found = pattern.fullmatch(name)
        if found is None:
            continue
        groups = found.groupdict()
        meaning = skeleton.meaning(f"{groups['module']}.{groups.get('leaf', 'weight')}")
        if meaning is None or meaning[1]:
            continue
        if groups.get("adapter") not in (None, chosen):
            known.others[groups["adapter"]] = known.others.get(groups["adapter"], 0) + 1
            return True
        listed = any(groups["module"].endswith(target) for target in adapter.get("modules_to_save") or ())
        (known.saved if place is known.plain and listed else place).setdefault(meaning[0], stored)
        return True
    if found := mark.fullmatch(name):
        meaning = skeleton.meaning(f"{found['module']}.weight")
        if meaning is None or meaning[1]:
            return False
        parameter = meaning[0]
        owner, tensor = _tensor_of(found["tensor"], found["rest"])
        if owner not in (None, chosen):
            known.others[owner] = known.others.get(owner, 0) + 1
        else:
            known.tuned.setdefault(parameter.removesuffix(".weight"), {})[tensor] = stored
        return True
    return False


def _tensor_of(tensor: str, rest: str) -> tuple[str | None, str]:
    """The adapter's name in a tensor's name, if it is there, and the tensor's name without it: `lora_A.default.weight`
    is `lora_A`, `lora_B.bias` itself."""
    parts = [part for part in rest.split(".") if part]
    leaf = parts.pop() if parts and parts[-1] in ("weight", "bias") else "weight"
    return (parts[0] if parts else None), tensor if leaf == "weight" else f"{tensor}.{leaf}"


def _chosen_adapter(files: Iterable[str], mark: re.Pattern[str]) -> str:
    """The adapter that is read where files hold several: the one called default, or the only one."""
    names = {
        owner
        for stored in files
        if (found := mark.fullmatch(stored)) and (owner := _tensor_of(found["tensor"], found["rest"])[0]) is not None
    }
    if len(names) > 1 and _DEFAULT not in names:
        raise ValueError(
            f"expected one adapter, got {len(names)}: {', '.join(sorted(names))}; pass the folder of one of them, "
            "saved with save_pretrained(selected_adapters=[...])"
        )
    return _DEFAULT if not names or _DEFAULT in names else names.pop()


def _layer(name: str, skeleton: Skeleton) -> int:
    """The layer in a stored name, there or not; -1 for none."""
    return next((layer for plain, _ in candidates(name) if (layer := skeleton.layer_of(plain)) is not None), -1)


def _canonical(parameter: str, skeleton: Skeleton) -> str:
    """Of two tied parameters the one that stands for both."""
    return skeleton.tied.get(parameter, parameter)


def _vocabulary(blueprint: Blueprint) -> set[str]:
    """Parameters with a row for every word."""
    return {str(blueprint.extras[name].parameter) for name in ("embed.W_E", "unembed.W_U") if name in blueprint.extras}


def _unties(known: _Sorted, skeleton: Skeleton, adapter: Mapping[str, Any]) -> bool:
    """Whether one of two tied parameters was trained as a copy of its own."""
    of_ties = {*skeleton.tied, *skeleton.tied.values()}
    return bool(of_ties & set(known.saved)) and not adapter.get("ensure_weight_tying")


def _token_indices(adapter: Mapping[str, Any], parameter: str) -> list[int]:
    """Which rows of an embedding were trained: a list, or one for each module."""
    indices = adapter.get("token_indices") or adapter.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        owner = parameter.removesuffix(".weight")
        indices = next((rows for module, rows in indices.items() if owner.endswith(module)), None)
    if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
        raise ValueError(
            f"expected trainable_token_indices for {parameter} in adapter_config.json, got {indices!r}; pass the "
            "configuration that belongs to this adapter"
        )
    return indices


def _natural(name: str) -> list[tuple[int, str]]:
    """h.2 before h.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _equal_as_stored(ours: Tensor, base: Tensor, stored: torch.dtype) -> bool:
    """Whether two tensors are the same numbers, up to the rounding of the coarser of their formats."""
    if ours.shape != base.shape:
        rows = tuple(slice(0, min(a, b)) for a, b in zip(ours.shape, base.shape, strict=True))
        ours, base = ours[rows], base[rows]
    rounding = max(torch.finfo(stored).eps, torch.finfo(base.dtype).eps)
    ours, base = ours.to(torch.float32), base.to(torch.float32)
    return bool((ours - base).norm() <= rounding * base.norm())


# -- refusals ----------------------------------------------------------------------------------------------------------


def _is_merged(adapter: Mapping[str, Any]) -> bool:
    """Whether a LoRA adapter's change is no product of its factors, so that PEFT must merge it."""
    return bool(adapter.get("use_dora")) or adapter.get("init_lora_weights") in _STARTS_FROM_BASE


def _refuse_what_cannot_be_merged(adapter: Mapping[str, Any], name: str) -> None:
    kind = adapter.get("peft_type")
    if kind not in TUNERS:
        raise ValueError(
            f"expected an adapter that changes single matrices ({', '.join(TUNERS)}), got peft_type {kind!r} in "
            f"{name!r}; pass the merged model"
        )
    for option, reason in _REFUSED_OPTIONS.items():
        if adapter.get(option):
            raise ValueError(
                f"expected an adapter that can be merged into single matrices, got {option} in {name!r} ({reason}); "
                "pass the merged model (merge_and_unload, save_pretrained)"
            )
    start = adapter.get("init_lora_weights")
    if start not in (*_PLAIN_STARTS, *_STARTS_FROM_BASE):
        raise ValueError(
            f"expected an adapter whose start can be told from the base, got init_lora_weights={start!r} in {name!r}; "
            "pass it converted to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or the "
            "merged model"
        )


def _incomplete(module: str, tensors: Iterable[str], name: str) -> ValueError:
    return ValueError(
        f"expected the tensors of {module} that {name!r}'s configuration tells of, got {', '.join(sorted(tensors))}; "
        "pass the adapter saved again, with the configuration that belongs to it"
    )


def _refuse_empty(known: _Sorted, name: str, files: TensorFiles) -> None:
    stored = (*known.saved.values(), *known.plain.values(), *(n for m in known.tuned.values() for n in m.values()))
    empty = [n for n in stored if 0 in files.shape(n)]
    if empty:
        raise ValueError(
            f"expected whole tensors in {name!r}, got {len(empty)} empty ones, the first being {empty[0]}: one "
            "process's part of a model that DeepSpeed ZeRO-3 spread over several; pass the adapter saved with its "
            "parameters gathered (accelerator.get_state_dict, stage3_gather_16bit_weights_on_model_save)"
        )


def _check_base(adapter: AdapterWeights, base: Weights, blueprint: Blueprint) -> None:
    for dimension in ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head"):
        ours, theirs = getattr(adapter, dimension), getattr(base, dimension)
        if ours != theirs:
            raise ValueError(
                f"expected the adapter's configuration to be the base's, got {dimension} {ours} and {theirs} "
                f"({base.name!r}); pass the base that the adapter was trained from"
            )
    unplaced = [matrix for matrix in base.matrices if matrix not in blueprint.layouts]
    if unplaced:
        raise ValueError(
            f"expected an architecture that stores each of its matrices in one parameter, got {base.name!r} with "
            f"{', '.join(unplaced)}; pass the merged model (merge_and_unload, save_pretrained)"
        )


def _origin_note(adapter: Mapping[str, Any], base: Weights | None) -> list[str]:
    trained_from = adapter.get("base_model_name_or_path")
    if base is None or not trained_from or Path(trained_from).name == Path(base.name).name:
        return []
    theirs, ours = public_name(trained_from), public_name(base.name)
    return [f"the adapter says that it was trained from {theirs!r}; the base here is {ours!r}"]
