"""How the layers of a transformers model are wired, asked of the model itself: one pass over a few tokens.

A configuration can be silent or wrong about where the stream stands between attention and MLP, whether what is written
is normed before it is added, or whether a token sees later ones. The tensors that go through the modules are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_asymmetry.models.running import hooked
from tl_asymmetry.models.sites import Site
from tl_asymmetry.names import MATRICES

_PROPORTIONAL = 1e-3
"""1 − |cos| below which one tensor is a multiple of another, in half precision too."""

Watched = tuple[nn.Module, str]
"""A module, and whether its "input" or its "output" is meant."""


@dataclass(frozen=True)
class Anatomy:
    """The wiring of one layer."""

    mid: Watched | None
    """Where the stream stands between attention and MLP; None where it stands nowhere."""
    parallel: bool
    """Whether the MLP reads the stream that attention reads."""
    rescaled: tuple[str, ...]
    """Writing matrices whose output reaches the stream through a norm."""
    joined: tuple[str, ...]
    """Writing matrices whose output is added together with another module's (a mixer beside attention)."""
    renormed: bool
    """Whether the stream itself is normed after each addition, as in BERT."""
    points: Mapping[str, str]
    """Reading matrix → the point whose tensor it multiplies; without those that read something else."""


def layer_anatomy(
    block: nn.Module,
    sites: Mapping[str, Site],
    attn_in: Watched | None,
    mlp_in: Watched | None,
    seen: Mapping[Any, Tensor],
) -> Anatomy:
    """Read a layer's wiring off the tensors that went through it.

    Args:
        block: the layer.
        sites: its matrices.
        attn_in: where the input of its attention or other mixer is seen.
        mlp_in: where the input of its MLP is seen.
        seen: what entered and left the block and each of its modules, by `(module, "input" or "output")`, all of the
            stream's shape.
    """
    pre, post = seen[block, "input"], seen[block, "output"]
    left = [(module, x) for (module, side), x in seen.items() if side == "output" and module is not block]
    renormed = any(_is_norm(module) and torch.equal(x, post) for module, x in left)
    x_attn = None if attn_in is None else seen.get(attn_in)
    x_mlp = None if mlp_in is None else seen.get(mlp_in)
    mid = before = None
    if mlp_in is not None and x_mlp is not None and x_attn is not None:
        norm = next((m for m, x in left if _is_norm(m) and torch.equal(x, x_mlp)), None)
        mid = mlp_in if norm is None else (norm, "input")
        before = seen.get(mid)
    parallel = before is not None and torch.equal(before, pre)
    if (
        before is None
        or parallel
        or renormed
        or not any(is_multiple(d, x) for d in (before - pre, post - before) for _, x in left)
    ):
        mid = None
    # Where something else is added as well, or the stream stands nowhere in between, a norm's input says it.
    writing = ("W_O", "W_out", *(name for name, site in sites.items() if site.side == "write" and name not in MATRICES))
    entering = [x for (module, side), x in seen.items() if side == "input" and _is_norm(module)]
    rescaled = [
        matrix
        for matrix in writing
        if matrix in sites
        and (written := seen.get((sites[matrix].module, "output"))) is not None
        and any(torch.equal(x, written) for x in entering)
    ]
    joined: list[str] = []
    for matrix, gained in _gains(pre, before if mid is not None else None, post).items():
        site = None if matrix in rescaled else sites.get(matrix)
        written = None if site is None or site.unit == "expert" else seen.get((site.module, "output"))
        if written is not None and not is_multiple(gained, written):
            normed = any(_is_norm(module) and is_multiple(gained, x) for module, x in left)
            (rescaled if normed else joined).append(matrix)
    known = [(name, x) for name, x in (("attn_in", x_attn), ("mlp_in", x_mlp)) if x is not None]
    points = {}
    for matrix, site in sites.items():
        x = seen.get((site.module, "input")) if site.side == "read" else None
        point = None if x is None else next((name for name, y in known if torch.equal(x, y)), None)
        if point is not None:
            points[matrix] = point
    return Anatomy(mid, parallel, tuple(rescaled), tuple(joined), renormed, points)


def _gains(pre: Tensor, mid: Tensor | None, post: Tensor) -> dict[str, Tensor]:
    """What the stream gains where a writing matrix writes."""
    return {} if mid is None else {"W_O": mid - pre, "W_out": post - mid}


@contextmanager
def seen_in(blocks: Sequence[nn.Module], stream: int = 0) -> Iterator[dict[Any, Tensor]]:
    """Keep what enters and leaves the blocks and all their modules in the first pass inside, by `(module, side)`.

    Only tensors with as many numbers as the stream has, in its shape `[batch, pos, d_model]`; of several streams the
    one of that number.
    """
    kept: dict[Any, Tensor] = {}

    def keep(module: nn.Module, side: str, x: Any) -> None:
        x = x[0] if isinstance(x, tuple | list) and x else x
        if isinstance(x, Tensor):
            # A copy: some layers go on to add to a module's output in place.
            kept.setdefault((module, side), x.detach().to(torch.float32, copy=True))

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(module, "input", kwargs.get("hidden_states", args[0] if args else None))

    def leaving(module: nn.Module, _: Any, output: Any) -> None:
        keep(module, "output", output)

    modules = {id(m): m for block in blocks for m in block.modules()}.values()
    with hooked([hook for m in modules for hook in ((m, "input", entering), (m, "output", leaving))]):
        yield kept
    shape = kept[blocks[0], "input"].shape[-3:]
    kept.update({key: x[stream] for key, x in kept.items() if x.ndim == 4 and x.shape[1:] == shape})
    fitting = {key: x.reshape(shape) for key, x in kept.items() if x.numel() == shape.numel()}
    kept.clear()
    kept.update(fitting)


def subtracts_mean(norm: nn.Module, d: int) -> bool:
    """Whether adding one number to all coordinates changes nothing: a LayerNorm, not an RMSNorm."""
    x = _vector(d)
    a, b = _ask(norm, x), _ask(norm, x + 3)
    return bool((a - b).abs().max() <= 1e-2 * a.abs().max())


def norm_gain(norm: nn.Module, d: int) -> Tensor | None:
    """What a norm multiplies each coordinate by, however it stores it (Gemma's 1 + w); None for a norm without weights.

    The odd part of the norm over the normalised vector: (norm(x) − norm(−x)) / 2x̂.
    """
    weight = next(norm.parameters(), None)
    if weight is None:
        return None
    x = _vector(d).double()
    odd = (_ask(norm, x) - _ask(norm, -x)).cpu() / 2
    normalised = x - x.mean() if subtracts_mean(norm, d) else x
    return (odd / (normalised / normalised.square().mean().sqrt())).flatten().to(weight.device, weight.dtype)


def sees_later_tokens(outputs: Callable[[Tensor], Tensor], tokens: Tensor, vocabulary: int) -> bool:
    """Whether a change of the last token changes earlier positions.

    Args:
        outputs: from token ids `[1, pos]` to the stream `[…, pos, d_model]`.
        tokens: which tokens to ask with.
        vocabulary: number of tokens.
    """
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % vocabulary
    a, b = (outputs(x)[..., :-1, :] for x in (tokens, other))
    # Rounding: a mixture may group its tokens otherwise.
    return bool((a - b).abs().max() > 50 * torch.finfo(a.dtype).eps * a.abs().max())


def _ask(norm: nn.Module, x: Tensor) -> Tensor:
    weight = next(norm.parameters(), None)
    with torch.no_grad():
        return norm(x.float() if weight is None else x.to(weight.device, weight.dtype)).double()


def _vector(d: int) -> Tensor:
    return torch.randn(1, 1, d, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(getattr(module, "_original_component", module)).__name__


def is_multiple(a: Tensor, b: Tensor) -> bool:
    """Whether one is a multiple of the other."""
    a, b = a.flatten().double(), b.flatten().double()
    scale = a.norm() * b.norm()
    return bool(scale > 0) and bool((a @ b).abs() >= (1 - _PROPORTIONAL) * scale)
