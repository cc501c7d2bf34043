"""What analyze_pair promises besides its numbers: untouched models, determinism, files, words, directions."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.listing import check_listed
from tests.oracles import reference
from tl_asymmetry import PairAnalysis, analyze_pair, centroids, estimate_pair
from tl_asymmetry.geometry import moments as moments_module
from tl_asymmetry.models import capture as capture_module
from tl_asymmetry.models.capture import capture
from tl_asymmetry.models.running import HOOK_FLAGS
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import POINTS
from tl_asymmetry.results.result import load
from tl_asymmetry.store import read_part, write_part

TOKENS = tiny.tokens(9, 12)
TEXTS = [" ".join(f"w{(7 * i + j * j) % 90}" for j in range(10 + i)) for i in range(6)]
OPTIONS: dict[str, Any] = {"tokens": TOKENS, "ranks": [1, 4], "groups": 3, "progress": False}
ONE_RANK = OPTIONS | {"ranks": [4]}  # where the subject is not the numbers
EACH_POINT = ["W_K", "W_O", "W_in", "W_out"]  # one matrix for each point that is read or written
BAD_NAME = '<img src=x onerror="alert(1)">'


@functools.cache
def pair(kind: str = tiny.KINDS[0], name: str = "gpt2") -> tuple[Any, Any]:
    return tiny.build(name, kind), tiny.build(name, kind, delta=0.05)


@functools.cache
def analysed() -> PairAnalysis:
    return analyze_pair(*pair(), **OPTIONS, sensitivity=True)


@functools.cache
def variants() -> pd.DataFrame:
    return analysed().sensitivity()


def identical_tables(a: PairAnalysis, b: PairAnalysis) -> None:
    for name in ("table", "asymmetry", "other_changes", "circuits"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), check_exact=True, obj=name)
    assert a.config == b.config
    assert a.notes == b.notes
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert array.dtype == b.arrays[name].dtype
        assert torch.equal(array.nan_to_num(nan=-7.0), b.arrays[name].nan_to_num(nan=-7.0)), name


# --- the caller's models and the process -----------------------------------------------------------------------------


def state(*models: Any) -> list[Any]:
    """All that must be as it was."""
    found: list[Any] = []
    for model in models:
        roots = [model, model.original_model] if hasattr(model, "original_model") else [model]
        modules = list({id(m): m for root in roots for m in root.modules()}.values())
        for module in modules:
            found.append((module.training, *(len(getattr(module, f"_{kind}_hooks")) for kind in (
                "forward", "forward_pre", "backward", "backward_pre", "state_dict",
            ))))  # fmt: skip
            for hooks in ("fwd_hooks", "bwd_hooks"):
                found.append(len(getattr(module, hooks, [])))
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                digest = hashlib.sha256(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy()).hexdigest()
                gradient = None if tensor.grad is None else tensor.grad.sum().item()
                kind = tensor.dtype, tensor.device, tensor.data_ptr()
                found.append((name, digest, tensor.requires_grad, gradient, *kind))
    found += [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]  # noqa: NPY002
    found += [
        torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
        torch.backends.cudnn.deterministic, torch.get_default_dtype(), torch.get_num_threads(),
        torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(),
    ]  # fmt: skip
    return found


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("end", ["success", "in a hook", "Ctrl-C"])
def test_everything_is_left_as_it_was(kind: str, end: str) -> None:
    base, aligned = (tiny.build("llama", kind, delta=δ) for δ in (0.0, 0.05))
    calls = []
    for model in (base, aligned):
        model.train()
        model.blocks[0].attn.eval()
        next(iter(model.parameters())).requires_grad_(False)
        last = list(model.parameters())[-1]
        last.grad = torch.ones_like(last)
        model.blocks[0].hook_resid_pre.add_hook(lambda x, hook: calls.append("mine"))
        model.blocks[1].attn.register_forward_pre_hook(lambda *_: None)
    stop: list[BaseException] = []

    def interfere(*_: Any) -> None:
        if stop and len(calls) > 6:  # the self-check is over, the capture is running
            raise stop[0]

    # in the aligned model, so that the base's capture is complete by then
    aligned.blocks[1].hook_resid_post.register_forward_hook(interfere)
    torch.set_float32_matmul_precision("high")
    try:
        for model in (base, aligned):
            model(TOKENS)  # transformers itself leaves hooks (output capturing) on its first pass
        calls.clear()
        before = state(base, aligned)
        options = ONE_RANK | {"activations": "both", "batch_size": 2, "matrices": EACH_POINT}
        if end == "success":
            analyze_pair(base, aligned, **options)
        else:
            error = RuntimeError("in a hook") if end == "in a hook" else KeyboardInterrupt()
            stop.append(error)
            with pytest.raises(type(error)):
                analyze_pair(base, aligned, **options)
        assert len(calls) > 6
        assert state(base, aligned) == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_was_put_into_a_model_is_named(kind: str) -> None:
    base, aligned = tiny.build("llama", kind), tiny.build("llama", kind, delta=0.05)
    base(TOKENS)  # the libraries' own hooks, which come with the first pass, are nobody's edit
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert ModelView(base).foreign_hooks() == ModelView(aligned).foreign_hooks() == []
    base.blocks[1].hook_resid_pre.add_hook(lambda x, hook: 2 * x, is_permanent=True)
    base.blocks[0].mlp.register_forward_hook(lambda *_: None)
    aligned.blocks[0].hook_resid_post = torch.nn.Identity()  # as a sparse autoencoder is put in
    said = (
        r"1 hook on blocks.0\S*.mlp, 1 hook on blocks.1.hook_(resid_pre|in); where that edits activations the numbers"
    )
    inside = "Identity in the place of blocks.0.hook_resid_post"
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match=inside):
        result = analyze_pair(base, aligned, **ONE_RANK, matrices=["W_K"])
    assert sum("is analysed with what has been put into it" in note for note in result.notes) == 2
    with pytest.warns(UserWarning, match=said):
        centroids(base, tokens=TOKENS[:1])


@functools.cache
def quiet(kind: str) -> PairAnalysis:
    return analyze_pair(*pair(kind, "llama"), **ONE_RANK, matrices=EACH_POINT)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("flag", HOOK_FLAGS)
def test_options_that_move_hooks_make_no_difference(kind: str, flag: str) -> None:
    base = tiny.build("llama", kind)
    switch = getattr(base, f"set_{flag}", None)
    if switch is None or (flag, kind) == ("use_attn_in", "hooked"):
        pytest.skip("no option of this model")
    switch(True)
    identical_tables(quiet(kind), analyze_pair(base, pair(kind, "llama")[1], **ONE_RANK, matrices=EACH_POINT))
    assert getattr(base.cfg, flag) is True


def test_training_mode_makes_no_difference() -> None:
    base, aligned = (tiny.bridge("gpt2", delta=δ) for δ in (0.0, 0.05))  # with dropout
    quiet = analyze_pair(base, aligned, **ONE_RANK, matrices=EACH_POINT)
    base.train()
    identical_tables(quiet, analyze_pair(base, aligned, **ONE_RANK, matrices=EACH_POINT))


# --- determinism -----------------------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    first = analyze_pair(*pair(), **OPTIONS, seed=3)
    torch.manual_seed(1)
    np.random.seed(5)  # noqa: NPY002
    identical_tables(first, analyze_pair(*pair(), **OPTIONS, seed=3))
    other = analyze_pair(*pair(), **OPTIONS, seed=4, matrices=["W_K", "W_O"]).table
    columns = ["fraction", "isotropic_z", "ci_low", "activation_matched"]
    same = first.table[first.table["matrix"].isin(["W_K", "W_O"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(same[columns], other[columns], check_exact=True)


# --- identical models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("bridge", "bridge"), ("hooked", "bridge")])
def test_identical_models(kinds: tuple[str, str], tmp_path: Path) -> None:
    if "hooked" in kinds and not tiny.HOOKED_AVAILABLE:
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    base, same = (tiny.build("gpt2", kind) for kind in kinds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = analyze_pair(base, same, **ONE_RANK, sensitivity=True)
    ours = [str(w.message) for w in caught if w.category in (UserWarning, RuntimeWarning)]
    assert ours == ["the two models are identical, weight for weight: every delta is zero and every fraction NaN"]
    assert ours[0] in result.notes
    nan = ["fraction", "relative", "isotropic_z", "isotropic_p", "isotropic_q", "excess", "ci_low", "ci_high",
           "delta_effective_rank", "rounding_share", "fraction_unrounded"]  # fmt: skip
    assert result.table[nan].isna().all(axis=None)
    assert (result.table[["delta_norm", "delta_relative_norm", "delta_shrink"]] == 0).all(axis=None)
    assert (result.table["p_method"] == "none").all()
    assert result.asymmetry[["log2_ratio", "read", "write"]].isna().all(axis=None)
    assert (result.other_changes["delta_norm"] == 0).all()
    assert result.circuits["fraction"].isna().all()
    assert "No matrix differs between the two models" in result.summary()
    assert "No matrix differs" in result._repr_html_()
    identical_tables(result, PairAnalysis.load(result.save(tmp_path / "saved")))
    if "hooked" in kinds:
        return  # what follows reads the same numbers
    assert result.to_html(tmp_path / "report.html").stat().st_size > 10_000
    assert result.sensitivity()["fraction"].isna().all()
    assert isinstance(result.plot_spectrum(), go.Figure)
    for plot in (
        lambda: result.plot_heads("W_Q"), lambda: result.plot_layers(), lambda: result.plot_asymmetry(),
        lambda: result.plot_rank_curve("W_Q", 0, 0), lambda: result.plot_spectrum("W_Q"),
    ):  # fmt: skip
        try:
            assert isinstance(plot(), go.Figure)
        except ValueError as error:
            assert "expected" in str(error)  # noqa: PT017 - either is right: an empty figure, or why there is none


# --- files -----------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    result = analysed()
    check_listed(result)
    folder = result.save(tmp_path / "a" / "b")
    assert sorted(p.name for p in folder.iterdir()) == ["result.safetensors"]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
        assert b"cpickle" not in content.lower()
    loaded = PairAnalysis.load(folder)
    identical_tables(result, loaded)
    assert loaded.table.dtypes.equals(result.table.dtypes)
    pd.testing.assert_frame_equal(result.sensitivity(), loaded.sensitivity(), check_exact=True)
    assert loaded.summary() == result.summary()
    assert result.save(folder) == folder  # over what is there
    identical_tables(result, PairAnalysis.load(folder))
    again = loaded.save(tmp_path / "again")
    assert (again / "result.safetensors").read_bytes() == (folder / "result.safetensors").read_bytes()
    # columns without a number in them keep their type
    few = analyze_pair(*pair(), **OPTIONS, matrices=["W_in"])
    identical_tables(few, PairAnalysis.load(few.save(tmp_path / "few")))


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    for read in (PairAnalysis.load, load):
        with pytest.raises(ValueError, match=r"expected a folder with result\.safetensors, got '.*nothing'; pass a f"):
            read(tmp_path / "nothing")
    result = analysed()
    file = result.save(tmp_path / "saved") / "result.safetensors"
    document, numbers = read_part(file, "result")
    write_part(file, "result", numbers, document | {"schema": 99})
    with pytest.raises(ValueError, match="expected schema 2, got 99; pass it to the tl_asymmetry that wrote it"):
        PairAnalysis.load(file.parent)
    write_part(file, "result", numbers, document | {"kind": "Comparison"})
    with pytest.raises(ValueError, match="expected a saved PairAnalysis, got 'Comparison'; pass its folder, or use lo"):
        PairAnalysis.load(file.parent)
    write_part(file, "result", numbers, document | {"kind": "Poem"})
    with pytest.raises(ValueError, match="expected a saved ActivationShift or .* or PairAnalysis or .*, got 'Poem'; p"):
        load(file.parent)


def test_the_config_is_json_and_complete() -> None:
    result = analyze_pair(*pair(), TEXTS, ranks=[1, 4], groups=3, progress=False, max_tokens=50)
    config = result.config
    assert json.loads(json.dumps(config)) == config
    import inspect

    expected = [p for p in inspect.signature(analyze_pair).parameters if not p.startswith("model_")]
    assert list(config["arguments"]) == expected
    assert config["arguments"]["max_tokens"] == 50
    assert {"torch", "transformer-lens", "numpy"} <= config["versions"].keys()
    for role in ("base", "aligned"):
        model = config["models"][role]
        assert {"name", "kind", "dtype", "storage", "device"} < model.keys()
        assert model["dtype"] == model["storage"] == "torch.float32"
    hashes = {next(v for k, v in m.items() if k.startswith("weights")) for m in config["models"].values()}
    assert len(hashes) == 2
    assert config["tokens"] == 50 - int((result.arrays["lengths"] > 0).sum())
    assert (config["ranks"], config["shown_rank"]) == ([1, 4], 4)
    tokens = analysed().config["arguments"]["tokens"]
    assert tokens["shape"] == [9, 12]


def test_to_xarray() -> None:
    pytest.importorskip("xarray")
    datasets = analysed().to_xarray()
    heads, mlp = datasets["W_Q", "attn_in"], datasets["W_in", "mlp_in"]
    assert dict(heads.sizes) == {"layer": 2, "head": 4, "rank": 2}
    assert dict(mlp.sizes) == {"layer": 2, "rank": 2}
    row = analysed().table.query("matrix == 'W_Q' and subspace == 'attn_in' and layer == 1 and head == 2 and rank == 4")
    assert float(heads["fraction"].sel(layer=1, head=2, rank=4)) == row["fraction"].item()


# --- sensitivity -----------------------------------------------------------------------------------------------------


def test_sensitivity_holds_the_main_table_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    result, plain = analysed(), analyze_plain()
    monkeypatch.setattr(ModelView, "run", lambda *_, **__: pytest.fail("a forward pass in .sensitivity()"))
    captured = result.sensitivity().query(
        "activations == 'base' and (subspace != 'prediction' and not centered and first_position == 'excluded'"
        " or subspace == 'prediction' and centered and fold_norm == 'folded')"
    )
    keys = ["matrix", "subspace", "layer", "head", "rank"]
    main = result.table[[*keys, "fraction", "relative"]].sort_values(keys, ignore_index=True)
    same = captured[[*keys, "fraction", "relative"]].sort_values(keys, ignore_index=True)
    pd.testing.assert_frame_equal(main, same, rtol=1e-5, atol=1e-7, check_dtype=False)
    with pytest.raises(ValueError, match="expected an analysis with sensitivity=True, got one without; pass sensitiv"):
        plain.sensitivity()


@functools.cache
def analyze_plain() -> PairAnalysis:
    return analyze_pair(*pair(), TEXTS, ranks=[1, 4], groups=3, progress=False)


@pytest.mark.parametrize(
    "options",
    [{"exclude_first": False}, {"centered": True}, {"activations": "aligned"}, {"activations": "both"}],
    ids=str,
)
def test_sensitivity_agrees_with_an_analysis_that_made_the_other_choice(options: dict[str, Any]) -> None:
    keys = ["matrix", "subspace", "layer", "head", "rank"]
    ours = variants()[variants()["matrix"].isin(EACH_POINT) & (variants()["rank"] == 4)].reset_index(drop=True)
    # kept from an analysis with the opposite first-position choice as well
    other = analyze_pair(*pair(), **ONE_RANK, **options, matrices=EACH_POINT, sensitivity=True)
    theirs = other.sensitivity()
    chosen = {"activations": "base", "centered": False, "exclude_first": True} | options
    rows = [
        table[
            (table["subspace"] != "prediction")
            & (table["activations"] == chosen["activations"])
            & (table["centered"] == chosen["centered"])
            & (table["first_position"] == ("excluded" if chosen["exclude_first"] else "included"))
        ]
        for table in (ours, theirs)
    ]
    main = other.table[other.table["subspace"] != "prediction"].sort_values(keys, ignore_index=True)
    for table in rows:
        fraction = table.sort_values(keys, ignore_index=True)["fraction"]
        np.testing.assert_allclose(fraction, main["fraction"], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(theirs["fraction"], ours["fraction"], rtol=1e-3, atol=1e-4)


def test_sensitivity_of_given_subspaces_says_why_there_is_none() -> None:
    from tl_asymmetry.geometry import random_subspace

    mine = {"mine": random_subspace(48, 8, 0)}
    result = analyze_pair(*pair(), **OPTIONS, sensitivity=True, subspaces=[mine], matrices=["W_K"])
    with pytest.raises(ValueError, match="expected a subspace that can be chosen otherwise, got only given ones; pass"):
        result.sensitivity()


# --- a short list, and other hands -----------------------------------------------------------------------------------


def test_top_is_one_line_for_each_head() -> None:
    result = analyze_plain()
    short = result.top(3)
    assert len(short) == 3
    assert short["excess"].is_monotonic_decreasing
    shown = result.table[result.table["rank"] == result.config["shown_rank"]]
    own = shown.query("pathway == 'read' and subspace in ['attn_in', 'mlp_in']")
    best = own.sort_values("excess", ascending=False).iloc[0]
    first = short.iloc[0]
    head = "" if pd.isna(best["head"]) else f"H{best['head']}"
    assert first["place"] == f"L{best['layer']}{head}.{best['matrix']}"
    assert first["excess"] == best["excess"]
    everything = result.top(100)
    assert not everything.duplicated(["layer", "head"]).any()
    assert set(result.top(100, matrix="W_O", by="relative")["matrix"]) == {"W_O"}
    p = result.top(100, by="isotropic_p")["isotropic_p"]
    assert p.is_monotonic_increasing  # the smallest first
    assert result.top(1, by="relative", matrix="W_in")["place"].iloc[0].startswith("L")
    for options, words in (
        ({"n": 0}, "expected n >= 1, got 0; pass"),
        ({"by": "beauty"}, "expected by among fraction, relative, .*, got 'beauty'; pass"),
        ({"by": "flags"}, "expected by among .*, got 'flags'; pass"),
        ({"matrix": "W_gate"}, "expected a matrix among W_Q, .*, got 'W_gate'; pass"),
        ({"matrix": "W_O"}, "expected numbers in 'excess' for W_O, got none; pass by="),
    ):
        with pytest.raises(ValueError, match=words):
            result.top(**options)


def test_results_pickle_copy_and_compare(tmp_path: Path) -> None:
    import copy
    import pickle

    result = analyze_pair(*pair(), **ONE_RANK, matrices=["W_Q", "W_O"])
    for twin in (pickle.loads(pickle.dumps(result)), copy.copy(result), copy.deepcopy(result), PairAnalysis.load(
        result.save(tmp_path)
    )):  # fmt: skip
        assert twin == result
        pd.testing.assert_frame_equal(twin.table, result.table, check_exact=True)
    assert result != analyze_pair(*pair(), **{**ONE_RANK, "seed": 1}, matrices=["W_Q", "W_O"])
    assert result != "a result"


def test_a_table_goes_into_a_file(tmp_path: Path) -> None:
    result = analyze_plain()
    path = result.to_csv(tmp_path / "new" / "table.csv")
    read = pd.read_csv(path)
    assert list(read.columns) == list(result.table.columns)
    np.testing.assert_allclose(read["relative"], result.table["relative"])
    assert list(pd.read_csv(result.to_csv(tmp_path / "circuits.csv", "circuits")).columns) == list(result.circuits)
    with pytest.raises(ValueError, match="expected a table among table, nulls, .*, got 'heads'; pass one of these"):
        result.to_csv(tmp_path / "x.csv", "heads")


def test_a_notebook_shows_the_facts() -> None:
    result = analyze_plain()
    assert result._facts() in result._repr_html_()


# --- directions ------------------------------------------------------------------------------------------------------


@functools.cache
def analyzed_at_rank_one(kind: str) -> PairAnalysis:
    return analyze_pair(*pair(kind), TEXTS, ranks=[1], groups=1, progress=False)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize(("matrix", "head"), [("W_Q", 3), ("W_V", 1), ("W_O", 2), ("W_in", None), ("W_out", None)])
def test_directions_against_a_naive_svd_and_argmax(kind: str, matrix: str, head: int | None) -> None:
    base, aligned = pair(kind)
    result = analyzed_at_rank_one(kind)
    layer, view = 1, ModelView(base)
    table = result.directions(layer, matrix, head, n=2, contexts=3)
    assert list(table["direction"]) == [1, 1, 2, 2]
    ΔW = reference.float64(ModelView(aligned).weight(layer, matrix)) - reference.float64(view.weight(layer, matrix))
    ΔW = ΔW if head is None else ΔW[head]
    ΔW = ΔW.T if matrix in ("W_O", "W_out") else ΔW
    U, s, Vt = np.linalg.svd(ΔW, full_matrices=False)
    W_E, W_U = reference.float64(base.embed.W_E), reference.float64(base.unembed.W_U).T
    point = {"W_Q": "attn_in", "W_V": "attn_in", "W_O": "z", "W_in": "mlp_in", "W_out": "mlp_post"}[matrix]
    tokenizer = view.tokenizer
    for i in range(2):
        rows = table[table["direction"] == i + 1]
        assert rows["energy"].iloc[0] == pytest.approx(s[i] ** 2 / (s**2).sum(), rel=1e-5)
        probe = U[:, i] if matrix in ("W_Q", "W_V", "W_in") else Vt[i]
        scores = []  # (projection, text of the context)
        for text in TEXTS:
            ids = [0, *tokenizer.encode(text, add_special_tokens=False)]
            seen: list[torch.Tensor] = []
            with torch.no_grad(), view.hooks({(point, layer): seen.append}):
                view.run(torch.tensor([ids]))
            x = reference.float64(seen[0][0] if point != "z" else seen[0][0, :, head])
            scores += [(x[t] @ probe, tokenizer.decode(ids[max(0, t - 12) : t + 1])) for t in range(1, len(ids))]
        # a singular vector's sign is free: match the two rows as a pair
        both = []
        for sign in (1, -1):
            order = sorted(scores, key=lambda entry: -sign * entry[0])[:3]
            tokens = [
                [tokenizer.decode([t]) for t in np.argsort(-sign * (E @ U[:, i]) / np.linalg.norm(E, axis=1))[:3]]
                for E in (W_E, W_U)
            ]
            both.append(([context for _, context in order], [sign * value for value, _ in order], *tokens))
        got = []
        for _, row in rows.iterrows():
            contexts, values = zip(*row["contexts"], strict=True)
            near = [[token for token, _ in row[f"{side}_tokens"][:3]] for side in ("embedding", "unembedding")]
            got.append((list(contexts), list(values), *near))
        if got[0][0] != both[0][0]:
            both.reverse()
        for ours, theirs in zip(got, both, strict=True):
            assert ours[0] == theirs[0]
            np.testing.assert_allclose(np.abs(ours[1]), np.abs(theirs[1]), rtol=1e-4, atol=1e-5)
            assert ours[2:] == theirs[2:]


def test_directions_refusals(tmp_path: Path) -> None:
    result = analyze_plain()
    for arguments, text in (
        ((0, "W_gate", 0), "expected a matrix among W_Q, .*, got 'W_gate'; pass "),
        ((2, "W_Q", 0), "expected a layer from 0 to 1, got 2; pass one of these"),
        ((0, "W_Q", 4), "expected a head from 0 to 3 for W_Q, got 4; pass that"),
        ((0, "W_Q", None), "expected a head from 0 to 3 for W_Q, got None; pass that"),
        ((0, "W_in", 1), r"expected head=None \(an MLP matrix\) for W_in, got 1; pass that"),
        ((0, "W_Q", 1, 6), "expected n from 1 to 5, got 6; pass a number in between"),
        (("L0.W_Q",), "expected a head from 0 to 3 for W_Q, got None; pass that"),
        (("0.W_Q",), "expected a place, got '0.W_Q'; pass \"L7H3.W_Q\""),
        ((0,), 'expected a place, got 0; pass "L7H3.W_Q"'),
        ((0, "W_Q", 1, 0), "expected n from 1 to 5, got 0; pass a number in between"),
    ):
        with pytest.raises(ValueError, match=text):
            result.directions(*arguments)
    loaded = PairAnalysis.load(result.save(tmp_path))
    with pytest.raises(ValueError, match="expected the base model to look tokens and contexts up in, .*; pass mod"):
        loaded.directions(0, "W_Q", 0)
    with pytest.raises(ValueError, match="expected the base model of this analysis, got other weights .*; pass mod"):
        loaded.directions(0, "W_Q", 0, model=pair()[1])
    spelled = result.directions("L0H0.W_Q")
    pd.testing.assert_frame_equal(loaded.directions(0, "W_Q", 0, model=pair()[0]), spelled)
    pd.testing.assert_frame_equal(result.directions(0, "W_Q", 0), spelled)


def test_directions_do_not_keep_the_model_alive() -> None:
    base, aligned = tiny.bridge("gpt2"), tiny.bridge("gpt2", delta=0.05)
    result = analyze_pair(base, aligned, **ONE_RANK, matrices=["W_Q"])
    del base, aligned
    import gc

    gc.collect()
    with pytest.raises(ValueError, match="but it is gone; pass model=base"):
        result.directions(0, "W_Q", 0)


# --- estimates and words ---------------------------------------------------------------------------------------------


def test_estimate() -> None:
    estimate = estimate_pair(*pair(), tokens=TOKENS)
    assert estimate.tokens == TOKENS.numel()
    assert 0 < estimate.seconds < 60
    assert 1e3 < estimate.peak_bytes < 1e8
    assert {"forward", "moments", "eigensolves"} <= set(estimate.table["stage"])
    few, more = (
        estimate_pair(*pair(), tokens=TOKENS, **options).table.set_index("stage")
        for options in ({"ranks": [4], "activations": "both"}, {"ranks": [1, 2, 3, 4, 5, 6], "groups": 1})
    )
    seconds = [stages.loc["tests", "seconds"] for stages in (few, more)]
    assert 0.02 * 14 < seconds[0] < seconds[1] / 2, "every matrix, subspace and rank has its tests and its rows"
    assert "PairEstimate: about" in repr(estimate)
    assert "No such call was timed" not in repr(estimate)
    both, eight, one = (stages.loc["moments", "bytes"] for stages in (few, estimate.table.set_index("stage"), more))
    assert both == 2 * eight == 16 * one
    of_files = estimate_pair(pair()[0], str(tiny.hf_directory("gpt2", delta=0.05)), tokens=TOKENS)
    assert of_files.tokens == estimate.tokens
    assert "No such call was timed (weights in files): the seconds may be off" in repr(of_files)


def test_the_summary() -> None:
    result = analysed()
    text = result.summary()
    assert text == repr(result)
    for words in (
        "2 layers × 4 heads, d_model 48", "99 tokens in 9 sequences", "W_Q", "prediction", "Notes:", "Reading, in",
        "Writing, in", "Asymmetry: mean log2(read / write)", "pass gradient=",
    ):  # fmt: skip
        assert words in text
    assert max(map(len, text.split("\n\n")[1].splitlines())) < 120
    html = result._repr_html_()
    assert html.count("<tr") == 1 + 12  # each matrix against two subspaces
    assert "<table" in html


def test_names_are_escaped(tmp_path: Path) -> None:
    base, aligned = (tiny.bridge("gpt2", delta=δ) for δ in (0.0, 0.05))
    base.cfg.model_name = aligned.cfg.model_name = BAD_NAME
    result = analyze_pair(base, aligned, **ONE_RANK, matrices=["W_Q", "W_O"])
    assert BAD_NAME in result.summary()
    assert BAD_NAME not in result._repr_html_()
    assert "&lt;img" in result._repr_html_()
    assert BAD_NAME not in result.to_html(tmp_path / "report.html").read_text(encoding="utf-8")


def test_calibration_texts_are_noted() -> None:
    result = analyze_pair(*pair(), ranks=[1], groups=1, max_tokens=300, progress=False)
    assert any("the package's calibration texts" in note and "pass texts=" in note for note in result.notes)
    assert not any("calibration texts" in note for note in analyze_plain().notes)


def test_the_progress_bar_can_be_switched_off(capfd: pytest.CaptureFixture[str]) -> None:
    analyze_pair(*pair(), **OPTIONS, matrices=["W_in"])
    assert capfd.readouterr() == ("", "")
    analyze_pair(*pair(), **OPTIONS | {"progress": True}, matrices=["W_in"])
    assert "activations" in capfd.readouterr().err


def test_the_functions_are_there_before_what_only_their_results_need() -> None:
    code = (
        "import sys; from tl_asymmetry import analyze_pair, estimate_pair, load;"
        "late = {'pandas', 'scipy', 'jinja2', 'plotly', 'transformer_lens', 'transformers', 'IPython', 'matplotlib'};"
        "sys.exit(', '.join(late & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


# --- devices, without one --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize("name", ["plain", "no_norm", "attn_only"])  # rotary positions are assigned by index
def test_capture_runs_on_fake_cuda_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reading a value (fake tensors have none), and with copies to the CPU only once a group is finished."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = tiny.toy(name, "hooked", seed=None, n_layers=1)
    # no cached index of either kind across the border
    for cached in ("_triangle", "_places"):
        monkeypatch.setattr(moments_module, cached, getattr(moments_module, cached).__wrapped__)
    # What the finished moments hold is looked at on the CPU, and fake tensors hold nothing.
    monkeypatch.setattr(capture_module, "_check_size", lambda *_: None)
    with FakeTensorMode(), IndexingWithoutDevice():
        to_fake_cuda_(model)
        tokens = torch.zeros(4, 12, dtype=torch.long)
        view = ModelView(model)
        assert view.device.type == "cuda"
        sites = [(point, layer) for point in POINTS if view.has_point(point) for layer in range(view.n_layers)]
        copies = []
        for batch_size in (1, 2):
            with CopiesToCpu() as counted:
                captured = capture(
                    view, [tokens.unbind()], sites, exclude_first=True, batch_size=batch_size, progress=False
                )
            copies.append(counted.count)
        moments = captured.groups[0]
        assert copies[0] == copies[1] <= 4 * len(sites)
        for (point, _), m in moments.items():
            assert m.second_moment.device.type == "cpu", point
            assert m.second_moment.shape == (m.d, m.d)
        assert view.weight(0, "W_Q").device.type == "cuda"
        assert view.unembedding()[0].device.type == "cuda"


class CopiesToCpu(TorchDispatchMode):
    """Counts tensors that leave the device, each of which waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_cuda and made.device.type == "cpu":
            self.count += 1
        return made


class IndexingWithoutDevice(torch.overrides.TorchFunctionMode):
    """`x[...]` and `contiguous` by operators: torch's own ask for the real device, which its CPU build lacks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "contiguous":
            return args[0].clone(memory_format=torch.contiguous_format)
        if name != "__getitem__":
            return func(*args, **(kwargs or {}))
        x, index = args
        index = index if isinstance(index, tuple) else (index,)
        if Ellipsis in [i for i in index if not isinstance(i, torch.Tensor)]:
            place = next(n for n, i in enumerate(index) if i is Ellipsis)
            missing = x.ndim - sum(i is not None and i is not Ellipsis for i in index)
            index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
        axis, tensors = 0, {}
        for i in index:
            if isinstance(i, torch.Tensor):
                tensors[axis] = i
                axis += 1
            elif i is None:
                x, axis = x.unsqueeze(axis), axis + 1
            elif isinstance(i, int):
                x = x.select(axis, i)
            else:
                x = torch.ops.aten.slice.Tensor(x, axis, i.start, i.stop, i.step or 1)
                axis += 1
        return torch.ops.aten.index.Tensor(x, [tensors.get(n) for n in range(axis)]) if tensors else x


def to_fake_cuda_(model: Any) -> None:
    """Put fake cuda tensors in the place of all parameters and buffers, under FakeTensorMode."""
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for key, value in store.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                    store[key] = torch.nn.Parameter(fake) if store is module._parameters else fake
    model.cfg.device = "cuda"
