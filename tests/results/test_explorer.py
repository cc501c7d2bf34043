"""What the explorer's page holds is what the result says; what it looks up agrees with `directions`."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests import tiny
from tests.synthetic import make_table
from tl_asymmetry import ModelView, PairAnalysis, analyze_pair, analyze_spectra, explorer
from tl_asymmetry.explore import contents
from tl_asymmetry.explore.pack import Pack
from tl_asymmetry.explore.page import SCRIPT
from tl_asymmetry.geometry.spectrum import marchenko_pastur_edge
from tl_asymmetry.pair.lookups import context_parts, context_words, find_directions
from tl_asymmetry.plots.held import OWN
from tl_asymmetry.results.nulls import NULLS

KIND = tiny.KINDS[-1]
BAD = '</script><img src=x onerror="alert(1)">'
TYPES = {"f4": "<f4", "f8": "<f8", "u1": "u1", "u2": "<u2", "u4": "<u4"}


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    return tiny.build(name, KIND), tiny.build(name, KIND, delta=0.05)


TEXTS = [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(10 + i)) for i in range(6)]


@functools.cache
def analysed(name: str) -> PairAnalysis:
    return analyze_pair(*pair(name), TEXTS, ranks=[1, 4], groups=3, progress=False)


@functools.cache
def small() -> PairAnalysis:
    """Of one matrix, where the numbers of the maps are not the subject."""
    return analyze_pair(*pair("gpt2"), TEXTS, ranks=[4], groups=1, matrices=["W_Q"], progress=False)


def printed(place: int, *, first: int, power: int, positive: int, **_: Any) -> float:
    """The number that stands at a place among those of so many digits."""
    if place < 2:
        return (np.nan, 0.0)[place]
    sign, (more, mantissa) = -1 if place - 2 >= positive else 1, divmod((place - 2) % positive, 9 * first)
    return sign * float(f"{first + mantissa}e{power + more}")


def as_printed(values: Any, digits: int = 3) -> list[str]:
    return [f"{v:.{digits - 1}e}" for v in np.asarray(values, float).ravel()]


def unpack(raw: bytes) -> dict[str, Any]:
    """Read a pack as the page does."""
    length = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + length])
    arrays, at = [], 4 + length
    for each in header.pop("arrays"):
        size = np.dtype(TYPES[each["kind"]]).itemsize
        planes = np.frombuffer(raw, np.uint8, size * each["length"], at).reshape(size, each["length"])
        arrays.append(planes.T.copy().view(TYPES[each["kind"]]).ravel())
        at += planes.size
    assert at == len(raw)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            if isinstance(value.get("array"), int):
                held = arrays[value["array"]]
                if "first" in value:
                    return np.array([printed(int(place), **value) for place in held])
                return [value["words"][i] for i in held] if "words" in value else held
            return {k: fill(v) for k, v in value.items()}
        return [fill(v) for v in value] if isinstance(value, list) else value

    return fill(header)


def held(path: Path) -> dict[str, Any]:
    packed = re.findall(
        r'<script type="application/gzip" id="explorer-(?:data|cards)">([^<]*)</script>', path.read_text()
    )
    data, cards = (unpack(gzip.decompress(base64.b64decode(each))) for each in packed)
    return {**data, **cards}


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """What stands in the page of a result without directions."""
    folder = tmp_path_factory.mktemp("pages")
    return functools.cache(lambda name: held(analysed(name).to_explorer(folder / f"{name}.html", directions=0)))


def test_a_pack_gives_back_what_went_in():
    pack = Pack()
    rng = np.random.default_rng(0)
    parts = {
        "plain": pack.numbers(rng.normal(size=(3, 5))), "tiny": pack.numbers([1e-60, np.nan, 0.5]),
        "huge": pack.numbers([1e60, np.inf]), "small": pack.indexes([[0, 3]]), "wide": pack.indexes([70_000]),
        "middle": pack.indexes([300]), "none": pack.numbers([]), "words": pack.words(["a", "b", "a", BAD]),
    }  # fmt: skip
    back = unpack(pack.block(parts))
    np.testing.assert_allclose(back["plain"], np.random.default_rng(0).normal(size=15), rtol=1e-7)
    np.testing.assert_allclose(back["tiny"], [1e-60, np.nan, 0.5], rtol=1e-7)  # in float32 the first would be 0
    np.testing.assert_allclose(back["huge"], [1e60, np.inf], rtol=1e-7)
    assert [back[n].tolist() for n in ("small", "middle", "wide", "none")] == [[0, 3], [300], [70_000], []]
    assert [back[n].itemsize for n in ("small", "middle", "wide")] == [1, 2, 4]
    assert back["words"] == ["a", "b", "a", BAD]
    assert pack.block(parts) == pack.block(parts)


def test_equal_arrays_are_held_once():
    pack = Pack()
    first, other = pack.numbers([1.5, np.nan]), pack.numbers([1.5, 2.5])
    assert pack.numbers([[1.5], [np.nan]]) == first != other
    assert len(unpack(pack.block({"all": first}))["all"]) == 2


@pytest.mark.parametrize("digits", [2, 3])
def test_what_is_shown_is_held_as_it_is_printed(digits):
    rng = np.random.default_rng(digits)
    values = rng.normal(size=400) * 10.0 ** rng.integers(-9, 9, size=400)
    edges = [0.0, 1.0, 9.999, 0.9995, 99.95, 1e-9, -1e9, 1.005, 0.1, 1e22, np.nan]
    for each in (values, np.abs(values), edges, [np.nan], [0.0], [1e-310, 2.0], [np.inf, -3.14159]):
        pack = Pack()
        back = unpack(pack.block({"all": pack.shown(each, digits)}))["all"]
        assert as_printed(back, digits) == as_printed(each, digits)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_number_of_the_table_is_in_the_page(name, page_of):
    result, page = analysed(name), page_of(name)
    assert page["columns"] == list(result.table.columns)
    found = 0
    for each in page["maps"]:
        rows = result.table[
            (result.table["matrix"] == each["matrix"]) & (result.table["subspace"] == each["subspace"])
        ].sort_values(["rank", "layer", "head"])
        assert each["heads"] == (None if rows["head"].isna().all() else rows["head"].nunique())
        for column, values in each["columns"].items():
            if pd.api.types.is_numeric_dtype(rows[column].dtype):
                told = rows[column].to_numpy(float, na_value=np.nan)
                np.testing.assert_allclose(values, told, rtol=1e-6, err_msg=column)
            else:
                assert list(values) == rows[column].fillna("").tolist()
        assert set(each["columns"]) | set(contents.KEYS) == set(result.table.columns)
        found += len(rows)
        k, curve = page["curves"][f"{each['matrix']}/{each['subspace']}"].values()
        profile = result.energy_profile(each["matrix"], each["subspace"]).astype(float).cumsum(-1)
        assert k[0] == 1
        assert k[-1] == profile.shape[-1]
        relative = profile[..., np.array(k) - 1] * result.config["shape"]["d_model"] / k
        assert as_printed(curve) == as_printed(relative)
    assert found == len(result.table)
    if name == "llama":  # two query heads share a key head
        keys = [m for m in page["maps"] if m["matrix"] == "W_K"]
        assert {m["kv"] for m in keys} == {True}
        assert {m["group"] for m in keys} == {2}


def test_every_number_of_the_nulls_is_in_the_page_and_their_words_are_the_registrys(page_of):
    result, page = analysed("llama"), page_of("llama")
    d = result.config["shape"]["d_model"]
    assert [null["key"] for null in page["nulls"]] == ["isotropic", "adam", "sgd", "sign", "muon"]
    assert all(null["label"] == NULLS[null["key"]].label for null in page["nulls"])
    found = 0
    for each in page["maps"]:
        rows = result.nulls[
            (result.nulls["matrix"] == each["matrix"]) & (result.nulls["subspace"] == each["subspace"])
        ].sort_values(["rank", "layer", "head"])
        assert list(each["nulls"]) == [null for null in NULLS if null in set(rows["null"])]
        for null, columns in each["nulls"].items():
            here = rows[rows["null"] == null]
            found += len(here)
            if null == "isotropic":  # the table's own columns
                for name, column in OWN[0][-1].items():
                    np.testing.assert_allclose(each["columns"][column], here[name], rtol=1e-6, err_msg=name)
                continue
            for name in ("excess", "p", "q"):
                np.testing.assert_allclose(columns[name], here[name], rtol=1e-6, err_msg=name)
            for name in ("low", "high"):
                assert as_printed(columns[name]) == as_printed(here[name])
            assert as_printed(columns["expected"]) == as_printed(here["expected"] * d / here["rank"])
    assert found == len(result.nulls)


def test_spectra_and_their_edge(page_of):
    result, page = analysed("gpt2"), page_of("gpt2")
    d, wide = result.config["shape"]["d_model"], result.arrays["partners/W_in"].shape[-1]
    for matrix, samples in (("W_Q", d), ("W_in", max(d, wide))):
        spectrum = result.delta_spectrum(matrix)
        share = spectrum / spectrum.sum(-1, keepdims=True)
        at = np.array(page["spectra"][matrix]["index"])
        assert at[0] == 1
        assert at[-1] == share.shape[-1]
        assert as_printed(page["spectra"][matrix]["share"]) == as_printed(share[..., at - 1])
        edge = marchenko_pastur_edge(torch.from_numpy(share[1, 0]), samples)
        heads = spectrum.shape[1]
        assert as_printed(page["spectra"][matrix]["edge"][heads]) == as_printed(edge)


@pytest.mark.parametrize("independent", [1, 2, 3])
def test_independent_entries_end_near_the_edge(independent):
    generator = torch.Generator().manual_seed(independent)
    delta = torch.randn(512, 64, generator=generator, dtype=torch.float64)
    spectrum = torch.linalg.svdvals(delta).square()
    edge = contents._edges((spectrum / spectrum.sum())[None, None], 512)[0, 0]
    assert (spectrum[0] / spectrum.sum()).item() == pytest.approx(edge, rel=0.08)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_directions_of_all_heads_are_those_of_each(name):
    result, (base, _) = analysed(name), pair(name)
    view = ModelView(base)
    n, tokens, contexts = 2, 4, 3
    found = find_directions(
        view, result.arrays, result.config, n=n, tokens=tokens, contexts=contexts, progress=False
    )  # fmt: skip
    sequences = result.arrays["tokens"].split(result.arrays["lengths"].tolist())
    assert set(found) == set(result.table["matrix"])
    for matrix, these in found.items():
        layer, at = 1, these.energy.shape[1] - 1
        head = None if matrix in ("W_in", "W_gate", "W_out") else at
        table = result.directions(layer, matrix, head, n=n, contexts=contexts, model=base)
        for row in table.itertuples():
            place = layer, at, row.direction - 1, 0 if row.sign == "+" else 1
            assert these.energy[place[:3]].item() == pytest.approx(row.energy)
            for kind in ("embedding", "unembedding"):
                expected = getattr(row, f"{kind}_tokens")[:tokens]
                words = [view.tokenizer.decode([t]) for t in getattr(these, kind)[place].tolist()]
                assert words == [word for word, _ in expected]
                cosines = getattr(these, f"{kind}_cosine")[place]
                np.testing.assert_allclose(cosines, [c for _, c in expected], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(these.projections[place], [v for _, v in row.contexts], rtol=1e-5, atol=1e-6)
            texts = context_words(view.tokenizer, sequences, these.contexts[place].tolist(), 12)
            # equal projections may come in either order
            assert sorted(texts) == sorted(text for text, _ in row.contexts)


def test_a_context_is_the_text_around_its_token():
    class Pieces:
        """Two bytes of one letter are two tokens; a token by itself loses its space, as SentencePiece's do."""

        words = ("", " one", " two", " three", "\ud83d", "\ude00")

        def decode(self, ids):
            text = "".join(self.words[i] for i in ids).removeprefix(" ")
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    sequences = [torch.tensor([1, 2, 3]), torch.tensor([3, 4, 5, 1])]
    parts = context_parts(Pieces(), sequences, [0, 1, 2, 4, 5, 6], before=1, after=2)
    assert parts[:3] == [("", "one", " two three"), ("one", " two", " three"), ("two", " three", "")]
    assert parts[4][1:] == ("�", " one")  # a letter cut in two is told by what its piece decodes to
    assert context_words(Pieces(), sequences, [2, 6], 2) == ["one two three", "😀 one"]
    assert context_parts(None, sequences, [1], before=1, after=1) == [("1", " 2", " 3")]


def test_experts_stand_where_heads_do(tmp_path):
    base, aligned = tiny.bridge("mixtral"), tiny.bridge("mixtral", delta=0.05)
    options = {"tokens": torch.arange(60).reshape(3, 20), "ranks": [1], "groups": 1, "matrices": ["W_Q", "W_in"]}
    result = analyze_pair(base, aligned, **options, progress=False)
    page = held(result.to_explorer(tmp_path / "explorer.html", model=base, directions=1, progress=False))
    maps = {each["matrix"]: each for each in page["maps"]}
    assert maps["W_in"]["experts"]
    assert not maps["W_Q"]["experts"]
    experts = result.table["expert"].max() + 1
    assert maps["W_in"]["heads"] == experts
    assert maps["W_in"]["whole"] == []
    assert maps["W_in"]["empty"] == {}
    rows = result.table.query("matrix == 'W_in' and subspace == @maps['W_in']['subspace']")
    np.testing.assert_array_equal(maps["W_in"]["columns"]["tokens_routed"], rows["tokens_routed"])
    assert rows["tokens_routed"].sum() == 2 * (60 - 3) * result.config["shape"]["n_layers"]  # two of three each
    assert rows["rank"].nunique() == 1
    np.testing.assert_allclose(maps["W_in"]["columns"]["fraction"], rows["fraction"], rtol=1e-6)


def test_directions_leave_the_model_as_it_was():
    result, (base, _) = analysed("gpt2"), pair("gpt2")
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    state, training = torch.get_rng_state(), base.training
    find_directions(ModelView(base), result.arrays, result.config, n=1, tokens=2, contexts=1, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert base.training == training
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


def test_reasons_and_errors(tmp_path, unchecked_types):
    result, (base, aligned) = small(), pair("gpt2")
    path = tmp_path / "explorer.html"
    loaded = PairAnalysis.load(result.save(tmp_path / "saved"))
    assert "pass model=base" in held(explorer(loaded, path))["directions"]["missing"]
    assert "directions=0" in held(explorer(result, path, model=base, directions=0))["directions"]["missing"]
    with pytest.raises(ValueError, match="expected the base model of this analysis, got other weights"):
        explorer(result, path, model=aligned, progress=False)
    with pytest.raises(ValueError, match="expected directions from 1 to 5, got 6; pass a number in between"):
        explorer(result, path, model=base, directions=6, progress=False)
    with pytest.raises(ValueError, match="with the columns head, matrix, got one without; pass a result"):
        explorer(result, path, directions=0, edits=pd.DataFrame({"layer": [0]}))
    with pytest.raises(ValueError, match="expected an existing folder, got"):
        explorer(result, tmp_path / "none" / "explorer.html", directions=0)


def test_attached_tables_and_results(tmp_path):
    result = small()
    edits = pd.DataFrame(
        {"layer": [0, 1], "head": pd.array([1, None], dtype="Int64"), "matrix": ["W_Q", "W_in"], "kl": [0.5, np.nan],
         "done": [True, False], "kind": [BAD, None]}
    )  # fmt: skip

    class Study:
        table = edits

    page = held(result.to_explorer(tmp_path / "e.html", directions=0, edits=Study(), trajectory=edits))
    assert [a["name"] for a in page["attached"]] == ["Edits", "Trajectory"]
    columns = page["attached"][0]["columns"]
    np.testing.assert_array_equal(columns["head"], [1, np.nan])
    np.testing.assert_array_equal(columns["kl"], [0.5, np.nan])
    assert columns["kind"] == [BAD, ""]
    assert columns["matrix"] == ["W_Q", "W_in"]


def test_a_row_of_several_matrices_stands_with_each(tmp_path):
    heads = pd.DataFrame({"layer": [0], "head": pd.array([1], dtype="Int64"), "matrices": ["W_Q W_O"], "shift": [0.25]})
    page = held(small().to_explorer(tmp_path / "e.html", directions=0, rewinding=heads))
    (table,) = page["attached"]
    assert table["name"] == "Rewinding"
    assert table["columns"]["matrix"] == ["W_Q", "W_O"]
    np.testing.assert_array_equal(table["columns"]["shift"], [0.25, 0.25])


def test_the_base_weight_s_own_frame_stands_in_the_card(tmp_path, page_of):
    spectra = analyze_spectra(*pair("gpt2"), ranks=[2], matrices=["W_Q", "W_in"], progress=False)
    page = held(small().to_explorer(tmp_path / "e.html", directions=0, spectra=spectra))
    assert page_of("gpt2")["frame"] is None
    frame = page["frame"]
    assert frame["rows"] == len(spectra.table)
    assert set(contents.FRAME_COLUMNS) == set(frame["columns"])
    np.testing.assert_array_equal(frame["columns"]["on_principal"], spectra.table["on_principal"].astype("float32"))
    assert list(np.isnan(frame["columns"]["head"])) == list(spectra.table["head"].isna())


def test_a_large_attached_table_keeps_the_shown_rank(monkeypatch):
    monkeypatch.setattr(contents, "ATTACHED_ROWS", 100)
    pack = Pack()
    found = contents.attached("Trajectory", make_table(), 4, pack)
    assert found["note"] == "Rows at rank 4 only."
    assert found["rows"] == (make_table()["rank"] == 4).sum()


def test_of_a_trajectory_only_what_is_shown_is_kept():
    table = make_table().assign(step=10, reference="first")
    columns = contents.attached("Trajectory", table, 4, Pack())["columns"]
    assert set(columns) == {*contents.STEP_COLUMNS, "step", "reference"}


def test_the_page_is_one_file_that_asks_for_nothing_and_escapes(tmp_path):
    result = PairAnalysis.load(small().save(tmp_path / "saved"))
    result.config["models"]["aligned"]["name"] = BAD
    text = result.to_explorer(tmp_path / "explorer.html").read_text()
    assert "default-src 'none'" in text
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "<img" not in outside
    assert "http" not in outside.replace("http-equiv", "")
    assert "&lt;img src=x" in outside
    for script in re.findall(r"<script>(.*?)</script>", text, flags=re.S)[1:]:
        assert "http" not in script
        assert "innerHTML" not in script
        assert "eval(" not in script
    again = result.to_explorer(tmp_path / "again.html").read_text()
    assert again == text  # the same result, the same page


def test_the_wheel_carries_what_the_page_is_made_of():
    from importlib.resources import files

    folder = files("tl_asymmetry.explore")
    assert {"explorer.css", "explorer.html"} <= {f.name for f in folder.iterdir()}
    assert {f"{name}.js" for name in SCRIPT} == {f.name for f in (folder / "script").iterdir()}
