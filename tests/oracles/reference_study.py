"""A rank-1 study the plain way: weights written anew for every edit, whole forward passes, float64 definitions."""

from __future__ import annotations

import torch

from tl_asymmetry import ModelView


def predictions(view: ModelView, sequences) -> list[torch.Tensor]:
    """Log-probabilities of the next token, `[pos, vocab]` for each sequence, run one by one."""
    with torch.no_grad(), view.evaluating():
        return [view.run(tokens[None], logits=True)[0].double().log_softmax(-1) for tokens in sequences]


def under(view: ModelView, edit, sequences) -> list[torch.Tensor]:
    """The same with an edit's matrix added to the weights, which are put back from a copy of the whole matrix."""
    weight = view.weight(edit.layer, edit.matrix)
    copy = weight.clone()
    target = weight if edit.head is None else weight[edit.head]
    target += edit.change().to(target)
    found = predictions(view, sequences)
    weight.copy_(copy)
    return found


def kl(p: list[torch.Tensor], q: list[torch.Tensor]) -> float:
    """Mean over predicted places of Σ p (log p − log q)."""
    rows = [(a.exp() * (a - b)).sum(-1)[:-1] for a, b in zip(p, q, strict=True)]
    return torch.cat(rows).mean().item()


def cross_entropy(p: list[torch.Tensor], sequences) -> float:
    rows = [-a[:-1].gather(-1, t[1:, None])[:, 0] for a, t in zip(p, sequences, strict=True)]
    return torch.cat(rows).mean().item()


def log_prob(p: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> float:
    """Of the counted tokens of one sequence."""
    return sum(p[i - 1, tokens[i]].item() for i in range(1, len(tokens)) if mask[i])


def margin(model, preferences, edit=None) -> float:
    """Mean over pairs of log-probability of chosen less that of rejected; relative to nothing."""
    total = 0.0
    for half, sign in ((preferences.chosen, 1), (preferences.rejected, -1)):
        rows = list(half.tokens)
        found = predictions(model, rows) if edit is None else under(model, edit, rows)
        total += sign * sum(log_prob(p, t, m) for p, t, m in zip(found, rows, half.mask, strict=True))
    return total / len(preferences.chosen.tokens)
