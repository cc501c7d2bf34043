"""Training with part of the gradient taken away: arms of a causal test, around any optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.rolling_svd import RollingSVD
from tl_asymmetry.interrupts import temporarily

ARMS = ("none", "keep", "remove", "noise", "zero", "freeze")
"""What may happen to the parameters' gradient; see `GradientProjection`."""

SPACES = ("rolling", "random")
"""Span of the last gradients' leading directions, or a fresh random space at every step."""


class GradientProjection(torch.optim.Optimizer):
    """Steps an optimiser after projecting the gradient of some of its parameters, taken together as one vector g.

    With P the projector on a `rank`-dimensional space, from the step after the warm-up on:

    | arm | what the optimiser gets |
    |---|---|
    | "none" | g |
    | "keep" | P g |
    | "remove" | g − P g |
    | "noise" | Gaussian noise of norm ‖P g‖: as little gradient as "keep", in no direction |
    | "zero" | 0: moments fade, weight decay goes on |
    | "freeze" | nothing: the parameters stay as they are, without weight decay |

    The space is the span of the top right singular vectors of the last `window` gradients ("rolling"), or drawn anew
    at each step ("random"). The first two arms with both spaces are the interventions B to E of arXiv:2604.25143,
    "none" is its A; "noise", "zero" and "freeze" are controls of ours, without which a gain of "keep" cannot be told
    from a gain of having less gradient.

    **With AdamW.** The gradient is projected, not the step. exp_avg stays a weighted sum of projected gradients, but
    the division by √exp_avg_sq works entry by entry and leads out of the space, moments of the warm-up linger, and
    weight decay acts on the full parameters. `target="update"` projects the step that the optimiser took instead,
    decay included, whose moments then are those of the full gradient.

    It is an optimiser itself, with the parameter groups of the one it steps: schedulers, gradient scalers and trainers
    take it, and its `state_dict` holds both.

    Args:
        optimizer: any; it must own every one of `parameters`.
        parameters: whose gradients are projected, in this order.
        arm: one of `ARMS`.
        space: one of `SPACES`, for "keep", "remove" and "noise".
        rank: dimension of the space.
        window: gradients that span the rolling space.
        buffer: what enters the window: "projected", what the optimiser got, as published (under "keep" the space then
            never leaves the span of the warm-up's gradients), or "raw", the gradient as it came.
        target: "gradient" or "update"; the window holds what is projected.
        warmup: steps left alone; by default `window`, for "freeze" none. A rolling space needs a full window.
        seed: of random spaces and noise.

    Raises:
        ValueError: an unknown word, window < rank, a rolling space with a warm-up shorter than the window, parameters
            the optimiser does not own, or a rank above their number.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(6))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> projection = GradientProjection(sgd, [weight], arm="keep", space="rolling", rank=1, window=2)
        >>> for step in range(3):
        ...     weight.grad = torch.eye(6)[0] + (step == 2) * torch.eye(6)[5]
        ...     projection.step()
        >>> weight.tolist()
        [-2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    @checked
    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        *,
        arm: str = "keep",
        space: str = "rolling",
        rank: int = 3,
        window: int = 20,
        buffer: str = "projected",
        target: str = "gradient",
        warmup: int | None = None,
        seed: int = 0,
    ) -> None:
        _one_of("arm", arm, ARMS)
        _one_of("space", space, SPACES)
        _one_of("buffer", buffer, ("projected", "raw"))
        _one_of("target", target, ("gradient", "update"))
        if not isinstance(parameters, Iterable) or isinstance(parameters, Tensor | str):
            raise ValueError(f"expected parameters as a list of tensors, got {shown(parameters)}; pass a list")
        self.parameters = list(parameters)
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        strangers = sum(id(p) not in owned for p in self.parameters)  # whatever else stands in the list is none of them
        if strangers or not self.parameters:
            raise ValueError(
                f"expected parameters that the optimiser owns, got {strangers or 'none'} of {len(self.parameters)} "
                "that it does not; pass parameters out of its param_groups"
            )
        size = sum(p.numel() for p in self.parameters)
        if rank > size:
            raise ValueError(f"expected rank <= {size}, the number of parameters, got {rank}; pass a smaller rank")
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share()
        self.arm, self.space, self.buffer, self.target = arm, space, buffer, target
        self.rank = rank
        self.warmup = warmup if warmup is not None else 0 if arm == "freeze" else window
        self.steps = 0
        self._rolling = RollingSVD(window, rank)
        self._uses_window = arm in ("keep", "remove", "noise") and space == "rolling"
        if self._uses_window and self.warmup < window:
            raise ValueError(
                f"expected a warm-up of at least the window of {window}, got {self.warmup}; pass warmup={window}"
            )
        self._generator = torch.Generator().manual_seed(seed)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimiser's own."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project and step; call it after the gradient was clipped, as the published arms do.

        With `target="gradient"` the parameters' `.grad` holds what the optimiser got afterwards.

        Args:
            closure: computes the loss and its gradients anew, where the loop has one.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a parameter without a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        missing = sum(p.grad is None for p in self.parameters)
        if missing:
            raise ValueError(f"expected a gradient on every parameter, got {missing} without; call backward() first")
        if self.arm == "freeze" and self.steps >= self.warmup:
            self._step_without()
        elif self.target == "gradient":
            raw = torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
            given = self._changed(raw)
            if given is not raw:
                self._write(given, lambda parameter: parameter.grad)
            self.optimizer.step()
            self._remember(raw, given)
        else:
            before = torch.cat([p.detach().reshape(-1) for p in self.parameters])
            self.optimizer.step()
            raw = torch.cat([p.detach().reshape(-1) for p in self.parameters]) - before
            given = self._changed(raw)
            if given is not raw:
                self._write(before + given, lambda parameter: parameter.detach())
            self._remember(raw, given)
        self.steps += 1
        return loss

    def basis(self) -> Float[Tensor, "rank parameters"]:
        """Orthonormal rows that span the space: of the window as it is now, or drawn now."""
        if self.space == "rolling":
            return self._rolling.right_singular_vectors
        first = self.parameters[0]
        size = sum(p.numel() for p in self.parameters)
        rows = torch.randn(self.rank, size, generator=self._generator)
        # Rows of a Gaussian matrix, made orthonormal in order: Haar, as by QR, at a tenth of its price for long rows.
        lower = torch.linalg.cholesky(rows.double() @ rows.double().mT)
        identity = torch.eye(self.rank, dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
        return (inverse.to(rows.dtype) @ rows).to(first)

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs: the optimiser's own state, and `projection_state`."""
        return {**self.optimizer.state_dict(), "projection": self.projection_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        own = {name: value for name, value in state_dict.items() if name != "projection"}
        self.optimizer.load_state_dict(own)
        self._share()
        self.load_projection_state(state_dict["projection"])

    def _share(self) -> None:
        """Show the groups and the state that the optimiser has: what a scheduler writes there is its own."""
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state

    def projection_state(self) -> dict[str, Tensor]:
        """The window, the steps so far and the generator, as tensors."""
        state = {f"rolling.{name}": value for name, value in self._rolling.state_dict().items()}
        return state | {"steps": torch.tensor(self.steps), "generator": self._generator.get_state()}

    def load_projection_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `projection_state`."""
        prefix = "rolling."
        rolling = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self._rolling.load_state_dict(rolling | {"ring": rolling["ring"].to(self.parameters[0].device)})
        self.steps = int(state["steps"])
        self._generator.set_state(state["generator"].cpu())

    def _changed(self, raw: Tensor) -> Tensor:
        """The gradient (or update) as the arm wants it."""
        if self.arm in ("none", "freeze") or self.steps < self.warmup:
            return raw
        if self.arm == "zero":
            return torch.zeros_like(raw)
        V = self.basis().to(raw.dtype)
        kept = V.mT @ (V @ raw)
        if self.arm == "keep":
            return kept
        if self.arm == "remove":
            return raw - kept
        noise = torch.randn(raw.shape, generator=self._generator).to(raw)
        return noise * (kept.norm() / noise.norm())

    def _remember(self, raw: Tensor, given: Tensor) -> None:
        if self._uses_window:
            self._rolling.update(given if self.buffer == "projected" else raw)

    def _write(self, flat: Tensor, place: Callable[[Tensor], Tensor | None]) -> None:
        pieces = flat.split([p.numel() for p in self.parameters])
        with torch.no_grad():
            for parameter, piece in zip(self.parameters, pieces, strict=True):
                target = place(parameter)
                if target is not None:
                    target.copy_(piece.view_as(target))

    def _step_without(self) -> None:
        """Step the others: a parameter without a gradient is passed over, weight decay included."""
        gradients = [(p, p.grad) for p in self.parameters]

        def hide() -> None:
            for parameter, _ in gradients:
                parameter.grad = None

        def show() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient

        with temporarily(hide, show):
            self.optimizer.step()


def _one_of(what: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(
            f"expected {what} to be one of {', '.join(allowed)}, got {value!r}; pass {what}={allowed[0]!r}"
        )
