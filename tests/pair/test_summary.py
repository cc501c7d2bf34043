"""What the summary says, and what it must not say: every sentence rests on its test."""

import dataclasses
import functools

import pytest
import torch

from tests import tiny
from tl_asymmetry import ModelView, analyze_pair

TOKENS = tiny.tokens(9, 12)


@functools.cache
def edited(kind):
    """An analysis of a model of which one head, or two matrices by a rank-1 adapter since merged, changed."""
    base = tiny.build("gpt2", tiny.KINDS[0])
    aligned = tiny.perturbed(base, 0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in range(tiny.N_LAYERS):
            for matrix in ("W_Q", "W_V") if kind == "adapter" else ():
                W = ModelView(aligned).weight(layer, matrix)
                A = torch.randn(W.shape[1], 1, generator=generator)
                W += 0.1 * A @ torch.randn(W.shape[0], 1, W.shape[2], generator=generator)
        if kind == "head":
            W = ModelView(aligned).weight(0, "W_Q")
            W[1] += 0.1 * torch.randn(W[1].shape, generator=generator)
    return analyze_pair(base, aligned, tokens=TOKENS, ranks=[4], groups=1, progress=False)


def sentences(result):
    return " ".join(result.summary().split("Notes:")[0].split())


def test_an_edit_of_one_head_is_told_by_its_name():
    words = sentences(edited("head"))
    assert "W_Q changed in 1 of 8 heads: L0H1." in words
    assert "W_K, W_V, W_O, W_in, W_out did not change." in words
    assert "own input (1 tested): " in words
    assert "nan" not in words.lower()
    assert "Asymmetry" not in words  # the write side did not change


def test_of_one_direction_it_speaks_in_the_singular():
    base = tiny.build("gpt2", tiny.KINDS[0])
    options = {"tokens": TOKENS, "ranks": [1], "matrices": ["W_Q", "W_O"], "groups": 1, "progress": False}
    words = sentences(analyze_pair(base, tiny.perturbed(base, 0.05), **options))
    assert "Reading, in the 1 leading direction of each matrix's own input (8 tested)" in words
    assert "Writing, in the 1 leading prediction direction (8 tested)" in words


def test_few_tokens_are_said_and_less_than_training_gives_is_not_tested():
    result = edited("head")
    words = sentences(result)
    assert "99 tokens in 9 sequences are too few" in words
    assert "Adam on these inputs; 1 tested): 0 above that (q ≤ 0.05), 1 not told apart from it" in words
    assert "want 480 tokens (10 for each of the 48 dimensions) and 16 sequences" in words
    read = result.table[(result.table["pathway"] == "read") & (result.table["delta_norm"] > 0)]
    assert read["flags"].str.contains("few_tokens").all()
    assert read["excess_p"].notna().all()
    assert not ((result.tests["null"] == "adam") & (result.tests["side"] == "below")).any()
    shown = result._summary_table().query("matrix == 'W_Q' and subspace == 'attn_in'").iloc[0]
    assert (shown["vs chance"], shown["vs expected"]) == ("0↑ 0↓ of 1", "0↑ of 1")


def test_a_merged_adapter_is_not_held_against_whole_matrices():
    result = edited("adapter")
    assert result.config["low_rank"] == {"W_Q": 1, "W_V": 1}
    words = sentences(result)
    assert "W_Q (rank 1), W_V (rank 1) has a rank as low as a merged adapter's" in words
    assert "Held against" not in words
    shown = result._summary_table().query("matrix == 'W_Q'")
    assert shown["vs chance"].str.endswith("of 8").all()
    assert (shown["vs expected"] == "").all()
    assert edited("head").config["low_rank"] == {}


def test_of_two_unrelated_models_nothing_is_counted():
    result = edited("adapter")
    strangers = dataclasses.replace(result, config=result.config | {"unrelated": ["W_Q", "W_V"]})
    words = sentences(strangers)
    assert "point elsewhere than the base's (median cosine of a head's weights under 0.3)" in words
    assert "not told apart" not in words
    assert "false findings" not in words


@pytest.mark.parametrize(("kept", "said"), [(3, "5 of 8 heads: all but L0H0, L0H1, L0H2."), (5, "3 of 8 heads: L1H1,")])
def test_of_heads_that_changed_and_did_not_the_fewer_are_named(kept, said):
    result = edited("adapter")
    table = result.table.copy()
    queries = table["matrix"] == "W_Q"
    table.loc[queries & (4 * table["layer"] + table["head"] < kept), "delta_norm"] = 0
    words = sentences(dataclasses.replace(result, table=table))
    assert f"W_Q changed in {said}" in words
