"""Opening a model by name or directory, with raw weights, on every supported version of TransformerLens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def open_model(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32, *, device: str | torch.device | None = None
) -> Any:
    """A TransformerBridge with raw weights, from a local Hugging Face directory or a name on the Hub.

    Args:
        name_or_path: a directory with config.json and weights, or a name such as "EleutherAI/pythia-160m".
        dtype: of the weights.
        device: where to put it; CUDA if there is one, else the CPU.

    Raises:
        ValueError: no such directory, a directory that holds no model, a name that cannot be loaded.

    Example:
        >>> from tl_asymmetry.demo import demo_gpt2
        >>> demo_gpt2("base").save_pretrained("checkpoint")
        >>> open_model("checkpoint").cfg.n_layers
        4
    """
    path = Path(name_or_path)
    if path.exists():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"expected a Hugging Face model directory with config.json, got {str(path)!r}; pass a directory "
                "written by save_pretrained, or a name on the Hub"
            )
    elif isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(str(name_or_path)):
        raise ValueError(
            f"expected an existing directory or a name on the Hub, got {str(name_or_path)!r}; pass the path of a "
            "directory written by save_pretrained, or a name like 'EleutherAI/pythia-160m'"
        )
    from transformer_lens.model_bridge import TransformerBridge

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return TransformerBridge.boot_transformers(str(name_or_path), device=device, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"expected a causal language model that TransformerLens can load, got {str(name_or_path)!r}: {error}; pass "
            "a directory written by save_pretrained, or the name of a supported model"
        ) from error
