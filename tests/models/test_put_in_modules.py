"""Modules around or in the place of a model's own are named, or refused where what is read is not there."""

import re

import pytest
import torch
import transformers

from tests import tiny
from tl_asymmetry import ModelView


class _Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("wrapper", [torch.nn.Sequential, _Wrapped])
def test_a_module_around_the_models_own_is_named(kind: str, wrapper: type[torch.nn.Module]) -> None:
    model = tiny.toy(kind=kind)
    assert ModelView(model).foreign_hooks() == []
    for owner, name in ((model, "ln_final"), (model.blocks[1], "ln2")):
        owner._modules[name] = wrapper(owner._modules[name])
    found = ModelView(model).foreign_hooks()
    assert f"{wrapper.__name__} in the place of ln_final" in found
    assert any(re.fullmatch(rf"{wrapper.__name__} in the place of blocks\.1\.\S*ln2", words) for words in found)
    model.blocks[0]._modules["attn"] = wrapper(model.blocks[0]._modules["attn"])
    with pytest.raises(
        ValueError, match=rf"expected the model's own modules, got .*{wrapper.__name__} in the place of"
    ):
        ModelView(model)


def test_what_changes_a_plain_models_modules_is_named() -> None:
    model = transformers.GPT2LMHeadModel(tiny.CONFIGS["gpt2"]()).eval()
    assert ModelView(model).foreign_hooks() == []
    model.transformer.h[0].mlp = torch.nn.Sequential(model.transformer.h[0].mlp)
    model.transformer.h[1].ln_1.forward = lambda x: 2 * x
    torch.nn.utils.parametrizations.weight_norm(model.transformer.h[1].mlp.c_fc)
    model.transformer.ln_f = _Wrapped(model.transformer.ln_f)
    assert sorted(ModelView(model).foreign_hooks()) == [
        "Sequential in the place of transformer.h.0.mlp",
        "_Wrapped in the place of transformer.ln_f",
        "a parametrisation of transformer.h.1.mlp.c_fc",
        "another forward of transformer.h.1.ln_1",
    ]
