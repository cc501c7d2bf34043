"""Cost of rank-1 edits and studies at GPT-2-small shape: against bare operations, and against one pass for each edit.

    python benchmarks/edits.py                  # prints the table, writes benchmarks/results/edits-<device>.json
    python benchmarks/edits.py --device cuda
    python benchmarks/edits.py --edits-only     # minutes instead of twenty

Ratios within one process, medians over the rounds. Random weights: cost does not depend on what was learned. Edits are
measured on every kind of model this transformer-lens has, the study on the first of them. The naive study does what a
notebook would: for every edit it writes the weights, runs the model on every batch, and takes KL, cross-entropy and the
share of the shift from log-softmaxes.

Both halves are interleaved finely, since a study takes minutes and the load of a machine changes within them: bare and
full edits by turns of 20 to 200 calls, the two studies edit by edit. Whenever ours has an edit's logits, the naive one
makes its next edit, on a clock of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from pair import SHAPE, load_pair

SEQUENCE, TOKENS, BATCH = 128, 1024, 8
CONTROLS = 5
RESULTS = Path(__file__).parent / "results"
EDIT_BOUND, STUDY_BOUND = 3.0, 0.75


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], repeats: int, device: str) -> float:
    """Per call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def measure_edits(model: Any, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Median over rounds of microseconds for the bare operations and for `apply_edits`, and of their ratio."""
    from tl_asymmetry import ModelView, RankOneEdit, apply_edits

    view, found = ModelView(model), {}
    for matrix, head in (("W_Q", 3), ("W_K", 3), ("W_V", 3), ("W_O", 3), ("W_in", None)):
        weight = view.weight(5, matrix)
        place = weight if head is None else weight[head]
        residual, other = torch.randn(768, device=device), torch.randn(64 if head is not None else 3072, device=device)
        first, second = (other, residual) if matrix == "W_O" else (residual, other)
        edit = RankOneEdit(5, matrix, head, residual, other, 1e-3)

        def bare(place: Any = place, first: Any = first, second: Any = second) -> None:
            saved = place.clone()
            place.addr_(first, second, alpha=1e-3)
            place.copy_(saved)

        def ours(edit: Any = edit) -> None:
            with apply_edits(view, edit):
                pass

        def anew(edit: Any = edit) -> None:
            with apply_edits(model, edit):
                pass

        repeats = 20 if head is None else 200
        times = [[seconds_of(run, repeats, device) for run in (bare, ours)] for _ in range(rounds)]
        found[matrix] = {
            "bare_us": 1e6 * statistics.median(b for b, _ in times),
            "ours_us": 1e6 * statistics.median(o for _, o in times),
            "ratio": statistics.median(o / b for b, o in times),
            "with_a_new_view_us": 1e6 * seconds_of(anew, 20, device),
        }
    return found


def sites() -> list[tuple[int, str, int]]:
    """Twelve heads, one in each layer, every attention matrix in turn."""
    return [(layer, ("W_Q", "W_K", "W_V", "W_O")[layer % 4], layer) for layer in range(12)]


def package_study(base: Any, aligned: Any, tokens: torch.Tensor) -> Any:
    """The whole of `rank_one_study`, checks and tables included."""
    import warnings

    from tl_asymmetry import rank_one_study

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rank_one_study(
            base, aligned, tokens=tokens, sites=sites(), controls=("random",), draws=CONTROLS, batch_size=BATCH,
            progress=False,
        )  # fmt: skip


def naive(base: Any, aligned: Any, tokens: torch.Tensor, edits: list[Any]) -> Iterator[tuple[float, float, float]]:
    """The same 72 edits and outcomes, one whole forward pass for each."""
    from tl_asymmetry import ModelView, apply_edits

    view = ModelView(aligned)
    with torch.no_grad():
        clean = [(aligned(b).log_softmax(-1), base(b).log_softmax(-1)) for b in tokens.split(BATCH)]
    for edit in edits:
        kl = shift = ce = 0.0
        with torch.no_grad(), apply_edits(view, edit):
            for batch, (p, p_base) in zip(tokens.split(BATCH), clean, strict=True):
                q = aligned(batch).log_softmax(-1)[:, :-1]
                kl += torch.nn.functional.kl_div(q, p[:, :-1], log_target=True, reduction="sum").item()
                shift += torch.nn.functional.kl_div(q, p_base[:, :-1], log_target=True, reduction="sum").item()
                ce -= q.gather(-1, batch[:, 1:, None]).sum().item()
        yield kl, ce, shift


class Clock:
    """Wall and processor seconds spent inside `running`."""

    def __init__(self, device: str) -> None:
        self.wall = self.processor = 0.0
        self._device = device

    def running(self, run: Callable[[], object]) -> None:
        synchronize(self._device)
        wall, processor = time.perf_counter(), time.process_time()
        run()
        synchronize(self._device)
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor


def both_studies(base: Any, aligned: Any, tokens: torch.Tensor, edits: list[Any], device: str) -> tuple[Clock, Clock]:
    """Clocks of our study and of the naive one, run by turns."""
    from tl_asymmetry.models.resume import EditedRuns

    both, theirs = Clock(device), Clock(device)
    steps, under = naive(base, aligned, tokens, edits), EditedRuns.under
    batches = len(tokens.split(BATCH))  # ours takes every edit once for each batch
    taken = 0

    def by_turns(self: Any, planned: Any) -> Iterator[torch.Tensor]:
        nonlocal taken
        for stacked in under(self, planned):
            yield stacked
            taken += len(stacked)
            while taken >= batches:
                taken -= batches
                theirs.running(lambda: next(steps))

    with patch.object(EditedRuns, "under", by_turns):
        both.running(lambda: package_study(base, aligned, tokens))
    left = sum(1 for _ in steps)
    if left:
        raise RuntimeError(f"expected the naive study to be over with ours, got {left} edits left")
    both.wall, both.processor = both.wall - theirs.wall, both.processor - theirs.processor
    return both, theirs


def load_models(device: str) -> dict[str, tuple[Any, Any]]:
    """A pair of GPT-2-small shape as every kind of model there is."""
    from importlib.metadata import version

    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    from tl_asymmetry.demo import demo_tokenizer

    kinds = {}
    if version("transformer-lens").startswith("3."):
        kinds["HookedTransformer"] = load_pair(device)
    config = GPT2Config(
        vocab_size=SHAPE["d_vocab"], n_positions=SHAPE["n_ctx"], n_embd=SHAPE["d_model"], n_layer=SHAPE["n_layers"],
        n_head=SHAPE["n_heads"], attn_implementation="eager",
    )  # fmt: skip
    pair = []
    with TemporaryDirectory() as folder:
        demo_tokenizer().save_pretrained(folder)
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for _ in range(2):
            model.save_pretrained(folder)
            pair.append(TransformerBridge.boot_transformers(folder, device=device, dtype=torch.float32).eval())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1e-3 * torch.randn_like(parameter))
    kinds["TransformerBridge"] = (pair[0], pair[1])
    return kinds


def measure_study(kinds: dict[str, tuple[Any, Any]], device: str, rounds_wanted: int, count: int) -> dict[str, Any]:
    """Both studies by turns, on the first kind of model."""
    from tl_asymmetry.edits import head_delta, matched_controls, removal_edit

    studied = next(iter(kinds))
    base, aligned = kinds[studied]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(SHAPE["d_vocab"], (count // SEQUENCE, SEQUENCE), generator=generator).to(device)
    made = []
    for layer, matrix, head in sites():
        delta = head_delta(base, aligned, layer, matrix, head)
        q = torch.linalg.svd(delta.mT if matrix == "W_O" else delta).U[:, 0]
        target = removal_edit(layer, matrix, head, delta, q)
        made += [target, *matched_controls(target, "random", CONTROLS)]
    made = [edit.to(device) for edit in made]
    with torch.no_grad():
        aligned(tokens[:1]), base(tokens[:1])
    forward, rounds = [], []
    for _ in range(rounds_wanted):
        with torch.no_grad():
            forward.append(seconds_of(lambda: aligned(tokens), 1, device))
        rounds.append(both_studies(base, aligned, tokens, made, device))
    ours = [mine.wall for mine, _ in rounds]
    all_edits = 4 * SHAPE["n_layers"] * SHAPE["n_heads"] * (1 + 20)
    return {
        "model": studied, "edits": len(made), "tokens": count,
        "processor_ratio": statistics.median(mine.processor / theirs.processor for mine, theirs in rounds),
        "seconds": ours, "naive_seconds": [theirs.wall for _, theirs in rounds],
        "ratio": statistics.median(mine.wall / theirs.wall for mine, theirs in rounds),
        "forward_seconds": forward, "all_heads_edits": all_edits,
        "all_heads_hours": all_edits * statistics.median(ours) / len(made) / 3600,
    }  # fmt: skip


def show(edits: dict[str, dict[str, dict[str, float]]], study: dict[str, Any]) -> None:
    """Print both tables."""
    for kind, matrix, times in ((kind, matrix, times) for kind, of in edits.items() for matrix, times in of.items()):
        held = "" if matrix == "W_in" else f"<= {EDIT_BOUND:g}  {'held' if times['ratio'] <= EDIT_BOUND else 'MISSED'}"
        sys.stdout.write(
            f"{kind}: edit {matrix:5} bare {times['bare_us']:8.1f} us  ours {times['ours_us']:8.1f} us  ratio "
            f"{times['ratio']:.2f}  {held}  (new view {times['with_a_new_view_us']:.0f} us)\n"
        )
    sys.stdout.write(
        f"{study['model']}: study of {study['edits']} edits on {study['tokens']} tokens: "
        f"{statistics.median(study['seconds']):.2f} s, naive {statistics.median(study['naive_seconds']):.2f} s, ratio "
        f"{study['ratio']:.3f} <= {STUDY_BOUND}  {'held' if study['ratio'] <= STUDY_BOUND else 'MISSED'}; one forward "
        f"{statistics.median(study['forward_seconds']):.3f} s; ratio of processor time {study['processor_ratio']:.3f}\n"
        f"all attention heads x 1 direction x 20 controls = {study['all_heads_edits']} edits: "
        f"{study['all_heads_hours']:.2f} h at this rate\n"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of the study")
    parser.add_argument("--edits-only", action="store_true", help="leave the study alone, in the JSON too")
    options = parser.parse_args()
    from tl_asymmetry.results.provenance import versions

    device = options.device
    name = torch.cuda.get_device_name() if device != "cpu" else f"{torch.get_num_threads()}-core CPU"
    target = RESULTS / f"edits-{'cpu' if device == 'cpu' else name.lower().replace(' ', '-')}.json"
    kinds = load_models(device)
    edits = {kind: measure_edits(pair[1], device, max(7, options.rounds)) for kind, pair in kinds.items()}
    if options.edits_only:
        study = json.loads(target.read_text())["study"]
    else:
        study = measure_study(kinds, device, options.rounds, options.tokens)
    show(edits, study)
    document = {
        "device": name,
        "machine": platform.machine(),
        "versions": versions(),
        "shape": SHAPE,
        "edits": edits,
        "study": study,
    }
    RESULTS.mkdir(exist_ok=True)
    target.write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(f"written: {target}\n")


if __name__ == "__main__":
    main()
