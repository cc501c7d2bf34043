"""Cost of `analyze_pair` at GPT-2-small shape: time against one bare forward pass, memory against the notebook way.

    python benchmarks/pair.py                  # prints the table, writes benchmarks/results/pair-<device>.json
    python benchmarks/pair.py --parts times    # ten minutes on two busy cores; other parts stay as the JSON has them
    python benchmarks/pair.py --parts times --layers 12
    python benchmarks/pair.py --device cuda

Every part runs in a process of its own. Times are ratios within one process, of processor seconds on a CPU, to which
others on the machine add nothing, and with one thread for each product, so that the seconds of a stage are those of
its own thread; of one of the 12 layers and a twelfth of the vocabulary unless `--layers` says more: what both calls
cost grows with the two, but for the prediction subspace, tables and imports, which weigh more. Memory is the peak
resident set above what the two loaded models hold (allocated bytes on CUDA).

Three pairs. `random`: random weights, activations and changes, all flat. `steep`: activations of which one direction
holds some 0.96 of the energy and the others fall as a power, as in trained residual streams; random changes of low
rank, nearly all of which hold less of their inputs' directions than training gives, which is asked twice. `trained`:
these activations, and the changes that some steps of Adam make on random tokens. None holds weight decay: where that is
more than 0.1 % of a change's energy, its tests are made twice.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import Row, apart, memory_meter, table

SHAPE = {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "d_vocab": 50_257, "n_ctx": 1024}
SEQUENCE = 128
BATCH = 8
FEW_TOKENS, TOKENS, MANY_TOKENS = 2_048, 8_192, 32_768
BOUNDS = {
    TOKENS: {"no intervals": 1.25, "8 groups": 2.0}, FEW_TOKENS: {"8 groups": 2.0}, MANY_TOKENS: {"8 groups": 2.0}
}  # fmt: skip
"""Of times, by tokens and call, over a bare forward pass."""
RESULTS = Path(__file__).parent / "results"
KINDS = ("random", "steep", "trained")
STEPS, STEP_SEQUENCES, LEARNING_RATE = 24, 4, 1e-4
"""Of the trained pair: Adam's, each on other tokens."""
PARTS = ("times", "memory", "moments")


def load_pair(device: str, kind: str = "random", layers: int = SHAPE["n_layers"]) -> tuple[Any, Any]:
    """Two HookedTransformers of GPT-2-small shape, or of some of its layers with as large a share of its vocabulary;
    the second a small step from the first, or several steps of Adam."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {**SHAPE, "n_layers": layers, "d_vocab": vocabulary(layers)}
    config = HookedTransformerConfig(**shape, act_fn="gelu_new", normalization_type="LN", seed=0, device=device)
    base = HookedTransformer(config)
    aligned = HookedTransformer(config)
    generator = torch.Generator().manual_seed(1)
    if kind != "random":
        _spike(base, generator)
    if kind == "trained":
        aligned.load_state_dict(base.state_dict())
        _train(aligned, generator, device)
        return base.eval(), aligned.eval()
    with torch.no_grad():
        for mine, theirs in zip(aligned.parameters(), base.parameters(), strict=True):
            step = torch.randn(theirs.shape, generator=generator)
            if kind == "steep" and theirs.ndim > 1:
                step = _of_low_rank(theirs.shape, generator) + 0.1 * step
            mine.copy_(theirs + 1e-3 * step.to(theirs))
    return base.eval(), aligned.eval()


@torch.no_grad()
def _spike(model: Any, generator: torch.Generator) -> None:
    """Embeddings with one large direction that all positions share, and the others falling as a power."""
    d = SHAPE["d_model"]
    spectrum = torch.arange(1, d + 1) ** -0.5
    frame = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    spread = torch.randn(model.W_E.shape, generator=generator) * spectrum @ frame
    model.W_E.copy_(spread)
    model.W_pos.copy_((24 * spectrum.square().sum()).sqrt() * frame[-1].expand_as(model.W_pos))


def _train(model: Any, generator: torch.Generator, device: str) -> None:
    """Next-token prediction: what a matrix learns is a sum over tokens of its inputs times their gradients."""
    adam = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(STEPS):
        tokens = torch.randint(model.cfg.d_vocab, (STEP_SEQUENCES, SEQUENCE), generator=generator)
        adam.zero_grad()
        model(tokens.to(device), return_type="loss").backward()
        adam.step()
    adam.zero_grad()


def _of_low_rank(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Of rank 8, its entries of variance 1."""
    *heads, rows, columns = shape
    left, right = (torch.randn(*heads, n, 8, generator=generator) for n in (rows, columns))
    return left @ right.mT / 8**0.5


def vocabulary(layers: int) -> int:
    """So that the unembedding's share of a forward pass is GPT-2's."""
    return SHAPE["d_vocab"] * layers // SHAPE["n_layers"]


def tokens_of(count: int, layers: int = SHAPE["n_layers"]) -> torch.Tensor:
    """Random token ids `[count / SEQUENCE, SEQUENCE]`."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(vocabulary(layers), (count // SEQUENCE, SEQUENCE), generator=generator)


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


STAGES = {
    "forward passes with moments": ("tl_asymmetry.pair.analysis", "capture"),
    "prediction subspace": ("tl_asymmetry.pair.analysis", "predictions_of"),
    "changes": ("tl_asymmetry.pair.analysis", "measure_change"),
    "fractions, references, replicates, tests": ("tl_asymmetry.pair.analysis", "project"),
    "tests against training's reference": ("tl_asymmetry.pair.projections", "reference_tails"),
    "circuits": ("tl_asymmetry.pair.analysis", "layer_circuits"),
    "tables and tests against chance": ("tl_asymmetry.pair.analysis", "pair_tables"),
    "tests against chance": ("tl_asymmetry.geometry.nulls.IsotropicNull", "tails_of"),
    "other changes": ("tl_asymmetry.pair.analysis", "other_changes"),
}
"""Where an analysis spends its time; the third of the tests is part of the line before it, as is the last."""
NULLS = ("tests against training's reference", "tests against chance")


@contextmanager
def staged() -> Iterator[dict[str, float]]:
    """Processor seconds of each stage's own thread, while this is open."""
    spent = dict.fromkeys(STAGES, 0.0)
    with ExitStack() as stack:
        for stage, (place, name) in STAGES.items():
            stack.enter_context(patch(f"{place}.{name}", _timed(stage, pkgutil.resolve_name(f"{place}.{name}"), spent)))
        yield spent


def _timed(stage: str, function: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any, **named: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*args, **named)
        finally:
            spent[stage] += time.thread_time() - start

    return run


def measure_times(device: str, kind: str, layers: int, rounds: int) -> dict[str, Any]:
    """Seconds of the bare pass and of the package, interleaved, median ratios, and the stages of the whole call."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device == "cpu":
        torch.set_num_threads(1)
    base, aligned = load_pair(device, kind, layers)
    forward(base, tokens_of(SEQUENCE * BATCH, layers), device)
    package(base, aligned, tokens_of(SEQUENCE * BATCH, layers), 1)
    found: dict[str, Any] = {"seconds": {}, "ratio": {}, "stages": {}}
    for count, bounds in BOUNDS.items():
        tokens = tokens_of(count, layers)
        groups = {name: 1 if name == "no intervals" else 8 for name in bounds}
        runs: dict[str, Callable[[], None]] = {
            "forward": partial(forward, base, tokens, device),
            **{name: partial(package, base, aligned, tokens, n) for name, n in groups.items()},
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = clock()
                with staged() as spent:
                    run()
                seconds[name].append(clock() - start)
                if name != "forward":
                    found["stages"][f"{name}, {count} tokens"] = spent
                sys.stderr.write(f"{kind}, {count} tokens, {name}: {seconds[name][-1]:.1f} s {spent}\n")
        found["seconds"][str(count)] = seconds
        found["ratio"][str(count)] = {
            name: statistics.median(t / f for t, f in zip(times, seconds["forward"], strict=True))
            for name, times in seconds.items()
        }
    return found


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
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=1, help="in the part `times`")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    if options.only:
        what, *rest = options.only
        try:
            measured = {
                "times": lambda: measure_times(device, rest[0], options.layers, options.rounds),
                "memory": lambda: measure_memory(device, rest[0], int(rest[1])),
                "moments": lambda: measure_moments(device),
            }[what]()
        except ModuleNotFoundError as error:
            sys.stderr.write(str(error))
            sys.exit(3)
        sys.stdout.write("\n" + json.dumps(measured))
        return

    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    target = RESULTS / f"pair-{'cpu' if device == 'cpu' else name.lower().replace(' ', '-')}.json"
    RESULTS.mkdir(exist_ok=True)
    document: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    for part in options.parts:
        sys.stdout.write(f"\n{part}\n")
        common = ("--device", device, "--rounds", str(options.rounds), "--layers", str(options.layers))
        rows, measured = _PARTS[part](partial(apart, __file__, *common))
        document[part] = {
            "device": name,
            "machine": platform.machine(),
            "versions": {package: version(package) for package in ("torch", "transformer-lens", "tl-asymmetry")},
            "shape": SHAPE,
            **({"layers": options.layers} if part == "times" else {}),
            "rows": table(rows) if rows else [],
            **measured,
        }
        target.write_text(json.dumps(document, indent=1) + "\n")  # each part as it comes
    sys.stdout.write(f"written: {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}\n")


Measured = tuple[list[Row], dict[str, Any]]


def _times(run: Callable[..., Any]) -> Measured:
    measured = {kind: run("--only", "times", kind) for kind in KINDS}
    rows: list[Row] = []
    for kind, times in measured.items():
        for count, ratio in times["ratio"].items():
            rows += [
                (f"{kind}, {count} tokens, {name} / bare forward", ratio[name], "<=", bound)
                for name, bound in BOUNDS[int(count)].items()
            ]
            spent = times["stages"][f"8 groups, {count} tokens"]
            whole = statistics.median(times["seconds"][count]["8 groups"])
            rows.append((f"{kind}, {count} tokens, nulls / call", sum(spent[n] for n in NULLS) / whole, "<=", 0.15))
            rows.append((
                f"{kind}, {count} tokens, bare forward, seconds", statistics.median(times["seconds"][count]["forward"]),
                "", None,
            ))  # fmt: skip
    return rows, {"pairs": measured}


def _memory(run: Callable[..., Any]) -> Measured:
    measured = {
        (what, count): run("--only", "memory", what, str(count))
        for what, count in (
            ("1", TOKENS), ("1", MANY_TOKENS), ("8", TOKENS), ("8", MANY_TOKENS), ("notebook", TOKENS)
        )
    }  # fmt: skip

    def peak(what: str, count: int = TOKENS) -> float:
        return measured[what, count]["bytes"] / 1e9

    rows: list[Row] = [
        ("peak GB, no intervals", peak("1"), "<=", 0.6),
        ("peak GB, 8 groups", peak("8"), "<=", 1.6),
        ("peak at 4 x tokens / peak, no intervals", peak("1", MANY_TOKENS) / peak("1"), "<=", 1.05),
        ("peak at 4 x tokens / peak, 8 groups", peak("8", MANY_TOKENS) / peak("8"), "<=", 1.05),
    ]
    if measured["notebook", TOKENS] is not None:
        rows += [
            ("peak GB, notebook", peak("notebook"), "", None),
            ("notebook peak / ours, no intervals", peak("notebook") / peak("1"), ">=", 5.0),
            ("notebook peak / ours, 8 groups", peak("notebook") / peak("8"), ">=", 5.0),
            ("notebook, seconds", measured["notebook", TOKENS]["seconds"], "", None),
            ("ours, 8 groups, seconds", measured["8", TOKENS]["seconds"], "", None),
        ]
    return rows, {"runs": [{"what": what, "tokens": count, **(m or {})} for (what, count), m in measured.items()]}


def _moments(run: Callable[..., Any]) -> Measured:
    measured = run("--only", "moments")
    if measured is None:
        return [], {}
    error = measured["relative_error"]["tl_asymmetry"] / measured["relative_error"]["concept_erasure"]
    rows: list[Row] = [
        ("moments time / concept-erasure", measured["ratio"], "<=", 1.3),
        ("moments error / concept-erasure", error, "<=", 1.0),
    ]
    return rows, measured


_PARTS = {"times": _times, "memory": _memory, "moments": _moments}


if __name__ == "__main__":
    main()
