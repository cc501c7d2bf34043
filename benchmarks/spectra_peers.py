"""`analyze_spectra` beside the tools that measure weight changes, on one pair: time, memory, and which numbers agree.

    python -m benchmarks.spectra_peers                       # peers that are not installed are left out
    python -m benchmarks.spectra_peers --diffract PYTHON     # diffract-core wants a Python of its own, 3.12 or later

The pair is a LLaMA of two layers (d_model 512) and the same with a LoRA of rank 8 on all its matrices, merged, in
float32: written as two folders, the adapter and plain arrays, so that every tool reads what it takes. Each runs in a
process of its own, one thread; times and peaks are of the measurement, without imports and, where the tool takes
models in memory, without loading. Of the columns of `analyze_spectra` the table holds those that another tool has:
the others have no chance level beside them, no heads and no storage noise.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import memory_meter

RESULTS = Path(__file__).parent / "results"
PEERS = ("tl-asymmetry", "peft", "modeldelta", "weightwatcher", "diffract-core")
MODULES = {
    "self_attn.q_proj": "W_Q", "self_attn.k_proj": "W_K", "self_attn.v_proj": "W_V", "self_attn.o_proj": "W_O",
    "mlp.gate_proj": "W_gate", "mlp.up_proj": "W_in", "mlp.down_proj": "W_out",
}  # fmt: skip
WHOLE = ("W_gate", "W_in", "W_out")
"""Matrices that no tool splits: what is said of directions can be compared there."""
TOP, ALIKE = 10, 0.5


def write_pair(folder: Path) -> None:
    """The base, the adapter, the merged model, and both as arrays."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=4, max_position_embeddings=64, **sizes))
    base.save_pretrained(folder / "base")
    arrays = {"base": _matrices(base.state_dict())}
    modules = [name.rpartition(".")[2] for name in MODULES]
    # Strong enough that vectors intrude: α/r = 4, both factors drawn.
    tuned = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules=modules, init_lora_weights=False))
    tuned.save_pretrained(folder / "adapter")
    merged = tuned.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    arrays["merged"] = _matrices(merged.state_dict())
    for name, matrices in arrays.items():
        np.savez(folder / f"{name}.npz", **matrices)


def _matrices(state: dict[str, Any]) -> dict[str, Any]:
    return {name: W.numpy().copy() for name, W in state.items() if ".layers." in name and W.ndim == 2}


def measured(peer: str, folder: Path) -> dict[str, Any]:
    """One tool's seconds, peak and numbers by matrix name of transformers."""
    torch.set_num_threads(1)
    call = CALLS[peer](folder)
    reset, peak = memory_meter("cpu")
    before, start, processor = reset(), time.perf_counter(), time.process_time()
    found = call()
    seconds = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - processor}
    return {"version": version(peer), **seconds, "peak_mib": (peak() - before) / 2**20, "numbers": found()}


def _ours(folder: Path) -> Any:
    from tl_asymmetry import analyze_spectra

    def call() -> Any:
        result = analyze_spectra(folder / "base", folder / "merged", ranks=[TOP], progress=False)

        def numbers() -> dict[str, Any]:
            names = {matrix: module for module, matrix in MODULES.items()}
            table: dict[str, Any] = {}
            for (layer, matrix), rows in result.table.groupby(["layer", "matrix"], sort=False):
                if matrix in WHOLE:
                    (row,) = rows.to_dict("records")
                    table[f"model.layers.{layer}.{names[str(matrix)]}.weight"] = {
                        "relative_norm": row["delta_relative_norm"],
                        # nn.Linear stores the transpose: its left is our right
                        "intruders": row["intruders_right"], "rotation": row["rotation_right"],
                    }  # fmt: skip
            return table

        return numbers

    return call


def _peft(folder: Path) -> Any:
    from peft import PeftModel
    from peft.tuners.lora.intruders import reduce_intruder_dimension
    from transformers import LlamaForCausalLM

    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter")

    def call() -> Any:
        said = io.StringIO()
        with redirect_stdout(said):
            reduce_intruder_dimension(tuned, top_k=TOP, threshold_epsilon=ALIKE)
        found = re.findall(r"No intruders|Intruders: \d+", said.getvalue())
        counts = [0 if one.startswith("No") else int(one.removeprefix("Intruders: ")) for one in found]
        layers = [name for name, module in tuned.base_model.model.named_modules() if hasattr(module, "lora_A")]
        return lambda: {f"{name}.weight": {"intruders": n} for name, n in zip(layers, counts, strict=True)}

    return call


def _modeldelta(folder: Path) -> Any:
    from modeldelta.core.weight_diff import compare_models
    from modeldelta.utils.model_loader import get_tensor_map

    maps = [get_tensor_map(str(folder / name)) for name in ("base", "merged")]

    def call() -> Any:
        rows, _ = compare_models(*maps)
        return lambda: {r["name"]: {"relative_norm": r["frob_norm_relative"]} for r in rows if ".layers." in r["name"]}

    return call


def _weightwatcher(folder: Path) -> Any:
    import weightwatcher
    from transformers import LlamaForCausalLM

    models = [LlamaForCausalLM.from_pretrained(folder / name) for name in ("base", "merged")]
    watcher = weightwatcher.WeightWatcher()

    def call() -> Any:
        *_, details = watcher.distances(*models, method="euclidean")
        weights = np.load(folder / "base.npz")
        norms = {
            f"{name}.weight": float(norm) for name, norm in zip(details["longname"], details["delta_W"], strict=True)
        }
        return lambda: {
            n: {"relative_norm": norms[n] / float(np.linalg.norm(weights[n]))} for n in weights if n in norms
        }

    return call


DIFFRACT = """
import json, resource, sys, time
import numpy as np
from diffract import Session
from importlib.metadata import version
top, alike, folder = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
pair = [dict(np.load(f"{folder}/{name}.npz")) for name in ("merged", "base")]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, processor = time.perf_counter(), time.process_time()
numbers = {}
for name in pair[0]:
    with Session(profile="ram") as session:
        for model, weights in zip(("merged", "base"), pair):
            session.models.add({name: weights[name]}, model_id=model)
        session.compute.apply("l_overlap")
        found = session.results.export_aggregates("l_overlap", export_format="dict")
    O = next(value for value in found[0].values() if isinstance(value, np.ndarray))
    O = O[::-1, ::-1]  # smallest first; the first axis is of the base
    numbers[name] = {"intruders": int((O[:, :top].max(0) < alike).sum()),
                     "rotation": float(1 - (O[:top, :top].astype(float) ** 2).sum() / top)}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"version": version("diffract-core"), "seconds": time.perf_counter() - start,
                  "processor_seconds": time.process_time() - processor, "numbers": numbers,
                  "peak_mib": (peak - before) / 1024 or None}))  # None: loading had taken as much
"""

CALLS = {"tl-asymmetry": _ours, "peft": _peft, "modeldelta": _modeldelta, "weightwatcher": _weightwatcher}


def agreement(found: dict[str, Any]) -> dict[str, Any]:
    """Of each number that a peer has too: over how many matrices, and by how much the two differ at most."""
    ours, table = found["tl-asymmetry"]["numbers"], {}
    for peer, about in found.items():
        for what in ("relative_norm", "intruders", "rotation"):
            both = [
                (numbers[what], about["numbers"][name][what])
                for name, numbers in ours.items()
                if what in numbers and what in about["numbers"].get(name, {})
            ]
            if both and peer != "tl-asymmetry":
                table[f"{what}, {peer}"] = {
                    "matrices": len(both), "ours": sum(a for a, _ in both), "theirs": sum(b for _, b in both),
                    "largest_difference": max(abs(a - b) for a, b in both),
                }  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diffract", metavar="PYTHON", default=sys.executable, help="that has diffract-core")
    parser.add_argument("--one", nargs=2, metavar=("PEER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measured(options.one[0], Path(options.one[1]))) + "\n")
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        for peer in PEERS:
            command = [sys.executable, "-m", "benchmarks.spectra_peers", "--one", peer, folder]
            if peer == "diffract-core":
                command = [options.diffract, "-c", DIFFRACT, str(TOP), str(ALIKE), folder]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                sys.stdout.write(f"{peer}: left out, {done.stderr.strip().splitlines()[-1]}\n")
                continue
            found[peer] = json.loads(done.stdout.splitlines()[-1])
            about = found[peer]
            sys.stdout.write(
                f"{peer:14} {about['version']:8} {about['processor_seconds']:7.2f} s of processor, "
                f"{about['peak_mib'] or float('nan'):6.0f} MiB, {len(about['numbers'])} matrices\n"
            )
            sys.stdout.flush()
    same = agreement(found)
    for what, about in same.items():
        sys.stdout.write(f"{what:30} {about}\n")
    tools = {peer: {k: v for k, v in about.items() if k != "numbers"} for peer, about in found.items()}
    document = {"torch": version("torch"), "pair": "LLaMA, 2 layers, d_model 512, LoRA of rank 8", "tools": tools,
                "agreement": same}  # fmt: skip
    (RESULTS / "spectra-peers.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
