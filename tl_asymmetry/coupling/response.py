"""How strongly a direction in parameter space moves the linear centroids of a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.lanczos import largest_eigenvalue
from tl_asymmetry.geometry.precision import exact_products, with_fresh_settings
from tl_asymmetry.grokking.model import GrokTransformer
from tl_asymmetry.models.parameters import ParameterVector, attention_weights
from tl_asymmetry.models.running import evaluation, hooked
from tl_asymmetry.models.view import ModelView

CENTROIDS = ("logit", "sum", "attention")
"""What is differentiated: one logit, the sum of all logits, or the sum of an attention block's outputs."""

METHODS = ("exact", "finite_difference")


@checked
@with_fresh_settings
def centroid_response(
    model: Any,
    inputs: Int[Tensor, "batch pos"],
    directions: Float[Tensor, "directions parameters"],
    *,
    targets: Int[Tensor, " batch"] | None = None,
    centroid: str = "logit",
    layer: int | None = None,
    position: int | None = None,
    method: str = "exact",
    epsilon: float = 0.005,
    batch_size: int = 1024,
) -> Float[Tensor, " directions"]:
    """A(v) = mean over inputs x of ‖∂_v μ_x‖², the response of centroids to attention weights moving along v.

    The centroid of x is `μ_x = ∂ f(x) / ∂ (what enters the block or model)`, over all positions (arXiv:2604.25143; the
    Linear Centroids form J_f(x)ᵀ 1 is that of arXiv:2604.11962):

    - "logit": f is the logit of `targets` at `position`, the input the embedded tokens (the paper's centroid).
    - "sum": f is the sum of all logits there, J_f(x)ᵀ 1 of the whole model.
    - "attention": f is the sum over d_model of what the attention of `layer` writes at `position`, the input the
      stream that enters the block: J_f(x)ᵀ 1 of the attention block.

    θ is W_Q, W_K, W_V, W_O of all layers ("attention": of that layer), no biases, in the order of
    `attention_weights(model)`. A is a quadratic form, A(v) = vᵀMv, and directions are taken as they are, not
    normalised.

    "exact" differentiates μ_x along v: ∂_v μ_x = ∂/∂x ⟨∂f/∂θ, v⟩, a product of the mixed second derivative, by double
    backward on the live parameters, so it runs on a Bridge as well. "finite_difference" is what was published,
    `(μ_x(θ + εv) − μ_x(θ − εv)) / 2ε` for unit v, ε = `epsilon` ‖θ‖; weights are put back bit for bit.

    Args:
        model: a GrokTransformer, HookedTransformer or TransformerBridge; it comes back as it was.
        inputs: token ids.
        directions: rows v.
        targets: index of the output for each input; in a model with several heads, `head · p + residue`.
        centroid: one of `CENTROIDS`.
        layer: of the attention block, for "attention" only.
        position: where f is read: default 0 for a GrokTransformer, else the last.
        method: "exact" or "finite_difference".
        epsilon: relative step of the finite difference.
        batch_size: inputs differentiated at once; the result does not depend on it.

    Returns:
        A for each direction, float64, on CPU; in units of centroid² per parameter².

    Raises:
        ValueError: unknown words, missing targets or layer, directions of the wrong length.

    Example:
        >>> from tl_asymmetry.grokking import GrokShape, GrokTransformer
        >>> tiny = GrokTransformer(GrokShape(p=7, d_model=16, d_mlp=32), seed=0)
        >>> pairs = torch.tensor([[1, 2], [3, 4]])
        >>> v = torch.randn(2, 2048, generator=torch.Generator().manual_seed(0))
        >>> exact = centroid_response(tiny, pairs, v, targets=pairs.sum(1) % 7)
        >>> steps = centroid_response(
        ...     tiny, pairs, v, targets=pairs.sum(1) % 7, method="finite_difference", epsilon=1e-3
        ... )
        >>> torch.allclose(exact, steps, rtol=0.01)
        True
    """
    problem = CentroidProblem(
        model, inputs, targets=targets, centroid=centroid, layer=layer, position=position, batch_size=batch_size
    )
    if directions.ndim != 2:
        raise ValueError(f"expected directions as rows [n, parameters], got {shown(directions)}; pass a matrix")
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}; pass method='exact'")
    if method == "exact":
        return problem.exact(directions)
    return problem.finite_difference(directions, epsilon)


@dataclass
class _Graph:
    """One batch: the summed f, and the tensor it is differentiated by."""

    f: Tensor
    x: Tensor


def _check_ids(name: str, given: Any, *axes: str) -> None:
    whole = isinstance(given, Tensor) and not (given.is_floating_point() or given.is_complex())
    if not whole or given.ndim != len(axes):
        raise ValueError(
            f"expected {name} as whole numbers [{', '.join(axes)}], got {shown(given)}; pass a tensor of indexes"
        )


class CentroidProblem:
    """Centroids of fixed inputs as a function of θ: responses, products with M, its largest eigenvalue and trace.

    Arguments as in `centroid_response`.
    """

    def __init__(
        self,
        model: Any,
        inputs: Int[Tensor, "batch pos"],
        *,
        targets: Int[Tensor, " batch"] | None = None,
        centroid: str = "logit",
        layer: int | None = None,
        position: int | None = None,
        batch_size: int = 1024,
    ) -> None:
        _check_ids("inputs", inputs, "batch", "pos")
        if targets is not None:
            _check_ids("targets", targets, "batch")
        if centroid not in CENTROIDS:
            raise ValueError(f"expected centroid to be one of {', '.join(CENTROIDS)}, got {centroid!r}; pass 'logit'")
        if centroid == "logit" and (targets is None or len(targets) != len(inputs)):
            got = "none" if targets is None else str(len(targets))
            raise ValueError(f"expected a target for each of {len(inputs)} inputs, got {got}; pass targets=")
        if (layer is None) == (centroid == "attention"):
            raise ValueError(
                f"expected a layer for the centroid 'attention' and none for others, got layer={layer} for "
                f"{centroid!r}; pass centroid='attention' with layer=…"
            )
        if len(inputs) == 0 or batch_size < 1:
            raise ValueError(f"expected inputs and batch_size >= 1, got {len(inputs)} and {batch_size}; pass some")
        self.plain = isinstance(model, GrokTransformer)
        if self.plain and centroid == "attention":
            raise ValueError(
                "expected a HookedTransformer or TransformerBridge for the centroid 'attention', got a "
                "GrokTransformer; pass hooked_model(model) or bridge_model(model)"
            )
        self.model, self.inputs, self.targets = model, inputs.long(), targets
        self.centroid, self.layer, self.batch_size = centroid, layer, batch_size
        self.position = (0 if self.plain else -1) if position is None else position
        self.view = None if self.plain else ModelView(model)
        weights = (
            model.attention_parameters() if self.plain else attention_weights(model, None if layer is None else [layer])
        )
        self.θ = ParameterVector(model, weights)

    # -- responses -----------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def exact(self, directions: Float[Tensor, "directions parameters"]) -> Float[Tensor, " directions"]:
        """A(v) by the mixed second derivative."""
        tangents = [self._tangent(v) for v in directions]
        total = torch.zeros(len(tangents), dtype=torch.float64)
        with self.differentiable():
            for graph in self._graphs():
                gradient = self._gradient(graph)
                for k, tangent in enumerate(tangents):
                    total[k] += _moved(graph, gradient, tangent).double().square().sum().cpu()
        return total / len(self.inputs)

    @torch.inference_mode(False)
    def finite_difference(
        self, directions: Float[Tensor, "directions parameters"], epsilon: float
    ) -> Float[Tensor, " directions"]:
        """A(v) from centroids at θ ± ε v/‖v‖, ε = `epsilon` ‖θ‖.

        Raises:
            ValueError: an epsilon that is not positive.
        """
        if not epsilon > 0:
            raise ValueError(f"expected epsilon > 0, got {epsilon}; pass 0.005 as published")
        step = epsilon * self.θ.flat().double().norm().item()
        total = torch.zeros(len(directions), dtype=torch.float64)
        for k, v in enumerate(directions):
            length = v.double().norm().item()
            if length == 0:
                continue
            ends = []
            for sign in (1, -1):
                with self.θ.restored():
                    self.θ.add_(v / length, sign * step)
                    ends.append(self.centroids())
            total[k] = ((ends[0] - ends[1]).double() * (length / (2 * step))).square().sum() / len(self.inputs)
        return total

    @torch.inference_mode(False)
    def centroids(self) -> Float[Tensor, "batch pos d_model"]:
        """μ_x of every input, on CPU."""
        with self.differentiable():
            return torch.cat([torch.autograd.grad(graph.f, graph.x)[0].cpu() for graph in self._graphs()])

    # -- the operator --------------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def product(self, v: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
        """M v, with A(v) = vᵀ M v: M = mean over inputs of Jᵀ J, J = ∂μ_x/∂θ."""
        tangent = self._tangent(v)
        total = torch.zeros(self.θ.size, dtype=torch.float64)
        with self.differentiable():
            for graph in self._graphs():
                moved = _moved(graph, self._gradient(graph), tangent)
                (μ,) = torch.autograd.grad(graph.f, graph.x, create_graph=True)
                back = torch.autograd.grad(μ, self.θ.owners, moved, allow_unused=True)
                total += self.θ.gather(back).double().cpu()
        return total / len(self.inputs)

    def largest(self, *, tolerance: float = 1e-2, most: int = 40, seed: int = 0) -> tuple[float, float]:
        """The most any unit direction can move the centroids, max A = λ_max(M), and its relative residual."""
        return largest_eigenvalue(self.product, self.θ.size, tolerance=tolerance, most=most, seed=seed)

    # -- graphs --------------------------------------------------------------------------------------------------

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Gradients on, dropout off, exact products; all as before afterwards."""
        evaluating = evaluation(self.model, self.model.modules()) if self.view is None else self.view.evaluating()
        with self.θ.differentiable(), evaluating, exact_products(self.θ.device):
            yield

    def _graphs(self) -> Iterator[_Graph]:
        """One forward pass a batch, to be used within `differentiable()`."""
        for start in range(0, len(self.inputs), self.batch_size):
            stop = start + self.batch_size
            tokens = self.inputs[start:stop].clone().to(self.θ.device)  # a caller's inference tensor has no graph
            targets = None if self.targets is None else self.targets[start:stop].clone().to(tokens.device)
            yield self._forward(tokens, targets)

    def _forward(self, tokens: Tensor, targets: Tensor | None) -> _Graph:
        if self.view is None:
            x = self.model.embeddings(tokens)
            logits = self.model.from_embeddings(x).flatten(1)
            return _Graph(self._read(logits, targets), x)
        seen: list[Tensor] = []
        written: list[Tensor] = []
        layer = 0 if self.layer is None else self.layer

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            written.append(output[0] if isinstance(output, tuple) else output)

        hooks = [] if self.layer is None else [(self.view.model.blocks[layer].attn, "output", keep)]
        with self.view.hooks({("resid_pre", layer): seen.append}), hooked(hooks):
            logits = self.view.run(tokens, logits=self.layer is None)
        if self.layer is not None:
            return _Graph(written[0][:, self.position].sum(), seen[0])
        assert logits is not None  # asked for
        return _Graph(self._read(logits[:, self.position], targets), seen[0])

    def _read(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        if self.centroid == "sum" or targets is None:
            return logits.sum()
        return logits.gather(1, targets[:, None]).sum()

    def _tangent(self, v: Tensor) -> list[Tensor]:
        return self.θ.scatter(v)

    def _gradient(self, graph: _Graph) -> tuple[Tensor | None, ...]:
        """∂f/∂θ with its graph, for each owner; None for one the forward pass does not use."""
        return torch.autograd.grad(graph.f, self.θ.owners, create_graph=True, allow_unused=True)


def _moved(graph: _Graph, gradient: Sequence[Tensor | None], tangent: Sequence[Tensor]) -> Tensor:
    """∂_v μ: the vector–Jacobian product of ∂f/∂θ (a function of x) with v, which is ∂/∂x ⟨∂f/∂θ, v⟩."""
    pairs = [(g, v) for g, v in zip(gradient, tangent, strict=True) if g is not None]
    outputs, directions = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, graph.x, directions, retain_graph=True)[0]


def random_directions(count: int, size: int, *, seed: int | Sequence[int]) -> Float[Tensor, "count size"]:
    """Unit vectors uniform on the sphere (Gaussian, normalised), float32; a sequence of seeds is mixed into one."""
    mixed = seed if isinstance(seed, int) else sum(s * 1_000_003**i for i, s in enumerate(seed)) % (1 << 62)
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(mixed))
    return rows / rows.norm(dim=1, keepdim=True)
