"""Edits of live weights: what they do to a model, and that nothing of them is left."""

import contextlib
import copy
import json
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests import tiny
from tl_asymmetry import ModelView, RankOneEdit, apply_edits
from tl_asymmetry.models import interrupts
from tl_asymmetry.names import MATRICES
from tl_asymmetry.results.provenance import weights_hash

ROOT = Path(__file__).parents[2]
CASES = [(architecture, kind) for architecture in tiny.ARCHITECTURES for kind in tiny.KINDS]


def make_edit(view: ModelView, layer: int, matrix: str, head: int | None = 0, *, seed: int = 0, scale: float = 0.3):
    """A random edit that fits the model; `head` is ignored for a matrix of the MLP."""
    weight = view.weight(layer, matrix)
    head = None if weight.ndim == 2 else head
    axes = tuple(weight.shape[-2:])
    residual, other = axes if matrix in ("W_Q", "W_K", "W_V", "W_in", "W_gate") else axes[::-1]
    generator = torch.Generator().manual_seed(seed)
    return RankOneEdit(
        layer, matrix, head,
        torch.randn(residual, dtype=torch.float64, generator=generator),
        torch.randn(other, dtype=torch.float64, generator=generator), scale,
    )  # fmt: skip


def fingerprint(model) -> dict[str, bytes]:
    """Every parameter and buffer, bit for bit, with its flags."""
    return {
        name: tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        + f"{tensor.dtype} {tensor.device} {tensor.requires_grad} {tuple(tensor.shape)}".encode()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def logits(view: ModelView, tokens):
    with torch.no_grad(), view.evaluating():
        return view.run(tokens, logits=True)


# --- the object -----------------------------------------------------------------------------------


def test_change_has_the_residual_vector_on_the_d_model_axis():
    residual, other = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 7.0])
    read = RankOneEdit(0, "W_Q", 0, residual, other, 2.0)
    write = RankOneEdit(0, "W_O", 0, residual, other, 2.0)
    assert read.pathway == "read"
    assert write.pathway == "write"
    assert torch.equal(read.change(), 2 * torch.tensor([[5.0, 7], [10, 14], [15, 21]]).double())
    assert torch.equal(write.change(), read.change().mT)
    assert read.norm == pytest.approx(read.change().norm().item(), rel=1e-12)


def test_it_keeps_copies_and_widens_half_precision():
    residual = torch.ones(4)
    edit = RankOneEdit(0, "W_in", None, residual, torch.ones(3, dtype=torch.bfloat16))
    residual.zero_()
    assert edit.residual.tolist() == [1.0] * 4
    assert edit.other.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_survives_json_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(n, dtype=dtype, generator=generator) for n in (48, 12)]
    edit = RankOneEdit(1, "W_O", 2, *vectors, scale=-1 / 3)
    again = RankOneEdit.from_dict(json.loads(json.dumps(edit.to_dict())))
    assert again == edit
    assert again.residual.dtype == dtype
    assert again != edit.scaled(2.0)
    assert edit != "another thing"


def test_from_dict_names_what_is_missing():
    document = RankOneEdit(0, "W_in", None, torch.ones(2), torch.ones(2)).to_dict()
    del document["other"]
    with pytest.raises(ValueError, match="expected an edit written by to_dict, got one without other; pass all"):
        RankOneEdit.from_dict(document)


ones = torch.ones(4)
BAD = {
    "matrix": (dict(matrix="W_X"), "expected a matrix among W_Q, .* got 'W_X'; pass one of these"),
    "tied": (dict(matrix="W_U"), "where W_U is tied to W_E, an edit of one would be an edit of both"),
    "no head": (dict(head=None), "expected the index of a head for W_Q, got None; pass that"),
    "head": (dict(matrix="W_in"), r"expected head=None \(a matrix of the MLP\) for W_in, got 0; pass that"),
    "matrix vector": (dict(residual=torch.ones(2, 2)), r"expected residual as a vector, got shape \(2, 2\)"),
    "empty": (dict(other=torch.ones(0)), r"expected other as a vector, got shape \(0,\)"),
    "list": (dict(other=[1.0, 2.0]), "expected other as a vector, got list; pass a one-dimensional tensor"),
    "nan": (dict(residual=torch.tensor([1.0, float("nan")])), "expected a finite residual, got NaN or infinite"),
    "inf": (dict(other=torch.tensor([1.0, float("inf")])), "expected a finite other, got NaN or infinite"),
    "scale": (dict(scale=float("nan")), "expected a finite scale, got nan; pass a number"),
    "zero": (dict(residual=torch.zeros(4)), "expected a residual direction, got a vector of zeros"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("unchecked_types")
def test_what_is_no_edit_is_refused(name):
    arguments, message = BAD[name]
    fields = dict(layer=0, matrix="W_Q", head=0, residual=ones, other=ones, scale=1.0) | arguments
    with pytest.raises(ValueError, match=message):
        RankOneEdit(**fields)


# --- what an edited model computes ----------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_edited_logits_are_those_of_a_rebuilt_model(architecture, kind):
    """Every matrix, float64: the model edited in place against one whose weights were written anew."""
    model = tiny.build(architecture, kind, torch.float64)
    view, tokens = ModelView(model), tiny.tokens()
    before, clean = fingerprint(model), logits(ModelView(model), tokens)
    for i, matrix in enumerate(view.matrices):
        edit = make_edit(view, 1, matrix, 1 if view.heads(matrix) not in (None, 1) else 0, seed=i)
        rebuilt = ModelView(tiny.build(architecture, kind, torch.float64))
        target = rebuilt.weight(1, matrix)
        target = target if edit.head is None else target[edit.head]
        target.copy_(target + edit.change())
        with apply_edits(model, [edit]):
            edited = logits(view, tokens)
        torch.testing.assert_close(edited, logits(rebuilt, tokens), rtol=0, atol=1e-12)
        assert (edited - clean).abs().max() > 1e-6, matrix
        assert fingerprint(model) == before
    assert torch.equal(logits(view, tokens), clean)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_key_value_head_serves_all_its_query_heads(kind):
    model = tiny.build("llama", kind, torch.float64)
    view = ModelView(model)
    edit = make_edit(view, 0, "W_V", tiny.N_KV_HEADS - 1)
    seen = []
    tokens = tiny.tokens()
    for context in (apply_edits(view, []), apply_edits(view, edit)):
        with context, view.hooks({("z", 0): lambda z: seen.append(z.detach().clone())}):
            logits(view, tokens)
    moved = (seen[1] - seen[0]).abs().amax((0, 1, 3)) > 1e-9
    assert moved.tolist() == [h >= tiny.N_HEADS // 2 for h in range(tiny.N_HEADS)]
    with pytest.raises(ValueError, match=r"expected a head from 0 to 1 of W_K \(2 key-value heads under grouped"):
        apply_edits(model, _with_head(view, "W_K", 2))


def _with_head(view, matrix, head):
    edit = make_edit(view, 0, matrix)
    return RankOneEdit(0, matrix, head, edit.residual, edit.other)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weights_of_every_type_are_rounded_once_and_restored(kind, dtype):
    model = tiny.build("gpt2", kind, dtype)
    view = ModelView(model)
    before = fingerprint(model)
    for matrix in ("W_Q", "W_O", "W_in"):
        edit = make_edit(view, 1, matrix, 2, scale=0.01)
        place = view.weight(1, matrix) if edit.head is None else view.weight(1, matrix)[edit.head]
        original = place.clone()
        with apply_edits(view, edit):
            edited = place.clone()
        wide = original.double() + edit.change()
        if dtype == torch.float64:
            torch.testing.assert_close(edited, wide, rtol=0, atol=1e-15)
        else:
            spacing = torch.finfo(dtype).eps * wide.abs() + 1e-7
            # half a unit in the last place, and what float32 adds to it
            assert bool(((edited.double() - wide).abs() <= 0.5 * spacing + 2e-7 * (1 + wide.abs())).all())
    assert fingerprint(model) == before


def test_float16_overflow_is_refused_and_undone():
    model = tiny.build("gpt2", tiny.KINDS[0], torch.float16)
    view, before = ModelView(model), fingerprint(model)
    edits = [make_edit(view, 0, "W_Q", seed=1), make_edit(view, 0, "W_O", scale=1e6)]
    with pytest.raises(ValueError, match="expected an edit that float16 weights can hold, got an overflow"):
        apply_edits(view, edits).__enter__()
    assert fingerprint(model) == before
    assert interrupts.held.holders == 0


# --- bit for bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_thousand_random_edits_and_exceptions_leave_every_bit(kind):
    model = tiny.build("llama", kind)
    view = ModelView(model)
    before, hashed = fingerprint(model), weights_hash(view)
    rng = random.Random(0)
    tokens = tiny.tokens(1, 4)

    def nest(depth: int) -> None:
        edits = [
            make_edit(view, rng.randrange(2), rng.choice(view.matrices), rng.randrange(2), seed=rng.randrange(99),
                      scale=10 ** rng.uniform(-8, 8))
            for _ in range(rng.randrange(1, 4))
        ]  # fmt: skip
        with apply_edits(view, edits):
            if depth:
                nest(depth - 1)
            if rng.random() < 0.5:
                raise ArithmeticError

    for cycle in range(1000):
        with contextlib.suppress(ArithmeticError):
            nest(rng.randrange(3))
        if cycle % 250 == 0:
            assert weights_hash(view) == hashed
            logits(view, tokens)
    assert fingerprint(model) == before
    assert interrupts.held.holders == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_model_is_as_it_was_in_every_other_respect(kind):
    model = tiny.build("gpt2", kind)
    model.train()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    view, state = ModelView(model), torch.random.get_rng_state()
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    before, addresses = fingerprint(model), [p.data_ptr() for p in parameters]
    with torch.enable_grad(), apply_edits(view, make_edit(view, 0, "W_Q")):
        pass
    assert fingerprint(model) == before
    assert [p.data_ptr() for p in parameters] == addresses
    assert all(m.training for m in model.modules())
    assert torch.equal(parameters[1].grad, torch.ones_like(parameters[1]))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradients_flow_through_an_edited_model():
    model = tiny.build("gpt2", tiny.KINDS[0], torch.float64)
    view, tokens = ModelView(model), tiny.tokens()
    edit = make_edit(view, 0, "W_O", 1)
    with apply_edits(view, edit):
        view.run(tokens, logits=True).square().mean().backward()
    edited = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    rebuilt = tiny.build("gpt2", tiny.KINDS[0], torch.float64)
    target = ModelView(rebuilt).weight(0, "W_O")[1]
    target.copy_(target + edit.change())
    ModelView(rebuilt).run(tokens, logits=True).square().mean().backward()
    for ours, parameter in zip(edited, rebuilt.parameters(), strict=True):
        assert (ours is None) == (parameter.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, parameter.grad, rtol=1e-9, atol=1e-12)


def test_under_inference_mode():
    model = tiny.build("gpt2", tiny.KINDS[0])
    view, before = ModelView(model), fingerprint(model)
    context = apply_edits(view, make_edit(view, 0, "W_Q"))
    with torch.inference_mode():
        context.__enter__()
    assert fingerprint(model) != before
    context.__exit__(None, None, None)
    assert fingerprint(model) == before


# --- order ----------------------------------------------------------------------------------------


def test_nested_edits_of_one_head_add_up_and_leave_in_any_order():
    model = tiny.build("gpt2", tiny.KINDS[0], torch.float64)
    view = ModelView(model)
    before, W = fingerprint(model), view.weight(0, "W_Q")
    original = W.clone()
    first, second, apart = (make_edit(view, 0, "W_Q", h, seed=s) for h, s in ((1, 1), (1, 2), (3, 3)))
    outer, inner, other = (apply_edits(view, e) for e in ([first, apart], second, apart))

    def holds(*edits):
        expected = original.clone()
        for edit in edits:
            expected[edit.head] += edit.change()
        torch.testing.assert_close(W, expected, rtol=0, atol=1e-15)

    outer.__enter__()
    inner.__enter__()
    other.__enter__()
    holds(first, apart, second, apart)
    outer.__exit__(None, None, None)  # before those that were put in after it
    holds(second, apart)
    inner.__exit__(None, None, None)
    holds(apart)
    inner.__enter__()  # a context can be entered again
    holds(second, apart)
    other.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert fingerprint(model) == before


def test_misuse_of_a_context_is_refused():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    before = fingerprint(view.model)
    context = apply_edits(view, make_edit(view, 0, "W_Q"))
    with pytest.raises(ValueError, match="expected edits that are in force, got some that are not; enter them first"):
        context.__exit__(None, None, None)
    with context, pytest.raises(ValueError, match="expected edits that are not in force, got some that are"):
        context.__enter__()
    with pytest.raises(ValueError, match="expected committed edits, got none; pass commit=True"):
        context.undo()
    assert fingerprint(view.model) == before


def test_committed_edits_stay_and_can_be_undone():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    before, edit = fingerprint(view.model), make_edit(view, 0, "W_O", 1)
    record = apply_edits(view, [edit, edit], commit=True)
    with apply_edits(view, edit):
        during = fingerprint(view.model)
    assert during != before
    assert "committed" in repr(record)
    with apply_edits(view, edit), pytest.raises(ValueError, match="expected the weights as these edits left them"):
        record.undo()
    with apply_edits(view, edit), pytest.raises(ValueError, match="expected no open edits of the same head"):
        apply_edits(view, edit, commit=True)
    record.undo()
    assert fingerprint(view.model) == before


def test_commit_adds_what_the_edits_say():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0], torch.float64))
    edit, original = make_edit(view, 1, "W_in"), view.weight(1, "W_in").clone()
    apply_edits(view, edit, commit=True)
    torch.testing.assert_close(view.weight(1, "W_in"), original + edit.change(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_model_converted_meanwhile_is_restored_where_it_lies(kind):
    model = tiny.build("gpt2", kind)
    view = ModelView(model)
    edit, original = make_edit(view, 0, "W_Q", 2), view.weight(0, "W_Q").clone()
    with apply_edits(view, edit):
        model.to(torch.float64)
    assert torch.equal(view.weight(0, "W_Q"), original.double())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_loaded_meanwhile_are_the_ones_edited(kind):
    """load_state_dict(assign=True) leaves the old parameter alive, where an edit would change nothing."""
    model = tiny.build("gpt2", kind)
    view = ModelView(model)
    edit, original = make_edit(view, 0, "W_Q", 2), view.weight(0, "W_Q").clone()
    applied = apply_edits(view, edit)
    native = getattr(model, "original_model", model)
    native.load_state_dict({name: tensor.clone() for name, tensor in native.state_dict().items()}, assign=True)
    with applied:
        assert not torch.equal(view.weight(0, "W_Q"), original)
    assert torch.equal(view.weight(0, "W_Q"), original)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_does_not_fit_is_refused_before_anything_is_touched(kind):
    model = tiny.build("gpt2", kind)
    view, before = ModelView(model), fingerprint(model)
    d, e = tiny.D_MODEL, tiny.D_HEAD
    good = make_edit(view, 0, "W_Q")
    cases = {
        "expected a layer from 0 to 1, got 2": RankOneEdit(2, "W_Q", 0, torch.ones(d), torch.ones(e)),
        r"expected a head from 0 to 3 of W_Q \(4 heads\), got 4; pass": RankOneEdit(
            0, "W_Q", 4, torch.ones(d), torch.ones(e)
        ),
        "expected a head from 0 to 3 .* got -1": RankOneEdit(0, "W_Q", -1, torch.ones(d), torch.ones(e)),
        "expected residual and other of 48 and 12 entries for W_O, got 12 and 48; pass vectors": RankOneEdit(
            0, "W_O", 0, torch.ones(e), torch.ones(d)
        ),
        "expected a matrix among W_Q, W_K, W_V, W_O, W_in, W_out, got 'W_gate'": RankOneEdit(
            0, "W_gate", None, torch.ones(d), torch.ones(4 * d)
        ),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message):
            apply_edits(model, [good, bad])
    with pytest.raises(ValueError, match="expected residual and other of 48 and 192 entries for W_out"):
        apply_edits(model, RankOneEdit(0, "W_out", None, torch.ones(4 * d), torch.ones(d)))
    assert fingerprint(model) == before


@pytest.mark.usefixtures("unchecked_types")
def test_other_things_are_no_edits():
    model = tiny.build("gpt2", tiny.KINDS[0])
    with pytest.raises(ValueError, match=r"expected edits of type RankOneEdit, got dict; pass RankOneEdit\(...\)"):
        apply_edits(model, [{}])


def test_a_copy_is_refused(monkeypatch):
    """What a wrapper computes on the fly, such as processed weights, can be edited without any effect."""
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    edit, fetch = make_edit(view, 0, "W_Q"), view._adapter.matrix
    monkeypatch.setattr(view._adapter, "matrix", lambda layer, matrix: fetch(layer, matrix).clone())
    with pytest.raises(ValueError, match="expected a live view of blocks.0 W_Q, got a copy; pass a model with raw"):
        apply_edits(view, edit)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_inference_tensors_are_refused(kind):
    view = ModelView(tiny.build("gpt2", kind))
    edit, slot = make_edit(view, 0, "W_in"), view.weight_and_slot(0, "W_in")[1]
    owner = slot.module._parameters[slot.name]
    with torch.inference_mode():
        for module in view.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is owner:
                    module._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        with apply_edits(view, edit):
            pass
    with pytest.raises(ValueError, match="expected weights that can be edited, got inference tensors in blocks.0 W_in"):
        apply_edits(view, edit)


def test_all_known_matrices_are_covered():
    covered = {m for a in ("gpt2", "llama") for m in ModelView(tiny.build(a, tiny.KINDS[0])).matrices}
    assert covered == set(MATRICES)


# --- Ctrl-C ---------------------------------------------------------------------------------------

SCRIPT = """
import os, random, signal, sys, threading, time
import torch
from tl_asymmetry import ModelView, RankOneEdit, apply_edits
from tl_asymmetry.demo import demo_model
from tl_asymmetry.models import edits as module, interrupts
from tl_asymmetry.results.provenance import weights_hash

torch.set_num_threads(1)
sys.setswitchinterval(1e-5)
view = ModelView(demo_model("base"))
before = weights_hash(view)
edits = [RankOneEdit(l, m, None, torch.randn(64), torch.randn(256)) for l in range(4) for m in ("W_in", "W_out")]
edits += [RankOneEdit(0, "W_Q", h, torch.randn(64), torch.randn(16)) for h in range(4)]
main, armed, struck = threading.main_thread().ident, threading.Event(), threading.Event()

def strike():
    rng = random.Random(0)
    while True:
        armed.wait()
        armed.clear()
        time.sleep(rng.uniform(0, 0.003))
        for _ in range(rng.choice([1, 1, 3])):  # also impatient ones
            signal.pthread_kill(main, signal.SIGINT)
            os.read(arrived, 1)  # the signal has reached the interpreter
            time.sleep(rng.uniform(0, 0.0002))
        struck.set()

def work():
    armed.set()
    while not struck.is_set():
        with apply_edits(view, edits), apply_edits(view, edits[:3]):
            pass

def rest():
    while not struck.is_set():
        pass
    listen()

def listen():
    pass  # a call: here the interpreter hears a signal that came after the last look at `struck`

arrived, wakeup = os.pipe()
os.set_blocking(wakeup, False)
signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
threading.Thread(target=strike, daemon=True).start()
caught = broken = 0
end = time.monotonic() + 2
while time.monotonic() < end:
    struck.clear()
    try:  # three strikes at most
        try:
            try:
                work()
                listen()
            except KeyboardInterrupt:
                caught += 1
                rest()
        except KeyboardInterrupt:
            caught += 1
            rest()
    except KeyboardInterrupt:
        caught += 1
        rest()
    broken += weights_hash(view) != before or bool(module._OPEN) or interrupts.held.holders != 0
print(caught, broken, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_ctrl_c_at_any_moment_leaves_every_bit():
    """Hundreds of real SIGINTs, some of them in bursts, at a process that does nothing but put edits in and out."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    caught, broken, handler = done.stdout.split()
    assert int(caught) > 30
    assert (int(broken), handler) == (0, "True")


def test_an_interrupt_that_waits_is_raised_at_the_end_of_entering():
    """Ctrl-C while edits are being put in: they are taken out again and the block never begins."""
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    before, context = fingerprint(view.model), apply_edits(view, make_edit(view, 0, "W_Q"))
    put_in = context._put_in

    def struck():
        put_in()
        signal.raise_signal(signal.SIGINT)

    context._put_in = struck
    with pytest.raises(KeyboardInterrupt), context:
        pytest.fail("the block began")
    assert fingerprint(view.model) == before
    assert interrupts.held.holders == 0
    assert not interrupts.held.waits
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_restoring_is_raised_when_that_is_done():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    before, context = fingerprint(view.model), apply_edits(view, make_edit(view, 0, "W_Q"))
    put_back = context._put_back

    def struck():
        signal.raise_signal(signal.SIGINT)
        put_back()

    context._put_back = struck
    with pytest.raises(KeyboardInterrupt), context:
        pass
    assert fingerprint(view.model) == before
    assert (interrupts.held.holders, interrupts.held.waits) == (0, False)


def test_inside_the_block_ctrl_c_is_as_ever():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    before = fingerprint(view.model)
    with pytest.raises(KeyboardInterrupt), apply_edits(view, make_edit(view, 0, "W_Q")):
        signal.raise_signal(signal.SIGINT)
    assert fingerprint(view.model) == before


def test_a_handler_of_the_users_is_left_alone():
    view, seen = ModelView(tiny.build("gpt2", tiny.KINDS[0])), []
    mine = lambda *_: seen.append(1)  # noqa: E731
    old = signal.signal(signal.SIGINT, mine)
    try:
        with apply_edits(view, make_edit(view, 0, "W_Q")):
            assert signal.getsignal(signal.SIGINT) is mine
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, old)
    assert seen == [1]


def test_another_thread_edits_without_touching_handlers():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    before, seen = fingerprint(view.model), []

    def work():
        with apply_edits(view, make_edit(view, 0, "W_Q")):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    assert fingerprint(view.model) == before


def test_a_copy_of_an_edited_model_keeps_the_edit():
    view = ModelView(tiny.toy())
    edit = make_edit(view, 0, "W_Q", 1) if tiny.HOOKED_AVAILABLE else None
    if edit is None:
        pytest.skip("a Bridge is not copied deeply")
    with apply_edits(view, edit):
        twin = copy.deepcopy(view.model)
        expected = view.weight(0, "W_Q").clone()
    assert torch.equal(ModelView(twin).weight(0, "W_Q"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(dtype):
    model = tiny.build("gpt2", tiny.KINDS[0], dtype).to("cuda")
    view, before = ModelView(model), fingerprint(model)
    tokens = tiny.tokens()
    edits = [make_edit(view, 0, matrix, 1).to("cuda") for matrix in view.matrices]
    original = view.weight(0, "W_Q")[1].clone()
    with apply_edits(view, edits):
        assert torch.isfinite(logits(view, tokens)).all()
        change = view.weight(0, "W_Q")[1].double() - original.double()
        torch.testing.assert_close(
            change, edits[0].change().cuda(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
        )
    assert fingerprint(model) == before
