"""ModelView on every architecture and both kinds of model: exact inputs, live weights, nothing left behind."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import ATTENTION, POINTS

CASES = [(a, k) for a in tiny.ARCHITECTURES for k in tiny.KINDS]
TOY_CASES = [(t, k) for t in tiny.TOYS for k in tiny.KINDS if k == "hooked" or t in tiny.NATIVE_TOYS]

_built: dict[tuple[str, str], Any] = {}


def shared(name: str, kind: str) -> Any:
    """A float64 model built once for the tests that leave it as it was."""
    if (name, kind) not in _built:
        make = tiny.toy if name in tiny.TOYS else tiny.build
        _built[name, kind] = make(name, kind, torch.float64)
    return _built[name, kind]


def seen(view: ModelView, tokens: Tensor, points: list[str]) -> dict[tuple[str, int], Tensor]:
    """What passes the points in every layer during one forward pass."""
    found: dict[tuple[str, int], Tensor] = {}
    keys = [(p, layer) for p in points for layer in range(view.n_layers)]
    with torch.no_grad(), view.hooks({k: lambda x, k=k: found.__setitem__(k, x.detach().clone()) for k in keys}):
        view.run(tokens)
    assert set(found) == set(keys)
    return found


def present(view: ModelView) -> list[str]:
    return [p for p in POINTS if view.has_point(p)]


def outputs(model: Any, kind: str, tokens: Tensor, names: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs of modules, taken with plain PyTorch hooks: independent of ModelView."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, out: found.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    handles = [module.register_forward_hook(keep(name)) for name, module in names.items()]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    return {name: x.detach() for name, x in found.items()}


def state(model: Any) -> list[Any]:
    """Everything about a model that must be as it was: hooks, modes, gradients, flags, weights."""
    roots = [model, model.original_model] if hasattr(model, "original_model") else [model]
    modules = {id(m): m for root in roots for m in root.modules()}.values()
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
        + ((len(m.fwd_hooks), len(m.bwd_hooks)) if hasattr(m, "fwd_hooks") else ())
        for m in modules
    ]
    parameters = [(p.requires_grad, p.grad is None, p.dtype, p.device, p.sum().item()) for p in model.parameters()]
    return [hooks, [m.training for m in modules], parameters, torch.get_rng_state().tolist()]


# --- exact inputs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES + TOY_CASES)
def test_every_matrix_meets_its_exact_input(name: str, kind: str) -> None:
    model, tokens = shared(name, kind), tiny.tokens()
    view = ModelView(model)
    x = seen(view, tokens, present(view))
    for layer, block in enumerate(model.blocks):
        modules = {"q": block.attn.hook_q, "k": block.attn.hook_k, "v": block.attn.hook_v, "attn": block.attn}
        if "W_in" in view.matrices:
            modules["mlp"] = block.mlp
            modules["pre"] = block.mlp.hook_pre
        y = outputs(model, kind, tokens, modules)
        for letter in "QKV":
            W, b = view.weight(layer, f"W_{letter}"), view.bias(layer, f"W_{letter}")
            got = torch.einsum("bpd,hde->bphe", x["attn_in", layer], W) + (0 if b is None else b)
            torch.testing.assert_close(y[letter.lower()].reshape(got.shape), got, rtol=0, atol=1e-12)
        b = view.bias(layer, "W_O")
        got = torch.einsum("bphe,hed->bpd", x["z", layer], view.weight(layer, "W_O")) + (0 if b is None else b)
        torch.testing.assert_close(y["attn"], got, rtol=0, atol=1e-12)
        if "W_in" in view.matrices:
            pre = "W_gate" if "W_gate" in view.matrices else "W_in"  # hook_pre is the gate's where there is one
            b = view.bias(layer, pre)
            got = x["mlp_in", layer] @ view.weight(layer, pre) + (0 if b is None else b)
            torch.testing.assert_close(y["pre"], got, rtol=0, atol=1e-12)
            b = view.bias(layer, "W_out")
            got = x["mlp_post", layer] @ view.weight(layer, "W_out") + (0 if b is None else b)
            torch.testing.assert_close(y["mlp"], got, rtol=0, atol=1e-12)
    assert view.self_check(tokens) < 1e-12


@pytest.mark.parametrize(("name", "kind"), CASES + TOY_CASES)
def test_residual_stream_adds_up(name: str, kind: str) -> None:
    model, tokens = shared(name, kind), tiny.tokens()
    view = ModelView(model)
    x = seen(view, tokens, [p for p in present(view) if p.startswith("resid")])
    for layer in range(view.n_layers):
        block = model.blocks[layer]
        modules = {"attn": getattr(block, "ln1_post", block.attn)}
        if hasattr(block, "mlp"):
            modules["mlp"] = getattr(block, "ln2_post", block.mlp)
        y = outputs(model, kind, tokens, modules)
        pre, post = x["resid_pre", layer], x["resid_post", layer]
        torch.testing.assert_close(post, pre + sum(y.values()), rtol=0, atol=1e-12)
        assert view.has_point("resid_mid") == (not view.parallel and "mlp" in y)
        if view.has_point("resid_mid"):
            torch.testing.assert_close(x["resid_mid", layer], pre + y["attn"], rtol=0, atol=1e-12)
        if layer:
            torch.testing.assert_close(x["resid_post", layer - 1], pre, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "kind"), CASES + TOY_CASES)
def test_padding_on_the_right_changes_nothing(name: str, kind: str) -> None:
    view = ModelView(shared(name, kind))
    tokens, n = tiny.tokens(2, 16), 11
    padded, other = tokens.clone(), tokens.clone()
    padded[0, n:] = 1  # the pad token, which is the end-of-text token as well
    other[0, n:] = 0
    alone, together, differently = (seen(view, t, present(view)) for t in (tokens[:1, :n], padded, other))
    # Hugging Face's own attention takes its softmax in float32, whose sums depend on the length
    own = kind == "bridge" and name not in ("gpt2", "neox", "neox_sequential", *tiny.TOYS)
    for key, x in alone.items():
        torch.testing.assert_close(together[key][:1, :n], differently[key][:1, :n], rtol=0, atol=1e-12)
        torch.testing.assert_close(together[key][:1, :n], x, rtol=0, atol=1e-5 if own else 1e-12)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_left_padding_tokenizer_makes_no_attention_mask(kind: str) -> None:
    model, tokens = tiny.build("gpt2", kind, torch.float64), tiny.tokens(1, 9)
    tokens[0, :3] = model.tokenizer.pad_token_id  # real tokens, though they look like padding
    view = ModelView(model)
    right = seen(view, tokens, ["resid_post"])
    model.tokenizer.padding_side = "left"
    left = seen(view, tokens, ["resid_post"])
    for key, x in right.items():
        torch.testing.assert_close(left[key], x, rtol=0, atol=1e-12)
    assert model.tokenizer.padding_side == "left"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_run_without_logits_sees_the_last_layer_and_leaves_out_the_unembedding(name: str, kind: str) -> None:
    model, tokens = shared(name, kind), tiny.tokens()
    view, calls = ModelView(model), []
    handle = model.unembed.register_forward_hook(lambda *_: calls.append(1))
    last: list[Tensor] = []
    with torch.no_grad(), view.hooks({("resid_post", view.n_layers - 1): lambda x: last.append(x.clone())}):
        assert view.run(tokens) is None
        assert not calls
        logits = view.run(tokens, logits=True)
        assert calls
        expected = model(tokens)
    handle.remove()
    assert logits.shape == (*tokens.shape, view.d_vocab)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(last[0], last[1], rtol=0, atol=0)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), CASES + TOY_CASES)
def test_weights_are_live_and_restorable(name: str, kind: str) -> None:
    model, tokens = shared(name, kind), tiny.tokens()
    view = ModelView(model)
    with torch.no_grad():
        before = model(tokens)
        for layer, matrix in itertools.product(range(view.n_layers), view.matrices):
            W = view.weight(layer, matrix)
            assert view.is_live(W)
            heads = view.heads(matrix)
            if matrix == "W_router":
                assert W.shape == (view.d_model, 3)
            elif heads is None:
                assert W.shape == ((view.d_mlp, view.d_model) if matrix == "W_out" else (view.d_model, view.d_mlp))
            else:
                inner = (view.d_head, view.d_model) if matrix == "W_O" else (view.d_model, view.d_head)
                assert W.shape == (heads, *inner)
            kept = W.clone()
            W[..., 0, :] += 1.0
            assert not torch.equal(model(tokens), before), f"editing {matrix} had no effect"
            W.copy_(kept)
            assert torch.equal(W, kept)
        torch.testing.assert_close(model(tokens), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_key_and_value_heads_are_not_expanded(kind: str) -> None:
    view = ModelView(shared("llama", kind))
    assert (view.n_heads, view.n_kv_heads) == (4, 2)
    seven = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out")
    assert [view.heads(matrix) for matrix in seven] == [4, 2, 2, 4, None, None, None]
    assert view.weight(0, "W_K").shape[0] == view.weight(0, "W_V").shape[0] == 2
    assert [view.kv_head(h) for h in range(4)] == [0, 0, 1, 1]
    assert not view.is_live(view.weight(0, "W_Q").clone())


@pytest.mark.skipif(not tiny.HOOKED_AVAILABLE, reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_both_kinds_of_one_model_show_the_same(name: str) -> None:
    hooked, bridge = (ModelView(shared(name, kind)) for kind in ("hooked", "bridge"))
    facts = "n_layers d_model n_heads n_kv_heads d_head d_mlp d_vocab n_ctx norm positional parallel causal"
    facts += " key_shift_invariant matrices notes tied dtype"
    for field in facts.split():
        assert getattr(hooked, field) == getattr(bridge, field), field
    for layer, matrix in itertools.product(range(hooked.n_layers), hooked.matrices):
        torch.testing.assert_close(hooked.weight(layer, matrix), bridge.weight(layer, matrix), rtol=0, atol=0)
    ours, theirs = dict(hooked.headless()), dict(bridge.headless())
    if name == "mixtral":  # experts and routers keep the names and shapes of either library
        ours = {k: v for k, v in ours.items() if ".mlp." not in k}
        theirs = {k: v for k, v in theirs.items() if ".mlp." not in k}
    assert set(ours) == set(theirs)
    for key, x in ours.items():
        torch.testing.assert_close(x, theirs[key], rtol=1e-6, atol=1e-6, msg=key)
    (U, gain, center), (V, gain_, center_) = hooked.unembedding(), bridge.unembedding()
    torch.testing.assert_close(U, V)
    torch.testing.assert_close(gain, gain_, rtol=1e-6, atol=1e-6)
    assert center == center_ == (hooked.norm == "LN")
    tokens = tiny.tokens()
    a, b = (seen(view, tokens, present(view)) for view in (hooked, bridge))
    assert set(a) == set(b)
    for key, x in a.items():  # HookedTransformer's rotary tables are float32
        torch.testing.assert_close(x, b[key], rtol=0, atol=1e-5, msg=str(key))


@pytest.mark.parametrize(("name", "kind"), CASES + TOY_CASES)
def test_headless_and_matrices_cover_every_parameter_once(name: str, kind: str) -> None:
    model = shared(name, kind)
    view = ModelView(model)
    names = [n for n, _ in view.named_weights()]
    assert len(names) == len(set(names))
    headless = view.headless()
    assert not any(key.endswith(ATTENTION) for key in headless)
    assert ("unembed.W_U" in headless) == (not view.tied)
    assert "unembed.W_U" in view.headless(include_tied=True)
    # change every parameter the model uses; each must show
    before = {n: w.double().clone() for n, w in view.named_weights()}
    other = ModelView(tiny.perturbed(model, 0.1))
    after = dict(other.named_weights())
    assert set(before) <= set(after)
    constant = [n for n, w in before.items() if torch.equal(after[n].double(), w)]
    assert all(not before[n].any() for n in constant), constant  # zeros that stand for a missing bias stay


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_prediction_matrix(kind: str) -> None:
    for name, center in (("gpt2", True), ("llama", False), ("gemma2", False)):
        model, tokens = shared(name, kind), tiny.tokens()
        view = ModelView(model)
        W_U, gain, got_center = view.unembedding()
        assert got_center is center
        assert view.is_live(W_U)
        assert view.is_live(view.embedding())
        x = seen(view, tokens, ["resid_post"])["resid_post", view.n_layers - 1]
        x = x - x.mean(-1, keepdim=True) if center else x
        x = gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        logits = view.run(tokens, logits=True).detach()
        if name == "gpt2":
            x = x + view.headless()["ln_final.b"]
        got = x @ W_U
        if name == "gemma2":
            got = 30 * torch.tanh(got / 30)
        torch.testing.assert_close(logits, got, rtol=1e-4, atol=1e-4)


def test_architecture_facts() -> None:
    def of(name: str) -> ModelView:
        return ModelView(shared(name, "bridge"))

    assert [of(n).parallel for n in ("gpt2", "neox", "neox_sequential", "gptj", "phi", "llama")] == [
        False, True, False, True, True, False,
    ]  # fmt: skip
    assert [n for n in tiny.ARCHITECTURES if of(n).key_shift_invariant] == ["gpt2"]
    assert [n for n in tiny.ARCHITECTURES if of(n).tied] == ["gpt2", "gemma1", "gemma2", "gemma3"]
    assert of("mixtral").matrices == ("W_Q", "W_K", "W_V", "W_O", "W_router")
    assert of("mixtral").notes[0] == "every layer has W_in, W_gate, W_out, one for each of 3 experts"
    assert not of("mixtral").has_point("mlp_post")
    assert [n for n in tiny.ARCHITECTURES if any("followed by a norm" in x for x in of(n).notes)] == [
        "gemma2",
        "gemma3",
    ]
    assert repr(of("gpt2")).startswith("ModelView(TransformerBridge ")
    if tiny.HOOKED_AVAILABLE:
        assert ModelView(shared("alibi", "hooked")).key_shift_invariant
        assert not ModelView(shared("attn_only", "hooked")).has_point("resid_mid")


# --- nothing left behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
@pytest.mark.parametrize("error", [None, RuntimeError("reader"), KeyboardInterrupt()])
def test_the_model_comes_back_as_it_was(name: str, kind: str, error: BaseException | None) -> None:
    model, tokens = tiny.build(name, kind), tiny.tokens()
    view = ModelView(model)
    next(iter(model.parameters())).requires_grad_(False)
    model.train()
    model.blocks[0].attn.eval()
    mine: list[str] = []
    model.blocks[0].hook_resid_pre.add_hook(lambda x, hook: mine.append("mine"))
    plain = model.blocks[1].attn.register_forward_pre_hook(lambda *_: None)
    with torch.no_grad():
        model(tokens)
    mine.clear()
    before = state(model)

    def reader(x: Tensor) -> None:
        if error is not None:
            raise error

    def work() -> None:
        with torch.no_grad(), view.evaluating(), view.hooks({(p, 1): reader for p in present(view)}):
            view.run(tokens)

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    assert state(model) == before
    assert mine == ["mine"]  # the caller's hook ran, and once
    view.self_check(tokens)
    assert state(model) == before
    plain.remove()
    with torch.no_grad():
        mine.clear()
        model(tokens)
        assert mine == ["mine"]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_readers_see_what_the_callers_hooks_made(kind: str) -> None:
    model, tokens = tiny.build("gpt2", kind), tiny.tokens()
    model.blocks[0].hook_resid_pre.add_hook(lambda x, hook: torch.zeros_like(x))
    assert not seen(ModelView(model), tokens, ["resid_pre"])["resid_pre", 0].any()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_readers_run_in_the_callers_gradient_mode(kind: str) -> None:
    model, tokens = shared("llama", kind), tiny.tokens()
    view, modes = ModelView(model), []
    with view.hooks({("attn_in", 1): lambda x: modes.append((torch.is_grad_enabled(), x.requires_grad))}):
        view.run(tokens)
        with torch.no_grad():
            view.run(tokens)
    assert modes == [(True, True), (False, False)]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_run_keeps_no_attention_pattern_and_no_cache(kind: str) -> None:
    model, tokens = tiny.build("gpt2", kind), tiny.tokens()
    ModelView(model).run(tokens)
    kept = [m for m in model.modules() if getattr(m, "_pattern", None) is not None]
    assert not kept
    assert getattr(model, "_last_hf_cache", None) is None


def test_evaluating_switches_dropout_off_and_restores_every_submodule() -> None:
    model, tokens = tiny.bridge("gpt2"), tiny.tokens()
    view = ModelView(model)
    with torch.no_grad():
        reference = view.run(tokens, logits=True)
        model.train()
        modes = [m.training for m in view._adapter.all_modules()]
        assert not torch.equal(view.run(tokens, logits=True), reference)  # run itself leaves dropout on
        with view.evaluating():
            torch.testing.assert_close(view.run(tokens, logits=True), reference)
        assert [m.training for m in view._adapter.all_modules()] == modes
        with pytest.raises(KeyboardInterrupt), view.evaluating():
            raise KeyboardInterrupt
    assert [m.training for m in view._adapter.all_modules()] == modes
    assert all(modes)


def test_view_imports_no_transformer_lens() -> None:
    import subprocess
    import sys

    code = (
        "import sys, tl_asymmetry.models.view, tl_asymmetry.models.checks, tl_asymmetry.models.loading; "
        "sys.exit('transformer_lens' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- refusals ------------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_refused() -> None:
    text = "expected a HookedTransformer, a TransformerBridge or a model of transformers, got Linear; pass Transf"
    with pytest.raises(ValueError, match=text):
        ModelView(torch.nn.Linear(2, 2))


def test_a_plain_transformers_model_shows_what_its_bridge_shows() -> None:
    from transformers import AutoModelForCausalLM

    plain = ModelView(AutoModelForCausalLM.from_pretrained(tiny.hf_directory("gpt2"), dtype=torch.float64).eval())
    bridge = ModelView(shared("gpt2", "bridge"))
    assert plain.matrices == bridge.matrices
    for layer, matrix in itertools.product(range(plain.n_layers), plain.matrices):
        torch.testing.assert_close(plain.weight(layer, matrix), bridge.weight(layer, matrix), rtol=0, atol=0)
    tokens = tiny.tokens()
    ours, theirs = (seen(view, tokens, present(view)) for view in (plain, bridge))
    assert ours.keys() == theirs.keys()
    for key, x in ours.items():
        torch.testing.assert_close(x, theirs[key], rtol=0, atol=1e-10)
    assert plain.self_check(tokens) < 1e-8


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_wrong_names_are_refused(kind: str) -> None:
    view = ModelView(shared("neox", kind))
    for call, text in (
        (lambda: view.weight(7, "W_Q"), "expected a layer from 0 to 1, got 7; pass"),
        (lambda: view.weight(-1, "W_Q"), "expected a layer from 0 to 1, got -1; pass"),
        (
            lambda: view.weight(0, "W_gate"),
            "expected a matrix among W_Q, .*, W_out, got 'W_gate'; pass",
        ),
        (lambda: view.kv_head(4), "expected a head from 0 to 3, got 4; pass"),
        (lambda: view.has_point("resid"), "expected a point among attn_in, .*, got 'resid'; pass"),
        (lambda: view.hooks({("q", 0): print}).__enter__(), "expected a point among attn_in, .*, got 'q'; pass"),
        (
            lambda: view.hooks({("resid_mid", 0): print}).__enter__(),
            "expected a point that layer 0 has, got 'resid_mid'; pass one of attn_in, mlp_in, resid_pre, resid_post, z",
        ),
        (lambda: view.hooks({("z", 2): print}).__enter__(), "expected a layer from 0 to 1, got 2; pass"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_split_attention_inputs_are_refused(kind: str) -> None:
    model = tiny.build("gpt2", kind)
    model.set_use_split_qkv_input(True)
    with pytest.raises(
        ValueError, match="expected one attention input for all heads, got use_split_qkv_input=True; pass"
    ):
        ModelView(model).hooks({("attn_in", 0): print}).__enter__()


def test_self_check_refuses_a_wrong_product() -> None:
    model = tiny.bridge("llama")
    model.blocks[1].attn.hook_q.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=r"expected blocks.1 W_Q times its input .*, got 0\.5|expected blocks.1 W_Q"):
        ModelView(model).self_check(tiny.tokens())


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_half_precision_is_checked_as_well(kind: str) -> None:
    view = ModelView(tiny.build("llama", kind, torch.bfloat16))
    assert view.dtype == torch.bfloat16
    assert 0 < view.self_check(tiny.tokens()) < 5e-2
