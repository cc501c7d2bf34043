"""A notebook without ipywidgets: bars of text, and no warning about them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_NOTEBOOK = """
import sys, types, warnings
warnings.simplefilter("always")
for name in ("ipykernel", "ipykernel.zmqshell", "IPython"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["IPython"].get_ipython = lambda: None
sys.modules["ipywidgets"] = None
"""


@pytest.mark.parametrize(("first", "warned"), [("import tl_asymmetry", False), ("", True)])
def test_a_notebook_without_ipywidgets_is_not_warned(first: str, warned: bool) -> None:
    settings = {"PYTHONPATH": str(Path(__file__).parents[2])}
    script = f"{_NOTEBOOK}\n{first}\nfrom tqdm.auto import tqdm\nlist(tqdm(range(2)))"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("IProgress not found" in done.stderr) == warned
    assert "2/2" in done.stderr
