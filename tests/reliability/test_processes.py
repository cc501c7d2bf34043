"""One process stops, or is killed: the others end at once, with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

_SCRIPT = """
import os, signal, sys, time, warnings
import torch
torch.set_num_threads(1)
import torch.distributed as dist
import pandas as pd
from datetime import timedelta
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from tests import tiny
from tl_asymmetry import TrajectoryRecorder, analyze_pair, analyze_trajectory
from tl_asymmetry.models import capture as capture_module

warnings.simplefilter("ignore")
base_directory, out = sys.argv[1:]
rank = int(os.environ["RANK"])
base = tiny.bridge("gpt2")  # before there are processes: transformers lets the first alone write a configuration
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
options = dict(ranks=[1], groups=1, batch_size=2, progress=False)
tokens = tiny.tokens(5, 12)

def told(name, work):
    began = time.monotonic()
    try:
        work()
        words = "went through"
    except Exception as error:
        words = f"{type(error).__name__}: {error}"
    with open(f"{out}/{name}-{rank}", "w") as file:
        file.write(f"{time.monotonic() - began:.1f} {words}")

aligned = tiny.perturbed(base)
# before the first exchange: a path that only one of them has
told("path", lambda: analyze_pair(base, base_directory if rank == 0 else "/no/such/model", tokens=tokens, **options))
# in the middle of the work
def broken_pass(*arguments, **keywords):
    raise RuntimeError("the device is gone")
if rank == 1:
    real, type(base).forward = type(base).forward, broken_pass
told("pass", lambda: analyze_pair(base, aligned, tokens=tokens, **options))
if rank == 1:
    type(base).forward = real
# after the last exchange of the work itself
from tl_asymmetry.pair import analysis
if rank == 1:
    made, analysis.PairAnalysis = analysis.PairAnalysis, None
told("end", lambda: analyze_pair(base, aligned, tokens=tokens, **options))
if rank == 1:
    analysis.PairAnalysis = made
# all of them by themselves, with words of their own
told("all", lambda: analyze_pair(base, aligned, tokens=tokens, **{**options, "ranks": [0]}))
told("first", lambda: analyze_trajectory([(0, base), (1, aligned)], tokens=tokens, store="/dev/null/x", **options))
# and still able to work: one sequence for two processes, sequences of other lengths
told("fine", lambda: analyze_pair(base, aligned, tokens=[tokens[0, :7]], **options))
told("uneven", lambda: analyze_pair(base, aligned, tokens=[t[:n] for t, n in zip(tokens, (12, 3, 9, 2, 5))], **options))
# a training whose parameters are sharded, after a step
def one_step(wrap):
    model = wrap(AutoModelForCausalLM.from_pretrained(base_directory))
    model(tokens, labels=tokens).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return model
def layers(model):
    for layer in model.transformer.h:
        fully_shard(layer)
    return model
def flat(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
# what a Trainer's callback does: the first process alone records, while the other waits for the next step
def recorded_by_the_first():
    model, kept = AutoModelForCausalLM.from_pretrained(base_directory), f"{out}/run"
    wrapped = DistributedDataParallel(model)
    choices = dict(tokens=tokens, ranks=[1], groups=1, subspaces_from="each")
    recorder = TrajectoryRecorder(wrapped, 1, **choices) if rank == 0 else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        if step > 0:
            rows = tiny.tokens(2, 12, seed=10 * step + rank)
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
told("recorded", recorded_by_the_first)
told("sharded", lambda: TrajectoryRecorder(one_step(fully_shard), 1, tokens=tokens))
told("layers", lambda: TrajectoryRecorder(one_step(layers), 1, tokens=tokens))
told("flat", lambda: TrajectoryRecorder(flat(AutoModelForCausalLM.from_pretrained(base_directory)), 1, tokens=tokens))
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
told("killed", lambda: analyze_pair(base, aligned, tokens=tokens, **options))
"""


@pytest.fixture(name="told", scope="module")
def told_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, str]]:
    """How each case ended in each process, and after how many seconds."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "script.py").write_text(_SCRIPT)
    command = [sys.executable, str(folder / "script.py"), str(tiny.hf_directory("gpt2", delta=0.05)), str(folder)]
    settings = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    running = [
        subprocess.Popen(command, env=os.environ | settings | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in running]
    assert [process.returncode for process in running] == [0, -9], errors
    found = {}
    for path in folder.glob("*-[01]"):
        seconds, _, words = path.read_text().partition(" ")
        found[path.name] = float(seconds), words
    return found


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
