"""Checkpoints and adapters as people bring them: one function for each program that writes them.

Every writer takes a model (or an adapted one), writes what its program writes, and says what was written: the path to
pass, the weights that the file means by name (what transformers has after loading it, or PEFT after merging), and what
a reader must be told. `inputs` crosses writers with architectures. Everything is tiny and random.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import tiny

State = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """What a writer has written."""

    path: Path
    """What to pass to `weights_from`."""
    truth: State
    """Every parameter by its transformers name."""
    notes: tuple[str, ...] = ()
    """Regular expressions of what must be noted."""
    base: bool = False
    """Whether it can be read only beside a base."""
    tied: bool | None = None
    """Whether the loaded model's head is its embedding; None: as the architecture has it."""


# --- models ----------------------------------------------------------------------------------------------------------


@functools.cache
def _hf_model(architecture: str, delta: float, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.hf_directory(architecture, seed, delta), dtype=torch.float32)


def hf_model(architecture: str, delta: float = 0.0, seed: int = 0) -> Any:
    """A fresh one: a copy is made in a fifth of the time that opening its folder takes."""
    return copy.deepcopy(_hf_model(architecture, delta, seed))


def state_of(model: Any) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def loaded(path: Path) -> State:
    """What transformers has after loading a folder."""
    from transformers import AutoModelForCausalLM

    return state_of(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def unsaved_state(model: Any) -> State:
    """A state dict whose tensors share no memory, as safetensors wants it."""
    return {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}


def transformers_single(model: Any, folder: Path) -> Written:
    return Written(saved(model, folder), loaded(folder))


def transformers_shards(model: Any, folder: Path) -> Written:
    saved(model, folder, max_shard_size="40KB")
    return Written(folder, loaded(folder))


def transformers_bin(model: Any, folder: Path) -> Written:
    """Before safetensors: tied tensors are both in the file."""
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return Written(folder, loaded(folder))


def transformers_bfloat16(model: Any, folder: Path) -> Written:
    saved(copy.deepcopy(model).to(torch.bfloat16), folder)
    return Written(folder, loaded(folder))


def trainer(model: Any, folder: Path) -> Written:
    """A checkpoint of transformers' Trainer, with the state of everything else."""
    place = saved(model, folder / "checkpoint-500")
    torch.save({"state": {0: {"exp_avg": torch.zeros(3)}}}, place / "optimizer.pt")
    torch.save({"lr": 1.0}, place / "scheduler.pt")
    (place / "trainer_state.json").write_text('{"global_step": 500}')
    return Written(place, loaded(place))


def _renamed(model: Any, folder: Path, rename: Callable[[str], str], **extra: Tensor) -> Written:
    model.config.save_pretrained(folder)
    state = {rename(name): tensor for name, tensor in unsaved_state(model).items()}
    save_file(state | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return Written(folder, state_of(model), ("read without the wrappers around them",))


def compiled(model: Any, folder: Path) -> Written:
    return _renamed(model, folder, lambda name: f"_orig_mod.{name}")


def data_parallel(model: Any, folder: Path) -> Written:
    return _renamed(model, folder, lambda name: f"module.{name}")


def compiled_data_parallel(model: Any, folder: Path) -> Written:
    return _renamed(model, folder, lambda name: f"module._orig_mod.{name}")


def fsdp(model: Any, folder: Path) -> Written:
    """Every block wrapped by itself, and checkpointed."""

    def rename(name: str) -> str:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        inner = (
            []
            if at is None
            else [*parts[: at + 1], "_fsdp_wrapped_module", "_checkpoint_wrapped_module", *parts[at + 1 :]]
        )
        return "_fsdp_wrapped_module." + ".".join(inner or parts)

    return _renamed(model, folder, rename)


def lightning(model: Any, folder: Path) -> Written:
    """A .ckpt of a LightningModule that has the model as self.model."""
    model.config.save_pretrained(folder)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    path = folder / "epoch=1-step=500.ckpt"
    torch.save({"epoch": 1, "global_step": 500, "state_dict": state, "pytorch-lightning_version": "2.5"}, path)
    return Written(path, state_of(model))


def deepspeed_states(model: Any, folder: Path) -> Written:
    """ZeRO-1 and 2 keep the whole module in mp_rank_00_model_states.pt."""
    model.config.save_pretrained(folder)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": model.state_dict(), "dp_world_size": 2, "global_steps": 500}, path)
    return Written(path, state_of(model))


def value_head(model: Any, folder: Path) -> Written:
    """TRL's AutoModelForCausalLMWithValueHead, as accelerate saves its whole state."""
    head = {"v_head.summary.weight": torch.randn(1, tiny.D_MODEL), "v_head.summary.bias": torch.zeros(1)}
    written = _renamed(model, folder, lambda name: f"pretrained_model.{name}", **head)
    return Written(written.path, written.truth, (*written.notes, r"2 tensors .* left aside: v_head\. \(2\)"))


def reward_model(model: Any, folder: Path) -> Written:
    """A sequence classifier: a score where the head was."""
    model.config.save_pretrained(folder)
    head = model.get_output_embeddings().weight
    state = {
        name: tensor for name, tensor in unsaved_state(model).items() if not name.startswith(("lm_head", "embed_out"))
    } | {"score.weight": torch.randn(1, tiny.D_MODEL)}  # fmt: skip
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tied = head is model.get_input_embeddings().weight
    truth = {name: t for name, t in state_of(model).items() if tied or not name.startswith(("lm_head", "embed_out"))}
    return Written(folder, truth, (r"left aside: score\. \(1\)", *(() if tied else ("holds no unembedding",))))


def without_head(model: Any, folder: Path) -> Written:
    """What AutoModel.save_pretrained writes: no prefix and no head."""
    model.base_model.save_pretrained(folder)
    model.config.save_pretrained(folder)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    truth = {name: t for name, t in state_of(model).items() if tied or not name.startswith(("lm_head", "embed_out"))}
    return Written(folder, truth, () if tied else ("holds no unembedding",))


def two_heads(model: Any, folder: Path) -> Written:
    """Tied by its configuration, with two different tensors in the file: transformers keeps both."""
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    saved(model, folder)
    config.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = load_file(path)
    head = "embed_out.weight" if "embed_out.weight" in state else "lm_head.weight"
    state[head] = torch.randn(model.get_output_embeddings().weight.shape)
    save_file(state, path, metadata={"format": "pt"})
    return Written(folder, loaded(folder), ("its files hold two that differ",), tied=False)


def more_layers(model: Any, folder: Path) -> Written:
    """A configuration that was not updated: the file has a layer more, which transformers passes by."""
    saved(model, folder)
    path = folder / "model.safetensors"
    state = load_file(path)
    last = {n.replace(".1.", ".2.", 1): t.clone() for n, t in state.items() if ".1." in n}
    save_file(state | last, path, metadata={"format": "pt"})
    return Written(folder, loaded(folder), (rf"{len(last)} tensors .* no place in a language model of 2 layers",))


def stale_adapter_config(model: Any, folder: Path) -> Written:
    """A merged model saved over its adapter's folder, whose configuration stayed."""
    saved(model, folder)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "gone"}))
    return Written(folder, state_of(model), ("whole weights beside an adapter_config.json",))


def left_over_factors(model: Any, folder: Path) -> Written:
    """Merged, and saved with the factors still in it: transformers passes them by."""
    saved(model, folder)
    path = folder / "model.safetensors"
    state = load_file(path)
    module = next(name for name in state if name.endswith(("q_proj.weight", "c_attn.weight", "query_key_value.weight")))
    factors = {module.replace(".weight", f".lora_{side}.default.weight"): torch.randn(3, 3) for side in "AB"}
    save_file(state | factors, path, metadata={"format": "pt"})
    return Written(folder, loaded(folder), ("2 tensors of .* left aside",))


MODELS: tuple[Callable[[Any, Path], Written], ...] = (
    transformers_single, transformers_shards, transformers_bin, transformers_bfloat16, trainer, compiled, data_parallel,
    compiled_data_parallel, fsdp, lightning, deepspeed_states, value_head, reward_model, without_head, two_heads,
    more_layers, stale_adapter_config, left_over_factors,
)  # fmt: skip

MODEL_ARCHITECTURES = ("gpt2", "llama", "gemma2", "neox", "qwen3", "phi")


# --- adapters --------------------------------------------------------------------------------------------------------

TARGETS = {
    "gpt2": ["c_attn", "c_fc", "attn.c_proj"],
    "neox": ["query_key_value", "dense", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
    "gemma1": ["q_proj", "v_proj", "gate_proj", "down_proj"],
}
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens", "gemma1": "embed_tokens"}


@dataclass
class Adapted:
    """A base with a trained adapter, and the same after PEFT has loaded and merged it."""

    architecture: str
    model: Any
    """The PeftModel."""
    folder: Path
    """Where PEFT saved it."""
    truth: State | None = None
    """What `merged` gives, where it is known."""

    def merged(self) -> State:
        """What PEFT makes of the folder on a fresh base."""
        import peft

        if self.truth is not None:
            return self.truth
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(hf_model(self.architecture), self.folder)
            return state_of(model.merge_and_unload())


def adapted(architecture: str, folder: Path, config: Any = None, **options: Any) -> Adapted:
    """Train (that is, disturb) an adapter and let PEFT save it; without options a copy of one that is made once."""
    if config is not None or options:
        return _adapted(architecture, folder, config, **options)
    plain = _plain(architecture)
    shutil.copytree(plain.folder, folder, dirs_exist_ok=True)
    return replace(plain, folder=folder, model=copy.deepcopy(plain.model))


@functools.cache
def _plain(architecture: str) -> Adapted:
    made = _adapted(architecture, place() / f"plain-{architecture}", None)
    return replace(made, truth=made.merged())


def _adapted(architecture: str, folder: Path, config: Any, **options: Any) -> Adapted:
    import peft

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        if config is None:
            options = {
                "r": 3,
                "lora_alpha": 5,
                "target_modules": TARGETS[architecture],
                "task_type": "CAUSAL_LM",
            } | options
            config = peft.LoraConfig(fan_in_fan_out=architecture == "gpt2", **options)
        model = peft.get_peft_model(hf_model(architecture), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return Adapted(architecture, model, folder)


def _written(made: Adapted, *notes: str, **options: Any) -> Written:
    return Written(made.folder, made.merged(), notes, **options)


def peft_plain(architecture: str, folder: Path) -> Written:
    return _written(adapted(architecture, folder), "rounding_share is 0")


def peft_rslora(architecture: str, folder: Path) -> Written:
    return _written(adapted(architecture, folder, use_rslora=True))


def peft_patterns(architecture: str, folder: Path) -> Written:
    first, second = TARGETS[architecture][:2]
    patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {rf".*\.1\..*{second}": 9}}
    return _written(adapted(architecture, folder, **patterns))


def peft_all_biases(architecture: str, folder: Path) -> Written:
    return _written(adapted(architecture, folder, bias="all"))


def peft_lora_biases(architecture: str, folder: Path) -> Written:
    return _written(adapted(architecture, folder, bias="lora_only"))


def peft_saved_head(architecture: str, folder: Path) -> Written:
    tied = False if architecture in ("gpt2", "gemma1") else None
    return _written(adapted(architecture, folder, modules_to_save=["lm_head"]), "also changes", tied=tied)


def peft_saved_embedding(architecture: str, folder: Path) -> Written:
    tied = False if architecture in ("gpt2", "gemma1") else None
    return _written(adapted(architecture, folder, modules_to_save=[EMBEDDING[architecture]]), "also changes", tied=tied)


def peft_saved_matrix(architecture: str, folder: Path) -> Written:
    targets = TARGETS[architecture]
    return _written(adapted(architecture, folder, target_modules=targets[:1], modules_to_save=targets[1:2]))


def peft_on_head(architecture: str, folder: Path) -> Written:
    return _written(adapted(architecture, folder, target_modules=[*TARGETS[architecture], "lm_head"]), "also changes")


def peft_on_embedding(architecture: str, folder: Path) -> Written:
    targets = [*TARGETS[architecture], EMBEDDING[architecture]]
    return _written(adapted(architecture, folder, target_modules=targets), "also changes")


def peft_token_rows(architecture: str, folder: Path) -> Written:
    rows = {EMBEDDING[architecture]: [3, 7, 95]}
    return _written(adapted(architecture, folder, trainable_token_indices=rows), "also changes")


def peft_bin(architecture: str, folder: Path) -> Written:
    made = adapted(architecture, folder)
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()
    return _written(made)


def _rewritten(made: Adapted, rename: Callable[[str], str]) -> Written:
    """The adapter's tensors under other names; what they mean is as before."""
    truth = made.merged()
    path = made.folder / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    return Written(made.folder, truth)


def doubled_prefix(architecture: str, folder: Path) -> Written:
    return _rewritten(adapted(architecture, folder), lambda name: f"base_model.model.{name}")


def no_prefix(architecture: str, folder: Path) -> Written:
    return _rewritten(adapted(architecture, folder), lambda name: name.removeprefix("base_model.model."))


def compiled_adapter(architecture: str, folder: Path) -> Written:
    return _rewritten(
        adapted(architecture, folder), lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.")
    )


def fsdp_adapter(architecture: str, folder: Path) -> Written:
    return _rewritten(adapted(architecture, folder), lambda name: f"_fsdp_wrapped_module.{name}")


def data_parallel_adapter(architecture: str, folder: Path) -> Written:
    return _rewritten(adapted(architecture, folder), lambda name: f"module.{name}")


def named_adapter(architecture: str, folder: Path) -> Written:
    """With the adapter's name left in, as a state dict filtered by hand has it."""
    return _rewritten(adapted(architecture, folder), lambda name: name.replace(".weight", ".default.weight"))


def _full(made: Adapted, dtype: torch.dtype | None = None) -> Written:
    """The whole state dict of a PeftModel in the place of the adapter's."""
    truth = made.merged()
    state = unsaved_state(made.model)
    if dtype is not None:
        state = {n: t if "lora_" in n else t.to(dtype) for n, t in state.items()}
    save_file(state, made.folder / "adapter_model.safetensors")
    return Written(made.folder, truth, (r"copies of frozen weights in .* equal the base's",), base=True)


def full_state(architecture: str, folder: Path) -> Written:
    return _full(adapted(architecture, folder))


def full_state_bfloat16(architecture: str, folder: Path) -> Written:
    """The frozen weights as they were loaded: a difference in format is no change."""
    return _full(adapted(architecture, folder), torch.bfloat16)


def full_state_beside_config(architecture: str, folder: Path) -> Written:
    """What accelerate's save_model writes: model.safetensors and the base's config.json."""
    made = adapted(architecture, folder)
    written = _full(made)
    (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
    made.model.get_base_model().config.save_pretrained(folder)
    return written


def old_layout(architecture: str, folder: Path) -> Written:
    """PEFT before 0.6 had no base_layer: the frozen weight stands plain beside its factors."""
    made = adapted(architecture, folder)
    truth = made.merged()
    state = {n.replace(".base_layer", ""): t.clone().contiguous() for n, t in made.model.state_dict().items()}
    save_file(state, folder / "adapter_model.safetensors")
    return Written(folder, truth, (r"copies of frozen weights in .* equal the base's",), base=True)


def zero3_full_state(architecture: str, folder: Path) -> Written:
    """Of a model that ZeRO-3 spread over processes: what was not gathered is empty."""
    made = adapted(architecture, folder)
    truth = made.merged()
    state = {n: t.clone().contiguous() if "lora_" in n else torch.zeros(0) for n, t in made.model.state_dict().items()}
    save_file(state, folder / "adapter_model.safetensors")
    return Written(folder, truth)


def two_adapters(architecture: str, folder: Path) -> Written:
    """A second one in the same state dict, as TRL keeps its reference."""
    made = adapted(architecture, folder)
    truth, model = made.merged(), copy.deepcopy(made.model)
    model.add_adapter("reference", model.peft_config["default"])
    state = {n: t.clone().contiguous() for n, t in model.state_dict().items() if "lora_" in n}
    save_file(state, folder / "adapter_model.safetensors")
    return Written(folder, truth, (r"further adapter 'reference'",))


def unsloth(architecture: str, folder: Path) -> Written:
    """A regular expression for targets, a quantised base that is somewhere else, fields of its own."""
    made = adapted(architecture, folder)
    truth = made.merged()
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {
        "base_model_name_or_path": "unsloth/some-model-bnb-4bit", "target_modules": "(?:.*?(?:attn|mlp).*?)",
        "auto_mapping": {"unsloth_fixed": True}, "unsloth_version": "2026.1",
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return Written(folder, truth, ("trained from 'unsloth/some-model-bnb-4bit'",), base=True)


def trl_reward(architecture: str, folder: Path) -> Written:
    """An adapter of a reward model: the score beside the factors."""
    made = adapted(architecture, folder)
    truth = made.merged()
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": torch.randn(1, tiny.D_MODEL)}, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]})
    )
    return Written(folder, truth, (r"1 tensors of .* left aside",))


def lightning_adapter(architecture: str, folder: Path) -> Written:
    made = adapted(architecture, folder)
    truth = made.merged()
    state = {f"model.{n}": t for n, t in load_file(folder / "adapter_model.safetensors").items()}
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"epoch": 1, "state_dict": state}, folder / "last.ckpt")
    return Written(folder / "last.ckpt", truth)


def trainer_adapter(architecture: str, folder: Path) -> Written:
    made = adapted(architecture, folder / "checkpoint-20")
    torch.save({"state": {}}, made.folder / "optimizer.pt")
    (made.folder / "trainer_state.json").write_text('{"global_step": 20}')
    return _written(made)


def _kind(name: str, architectures: tuple[str, ...], **options: Any) -> Callable[[str, Path], Written]:
    """A writer of another kind of adapter, by the name of its configuration in PEFT."""

    def write(architecture: str, folder: Path) -> Written:
        import peft

        config = getattr(peft, name)
        fields: dict[str, Any] = {"target_modules": TARGETS[architecture]} | options
        if fields["target_modules"] is None:
            fields["target_modules"] = [EMBEDDING[architecture]]
        if hasattr(config, "fan_in_fan_out"):
            fields["fan_in_fan_out"] = architecture == "gpt2"
        if name == "IA3Config":
            fields["feedforward_modules"] = TARGETS[architecture][-1:]
        return _written(adapted(architecture, folder, config(**fields)), base=True)

    options_in_words = [key if value is True else str(value) for key, value in options.items() if value is not None]
    write.__name__ = "_".join([name.removesuffix("Config").lower(), *options_in_words])
    ONLY[write] = architectures
    return write


ONLY: dict[Callable[[str, Path], Written], tuple[str, ...]] = {}
"""Architectures that a writer knows, where it does not know all."""

ADAPTERS: tuple[Callable[[str, Path], Written], ...] = (
    peft_plain, peft_rslora, peft_patterns, peft_all_biases, peft_lora_biases, peft_saved_head, peft_saved_embedding,
    peft_saved_matrix, peft_on_head, peft_on_embedding, peft_token_rows, peft_bin, doubled_prefix, no_prefix,
    compiled_adapter, fsdp_adapter, data_parallel_adapter, named_adapter, full_state, full_state_bfloat16,
    full_state_beside_config, old_layout, zero3_full_state, two_adapters, unsloth, trl_reward, lightning_adapter,
    trainer_adapter,
    _kind("LoraConfig", ("gpt2", "llama"), r=3, lora_alpha=5, use_dora=True),
    _kind("LoraConfig", ("llama",), r=3, lora_alpha=3, init_lora_weights="pissa"),
    _kind("LoraConfig", ("llama",), r=3, lora_alpha=3, init_lora_weights="olora"),
    _kind("AdaLoraConfig", ("gpt2", "llama"), init_r=4, target_r=2, lora_alpha=5, total_step=10),
    _kind("VeraConfig", ("llama",), r=3),
    _kind("IA3Config", ("gpt2", "neox")),
    _kind("LoHaConfig", ("llama", "neox"), r=3, alpha=5),
    _kind("LoKrConfig", ("llama", "neox"), r=3, alpha=5),
    _kind("OFTConfig", ("llama",), r=0, oft_block_size=4),
    _kind("BOFTConfig", ("llama",), boft_block_size=4),
    _kind("HRAConfig", ("llama",), r=2),
    _kind("MissConfig", ("llama",), r=4),
    _kind("FourierFTConfig", ("gpt2", "llama"), n_frequency=20),
    _kind("LoraConfig", ("gpt2",), r=3, lora_alpha=5, lora_bias=True),
    _kind("LNTuningConfig", ("llama",), target_modules=["input_layernorm", "norm"]),
    _kind("TrainableTokensConfig", ("gpt2", "llama"), target_modules=None, token_indices=[3, 7]),
)  # fmt: skip

ADAPTER_ARCHITECTURES = ("gpt2", "llama", "gemma1")


# --- all of them -----------------------------------------------------------------------------------------------------


@functools.cache
def place() -> Path:
    # beside the tiny models, whose folder goes with the process
    return Path(tempfile.mkdtemp(dir=tiny.hf_directory("gpt2").parent))


def cases() -> Iterator[tuple[str, str]]:
    """Writer and architecture of every input."""
    for writer in MODELS:
        yield from ((writer.__name__, architecture) for architecture in MODEL_ARCHITECTURES)
    for write in ADAPTERS:
        yield from ((write.__name__, architecture) for architecture in ONLY.get(write, ADAPTER_ARCHITECTURES))


def write(writer: str, architecture: str) -> Written:
    """Write one input into a fresh folder."""
    folder = Path(tempfile.mkdtemp(dir=place()))
    shutil.rmtree(folder)
    folder.mkdir()
    of_models = {w.__name__: w for w in MODELS}
    if writer in of_models:
        return of_models[writer](hf_model(architecture, delta=0.05), folder)
    return {w.__name__: w for w in ADAPTERS}[writer](architecture, folder)
