"""The whole way in a new process whose sockets cannot connect, and whose locale knows ASCII alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import tiny
from tl_asymmetry import PairAnalysis

_SCRIPT = """
import locale, socket, sys, warnings
assert locale.getpreferredencoding(False).lower() in ("ascii", "ansi_x3.4-1968", "us-ascii"), locale
def refused(*arguments, **keywords):
    raise AssertionError(f"a request: {arguments}")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refused
import runpy
import tl_asymmetry
from tl_asymmetry import analyze_pair
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.results.result import load
base_folder, aligned_folder, out, demo = sys.argv[1:]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    base = open_model(base_folder)
    base.cfg.model_name = "модель-日本-\\u00e9-\\ud800"
    texts = ["w1 w2 r\\u00e9d w4 w5 w6 w7"] * 4
    result = analyze_pair(base, aligned_folder, texts, ranks=[1], matrices=["W_Q"], groups=1, progress=False)
    assert load(result.save(out)).table.equals(result.table)
    result.to_html(f"{out}/report.html")
    result.to_explorer(f"{out}/explorer.html", model=base)
for stream in (sys.stdout, sys.stderr):
    print("--- demo", file=stream, flush=True)
sys.argv = ["tl-asymmetry", "demo", "--out", demo]
runpy.run_module("tl_asymmetry", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True)
class Offline:
    """What the process wrote: of two folders, and of the demo with what it said."""

    folder: Path
    demo: Path
    out: str
    err: str


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Offline:
    place = tmp_path_factory.mktemp("offline")
    words = tuple("réd" if word == "w3" else word for word in tiny.WORDS)
    for name, seed in (("base", 0), ("aligned", 1)):
        shutil.copytree(tiny.hf_directory("gpt2", seed), place / name)
        tiny.tokenizer(words, name="accents").save_pretrained(place / name)
    (place / "script.py").write_text(_SCRIPT, encoding="utf-8")
    settings = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, *(place / name for name in ("script.py", "base", "aligned", "out", "demo"))]
    ended = subprocess.run(
        command, env=os.environ | settings, check=False, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = (text.rpartition("--- demo\n")[2] for text in (ended.stdout, ended.stderr))
    return Offline(place / "out", place / "demo", *said)


def test_no_request_leaves_this_machine(offline: Offline) -> None:
    """From folders to pages."""
    for name in ("result.safetensors", "report.html", "explorer.html"):
        assert (offline.folder / name).stat().st_size > 1000


def test_nothing_depends_on_the_locale(offline: Offline) -> None:
    """Names and texts of any language, saved, reported and read again."""
    for page in ("report.html", "explorer.html"):
        assert "модель-日本-é-" in (offline.folder / page).read_text(encoding="utf-8")


def test_the_demo_is_that_of_the_readme(offline: Offline) -> None:
    """As a user runs it."""
    report = offline.demo / "report.html"
    assert offline.out.splitlines()[-1] == f"open the report: {report}"
    assert offline.out.startswith("PairAnalysis: ")
    assert "W_out" in offline.out
    written = ["explorer.html", "report.html", "result.safetensors"]
    assert sorted(p.name for p in offline.demo.iterdir()) == written
    assert f"open the explorer: {report.with_name('explorer.html')}" in offline.out
    assert "Traceback" not in offline.err
    assert "Warning" not in offline.err
    assert offline.out.startswith(PairAnalysis.load(offline.demo).summary())
