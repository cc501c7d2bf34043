"""Cost of block Jacobians at GPT-2-small shape: the closed form against jacrev and TransformerLens 4's JacobianLens.

    python benchmarks/jacobians.py                  # prints the table, writes results/jacobians-<device>.json
    python benchmarks/jacobians.py --device cuda

float32, random weights: cost does not depend on what was learned. Times are compared as ratios within one process,
interleaved, medians over the rounds. jacrev computes every ∂ out[t] / ∂ in[s] and throws all but t = s away; its chunk
is chosen to hold as much memory at once as the closed form does. Where the whole of it would not finish, one chunk is
timed and multiplied by the number of chunks, and the row says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import Row, memory_meter, table
from pair import RESULTS

SHAPE = {"n_embd": 768, "n_layer": 2, "n_head": 12, "n_positions": 1024, "vocab_size": 1024}
LAYER = 1
TOKENS = 128
WHOLE = (4, 8)
"""Lengths at which jacrev is run to its end."""


def load_model(device: str) -> Any:
    """A TransformerBridge of two GPT-2-small blocks, with the demonstration's tokenizer."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    from tl_asymmetry.demo import demo_model

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=0, eos_token_id=1))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        demo_model("base").tokenizer.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device=device, dtype=torch.float32)
    # else jacrev, unlike the package, would keep a graph of every gradient for the weights (20 GB at 16 tokens)
    return bridge.eval().requires_grad_(False)


def tokens_of(length: int) -> torch.Tensor:
    """Random token ids `[1, length]`."""
    return torch.randint(2, 400, (1, length), generator=torch.Generator().manual_seed(2))


def closed_form(model: Any, length: int) -> torch.Tensor:
    """Every same-position Jacobian of one block, `[length, d, d]`, through the package's own path."""
    from tl_asymmetry.jacobians.work import closed_forms, make_request, plan_memory

    tokens = tokens_of(length)
    request = make_request(model, tokens, [LAYER], "block", "same", None)
    chunk = plan_memory(request, tokens, "einsum", matrices=length, chunk=None).chunk
    d = SHAPE["n_embd"]
    out = torch.empty(length, d, d, device=request.view.device)
    ((_, block),) = closed_forms(request, tokens[0])
    with torch.no_grad():
        for start in range(0, length, chunk):
            part = slice(start, min(start + chunk, length))
            out[part] = block.at(part).dense()
    return out


def block_function(model: Any, length: int) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """The block as a function `[pos, d] → [pos, d]`, by TransformerLens's hooks, and its input."""
    tokens, seen = tokens_of(length).to(model.cfg.device), {}

    def keep(value: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = value

    names = f"blocks.{LAYER}.hook_resid_pre", f"blocks.{LAYER}.hook_resid_post"

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.clear()
        hooks = [(names[0], lambda value, hook: x.unsqueeze(0)), (names[1], keep)]
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=hooks)
        return next(iter(seen.values()))[0]

    with torch.no_grad():
        model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(names[0], keep)])
    return function, next(iter(seen.values()))[0].clone()


def jacrev_chunk(model: Any, length: int) -> int:
    """Backward passes at once that hold what the closed form holds."""
    from tl_asymmetry.jacobians.work import make_request, plan_memory

    tokens = tokens_of(length)
    request = make_request(model, tokens, [LAYER], "block", "same", None)
    return plan_memory(request, tokens, "autograd", matrices=0, chunk=None).chunk


def jacrev(model: Any, length: int) -> torch.Tensor:
    """The same by jacrev, in chunks."""
    function, x = block_function(model, length)
    full = torch.func.jacrev(function, chunk_size=jacrev_chunk(model, length))(x)
    return torch.stack([full[t, :, t] for t in range(length)]).detach()


def one_chunk_of_jacrev(model: Any, length: int) -> Callable[[], None]:
    """What jacrev does once per chunk, to be timed alone; the forward pass is not counted."""
    function, x = block_function(model, length)
    out, pull = torch.func.vjp(function, x)
    chunk = jacrev_chunk(model, length)
    unit = torch.eye(chunk, out.numel(), device=out.device).view(chunk, *out.shape)
    pull_many = torch.func.vmap(pull)
    return lambda: pull_many(unit)


def seconds(run: Callable[[], Any], device: str) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def averages(model: Any) -> dict[str, Callable[[], Any]]:
    """Ways to an averaged Jacobian of one block over 128 tokens, each as a user would call it."""
    from tl_asymmetry import layer_jacobians, prediction_pullback

    options: dict[str, Any] = {"tokens": tokens_of(TOKENS), "progress": False}
    ways: dict[str, Callable[[], Any]] = {
        "mean, same position": lambda: layer_jacobians(model, layers=LAYER, **options),
        "mean, summed over sources": lambda: layer_jacobians(model, layers=LAYER, sources="sum", **options),
        "pullback, summed over sources": lambda: prediction_pullback(model, layers=0, sources="sum", **options),
        "pullback, same position": lambda: prediction_pullback(model, layers=0, **options),
    }
    try:
        from transformer_lens.tools.analysis import JacobianLens
    except ImportError:
        return ways
    words = "Mira was happy. Tom lost the cup. " * 40
    for batch in (8, 32):
        ways[f"JacobianLens, dim_batch {batch}"] = lambda batch=batch: JacobianLens.fit(
            model, [words], corpus="benchmark", source_layers=[0], dim_batch=batch, max_seq_len=TOKENS,
            skip_first_positions=0, show_progress=False,
        )  # fmt: skip
    return ways


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    device = options.device
    model = load_model(device)
    times: dict[str, list[float]] = {}

    def measure(name: str, run: Callable[[], Any]) -> None:
        times.setdefault(name, []).append(seconds(run, device))
        sys.stderr.write(f"{name}: {times[name][-1]:.3g} s\n")

    closed_form(model, 4)
    error = float((closed_form(model, 4) - jacrev(model, 4)).abs().max())
    for _ in range(options.rounds):
        for length in WHOLE:
            measure(f"closed form, {length} tokens", lambda length=length: closed_form(model, length))
            measure(f"jacrev, {length} tokens", lambda length=length: jacrev(model, length))
        measure(f"closed form, {TOKENS} tokens", lambda: closed_form(model, TOKENS))
        chunk = one_chunk_of_jacrev(model, TOKENS)
        chunk()
        measure(f"jacrev, one chunk at {TOKENS} tokens", chunk)
        for name, run in averages(model).items():
            measure(name, run)

    median = {name: statistics.median(values) for name, values in times.items()}
    chunks = -(-TOKENS * SHAPE["n_embd"] // jacrev_chunk(model, TOKENS))
    median[f"jacrev, {TOKENS} tokens (one chunk x {chunks})"] = median[f"jacrev, one chunk at {TOKENS} tokens"] * chunks

    reset, peak = memory_meter(device)
    before = reset()
    closed_form(model, TOKENS)
    held = (peak() - before) / 1e9

    rows: list[Row] = [
        (f"jacrev / closed form, {length} tokens", median[f"jacrev, {length} tokens"]
         / median[f"closed form, {length} tokens"], "", None)
        for length in WHOLE
    ]  # fmt: skip
    estimate = median[f"jacrev, {TOKENS} tokens (one chunk x {chunks})"] / median[f"closed form, {TOKENS} tokens"]
    rows += [
        (f"jacrev / closed form, {TOKENS} tokens (estimate)", estimate, ">=", 50.0),
        ("largest difference from jacrev, 4 tokens", error, "<=", 1e-4),
        (f"closed form, {TOKENS} tokens, seconds", median[f"closed form, {TOKENS} tokens"], "", None),
        (f"closed form, {TOKENS} tokens, peak GB (result: 0.3)", held, "<=", 2.5),
    ]
    lenses = [name for name in median if name.startswith("JacobianLens")]
    for name in ("mean, same position", "mean, summed over sources", "pullback, summed over sources"):
        rows.append((f"{name}, seconds", median[name], "", None))
        if lenses:
            fastest = min(median[lens] for lens in lenses)
            rows.append((f"{name} / JacobianLens", median[name] / fastest, "<=", 1.0))
    name = torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()}-core CPU"
    document = {
        "device": name,
        "machine": platform.machine(),
        "versions": {package: version(package) for package in ("torch", "transformer-lens", "tl-asymmetry")},
        "shape": SHAPE,
        "rows": table(rows),
        "seconds": times,
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"jacobians-{'cpu' if device == 'cpu' else name.lower().replace(' ', '-')}.json"
    target.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(f"written: {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}\n")


if __name__ == "__main__":
    main()
