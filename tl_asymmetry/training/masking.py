"""Masked-language-model targets: which tokens an encoder has to guess, drawn from a seed and the tokens themselves."""

from __future__ import annotations

from collections.abc import Collection

import torch
import xxhash
from jaxtyping import Bool, Int
from torch import Tensor


def mask_tokens(
    tokens: Int[Tensor, " pos"],
    *,
    mask_token: int,
    d_vocab: int,
    special: Collection[int] = (),
    share: float = 0.15,
    seed: int = 0,
) -> tuple[Int[Tensor, " pos"], Bool[Tensor, " pos"]]:
    """A sequence as an encoder reads it in training, and which of its positions it has to predict.

    Of all tokens that are not special a `share` is chosen (one at least); of these 80 % become the mask token, 10 % a
    random token and 10 % stay (Devlin et al. 2019, "BERT", sec. 3.1). The choice depends on the sequence and the seed
    alone, not on the batch.

    Args:
        tokens: token ids.
        mask_token: id of the mask token.
        d_vocab: number of tokens a random one is drawn from.
        special: ids never chosen, such as [CLS] and [SEP].
        share: of the tokens.
        seed: other seeds, other positions.

    Raises:
        ValueError: a share outside (0, 1], or nothing but special tokens.

    Example:
        >>> tokens = torch.arange(10, 30)
        >>> inputs, targets = mask_tokens(tokens, mask_token=3, d_vocab=50)
        >>> int(targets.sum()), bool((inputs == tokens)[~targets].all())
        (3, True)
    """
    if not 0 < share <= 1:
        raise ValueError(f"expected a share above 0 and at most 1, got {share}; pass share=0.15")
    free = torch.ones_like(tokens, dtype=torch.bool)
    for i in special:
        free &= tokens != i
    places = free.nonzero().flatten()
    if len(places) == 0:
        raise ValueError("expected a sequence with a token that is not special, got none; leave it out")
    generator = sequence_generator(tokens, seed)
    count = max(1, round(share * len(places)))
    chosen = places[torch.randperm(len(places), generator=generator)[:count]]
    fate = torch.rand(count, generator=generator)
    drawn = torch.randint(d_vocab, (count,), generator=generator)
    inputs, targets = tokens.clone(), torch.zeros_like(free)
    inputs[chosen] = torch.where(fate < 0.8, mask_token, torch.where(fate < 0.9, drawn, tokens[chosen]))
    targets[chosen] = True
    return inputs, targets


def sequence_generator(tokens: Int[Tensor, " pos"], seed: int) -> torch.Generator:
    """A CPU generator of its own for each sequence and seed, wherever in the data the sequence stands."""
    content = tokens.cpu().to(torch.int64).contiguous().numpy().tobytes()
    return torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(content, seed=seed % 2**64) >> 1)
