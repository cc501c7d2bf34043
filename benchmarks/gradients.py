"""Cost of `gradient_covariance` at GPT-2-small shape, against one bare forward and backward pass on the same tokens.

    python benchmarks/gradients.py             # prints the table, writes benchmarks/results/gradients-<device>.json
    python benchmarks/gradients.py --tokens 2048 --rounds 1

Every measurement runs in a process of its own. Times are compared as ratios within one process, interleaved, medians
over the rounds; memory is the peak resident set above what the loaded model holds (allocated bytes on CUDA). Random
weights: cost does not depend on what was learned. kronfluence fits the covariances of the same Hugging Face model (its
linear layers, heads side by side) on the same tokens in the same process, ours then through TransformerBridge; without
kronfluence that part is left out. The last two columns of the table are the bound and whether it held.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from measure import Row, apart, memory_meter, table
from pair import BATCH, RESULTS, SEQUENCE, SHAPE, tokens_of

PEER_LAYERS = 4
"""The comparison with kronfluence takes fewer layers of the same shape, for time's sake."""


def load_model(device: str) -> Any:
    """A HookedTransformer of GPT-2-small shape."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(**SHAPE, act_fn="gelu_new", normalization_type="LN", seed=0, device=device)
    return HookedTransformer(config).eval()


def token_batches(tokens: torch.Tensor) -> list[Any]:
    """All tokens but the first of each sequence are targets."""
    from tl_asymmetry.objectives import TokenBatch

    return [TokenBatch(part, torch.ones_like(part, dtype=torch.bool)) for part in tokens.split(BATCH)]


def bare(model: Any, batches: list[Any], device: str) -> None:
    """The yardstick: loss and gradients of every parameter, as in training, and nothing else."""
    from tl_asymmetry.objectives import CrossEntropy

    for batch in batches:
        CrossEntropy()(model, batch.to(torch.device(device))).backward()
        model.zero_grad(set_to_none=True)
    if device != "cpu":
        torch.cuda.synchronize()


def frozen_bare(model: Any, batches: list[Any], device: str) -> None:
    """The same without weight gradients: back to the embedding only, which is all our own passes need."""
    from tl_asymmetry import ModelView
    from tl_asymmetry.models.backward import outer_products
    from tl_asymmetry.objectives import CrossEntropy

    view = ModelView(model)
    for batch in batches:
        with outer_products(view, [], lambda *_: None) as backward:
            backward.run(CrossEntropy()(view, batch.to(torch.device(device))))
    if device != "cpu":
        torch.cuda.synchronize()


def package(model: Any, batches: list[Any], **options: Any) -> None:
    """The whole measurement, result in hand."""
    from tl_asymmetry import gradient_covariance
    from tl_asymmetry.objectives import CrossEntropy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few sequences, few groups
        gradient_covariance(model, CrossEntropy(), batches, progress=False, **options)


def collection(model: Any, batches: list[Any], **options: Any) -> None:
    """The moments alone, without spectra and tables: what kronfluence's covariance fit amounts to."""
    from tl_asymmetry import ModelView
    from tl_asymmetry.gradients.capture import capture_gradients
    from tl_asymmetry.objectives import CrossEntropy

    view = ModelView(model)
    defaults = {"groups": 1, "halves": False, "permutations": 0, "seed": 0, "progress": False}
    capture_gradients(view, CrossEntropy(), batches, view.matrices, **(defaults | options))


def interleaved(runs: dict[str, Callable[[], None]], rounds: int, yardstick: str) -> dict[str, Any]:
    """Seconds of each run, and the median of its ratio to the yardstick of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(t / f for t, f in zip(times, seconds[yardstick], strict=True))
        for name, times in seconds.items()
    }
    return {"seconds": seconds, "ratio": ratios}


def measure_times(device: str, rounds: int, count: int) -> dict[str, Any]:
    """Bare passes and the package, interleaved."""
    model = load_model(device)
    batches = token_batches(tokens_of(count))
    runs: dict[str, Callable[[], None]] = {
        "bare": lambda: bare(model, batches, device),
        "bare, frozen": lambda: frozen_bare(model, batches, device),
        "no intervals": lambda: package(model, batches, groups=1),
        "8 groups": lambda: package(model, batches, groups=8),
        "collection": lambda: collection(model, batches, full_mlp=False),
    }
    bare(model, batches[:1], device)
    package(model, batches[:1], groups=1)
    return interleaved(runs, rounds, "bare")


def measure_memory(device: str, what: str, count: int) -> dict[str, Any]:
    """Peak bytes above the loaded model of one measurement, or of bare passes, in this fresh process."""
    model = load_model(device)
    import tl_asymmetry  # noqa: F401 - code is no part of the peak

    batches = token_batches(tokens_of(count))
    bare(model, batches[:1], device)
    reset, peak = memory_meter(device)
    before = reset()
    start = time.perf_counter()
    if what == "bare":
        bare(model, batches, device)
    else:
        package(model, batches, groups=1)
    return {"bytes": peak() - before, "seconds": time.perf_counter() - start}


def measure_peer(device: str, rounds: int, count: int) -> dict[str, Any]:
    """kronfluence's covariance collection and ours, on one Hugging Face model, interleaved."""
    import kronfluence  # noqa: F401 - absent: left out
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    class NextToken(Task):
        """Cross-entropy on the given tokens (the empirical Fisher)."""

        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            logits = model(batch[0], use_cache=False).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            names = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
            return [f"gpt_neox.layers.{layer}.{name}" for layer in range(PEER_LAYERS) for name in names]

        def get_attention_mask(self, batch: Any) -> None:
            return None

    config = GPTNeoXConfig(
        hidden_size=SHAPE["d_model"], intermediate_size=SHAPE["d_mlp"], num_hidden_layers=PEER_LAYERS,
        num_attention_heads=SHAPE["n_heads"], vocab_size=SHAPE["d_vocab"], max_position_embeddings=SHAPE["n_ctx"],
        use_parallel_residual=False, attn_implementation="eager",
    )  # fmt: skip
    folder = tempfile.TemporaryDirectory()
    GPTNeoXForCausalLM(config).save_pretrained(folder.name)
    ours = TransformerBridge.boot_transformers(folder.name, device=device, dtype=torch.float32)
    theirs = prepare_model(GPTNeoXForCausalLM.from_pretrained(folder.name).to(device).eval(), NextToken())
    tokens = tokens_of(count)
    batches, dataset = token_batches(tokens), TensorDataset(tokens)
    analyzer = Analyzer(
        "benchmark", theirs, NextToken(), cpu=device == "cpu", disable_tqdm=True, output_dir=f"{folder.name}/factors"
    )
    arguments = FactorArguments(use_empirical_fisher=True)

    def covariances() -> None:
        analyzer.fit_covariance_matrices(
            "factors", dataset, per_device_batch_size=BATCH, factor_args=arguments, overwrite_output_dir=True
        )

    runs: dict[str, Callable[[], None]] = {
        "kronfluence": covariances,
        "collection, full d_mlp": lambda: collection(ours, batches, full_mlp=True),
        "collection": lambda: collection(ours, batches, full_mlp=False),
        "whole": lambda: package(ours, batches, groups=1),
    }
    collection(ours, batches[:1], full_mlp=False)
    with folder:
        return interleaved(runs, rounds, "kronfluence")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, count = options.device, options.tokens
    if options.only:
        what, *rest = options.only
        try:
            measured = {
                "times": lambda: measure_times(device, options.rounds, count),
                "memory": lambda: measure_memory(device, rest[0], int(rest[1])),
                "peer": lambda: measure_peer(device, options.rounds, count // 2),
            }[what]()
        except ModuleNotFoundError as error:
            sys.stderr.write(str(error))
            sys.exit(3)
        sys.stdout.write("\n" + json.dumps(measured))
        return

    common = ("--device", device, "--rounds", str(options.rounds), "--tokens", str(count), "--only")
    times = apart(__file__, *common, "times")
    few, many = BATCH * SEQUENCE * 2, BATCH * SEQUENCE * 8
    asked = {"bare": ("bare", few), "few": ("package", few), "many": ("package", many)}
    memory = {name: apart(__file__, *common, "memory", what, str(n)) for name, (what, n) in asked.items()}
    peer = apart(__file__, *common, "peer")
    peaks = {name: measured["bytes"] for name, measured in memory.items() if measured is not None}
    if times is None or len(peaks) < len(asked):
        raise RuntimeError("expected the package to be installed")
    ratio = times["ratio"]
    rows: list[Row] = [
        ("time / bare forward and backward", ratio["no intervals"], "<=", 1.6),
        ("time with 8 groups / bare", ratio["8 groups"], "", None),
        ("collection alone / bare", ratio["collection"], "", None),
        ("time / bare without weight gradients", ratio["no intervals"] / ratio["bare, frozen"], "", None),
        (f"peak MB, {few} tokens", peaks["few"] / 1e6, "", None),
        ("peak / peak of bare passes", peaks["few"] / peaks["bare"], "", None),
        (f"peak at {many} tokens / at {few}", peaks["many"] / peaks["few"], "<=", 1.05),
    ]
    if peer is not None:
        rows += [
            ("collection with full d_mlp moments / kronfluence", peer["ratio"]["collection, full d_mlp"], "", None),
            ("collection / kronfluence", peer["ratio"]["collection"], "", None),
            ("whole measurement / kronfluence's collection", peer["ratio"]["whole"], "", None),
        ]
    name = torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()}-core CPU"
    document = {
        "device": name,
        "machine": platform.machine(),
        "versions": {package: _version(package) for package in ("torch", "transformer-lens", "kronfluence")},
        "shape": SHAPE,
        "tokens": count,
        "rows": table(rows),
        "times": times,
        "memory": memory,
        "peer": None if peer is None else peer | {"layers": PEER_LAYERS, "tokens": count // 2},
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"gradients-{'cpu' if device == 'cpu' else name.lower().replace(' ', '-')}.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(f"written: {target}\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
