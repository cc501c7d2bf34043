"""Cost of `analyze_pair` at GPT-2-small shape: time against one bare forward pass, memory against the notebook way.

    python benchmarks/pair.py                  # prints the table, writes benchmarks/results/pair-<device>.json
    python benchmarks/pair.py --device cuda

Every measurement runs in a process of its own. Times are compared as ratios within one process, interleaved, medians
over the rounds; memory is the peak resident set above what the two loaded models hold (allocated bytes on CUDA).
Random weights: cost does not depend on what was learned. The last two columns of the table are the bound and whether
it held.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import Row, apart, memory_meter, table

SHAPE = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "d_vocab": 50_257, "n_ctx": 1024}
SEQUENCE = 128
BATCH = 8
TOKENS, MANY_TOKENS = 8_192, 32_768
RESULTS = Path(__file__).parent / "results"


def load_pair(device: str) -> tuple[Any, Any]:
    """Two HookedTransformers of GPT-2-small shape, the second a small random step from the first."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(**SHAPE, act_fn="gelu_new", normalization_type="LN", seed=0, device=device)
    base = HookedTransformer(config)
    aligned = HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, theirs in zip(aligned.parameters(), base.parameters(), strict=True):
            step = torch.randn(theirs.shape, generator=generator).to(theirs) * 1e-3
            mine.copy_(theirs + step)
    return base.eval(), aligned.eval()


def tokens_of(count: int) -> torch.Tensor:
    """Random token ids `[count / SEQUENCE, SEQUENCE]`."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(SHAPE["d_vocab"], (count // SEQUENCE, SEQUENCE), generator=generator)


def forward(model: Any, tokens: torch.Tensor, device: str) -> None:
    """The yardstick: logits of every batch, and nothing else."""
    with torch.no_grad():
        for batch in tokens.split(BATCH):
            model(batch.to(device))
    if device != "cpu":
        torch.cuda.synchronize()


def package(base: Any, aligned: Any, tokens: torch.Tensor, groups: int) -> None:
    """The whole analysis, result in hand."""
    from tl_asymmetry import analyze_pair

    analyze_pair(base, aligned, tokens=tokens, batch_size=BATCH, groups=groups, progress=False)


def notebook(base: Any, aligned: Any, tokens: torch.Tensor, device: str) -> None:
    """What a researcher would write today: cache everything, scikit-learn PCA per hook point, a loop over heads."""
    from sklearn.decomposition import PCA

    d, rank = SHAPE["d_model"], SHAPE["d_model"] // 16
    with torch.no_grad():
        _, cache = base.run_with_cache(tokens.to(device))
        rows = []
        W_U = (base.ln_final.w[:, None] * base.W_U).cpu().numpy()
        prediction = PCA(rank).fit(W_U.T).components_.T
        for layer in range(SHAPE["n_layers"]):
            for matrix, point in (("W_Q", "ln1.hook_normalized"), ("W_K", "ln1.hook_normalized"),
                                  ("W_V", "ln1.hook_normalized"), ("W_O", "hook_resid_mid")):  # fmt: skip
                x = cache[f"blocks.{layer}.{point}"].reshape(-1, d).cpu().numpy()
                own = PCA(rank).fit(x).components_.T
                for head in range(SHAPE["n_heads"]):
                    change = (getattr(aligned, matrix) - getattr(base, matrix))[layer, head].cpu().numpy()
                    change = change.T if matrix == "W_O" else change
                    for basis in (own, prediction):
                        inside = basis @ (basis.T @ change)
                        rows.append((layer, head, matrix, (inside**2).sum() / (change**2).sum() * d / rank))
            for matrix, point in (("W_in", "ln2.hook_normalized"), ("W_out", "hook_resid_post")):
                own = PCA(rank).fit(cache[f"blocks.{layer}.{point}"].reshape(-1, d).cpu().numpy()).components_.T
                change = (getattr(aligned, matrix) - getattr(base, matrix))[layer].cpu().numpy()
                change = change.T if matrix == "W_out" else change
                for basis in (own, prediction):
                    rows.append((layer, -1, matrix, ((basis.T @ change) ** 2).sum() / (change**2).sum() * d / rank))


def measure_times(device: str, rounds: int) -> dict[str, Any]:
    """Seconds of the bare pass and of the package, interleaved, and median ratios."""
    base, aligned = load_pair(device)
    tokens = tokens_of(TOKENS)
    runs: dict[str, Callable[[], None]] = {
        "forward": lambda: forward(base, tokens, device),
        "no intervals": lambda: package(base, aligned, tokens, 1),
        "8 groups": lambda: package(base, aligned, tokens, 8),
    }
    forward(base, tokens[:BATCH], device)
    package(base, aligned, tokens[: 4 * BATCH], 4)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: statistics.median(t / f for t, f in zip(times, seconds["forward"], strict=True))
        for name, times in seconds.items()
    }
    return {"seconds": seconds, "ratio": ratios}


def measure_memory(device: str, what: str, count: int) -> dict[str, Any]:
    """Peak bytes above the loaded models, and seconds, of one run in this fresh process."""
    base, aligned = load_pair(device)
    import tl_asymmetry  # noqa: F401 - code is no part of the peak

    tokens = tokens_of(count)
    forward(base, tokens[:1], device)
    reset, peak = memory_meter(device)
    before = reset()
    start = time.perf_counter()
    if what == "notebook":
        notebook(base, aligned, tokens, device)
    else:
        package(base, aligned, tokens, int(what))
    return {"bytes": peak() - before, "seconds": time.perf_counter() - start}


def measure_moments(device: str) -> dict[str, Any]:
    """One StreamingMoments against concept-erasure's LeaceFitter covariance: seconds, error, on the same batches."""
    from concept_erasure import LeaceFitter

    from tl_asymmetry.geometry import StreamingMoments

    d, batches, rows = SHAPE["d_model"], 40, BATCH * SEQUENCE
    generator = torch.Generator().manual_seed(3)
    scale = torch.logspace(0, -2, d)
    mean = torch.randn(d, generator=generator) * 3
    data = [(torch.randn(rows, d, generator=generator) * scale + mean).to(device) for _ in range(batches)]
    labels = [torch.zeros(rows, 1, device=device) for _ in range(batches)]
    exact = torch.cat([x.double() for x in data])
    exact = torch.cov(exact.T, correction=0)

    def ours() -> torch.Tensor:
        moments = StreamingMoments(d)
        for x in data:
            moments.update(x)
        return moments.covariance

    def theirs() -> torch.Tensor:
        fitter = LeaceFitter(d, 1, device=device)
        for x, z in zip(data, labels, strict=True):
            fitter.update(x, z)
        return fitter.sigma_xx_ / fitter.n

    seconds: dict[str, list[float]] = {"tl_asymmetry": [], "concept_erasure": []}
    errors = {}
    for _ in range(7):
        for name, run in (("tl_asymmetry", ours), ("concept_erasure", theirs)):
            start = time.perf_counter()
            covariance = run()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            errors[name] = ((covariance.double() - exact).norm() / exact.norm()).item()
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    return {"seconds": seconds, "ratio": ratio, "relative_error": errors}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    if options.only:
        what, *rest = options.only
        try:
            measured = {
                "times": lambda: measure_times(device, options.rounds),
                "memory": lambda: measure_memory(device, rest[0], int(rest[1])),
                "moments": lambda: measure_moments(device),
            }[what]()
        except ModuleNotFoundError as error:
            sys.stderr.write(str(error))
            sys.exit(3)
        sys.stdout.write("\n" + json.dumps(measured))
        return

    common = ("--device", device, "--rounds", str(options.rounds), "--only")
    times = apart(__file__, *common, "times")
    memory = {
        (what, count): apart(__file__, *common, "memory", what, str(count))
        for what, count in (
            ("1", TOKENS), ("1", MANY_TOKENS), ("8", TOKENS), ("8", MANY_TOKENS), ("notebook", TOKENS)
        )
    }  # fmt: skip
    moments = apart(__file__, *common, "moments")

    def peak(what: str, count: int = TOKENS) -> float | None:
        measured = memory[what, count]
        return None if measured is None else measured["bytes"] / 1e9

    rows: list[Row] = [
        ("time / bare forward, no intervals", times["ratio"]["no intervals"], "<=", 1.25),
        ("time / bare forward, 8 groups", times["ratio"]["8 groups"], "<=", 2.0),
        ("bare forward, seconds", statistics.median(times["seconds"]["forward"]), "", None),
        ("peak GB, no intervals", peak("1"), "<=", 0.6),
        ("peak GB, 8 groups", peak("8"), "<=", 1.6),
        ("peak at 4 x tokens / peak, no intervals", peak("1", MANY_TOKENS) / peak("1"), "<=", 1.05),
        ("peak at 4 x tokens / peak, 8 groups", peak("8", MANY_TOKENS) / peak("8"), "<=", 1.05),
    ]
    if memory["notebook", TOKENS] is not None:
        rows += [
            ("peak GB, notebook", peak("notebook"), "", None),
            ("notebook peak / ours, no intervals", peak("notebook") / peak("1"), ">=", 5.0),
            ("notebook peak / ours, 8 groups", peak("notebook") / peak("8"), ">=", 5.0),
            ("notebook, seconds", memory["notebook", TOKENS]["seconds"], "", None),
            ("ours, no intervals, seconds", statistics.median(times["seconds"]["no intervals"]), "", None),
            ("ours, 8 groups, seconds", statistics.median(times["seconds"]["8 groups"]), "", None),
        ]
    if moments is not None:
        rows += [
            ("moments time / concept-erasure", moments["ratio"], "<=", 1.3),
            ("moments error / concept-erasure",
             moments["relative_error"]["tl_asymmetry"] / moments["relative_error"]["concept_erasure"], "<=", 1.0),
        ]  # fmt: skip
    name = torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()}-core CPU"
    document = {
        "device": name,
        "machine": platform.machine(),
        "versions": {package: version(package) for package in ("torch", "transformer-lens", "tl-asymmetry")},
        "shape": SHAPE,
        "rows": table(rows),
        "times": times,
        "memory": [{"what": w, "tokens": c, **(m or {})} for (w, c), m in memory.items()],
        "moments": moments,
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"pair-{'cpu' if device == 'cpu' else name.lower().replace(' ', '-')}.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(f"written: {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}\n")


if __name__ == "__main__":
    main()
