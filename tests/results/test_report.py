"""The report is one file that opens offline, says what it was given, and runs nothing it was not meant to."""

from __future__ import annotations

import base64
import gzip
import inspect
import io
import json
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from tests import synthetic
from tl_asymmetry.plots import (
    asymmetry_figure,
    head_maps_figure,
    heads_figure,
    layers_figure,
    page,
    rank_curve_figure,
    spectrum_figure,
    style,
)
from tl_asymmetry.results.report import (
    CITATIONS,
    DEFINITIONS,
    MARKS,
    FigureSection,
    Html,
    Report,
    TableSection,
    report,
    report_html,
    write_images,
    write_report,
)

BAD = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>'
VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


def unpacked(data: str) -> str:
    """What a packed script element holds."""
    return gzip.decompress(base64.b64decode(data)).decode()


class Reader(HTMLParser):
    """Elements, attributes, text, and what script elements hold by id; fails on an element closed out of turn."""

    def __init__(self, document: str):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text, self.scripts, self.held = [], [], "", [], {}
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attributes = self.elements[-1][1]
            self.scripts.append((attributes.get("type"), data))
            self.held[attributes.get("id")] = unpacked(data) if attributes.get("type") == "application/gzip" else data
        elif self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(name="full", scope="module")
def full_fixture() -> str:
    table = synthetic.make_table()
    asymmetry = synthetic.make_asymmetry(table)
    return report_html(
        Report(
            title=BAD,
            subtitle=BAD,
            summary=f"First {BAD}.\n\nSecond.",
            notes=[BAD],
            figures=[
                FigureSection("Heads", {m: heads_figure(table, m, title=BAD) for m in ("W_Q", "W_O")}, pick="matrix"),
                FigureSection("Layers", layers_figure(table)),
                FigureSection("Curve", rank_curve_figure(table, "W_Q", layer=0, head=0), BAD),
                FigureSection("Asymmetry", asymmetry_figure(asymmetry)),
                FigureSection("Spectra", spectrum_figure({BAD: np.arange(1.0, 9.0)}, name=BAD)),
            ],
            tables=[TableSection(BAD, table.assign(note=BAD), filename="rows"), TableSection("Index", asymmetry)],
            methods=[("Rank", BAD)],
            config={"model": BAD, "versions": {"torch": "2"}, "seed": 0},
        )
    )


def test_parses_and_carries_plotly_once(full):
    reader = Reader(full)
    assert [name for name, held in reader.held.items() if "plotly.js v" in held] == ["plotly-code"]
    assert full.count('id="plotly-code"') == 1
    assert sum(kind is None for kind, _ in reader.scripts) == 1
    assert len({a["id"] for _, a in reader.elements if "id" in a}) == sum("id" in a for _, a in reader.elements)


def test_asks_the_network_for_nothing(full):
    reader = Reader(full)
    for tag, attributes in reader.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for t, a in reader.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "http" not in page.CSS
    assert "url(" not in page.CSS
    assert "@import" not in page.CSS


def test_foreign_text_stays_text(full):
    reader = Reader(full)
    assert not any(tag == "img" or any(n.startswith("on") for n in a) for tag, a in reader.elements)
    assert not any(data.strip() == "alert(2)" for _, data in reader.scripts)
    assert reader.text.count(BAD) >= 7
    for kind, data in reader.scripts:
        if kind == "application/json":
            assert "<" not in data
            json.loads(data)


def test_figures_hold_what_they_were_given(full):
    figures = [json.loads(d) for kind, d in Reader(full).scripts if kind == "application/json"]
    settings = [f for f in figures if "light" in f]
    drawn = [f for f in figures if "data" in f]
    assert len(settings) == 1
    assert len(drawn) == 6
    expected = heads_figure(synthetic.make_table(), "W_Q", title=BAD)
    assert drawn[0]["data"][0]["z"] == [list(row) for row in expected.data[0].z]
    assert all("template" not in f["layout"] and "width" not in f["layout"] for f in drawn)


def test_a_foreign_figure_keeps_its_template():
    content = json.loads(page.figure_json(go.Figure(layout={"template": "plotly_dark", "width": 300})))
    assert content["layout"]["template"]["layout"]["paper_bgcolor"]
    with pytest.raises(ValueError, match="expected a plotly Figure, got str; pass what a plot_"):
        inspect.unwrap(page._content)("figure")


def test_a_large_figure_is_packed_and_unpacks_to_the_same():
    figure = heads_figure(synthetic.make_table(layers=24, heads=24), "W_Q")  # its slider sets the hovers' words
    (element,) = page.figure_scripts(figure, "plot")
    ((kind, data),) = Reader(element).scripts
    assert kind == "application/gzip"
    assert unpacked(data) == page.figure_json(figure)
    assert len(data) < 0.6 * len(page.figure_json(figure))


def test_a_large_figure_comes_without_its_hovers_which_follow():
    figure = head_maps_figure(synthetic.make_table(layers=16, heads=16))
    held = Reader("".join(page.figure_scripts(figure, "plot"))).held
    assert set(held) == {"plot-data", "plot-hover"}
    drawn, hover, whole = (json.loads(c) for c in (held["plot-data"], held["plot-hover"], page.figure_json(figure)))
    assert len(held["plot-data"]) < 0.5 * len(page.figure_json(figure))
    assert all(drawn["data"][i].pop("hoverinfo") == "skip" for i in hover["traces"])
    for n, i in enumerate(hover["traces"]):
        drawn["data"][i] |= {"customdata": hover["customdata"][n], "hovertemplate": hover["hovertemplate"][n]}
    assert drawn == whole


def test_plotly_starts_at_once_and_is_left_alone_in_a_form_unknown():
    code = '(function(r, f) {f();} (self, () => {\n"use strict";f("}));");\nreturn 1;\n}));\n'
    expected = '(function(r, f) {f();} (self, (() => {\n"use strict";f("}));");\nreturn 1;\n})));\n'
    assert page._called_at_once(code) == expected
    assert page._called_at_once("!function(){}();") == "!function(){}();"


def test_several_figures_are_picked_from_a_labelled_choice(full):
    reader = Reader(full)
    boxes = [a for t, a in reader.elements if t == "figure"]
    assert [("hidden" in a) for a in boxes] == [False, True, False, False, False, False]
    assert any(t == "select" and a.get("id") == "pick-0" for t, a in reader.elements)
    assert any(t == "label" and a.get("for") == "pick-0" for t, a in reader.elements)


def download(document: str, name: str) -> pd.DataFrame:
    reader = Reader(document)
    button = next(a for t, a in reader.elements if t == "button" and a.get("data-file") == f"{name}.csv")
    return pd.read_csv(io.StringIO(reader.held[button["data-held"]]), dtype={"head": "Int64"}, keep_default_na=True)


def test_tables_show_a_bounded_number_of_rows_and_give_all_of_them(full):
    table = synthetic.make_table()
    reader = Reader(full)
    assert f"200 of {len(table)} rows shown." in reader.text
    read = download(full, "rows")
    assert read["note"].tolist() == [BAD] * len(table)
    np.testing.assert_allclose(read["relative"], table["relative"], rtol=1e-12)
    boxes = [a for t, a in reader.elements if "scroll" in a.get("class", "")]
    assert boxes
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-label"] for a in boxes)


def test_a_table_may_show_some_of_its_columns_and_gives_all():
    table = synthetic.make_table()
    document = report_html(Report("t", tables=[TableSection("Rows", table, shown=["layer", "relative"])]))
    assert f"200 of {len(table)} rows, 2 of {len(table.columns)} columns shown." in Reader(document).text
    assert list(download(document, "table").columns) == list(table.columns)


def test_a_table_is_packed_and_the_same_every_time():
    table = synthetic.make_table(layers=12)
    make = lambda: report_html(Report("t", tables=[TableSection("Rows", table)]), max_rows=3)  # noqa: E731
    document = make()
    assert document == make()
    assert len(download(document, "table")) == len(table)
    assert len(document) < 0.6 * len(table.to_csv(index=False))  # packed
    assert 'id="plotly-code"' not in document  # no figure, no plotly


def test_cells_show_na_as_a_dash():
    table = pd.DataFrame({"head": pd.array([1, None], dtype="Int64"), "x": [np.nan, 0.123456], "s": ["None", "<NA>"]})
    document = report_html(Report("t", tables=[TableSection("Rows", table)]))
    assert "<td class=n>1</td><td class=n>–</td><td>None</td>" in document
    assert "<td class=n>–</td><td class=n>0.1235</td><td>&lt;NA&gt;</td>" in document


def test_html_is_trusted_only_when_marked():
    document = report_html(Report("t", summary=Html("<em>a</em>"), notes=["<em>b</em>"]))
    assert "<em>a</em>" in document
    assert "&lt;em&gt;b" in document


def test_definitions_say_whose_they_are_and_cite_three_papers(full):
    text = Reader(full).text
    assert {d.mark for d in DEFINITIONS} == set(MARKS)
    for definition in DEFINITIONS:
        assert definition.term in text
        assert definition.text in text
    terms = " ".join(d.term for d in DEFINITIONS).lower()
    for word in (
        "relative",
        "excess",
        "isotropic",
        "input-matched reference",
        "interval",
        "rounding share",
        "asymmetry",
    ):
        assert word in terms
    assert [c.arxiv for c in CITATIONS] == ["2605.16600", "2604.08764", "2604.25143"]
    for citation in CITATIONS:
        assert f"arXiv:{citation.arxiv}" in text
        assert citation.title in text


def test_headings_are_linked_from_the_contents(full):
    reader = Reader(full)
    ids = {a["id"] for _, a in reader.elements if "id" in a}
    links = [a["href"][1:] for t, a in reader.elements if t == "a" and a["href"].startswith("#")]
    assert len(links) > 8
    assert set(links) <= ids


class Result:
    """As little as a report needs."""

    def __init__(self, title, **parts):
        self.parts = {"title": title, **parts}

    def _report(self):
        return Report(**self.parts)


def test_several_results_on_one_page(tmp_path):
    table = synthetic.make_table()
    first = Result(BAD, summary="One.", figures=[FigureSection("Layers", layers_figure(table))], config={"seed": 0})
    own = DEFINITIONS[0].__class__("Own word", "[ours]", "Own meaning.")
    second = Result(
        "second", summary="Two.", notes=["Careful."], tables=[TableSection("Rows", table)],
        figures=[FigureSection("Layers", {m: heads_figure(table, m) for m in ("W_Q", "W_O")})],
        definitions=[own, *DEFINITIONS],
    )  # fmt: skip
    page_of_both = report([first, second], tmp_path / "both.html", title="Both").read_text()
    reader = Reader(page_of_both)
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    links = [a["href"][1:] for t, a in reader.elements if t == "a" and a["href"].startswith("#")]
    assert set(links) <= set(ids)
    assert {"result-0", "result-1", "result-0-figure-0", "result-1-figure-0", "result-1-notes"} <= set(ids)
    assert page_of_both.count('id="plotly-code"') == 1
    headings = [t for t, _ in reader.elements if t in ("h1", "h2", "h3")]
    assert headings.count("h1") == 1
    assert headings.count("h2") == 4  # two results, definitions, citations
    text = reader.text
    assert text.index(BAD) < text.index("One.") < text.index("Two.") < text.index("Own meaning.")
    assert text.count(DEFINITIONS[2].text) == 1
    assert not any(tag == "img" for tag, _ in reader.elements)
    groups = {a["data-group"] for t, a in reader.elements if t == "figure"}
    assert groups == {"result-0-0", "result-1-0"}


def test_one_result_is_the_report_it_writes_itself(tmp_path):
    alone = Result("alone", summary="One.")
    assert report(alone, tmp_path / "a.html").read_text() == report_html(alone._report())
    assert "<h1>2 analyses</h1>" in report(iter([alone, alone]), tmp_path / "b.html").read_text()


def test_report_errors(tmp_path, unchecked_types):
    with pytest.raises(ValueError, match="expected at least one result, got none; pass what an analysis returned"):
        report([], tmp_path / "r.html")
    with pytest.raises(ValueError, match="expected results, got DataFrame; pass what an analysis returned"):
        report([synthetic.make_table()], tmp_path / "r.html")
    with pytest.raises(ValueError, match="expected an existing folder, got"):
        report(Result("t"), tmp_path / "none" / "r.html")


def test_images_need_kaleido_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_kaleido_installed", lambda: False)
    shown = Result("t", figures=[FigureSection("Layers", layers_figure(synthetic.make_table()))])
    with pytest.raises(ImportError, match=r"expected kaleido to be installed; pip install kaleido"):
        write_images(shown, tmp_path)


def test_images_show_the_figure_without_its_controls(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(page, "_kaleido_installed", lambda: True)
    monkeypatch.setattr(go.Figure, "to_image", lambda self, **options: written.append(self) or b"image")
    table = synthetic.make_table()
    figures = {"W_Q": heads_figure(table, "W_Q"), "../W_O": heads_figure(table, "W_O")}
    paths = write_images(Result("t", figures=[FigureSection("Heads", figures)]), tmp_path / "images", format="pdf")
    assert [p.name for p in paths] == ["01-Heads-W_Q.pdf", "02-Heads-W_O.pdf"]
    assert [p.read_bytes() for p in paths] == [b"image"] * 2
    still, whole = written[0], figures["W_Q"]
    assert not still.layout.updatemenus
    assert not still.layout.sliders
    assert len(whole.layout.updatemenus) == 1  # the figure itself is left alone
    (narrow,) = write_images(Result("t", figures=[FigureSection("Heads", whole)]), tmp_path, width=300)
    assert written[-1].layout.title.text.count("<br>") > whole.layout.title.text.count("<br>")  # set for that width
    assert written[-1].layout.height > still.layout.height
    assert narrow.suffix == ".svg"
    plot = still.layout.height - still.layout.margin.t - still.layout.margin.b
    assert plot == whole.layout.height - whole.layout.margin.t - whole.layout.margin.b


def test_an_image_has_the_size_that_is_asked_for_and_a_bitmap_as_many_pixels_as_wanted(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(page, "_kaleido_installed", lambda: True)
    monkeypatch.setattr(go.Figure, "to_image", lambda self, **options: asked.append(options) or b"image")
    shown = Result("t", figures=[FigureSection("Layers", layers_figure(synthetic.make_table()))])
    for format in ("svg", "pdf", "png"):
        write_images(shown, tmp_path, format=format, width="single", scale=3)
    assert {options["format"]: options["scale"] for options in asked} == {"svg": 1, "pdf": 1, "png": 3}


@pytest.mark.parametrize(("width", "rows"), [("single", 6), ("double", 2)])
def test_an_images_legend_stands_under_the_axis_in_as_many_rows_as_it_needs(tmp_path, monkeypatch, width, rows):
    written = []
    monkeypatch.setattr(page, "_kaleido_installed", lambda: True)
    monkeypatch.setattr(go.Figure, "to_image", lambda self, **options: written.append(self) or b"image")
    table = synthetic.make_table().assign(rounding_share=0.0)
    write_images(Result("t", figures=[FigureSection("Layers", layers_figure(table))]), tmp_path, width=width)
    write_images(Result("t", figures=[FigureSection("Heads", heads_figure(table, "W_Q"))]), tmp_path, width=width)
    layers, heads = written
    names = [t.name for t in layers.data if t.visible is not False and t.showlegend is not False]
    assert len(names) == 6
    assert layers.layout.legend.xref == layers.layout.legend.yref == "container"
    assert layers.layout.margin.b == 50 + 20 * rows + 8
    marks = {t.name: t.showlegend for t in heads.data if t.meta == "mark"}
    drawn = {t.name: any(x is not None for x in t.x) for t in heads.data if t.meta == "mark"}
    assert marks == drawn  # what no cell has is not named
    assert set(drawn.values()) == {True, False}


@pytest.mark.parametrize(("width", "pixels"), [("single", 312), ("double", 648)])
def test_images_for_a_papers_columns_leave_the_title_to_the_caption(tmp_path, monkeypatch, width, pixels):
    written = []
    monkeypatch.setattr(page, "_kaleido_installed", lambda: True)
    monkeypatch.setattr(go.Figure, "to_image", lambda self, **options: written.append(self) or b"image")
    whole = heads_figure(synthetic.make_table(), "W_Q")
    write_images(Result("t", figures=[FigureSection("Heads", whole)]), tmp_path, width=width)
    (still,) = written
    assert still.layout.width == pixels
    assert not still.layout.title.text
    plots = [f.layout.height - f.layout.margin.t - f.layout.margin.b for f in (still, whole)]
    assert plots[0] == plots[1]
    write_images(Result("t", figures=[FigureSection("Heads", whole)]), tmp_path, width=width, greyscale=True)
    grey, coloured = ([t.colorscale for t in f.data if t.meta == "diverging"] for f in (written[1], whole))
    assert grey
    assert {scale[0][1] for scale in grey} == {style.GREYSCALE[0][1]}
    assert {scale[0][1] for scale in coloured} == {style.DIVERGING["light"][0][1]}  # the figure itself is left alone
    with pytest.raises(
        ValueError, match="expected a width in pixels, 'single' or 'double', got 'wide'; pass width='si"
    ):
        write_images(Result("t", figures=[FigureSection("Heads", whole)]), tmp_path, width="wide")


def test_write_report(tmp_path):
    path = write_report(tmp_path / "report.html", Report("naïve → aligned"))
    assert "naïve → aligned" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="expected the path of a file, got the folder"):
        write_report(tmp_path, Report("t"))
    with pytest.raises(ValueError, match="expected an existing folder, got"):
        write_report(tmp_path / "none" / "report.html", Report("t"))


def test_errors():
    with pytest.raises(ValueError, match=r"expected a Report, got dict; pass Report\(title=…\)"):
        inspect.unwrap(report_html)({})  # without the tests' own type checker
    with pytest.raises(ValueError, match="expected max_rows >= 1, got 0"):
        report_html(Report("t"), max_rows=0)
    with pytest.raises(ValueError, match="expected at least one figure under 'Heads', got none"):
        report_html(Report("t", figures=[FigureSection("Heads", {})]))
