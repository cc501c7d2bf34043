"""Many edits of one block on one batch: what lies below the block is computed once.

An edit of a matrix in block l leaves the stream before that block as it was, and all blocks above have the weights they
had. So the block's own output is computed once for each edit, from the input it was seen to get; the outputs of several
edits are then stacked along the batch and carried through the rest of the model in one pass. In that pass the model
runs as it always does (embedding, masks, final norm, soft caps are its own affair), only that the blocks up to l
hand over what is already known instead of computing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_asymmetry.models.edits import RankOneEdit, apply_edits
from tl_asymmetry.models.running import own_thread
from tl_asymmetry.models.view import ModelView, first_tensor

_LOGITS_PER_PASS = {"cpu": 1 << 26, "other": 1 << 28}
_MOST_STACKED = 64
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


class EditedRuns:
    """Logits of one batch under single edits, and without any.

    Use inside `torch.no_grad()` and `view.evaluating()`; edits of other layers than those named run the whole model.

    Args:
        view: the model.
        tokens: the batch, `[batch, pos]`.
        layers: blocks whose inputs are kept.
        whole: run the whole model for every edit (for models `resumes` found it cannot be avoided in).

    Example:
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> edits = [RankOneEdit(2, "W_Q", 0, torch.randn(64), torch.randn(16)) for _ in range(3)]
        >>> with torch.no_grad(), view.evaluating():
        ...     runs = EditedRuns(view, tokens, [2])
        ...     [tuple(logits.shape)[:3] for logits in runs.under(edits)]
        [(3, 1, 3)]
    """

    logits: Float[Tensor, "batch pos vocab"]
    """Of the model as it is."""

    def __init__(
        self, view: ModelView, tokens: Int[Tensor, "batch pos"], layers: Sequence[int], *, whole: bool = False
    ) -> None:
        self.view = view
        self.tokens = tokens.to(view.device)
        self._whole = whole
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._beside: dict[int, tuple[Any, ...] | None] = {}
        handles = []
        try:
            for layer in () if whole else sorted(set(layers)):
                block = view.blocks[layer]
                handles.append(block.register_forward_pre_hook(own_thread(self._keep_call(layer)), with_kwargs=True))
                handles.append(block.register_forward_hook(own_thread(self._keep_output(layer))))
            logits = view.run(self.tokens, logits=True)
        finally:
            for handle in handles:
                handle.remove()
        assert logits is not None
        self.logits = logits

    def under(self, edits: Sequence[RankOneEdit]) -> Iterator[Float[Tensor, "edit batch pos vocab"]]:
        """Logits under each edit alone, in order, as many edits at a time as memory allows for."""
        room = _LOGITS_PER_PASS.get(self.view.device.type, _LOGITS_PER_PASS["other"])
        stack = max(1, min(_MOST_STACKED, room // self.logits.numel()))
        at = 0
        while at < len(edits):
            layer = edits[at].layer
            group = [edits[at]]
            while len(group) < stack and at + len(group) < len(edits) and edits[at + len(group)].layer == layer:
                group.append(edits[at + len(group)])
            at += len(group)
            yield self._resumed(group, layer) if layer in self._calls else self._from_the_start(group)

    def _from_the_start(self, edits: Sequence[RankOneEdit]) -> Tensor:
        logits = []
        for edit in edits:
            with apply_edits(self.view, edit):
                logits.append(self.view.run(self.tokens, logits=True))
        return torch.stack([x for x in logits if x is not None])

    def _resumed(self, edits: Sequence[RankOneEdit], layer: int) -> Tensor:
        args, kwargs = self._calls[layer]
        streams = []
        for edit in edits:
            with apply_edits(self.view, edit):
                streams.append(_stream(self.view.run_block(layer, *args, **kwargs)))
        return self.carried(layer, torch.cat(streams)).unflatten(0, (len(edits), -1))

    def carried(self, layer: int, streams: Float[Tensor, "rows pos d_model"]) -> Float[Tensor, "rows pos vocab"]:
        """Logits from given outputs of a block; `rows` is a multiple of the batch."""
        beside = self._beside[layer]

        def as_block_does(hidden: Tensor) -> Any:
            return hidden if beside is None else (hidden, *beside)

        known: list[Callable[..., Any]] = [
            lambda *args, **kwargs: as_block_does(first_tensor(args, kwargs)) for _ in range(layer)
        ]
        known.append(lambda *_, **__: as_block_does(streams))
        with _instead(self.view.blocks[: layer + 1], known):
            logits = self.view.run(self.tokens.repeat(len(streams) // len(self.tokens), 1), logits=True)
        assert logits is not None
        return logits

    def _keep_call(self, layer: int) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[layer] = args, kwargs

        return see

    def _keep_output(self, layer: int) -> Callable[..., None]:
        def see(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._beside[layer] = output[1:] if isinstance(output, tuple) else None

        return see

    def again(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The output of a block, computed anew from the input it was seen to get."""
        args, kwargs = self._calls[layer]
        return _stream(self.view.run_block(layer, *args, **kwargs))


def resumes(view: ModelView, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]) -> tuple[bool, str]:
    """Whether running on from a block gives what the whole model gives, on a few tokens, and if not, what was seen.

    A model with hooks, caches or forward methods of its own may not be resumable; its edits then need whole passes.
    """
    try:
        with torch.no_grad(), view.evaluating():
            runs = EditedRuns(view, tokens, layers)
            scale = runs.logits.abs().max().clamp_min(1e-30)
            for layer in sorted(set(layers)):
                twice = runs.carried(layer, torch.cat([runs.again(layer)] * 2))
                off = ((twice.unflatten(0, (2, -1)) - runs.logits).abs().max() / scale).item()
                if not off <= _TOLERANCE.get(view.dtype, 5e-2):
                    return False, f"logits {off:.2g} off after block {layer}"
    except Exception as error:  # whatever a foreign forward method may raise
        return False, f"{type(error).__name__}: {error}"
    return True, ""


@contextmanager
def _instead(blocks: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Blocks do something else for a while."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, function in zip(blocks, functions, strict=True):
            block.__dict__["forward"] = function
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
