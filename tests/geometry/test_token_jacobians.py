"""The factored Jacobians of a block against jacrev of the block written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import reference_jacobians as reference
from tl_asymmetry.geometry.batched_autograd import pull_batch, push_batch
from tl_asymmetry.geometry.token_jacobians import (
    AttentionJacobian,
    BlockJacobian,
    BranchJacobian,
    MLPJacobian,
    NormJacobian,
    TokenJacobian,
    mean_of_dense,
)

D, HEADS, E, M, N, EPS = 10, 3, 4, 14, 5, 1e-3


def weights(seed, gated=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-2] ** 0.5

    W = {name: 1.5 * normal(HEADS, D, E) for name in ("W_Q", "W_K", "W_V")}
    W |= {"W_O": normal(HEADS, E, D), "W_in": normal(D, M), "W_out": normal(M, D)}
    if gated:
        W["W_gate"] = normal(D, M)
    return W


def vectors(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm_of(x, gain, centered):
    c = x - x.mean(-1, keepdim=True) if centered else x
    return NormJacobian.of_input(x, (c.square().mean(-1) + EPS).sqrt(), gain, centered)


def attention_of(x, W, causal=True):
    return AttentionJacobian(
        **reference.attention_factors(x, W, causal), **{n: W[n] for n in ("W_Q", "W_K", "W_V", "W_O")}
    )


def mlp_of(x, W):
    reads = [W["W_in"], W["W_gate"]] if "W_gate" in W else [W["W_in"]]
    return MLPJacobian(tuple(reference.mlp_slopes(x, W)), tuple(reads), W["W_out"])


def truth(function, x):
    return reference.same_position(reference.jacobian(function, x))


def check_all_forms(jacobian, expected):
    """dense, pull, push, mean and a choice of tokens say the same."""
    assert isinstance(jacobian, TokenJacobian)
    assert jacobian.tokens == len(expected)
    rows, columns = vectors(8, N, 2, D), vectors(9, N, D, 3)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(jacobian.dense(), expected, **close)
    torch.testing.assert_close(jacobian.pull(rows), rows @ expected, **close)
    torch.testing.assert_close(jacobian.push(columns), expected @ columns, **close)
    torch.testing.assert_close(jacobian.mean(), expected.mean(0), **close)
    torch.testing.assert_close(mean_of_dense(jacobian, 2), expected.mean(0), **close)
    for some in ([3, 0], slice(1, 3)):
        torch.testing.assert_close(jacobian.at(some).dense(), expected[some], **close)
        torch.testing.assert_close(jacobian.at(some).mean(), expected[some].mean(0), **close)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("gained", [True, False])
def test_norm(centered, gained):
    x, gain = vectors(0, N, D), 1 + vectors(1, D) if gained else None
    expected = truth(lambda x: reference.layer_norm(x, gain, centered, EPS), x)
    check_all_forms(norm_of(x, gain, centered), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_attention(causal):
    x, W = vectors(0, N, D), weights(1)
    jacobian = attention_of(x, W, causal)
    check_all_forms(jacobian, truth(lambda x: reference.attention(x, W, causal), x))
    heads = sum(jacobian.head(h).dense() for h in range(HEADS))
    torch.testing.assert_close(heads, jacobian.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_mlp(gated):
    x, W = vectors(0, N, D), weights(1, gated)
    check_all_forms(mlp_of(x, W), truth(lambda x: reference.mlp(x, W), x))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("norms", ["none", "before", "both"])
def test_block(parallel, gated, norms):
    x, W = vectors(0, N, D), weights(1, gated)
    γ = [1 + 0.5 * vectors(2 + i, D) for i in range(4)]

    def norm(x, i):
        wanted = norms == "both" or (norms == "before" and i % 2 == 0)
        return reference.layer_norm(x, γ[i], i == 0, EPS) if wanted else x

    def attend(x):
        return norm(reference.attention(norm(x, 0), W, True), 1)

    def think(x):
        return norm(reference.mlp(norm(x, 2), W), 3)

    def block(x):
        middle = x + attend(x)
        return middle + think(x if parallel else middle)

    def jacobian_of(x, i):
        wanted = norms == "both" or (norms == "before" and i % 2 == 0)
        return norm_of(x, γ[i], i == 0) if wanted else None

    read = x if parallel else x + attend(x)
    first = BranchJacobian(
        jacobian_of(x, 0), attention_of(norm(x, 0), W), jacobian_of(reference.attention(norm(x, 0), W, True), 1)
    )
    second = BranchJacobian(
        jacobian_of(read, 2), mlp_of(norm(read, 2), W), jacobian_of(reference.mlp(norm(read, 2), W), 3)
    )
    check_all_forms(BlockJacobian(first, second, parallel), truth(block, x))
    check_all_forms(first, truth(attend, x))
    heads = sum(first.head(h).mean() for h in range(HEADS))
    torch.testing.assert_close(heads, first.mean(), rtol=0, atol=1e-12)


def test_block_of_attention_alone():
    x, W = vectors(0, N, D), weights(1)
    block = BlockJacobian(BranchJacobian(None, attention_of(x, W)), None, False)
    check_all_forms(block, truth(lambda x: x + reference.attention(x, W, True), x))


def test_head_of_an_mlp_is_refused():
    x, W = vectors(0, N, D), weights(1)
    with pytest.raises(ValueError, match="expected attention, got MLPJacobian; pass the attention branch"):
        BranchJacobian(None, mlp_of(x, W)).head(0)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 7), d=st.integers(2, 9), centered=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_norm_is_blind_to_what_it_takes_out(seed, n, d, centered):
    """N x̂ is nearly 0 (exactly without ε), N 1 = 0 for LayerNorm, and N is symmetric without gain."""
    x = vectors(seed, n, d)
    if centered:
        x = x + 0.1 * torch.arange(d)  # no constant rows
    c = x - x.mean(-1, keepdim=True) if centered else x
    norm = NormJacobian.of_input(x, c.square().mean(-1).sqrt(), None, centered)
    scale = norm.scale[:, None, None].reciprocal()
    assert (norm.push(norm.unit.unsqueeze(-1)).abs() <= 1e-12 * scale * d).all()
    torch.testing.assert_close(norm.dense(), norm.dense().mT)
    if centered:
        assert (norm.push(torch.ones(n, d, 1, dtype=x.dtype)).abs() <= 1e-12 * scale * d).all()


@given(seed=st.integers(0, 10**6), a=st.floats(-2, 2), b=st.floats(-2, 2))
@settings(max_examples=20, deadline=None)
def test_pull_and_push_are_adjoint_and_linear(seed, a, b):
    x, W = vectors(seed, N, D), weights(seed, gated=True)
    norm = norm_of(x, 1 + vectors(seed + 1, D), True)
    unit = reference.layer_norm(x, 1 + vectors(seed + 1, D), True, EPS)
    block = BlockJacobian(
        BranchJacobian(norm, attention_of(unit, W)), BranchJacobian(None, mlp_of(x, W)), parallel=True
    )
    u, v, w = vectors(seed + 2, N, 1, D), vectors(seed + 3, N, D, 1), vectors(seed + 4, N, D, 1)
    torch.testing.assert_close(block.pull(u) @ v, u @ block.push(v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(block.push(a * v + b * w), a * block.push(v) + b * block.push(w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x, W = vectors(0, N, D), weights(1)
    exact = BlockJacobian(
        BranchJacobian(norm_of(x, None, True), attention_of(x, W)), BranchJacobian(None, mlp_of(x, W)), False
    )

    def cast(value):
        if isinstance(value, torch.Tensor):
            return value.to(dtype)
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        if hasattr(value, "__dataclass_fields__"):
            return type(value)(**{name: cast(getattr(value, name)) for name in value.__dataclass_fields__})
        return value

    block = cast(exact)
    for form in (block.dense(), block.mean(), block.pull(torch.ones(N, 1, D, dtype=dtype))):
        assert form.dtype == dtype
    torch.testing.assert_close(block.dense().double(), exact.dense(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_batched_products(chunk):
    x, y = vectors(0, 4).requires_grad_(), vectors(1, 3).requires_grad_()
    unused = vectors(2, 2).requires_grad_()
    out = torch.sin(x[:3] * y) * x[1:]
    Jx, Jy = torch.func.jacrev(lambda x, y: torch.sin(x[:3] * y) * x[1:], (0, 1))(x.detach(), y.detach())
    u, dx, dy = vectors(3, 5, 3), vectors(4, 5, 4), vectors(5, 5, 3)
    gx, gy, gz = pull_batch(out, [x, y, unused], u, chunk=chunk)
    torch.testing.assert_close(gx, u @ Jx)
    torch.testing.assert_close(gy, u @ Jy)
    assert not gz.any()
    assert gz.shape == (5, 2)
    pushed = push_batch(out, [x, y, unused], [dx, dy, torch.ones(5, 2)], chunk=chunk)
    torch.testing.assert_close(pushed, dx @ Jx.mT + dy @ Jy.mT)
    linear = 3 * x
    torch.testing.assert_close(push_batch(linear, [x], [dx], chunk=chunk), 3 * dx)
    with torch.no_grad():  # the caller's mode does not matter
        torch.testing.assert_close(push_batch(out, [x, y], [dx, dy], chunk=chunk), pushed)
