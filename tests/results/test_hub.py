"""A result goes to the Hub and comes back the same, with what tells two people that theirs are of the same."""

from __future__ import annotations

import dataclasses
import shutil
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests import tiny
from tl_asymmetry import PairAnalysis, analyze_pair, compare, load
from tl_asymmetry.results.hub import card, fingerprint

BAD = "a`|b```c"


@pytest.fixture(scope="module")
def result() -> PairAnalysis:
    base, aligned = tiny.build("gpt2", tiny.KINDS[-1]), tiny.build("gpt2", tiny.KINDS[-1], delta=0.05)
    texts = [" ".join(f"w{(7 * i + j) % 90}" for j in range(12)) for i in range(4)]
    return analyze_pair(base, aligned, texts, matrices=["W_Q"], ranks=[1, 4], groups=4, progress=False)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the client: repositories are folders, commits folders in them."""
    asked = SimpleNamespace(created=[], folder=tmp_path)

    class Api:
        def __init__(self, token=None):
            asked.token = token

        def create_repo(self, repository, *, repo_type, private, exist_ok):
            asked.created.append((repository, repo_type, private, exist_ok))

        def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
            assert repo_type == "dataset"
            done = sum(1 for _ in (tmp_path / repo_id).glob("*")) if (tmp_path / repo_id).exists() else 0
            shutil.copytree(folder_path, tmp_path / repo_id / f"c{done}")
            return SimpleNamespace(oid=f"c{done}")

    def snapshot_download(repository, *, repo_type, revision, allow_patterns):
        assert repo_type == "dataset"
        assert allow_patterns == ["result.safetensors"]
        commits = sorted((tmp_path / repository).glob("*"))
        if not commits:
            response = httpx.Response(404, request=httpx.Request("GET", "https://hub"))
            raise RepositoryNotFoundError("none", response=response)
        return str(commits[-1] if revision is None else tmp_path / repository / revision)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_result_comes_back_from_the_hub_as_it_was(result, hub):
    address = result.push_to_hub("me/pair", token="secret")
    assert address == "hf://me/pair@c0"
    assert hub.created == [("me/pair", "dataset", True, True)]  # private unless said
    assert hub.token == "secret"
    assert load("hf://me/pair") == result
    assert PairAnalysis.load(address) == result
    assert sorted(file.name for file in (hub.folder / "me" / "pair" / "c0").iterdir()) == [
        "README.md",
        "result.safetensors",
    ]
    assert b"secret" not in b"".join(file.read_bytes() for file in (hub.folder / "me" / "pair" / "c0").iterdir())
    other = dataclasses.replace(result, notes=("another",))
    assert other.push_to_hub("me/pair", private=False) == "hf://me/pair@c1"
    assert load("hf://me/pair").notes == ("another",)
    assert load(address).notes == result.notes


def test_two_people_can_compare_theirs_or_are_told_why_not(result, hub):
    base = tiny.build("gpt2", tiny.KINDS[-1])
    options = {"matrices": ["W_Q"], "ranks": [1, 4], "groups": 4, "progress": False}
    same = [" ".join(f"w{(7 * i + j) % 90}" for j in range(12)) for i in range(4)]
    theirs = analyze_pair(base, tiny.build("gpt2", tiny.KINDS[-1], delta=0.1), same, **options)
    others = analyze_pair(base, tiny.build("gpt2", tiny.KINDS[-1], delta=0.1), same[::-1], **options)
    mine = load(result.push_to_hub("me/pair"))
    assert len(compare(mine, load(theirs.push_to_hub("they/pair")), names=["mine", "theirs"]).table)
    with pytest.raises(ValueError, match="same"):
        compare(mine, load(others.push_to_hub("they/other")), names=["mine", "theirs"])


def test_the_card_says_what_the_result_is_of(result):
    text = card(result, "me/pair")
    assert text.startswith("---\ntags: [tl-asymmetry")
    assert 'load("hf://me/pair")' in text
    for model in result.config["models"].values():
        assert model["weights_xxh3"] in text
    assert f"| `texts_xxh3` | {fingerprint(result)} |" in text
    assert "w7 w8" not in text  # what it was made of, not the texts themselves
    assert fingerprint(dataclasses.replace(result, arrays={})) is None
    changed = {**result.arrays, "tokens": result.arrays["tokens"].flip(0)}
    assert fingerprint(dataclasses.replace(result, arrays=changed)) != fingerprint(result)
    assert result.config["versions"]["torch"] in text
    assert result.summary() in text
    named = {side: {**record, "name": BAD} for side, record in result.config["models"].items()}
    hostile = dataclasses.replace(result, config={**result.config, "models": named})
    fences = [line for line in card(hostile, "me/pair").splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```text", "```"]  # no name ends one
    assert "a`\\|b" in card(hostile, "me/pair")


def test_what_the_hub_refuses_is_said_in_our_words(result, hub, monkeypatch):
    with pytest.raises(ValueError, match="expected a repository as 'owner/name', got 'pair'; pass e.g."):
        result.push_to_hub("pair")
    with pytest.raises(ValueError, match="expected a repository as 'owner/name', got '../x'; pass e.g."):
        load("hf://../x")
    with pytest.raises(ValueError, match="expected a local path or a name that the Hub knows, got 'me/none'"):
        load("hf://me/none")
    assert not hub.created

    def refused(*_, **__):
        raise HfHubHTTPError("forbidden", response=httpx.Response(403, request=httpx.Request("POST", "https://hub")))

    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: SimpleNamespace(create_repo=refused))
    with pytest.raises(ValueError, match="got 'me/pair': forbidden"):
        result.push_to_hub("me/pair")
