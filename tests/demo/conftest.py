import jaxtyping
import pytest
import torch


@pytest.fixture
def unchecked_types():
    """As in production, where no type checker sees a wrong argument before the code does.

    Also needed where Python's global random state is watched: the checker samples the items of long lists with it.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much where it has to wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
