"""Continuations sampled from a demonstration model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

Tokens = list[int]


@torch.no_grad()
def sample_continuations(
    model: GPT2LMHeadModel,
    prompts: Sequence[Tokens],
    generators: Sequence[torch.Generator],
    *,
    end: int,
    forbidden: Sequence[int],
    rows: int = 1536,
    advance: Callable[[int], object] | None = None,
) -> list[Tokens | None]:
    """One continuation per prompt at temperature 1, up to and including the end token.

    Prompts of all lengths run side by side without padding: at each position a row takes its prompt's token while
    it has one and a sampled token after that. Row i uses only `generators[i]`, one uniform number per position, so
    a result does not depend on what else is in the batch.

    Args:
        model: the model, in eval mode.
        prompts: token ids, `<bos>` included.
        generators: one per prompt; the same object may not be given twice.
        end: id of the token that ends a continuation.
        forbidden: ids never sampled (padding and the like).
        rows: prompts per forward pass.
        advance: called with the number of prompts done after each pass.

    Returns:
        Token ids per prompt, without the prompt; None where the context was full before the end token.
    """
    n_ctx = model.config.n_positions
    results: list[Tokens | None] = []
    for first in range(0, len(prompts), rows):
        batch = prompts[first : first + rows]
        uniforms = torch.stack([torch.rand(n_ctx, generator=g) for g in generators[first : first + rows]])
        lengths = torch.tensor([len(prompt) for prompt in batch])
        tokens = torch.full((len(batch), n_ctx), end)
        for i, prompt in enumerate(batch):
            tokens[i, : len(prompt)] = torch.tensor(prompt)
        done = torch.zeros(len(batch), dtype=torch.bool)
        cache = None
        for position in range(n_ctx - 1):
            output = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1]
            logits[:, list(forbidden)] = -torch.inf
            # Inverse of the distribution function in float64: the last value is 1 to 1e-15, above any float32 u.
            cumulated = logits.double().softmax(-1).cumsum(-1)
            u = uniforms[:, position + 1, None].double()
            drawn = torch.searchsorted(cumulated, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
            free = (lengths <= position + 1) & ~done
            tokens[free, position + 1] = drawn[free]
            done |= free & (drawn == end)
            if bool(done.all()):
                break
        for row, start, finished in zip(tokens.tolist(), lengths.tolist(), done.tolist(), strict=True):
            continuation = row[start:]
            results.append(continuation[: continuation.index(end) + 1] if finished else None)
        if advance is not None:
            advance(len(batch))
    return results
