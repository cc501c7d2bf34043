"""The command line, end to end: what it writes, what it says, how it ends. The demo runs offline, in reliability."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import tiny
from tl_asymmetry import PairAnalysis, TangentAnalysis, TrajectoryAnalysis, analyze_pair, load
from tl_asymmetry.cli import main
from tl_asymmetry.cli.options import as_model, as_path
from tl_asymmetry.cli.texts import read_texts
from tl_asymmetry.demo import demo_texts
from tl_asymmetry.results.pages import page_path
from tl_asymmetry.results.report import Report, write_report
from tl_asymmetry.results.result import Result

COMMANDS = (
    "demo", "analyze", "stages", "trajectory", "compare", "spectra", "deltas", "tangents", "grok", "report",
)  # fmt: skip
PASSAGES = [" ".join(f"w{(5 * i + j * j) % 90}" for j in range(12 + i)) for i in range(8)]


@pytest.fixture(name="pair")
def pair_fixture() -> list[str]:
    return [str(tiny.hf_directory("gpt2")), str(tiny.hf_directory("gpt2", delta=0.05))]


@pytest.fixture
def plain_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, which each kind of result has a test of: drawing them takes longer than the command."""

    def to_html(self: Result, path: str | Path) -> Path:
        return write_report(page_path(path), Report(title=self._title()))

    monkeypatch.setattr(Result, "to_html", to_html)


def bad(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Ends with status 2 and one line on standard error, and gives that line."""
    capsys.readouterr()
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("tl-asymmetry: ")]
    assert out == ""
    assert err.endswith(lines[-1] + "\n")
    assert len(lines) == 1
    return lines[0]


def test_analyze_and_report(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    text, lines = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    text.write_text("\n\n".join(PASSAGES) + "\n\n\n", encoding="utf-8")
    entries = [PASSAGES[0], *({"text": p} for p in PASSAGES[1:])]
    lines.write_text("\n".join(map(json.dumps, entries)) + "\n\n", encoding="utf-8")
    options = ["--ranks", "1", "4", "--groups", "4", "--batch-size", "3", "--seed", "2"]
    assert read_texts(text) == read_texts(lines) == PASSAGES
    out = tmp_path / "out"
    assert main(["analyze", *pair, "--texts", str(lines), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"open the report: {out / 'report.html'}"
    result = PairAnalysis.load(out)
    arguments = result.config["arguments"]
    assert (arguments["ranks"], arguments["groups"], arguments["batch_size"], arguments["seed"]) == ([1, 4], 4, 3, 2)
    assert result.config["sequences"] == len(PASSAGES)

    page = out / "report.html"
    assert "Does the choice of rank matter?" in page.read_text(encoding="utf-8")
    request.getfixturevalue("plain_pages")
    page.unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"open the report: {page}\n"
    assert result._title() in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("plain_pages")
def test_analyze_without_texts_uses_the_calibration_texts(
    pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", *pair, "--out", str(tmp_path), "--ranks", "1", "--max-tokens", "200", "--groups", "1"]) == 0
    assert "calibration texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.TXT", "one two\n\nthree"),
        ("texts.jsonl", '"one two"\n{"text": "three"}\n'),
        ("texts.JSONL", '{"text": "one two"}\n\n{"text": "three"}'),
        ("texts.json", '["one two", {"text": "three"}]'),
        ("texts.csv", "id,text\n1,one two\n2,three\n"),
        ("texts.CSV", 'text\n"one two"\nthree\n'),
        ("texts.tsv", "text\tlabel\none two\t1\nthree\t0\n"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_texts_in_every_format(name: str, content: str, mark: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(mark + content, encoding="utf-8")
    assert read_texts(tmp_path / name) == ["one two", "three"]


def test_texts_that_cannot_be_read_name_file_and_line(tmp_path: Path) -> None:
    for name, content, text in (
        ("a.json", "{", "expected JSON in .*a.json, got .*; pass a list of texts"),
        ("a.json", '{"text": "x"}', r"expected a list of texts in .*a.json, got a dict; pass \[text, …\]"),
        ("a.json", '["x", 3]', "expected a string, .* in entry 2 of .*a.json, got something else"),
        ("a.csv", "id,label\n1,2\n", "expected a column text in .*a.csv, got id, label; rename the column"),
        ("a.csv", "", "expected a column text in .*a.csv, got nothing"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=text):
            read_texts(tmp_path / name)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert as_path("~/out") == tmp_path / "out"
    assert as_model("~/model") == str(tmp_path / "model")
    assert as_model("org/name") == "org/name"


def test_a_terminal_s_encoding_is_no_reason_to_fail(tmp_path: Path) -> None:
    """And help is there before anything heavy is imported."""
    code = (
        "import sys; from tl_asymmetry.cli import main; assert main(['demo', '--out', sys.argv[1]]) == 2; print('ΔW')"
    )
    (tmp_path / "ΔW").touch()
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ΔW")],
        check=False, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout.decode("utf-8").splitlines()[0]) == (0, "ΔW")
    assert "ΔW" in ended.stderr.decode("utf-8")
    code = "import sys, tl_asymmetry.cli; print([m for m in ('torch', 'pandas', 'transformers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.usefixtures("plain_pages")
def test_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [f"{name}={tiny.hf_directory('gpt2', delta=delta)}" for name, delta in (("base", 0.0), ("sft", 0.05))]
    out = tmp_path / "out"
    assert main(["stages", *folders, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"open the report: {out / 'report.html'}"
    assert type(load(out)).__name__ == "StageAnalysis"
    assert "expected stages as NAME=MODEL, each name once, got 'base'" in bad(capsys, "stages", "base")
    assert "each name once" in bad(capsys, "stages", folders[0], folders[0])


@pytest.mark.usefixtures("plain_pages")
def test_deltas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name given twice is two runs of one training."""
    base, *tuned = (str(tiny.hf_directory("gpt2", delta=delta)) for delta in (0.0, 0.05, 0.1, 0.2))
    out = tmp_path / "out"
    shelf = [f"dpo={tuned[0]}", f"dpo={tuned[1]}", f"kto={tuned[2]}"]
    assert main(["deltas", base, *shelf, "--matrices", "W_Q", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"open the report: {out / 'report.html'}"
    assert set(load(out).cosines()) == {"dpo [1]", "dpo [2]", "kto"}
    assert "expected models as NAME=MODEL, got 'kto'" in bad(capsys, "deltas", base, "kto")


def test_bad_input_is_one_line(pair: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(PASSAGES), encoding="utf-8")
    out = ["--out", str(tmp_path / "out")]
    line = bad(capsys, "analyze", *pair, "--texts", str(texts), *out, "--ranks", "99")
    assert line == "tl-asymmetry: expected ranks from 1 to 47 (d_model - 1), got 99; pass such ranks"
    assert "got './nowhere'; pass" in bad(capsys, "analyze", "./nowhere", pair[1], *out)
    assert "got './nowhere'; pass" in bad(capsys, "analyze", pair[0], "./nowhere", *out)
    other = str(tiny.hf_directory("llama"))
    assert "expected two models of one architecture" in bad(
        capsys, "analyze", pair[0], other, "--texts", str(texts), *out
    )
    assert "expected a file of texts, got" in bad(capsys, "analyze", *pair, "--texts", str(tmp_path / "none.txt"), *out)
    texts.write_text("\n\n", encoding="utf-8")
    assert "expected at least one text, got none" in bad(capsys, "analyze", *pair, "--texts", str(texts), *out)
    texts.write_bytes(b"\xff\xfe caf\xe9")
    assert "expected UTF-8 text in" in bad(capsys, "analyze", *pair, "--texts", str(texts), *out)
    lines = tmp_path / "texts.jsonl"
    lines.write_text('"w1"\n{"no": 1}\n', encoding="utf-8")
    assert 'expected a string, {"text": …} or' in bad(capsys, "analyze", *pair, "--texts", str(lines), *out)
    lines.write_text('\n"w1"\n\n{oops\n', encoding="utf-8")
    assert "expected JSON in line 4 of" in bad(capsys, "analyze", *pair, "--texts", str(lines), *out)
    assert "expected a folder with result.safetensors" in bad(capsys, "report", str(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["demo"], ["analyze", "./nowhere", "./nowhere"], ["grok"], ["tangents", "--demo"]])
def test_a_folder_that_cannot_be_written_is_refused_before_the_run(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        line = bad(capsys, *command, "--out", str(folder))
        assert line == (
            f"tl-asymmetry: expected a folder to write to, got {str(folder)!r} ({file} is none); pass another --out"
        )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"tl-asymmetry {version('tl-asymmetry')}\n"


@pytest.mark.parametrize("arguments", [[], ["analyze"], ["analyze", "a", "b", "--ranks", "x"], ["nonsense"]])
def test_bad_usage_ends_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: tl-asymmetry" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def checkpoints(tmp_path: Path) -> list[str]:
    import shutil

    folders = []
    for i, step in enumerate((0, 10, 30)):
        shutil.copytree(tiny.hf_directory("gpt2", delta=0.03 * i), tmp_path / "run" / f"checkpoint-{step}")
        folders.append(str(tmp_path / "run" / f"checkpoint-{step}"))
    return folders


@pytest.mark.usefixtures("plain_pages")
def test_trajectory_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders, texts, out = checkpoints(tmp_path), tmp_path / "texts.txt", tmp_path / "out"
    texts.write_text("\n\n".join(PASSAGES), encoding="utf-8")
    options = ["--texts", str(texts), "--out", str(out), "--ranks", "4", "--groups", "3", "--reference", "both"]
    assert main(["trajectory", *folders, *options]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("TrajectoryAnalysis: ")
    assert shown.splitlines()[-1] == f"open the report: {out / 'report.html'}"
    first = TrajectoryAnalysis.load(out)
    assert first.steps == [10, 30]
    assert TrajectoryAnalysis.from_store(out / "store").table.equals(first.table)
    before = {path: path.stat().st_mtime_ns for path in (out / "store" / "parts").iterdir()}
    assert len(before) == 2
    assert main(["trajectory", *folders, *options]) == 0  # nothing is measured twice
    assert {path: path.stat().st_mtime_ns for path in (out / "store" / "parts").iterdir()} == before
    assert TrajectoryAnalysis.load(out).table.equals(first.table)
    capsys.readouterr()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"open the report: {out / 'report.html'}\n"
    line = bad(capsys, "trajectory", *folders, *options, "--seed", "3")
    assert "got others: seed (0 there, 3 here)" in line


@pytest.mark.usefixtures("plain_pages")
def test_the_demo_trajectory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--groups", "1", "--ranks", "4", "--max-tokens", "1000"]
    assert main(["trajectory", "--demo", "--out", str(tmp_path), *options]) == 0
    assert "steps 0 to 1000" in capsys.readouterr().out
    assert TrajectoryAnalysis.load(tmp_path).steps == [50, 150, 400, 1000]


@pytest.mark.usefixtures("plain_pages")
def test_the_demo_tangents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(demo_texts(12)), encoding="utf-8")
    options = ["--texts", str(texts), "--rank", "4", "--out", str(tmp_path / "out")]
    assert main(["tangents", "--demo", *options]) == 0
    assert "open the report: " in capsys.readouterr().out
    result = TangentAnalysis.load(tmp_path / "out")
    assert sorted(result.table["step"].unique()) == [0, 50, 150, 400, 1000]
    assert set(result.table["rank"]) == {4}
    for arguments in ([], ["--demo", "checkpoint-1"]):
        assert "expected checkpoint directories or --demo" in bad(capsys, "tangents", *arguments)


@pytest.mark.usefixtures("plain_pages")
def test_compare_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.bridge("gpt2")
    folders = [str(tmp_path / name) for name in "abc"]
    for folder, delta in zip(folders, (0.05, 0.02, 0.03), strict=True):
        aligned = tiny.bridge("gpt2", delta=delta)
        analyze_pair(base, aligned, PASSAGES, ranks=[4], matrices=["W_Q", "W_O"], groups=3, progress=False).save(folder)
    out = str(tmp_path / "out")
    assert main(["compare", *folders[:2], "--names", "one", "two", "--out", out]) == 0
    assert "Comparison: one against two" in capsys.readouterr().out
    assert main(["report", out]) == 0
    named = [f"{name}={folder}" for name, folder in zip(("one", "two", "one"), folders, strict=True)]
    assert main(["compare", *named, "--out", out]) == 0
    assert load(out).config["runs"] == {"one": 2, "two": 1}
    assert "expected folders all with a name or all without" in bad(capsys, "compare", folders[0], named[1])
    assert "expected folders all with a name or all without" in bad(capsys, "compare", *named, "--names", "a", "b")
    assert "expected two folders or more, got one" in bad(capsys, "compare", folders[0])
    assert "expected a folder with result.safetensors" in bad(capsys, "compare", folders[0], str(tmp_path / "none"))


def test_bad_trajectories_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert "expected checkpoint directories, --demo or --pythia NAME, got none of them" in bad(
        capsys, "trajectory", *out
    )
    assert "got several of them" in bad(capsys, "trajectory", "checkpoint-1", "--demo", *out)
    assert "expected --steps with --pythia" in bad(capsys, "trajectory", "--pythia", "pythia-14m", *out)
    assert "expected a folder with directories named like checkpoint" in bad(capsys, "trajectory", "somewhere", *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("plain_pages")
def test_grok_trains_measures_and_goes_on(tmp_path, capsys):
    arguments = ["grok", "--quick", "--p", "7", "--steps", "50", "--op", "sq", "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "Directions and centroids: sq modulo 7, seed 42" in first
    assert "update" in first
    assert "gradient" in first
    assert (tmp_path / "report.html").is_file()
    assert main(arguments) == 0  # found finished, only measured again
    assert capsys.readouterr().out == first
    assert main(["grok", "--op", "mul", "--p", "8", "--out", str(tmp_path)]) == 2
    assert "expected a prime p for 'mul'" in capsys.readouterr().err
