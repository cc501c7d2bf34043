"""Running on from a block: the same logits as the whole model, and nothing left behind."""

import pytest
import torch

from tests import tiny
from tests.models.test_edits import CASES, fingerprint, logits, make_edit
from tl_asymmetry import ModelView, apply_edits
from tl_asymmetry.models import resume
from tl_asymmetry.models.resume import EditedRuns, resumes


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_edits_of_every_matrix_and_layer_give_the_logits_of_whole_passes(architecture, kind):
    view, tokens = ModelView(tiny.build(architecture, kind, torch.float64)), tiny.tokens(3, 7)
    layers = range(view.n_layers)
    before, clean = fingerprint(view.model), logits(view, tokens)
    # Hugging Face's GPT-J multiplies queries and keys in float32 whatever its weights are
    tolerance = 1e-5 if (architecture, kind) == ("gptj", "bridge") else 1e-10
    edits = [make_edit(view, layer, m, seed=i) for layer in layers for i, m in enumerate(view.matrices)]
    assert resumes(view, tokens[:1], layers) == (True, "")
    with torch.no_grad(), view.evaluating():
        runs = EditedRuns(view, tokens, layers)
        torch.testing.assert_close(runs.logits(runs.final), clean.flatten(0, 1), rtol=tolerance, atol=tolerance)
        got = runs.logits(torch.cat(list(runs.under(edits))))
    assert len(got) == len(edits)
    for edit, ours in zip(edits, got, strict=True):
        with apply_edits(view, edit):
            torch.testing.assert_close(ours, logits(view, tokens).flatten(0, 1), rtol=tolerance, atol=tolerance)
    assert fingerprint(view.model) == before
    assert all("forward" not in block.__dict__ for block in view.blocks)
    torch.testing.assert_close(logits(view, tokens), clean, rtol=0, atol=0)


@pytest.mark.parametrize("toy", tiny.TOYS if tiny.HOOKED_AVAILABLE else tiny.NATIVE_TOYS)
def test_toys(toy):
    view, tokens = ModelView(tiny.toy(toy, dtype=torch.float64)), tiny.tokens()
    edits = [make_edit(view, 0, m, seed=i) for i, m in enumerate(view.matrices)]
    assert resumes(view, tokens, [0, 1])[0]
    with torch.no_grad(), view.evaluating():
        runs = EditedRuns(view, tokens, [0])
        got = runs.logits(torch.cat(list(runs.under(edits))))
    for edit, ours in zip(edits, got, strict=True):
        with apply_edits(view, edit):
            torch.testing.assert_close(ours, logits(view, tokens).flatten(0, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("architecture", "kind"), [("gpt2", k) for k in tiny.KINDS] + [("neox", tiny.KINDS[-1])])
def test_edits_made_together_run_on_from_the_lowest_block(architecture, kind):
    view, tokens = ModelView(tiny.build(architecture, kind, torch.float64)), tiny.tokens(3, 7)
    before = fingerprint(view.model)
    first, second = (make_edit(view, layer, "W_V", 1, seed=layer) for layer in (0, 1))
    trials = [[second, make_edit(view, 1, "W_O")], [first, second], [], second, [second]]
    rows, positions = torch.tensor([0, 2, 2]), torch.tensor([6, 0, 3])
    with torch.no_grad(), view.evaluating():
        for kept in ([0, 1], [1], []):
            runs = EditedRuns(view, tokens, kept, (rows, positions))
            got = runs.logits(torch.cat(list(runs.under(trials))))
            for trial, ours in zip(trials, got, strict=True):
                with apply_edits(view, trial):
                    expected = logits(view, tokens)[rows, positions]
                torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert fingerprint(view.model) == before


def test_lower_blocks_do_not_run_and_upper_ones_run_once(monkeypatch):
    view, tokens = ModelView(tiny.build("gpt2", tiny.KINDS[0])), tiny.tokens(2, 5)
    ran = []
    edits = [make_edit(view, 1, "W_Q", seed=s) for s in range(6)]
    with torch.no_grad(), view.evaluating():
        runs = EditedRuns(view, tokens, [1])
        watch = view.hooks({("attn_in", layer): lambda x, i=layer: ran.append((i, len(x))) for layer in (0, 1)})
        with watch:
            assert [x.shape for x in runs.under(edits)] == [(6, 10, tiny.D_MODEL)]
        assert ran == [(1, 2)] * 6  # the edited block itself, once for each edit; block 0 never
        ran.clear()
        runs = EditedRuns(view, tokens, [0])
        with view.hooks({("attn_in", layer): lambda x, i=layer: ran.append((i, len(x))) for layer in (0, 1)}):
            list(runs.under([make_edit(view, 0, "W_Q", seed=s) for s in range(6)]))
        assert ran == [(0, 2)] * 6 + [(1, 12)]
        room = 4 * tokens.numel() * 4 * tiny.D_MODEL
        monkeypatch.setattr(resume, "_FLOATS_PER_PASS", {"other": 1, "cpu": room})
        runs = EditedRuns(view, tokens, [1])
        assert [len(x) for x in runs.under(edits)] == [4, 2]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_that_cannot_be_resumed_is_found_out(kind):
    """A hook that changes the stream by what it saw before: no two runs of a block are the same."""
    view, tokens = ModelView(tiny.build("gpt2", kind)), tiny.tokens()
    calls = []

    def drift(module, args, output):
        calls.append(1)
        return (output[0] * (1 + len(calls)), *output[1:]) if isinstance(output, tuple) else output * (1 + len(calls))

    handle = view.blocks[1].attn.register_forward_hook(drift)
    try:
        fine, why = resumes(view, tokens, [0, 1])
    finally:
        handle.remove()
    assert not fine
    assert "off after the last block" in why
    assert resumes(view, tokens, [0, 1]) == (True, "")


def test_a_failing_forward_is_an_answer_too(monkeypatch):
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    monkeypatch.setattr(EditedRuns, "again", lambda *_: 1 / 0)
    assert resumes(view, tiny.tokens(), [0]) == (False, "ZeroDivisionError: division by zero")
    assert all("forward" not in block.__dict__ for block in view.blocks)


def test_whole_passes_give_the_same():
    view, tokens = ModelView(tiny.build("gpt2", tiny.KINDS[0], torch.float64)), tiny.tokens()
    edits = [make_edit(view, layer, "W_V", 1) for layer in (0, 1)]
    with torch.no_grad(), view.evaluating():
        runs = EditedRuns(view, tokens, [0, 1])
        short = runs.logits(torch.cat(list(runs.under(edits))))
        whole = torch.cat(list(EditedRuns(view, tokens, [0, 1], whole=True).under(edits)))
    torch.testing.assert_close(short, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_exception_on_the_way_leaves_the_model_as_it_was(error):
    view, tokens = ModelView(tiny.build("gpt2", tiny.KINDS[0])), tiny.tokens()
    before, clean = fingerprint(view.model), logits(view, tokens)

    def fail(*_):
        raise error

    def own_forward(*args, **kwargs):
        return type(view.blocks[0]).forward(view.blocks[0], *args, **kwargs)

    view.blocks[0].__dict__["forward"] = own_forward  # as other libraries' hooks do
    with torch.no_grad(), view.evaluating():
        runs = EditedRuns(view, tokens, [0])
        handle = view.blocks[1].register_forward_hook(fail)
        with pytest.raises(error):
            list(runs.under([make_edit(view, 0, "W_Q")]))
        handle.remove()
    assert view.blocks[0].__dict__.pop("forward") is own_forward
    assert fingerprint(view.model) == before
    assert torch.equal(logits(view, tokens), clean)
