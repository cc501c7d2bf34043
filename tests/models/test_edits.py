"""Edits of live weights: what they do to a model, and that nothing of them is left."""

import contextlib
import copy
import json
import random
import signal

import pytest
import torch

from tests import tiny
from tests.models.test_sites import adapter_of
from tl_asymmetry import ModelView
from tl_asymmetry.edits import MatrixEdit, RankOneEdit, Rewind, apply_edits, commit_edits
from tl_asymmetry.names import MATRICES, kind_of
from tl_asymmetry.results.provenance import weights_hash

CASES = [(architecture, kind) for architecture in tiny.ARCHITECTURES for kind in tiny.KINDS]


def make_edit(view: ModelView, layer: int, matrix: str, head: int | None = 0, *, seed: int = 0, scale: float = 0.3):
    """A random edit that fits the model; `head` is ignored for a matrix of the MLP."""
    weight = view.weight(layer, matrix)
    head = None if weight.ndim == 2 else head
    axes = tuple(weight.shape[-2:])
    residual, other = axes if kind_of(matrix).reads else axes[::-1]
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
    "head": (dict(matrix="W_in"), r"expected head=None \(a matrix without heads\) for W_in, got 0; pass that"),
    "matrix vector": (dict(residual=torch.ones(2, 2)), r"expected residual as a vector, got shape \(2, 2\)"),
    "empty": (dict(other=torch.ones(0)), r"expected other as a vector, got shape \(0,\)"),
    "list": (dict(other=[1.0, 2.0]), r"expected other as a tensor of numbers, got \[1.0, 2.0\]; pass a tensor of"),
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
    rebuilt = ModelView(tiny.build(architecture, kind, torch.float64))
    for i, matrix in enumerate(view.matrices):
        edit = make_edit(view, 1, matrix, 1 if view.heads(matrix) not in (None, 1) else 0, seed=i)
        target = rebuilt.weight(1, matrix)
        target = target if edit.head is None else target[edit.head]
        kept = target.clone()
        target.copy_(kept + edit.change())
        with apply_edits(model, [edit]):
            edited = logits(view, tokens)
        torch.testing.assert_close(edited, logits(rebuilt, tokens), rtol=0, atol=1e-12)
        target.copy_(kept)
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
    with pytest.raises(ValueError, match="expected an edit that float16 weights can hold"):
        commit_edits(view, edits)
    assert fingerprint(model) == before


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

    for cycle in range(500):  # of four edits on average
        with contextlib.suppress(ArithmeticError):
            nest(rng.randrange(3))
        if cycle % 125 == 0:
            assert weights_hash(view) == hashed
            logits(view, tokens)
    assert fingerprint(model) == before


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
    with contextlib.ExitStack() as stack:
        with torch.inference_mode():
            stack.enter_context(apply_edits(view, make_edit(view, 0, "W_Q")))
        assert fingerprint(model) != before
    assert fingerprint(model) == before


# --- order ----------------------------------------------------------------------------------------


def test_nested_edits_of_one_head_add_up():
    model = tiny.build("gpt2", tiny.KINDS[0], torch.float64)
    view = ModelView(model)
    before, W = fingerprint(model), view.weight(0, "W_Q")
    original = W.clone()
    first, second, apart = (make_edit(view, 0, "W_Q", h, seed=s) for h, s in ((1, 1), (1, 2), (3, 3)))

    def holds(*edits):
        expected = original.clone()
        for edit in edits:
            expected[edit.head] += edit.change()
        torch.testing.assert_close(W, expected, rtol=0, atol=1e-15)

    with apply_edits(view, [first, apart, first]):
        with apply_edits(view, second):
            holds(first, apart, first, second)
        holds(first, apart, first)
    assert fingerprint(model) == before


def test_commit_adds_what_the_edits_say():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0], torch.float64))
    edit, original = make_edit(view, 1, "W_in"), view.weight(1, "W_in").clone()
    commit_edits(view, [edit, edit])
    torch.testing.assert_close(view.weight(1, "W_in"), original + 2 * edit.change(), rtol=0, atol=1e-14)


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


def test_all_matrices_of_dense_models_are_covered():
    covered = {m for a in ("gpt2", "llama") for m in ModelView(tiny.build(a, tiny.KINDS[0])).matrices}
    assert covered == {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"} <= set(MATRICES)


# --- Ctrl-C ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_interrupt_while_edits_are_put_in_takes_them_out_again(kind, monkeypatch):
    view = ModelView(tiny.build("gpt2", kind))
    before, edits = fingerprint(view.model), [make_edit(view, 0, matrix) for matrix in ("W_Q", "W_in", "W_O")]
    put_into, done = RankOneEdit.put_into, []

    def struck(edit, weights):
        put_into(edit, weights)
        done.append(edit)
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RankOneEdit, "put_into", struck)
    with pytest.raises(KeyboardInterrupt), apply_edits(view, edits):
        pytest.fail("the block began")
    assert len(done) == 2
    assert fingerprint(view.model) == before


def test_inside_the_block_ctrl_c_is_as_ever():
    view = ModelView(tiny.build("gpt2", tiny.KINDS[0]))
    before = fingerprint(view.model)
    with pytest.raises(KeyboardInterrupt), apply_edits(view, make_edit(view, 0, "W_Q")):
        signal.raise_signal(signal.SIGINT)
    assert fingerprint(view.model) == before


def test_rewinding_moves_a_head_towards_given_weights():
    base, aligned = (ModelView(tiny.build("gpt2", tiny.KINDS[0], delta=delta)) for delta in (0.0, 0.1))
    before, target = fingerprint(aligned.model), base.weight(1, "W_O")[2]
    W = aligned.weight(1, "W_O")
    original = W.clone()
    with apply_edits(aligned, Rewind(1, "W_O", 2, target)):
        assert torch.equal(W[2], target)
        assert torch.equal(W[:2], original[:2])
    with apply_edits(aligned, Rewind(1, "W_O", 2, target, 0.25)):
        torch.testing.assert_close(W[2], 0.75 * original[2] + 0.25 * target)
    with apply_edits(aligned, Rewind(1, "W_O", 2, target, 0.0)):
        assert fingerprint(aligned.model) == before
    with pytest.raises(ValueError, match=r"expected a matrix of shape \(12, 48\) for W_O, got \(48, 12\); pass"):
        apply_edits(aligned, Rewind(1, "W_O", 2, target.mT))
    assert fingerprint(aligned.model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("matrix", ["W_Q", "W_O"])
def test_a_matrix_is_added_and_rounded_once(matrix, dtype):
    view = ModelView(tiny.build("gpt2", tiny.KINDS[-1], dtype))
    before, place = fingerprint(view.model), view.weight(0, matrix)[1]
    added = torch.randn(place.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edit, wide = MatrixEdit(0, matrix, 1, added), dtype if dtype == torch.float64 else torch.float32
    assert edit.norm == pytest.approx(added.norm().item(), rel=1e-12)
    expected = (place.to(wide) + added.to(wide)).to(dtype)
    with apply_edits(view, edit):
        assert torch.equal(place, expected)
    assert fingerprint(view.model) == before
    with pytest.raises(ValueError, match="expected a matrix of shape .* for W_., got .*; pass one in TransformerLens"):
        apply_edits(view, MatrixEdit(0, matrix, 1, added.mT))


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


EXPERTS = {  # by hand: where an expert's matrix lies in the stacked parameters, as [in, out]
    ("mixtral", "W_gate"): lambda experts, e: experts.gate_up_proj[e, :48].mT,
    ("mixtral", "W_in"): lambda experts, e: experts.gate_up_proj[e, 48:].mT,
    ("mixtral", "W_out"): lambda experts, e: experts.down_proj[e].mT,
    ("gpt-oss", "W_gate"): lambda experts, e: experts.gate_up_proj[e, :, ::2],
    ("gpt-oss", "W_in"): lambda experts, e: experts.gate_up_proj[e, :, 1::2],
    ("gpt-oss", "W_out"): lambda experts, e: experts.down_proj[e],
}


@pytest.mark.parametrize(("name", "matrix"), list(EXPERTS))
def test_an_edit_of_one_expert_is_an_edit_by_hand(name, matrix):
    model = adapter_of(name).inner
    tokens, generator = torch.tensor([[5, 9, 11, 33, 2, 7]]), torch.Generator().manual_seed(0)
    by_hand = copy.deepcopy(model)
    rows, columns = EXPERTS[name, matrix](by_hand.model.layers[1].mlp.experts, 2).shape
    residual, other = (torch.randn(n, generator=generator, dtype=torch.float64) for n in
                       ((columns, rows) if matrix == "W_out" else (rows, columns)))  # fmt: skip
    outer = torch.outer(other, residual) if matrix == "W_out" else torch.outer(residual, other)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        EXPERTS[name, matrix](by_hand.model.layers[1].mlp.experts, 2).add_(0.5 * outer)
        with apply_edits(model, RankOneEdit(1, matrix, None, residual, other, 0.5, expert=2)):
            assert torch.allclose(model(tokens).logits, by_hand(tokens).logits, rtol=1e-12, atol=1e-13)
            assert len(_changed(model, before)) == 1
    assert not _changed(model, before)


def _changed(model, before):
    return [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]


def test_an_edit_of_a_further_linear_map():
    model = adapter_of("qwen3.5").inner
    weight = model.model.layers[0].linear_attn.out_proj.weight
    before, residual, other = weight.detach().clone(), torch.ones(weight.shape[0]), torch.ones(weight.shape[1])
    with apply_edits(model, RankOneEdit(0, "linear_attn.out_proj", None, residual, other)):
        assert torch.equal(weight, before + 1)
    assert torch.equal(weight, before)


def test_experts_are_named_where_there_are_some_and_nowhere_else():
    mixture, dense = adapter_of("mixtral").inner, adapter_of("llama").inner
    vectors = torch.ones(32), torch.ones(48)
    with pytest.raises(ValueError, match="expected an expert from 0 to 3 of W_in in layer 0, got None; pass expert="):
        apply_edits(mixture, RankOneEdit(0, "W_in", None, *vectors))
    with pytest.raises(ValueError, match="expected an expert from 0 to 3 of W_in in layer 0, got 4; pass expert="):
        apply_edits(mixture, RankOneEdit(0, "W_in", None, *vectors, expert=4))
    with pytest.raises(ValueError, match="expected expert=None for W_in of layer 0, which has no experts, got 1"):
        apply_edits(dense, RankOneEdit(0, "W_in", None, *vectors, expert=1))
    with pytest.raises(ValueError, match="expected expert=None for W_Q, which has heads, got 1; leave it out"):
        RankOneEdit(0, "W_Q", 0, *vectors, expert=1)
    edit = RankOneEdit(0, "W_in", None, *vectors, expert=3)
    assert RankOneEdit.from_dict(edit.to_dict()) == edit != RankOneEdit(0, "W_in", None, *vectors, expert=2)
    assert "W_in expert 3" in repr(edit)
