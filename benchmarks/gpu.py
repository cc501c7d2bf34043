"""One machine in one JSON: the tests marked gpu, then a pair, edits, a study and Jacobians of a Llama in bfloat16.

    benchmarks/gpu.sh    # which ends it after ten minutes

Random weights: cost does not depend on what was learned. Seconds are wall time on an otherwise idle device.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import memory_meter

RESULTS = Path(__file__).parent / "results"
SHAPE = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 8192, "vocab_size": 128_256, "max_position_embeddings": 1024,
}  # fmt: skip
"""That of Llama-3.2-1B."""
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 64,
}  # fmt: skip
TESTS_SECONDS, TIMED_OUT = 240, 124


class Report:
    """Stages as they are done, on disk after each."""

    def __init__(self, target: Path, about: dict[str, Any], device: str) -> None:
        self.target, self.document, self.device = target, {**about, "stages": {}}, device

    def stage(self, name: str, run: Callable[[], Any]) -> Any:
        """Run one, note its seconds and the bytes it held above what was held before."""
        reset, peak = memory_meter(self.device)
        before = reset()
        start = time.perf_counter()
        result = run()
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.add(name, seconds=time.perf_counter() - start, bytes=peak() - before)
        return result

    def add(self, name: str, **measured: Any) -> None:
        """Note what was measured, and write all there is."""
        self.document["stages"][name] = measured
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text(json.dumps(self.document, indent=1) + "\n")
        sys.stdout.write(f"{name:28} " + "  ".join(f"{k} {v:.4g}" for k, v in measured.items()) + "\n")
        sys.stdout.flush()


def load_pair(shape: dict[str, int], device: str) -> tuple[Any, Any]:
    """Two Bridges with the weights of one seed, the second a small random step from the first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tl_asymmetry.models.loading import bridge_around

    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], attn_implementation="eager", dtype=torch.bfloat16)
    pair = []
    for step in (0.0, 0.05):
        torch.manual_seed(0)
        with torch.device(device):
            model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        with torch.no_grad():
            for parameter in model.parameters() if step else ():
                parameter += step * parameter.std() * torch.randn_like(parameter)
        pair.append(bridge_around(model, "random-llama", device=device, dtype=torch.bfloat16))
    return pair[0], pair[1]


def synchronizations(run: Callable[[], Any]) -> int:
    """How often the host waits for the device, as torch warns of it; CUDA alone knows."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def run_tests(report: Report) -> None:
    """The tests marked gpu, in a process of their own; their last line says what came of them."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TESTS_SECONDS)
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as stopped:  # what is measured after the tests must not be lost to them
        code, said = TIMED_OUT, (stopped.stdout or b"").decode()
    report.document["tests"] = said.strip().splitlines()[-15:]
    report.add("tests marked gpu", seconds=time.perf_counter() - start, exit=code)


def run_stages(report: Report, shape: dict[str, int], device: str, *, sequences: int, length: int) -> None:
    """The analyses, one after the other on one pair, the longest last."""
    from tl_asymmetry import RankOneEdit, analyze_pair, apply_edits, layer_jacobians, rank_one_study
    from tl_asymmetry.models.capture import capture
    from tl_asymmetry.models.view import ModelView

    base, aligned = report.stage("load", lambda: load_pair(shape, device))
    tokens = torch.randint(shape["vocab_size"], (sequences, length), generator=torch.Generator().manual_seed(1))
    view = ModelView(base)

    def bare() -> None:
        with torch.no_grad():
            for batch in tokens.split(8):
                view.run(batch.to(device), layers=view.n_layers)

    def captured() -> None:
        points = [(point, layer) for layer in range(view.n_layers) for point in ("attn_in", "mlp_in", "resid_post")]
        capture(view, [list(tokens)], points, exclude_first=True, batch_size=8, progress=False)

    bare()
    report.stage("bare pass, no logits", bare)
    report.stage("capture", captured)
    if device != "cpu":
        report.add("synchronizations", bare=synchronizations(bare), capture=synchronizations(captured))

    def pair(groups: int) -> None:
        analyze_pair(base, aligned, tokens=tokens, groups=groups, progress=False)

    d, head = view.d_model, view.d_head
    edit = RankOneEdit(0, "W_Q", 1, torch.ones(d), torch.ones(head), scale=1e-3)

    def edits() -> None:
        for _ in range(200):
            with apply_edits(base, edit):
                pass

    report.stage("200 edits", edits)
    report.stage("rank_one_study, 2 sites", lambda: rank_one_study(
        base, aligned, tokens=tokens[:8], sites=[(0, "W_Q", 0), (view.n_layers - 1, "W_O", 1)], draws=4, progress=False,
    ))  # fmt: skip
    report.stage("layer_jacobians, 1 layer", lambda: layer_jacobians(
        base, tokens=tokens[:1, :16], layers=view.n_layers // 2, progress=False
    ))  # fmt: skip
    report.stage("analyze_pair, 1 group", lambda: pair(1))
    report.stage("analyze_pair, 8 groups", lambda: pair(8))  # the longest last


def main() -> None:
    """Measure stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, without the tests")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        parser.error("expected a CUDA device, got none; pass --tiny for a dry run on the CPU")
    from tl_asymmetry.results.provenance import versions

    name = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    shape = TINY if options.tiny else SHAPE
    about = {"device": name, "machine": platform.machine(), "versions": versions(), "shape": shape}
    report = Report(options.out / f"gpu-{name.lower().replace(' ', '-')}.json", about, device)
    if not options.tiny:
        run_tests(report)
    sequences, length = (8, 16) if options.tiny else (64, 128)
    run_stages(report, shape, device, sequences=sequences, length=length)
    sys.stdout.write(f"written: {report.target}\n")


if __name__ == "__main__":
    main()
