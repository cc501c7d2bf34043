"""A small, really trained pair of models, and texts to try everything on: no network, no download.

The base is a GPT-2 of four layers that has learned short made-up stories. The aligned model was trained from it by
DPO to prefer happy endings, the control by as many steps of plain cross-entropy; a second chain goes from the base to
SFT on instructions and on to DPO. `demo_log()` says how well each one did. What made them, from one seed, is
`benchmarks/embedded_pair` of the repository; here is what reads the files. The pair's vocabulary is its stories, so it
is analyzed on `demo_texts`.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tl_asymmetry.arguments import checked, shown

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from tl_asymmetry.demo.models import Kind

__all__ = [
    "Preference",
    "demo_checkpoints",
    "demo_gpt2",
    "demo_log",
    "demo_model",
    "demo_names",
    "demo_pair",
    "demo_preferences",
    "demo_run",
    "demo_stages",
    "demo_texts",
    "demo_tokenizer",
]

T = TypeVar("T")

SEEDS = 4
"""Stories and pairs of so many seeds are kept whole, one after the other; further seeds begin in between."""


@dataclass(frozen=True)
class Preference:
    """Two continuations of one opening, of which the first is preferred."""

    prompt: str
    """The opening of a story."""
    chosen: str
    """The continuation with the happier ending."""
    rejected: str
    """The other one."""


@checked
def demo_texts(n: int = 64, *, seed: int = 0) -> list[str]:
    """Stories in the language of the demonstration models, none of which was trained on.

    Args:
        n: number of stories, at most 2048; each has 40 to 100 tokens.
        seed: equal seeds give equal stories, and a shorter list is the beginning of a longer one. Seeds 0 to 3 have
            no story in common up to 512 each.

    Raises:
        ValueError: for a negative number, or more than there are.

    Example:
        >>> len(demo_texts(3, seed=1))
        3
    """
    return _drawn(_lines("stories.txt"), n, seed, least=0, what="stories")


def demo_pair(kind: Kind = "auto", *, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """The base and the aligned model, ready for `analyze_pair`.

    Args:
        kind: "hooked" for HookedTransformer, "bridge" for TransformerBridge; "auto" takes a HookedTransformer where
            the installed TransformerLens has it (3.x), else a TransformerBridge.
        device: where the models go.

    Returns:
        Two raw models in eval mode with gradients enabled and their tokenizer set.

    Raises:
        ValueError: for another kind, or one that the installed TransformerLens does not have.

    Example:
        >>> base, aligned = demo_pair()
        >>> base.cfg.n_layers, base.cfg.d_model
        (4, 64)
    """
    return demo_model("base", kind, device=device), demo_model("dpo", kind, device=device)


@checked
def demo_model(name: str, kind: Kind = "auto", *, device: str | torch.device = "cpu") -> Any:
    """One of the demonstration models by name: see `demo_names`.

    Args:
        name: "base", "dpo", "control", "step0" and so on for a checkpoint of the base, or "sft" and "sft_dpo" for the
            stages of `demo_stages`.
        kind: as in `demo_pair`.
        device: where the model goes.

    Raises:
        ValueError: for an unknown name; for the kind as in `demo_pair`.

    Example:
        >>> demo_model("step0", "bridge").cfg.d_model
        64
    """
    from tl_asymmetry.demo.models import lens_model, read_config

    tensors = _tensors(name)
    config = read_config(_data())
    config = {**config, "model_name": f"{config['model_name']}/{name}"}  # a result tells the two models of a pair apart
    return lens_model(config, tensors, demo_tokenizer(), kind=kind, device=device)


@checked
def demo_gpt2(name: str) -> GPT2LMHeadModel:
    """The same model as a `GPT2LMHeadModel` of transformers, without TransformerLens.

    Its `save_pretrained` writes a Hugging Face folder.

    Args:
        name: as in `demo_model`.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> demo_gpt2("base").config.n_layer
        4
    """
    from tl_asymmetry.demo.models import gpt2_model, read_config

    return gpt2_model(read_config(_data()), _tensors(name))


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the demonstration models; it puts `<bos>` in front.

    Example:
        >>> demo_tokenizer().decode(demo_tokenizer().encode("Mira was happy.")[1:])
        'mira was happy.'
    """
    from tl_asymmetry.demo.models import read_config
    from tl_asymmetry.demo.tokenizer import read_tokenizer

    return read_tokenizer(_data() / "tokenizer.json", read_config(_data())["n_ctx"])


def demo_names() -> list[str]:
    """The names `demo_model` knows, in the order they were trained.

    Example:
        >>> demo_names()[0], demo_names()[-4:]
        ('step0', ['dpo', 'control', 'sft', 'sft_dpo'])
    """
    return list(demo_log()["models"])


def demo_checkpoints() -> dict[int, Path]:
    """Checkpoint files of the base's training by optimiser step, from step 0 to the base itself.

    Each is a safetensors file with TransformerLens's names and orientation; the steps before the last are kept in
    float16, as checkpoints of a training often are.

    Example:
        >>> min(demo_checkpoints())
        0
    """
    models = demo_log()["models"]
    return {step: _data() / models[name]["file"] for step, name in _run().items()}


def demo_stages(kind: Kind = "auto") -> dict[str, Any]:
    """A chain of three stages as `analyze_stages` reads it: the base, SFT on instructions, and DPO after that.

    An instruction asks for the end of a story ("We want a sad end."). The second stage learned stories behind them,
    the third to prefer continuations that end as asked, which made hardly more of them do so:
    `demo_log()["following"]` says how many. Both were trained in factors of rank 4 on every matrix of the blocks.

    Args:
        kind: as in `demo_pair`.

    Raises:
        ValueError: as `demo_pair`.

    Example:
        >>> list(demo_stages())
        ['base', 'sft', 'sft_dpo']
    """
    return {name: demo_model(name, kind) for name in ("base", "sft", "sft_dpo")}


def demo_run(kind: Kind = "auto") -> dict[int, Callable[[], Any]]:
    """The base's training as `analyze_trajectory` reads it: step → function that makes the model of that step.

    Args:
        kind: as in `demo_pair`.

    Example:
        >>> run = demo_run()
        >>> list(run), run[50]().cfg.d_model
        ([0, 50, 150, 400, 1000], 64)
    """
    if not isinstance(kind, str) or kind not in ("auto", "hooked", "bridge"):
        raise ValueError(f"expected kind among auto, hooked, bridge, got {shown(kind)}; pass one of these")
    return {step: partial(demo_model, name, kind) for step, name in _run().items()}


@checked
def demo_preferences(n: int = 64, *, seed: int = 0) -> list[Preference]:
    """Pairs for happy endings over held-out openings, both halves sampled from the base: prompt, chosen, rejected.

    Args:
        n: number of pairs, at most 512.
        seed: as in `demo_texts`, up to 128 pairs each. The training pairs have openings of the other split.

    Raises:
        ValueError: for a number below 1, or more than there are.

    Example:
        >>> pair = demo_preferences(1, seed=0)[0]
        >>> pair.chosen != pair.rejected
        True
    """
    lines = _drawn(_lines("preferences.jsonl"), n, seed, least=1, what="pairs")
    return [Preference(**json.loads(line)) for line in lines]


def demo_log() -> dict[str, Any]:
    """What the build wrote down: recipe, versions, losses, preference accuracy, endings, changes, file hashes.

    Example:
        >>> sorted(demo_log()["change"])
        ['control', 'dpo']
    """
    log: dict[str, Any] = json.loads((_data() / "log.json").read_text(encoding="utf-8"))
    return log


def _lines(name: str) -> list[str]:
    """Of a text that lies packed, a third smaller than a wheel's own compression makes it."""
    return lzma.decompress((_data() / f"{name}.xz").read_bytes()).decode().splitlines()


def _drawn(pool: Sequence[T], n: int, seed: int, *, least: int, what: str) -> list[T]:
    """`n` of the pool in its order, from where the seed begins and round its end."""
    if not least <= n <= len(pool):
        raise ValueError(f"expected n from {least} to {len(pool)}, got {n}; pass the number of {what}")
    # Every fourth seed would begin at the same place without the shift, which has no factor in common with the pool.
    first = seed * (len(pool) // SEEDS) + 61 * (seed // SEEDS)
    return [pool[(first + i) % len(pool)] for i in range(n)]


def _run() -> dict[int, str]:
    """Names of the base's checkpoints by step."""
    models = demo_log()["models"]
    return dict(sorted((models[name]["step"], name) for name in models if name == "base" or name.startswith("step")))


def _data() -> Path:
    return Path(str(files("tl_asymmetry.demo") / "data"))


def _tensors(name: str) -> Mapping[str, torch.Tensor]:
    """The weights of a model: its file, or those of the stage before it and what its own file adds to them."""
    from tl_asymmetry.demo.models import read_tensors, with_factors

    path = _checkpoint(name)
    after = demo_log()["models"][name].get("after")
    return read_tensors(path) if after is None else with_factors(_tensors(after), path)


def _checkpoint(name: str) -> Path:
    models = demo_log()["models"]
    if name not in models:
        raise ValueError(f"expected the name of a demonstration model, got {name!r}; pass one of {', '.join(models)}")
    path: Path = _data() / models[name]["file"]
    return path
