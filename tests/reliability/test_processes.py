"""Two processes do what one does; where one of them stops, or is killed, the other ends at once, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests import tiny
from tl_asymmetry import PairAnalysis, TrajectoryAnalysis, analyze_pair, analyze_trajectory
from tl_asymmetry.store import StoreReader

TOKENS = tiny.tokens(9, 12)
OPTIONS: dict[str, Any] = {"tokens": TOKENS, "ranks": [4], "groups": 3, "batch_size": 2, "progress": False}
FEW = OPTIONS | {"matrices": ["W_K", "W_O"]}
EACH_POINT = OPTIONS | {"matrices": ["W_K", "W_O", "W_in", "W_out"]}

_SCRIPT = """
import os, signal, sys, time, warnings
import torch
torch.set_num_threads(1)
import pandas as pd
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from tests import tiny
from tests.reliability.test_processes import EACH_POINT, FEW, TOKENS
from tl_asymmetry import TrajectoryRecorder, analyze_pair, analyze_trajectory
from tl_asymmetry.models.loading import open_model
from tl_asymmetry.models.processes import started_processes
from tl_asymmetry.pair import analysis

warnings.simplefilter("ignore")
base_directory, aligned_directory, out = sys.argv[1:]

def told(name, work):
    began = time.monotonic()
    try:
        work()
        words = "went through"
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    with open(f"{out}/{name}-{processes.rank}", "w") as file:
        file.write(f"{time.monotonic() - began:.1f} {words}")

def the_same_work():
    def run(name, other, options, **more):
        analyze_pair(base, other, **{**options, **more}).save(f"{out}/{name}-{processes.rank}")

    run("loaded", aligned, EACH_POINT, sensitivity=True)
    run("files", aligned_directory, EACH_POINT, layers_per_pass=1)
    run("few", aligned_directory, FEW, tokens=TOKENS[:4])  # fewer sequences in a group than processes
    run("alone", aligned_directory, FEW, tokens=TOKENS[: 8 + processes.rank], distributed=False)
    told("differ", lambda: run("differ", aligned_directory, FEW, tokens=TOKENS[processes.rank :][:8]))

    def random_walk():
        yield 0, base
        for step, seed in ((10, 1), (30, 2), (100, 3)):
            yield step, tiny.perturbed(base, 0.02, seed)

    def sweep(name, checkpoints, **more):
        analyze_trajectory(checkpoints, **FEW, **more).save(f"{out}/{name}-{processes.rank}")

    sweep("sweep", random_walk(), reference="both", store=f"{out}/store")
    sweep("resumed", random_walk(), reference="both", store=f"{out}/store")
    sweep("each", random_walk(), subspaces_from="each")
    good, broken = tiny.perturbed(base, 0.02, 1), tiny.perturbed(base, 0.02, 2)
    with torch.no_grad():
        broken.blocks[1].mlp.W_in[0, 0] = float("nan")
    for name, checkpoints in (
        ("broken", [(0, base), (10, good), (30, broken)]), ("unsorted", [(0, base), (30, good), (10, good)]),
    ):
        told(name, lambda: analyze_trajectory(checkpoints, store=f"{out}/store-{name}", **FEW))

def what_stops_one():
    options = dict(ranks=[1], groups=1, batch_size=2, progress=False)
    tokens, second = tiny.tokens(5, 12), processes.rank == 1
    # before the first exchange: a path that only one of them has
    other = "/no/such/model" if second else aligned_directory
    told("path", lambda: analyze_pair(base, other, tokens=tokens, **options))
    # in the middle of the work
    def broken_pass(*arguments, **keywords):
        raise RuntimeError("the device is gone")
    if second:
        real, type(base).forward = type(base).forward, broken_pass
    told("pass", lambda: analyze_pair(base, aligned, tokens=tokens, **options))
    if second:
        type(base).forward = real
    # after the last exchange of the work itself
    if second:
        made, analysis.PairAnalysis = analysis.PairAnalysis, None
    told("end", lambda: analyze_pair(base, aligned, tokens=tokens, **options))
    if second:
        analysis.PairAnalysis = made
    # all of them by themselves, with words of their own
    told("all", lambda: analyze_pair(base, aligned, tokens=tokens, **{**options, "ranks": [0]}))
    told("first", lambda: analyze_trajectory([(0, base), (1, aligned)], tokens=tokens, store="/dev/null/x", **options))
    # and still able to work: one sequence for two processes, sequences of other lengths
    told("fine", lambda: analyze_pair(base, aligned, tokens=[tokens[0, :7]], **options))
    uneven = [t[:n] for t, n in zip(tokens, (12, 3, 9, 2, 5))]
    told("uneven", lambda: analyze_pair(base, aligned, tokens=uneven, **options))

# what a Trainer's callback does: the first process alone records, while the other waits for the next step
def recorded_by_the_first():
    model, kept = AutoModelForCausalLM.from_pretrained(aligned_directory), f"{out}/run"
    wrapped = DistributedDataParallel(model)
    choices = dict(tokens=TOKENS, ranks=[1], groups=1, matrices=["W_K", "W_O"], subspaces_from="each")
    recorder = TrajectoryRecorder(wrapped, 1, **choices) if processes.rank == 0 else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        if step > 0:
            rows = tiny.tokens(2, 12, seed=10 * step + processes.rank)
            wrapped(rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if recorder is not None:
            recorder.step(step)
            model.save_pretrained(f"{kept}/checkpoint-{step}")
    if recorder is not None:
        truth = analyze_trajectory(kept, distributed=False, progress=False, **choices).table
        columns = ["step", "relative", "activation_matched", "delta_norm", "verdict"]
        pd.testing.assert_frame_equal(recorder.result().table[columns], truth[columns], check_exact=True)

# a training whose parameters are sharded, after a step
def one_step(wrap):
    model = wrap(AutoModelForCausalLM.from_pretrained(aligned_directory))
    model(TOKENS, labels=TOKENS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model
def layers(model):
    for layer in model.transformer.h:
        fully_shard(layer)
    return model
def flat(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))

with started_processes() as processes:
    assert processes.count == 2
    base, aligned = (open_model(d, torch.float64, device="cpu") for d in (base_directory, aligned_directory))
    the_same_work()
    what_stops_one()
    told("recorded", recorded_by_the_first)
    told("sharded", lambda: TrajectoryRecorder(one_step(fully_shard), 1, tokens=TOKENS))
    told("layers", lambda: TrajectoryRecorder(one_step(layers), 1, tokens=TOKENS))
    unsharded = AutoModelForCausalLM.from_pretrained(aligned_directory)
    told("flat", lambda: TrajectoryRecorder(flat(unsharded), 1, tokens=TOKENS))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, to all that are left
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    told("killed", lambda: analyze_pair(base, aligned, tokens=TOKENS, ranks=[1], groups=1, progress=False))
"""


@pytest.fixture(name="written", scope="module")
def written_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes under torchrun's own launcher wrote, with gloo, until one of them was killed."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(_SCRIPT)
    directories = (str(tiny.hf_directory("gpt2", delta=δ)) for δ in (0.0, 0.05))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, str(folder / "script.py"), *directories, str(folder)],
        capture_output=True, text=True, check=False, env=environment, timeout=500,
    )  # fmt: skip
    assert "Signal 9 (SIGKILL)" in ended.stderr, ended.stderr[-3000:]
    assert (folder / "killed-0").exists(), ended.stderr[-3000:]
    return folder


@pytest.fixture
def told(written: Path) -> dict[str, tuple[float, str]]:
    """How each case ended in each process, and after how many seconds."""
    found = {}
    for path in filter(Path.is_file, written.glob("*-[01]")):
        seconds, _, words = path.read_text().partition(" ")
        found[path.name] = float(seconds), words
    return found


# --- the same work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["loaded", "files", "few"])
def test_two_processes_give_what_one_gives(written: Path, case: str) -> None:
    """In float64, so that only the order of sums differs; every process returns the same, bit for bit."""
    first, second = (PairAnalysis.load(written / f"{case}-{rank}") for rank in range(2))
    base, aligned = (tiny.bridge("gpt2", torch.float64, delta=δ) for δ in (0.0, 0.05))
    options = FEW | {"tokens": TOKENS[:4]} if case == "few" else EACH_POINT
    other = aligned if case == "loaded" else tiny.hf_directory("gpt2", delta=0.05)
    whole = analyze_pair(base, other, **options, sensitivity=case == "loaded")
    assert first.config == second.config
    assert (first.config["processes"], whole.config["processes"]) == (2, 1)
    assert first.config["tokens"] == whole.config["tokens"]
    assert [note for note in first.notes if "passes over" not in note] == list(whole.notes)
    for name in PairAnalysis.TABLES:
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True, obj=name)
        pd.testing.assert_frame_equal(getattr(first, name), getattr(whole, name), rtol=1e-9, atol=1e-9, obj=name)
    for name, array in first.arrays.items():
        assert torch.equal(array.nan_to_num(), second.arrays[name].nan_to_num()), name
    if case == "loaded":
        pd.testing.assert_frame_equal(second.sensitivity(), whole.sensitivity(), rtol=1e-6, atol=1e-9)


def random_walk() -> dict[int, Any]:
    base = tiny.bridge("gpt2", torch.float64)
    return {0: base} | {step: tiny.perturbed(base, 0.02, seed) for step, seed in ((10, 1), (30, 2), (100, 3))}


@pytest.mark.parametrize("case", ["sweep", "resumed", "each"])
def test_two_processes_share_a_sweep(written: Path, case: str) -> None:
    """Three checkpoints for two processes, out of a generator; what the first one stored is found again by both."""
    first, second = (TrajectoryAnalysis.load(written / f"{case}-{rank}") for rank in range(2))
    more: dict[str, Any] = {"subspaces_from": "each"} if case == "each" else {"reference": "both"}
    whole = analyze_trajectory(random_walk(), **FEW, **more)
    assert first.steps == second.steps == [10, 30, 100]
    for name in TrajectoryAnalysis.TABLES:
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name), check_exact=True, obj=name)
        pd.testing.assert_frame_equal(getattr(first, name), getattr(whole, name), rtol=1e-9, atol=1e-9, obj=name)
    assert first.notes == second.notes == whole.notes
    if case == "sweep":
        pd.testing.assert_frame_equal(
            TrajectoryAnalysis.from_store(written / "store").table, first.table, check_exact=True
        )


def test_all_processes_hear_of_an_error_in_a_sweep(written: Path, told: dict[str, tuple[float, str]]) -> None:
    """The second process found the NaN; the checkpoint before it is kept."""
    for rank in range(2):
        assert "blocks.1.mlp.W_in of the checkpoint at step 30" in told[f"broken-{rank}"][1]
        assert "in the order of their steps" in told[f"unsorted-{rank}"][1]
    assert StoreReader(written / "store-broken").steps == [10]


def test_processes_that_were_given_different_texts_are_told(written: Path, told: dict[str, tuple[float, str]]) -> None:
    for rank in range(2):
        words = "ValueError: expected the same arguments in all 2 processes, got different ones; pass"
        assert told[f"differ-{rank}"][1].startswith(words)
        alone = PairAnalysis.load(written / f"alone-{rank}")
        assert (alone.config["sequences"], alone.config["processes"]) == (8 + rank, 1)


# --- what stops one of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "reason"), [
    ("path", "ValueError: expected an existing directory or a name on the Hub, got '/no/such/model'"),
    ("pass", "the device is gone"),
    ("end", "AttributeError: 'NoneType' object has no attribute 'assemble'"),
])  # fmt: skip
def test_what_stops_one_process_reaches_the_other(told: dict[str, tuple[float, str]], case: str, reason: str) -> None:
    assert reason in told[f"{case}-1"][1]
    seconds, words = told[f"{case}-0"]
    assert words.startswith("StoppedElsewhere: expected all 2 processes to go on, got process 1 stopped by ")
    assert reason in words
    assert abs(seconds - told[f"{case}-1"][0]) < 5


def test_what_stops_all_is_said_by_each(told: dict[str, tuple[float, str]]) -> None:
    for rank in range(2):
        assert told[f"all-{rank}"][1].startswith("ValueError: expected ")
        assert "expected a folder" in told[f"first-{rank}"][1]


def test_few_and_uneven_sequences_go_through(told: dict[str, tuple[float, str]]) -> None:
    for case in ("fine", "uneven"):
        assert {told[f"{case}-{rank}"][1] for rank in range(2)} == {"went through"}


def test_the_first_of_two_processes_records_what_its_checkpoints_hold(told: dict[str, tuple[float, str]]) -> None:
    assert [told[f"recorded-{rank}"][1] for rank in range(2)] == ["went through", "went through"]


@pytest.mark.parametrize(
    ("case", "place"), [("sharded", "the model"), ("layers", "transformer.h.0"), ("flat", "the model")]
)
def test_shards_of_fsdp_are_refused(told: dict[str, tuple[float, str]], case: str, place: str) -> None:
    words = (
        f"ValueError: expected whole parameters, got FSDP's shards at {place}; pass the checkpoints that the training"
    )
    for rank in range(2):
        assert told[f"{case}-{rank}"][1].startswith(words)


def test_a_killed_process_ends_the_other_with_one_line(told: dict[str, tuple[float, str]]) -> None:
    seconds, words = told["killed-0"]
    assert words.startswith("LostProcess: expected all 2 processes to answer, got none from one of them")
    assert "\n" not in words
    assert seconds < 10
