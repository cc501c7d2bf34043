"""What the README says of the embedded pair is what its own first block prints."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_numbers_are_those_of_its_first_block(capsys) -> None:
    block = re.search(r"```python\n(.*?)```", README, flags=re.S)
    assert block is not None
    exec(compile(block[1].replace("demo_texts(400)", "demo_texts(400), progress=False"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    table = re.search(r"```text\n(.*?)```", README, flags=re.S)
    assert table is not None
    assert len(table[1].splitlines()) == 7
    assert {" ".join(line.split()) for line in table[1].splitlines()} <= {
        " ".join(line.split()) for line in printed.splitlines()
    }
    said = " ".join(README.split())
    reading = re.search(r"\((\d+) tested\): (\d+) above a random subspace .* median (\S+) times chance", printed)
    trained = re.search(r"\(Adam on these inputs; \d+ tested\): (\d+) above .* median (\S+) times it", printed)
    index = re.search(r"over layers is (\S+); the read side's reference alone gives (\S+) by chance", printed)
    assert reading is not None
    assert trained is not None
    assert index is not None
    tested, above, times = reading.groups()
    assert f"({above} of {tested}, q ≤ 0.05; median {float(times):.1f} times chance)" in said
    assert trained[1] == "0"
    assert (
        f"none is told apart from what Adam gives on these inputs** (median {float(trained[2]):.1f} times it)" in said
    )
    assert f"The asymmetry index is {index[1]}; the read side's reference alone gives {index[2]}." in said
