"""Names of models: a local path, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_WEIGHTS = ("*.safetensors", "*.bin")
_WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_PICKLED = ("pytorch_model*.bin", "adapter_model.bin")
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")


def public_name(name: str | Path) -> str:
    """What a result or a page may say of where a model came from: a folder's last part, or a name on the Hub.

    Example:
        >>> public_name("/home/me/secret/checkpoint-500"), public_name("EleutherAI/pythia-160m")
        ('checkpoint-500', 'EleutherAI/pythia-160m')
    """
    path = Path(name)
    if path.is_absolute() or os.path.exists(path) or len(path.parts) > 2:  # pathlib raises for what no path can be
        return Path(os.path.abspath(path)).name
    return str(name)


def at_home(name_or_path: str | Path) -> str | Path:
    """A path with `~` for the home folder written out; anything else as it is."""
    return Path(name_or_path).expanduser() if str(name_or_path).startswith("~") else name_or_path


def local_or_hub(name_or_path: str | Path) -> Path | None:
    """The path, where there is something; None for what may be a name on the Hub.

    Raises:
        ValueError: neither.
    """
    path = Path(at_home(name_or_path))
    if os.path.exists(path):
        return path
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name) or name.endswith(_FILES):
        raise ValueError(
            f"expected an existing directory or a name on the Hub, got {name!r}; pass the path of a model directory, a "
            "weights file or an adapter, or a name like 'EleutherAI/pythia-160m'"
        )
    return None


def fetched(name: str, revision: str | None, subfolder: str | None, token: str | None) -> Path:
    """The folder with a repository's weights, through the Hub's own client and its cache.

    Torch's files (`.bin`) are fetched only where there are no safetensors. Nothing of it is code that would be run.

    Raises:
        ValueError: no such repository, revision or folder, none that this token may read; offline with nothing, or only
            a part, in the cache.
    """
    from huggingface_hub import snapshot_download

    inside = "" if subfolder is None else f"{subfolder.strip('/')}/"
    at = f" at revision {revision!r}" if revision is not None else ""

    def download(patterns: tuple[str, ...]) -> Path:
        wanted = [f"{inside}{pattern}" for pattern in patterns]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, token=token)) / inside

    with in_words(name, revision):
        folder = download(_WANTED)
        if not any(folder.glob("*.safetensors")):
            folder = download((*_WANTED, *_PICKLED))
    if not folder.is_dir():
        raise ValueError(f"expected a folder {subfolder!r} in {name!r}{at}, got none; pass one that its page lists")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise ValueError(
            f"expected weights of {name!r}{at} in {str(folder)!r}, got {_listed(folder)}: a download that was not "
            "finished, or a repository without weights in a form that is read here; connect and call again, or pass "
            "one with safetensors"
        )
    return folder


@contextmanager
def in_words(name: str, revision: str | None) -> Iterator[None]:
    """Say what the Hub's client refuses in our words.

    Raises:
        ValueError: no such repository or revision, none that this token may read, or neither network nor cache.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )  # fmt: skip

    at = f" at revision {revision!r}" if revision is not None else ""
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(
            f"expected access to {name!r}, got a gated repository; ask for access on its page and pass token=, or log "
            "in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"expected a revision of {name!r}, got {revision!r}; pass one that its page lists") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"expected a local path or a name that the Hub knows, got {name!r}; pass a local directory, check the "
            "name, or pass token= where the repository is private"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"expected {name!r}{at} in the cache or a network to fetch it by, got neither; pass a local directory, or "
            "connect and unset HF_HUB_OFFLINE"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"expected a local path or a name that the Hub knows, got {name!r}: {error}; pass a local directory, or "
            "check the name and the network"
        ) from error


def _listed(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
