"""What a model's files say is read, never run; what is saved or shown says nothing of where it lay."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.reliability.conftest import OPTIONS
from tl_asymmetry import analyze_pair, analyze_trajectory, weights_from
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.readers.hub import public_name

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"


def with_code(folder: Path, **changes: Any) -> Path:
    """A model's folder whose configuration names Python files, as those of repositories do."""
    shutil.copytree(tiny.hf_directory("gpt2"), folder)
    (folder / "own.py").write_text(CODE)
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoModel": "own.Model"}
    for name, keys in (("config.json", own), ("tokenizer_config.json", {"AutoTokenizer": ["own.Tokenizer", None]})):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | {"auto_map": keys} | changes), encoding="utf-8")
    return folder


@pytest.fixture
def no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard input that says yes to whatever is asked, and notices."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))


@pytest.mark.usefixtures("no_answer")
def test_code_beside_a_known_architecture_is_not_run(tmp_path: Path) -> None:
    folder = with_code(tmp_path / "model")
    model = open_model(folder)
    result = analyze_pair(model, weights_from(folder), matrices=["W_Q"], **OPTIONS)
    assert (result.table["delta_norm"] == 0).all()
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.usefixtures("no_answer")
@pytest.mark.parametrize("kind", ["unheard_of", "vit"])
@pytest.mark.parametrize("read", [open_model, weights_from])
def test_an_architecture_that_only_code_could_build_is_refused(tmp_path: Path, kind: str, read: Any) -> None:
    folder = with_code(tmp_path / "model", model_type=kind)
    with pytest.raises(ValueError, match="expected"):
        read(folder)
    assert not list(tmp_path.rglob("ran"))


def test_a_name_says_nothing_of_where_it_lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "dpo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, shown in (
        (tmp_path / "runs" / "dpo", "dpo"), ("runs/dpo", "dpo"), ("./runs/dpo/", "dpo"), ("/gone/away", "away"),
        ("a/b/c", "c"), ("EleutherAI/pythia-160m", "EleutherAI/pythia-160m"), ("gpt2", "gpt2"), (".", tmp_path.name),
    ):  # fmt: skip
        assert public_name(name) == shown


def test_no_local_path_is_saved_or_shown(tmp_path: Path) -> None:
    """A result's file, its report and its explorer, of models in folders whose path is nobody's business."""
    secret = tmp_path / "s3cret-customer"
    secret.mkdir()
    for name, seed in (("base", 0), ("tuned", 1)):
        shutil.copytree(tiny.hf_directory("gpt2", seed), secret / name)
    base, out = open_model(secret / "base"), tmp_path / "out"
    pair = analyze_pair(base, secret / "tuned", matrices=["W_Q"], **OPTIONS)
    run = analyze_trajectory(
        {0: secret / "base", 1: secret / "tuned"}, store=tmp_path / "store", subspaces_from=str(secret / "base"),
        matrices=["W_Q"], **OPTIONS,
    )  # fmt: skip
    for name, result in (("pair", pair), ("run", run)):
        result.save(out / name)
        result.to_html(out / f"{name}.html")
    pair.to_explorer(out / "explorer.html", model=base)
    assert "tuned" in pair.summary()
    files = [path for folder in (out, tmp_path / "store") for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        assert b"s3cret" not in path.read_bytes(), path
