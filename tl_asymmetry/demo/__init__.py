"""A small, really trained pair of models, and texts to try everything on: no network, no download.

The base is a GPT-2 of four layers that has learned short made-up stories. The aligned model was trained from it by
DPO to prefer happy endings, the control by as many steps of plain cross-entropy; `build` trains them all again from
one seed, and `demo_log()` says how well each one did. The calibration texts are prose of many kinds, for models of
natural language; the demonstration pair, whose vocabulary is its stories, reads `demo_texts`.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl_asymmetry.demo.preferences import Preference
from tl_asymmetry.demo.stories import held_out_texts

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    from tl_asymmetry.demo.models import Kind

__all__ = [
    "Preference",
    "calibration_texts",
    "demo_checkpoints",
    "demo_gpt2",
    "demo_log",
    "demo_model",
    "demo_names",
    "demo_pair",
    "demo_preferences",
    "demo_texts",
    "demo_tokenizer",
]


def calibration_texts() -> list[str]:
    """Passages of English written for this package: stories, talk, instructions, code, lists, figures, letters.

    Returns:
        Texts of 300 to 1500 characters each, in the order of their names.

    Example:
        >>> texts = calibration_texts()
        >>> sum(map(len, texts)) > 32_000
        True
    """
    folder = files("tl_asymmetry.demo") / "texts"
    passages = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".txt")), key=lambda e: e.name)
    return [passage.read_text(encoding="utf-8").strip() for passage in passages]


def demo_texts(n: int = 64, *, seed: int = 0) -> list[str]:
    """Stories in the language of the demonstration models, none of which was trained on.

    Args:
        n: number of stories; each has 40 to 100 tokens.
        seed: equal seeds give equal stories.

    Raises:
        ValueError: for a negative number.

    Example:
        >>> len(demo_texts(3, seed=1))
        3
    """
    return held_out_texts(n, seed=seed)


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


def demo_model(name: str, kind: Kind = "auto", *, device: str | torch.device = "cpu") -> Any:
    """One of the demonstration models by name: see `demo_names`.

    Args:
        name: "base", "dpo", "control", or "step0" and so on for a checkpoint of the base.
        kind: as in `demo_pair`.
        device: where the model goes.

    Raises:
        ValueError: for an unknown name; for the kind as in `demo_pair`.

    Example:
        >>> demo_model("step0", "bridge").cfg.d_model
        64
    """
    from tl_asymmetry.demo.models import lens_model, read_config, read_tensors

    path = _checkpoint(name)
    config = read_config(_data())
    config = {**config, "model_name": f"{config['model_name']}/{name}"}  # a result tells the two models of a pair apart
    return lens_model(config, read_tensors(path), demo_tokenizer(), kind=kind, device=device)


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
    from tl_asymmetry.demo.models import gpt2_model, read_config, read_tensors

    path = _checkpoint(name)
    return gpt2_model(read_config(_data()), read_tensors(path))


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer of the demonstration models; it puts `<bos>` in front.

    Example:
        >>> demo_tokenizer().decode(demo_tokenizer().encode("Mira was happy.")[1:])
        'mira was happy.'
    """
    from tl_asymmetry.demo.models import read_pair_tokenizer

    return read_pair_tokenizer(_data())


def demo_names() -> list[str]:
    """The names `demo_model` knows, in the order they were trained.

    Example:
        >>> demo_names()[0], demo_names()[-2:]
        ('step0', ['dpo', 'control'])
    """
    return list(demo_log()["models"])


def demo_checkpoints() -> dict[int, Path]:
    """Checkpoint files of the base's training by optimiser step, from step 0 to the base itself.

    Each is a safetensors file with TransformerLens's names and orientation.

    Example:
        >>> min(demo_checkpoints())
        0
    """
    models = demo_log()["models"]
    of_base = [entry for name, entry in models.items() if name == "base" or name.startswith("step")]
    return {entry["step"]: _data() / entry["file"] for entry in sorted(of_base, key=lambda entry: entry["step"])}


def demo_preferences(n: int = 64, *, seed: int = 0) -> list[Preference]:
    """Pairs for happy endings over held-out openings, both halves sampled from the base: prompt, chosen, rejected.

    Args:
        n: number of pairs; a shorter list is the beginning of a longer one.
        seed: equal seeds give equal pairs. The training pairs have openings of the other split.

    Raises:
        ValueError: for a number below 1.

    Example:
        >>> pair = demo_preferences(1, seed=0)[0]
        >>> pair.chosen != pair.rejected
        True
    """
    from tl_asymmetry.demo.preferences import sample_preferences

    if n < 1:
        raise ValueError(f"expected n >= 1, got {n}; pass the number of pairs")
    return sample_preferences(
        demo_gpt2("base"), demo_tokenizer(), n=n, seed=seed, split="held_out", prompts_per_batch=min(256, 8 + 2 * n)
    )


def demo_log() -> dict[str, Any]:
    """What the build wrote down: recipe, versions, losses, preference accuracy, endings, changes, file hashes.

    Example:
        >>> sorted(demo_log()["change"])
        ['control', 'dpo']
    """
    log: dict[str, Any] = json.loads((_data() / "log.json").read_text(encoding="utf-8"))
    return log


def _data() -> Path:
    return Path(str(files("tl_asymmetry.demo") / "data"))


def _checkpoint(name: str) -> Path:
    models = demo_log()["models"]
    if name not in models:
        raise ValueError(f"expected the name of a demonstration model, got {name!r}; pass one of {', '.join(models)}")
    path: Path = _data() / models[name]["file"]
    return path
