"""Checkpoints of the Pythia suite: fetched from the hub one at a time, checked, and removed after use."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from tqdm.auto import tqdm

from tl_asymmetry.arguments import checked, listed
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.processes import present_processes
from tl_asymmetry.trajectory.checkpoints import Checkpoint, made_model

_SETTINGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json")  # fmt: skip
_LAST_STEP = 143_000
_ENDS = ("main", f"step{_LAST_STEP}")
"""Branches of the end of training: what wrong branches serve."""
_OWN_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
"""Faults of this machine's disk, not of the hub."""
_SPARE_BYTES = 1 << 30
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file of one revision of a repository."""

    name: str
    """Its path in the repository."""
    size: int
    """Bytes."""
    sha256: str | None
    """Of its content where the hub knows it, which it does for large files."""


@runtime_checkable
class Hub(Protocol):
    """Where revisions come from; `HuggingFaceHub` is the real one."""

    def files(self, repository: str, revision: str) -> tuple[str, list[RemoteFile]]:
        """The commit a revision stands for, and its files."""
        ...

    def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
        """Fetch one file into a folder, going on where an earlier attempt was killed; its path."""
        ...


class HuggingFaceHub:
    """The hub at huggingface.co, or where HF_ENDPOINT points, through huggingface_hub.

    Args:
        endpoint: another address, such as a mirror's.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint

    def files(self, repository: str, revision: str) -> tuple[str, list[RemoteFile]]:
        """As `Hub.files`."""
        from huggingface_hub import HfApi

        found = HfApi(endpoint=self._endpoint).model_info(repository, revision=revision, files_metadata=True)
        return str(found.sha), [
            RemoteFile(s.rfilename, int(s.size or 0), None if s.lfs is None else s.lfs.sha256)
            for s in found.siblings or ()
        ]

    def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
        """As `Hub.download`."""
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repository, name, revision=commit, local_dir=folder, endpoint=self._endpoint))


@checked
def pythia_checkpoints(
    name: str,
    steps: Sequence[int],
    *,
    folder: str | Path | None = None,
    budget_gb: float = 50.0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    keep: bool = False,
    hub: Hub | None = None,
) -> list[Checkpoint]:
    """Checkpoints of a Pythia model (or any with revisions named step0, step1 …) for `analyze_trajectory`.

    On the hub most step branches of pythia-2.8b serve weights of the end of training, and two of pythia-12b a wrong
    shard (EleutherAI/pythia issues 205 and 206). So the digests that the hub has of all weight files are compared
    before anything is fetched: two steps that share one are refused by name, and so is a step that shares one with the
    end of training, whether that was asked for or not. `analyze_trajectory` compares the tensors themselves once more.

    Nothing is fetched here. Each checkpoint is fetched when its turn comes, its files are checked against the hub's
    sizes and digests, and they are removed when it has been measured. A download that was killed goes on where it
    was, if `folder` is given.

    Args:
        name: "pythia-160m" or a full name such as "EleutherAI/pythia-160m-deduped".
        steps: which of 0, 1, 2, 4 … 512, 1000, 2000 … 143000.
        folder: where the files of the checkpoint at hand lie; a temporary one by default.
        budget_gb: the most that one checkpoint's files may take there, in units of 10⁹ bytes.
        dtype: of the loaded weights.
        device: where models go; CUDA if there is one, else the CPU.
        keep: leave the files there.
        hub: where revisions come from; huggingface.co by default.

    Raises:
        ValueError: no steps, a step there is no revision for, a hub that does not answer, files above the budget or
            the free disk, a step with a weight file of another step or of the end of training.
        ImportError: huggingface_hub is not installed.

    Example:
        >>> checkpoints = pythia_checkpoints("pythia-160m", [0, 1000, 143000])  # doctest: +SKIP
        >>> result = analyze_trajectory(checkpoints, texts, store="pythia-160m")  # doctest: +SKIP
    """
    repository = name if "/" in name else f"EleutherAI/{name}"
    wanted = sorted(set(listed("steps", steps, int, instead="steps=[0, 1000, 143000]")))
    if not wanted or wanted[0] < 0:
        raise ValueError(f"expected steps from 0 on, got {wanted!r}; pass e.g. steps=[0, 1000, 143000]")
    hub = HuggingFaceHub() if hub is None else hub
    place = None if folder is None else Path(folder).expanduser()
    asked = tqdm(wanted, desc="revisions", disable=len(wanted) < 8)
    revisions = {step: _revision(hub, repository, step) for step in asked}
    _refuse_shared_files(repository, revisions)
    _refuse_files_of_the_end(hub, repository, revisions)
    for step, revision in revisions.items():
        size = sum(file.size for file in revision.files)
        if size > budget_gb * 1e9:
            raise ValueError(
                f"expected checkpoints of at most {budget_gb:g} GB (budget_gb), got {size / 1e9:.3g} GB for step "
                f"{step} of {repository}; pass a larger budget"
            )

    def checkpoint(step: int, revision: _Revision) -> Checkpoint:
        @contextmanager
        def opening() -> Iterator[Any]:
            with (
                _fetched(hub, repository, step, revision, place, keep) as path,
                made_model(lambda: open_model(path, dtype, device=device)) as model,
            ):
                yield model

        return Checkpoint(step, f"{repository} step{step}", opening, lambda: f"{repository}@{revision.commit}")

    return [checkpoint(step, revision) for step, revision in revisions.items()]


@dataclass(frozen=True)
class _Revision:
    """What a step's branch holds."""

    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def weights(self) -> tuple[RemoteFile, ...]:
        return tuple(file for file in self.files if file.name.endswith((".safetensors", ".bin")))


def _listed(hub: Hub, repository: str, revision: str) -> tuple[str, list[RemoteFile]] | None:
    """What `Hub.files` says, or None where there is no such revision or repository."""
    with _answers(f"{revision} of {repository}"):
        try:
            return hub.files(repository, revision)
        except Exception as error:
            if type(error).__name__ in ("RevisionNotFoundError", "RepositoryNotFoundError"):
                return None
            raise


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """Put a client's own error, of another class in every version, into words; what is not the hub's fault stays."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ImportError) or getattr(error, "errno", None) in _OWN_FAULTS:
            raise
        raise ValueError(
            f"expected the hub to answer for {what}, got {type(error).__name__}: {error}; check the network, or pass "
            "directories of checkpoints to analyze_trajectory"
        ) from error


def _revision(hub: Hub, repository: str, step: int) -> _Revision:
    found = _listed(hub, repository, f"step{step}")
    if found is None:
        raise ValueError(
            f"expected a revision step{step} of {repository} on the hub, got none; pass a step the model was saved at"
        )
    commit, files = found
    files = [file for file in files if "/" not in file.name and "\\" not in file.name]  # a model lies at the top
    there = {file.name for file in files}
    tensors = [file for file in files if file.name.endswith(".safetensors")]
    pickled = [file for file in files if file.name.startswith("pytorch_model") and file.name.endswith(".bin")]
    weights = tensors or pickled
    if not weights or "config.json" not in there:
        raise ValueError(
            f"expected weights and config.json in step{step} of {repository}, got "
            f"{', '.join(sorted(there)) or 'nothing'}; pass a model in the format of transformers"
        )
    ending = ".safetensors.index.json" if tensors else ".bin.index.json"
    chosen = [*(file for file in files if file.name in _SETTINGS or file.name.endswith(ending)), *weights]
    return _Revision(commit, tuple(chosen))


def _refuse_shared_files(repository: str, revisions: Mapping[int, _Revision]) -> None:
    """Refuse two steps that hold the same weight file: a wrong branch, or a wrong shard in a right one."""
    seen: dict[str, tuple[int, str]] = {}
    for step, revision in revisions.items():
        for file in revision.weights:
            if file.sha256 is None:
                continue
            other, name = seen.setdefault(file.sha256, (step, file.name))
            if other != step:
                raise ValueError(
                    f"expected every step of {repository} to hold weights of its own, got {file.name} of step{step} "
                    f"with the very content of {name} of step{other}: one of the two branches is wrong; leave one out"
                )


def _refuse_files_of_the_end(hub: Hub, repository: str, revisions: Mapping[int, _Revision]) -> None:
    """Refuse a step before the last that holds a weight file of the end of training, though no step asked for does."""
    ends = {branch: found for branch in _ENDS if (found := _listed(hub, repository, branch)) is not None}
    of_the_end = {f.sha256: (branch, f.name) for branch, (_, files) in ends.items() for f in files if f.sha256}
    # Other runs end elsewhere: there only their last step here may be the end.
    last = _LAST_STEP if f"step{_LAST_STEP}" in ends else max(revisions)
    for step, revision in revisions.items():
        for file in revision.weights:
            if step < last and file.sha256 in of_the_end:
                branch, name = of_the_end[file.sha256]
                raise ValueError(
                    f"expected step{step} of {repository} to hold weights of its own, got {file.name} with the very "
                    f"content of {name} of {branch}, the end of training: the branch is wrong; leave the step out"
                )


@contextmanager
def _fetched(
    hub: Hub, repository: str, step: int, revision: _Revision, place: Path | None, keep: bool
) -> Iterator[Path]:
    """The folder with a step's files, checked; removed at the end."""
    with tempfile.TemporaryDirectory(prefix="tl_asymmetry_") if place is None else _made(place) as root:
        # No part of the path comes from the hub.
        label = hashlib.sha256(f"{repository}@{revision.commit}".encode()).hexdigest()[:16]
        processes = present_processes()
        # A folder for each process: another may remove its own while this one reads.
        label += "" if processes.count == 1 else f"-{processes.rank}"
        folder = Path(root) / f"step{step}-{label}"
        folder.mkdir(exist_ok=True)
        missing = [file for file in revision.files if not _is_whole(folder / file.name, file)]
        needed = sum(file.size for file in missing)
        free = shutil.disk_usage(folder).free
        if needed + _SPARE_BYTES > free:
            raise ValueError(
                f"expected {(needed + _SPARE_BYTES) / 1e9:.3g} GB of free disk in {folder.parent} for step {step} of "
                f"{repository}, got {free / 1e9:.3g}; make room or pass another folder"
            )
        for file in missing:
            with _answers(f"{file.name} of step{step} of {repository}"):
                path = hub.download(repository, revision.commit, file.name, folder)
            if not path.resolve().is_relative_to(folder.resolve()) or not _is_whole(path, file):
                path.unlink(missing_ok=True)
                raise ValueError(
                    f"expected {file.name} of step{step} of {repository} as the hub has it ({file.size} bytes), got "
                    "another content; run again to fetch it anew"
                )
        try:
            yield folder
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _made(place: Path) -> Iterator[Path]:
    place.mkdir(parents=True, exist_ok=True)
    yield place


def _is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether a file is there with the hub's size, and its digest where the hub has one."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if file.sha256 is None:
        return True
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == file.sha256
