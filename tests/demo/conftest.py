import jaxtyping
import pytest


@pytest.fixture
def unchecked_types():
    """As in production, where no type checker sees a wrong argument before the code does.

    Also needed where Python's global random state is watched: the checker samples the items of long lists with it.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
