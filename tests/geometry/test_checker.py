"""The kernels' tests run under the checker of shapes."""

import os

import jaxtyping
import pytest
import torch

from tl_asymmetry.geometry.references import inverse_size


@pytest.mark.skipif(os.environ.get("JAXTYPING_DISABLE") == "1", reason="switched off")
@pytest.mark.parametrize("wrong", [torch.ones(2, 2), "ones"])
def test_a_wrong_shape_is_seen(wrong):
    with pytest.raises(jaxtyping.TypeCheckError, match="diagonal"):
        inverse_size(wrong)
