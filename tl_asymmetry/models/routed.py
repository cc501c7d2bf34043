"""The two sides of gradients where no module gives a matrix's product: of routers, and of experts, each of which has
the tokens that the router gave to it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.running import hooked
from tl_asymmetry.models.sites import Site
from tl_asymmetry.models.view import ModelView

Outer = tuple[int, str]
"""A layer and a matrix."""

RoutedReader = Callable[[int, Outer, int, Tensor, Tensor, Tensor], None]
"""Called with the number of the forward pass, the layer and matrix, the expert, a and δ `[token, …]` of the tokens of
one batch that this expert was given, and the batch's row of each."""

WholeReader = Callable[[int, Outer, Tensor, Tensor], None]
"""The same of a matrix that every token meets, a and δ as `[batch, pos, …]`."""

_CONVERSIONS = ("to", "type", "float")
"""Names of the functions by which a router's weight may come into another type first."""
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm")
"""Names of the functions by which experts multiply."""


@contextmanager
def expert_products(
    view: ModelView, sites: Sequence[Outer], starts: Sequence[Tensor], reader: RoutedReader | None
) -> Iterator[None]:
    """Show a reader what `backward.outer_products` shows of other matrices, for each expert that got a token.

    A stack of experts is one module: which of its products is whose is told by the memory of the weight that is
    multiplied, while transformers runs its experts one after the other. The routing is the model's own, and kept.

    Args:
        view: the model.
        sites: layers and matrices of experts; none: nothing is done.
        starts: the stream before the first block of every pass so far, whose `[batch, pos]` the tokens come in.
        reader: see `RoutedReader`.

    Raises:
        ValueError: an expert that is given other tokens than the router chose for it.
    """
    if not sites or reader is None:
        yield
        return
    stacks: dict[int, _Stack] = {}
    for layer, matrix in sites:
        site = view.multiplied(layer, matrix)
        if site is None:
            raise ValueError(
                f"expected experts in one parameter, got others for {matrix} of layer {layer}; leave it out"
            )
        parameter = getattr(site.module, site.parameter)
        stack = stacks.setdefault(_memory(parameter), _Stack(layer, parameter))
        stack.matrices[matrix] = site
    routings = {id(site.module): _Routing() for stack in stacks.values() for site in stack.matrices.values()}
    modules = {id(site.module): site.module for stack in stacks.values() for site in stack.matrices.values()}
    for stack in stacks.values():
        stack.routing = routings[id(next(iter(stack.matrices.values())).module)]
    notes = [(module, "input", routings[key].note) for key, module in modules.items()]
    with _one_after_the_other(list(modules.values())), hooked(notes), _Products(stacks, starts, reader):
        yield


class _Routing:
    """What a module of experts was called with."""

    hidden: Tensor
    """Its tokens `[token, d_model]`."""
    chosen: Tensor | None = None
    """Experts of each token `[token, k]`; None where every expert is given every token, most of them as zeros."""

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self.hidden = tensors[0].detach().flatten(0, -2)
        self.chosen = next((t for t in tensors[1:] if not t.is_floating_point()), None)

    def tokens(self, expert: int) -> Tensor:
        """Those of an expert, in the order in which it is given them."""
        if self.chosen is None:
            raise RuntimeError("no expert was chosen for any token")
        return torch.where((self.chosen == expert).mT)[1]


class _Stack:
    """A parameter that holds a matrix, or two fused ones, of each expert."""

    routing: _Routing

    def __init__(self, layer: int, parameter: Tensor) -> None:
        self.layer, self.parameter = layer, parameter
        self.matrices: dict[str, Site] = {}

    def expert(self, weight: Tensor) -> int:
        return (weight.storage_offset() - self.parameter.storage_offset()) // self.parameter.stride(0)


class _Products(TorchFunctionMode):
    """Sees products with the weights of experts, and asks for their gradients."""

    def __init__(self, stacks: dict[int, _Stack], starts: Sequence[Tensor], reader: RoutedReader) -> None:
        super().__init__()
        self._stacks, self._starts, self._reader = stacks, starts, reader

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        multiplies = getattr(func, "__name__", "") in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor)
        if multiplies and torch.is_grad_enabled() and result.requires_grad:
            stack = self._stacks.get(_memory(args[1]))
            if stack is not None:
                self._seen(stack, args[0].detach(), args[1], result)
        return result

    def _seen(self, stack: _Stack, a: Tensor, weight: Tensor, product: Tensor) -> None:
        index, length = len(self._starts) - 1, self._starts[-1].shape[1]

        def show(expert: int, a: Tensor, tokens: Tensor, δ: Tensor) -> None:
            for matrix, site in stack.matrices.items():
                part = δ.detach() if site.side == "write" else site.split(δ.detach())
                self._reader(index, (stack.layer, matrix), expert, a, part, tokens // length)

        if weight.ndim == 3:  # Llama 4: every expert has a row for every token, zeros where it was not chosen

            def show_all(δ: Tensor) -> None:
                for expert in range(len(a)):
                    (tokens,) = torch.where((a[expert] != 0).any(-1))
                    if len(tokens):
                        show(expert, a[expert][tokens], tokens, δ[expert][tokens])

            product.register_hook(show_all)
            return
        expert = stack.expert(weight)
        tokens = stack.routing.tokens(expert)
        reads = any(site.side == "read" for site in stack.matrices.values())
        if len(tokens) != len(a) or (reads and not torch.equal(stack.routing.hidden[tokens], a)):
            raise ValueError(
                f"expected expert {expert} of layer {stack.layer} to be given the {len(tokens)} tokens that the router "
                f"chose for it, got {len(a)} others; pass matrices without {', '.join(stack.matrices)}"
            )
        product.register_hook(partial(show, expert, a, tokens))


@contextmanager
def bare_products(
    view: ModelView, sites: Sequence[Outer], starts: Sequence[Tensor], reader: WholeReader
) -> Iterator[None]:
    """Show a reader what `backward.outer_products` shows of other matrices, where no module gives the product away.

    That is so of routers, which go on to choose. Their product is told by the memory of the weight.

    Args:
        view: the model.
        sites: layers and matrices, of which `view.multiplied` knows the parameter; none: nothing is done.
        starts: the stream before the first block of every pass so far.
        reader: called with the number of the pass, the layer and matrix, a and δ of a batch.
    """
    found = {(layer, matrix): view.multiplied(layer, matrix) for layer, matrix in sites}
    if not found:
        yield
        return
    with _BareProducts({key: site for key, site in found.items() if site is not None}, starts, reader):
        yield


class _BareProducts(TorchFunctionMode):
    """Sees products with some weights, or with these in another type, and asks for their gradients."""

    def __init__(self, sites: dict[Outer, Site], starts: Sequence[Tensor], reader: WholeReader) -> None:
        super().__init__()
        self._sites = {_memory(getattr(site.module, site.parameter)): (key, site) for key, site in sites.items()}
        self._starts, self._reader = starts, reader
        self._converted: list[Tensor] = []  # alive, so that nothing else comes to lie there

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _CONVERSIONS and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            known = self._sites.get(_memory(args[0]))
            if known is not None and _memory(result) not in self._sites:
                self._sites[_memory(result)] = known
                self._converted.append(result)
        elif name in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor):
            known = self._sites.get(_memory(args[1]))
            if known is not None and torch.is_grad_enabled() and result.requires_grad:
                result.register_hook(partial(self._show, *known, len(self._starts) - 1, args[0].detach()))
        return result

    def _show(self, key: Outer, site: Site, index: int, a: Tensor, δ: Tensor) -> None:
        shape = self._starts[index].shape[:2]
        part = site.part_of_output(δ.detach())
        self._reader(index, key, a.reshape(*shape, a.shape[-1]), part.reshape(*shape, part.shape[-1]))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _one_after_the_other(modules: Sequence[nn.Module]) -> Iterator[None]:
    """transformers' own loop over experts inside, in the place of kernels that multiply all of them at once."""
    for module in modules:
        if "forward" in vars(module):
            raise ValueError(
                f"expected experts with transformers' own forward, got another in {type(module).__name__} (a device "
                "map's, for one); pass the model on one device, or matrices without the experts'"
            )
    loops = {
        module: types.MethodType(loop, module)
        for module in modules
        if (loop := getattr(type(module).forward, "__wrapped__", None)) is not None
    }

    def put_in() -> None:
        for module, loop in loops.items():
            module.forward = loop

    def take_out() -> None:
        for module in loops:
            vars(module).pop("forward", None)

    with temporarily(put_in, take_out):
        yield
