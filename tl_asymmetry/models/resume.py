"""Many edits of a model on one batch: what lies below an edited block is computed once, the vocabulary only in pieces.

An edit of a matrix in block l leaves the stream before that block as it was, and all blocks above have the weights they
had. So the block's own output is computed once for each edit, from the input it was seen to get; the outputs of several
edits are then stacked along the batch and carried through the rest of the model in one pass. In that pass the model
runs as it always does (embedding, masks, final norm, soft caps are its own affair), only that the blocks up to l
hand over what is already known instead of computing it.

What is kept of each edit is the stream after the last block, d_model numbers a place: logits are a hundred times wider,
and the same model, all its blocks handing over what is known, makes them of as many places at a time as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_asymmetry.interrupts import temporarily
from tl_asymmetry.models.edits import HeadEdit, apply_edits
from tl_asymmetry.models.running import hooked
from tl_asymmetry.models.view import ModelView, first_tensor

Trial: TypeAlias = HeadEdit | Sequence[HeadEdit]
"""Edits that are made together."""

_FLOATS_PER_PASS = {"cpu": 1 << 24, "other": 1 << 28}
_MOST_STACKED = 64
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


class EditedRuns:
    """The stream after the last block under edits, and without any, at some places of one batch; logits from it.

    Use inside `torch.no_grad()` and `view.evaluating()`.

    Args:
        view: the model.
        tokens: the batch, `[batch, pos]`.
        layers: blocks whose inputs are kept; edits of other layers run the whole model.
        where: rows and positions of the places; all by default, row by row.
        whole: run the whole model for every edit and keep its logits (for models in which `resumes` found that nothing
            else gives the right ones).

    Example:
        >>> from tl_asymmetry.models.edits import RankOneEdit
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> edits = [RankOneEdit(2, "W_Q", 0, torch.randn(64), torch.randn(16)) for _ in range(3)]
        >>> with torch.no_grad(), view.evaluating():
        ...     runs = EditedRuns(view, tokens, [2])
        ...     [tuple(runs.logits(final).shape)[:2] for final in runs.under(edits)]
        [(3, 3)]
    """

    final: Float[Tensor, "place width"]
    """Of the model as it is: the stream after the last block, or with `whole` the logits."""

    def __init__(
        self,
        view: ModelView,
        tokens: Int[Tensor, "batch pos"],
        layers: Sequence[int],
        where: tuple[Int[Tensor, " place"], Int[Tensor, " place"]] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.view = view
        self.tokens = tokens.to(view.device)
        self._where = tuple(torch.ones_like(tokens).nonzero().mT) if where is None else where
        self._whole = whole
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._beside: dict[int, tuple[Any, ...] | None] = {}
        kept = () if whole else sorted({*layers, view.n_layers - 1})
        calls = [(view.blocks[layer], "input", self._keep_call(layer)) for layer in kept if layer in layers]
        outputs = [(view.blocks[layer], "output", self._keep_output(layer)) for layer in kept]
        with hooked([*calls, *outputs]):
            self.final = self._run(self.tokens)[0]

    def under(self, trials: Sequence[Trial]) -> Iterator[Float[Tensor, "trial place width"]]:
        """What `final` is under each trial's edits, in order, as many trials at a time as can be stacked."""
        rows, positions = self.tokens.shape
        widest = max(self.view.d_mlp or 4 * self.view.d_model, self.view.n_heads * positions)
        room = _FLOATS_PER_PASS.get(self.view.device.type, _FLOATS_PER_PASS["other"]) // (rows * positions * widest)
        stack, at = max(1, min(_MOST_STACKED, room)), 0
        while at < len(trials):
            layers = layers_of(trials[at])
            group = [trials[at]]
            if not layers:
                final = self.final.unsqueeze(0)
            elif layers[0] not in self._calls:
                with apply_edits(self.view, trials[at]):
                    final = self._run(self.tokens)
            elif len(layers) > 1:
                final = self._from_the_lowest(trials[at], layers[0])
            else:
                group += takewhile(partial(_touches, layers), trials[at + 1 : at + stack])
                final = self._stacked(group, layers[0])
            at += len(group)
            yield final

    def logits(self, final: Float[Tensor, "*trials place width"]) -> Float[Tensor, "*trials place vocab"]:
        """Logits at places, from the stream after the last block there; all are held at once."""
        if self._whole:
            return final
        streams = final.flatten(0, -2).unsqueeze(1)
        with self._handing_over(self.view.n_layers - 1, streams):
            logits = self.view.run(self.tokens.new_zeros(len(streams), 1), logits=True)
        assert logits is not None
        return logits.squeeze(1).unflatten(0, final.shape[:-1])

    def again(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The output of a block, computed anew from the input it was seen to get."""
        args, kwargs = self._calls[layer]
        return _stream(self.view.run_block(layer, *args, **kwargs))

    def carried(self, layer: int, streams: Float[Tensor, "rows pos d_model"]) -> Float[Tensor, "trial place d_model"]:
        """The last block's output from given outputs of another; `rows` is a multiple of the batch."""
        copies = len(streams) // len(self.tokens)
        if layer == self.view.n_layers - 1:
            return self._at_places(streams, copies)
        with self._handing_over(layer, streams):
            return self._run(self.tokens.repeat(copies, 1), copies)

    def _stacked(self, trials: Sequence[Trial], layer: int) -> Tensor:
        """Trials that touch one and the same block."""
        streams = []
        for trial in trials:
            with apply_edits(self.view, trial):
                streams.append(self.again(layer))
        return self.carried(layer, torch.cat(streams))

    def _from_the_lowest(self, trial: Trial, lowest: int) -> Tensor:
        """A trial that touches several blocks: those from the lowest one on run with their edits."""
        if lowest == 0:
            with apply_edits(self.view, trial):
                return self._run(self.tokens)
        args, kwargs = self._calls[lowest]
        with apply_edits(self.view, trial), self._handing_over(lowest - 1, first_tensor(args, kwargs), like=lowest):
            return self._run(self.tokens)

    def _run(self, tokens: Tensor, copies: int = 1) -> Tensor:
        """One pass, and what is kept of it, `[copy, place, width]`."""
        if self._whole:
            logits = self.view.run(tokens, logits=True)
            assert logits is not None
            return self._at_places(logits, copies)
        seen: list[Tensor] = []
        with hooked([(self.view.blocks[-1], "output", lambda _, __, output: seen.append(_stream(output)))]):
            self.view.run(tokens)
        return self._at_places(seen[0], copies)

    def _at_places(self, streams: Tensor, copies: int) -> Tensor:
        rows, positions = (index.to(streams.device) for index in self._where)
        return streams.unflatten(0, (copies, -1))[:, rows, positions].to(self.view.device)

    def _handing_over(self, layer: int, streams: Tensor, *, like: int | None = None) -> AbstractContextManager[None]:
        """Blocks up to one do nothing, and that one gives `streams`; in the form in which block `like` gave its own."""
        beside = self._beside[layer if like is None else like]

        def as_block_does(hidden: Tensor) -> Any:
            return hidden if beside is None else (hidden, *beside)

        known: list[Callable[..., Any]] = [
            lambda *args, **kwargs: as_block_does(first_tensor(args, kwargs)) for _ in range(layer)
        ]
        known.append(lambda *_, **__: as_block_does(streams))
        return _instead(self.view.blocks[: layer + 1], known)

    def _keep_call(self, layer: int) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[layer] = args, kwargs

        return see

    def _keep_output(self, layer: int) -> Callable[..., None]:
        def see(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._beside[layer] = output[1:] if isinstance(output, tuple) else None

        return see


def layers_of(trial: Trial) -> list[int]:
    """Layers that a trial touches, ascending."""
    return [trial.layer] if isinstance(trial, HeadEdit) else sorted({edit.layer for edit in trial})


def _touches(layers: list[int], trial: Trial) -> bool:
    return layers_of(trial) == layers


def resumes(view: ModelView, tokens: Int[Tensor, "batch pos"], layers: Sequence[int]) -> tuple[bool, str]:
    """Whether running on from each block, and from the stream after the last one, gives what the whole model gives.

    A model with hooks, caches or forward methods of its own may not be resumable; its edits then need whole passes.

    Returns:
        The answer on a few tokens, and if it is no, what was seen.
    """
    try:
        with torch.no_grad(), view.evaluating():
            expected = EditedRuns(view, tokens, (), whole=True).final
            runs = EditedRuns(view, tokens, layers)
            scale = expected.abs().max().clamp_min(1e-30)
            found = {"the last block": runs.final}
            for layer in sorted(set(layers)):
                found[f"block {layer}"] = runs.carried(layer, torch.cat([runs.again(layer)] * 2))
            for block, final in found.items():
                off = ((runs.logits(final) - expected).abs().max() / scale).item()
                if not off <= _TOLERANCE.get(view.dtype, 5e-2):
                    return False, f"logits {off:.2g} off after {block}"
    except Exception as error:  # whatever a foreign forward method may raise
        return False, f"{type(error).__name__}: {error}"
    return True, ""


def _instead(blocks: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> AbstractContextManager[None]:
    """Blocks do something else for a while."""
    before = [block.__dict__.get("forward") for block in blocks]

    def put() -> None:
        for block, function in zip(blocks, functions, strict=True):
            block.__dict__["forward"] = function

    def take() -> None:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward

    return temporarily(put, take)


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
