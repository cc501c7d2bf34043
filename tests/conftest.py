"""Shared by all tests: one thread each (two cores serve two workers), and where real models by others lie."""

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)

DATA = Path(os.environ.get("TL_ASYMMETRY_DATA", Path(__file__).parent.parent / "../shared/data")).resolve()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real models and texts; skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real models: {DATA} is absent (set TL_ASYMMETRY_DATA)")
    return DATA


@pytest.fixture
def unchecked_types():
    """As in production, where no type checker sees a wrong argument before the code does.

    Also needed where Python's global random state is watched: the checker samples the items of long lists with it.
    """
    before = jaxtyping.config.jaxtyping_disable  # JAXTYPING_DISABLE=1 switches the checker off throughout
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
