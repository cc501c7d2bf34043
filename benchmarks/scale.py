"""How cost grows: an aligned model of Llama-3.2-1B's shape streamed from shards, and growth with every size.

    python benchmarks/scale.py                       # generates 5 GB of random weights, measures, deletes them
    python benchmarks/scale.py --small               # growth alone, minutes
    python benchmarks/scale.py --small --growth ranks     # of one size; the others stay in the JSON as they are

Prints tables and writes benchmarks/results/scale-large-cpu.json and scale-growth-cpu.json. Every measurement runs in a
process of its own. Memory is the peak resident set above what the loaded base holds, mapped pages of the shards
included; "beyond the moments" is that less the moments of the layers of one pass. Growth of memory is that of what is
held at once. Exponents are slopes of log(seconds) on log(size), processor seconds of one thread, medians of the rounds;
a fixed cost makes them smaller than 1. The leading stage of a size is the one that `estimate_pair` gives most time.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Row, apart, map_blocks, memory_meter, table
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results"
LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 131_072,
    "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MEDIUM = {**LLAMA, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
          "head_dim": 32, "vocab_size": 1000}  # fmt: skip
SHARD = 500_000_000
SEQUENCE = 128
TOKENS, LAYERS = 2048, 2
LARGE_TOKENS = 512
RANKS = [1, 4, 16, 64, 128]
GROWTH = {"layers": [1, 2, 4], "width": [128, 256, 512], "heads": [4, 8, 16, 32], "groups": [2, 4, 8, 16],
          "tokens": [2048, 8192, 16_384], "ranks": [1, 8, 64], "checkpoints": [2, 4, 8]}  # fmt: skip
BOUNDED = {"layers": 1.1, "tokens": 1.1, "ranks": 1.1, "checkpoints": 1.1, "heads": 1.1, "groups": 1.1}
"""What seconds must not grow faster with than in proportion; eigensolves grow as the cube of the width."""
FLAT = ("tokens", "checkpoints")
"""What memory must not grow with."""


def write_pair(folder: Path, shape: dict[str, Any]) -> None:
    """Two model directories with random bf16 weights in shards, the aligned one a small step from the base."""
    from transformers import LlamaConfig

    from tl_asymmetry.models.readers.blueprint import Skeleton

    config = LlamaConfig(**shape)
    shapes = Skeleton(config).shapes
    shards: list[list[str]] = [[]]
    held = 0
    for parameter, size in shapes.items():
        held += 2 * int(np.prod(size))
        if held > SHARD and shards[-1]:
            shards.append([])
            held = 2 * int(np.prod(size))
        shards[-1].append(parameter)
    seeds = {parameter: seed for seed, parameter in enumerate(shapes)}
    for name, step in (("base", 0.0), ("aligned", 1e-3)):
        config.save_pretrained(folder / name)
        _tokenizer().save_pretrained(folder / name)
        listed = {}
        for number, parameters in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file({p: _weights(shapes[p], step, seeds[p]) for p in parameters}, folder / name / file)
            listed |= dict.fromkeys(parameters, file)
        index = {"metadata": {}, "weight_map": listed}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))


def _tokenizer() -> Any:
    """Loading wants one; nothing is read with it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="a", eos_token="b", pad_token="b")


def _weights(size: tuple[int, ...], step: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(size, generator=generator).mul_(0.02) if len(size) > 1 else torch.ones(size)
    if step:
        W += torch.randn(size, generator=generator).mul_(step)
    return W.bfloat16()


def tokens_of(count: int, vocabulary: int) -> torch.Tensor:
    """Random token ids `[count / SEQUENCE, SEQUENCE]`."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(vocabulary, (count // SEQUENCE, SEQUENCE), generator=generator)


def measure_large(folder: Path, layers_per_pass: int) -> dict[str, Any]:
    """One analysis with the aligned weights streamed: peak memory above the loaded base, seconds."""
    from tl_asymmetry import ModelView, analyze_pair, estimate_pair, weights_from
    from tl_asymmetry.models.checks import finite_check
    from tl_asymmetry.models.loading import open_model
    from tl_asymmetry.results.provenance import weights_hash

    base = open_model(folder / "base", torch.bfloat16, device="cpu")
    tokens = tokens_of(LARGE_TOKENS, LLAMA["vocab_size"])
    options: dict[str, Any] = {
        "tokens": tokens, "ranks": RANKS, "groups": 1, "batch_size": 2, "layers_per_pass": layers_per_pass,
    }  # fmt: skip
    start = time.perf_counter()
    weights = weights_from(folder / "aligned")
    opened = time.perf_counter()
    weights_hash(weights, each=finite_check(weights))
    checked = time.perf_counter()
    estimate = estimate_pair(base, weights, **options)
    view = ModelView(base)
    width = view.d_model * (view.d_model + 1) // 2 * 8
    moments = layers_per_pass * 4 * width  # attn_in, mlp_in, resid_mid, resid_post
    weights_hash(view)  # the base is mapped from its files: all of it is in memory only once it has been read
    reset, peak = memory_meter("cpu")
    before = reset()
    begun = time.perf_counter()
    result = analyze_pair(base, folder / "aligned", progress=False, **options)
    seconds = time.perf_counter() - begun
    gigabytes = weights.bytes / 1e9
    return {
        "gigabytes": gigabytes,
        "base_bytes": before,
        "peak_bytes": peak() - before,
        "moments_bytes": moments,
        "beyond_moments": peak() - before - moments,
        "estimated_bytes": estimate.peak_bytes,
        "seconds": seconds,
        "estimated_seconds": estimate.seconds,
        "open_seconds": opened - start,
        "check_seconds_per_gb": (checked - opened) / gigabytes,
        "seconds_per_gb": seconds / gigabytes,
        "rows": len(result.table),
    }


def measure_growth(folder: Path, what: str, rounds: int) -> dict[str, Any]:
    """Seconds of an analysis of medium width at every size of one thing, and the stage that takes most of them."""
    from tl_asymmetry import estimate_pair

    torch.set_num_threads(1)
    seconds, leading = [], []
    for size in GROWTH[what]:
        run, pair, options = _analysis(_medium_pair(folder, what, size), what, size)
        if not seconds:
            run(options | {"matrices": ["W_Q"], "ranks": [1], "groups": 1})  # what is imported and set up once
        stages = estimate_pair(*pair, **options).table
        leading.append(str(stages.loc[stages["seconds"].idxmax(), "stage"]))
        seconds.append(statistics.median(run(options) for _ in range(rounds)))
    return {"seconds": seconds, "leading": leading}


def measure_held(folder: Path, what: str, size: int) -> dict[str, Any]:
    """Peak of what an analysis holds at one size."""
    torch.set_num_threads(1)
    run, _, options = _analysis(_medium_pair(folder, what, size), what, size)
    run(options | {"tokens": options["tokens"][:8]})
    map_blocks()
    reset, peak = memory_meter("cpu")
    before = reset()
    run(options)
    return {"peak_bytes": peak() - before}


def _analysis(
    folder: Path, what: str, size: int
) -> tuple[Callable[[dict[str, Any]], float], tuple[Any, Path], dict[str, Any]]:
    """A run that gives its processor seconds, what it is of, and its arguments."""
    from tl_asymmetry import analyze_pair, analyze_trajectory
    from tl_asymmetry.models.loading import open_model

    base = open_model(folder / "base", device="cpu")
    counts = {"tokens": size, "checkpoints": 1024}
    options: dict[str, Any] = {
        "tokens": tokens_of(counts.get(what, TOKENS), MEDIUM["vocab_size"]),
        "ranks": list(range(1, 1 + size)) if what == "ranks" else [1, 16, 64],
        "groups": size if what == "groups" else 4,
        "progress": False,
    }

    def training() -> Iterator[tuple[int, Any]]:
        """A model that walks at random."""
        yield 0, base
        model = open_model(folder / "aligned", device="cpu")
        for step in range(1, size + 1):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1e-3 * torch.randn_like(parameter))
            yield step, model

    def run(given: dict[str, Any]) -> float:
        start = time.process_time()
        if what == "checkpoints":
            analyze_trajectory(training(), **given)
        else:
            analyze_pair(base, folder / "aligned", **given)
        return time.process_time() - start

    return run, (base, folder / "aligned"), options


def measure_processes(folder: Path) -> dict[str, Any]:
    """Seconds of the same analysis in this process and, under torchrun, in its neighbours."""
    from tl_asymmetry import analyze_pair
    from tl_asymmetry.models.loading import open_model
    from tl_asymmetry.models.processes import started_processes

    torch.set_num_threads(1)
    with started_processes() as processes:
        base = open_model(folder / "base", device="cpu")
        tokens = tokens_of(8192, MEDIUM["vocab_size"])
        times = []
        for _ in range(4):
            start = time.perf_counter()
            analyze_pair(base, folder / "aligned", tokens=tokens, ranks=[1, 16, 64], groups=4, progress=False)
            times.append(time.perf_counter() - start)
        return {"seconds": statistics.median(times[1:]), "rank": processes.rank}


def measure_dimension(folder: Path, what: str, rounds: int) -> dict[str, Any]:
    """Sizes, seconds, peaks, exponent and leading stages of one size; of "processes" the seconds of one and of two."""
    if what == "processes":
        return {count: _seconds_of_processes(folder, count) for count in ("1", "2")}
    sizes = GROWTH[what]
    measured = apart(__file__, "--only", "growth", str(folder), what, str(rounds)) or {}
    ends = (sizes[0], sizes[-1]) if what in FLAT else ()
    peaks = [apart(__file__, "--only", "held", str(folder), what, str(size)) or {} for size in ends]
    exponent = float(np.polyfit(np.log(sizes), np.log(measured["seconds"]), 1)[0])
    return {"sizes": sizes, **measured, "exponent": exponent, "peak_bytes": [held["peak_bytes"] for held in peaks]}


def _seconds_of_processes(folder: Path, count: str) -> float:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count)
    part = folder / f"processes{count}"
    apart(*launcher, __file__, "--only", "processes", str(_medium_pair(folder, "layers", 8)), str(part))
    return float(json.loads(part.read_text())["seconds"])


def _medium_pair(folder: Path, what: str, size: int) -> Path:
    """A pair of medium size, but for one of its sizes."""
    shape = {**MEDIUM, "num_hidden_layers": size if what == "layers" else LAYERS}
    if what == "width":
        heads = size // 32
        shape |= {"hidden_size": size, "intermediate_size": 4 * size, "num_attention_heads": heads,
                  "num_key_value_heads": heads // 2, "num_hidden_layers": 1}  # fmt: skip
    elif what == "heads":
        shape |= {"num_attention_heads": size, "num_key_value_heads": size // 2, "head_dim": 256 // size}
    pair = folder / (f"{what}{size}" if what in ("layers", "width", "heads") else f"layers{LAYERS}")
    if not pair.exists():
        write_pair(pair, shape)
    return pair


def growth_rows(growth: dict[str, Any]) -> list[Row]:
    """The table of what was measured."""
    rows: list[Row] = []
    for what in (name for name in GROWTH if name in growth):
        measured = growth[what]
        bound = BOUNDED.get(what)
        leading = " → ".join(dict.fromkeys(measured.get("leading", ())))
        name = f"exponent of seconds in {what}" + (f" (most: {leading})" if leading else "")
        rows.append((name, measured["exponent"], "" if bound is None else "<=", bound))
        if what in FLAT:
            times = measured["sizes"][-1] // measured["sizes"][0]
            peaks = measured["peak_bytes"]
            rows.append((f"peak at {times} x {what} / peak", peaks[-1] / peaks[0], "<=", 1.1))
    if "processes" in growth:
        seconds = growth["processes"]
        rows.append(("seconds, 1 process / 2 processes", seconds["1"] / seconds["2"], "", None))
    return rows


def large_rows(large: dict[str, Any], layers: int) -> list[Row]:
    """The table of the large model."""
    return [
        ("layers of the large model", float(layers), "", None),
        ("aligned weights, GB", large["gigabytes"], "", None),
        ("base in memory, GB", large["base_bytes"] / 1e9, "", None),
        ("peak above the base, GB", large["peak_bytes"] / 1e9, "", None),
        ("moments of one pass, GB", large["moments_bytes"] / 1e9, "", None),
        ("beyond the moments, GB", large["beyond_moments"] / 1e9, "<=", 1.0),
        ("peak / estimate", large["peak_bytes"] / large["estimated_bytes"], "", None),
        ("seconds", large["seconds"], "", None),
        ("seconds / estimate", large["seconds"] / large["estimated_seconds"], "", None),
        ("seconds to open", large["open_seconds"], "", None),
        ("seconds per GB, read and checked", large["check_seconds_per_gb"], "", None),
        ("seconds per GB, analysed", large["seconds_per_gb"], "", None),
    ]


def report(name: str, rows: list[Row], shape: dict[str, Any], measured: dict[str, Any]) -> None:
    """Print a table and write it with what it was made of."""
    document = {
        "device": f"{torch.get_num_threads()}-core CPU",
        "machine": platform.machine(),
        "versions": {package: version(package) for package in ("torch", "transformer-lens", "transformers")},
        "shape": shape,
        "rows": table(rows),
        "measured": measured,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"scale-{name}-cpu.json").write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave the large model out")
    parser.add_argument("--folder", type=Path, help="where to generate (5 GB); a temporary folder by default")
    parser.add_argument("--layers-per-pass", type=int, default=4)
    parser.add_argument("--layers", type=int, default=LLAMA["num_hidden_layers"], help="of the large model")
    parser.add_argument("--large-only", action="store_true", help="leave growth out")
    parser.add_argument("--growth", nargs="+", choices=[*GROWTH, "processes"], help="measure growth of these alone")
    parser.add_argument("--rounds", type=int, default=3, help="of each growth measurement")
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        what, folder, *rest = options.only
        if what == "large":
            measured = measure_large(Path(folder), int(rest[0]))
        elif what == "growth":
            measured = measure_growth(Path(folder), rest[0], int(rest[1]))
        elif what == "held":
            measured = measure_held(Path(folder), rest[0], int(rest[1]))
        else:
            measured = measure_processes(Path(folder))
            if measured["rank"] == 0:
                Path(rest[0]).write_text(json.dumps(measured))
            return
        sys.stdout.write("\n" + json.dumps(measured))
        return

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if not options.large_only:
            held = RESULTS / "scale-growth-cpu.json"
            growth = json.loads(held.read_text())["measured"] if options.growth and held.is_file() else {}
            for what in options.growth or [*GROWTH, "processes"]:  # written after each: it takes minutes
                growth |= {what: measure_dimension(folder, what, options.rounds)}
                report("growth", growth_rows(growth), {**MEDIUM, "num_hidden_layers": LAYERS}, growth)
        if not options.small:
            if shutil.disk_usage(folder).free < 12e9:
                raise SystemExit(f"expected 12 GB of free disk in {folder}, pass --folder or --small")
            shape = {**LLAMA, "num_hidden_layers": options.layers}
            write_pair(folder / "large", shape)
            large = apart(__file__, "--only", "large", str(folder / "large"), str(options.layers_per_pass)) or {}
            report("large", large_rows(large, options.layers), shape, large)


if __name__ == "__main__":
    main()
