"""What a configuration says of a model besides its shapes: differences of weights mean less where these differ."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tl_asymmetry.models.readers.base import Weights, WeightSource
from tl_asymmetry.models.readers.configuration import config_of

_FIELDS: dict[str, tuple[str, ...]] = {
    "activation": ("hidden_activation", "hidden_act", "activation_function"),
    "norm epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention window": ("sliding_window",),
    "kinds of layers": ("layer_types",),
    "rotated share of a head": ("partial_rotary_factor", "rotary_pct"),
    "attention soft cap": ("attn_logit_softcapping",),
    "logit soft cap": ("final_logit_softcapping",),
    "attention multiplier": ("attention_multiplier",),
    "query scale": ("query_pre_attn_scalar",),
    "scaled attention scores": ("scale_attn_weights",),
    "residual multiplier": ("residual_multiplier",),
    "embedding multiplier": ("embedding_multiplier",),
    "logit scale": ("logit_scale", "logits_scaling"),
}
"""Names of settings and what transformers' configurations call them."""

_SAME_ACTIVATION = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}


def differing_settings(base: Weights, aligned: Weights) -> list[str]:
    """One sentence for each setting that both models tell of and that differs between them.

    Only what both say is compared: two transformers configurations share nearly all of it, a HookedTransformer and a
    transformers configuration the activation, norm epsilon, rotation, window and soft caps.
    """
    ours, theirs = settings_of(base), settings_of(aligned)
    return [
        f"the two models differ in {name}: {ours[name]} (base) and {theirs[name]} (aligned); the weights' differences "
        "are what they are, but the aligned model computes other things with them"
        for name in ours
        if name in theirs and not _same(ours[name], theirs[name])
    ]


def strange_families(base: Weights, aligned: Weights, *, name: str = "aligned") -> list[str]:
    """A warning where two models are of two families, which may have the same shapes; none where one does not tell."""
    ours, theirs = family_of(base), family_of(aligned)
    if None in (ours, theirs) or ours == theirs:
        return []
    return [
        f"the two models are of two families, {ours} (base) and {theirs} ({name}): unless one is the other converted, "
        "what differs between their weights is not what training changed"
    ]


def family_of(weights: Weights) -> str | None:
    """The family of a model's architecture, such as "gemma2", whichever class wraps it; None where nothing tells."""
    config = config_of(weights)
    if config is not None:
        kind = str(config.get_text_config().model_type)
    else:
        cfg = None if isinstance(weights, WeightSource) else getattr(weights.model, "cfg", None)
        kind = re.sub(r"(For|LMHead|Model).*", "", getattr(cfg, "original_architecture", None) or "")
    return kind.lower().removesuffix("_text").replace("_", "") or None


def settings_of(weights: Weights) -> dict[str, Any]:
    """A model's settings by name; None for one that is off, none that the model does not tell of."""
    config = config_of(weights)
    if config is not None:
        return _of_transformers(config.get_text_config())
    cfg = None if isinstance(weights, WeightSource) else getattr(weights.model, "cfg", None)
    return {} if cfg is None else _of_transformer_lens(cfg)


def _of_transformers(config: Any) -> dict[str, Any]:
    settings = {}
    for name, fields in _FIELDS.items():
        field = next((field for field in fields if hasattr(config, field)), None)
        if field is not None:
            settings[name] = getattr(config, field)
    if not getattr(config, "use_sliding_window", True):
        settings["attention window"] = None
    rotation = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(rotation, Mapping):
        kinds = {name: dict(kind) for name, kind in rotation.items() if isinstance(kind, Mapping)}  # by kind of layer
        rotations = kinds or {"": dict(rotation)}
        thetas = {name: kind.pop("rope_theta", getattr(config, "rope_theta", None)) for name, kind in rotations.items()}
        settings["RoPE theta"] = thetas if kinds else thetas[""]
        for kind in rotations.values():
            kind.pop("partial_rotary_factor", None)
            if kind.get("rope_type", "default") == "default":
                kind.clear()
        settings["RoPE scaling"] = {name: kind for name, kind in rotations.items() if kind} or None
    return settings


def _of_transformer_lens(cfg: Any) -> dict[str, Any]:
    caps = {"attention soft cap": cfg.attn_scores_soft_cap, "logit soft cap": cfg.output_logits_soft_cap}
    settings = {
        "activation": cfg.act_fn,
        "norm epsilon": cfg.eps,
        "attention window": cfg.window_size if cfg.use_local_attn else None,
        **{name: cap if cap > 0 else None for name, cap in caps.items()},
    }
    if cfg.positional_embedding_type == "rotary":
        settings["RoPE theta"] = cfg.rotary_base
    return settings


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str) and isinstance(theirs, str):
        return _SAME_ACTIVATION.get(ours, ours) == _SAME_ACTIVATION.get(theirs, theirs)
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    if None not in (ours, theirs) and isinstance(ours, Mapping) != isinstance(theirs, Mapping):
        return True  # one theta beside one for each kind of layer: the two tell different things
    return bool(ours == theirs)
