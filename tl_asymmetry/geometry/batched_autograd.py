"""Many vector–Jacobian and Jacobian–vector products through one graph, a batch of vectors at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def pull_batch(
    output: Tensor, inputs: Sequence[Tensor], cotangents: Float[Tensor, "n ..."], *, chunk: int
) -> list[Float[Tensor, "n ..."]]:
    """Cotangents taken back from `output` to each of `inputs`: one backward pass for each chunk of them.

    The graph is kept. An input that the output does not depend on gets zeros.

    Args:
        output: a tensor with history.
        inputs: tensors in that history.
        cotangents: `[n, *output.shape]`.
        chunk: how many at once.
    """
    parts = []
    for some in cotangents.split(chunk):
        grads = torch.autograd.grad(
            output, inputs, some, retain_graph=True, is_grads_batched=True, allow_unused=True
        )  # fmt: skip
        parts.append([_or_zeros(grad, x, len(some)) for grad, x in zip(grads, inputs, strict=True)])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def push_batch(
    output: Tensor, inputs: Sequence[Tensor], tangents: Sequence[Float[Tensor, "n ..."]], *, chunk: int
) -> Float[Tensor, "n ..."]:
    """Tangents of `inputs` taken through to `output`: Σ over inputs of ∂output/∂input · tangent, for each of n.

    Reverse mode twice: u ↦ Jᵀu is linear in u, so its own derivative is J. Needs no forward-mode rule, and one graph
    serves every tangent.

    Args:
        output: a tensor with history.
        inputs: tensors in that history.
        tangents: for each input `[n, *input.shape]`.
        chunk: how many at once.
    """
    u = torch.zeros_like(output, requires_grad=True)
    pulled = torch.autograd.grad(output, inputs, u, create_graph=True, allow_unused=True)
    used = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
    n = len(tangents[0])
    if not used:
        return output.new_zeros(n, *output.shape)
    parts = []
    for start in range(0, n, chunk):
        some = [t[start : start + chunk] for _, t in used]
        (grad,) = torch.autograd.grad(
            [g for g, _ in used], [u], some, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
        parts.append(_or_zeros(grad, output, len(some[0])))
    return torch.cat(parts)


def _or_zeros(grad: Tensor | None, x: Tensor, n: int) -> Tensor:
    return x.new_zeros(n, *x.shape) if grad is None else grad
