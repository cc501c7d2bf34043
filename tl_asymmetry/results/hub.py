"""Results on the Hub: a dataset repository with the file that `save` writes and a card that says what it is of."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from tl_asymmetry.models.readers.hub import in_words
from tl_asymmetry.results.pages import settings_rows


class Uploaded(Protocol):
    """What a result must offer to be uploaded."""

    @property
    def config(self) -> dict[str, Any]:
        """Every setting."""
        ...

    @property
    def arrays(self) -> dict[str, Tensor]:
        """Arrays by name."""
        ...

    def summary(self) -> str:
        """In words."""
        ...

    def save(self, path: str | Path) -> Path:
        """Write it into a folder."""
        ...


SCHEME = "hf://"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TOLD = ("models.", "versions.", "tokens", "sequences")
"""Settings by which two people tell whether their results are of the same, beside the texts' fingerprint."""


def push(result: Uploaded, repository: str, *, private: bool, token: str | None) -> str:
    """Upload a result and its card; see `Result.push_to_hub`."""
    from huggingface_hub import HfApi

    _check(repository)
    with TemporaryDirectory() as folder, in_words(repository, None):
        result.save(folder)
        (Path(folder) / "README.md").write_text(card(result, repository), encoding="utf-8")
        api = HfApi(token=token)
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, repo_type="dataset", folder_path=folder, commit_message=f"{type(result).__name__}"
        )
    return f"{SCHEME}{repository}@{done.oid}"


def fetched_result(address: str, file: str) -> Path:
    """The folder with a result's file, through the Hub's own client and its cache.

    Args:
        address: "hf://owner/name", or "hf://owner/name@revision".
        file: the result's.

    Raises:
        ValueError: no such repository or revision, or none that may be read.
    """
    from huggingface_hub import snapshot_download

    repository, _, revision = address.removeprefix(SCHEME).partition("@")
    _check(repository)
    with in_words(repository, revision or None):
        return Path(
            snapshot_download(repository, repo_type="dataset", revision=revision or None, allow_patterns=[file])
        )


def card(result: Uploaded, repository: str) -> str:
    """What the result is of, for its page: the summary, hashes of weights and texts, versions."""
    rows = [(name, value) for name, value in settings_rows(result.config) if name.startswith(_TOLD) and value != "None"]
    if (texts := fingerprint(result)) is not None:
        rows.append(("texts_xxh3", texts))
    plain = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows]
    return "\n".join(
        [
            "---", "tags: [tl-asymmetry, interpretability]", "---", "",
            "Made with [tl_asymmetry](https://github.com/tl-asymmetry/tl-asymmetry); every number comes back with", "",
            "```python", "from tl_asymmetry import load", "", f'result = load("{SCHEME}{repository}")', "```", "",
            "```text", result.summary().replace("```", "'''"), "```", "",
            "| of | |", "|---|---|", *(f"| `{name}` | {value} |" for name, value in plain), "",
        ]
    )  # fmt: skip


def fingerprint(result: Uploaded) -> str | None:
    """XXH3 of the token ids and of the lengths of the sequences; None for a result that was made without texts.

    Two results of the same texts by the same tokenizer share it, however the texts were given.
    """
    if not {"tokens", "lengths"} <= result.arrays.keys():
        return None
    digest = xxhash.xxh3_128()
    for name in ("lengths", "tokens"):
        digest.update(result.arrays[name].to(torch.int64).numpy().tobytes())
    return digest.hexdigest()


def _check(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"expected a repository as 'owner/name', got {repository!r}; pass e.g. 'me/my-dpo-result'")
