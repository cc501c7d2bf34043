"""Checkpoints from a hub: a false one that kills, lies and repeats itself, and the real client on a local server."""

from __future__ import annotations

import errno
import functools
import hashlib
import http.server
import json
import os
import shutil
import signal
import threading
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests import tiny
from tl_asymmetry import analyze_trajectory, pythia_checkpoints
from tl_asymmetry.store import StoreReader
from tl_asymmetry.trajectory.pythia import HuggingFaceHub, RemoteFile

TOKENS = tiny.tokens(9, 12)
OPTIONS: dict[str, Any] = {"progress": False, "tokens": TOKENS, "ranks": [4], "matrices": ["W_K", "W_O"], "groups": 3}
STEPS = (0, 1, 1000)
REPOSITORY = "EleutherAI/pythia-tiny"


@functools.cache
def directories() -> dict[int, Path]:
    return {step: tiny.hf_directory("neox", delta=0.03 * i) for i, step in enumerate(STEPS)}


@functools.cache
def expected() -> pd.DataFrame:
    return analyze_trajectory(directories(), **OPTIONS).table


def commit_of(step: int) -> str:
    return hashlib.sha1(f"step{step}".encode()).hexdigest()


class FalseHub:
    """Revisions in local folders."""

    def __init__(self, folders: dict[int, Path], main: Path | None = None) -> None:
        self.folders = {f"step{step}": folder for step, folder in folders.items()}
        if main is not None:
            self.folders["main"] = main
        self.commits = {commit_of(step): folder for step, folder in folders.items()}
        self.fetched: list[tuple[str, str]] = []
        self.on_disk: list[int] = []

    def files(self, repository: str, revision: str) -> tuple[str, list[RemoteFile]]:
        assert repository == REPOSITORY
        if revision not in self.folders:
            raise type("RevisionNotFoundError", (Exception,), {})(revision)
        found = []
        for path in sorted(self.folders[revision].iterdir()):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest() if path.suffix in (".safetensors", ".bin") else None
            found.append(RemoteFile(path.name, len(content), digest))
        found.append(RemoteFile("logs/huge.safetensors", 10**15, "0"))
        return hashlib.sha1(revision.encode()).hexdigest(), found

    def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
        self.fetched.append((commit, name))
        self.on_disk.append(len(list(folder.parent.iterdir())))
        shutil.copy(self.commits[commit] / name, folder / name)
        return folder / name


def test_they_are_fetched_one_at_a_time_and_removed(tmp_path: Path) -> None:
    hub = FalseHub(directories())
    checkpoints = pythia_checkpoints("pythia-tiny", [1000, 0, 1], hub=hub, folder=tmp_path / "files")
    assert not hub.fetched  # nothing before its turn
    assert [c.step for c in checkpoints] == [0, 1, 1000]
    options = OPTIONS | {"store": tmp_path / "run", "reference": "first"}
    result = analyze_trajectory(checkpoints, **options)
    pd.testing.assert_frame_equal(result.table, expected(), check_exact=True)
    assert result.checkpoints["name"].tolist() == [f"{REPOSITORY} step{step}" for step in STEPS]
    assert set(hub.on_disk) == {1}
    assert not list((tmp_path / "files").iterdir())
    names = {name for _, name in hub.fetched}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "logs/huge.safetensors" not in names
    # finished checkpoints are known by their commit
    hub.fetched.clear()
    again = analyze_trajectory(pythia_checkpoints("pythia-tiny", STEPS, hub=hub), **options)
    assert {commit for commit, _ in hub.fetched} == {commit_of(0)}
    pd.testing.assert_frame_equal(again.table, expected(), check_exact=True)
    # kept files are not fetched again
    hub.fetched.clear()
    for _ in range(2):
        kept = pythia_checkpoints("pythia-tiny", [0], hub=hub, folder=tmp_path / "kept", keep=True)
        with kept[0].open() as model:
            assert model.cfg.n_layers == tiny.N_LAYERS
        count = len(hub.fetched)
    assert count == len(hub.fetched) == len({name for _, name in hub.fetched})


def test_wrong_branches_are_refused_by_name_before_anything_is_fetched(tmp_path: Path) -> None:
    hub = FalseHub({**directories(), 143000: directories()[1]})
    words = (
        "expected every step of EleutherAI/pythia-tiny to hold weights of its own, got model.safetensors of step143000 "
        "with the very content of model.safetensors of step1: one of the two branches is wrong; leave one out"
    )
    with pytest.raises(ValueError, match=words):
        pythia_checkpoints("pythia-tiny", [0, 1, 1000, 143000], hub=hub)
    assert len(pythia_checkpoints("pythia-tiny", [0, 1000, 143000], hub=hub)) == 3
    # one wrong shard in a branch that is right otherwise
    shards = {}
    for step in (0, 1):
        shards[step] = tmp_path / f"step{step}"
        shutil.copytree(directories()[step], shards[step])
        content = (shards[step] / "model.safetensors").read_bytes()
        (shards[step] / "model.safetensors").unlink()
        (shards[step] / "model-00001-of-00002.safetensors").write_bytes(content)
        (shards[step] / "model-00002-of-00002.safetensors").write_bytes(b"the same shard")
    with pytest.raises(ValueError, match="got model-00002-of-00002.safetensors of step1 with the very content of"):
        pythia_checkpoints("pythia-tiny", [0, 1], hub=FalseHub(shards))
    assert not hub.fetched


def test_a_branch_of_the_end_is_refused_though_the_end_was_not_asked_for() -> None:
    """pythia-2.8b's step1000 is bit-identical to main, its step54000 to step143000."""
    first, middle, last = (directories()[step] for step in STEPS)
    for branch, hub in {
        "main": FalseHub({0: first, 1000: last, 143000: middle}, main=last),
        "step143000": FalseHub({0: first, 1000: last, 143000: last}, main=middle),
    }.items():
        for steps in ([0, 1000], [1000]):
            with pytest.raises(ValueError, match=f"expected step1000 .* of {branch}, the end of training"):
                pythia_checkpoints("pythia-tiny", steps, hub=hub)
        assert not hub.fetched
    whole = FalseHub({0: first, 1000: middle, 143000: last}, main=last)
    assert [c.step for c in pythia_checkpoints("pythia-tiny", [0, 1000, 143000], hub=whole)] == [0, 1000, 143000]
    other = FalseHub({0: first, 7: middle, 9: last}, main=last)  # a run of 9 steps
    assert len(pythia_checkpoints("pythia-tiny", [0, 9], hub=other)) == 2


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    class Silent(FalseHub):
        broken = "files"
        fault: Exception = TimeoutError("no route")

        def files(self, repository: str, revision: str) -> tuple[str, list[RemoteFile]]:
            if self.broken == "files":
                raise self.fault
            return super().files(repository, revision)

        def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
            raise self.fault

    hub = Silent(directories())
    with pytest.raises(ValueError, match="the hub to answer for step0 of EleutherAI/pythia-tiny, got TimeoutError: no"):
        pythia_checkpoints("pythia-tiny", [0], hub=hub)
    hub.broken = "download"
    checkpoint = pythia_checkpoints("pythia-tiny", [0], hub=hub, folder=tmp_path)[0]
    with (
        pytest.raises(ValueError, match=r"to answer for \S+ of step0 of EleutherAI/pythia-tiny, got TimeoutError"),
        checkpoint.open(),
    ):
        pass
    # what is not the hub's fault is not blamed on it
    hub.fault = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left on device"), checkpoint.open():
        pass
    hub.broken, hub.fault = "files", ImportError("No module named 'huggingface_hub'")
    with pytest.raises(ImportError, match="huggingface_hub"):
        pythia_checkpoints("pythia-tiny", [0], hub=hub)


def test_branches_that_share_tensors_only_are_refused_when_they_are_read(tmp_path: Path) -> None:
    """The same weights in another file: the digests of the files differ, those of the tensors do not."""
    from safetensors.torch import load_file, save_file

    twin = tmp_path / "step7"
    shutil.copytree(directories()[1], twin)
    save_file(load_file(twin / "model.safetensors"), twin / "model.safetensors", {"format": "pt", "note": "x"})
    hub = FalseHub({0: directories()[0], 1: directories()[1], 7: twin})
    with pytest.raises(
        ValueError, match="got EleutherAI/pythia-tiny step7 with exactly those of step 1; one of the tw"
    ):
        analyze_trajectory(pythia_checkpoints("pythia-tiny", [0, 1, 7], hub=hub), **OPTIONS)


def test_what_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FalseHub(directories())
    with pytest.raises(ValueError, match="expected steps from 0 on, got "):
        pythia_checkpoints("pythia-tiny", [], hub=hub)
    with pytest.raises(ValueError, match="expected a revision step3 of EleutherAI/pythia-tiny on the hub, got none"):
        pythia_checkpoints("pythia-tiny", [0, 3], hub=hub)
    with pytest.raises(ValueError, match=r"expected checkpoints of at most 1e-05 GB \(budget_gb\), got 0\.00"):
        pythia_checkpoints("pythia-tiny", [0], hub=hub, budget_gb=1e-5)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "README.md").write_text("x")
    with pytest.raises(
        ValueError, match="expected weights and config.json in step5 of .*, got README.md; pass a model"
    ):
        pythia_checkpoints("pythia-tiny", [5], hub=FalseHub({5: bare}))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 10**6, 10**6))
    checkpoint = pythia_checkpoints("pythia-tiny", [0], hub=hub, folder=tmp_path / "files")[0]
    with (
        pytest.raises(ValueError, match=r"expected 1\.07 GB of free disk in .*files for step 0 of .*, got 0\.001"),
        checkpoint.open(),
    ):
        pass
    assert not hub.fetched


@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_download_is_named_and_fetched_anew(tmp_path: Path, damage: str) -> None:
    class Damaging(FalseHub):
        damaged = 0

        def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
            path = super().download(repository, commit, name, folder)
            if name == "model.safetensors" and not self.damaged:
                type(self).damaged += 1
                content = path.read_bytes()
                path.write_bytes(content[:-5] if damage == "cut" else content[:-5] + b"12345")
            return path

    checkpoint = pythia_checkpoints("pythia-tiny", [0], hub=Damaging(directories()), folder=tmp_path)[0]
    with (
        pytest.raises(ValueError, match="expected model.safetensors of step0 of EleutherAI/pythia-tiny as the hub has"),
        checkpoint.open(),
    ):
        pass
    with checkpoint.open() as model:
        assert model.cfg.d_model == tiny.D_MODEL


def test_a_killed_download_goes_on(tmp_path: Path) -> None:
    class Killing(FalseHub):
        def download(self, repository: str, commit: str, name: str, folder: Path) -> Path:
            if commit == commit_of(1) and name == "model.safetensors":
                content = (self.commits[commit] / name).read_bytes()
                (folder / name).write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().download(repository, commit, name, folder)

    def sweep(hub: FalseHub) -> Any:
        checkpoints = pythia_checkpoints("pythia-tiny", STEPS, hub=hub, folder=tmp_path / "files")
        return analyze_trajectory(checkpoints, **OPTIONS, store=tmp_path / "run")

    child = os.fork()
    if child == 0:
        try:
            sweep(Killing(directories()))
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = list((tmp_path / "files").rglob("model.safetensors"))
    assert len(left) == 1
    hub = FalseHub(directories())
    result = sweep(hub)
    assert (commit_of(1), "model.safetensors") in hub.fetched  # half a file is not taken for a whole one
    assert (commit_of(1), "config.json") not in hub.fetched  # a whole one is
    pd.testing.assert_frame_equal(result.table, expected(), check_exact=True)
    assert StoreReader(tmp_path / "run").steps == [1, 1000]
    assert not list((tmp_path / "files").iterdir())


# --- the real client ------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as one model's revisions need."""

    requests: list[str] = []

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].strip("/")
        folders = {f"step{s}": f for s, f in directories().items()}
        by_commit = {commit_of(s): f for s, f in directories().items()}
        head, _, revision = path.partition(f"api/models/{REPOSITORY}/revision/")
        if not head and revision:
            if revision not in folders:
                self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = []
            for file in sorted(folders[revision].iterdir()):
                content = file.read_bytes()
                entry: dict[str, Any] = {"rfilename": file.name, "size": len(content), "blobId": "b"}
                if file.suffix == ".safetensors":
                    sha = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 134}
                siblings.append(entry)
            sha = hashlib.sha1(revision.encode()).hexdigest()
            answer = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": sha, "siblings": siblings, "tags": []}
            self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        _, _, rest = path.partition(f"{REPOSITORY}/resolve/")
        commit, _, name = rest.partition("/")
        file = by_commit.get(commit, Path("/nowhere")) / name
        if not file.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content = file.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if asked and self.command == "GET":
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._answer(206, content[start:], headers)
            return
        self._answer(200, content, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(name="endpoint")
def endpoint_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.requests.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_real_client_against_a_local_hub(tmp_path: Path, endpoint: str) -> None:
    pytest.importorskip("huggingface_hub")
    hub = HuggingFaceHub(endpoint)
    commit, files = hub.files(REPOSITORY, "step1")
    assert commit == commit_of(1)
    assert {f.name for f in files} == {p.name for p in directories()[1].iterdir()}
    assert {f.name for f in files if f.sha256} == {"model.safetensors"}
    with pytest.raises(ValueError, match="expected a revision step9 of"):
        pythia_checkpoints("pythia-tiny", [9], hub=hub)
    checkpoints = pythia_checkpoints("pythia-tiny", STEPS, hub=hub, folder=tmp_path / "files")
    result = analyze_trajectory(checkpoints, **OPTIONS)
    pd.testing.assert_frame_equal(result.table, expected(), check_exact=True)
    assert not list((tmp_path / "files").iterdir())
