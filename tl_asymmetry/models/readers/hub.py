"""Names of models: a local path, or a repository on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")


def local_or_hub(name_or_path: str | Path) -> Path | None:
    """The path, where there is something; None for what may be a name on the Hub.

    Raises:
        ValueError: neither.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name) or name.endswith(_FILES):
        raise ValueError(
            f"expected an existing directory or a name on the Hub, got {name!r}; pass the path of a model directory, a "
            "weights file or an adapter, or a name like 'EleutherAI/pythia-160m'"
        )
    return None
