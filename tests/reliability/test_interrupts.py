"""A real SIGINT at every line that changes a model or puts it back: it is as it was when the exception arrives."""

from __future__ import annotations

import linecache
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import pytest
import torch

from tests import tiny
from tl_asymmetry.geometry.precision import exact_products, fresh_settings
from tl_asymmetry.interrupts import interrupts_wait, temporarily
from tl_asymmetry.models.backward import outer_products
from tl_asymmetry.models.edits import RankOneEdit, apply_edits
from tl_asymmetry.models.graphs import edited, frozen
from tl_asymmetry.models.resume import _instead
from tl_asymmetry.models.running import _modes
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weight_gradients import WeightGradients

Context = Callable[[ModelView], AbstractContextManager[Any]]

PARTS = {
    "put", "take", "enter", "leave", "freeze", "thaw", "require", "put_back", "hide", "show", "__enter__", "__exit__",
    "register_forward_hook", "register_forward_pre_hook", "_switch",
}  # fmt: skip
"""Functions that change something or put it back."""


def _edits(view: ModelView) -> list[RankOneEdit]:
    """Two of one head, one of another."""
    generator = torch.Generator().manual_seed(0)
    sizes = view.weight(0, "W_Q").shape[1:]
    return [
        RankOneEdit(0, "W_Q", head, *(torch.randn(size, generator=generator) for size in sizes)) for head in (1, 1, 2)
    ]


CONTEXTS: dict[str, Context] = {
    "hooks": lambda view: view.hooks({("resid_pre", 0): lambda x: None, ("mlp_in", 1): lambda x: None}),
    "evaluating": lambda view: view.evaluating(),
    "frozen": frozen,
    "edited": lambda view: edited({view.module_at("resid_pre", 1): lambda x: None}),
    "edits": lambda view: apply_edits(view, _edits(view)),
    "tracked": lambda view: WeightGradients(view, [(0, "W_Q"), (1, "W_in")]).tracked(),
    "outer products": lambda view: outer_products(view, [(0, "W_Q"), (1, "W_out")], lambda *_: None),
    "other functions": lambda view: _instead(view.blocks[:1], [lambda x, *_, **__: x]),
    "exact products": lambda view: exact_products(view.device),
    "fresh settings": lambda view: fresh_settings(),
}


def state(view: ModelView) -> dict[str, Any]:
    """All that a context might leave behind."""
    modules = list(view._adapter.all_modules())
    return {
        "training": [module.training for module in modules],
        "hooks": [list(hooks) for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)],
        "requires_grad": [p.requires_grad for p in view.model.parameters()],
        "weights": [p.detach().clone() for p in view.model.parameters()],
        "forward": ["forward" in module.__dict__ for module in modules],
        "modes": len(_modes),
        "precision": torch.get_float32_matmul_precision(),
        "defaults": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "handler": signal.getsignal(signal.SIGINT),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> str:
    """What differs."""
    wrong = [name for name in a if name != "weights" and a[name] != b[name]]
    wrong += [] if all(map(torch.equal, a["weights"], b["weights"])) else ["weights"]
    return ", ".join(wrong)


OFTEN = 8
"""A line is struck the first so many times that it is reached: it does the same for every module of a model."""


class Struck:
    """Sends this process a SIGINT at the n-th line of `PARTS`, counted from 1."""

    def __init__(self, at: int) -> None:
        self.at, self.lines, self.where = at, 0, ""
        self.reached: Counter[tuple[str, int]] = Counter()

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if event == "call":
            ours = "tl_asymmetry" in code.co_filename or code.co_name.startswith("register_")
            return self if ours and code.co_name in PARTS else None
        # No interrupt can come at the word `try`, which does nothing.
        if event == "line" and linecache.getline(code.co_filename, frame.f_lineno).strip() != "try:":
            self.reached[code.co_filename, frame.f_lineno] += 1
            self.lines += self.reached[code.co_filename, frame.f_lineno] <= OFTEN
            if self.lines == self.at and not self.where:
                self.where = f"{code.co_filename}:{frame.f_lineno}"
                os.kill(os.getpid(), signal.SIGINT)
        return self


@pytest.fixture(scope="module")
def view() -> ModelView:
    """A model in training mode, with some of its parameters frozen."""
    model = tiny.bridge("gpt2").train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    return ModelView(model)


@pytest.fixture(autouse=True)
def short_products() -> Iterator[None]:
    """A caller's own precision, which some of the contexts change for as long as they last."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("name", list(CONTEXTS))
def test_an_interrupt_at_any_line_leaves_nothing_behind(view: ModelView, name: str) -> None:
    before, at = state(view), 0
    previous = sys.gettrace()
    while True:
        at += 1
        struck = Struck(at)
        try:
            context = CONTEXTS[name](view)
            sys.settrace(struck)
            with context:
                pass
            sys.settrace(previous)
        except KeyboardInterrupt:
            sys.settrace(previous)
            assert same(before, state(view)) == "", struck.where
            continue
        assert same(before, state(view)) == ""
        break
    assert at > 4, "nothing was interrupted"
    assert struck.lines < at


@pytest.mark.usefixtures("unchecked_types")
def test_an_interrupt_in_the_block_leaves_nothing_behind(view: ModelView) -> None:
    before = state(view)
    for name, context in CONTEXTS.items():
        with pytest.raises(KeyboardInterrupt), context(view):  # noqa: PT012 - it comes at some step inside
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
        assert same(before, state(view)) == "", name


def test_a_context_that_is_dropped_is_undone() -> None:
    """As where an interrupt comes between a block and the first step of leaving it."""
    done: list[str] = []
    context = temporarily(lambda: done.append("do"), lambda: done.append("undo"))
    context.__enter__()
    del context
    assert done == ["do", "undo", "undo"]


@pytest.mark.usefixtures("unchecked_types")
def test_every_context_that_is_dropped_is_undone(view: ModelView) -> None:
    before = state(view)
    for name, make in CONTEXTS.items():
        context = make(view)
        context.__enter__()
        del context
        assert same(before, state(view)) == "", name


def test_what_fails_half_way_is_undone() -> None:
    noted: list[int] = []

    def do() -> None:
        noted.append(1)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"), temporarily(do, noted.clear):
        pytest.fail("entered")
    assert noted == []


def test_interrupts_wait_for_the_end_and_for_whoever_handles_them() -> None:
    steps: list[int] = []
    with pytest.raises(KeyboardInterrupt), interrupts_wait():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        steps.append(1)
        steps.append(2)
    assert steps == [1, 2]
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))  # a user's own handler
    try:
        with interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
            assert heard == []
        assert heard == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts_wait():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_no_handler_is_touched() -> None:
    found: list[Any] = []

    def work() -> None:
        with interrupts_wait():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
