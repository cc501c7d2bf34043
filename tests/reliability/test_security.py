"""Every sentence of SECURITY.md that no other test holds, and that each names tests which exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.reliability.conftest import OPTIONS
from tl_asymmetry import PairAnalysis, analyze_pair, weights_from
from tl_asymmetry.results.result import load
from tl_asymmetry.store import read_part, write_part

ROOT = Path(__file__).parents[2]
HOSTILE = '"><img src=x onerror="attacked=1"></script><script>attacked=1</script>'


def test_every_sentence_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    sentences = [line for line in text.splitlines() if line.startswith("- ")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(sentences) >= 10
    for sentence in sentences:
        named = re.findall(r"`(test_\w+)`", sentence)
        assert named, sentence
        for name in named:
            assert f"def {name}(" in sources, name


def test_a_forged_result_loads(results: tuple[PairAnalysis, PairAnalysis], tmp_path: Path) -> None:
    file = results[0].save(tmp_path) / "result.safetensors"
    document, numbers = read_part(file, "result")
    numbers["table/table/fraction"].fill_(0.5)
    write_part(file, "result", numbers, document)
    assert (load(tmp_path).table["fraction"] == 0.5).all()


def test_a_saved_pair_holds_its_tokens(results: tuple[PairAnalysis, PairAnalysis], tmp_path: Path) -> None:
    numbers = load_file(results[0].save(tmp_path) / "result.safetensors")
    assert torch.equal(numbers["array/tokens"].view(9, 12).long(), OPTIONS["tokens"])


def test_hostile_names_and_texts_stay_text(tmp_path: Path) -> None:
    base = tiny.bridge("gpt2")
    base.cfg.model_name = HOSTILE
    result = analyze_pair(base, tiny.perturbed(base), matrices=["W_Q"], **OPTIONS)
    for page in (result.to_html(tmp_path / "report.html"), result.to_explorer(tmp_path / "explorer.html", model=base)):
        text = page.read_text(encoding="utf-8")
        assert "<img src=x" not in text
        assert "</script><script>attacked" not in text
        assert "default-src 'none'" in text


def test_a_chat_template_stays_in_its_sandbox() -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    base = tiny.bridge("gpt2")
    base.tokenizer = tiny.tokenizer(chat_template=template, name="hostile")
    chats = [[{"role": "user", "content": "w1 w2 w3"}]]
    with pytest.raises(ValueError, match="expected"):
        analyze_pair(base, tiny.perturbed(base), chats, ranks=[1], progress=False)


def test_an_adapter_s_base_is_fetched_only_without_one_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file
    from transformers import AutoConfig

    asked: list[str] = []

    def fetching(name: str, **_: object) -> None:
        asked.append(str(name))
        raise OSError("no network")

    module = "base_model.model.transformer.h.0.attn.c_attn"
    shapes = {"A": (2, tiny.D_MODEL), "B": (3 * tiny.D_MODEL, 2)}
    factors = {f"{module}.lora_{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "someone/private-base",
               "target_modules": ["c_attn"], "fan_in_fan_out": True}  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    base = tiny.bridge("gpt2")
    monkeypatch.setattr(AutoConfig, "from_pretrained", fetching)
    weights_from(tmp_path, base=base)
    assert asked == []
    with (
        pytest.warns(UserWarning, match="fetching the configuration of 'someone/private-base'"),
        pytest.raises(ValueError, match="expected the adapter's base 'someone/private-base'"),
    ):
        weights_from(tmp_path)
    assert asked == ["someone/private-base"]
