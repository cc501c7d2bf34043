"""What an analysis will cost, before it is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.nearby import FLOAT32_WIDTH, operations, worth_iterating
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace, ordered_eigh
from tl_asymmetry.models.processes import ALONE, present_processes, together
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weights import WeightSource
from tl_asymmetry.pair.memory_plan import plan_memory
from tl_asymmetry.pair.plan import STREAM_SUBSPACES, check_asked, make_plan
from tl_asymmetry.pair.testing_time import ProbedTests
from tl_asymmetry.settings import GradientMoments, PairSettings, open_pair

_PROBE = 512
MEASURED_WIDTH = 1024
"""Of the widest pair whose call was timed beside its estimate."""


@dataclass(frozen=True, repr=False)
class PairEstimate:
    """Predicted cost of `analyze_pair`, beside the models that are loaded."""

    table: pd.DataFrame
    """One row per stage: `stage, seconds, bytes, device_bytes` (peak of that stage in memory and on the model's own
    device, beside the models)."""
    tokens: int
    """Tokens that will be run."""
    peak_bytes: int
    """Predicted peak in memory: the moments stay while the layers they belong to are analysed."""
    device_bytes: int
    """Predicted peak on the base's own device; 0 where that is the CPU."""
    disk_bytes: int
    """Bytes of aligned weights that are read from files, and of a result saved afterwards."""
    layers_per_pass: int
    """Layers whose moments are held at once, chosen by the memory that is free now."""
    passes: int
    """Runs over the texts that makes."""
    unlike: tuple[str, ...] = ()
    """What sets this pair apart from all those whose calls were timed: its seconds may be off by more than a factor of
    two."""

    @property
    def seconds(self) -> float:
        """Predicted time in all."""
        return float(self.table["seconds"].sum())

    def __repr__(self) -> str:
        shown = self.table.assign(MB=self.table["bytes"] / 1e6, device_MB=self.table["device_bytes"] / 1e6)
        shown = shown.drop(columns=["bytes", "device_bytes"] + ([] if self.device_bytes else ["device_MB"]))
        device = f" and {self.device_bytes / 1e6:.0f} MB on its device" if self.device_bytes else ""
        unknown = (
            f"No such call was timed ({', '.join(self.unlike)}): the seconds may be off by more than a factor of two\n"
            if self.unlike
            else ""
        )
        return (
            f"PairEstimate: about {self.seconds:.0f} s and {self.peak_bytes / 1e6:.0f} MB{device} beside the models, "
            f"{self.disk_bytes / 1e6:.0f} MB on disk, {self.tokens} tokens in {self.passes} "
            f"{'pass' if self.passes == 1 else 'passes'} of {self.layers_per_pass} layers\n{unknown}"
            + shown.to_string(index=False, float_format="{:.3g}".format)
        )


@checked
@together
@with_fresh_settings
def estimate_pair(
    model_base: Any,
    model_aligned: Any,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    matrices: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None,
    optimizer: str = "adam",
    exclude_first: bool = True,
    centered: bool = False,
    batch_size: int = 8,
    max_tokens: int | None = None,
    groups: int = 8,
    activations: str = "base",
    gradient: GradientMoments | None = None,
    sensitivity: bool = False,
    layers_per_pass: int | None = None,
    distributed: bool = True,
    names: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PairEstimate:
    """Predict time, memory and disk of `analyze_pair` with the same arguments, without running the model.

    Operations are counted from shapes; their speed is measured on one product, one eigensolve, the tests themselves on
    a few heads and, for weights in files, one read. On a CPU that is processor time, which others on the machine do not
    lengthen; reading and a GPU go by the clock. Measured on nine pairs in memory (the embedded one, GPT-2's shape with
    widths 128 to 768, Llama's with 256 to 1,024; 2 to 4 layers, 431 to 50,257 tokens in the vocabulary): 0.63 (the
    widest) to 1.64 of the processor time taken (3 to 47 s); what sets a pair apart from these is said. Not counted:
    draws where a law is in doubt, which depend on the deltas.

    Raises:
        ValueError: what `analyze_pair` would refuse about the pair's shapes, texts, tokens and ranks, and about the
            memory that is free now, saying what would fit.

    Example:
        >>> from tl_asymmetry.demo import demo_pair, demo_texts
        >>> estimate_pair(*demo_pair(), demo_texts(4, seed=0), ranks=[4]).seconds < 60
        True
    """
    settings = PairSettings(
        matrices=matrices, ranks=ranks, subspaces=subspaces, optimizer=optimizer, exclude_first=exclude_first,
        centered=centered, batch_size=batch_size, max_tokens=max_tokens, groups=groups, activations=activations,
        gradient=gradient, sensitivity=sensitivity, layers_per_pass=layers_per_pass, distributed=distributed,
        names=names, seed=seed, progress=progress,
    )  # fmt: skip
    pair = open_pair(
        model_base, model_aligned, texts, tokens, mask,
        max_tokens=max_tokens, run_aligned="aligned" in settings.captured,
        check=lambda base: check_asked(base, settings),
    )  # fmt: skip
    base, aligned, sequences = pair.base, pair.aligned, pair.sequences
    plan = make_plan(base, settings, sequences, pair.notes)
    processes = present_processes() if distributed else ALONE
    memory = plan_memory(base, plan, sequences, settings, processes)
    load, held = memory.workload, memory.layers_per_pass
    d, L, n = base.d_model, base.n_layers, sum(map(len, sequences))
    sharers = processes.count

    noise = torch.randn(_PROBE, _PROBE, generator=torch.Generator().manual_seed(seed))
    flops = _rate(lambda x: x @ x, noise.to(base.device), 2.0 * _PROBE**3)
    probe = noise[:d, :d].double()
    eigensolve = (d / len(probe)) ** 3 / _rate(lambda x: ordered_eigh(x @ x.mT), probe, 1.0, tries=1)
    files = aligned.bytes if isinstance(aligned, WeightSource) else 0
    tensor = aligned.weight(0, plan.matrices[0]) if files and isinstance(aligned, WeightSource) else noise
    reading = 1.0
    if files:  # by the clock: a disk takes no processor time
        reading = _rate(
            lambda x: aligned.weight(0, plan.matrices[0]), tensor, float(tensor.nbytes), clock=time.perf_counter
        )

    replicate, k = eigensolve, max(plan.ranks)
    if base.dtype != torch.float64 and d >= FLOAT32_WIDTH:
        replicate = 0.4 * eigensolve
    if base.dtype != torch.float64 and worth_iterating(d, k):
        replicate = min(replicate, 2 * operations(d, k) / flops)
    streams = [name for name in plan.subspaces if name in STREAM_SUBSPACES and name not in plan.given]
    replicates = load.groups if groups > 1 else 0
    variants = 12 if sensitivity else 0
    block = 2 * n * sum(base.weight(0, matrix).numel() for matrix in base.matrices)
    tests = ProbedTests(base, plan, seed=seed)
    layers_run = sum(few.stop for few in memory.passes)  # each pass begins at the first layer and stops at its last
    # Read once to be checked, once for the deltas, and again by the comparison of what has no head.
    stages = [
        ("weights", 2 * files / reading, 6 * load.largest if files else 0, 0),
        ("forward", load.models * block * layers_run / flops / sharers,
         load.capture_device(0), load.capture_device(held)),
        ("moments", load.models * 2 * n * d * d * load.points * L / flops / sharers, load.moments(held), 0),
        ("eigensolves",
         eigensolve * (L * len(streams) * (1 + variants) / sharers + 1)
         + replicate * L * len(streams) * replicates / sharers, 6 * 8 * d * d, 0),
        ("projections", 2 * d * load.matrices * L * (2 + replicates / 4 + variants) / flops / sharers,
         load.layers_host(), load.layers_device()),
        ("prediction", 2 * d * d * base.d_vocab / flops, load.prediction(), 0),
        ("tests", tests.of_tables() + tests.of_layers() / sharers, 0, 0),
    ]  # fmt: skip
    table = pd.DataFrame(stages, columns=["stage", "seconds", "bytes", "device_bytes"])
    if base.device.type == "cpu":
        table["device_bytes"] = 0
    return PairEstimate(
        table,
        tokens=n,
        peak_bytes=memory.host_bytes,
        device_bytes=memory.device_bytes,
        disk_bytes=files + load.result(),
        layers_per_pass=held,
        passes=len(memory.passes),
        unlike=tuple(_unlike(base, files)),
    )


def _unlike(base: ModelView, files: int) -> Iterator[str]:
    if base.d_model > MEASURED_WIDTH:
        yield f"d_model {base.d_model:,} is above {MEASURED_WIDTH:,}"
    if files:
        yield "weights in files"
    if base.device.type != "cpu":
        yield f"a model on {base.device.type}"


def _rate(
    operation: Callable[[Tensor], Any],
    x: Tensor,
    work: float,
    *,
    clock: Callable[[], float] | None = None,
    tries: int = 5,
) -> float:
    """Work per second of an operation: the best of some tries after a warm-up.

    Time is that of this thread by default, which others on the machine do not lengthen; on a GPU by the clock.
    """
    clock = clock or (time.perf_counter if x.is_cuda else time.thread_time)
    operation(x)
    best = float("inf")
    for _ in range(tries):
        start = clock()
        operation(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        best = min(best, clock() - start)
    return work / max(best, 1e-9)
