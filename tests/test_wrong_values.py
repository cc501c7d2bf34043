"""Every public callable × every plain argument × a dozen wrong values: refused in our words, before any work.

Plain are numbers, flags, names and paths. What comes in many forms (texts, lists, tensors, models) is tried in the
second half, by a table of calls that once ended in another library's words, ran for long, or were taken.
"""

from __future__ import annotations

import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tl_asymmetry as tla
from tests import tiny
from tl_asymmetry import demo, edits, geometry, grokking
from tl_asymmetry.arguments import checked, plain_arguments
from tl_asymmetry.models.readers.hub import at_home
from tl_asymmetry.objectives import CrossEntropy, Mix, Optimizer, PreferenceBatch, TokenBatch
from tl_asymmetry.plots.drawing import Drawing
from tl_asymmetry.plots.layout import finish
from tl_asymmetry.plots.spectrum import spectrum_figure
from tl_asymmetry.plots.style import some_of
from tl_asymmetry.results.pages import page_path
from tl_asymmetry.results.report import write_images

pytestmark = pytest.mark.usefixtures("unchecked_types")

ROOMS = ("", "coupling", "demo", "edits", "geometry", "grokking", "jacobians", "objectives", "plots")

WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a fraction": lambda: 0.5,
    "NaN": lambda: float("nan"),
    "True": lambda: True,
    "a number": lambda: 3,
    "a word": lambda: "nonsense",
    "an empty list": list,
    "a list": lambda: [1],
    "int8": lambda: torch.ones(2, 3, dtype=torch.int8),
    "complex": lambda: torch.ones((), dtype=torch.complex64),
    "a generator": lambda: (x for x in (1, 2)),
    "a DataFrame": lambda: pd.DataFrame({"column": [1.5]}),
    "a mapping": lambda: {"nonsense": 1},
    "a foreign object": object,
}  # fmt: skip
"""What is put in the place of one argument."""

RIGHT: dict[str, tuple[str, ...]] = {
    "int": ("a number",),
    "float": ("a number", "a fraction", "NaN"),
    "bool": ("True",),
    "str": ("a word",),
    "Path": (),
    "None": ("None",),
    "Float": ("int8",),
    "Float64": ("int8",),
    "np.ndarray": (),
}
"""Which of these are no wrong values after all, by what stands in the annotation; a NaN is a number, and refused by the
functions that need one that is."""


def public() -> Iterator[tuple[str, Any]]:
    """Every public function and class, by the name that users import it by, and every kind of result."""
    seen = set()
    for room in ROOMS:
        module = importlib.import_module(f"tl_asymmetry.{room}".rstrip("."))
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing) and not isinstance(thing, types.ModuleType) and id(thing) not in seen:
                seen.add(id(thing))
                yield f"{room}.{name}".lstrip("."), thing


def calls() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Every public function, constructor and method that has a plain argument."""
    for name, thing in public():
        if not inspect.isclass(thing):
            yield name, thing
            continue
        for base in thing.__mro__:
            if base.__module__.startswith("tl_asymmetry."):
                for method, member in vars(base).items():
                    if method == "__init__" or (inspect.isfunction(member) and not method.startswith("_")):
                        yield f"{name}.{method}", member


CALLS = {name: call for name, call in calls() if plain_arguments(call)}


def test_the_sweep_is_large() -> None:
    assert len(CALLS) > 200
    assert sum(len(plain_arguments(call)) for call in CALLS.values()) > 600
    assert {"analyze_pair", "analyze_trajectory", "PairAnalysis.top", "PairAnalysis.to_csv", "load"} < CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_value_is_refused(name: str) -> None:
    call = CALLS[name]
    parameters = inspect.signature(call).parameters
    for argument in plain_arguments(call):
        parts = re.sub(r"\[[^]]*\]", "", str(parameters[argument].annotation)).replace(" ", "").split("|")
        right = {value for part in parts for value in RIGHT.get(part, ())}
        for wrong, made in WRONG.items():
            if wrong not in right:
                with pytest.raises(ValueError, match=rf"^expected {argument} as .*, got .*; pass "):
                    call(**{argument: made()})  # nothing else is given: it is refused before anything is missed


def test_a_refusal_says_all_that_is_needed() -> None:
    @checked
    def asked(count: int, name: str | None = None, *, share: float = 0.5) -> None: ...

    with pytest.raises(ValueError, match=r"^expected count as a whole number, got True; pass a number such as 1$"):
        asked(True)
    with pytest.raises(ValueError, match=r"^expected name as a string or None, got 3; pass a string, or leave it out$"):
        asked(1, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^expected share as a number, got a DataFrame; pass share=0.5, the default$"):
        asked(1, share=pd.DataFrame())  # type: ignore[arg-type]
    asked(torch.ones(2).shape[0], None, share=1)


# --- what comes in many forms -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.toy("plain", "bridge")


def test_words_of_other_libraries_are_told_in_ours(model: Any) -> None:
    for tokens in (None, "w1 w2", {"a": 1}, [None], object()):
        with pytest.raises(ValueError, match="expected tokens as whole numbers .*, got .*; pass token ids"):
            edits.input_at(model, tokens, 0, "W_Q")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected residual_axis -2 \(read\) or -1 \(write\), got 7; pass one"):
        geometry.isotropic_null(torch.ones(4, 3), 2, residual_axis=7)
    with pytest.raises(ValueError, match="expected directions .*, got Tensor; pass a tensor"):
        geometry.as_subspace(torch.ones(3, dtype=torch.complex64), 3)
    with pytest.raises(ValueError, match=r"expected weight as a tensor of floats, got torch\.int8; pass the weights"):
        geometry.storage_dtype(torch.ones(3, dtype=torch.int8))
    for points in ([None], [0.5], [("attn_in", "0")], []):
        with pytest.raises(ValueError, match="expected hook_points .*, got .*; pass"):
            geometry.capture_moments(model, points, tokens=tiny.tokens(), progress=False)  # type: ignore[arg-type]
    for results in (None, 3, object(), "result"):
        with pytest.raises(ValueError, match="expected results, or one, got .*; pass what an analysis returned"):
            tla.report(results, "page.html")  # type: ignore[arg-type]
    for base in (float("nan"), [], object(), {"a": 1}, pd.DataFrame()):
        with pytest.raises(ValueError, match="expected base as a model, a path or a configuration, got .*; pass one"):
            tla.weights_from("nowhere", base)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="expected seed from 0 to 4,294,967,295, .*, got .*; pass such"):
            grokking.ModularArithmetic("add", p=5).sample(2, seed=seed)


def test_unknown_names_are_not_taken(model: Any) -> None:
    for d_vocab in (0, -3, 10**12):
        with pytest.raises(ValueError, match="expected d_vocab from 1 to 96, the tokens predicted, got .*; pass None"):
            geometry.prediction_subspace(model, d_vocab=d_vocab)
    recipe = grokking.Recipe(steps=10, every=10)
    with pytest.raises(ValueError, match="expected sizes among .*, got 'd_modell'; pass 'd_model'"):
        grokking.train("add", p=5, recipe=recipe, sizes={"d_modell": 8})
    with pytest.raises(ValueError, match="expected projection with keywords among .*, got 'arms'; pass"):
        grokking.train("add", p=5, recipe=recipe, projection={"arms": "keep"})
    with pytest.raises(ValueError, match="expected which with keywords .*, got int for 'mine'; pass a dict"):
        grokking.arms("add", recipe=recipe, which={"mine": 3})  # type: ignore[dict-item]
    kinds: tuple[tuple[Any, str], ...] = (("y", "'y'"), (np.array(["a", "b"]), ".*"))
    for kind, got in kinds:
        with pytest.raises(ValueError, match=f"expected kind among auto, hooked, bridge, got {got}; pass one of these"):
            demo.demo_run(kind)


@pytest.fixture(scope="module")
def analysed(model: Any) -> tla.PairAnalysis:
    options: dict[str, Any] = {"tokens": tiny.tokens(6, 10), "ranks": 4, "groups": 1, "progress": False}
    return tla.analyze_pair(model, tiny.perturbed(model, 0.05), names=["before", "after"], **options)


def test_one_name_stands_for_a_list_of_one_and_a_place_may_be_spelled(analysed: tla.PairAnalysis, model: Any) -> None:
    assert analysed._title() == "before → after"
    drawn = analysed.plot_layers("W_Q")
    assert drawn.to_json() == analysed.plot_layers(["W_Q"]).to_json()
    assert analysed.plot_rank_curve("L1H2.W_Q").to_json() == analysed.plot_rank_curve("W_Q", 1, 2).to_json()
    other = tiny.perturbed(model, 0.05)
    spectra = tla.analyze_spectra(model, other, matrices="W_Q", ranks=2, names=("a", "b"), progress=False)
    assert spectra.table["rank"].unique().tolist() == [2]
    assert spectra._title() == "a → b, spectra"


def test_the_nearest_valid_name_is_offered(analysed: tla.PairAnalysis, model: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: analysed.top(matrix="WQ"),
        lambda: analysed.plot_heads("WQ"),
        lambda: analysed.plot_layers("WQ"),
        lambda: analysed.plot_rank_curve("WQ", 0),
        lambda: analysed.directions(0, "WQ", 0, model=model),
        lambda: analysed.delta_spectrum("WQ"),
        lambda: tla.analyze_spectra(model, model, matrices=["W_K", "WQ"], progress=False),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match="expected .* W_Q.*, got .*'WQ'; pass 'W_Q'|'W_Q', .*, got 'WQ'; pass 'W_Q'"
        ):
            call()
    with pytest.raises(ValueError, match="got 'adamw'; pass 'adam'"):
        tla.analyze_pair(model, model, tokens=tiny.tokens(), optimizer="adamw", progress=False)
    with pytest.raises(ValueError, match="got 'attn'; pass 'attn_in'"):
        analysed.eigenvalues("attn")
    for names in ("base", ["base"], ["a", "b", "c"], ["a", 3], [" ", "b"], 3):
        with pytest.raises(
            ValueError, match="expected names of the two models, .*, got .*; pass names=.'base', 'dpo'.,"
        ):
            tla.analyze_pair(model, model, tokens=tiny.tokens(), names=names, progress=False)  # type: ignore[arg-type]
    for wrong in (3, "spectra", []):
        with pytest.raises(ValueError, match="expected spectra as a SpectralAnalysis, got .*; pass analyze_spectra"):
            tla.explorer(analysed, "page.html", spectra=wrong)  # type: ignore[arg-type]
    for words in ({"windows": 0.5}, {"estimators": None}, {"alignments": [3]}):
        with pytest.raises(
            ValueError, match="expected (windows|estimators|alignments) as a .*, or several, got .*; pass"
        ):
            tla.direction_coupling(object(), **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a result of analyze_pair, got Comparison; pass one, or"):
        tla.explorer(tla.compare(analysed, analysed), "page.html")  # type: ignore[arg-type]


def test_what_cannot_be_written_or_drawn_is_refused_before_the_work(tmp_path: Path) -> None:
    class Slow:
        def _report(self) -> Any:
            raise AssertionError("the report was made")

    with pytest.raises(ValueError, match="expected an existing folder, got .*; create it or pass another path"):
        tla.report(Slow(), tmp_path / "none" / "page.html")
    with pytest.raises(ValueError, match="expected max_rows >= 1, got 0; pass a positive number of rows"):
        tla.report(Slow(), tmp_path / "page.html", max_rows=0)
    with pytest.raises(ValueError, match="expected format among svg, .*, got 'bmp'; pass format='svg'"):
        write_images(Slow(), tmp_path, format="bmp")
    with pytest.raises(ValueError, match="expected scale above 0 .*, got -1.0; pass scale=2"):
        write_images(Slow(), tmp_path, scale=-1.0)
    with pytest.raises(ValueError, match="expected template among light, dark, .*, got 'sepia'; pass template='light'"):
        finish(Drawing(), "words", plot_height=100, template="sepia")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"template": 3}, "expected template as a name or a template of plotly, got 3; pass None"),
        ({"width": 0}, "expected width from 10 to 20000 pixels, got 0; pass width=None"),
        ({"height": 10**9}, "expected height from 10 to 20000 pixels, got 1000000000; pass height=None"),
    )
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            finish(Drawing(), "words", plot_height=100, **options)
    assert not list(tmp_path.iterdir())


def test_what_is_no_list_of_numbers_is_refused_where_numbers_are_taken() -> None:
    for wrong in ("None", "a fraction", "NaN", "True", "a word", "int8", "complex", "a DataFrame", "a mapping"):
        with pytest.raises(ValueError, match="expected ranks as a whole number, or several, got .*; pass ranks=.16"):
            spectrum_figure(np.ones(3), name="words", ranks=WRONG[wrong]())
    for listed in (2, [2], (2,), torch.tensor([2]), range(2, 3), np.array([2]), iter([2])):
        assert len(spectrum_figure(np.ones(3), name="words", ranks=listed).layout.shapes) == 1  # type: ignore[arg-type]


def test_gain_takes_subspaces_alone() -> None:
    model = tiny.toy("plain", "bridge")
    jacobians = tla.layer_jacobians(model, tokens=tiny.tokens(1, 4), progress=False)
    for wrong in WRONG.values():
        with pytest.raises(ValueError, match="expected (a S|one s)ubspace,? or .*, got .*; pass"):
            jacobians.gain(wrong())


def test_a_control_study_is_refused_before_it_trains(model: Any) -> None:
    def study(**wrong: Any) -> None:
        graded = {"hard": CrossEntropy(), "soft": CrossEntropy(temperature=2)}
        given: dict[str, Any] = {"objectives": graded, "data": [tiny.tokens(6, 10)], "steps": 10**9, **wrong}
        tla.contrastive_control(model, progress=False, **given)

    for wrong, words in (
        ({"seeds": "a"}, "expected seeds as a whole number, or several, got 'a'; pass seeds="),
        ({"seeds": [0, None]}, r"expected seeds as a whole number, or several, got \[0, None\]; pass seeds="),
        (
            {"grades": object()},
            "expected grades as a number, or several, got an object; pass a number for each objective",
        ),
        ({"grades": [1.0]}, "expected a grade for each of 2 objectives, got 1; pass one for each"),
        ({"optimizer": "adam"}, r"expected optimizer as an Optimizer, got 'adam'; pass Optimizer\("),
        ({"objectives": 3}, "expected objectives as a list, got 3; pass .sharp, ..., soft."),
        ({"ranks": 0.5}, "expected ranks from 1 to 47 .*, got 0.5; pass such ranks"),
        ({"ranks": [48]}, "expected ranks from 1 to 47 .*, got 48; pass such ranks"),
    ):
        with pytest.raises(ValueError, match=words):
            study(**wrong)


def test_edits_and_targets_of_another_kind_are_refused(model: Any) -> None:
    for wrong in (None, 0.5, True, object()):
        with pytest.raises(ValueError, match=r"expected edits, one or several, got .*; pass RankOneEdit\("):
            edits.commit_edits(model, wrong)  # type: ignore[arg-type]
    for wrong in (0.5, "w1", [1, 2], {"a": 1}):
        with pytest.raises(
            ValueError, match="expected targets as a tensor of token ids, got .*; pass one, or leave it"
        ):
            tla.centroids(model, tokens=tiny.tokens(2, 4), targets=wrong)  # type: ignore[arg-type]


NO_NAMES: dict[str, Callable[[], Any]] = {
    name: WRONG[name]
    for name in ("a fraction", "NaN", "True", "a number", "a list", "int8", "complex", "a DataFrame", "a mapping",
                 "a foreign object", "a generator")
}  # fmt: skip


@pytest.mark.parametrize("wrong", NO_NAMES)
def test_what_is_no_list_of_names_is_refused_where_names_are_taken(wrong: str, analysed: tla.PairAnalysis) -> None:
    takers: list[Callable[[Any], Any]] = [
        lambda given: analysed.plot_layers(given),
        lambda given: analysed.plot_heads(given, side_by_side=2),
        lambda given: some_of("matrices", given, ["W_Q"]),
    ]
    for take in takers:
        with pytest.raises(ValueError, match="expected matri(x|ces) as a name or a list of names, got .*; pass matri"):
            take(NO_NAMES[wrong]())
    for nothing in ([], ()):
        with pytest.raises(ValueError, match="expected matrices with a name or more, got none; pass matrices=None"):
            analysed.plot_layers(nothing)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert page_path("~/page.html") == tmp_path / "page.html"
    assert at_home("~/model") == tmp_path / "model"
    assert at_home("EleutherAI/pythia-14m") == "EleutherAI/pythia-14m"
    with pytest.raises(ValueError, match=f"expected the path of a file, got the folder {tmp_path}"):
        page_path("~")


def test_an_empty_string_is_no_path(
    analysed: tla.PairAnalysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    calls: dict[str, list[Callable[[str], Any]]] = {
        "path": [analysed.save, analysed.to_csv, analysed.to_html, analysed.to_explorer, tla.load],
        "folder": [analysed.write_images],
    }
    for name, takers in calls.items():
        for take in takers:
            for wrong in ("", " ", "a\0b"):
                with pytest.raises(ValueError, match=f"^expected {name} as a path, got .*; pass a path$"):
                    take(wrong)
    assert not list(tmp_path.iterdir())


def test_more_draws_than_memory_are_refused(model: Any, analysed: tla.PairAnalysis) -> None:
    other = tiny.perturbed(model, 0.05)
    options: dict[str, Any] = {"tokens": tiny.tokens(2, 6), "draws": 10**12}
    calls: list[Callable[[], Any]] = [
        lambda: tla.rank_one_study(model, other, progress=False, **options),
        lambda: tla.centroids(model, noise=0.1, **options),
        lambda: tla.analyze_tangents({0: model, 9: other}, progress=False, **options),
        lambda: edits.matched_controls(tla.RankOneEdit(0, "W_O", 0, torch.ones(48), torch.ones(12)), "random", 10**12),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expected draws from 1 to 100,000, got 1000000000000; pass draws="):
            call()
    with pytest.raises(ValueError, match="expected contexts of at least 1, got -3; pass contexts=5"):
        analysed.directions("L0H0.W_Q", contexts=-3, model=model)


def test_a_trajectory_takes_neither_a_model_as_gradients_nor_any_tokenizer(model: Any) -> None:
    run = {0: model, 5: model}
    for wrong in (model, 3, "gradient"):
        with pytest.raises(ValueError, match="expected gradient as a function of a model, got .*; pass e.g."):
            tla.analyze_trajectory(run, tokens=tiny.tokens(2, 6), gradient=wrong, progress=False)
    for wrong in (3, "gpt2", object()):
        with pytest.raises(ValueError, match="expected tokenizer as a tokenizer of transformers, got .*; pass AutoTok"):
            tla.analyze_trajectory(run, tokens=tiny.tokens(2, 6), tokenizer=wrong, progress=False)


def test_numbers_of_a_training_that_cannot_be_meant_are_refused() -> None:
    tokens, yes = tiny.tokens(2, 4), torch.ones(2, 4, dtype=torch.bool)
    infinite, nan = float("inf"), float("nan")
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: grokking.Recipe(lr=nan), "expected lr > 0, got nan"),
        (lambda: grokking.Recipe(clip=-1.0), "expected clip > 0, got -1.0"),
        (lambda: grokking.Recipe(weight_decay=infinite), "expected weight_decay >= 0, got inf"),
        (lambda: grokking.Recipe(betas=(0.9, 1.0)), r"expected two betas from 0 to below 1, got \(0.9, 1.0\)"),
        (lambda: Optimizer(betas=None), "expected betas as a number, or several, got None"),  # type: ignore[arg-type]
        (lambda: Optimizer(lr=infinite), "expected lr > 0"),
        (lambda: grokking.GrokShape(n_heads=0), "expected n_heads from 1 to 100,000, got 0"),
        (lambda: grokking.GrokShape(p=10**12), "expected p from 1 to 100,000, got 1000000000000"),
        (lambda: grokking.ModularArithmetic(p=10**12), "expected p from 2 to 2,000, got 1000000000000"),
        (lambda: grokking.ModularArithmetic([["add"]]), "expected ops as a string, or several"),  # type: ignore[arg-type]
        (lambda: CrossEntropy(temperature=infinite), "expected temperature > 0, got inf"),
        (lambda: Mix(3), "expected parts .weight, objective., got .*; pass e.g."),
        (lambda: Mix((1.0, 3)), "expected parts .weight, objective., got .*; pass e.g."),
        (lambda: TokenBatch(None, yes), "expected tokens and mask as tensors .*, got None and bool"),  # type: ignore[arg-type]
        (lambda: TokenBatch(tokens * 0.5, yes), "expected tokens as whole numbers, got float32"),
        (lambda: PreferenceBatch(TokenBatch(tokens, yes), 3), "expected chosen and rejected as TokenBatch, got 3"),  # type: ignore[arg-type]
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_place_is_said_once(analysed: tla.PairAnalysis, model: Any) -> None:
    for call in (
        lambda: analysed.directions("L0H0.W_Q", head=3, model=model),
        lambda: analysed.plot_rank_curve("L0H0.W_Q", head=3),
    ):
        with pytest.raises(
            ValueError, match="expected a whole place or its parts, got 'L0H0.W_Q' and head=3; pass one"
        ):
            call()
    row = analysed.table.iloc[0]  # its numbers are numpy's
    analysed.plot_rank_curve(row["matrix"], row["layer"], row["head"])
    assert len(analysed.directions(row["layer"], row["matrix"], row["head"], n=1, contexts=1, model=model)) == 2


def test_figures_are_refused_before_their_tests(analysed: tla.PairAnalysis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tla.PairAnalysis, "stability", lambda self: pytest.fail("the tests were made"))
    for name, wrong in (("matrix", "W_X"), ("subspace", "attn"), ("rank", 3)):
        with pytest.raises(ValueError, match=f"expected {name} to be one of .*, got {wrong!r}; pass {name}="):
            analysed.plot_sensitivity(**{name: wrong})
    with pytest.raises(ValueError, match="expected template with keys data and layout, got nonsense; pass None"):
        analysed.plot_heads("W_Q", template={"nonsense": 1})
    drawn = analysed.plot_heads(["W_Q", "W_K"], side_by_side=2)
    assert analysed.plot_heads(["W_Q", "W_K"], side_by_side=10**12).to_json() == drawn.to_json()


def test_objects_and_lists_of_the_rooms_are_refused_in_our_words(model: Any) -> None:
    short = grokking.Recipe(steps=10, every=10)
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.ones(6))
    other = tiny.perturbed(model, 0.05)

    def study(**wrong: Any) -> None:
        tla.rank_one_study(model, other, tokens=tiny.tokens(2, 6), progress=False, **wrong)

    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: geometry.RollingSVD(3, 1, dtype=torch.ones(2)), "expected dtype as a dtype, got float32"),  # type: ignore[arg-type]
        (lambda: geometry.RollingSVD(10**12, 1), "expected a window of at most 20,000 rows, got 1000000000000"),
        (
            lambda: geometry.principal_subspace("C"),
            "expected moments as a StreamingMoments or a tensor of numbers, got",
        ),  # type: ignore[arg-type]
        (lambda: geometry.principal_subspace(rows), r"expected a symmetric matrix \[d, d\], got \[6, 4\]"),
        (
            lambda: geometry.energy_profile(rows[0], rows),
            r"expected delta as a tensor of numbers \[..., rows, columns\]",
        ),
        (lambda: geometry.random_subspace(10**12, 2, 0), "expected d from 1 to 1,000,000, got 1000000000000"),
        (lambda: geometry.semi_nmf(rows, 2, seeds=["a"]), "expected seeds as a whole number, or several, got"),  # type: ignore[list-item]
        (
            lambda: geometry.capture_moments(model, 3, tokens=tiny.tokens()),
            "expected hook_points as names or pairs, got",
        ),  # type: ignore[arg-type]
        (lambda: geometry.difference_of_means(model, 3, 4), "expected texts, or token ids, got 3; pass a list"),
        (lambda: grokking.GrokTransformer(3), "expected shape as a GrokShape, got 3; pass"),  # type: ignore[arg-type]
        (lambda: grokking.bridge_model(model), "expected model as a GrokTransformer, got a TransformerBridge; pass"),
        (
            lambda: grokking.train("add", p=5, recipe={}),
            "expected recipe as a Recipe or None, got {}; pass a Recipe, or",
        ),  # type: ignore[arg-type]
        (
            lambda: grokking.train("add", p=5, recipe=short, device="tpu9"),
            "expected device as a device, got 'tpu9'; pass",
        ),
        (lambda: grokking.train("add", p=5, recipe=short, sizes=[1]), "expected sizes by name, got .1.; pass e.g."),  # type: ignore[arg-type]
        (lambda: grokking.arms("add", recipe=short, which=3), "expected which as arms by name, got 3; pass a dict"),  # type: ignore[arg-type]
        (
            lambda: grokking.arms("add", recipe=short, seeds="a"),
            "expected seeds as a whole number, or several, got 'a'",
        ),  # type: ignore[arg-type]
        (lambda: grokking.GradientProjection(3, [weight]), "expected optimizer as an Optimizer, got 3; pass"),  # type: ignore[arg-type]
        (lambda: study(scales="a"), "expected scales as a number, or several, got 'a'; pass scales="),
        (lambda: edits.matched_controls(3, "random"), "expected edit as a RankOneEdit, got 3; pass"),  # type: ignore[arg-type]
        (lambda: demo.demo_pair(device="tpu9"), "expected device as a device, got 'tpu9'; pass 'cpu'"),
        (lambda: tla.compare_deltas(model, 3, progress=False), "expected a mapping from names to models, got int"),  # type: ignore[arg-type]
        (lambda: tla.TangentProbe(total_steps=3, options=3), "expected options as TangentOptions, got 3; pass"),  # type: ignore[arg-type]
        (lambda: tla.TrajectoryRecorder(model, 1, probes=3), "expected probes as functions .*, got 3"),  # type: ignore[arg-type]
        (
            lambda: tla.TrajectoryRecorder(model, 1, tokenizer=3),
            "expected a tokenizer of transformers, got 3",
        ),
        (lambda: study(controls=3), "expected controls among undo_matched, .*, got 3; pass a list"),
        (lambda: study(outcomes=3), "expected outcomes among .*, got 3; pass a list of those"),
        (lambda: study(directions=3), "expected directions among .*, got 3; pass a list of those, or a mapping"),
        (lambda: study(sites=3), "expected sites as places, got 3; pass"),
        (lambda: tla.pythia_checkpoints("pythia-14m", "a"), "expected steps as a whole number, or several, got 'a'"),  # type: ignore[arg-type]
        (
            lambda: tla.layer_jacobians(model, tokens=tiny.tokens(1, 4), layers=True),
            "expected a list of layers, got True",
        ),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=words):
            call()
