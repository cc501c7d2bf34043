"""How far one prediction is from another, also when they hardly differ."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ELEMENTS_AT_A_TIME = {"cpu": 1 << 18, "other": 1 << 26}
_LARGEST_EXPONENT = 80.0


class Prediction:
    """Next-token predictions, to be compared with what others predict at the same places.

    With δ the difference of logits, p the probabilities here and x = δ − E_p[δ]:
    KL(here ‖ there) = log E_p[eˣ] = log(1 + E_p[eˣ − 1 − x]), every term of which is positive: no digit is lost where
    the two hardly differ, where a difference of log-probabilities in float32 would be all rounding below 1e-6 nats.

    Args:
        logits: one row for each place, `[place, vocab]`; 16-bit logits are widened to float32.

    Example:
        >>> here = Prediction(torch.tensor([[0.0, 0.0]]))
        >>> divergence, gain = here.compare(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        >>> round(divergence.item(), 6), round(gain.item(), 6)
        (0.120115, 0.379885)
    """

    def __init__(self, logits: Float[Tensor, "place vocab"]) -> None:
        self.logits = _wide(logits)
        self.probabilities = self.logits.softmax(-1)

    def compare(
        self, logits: Float[Tensor, "place vocab"], targets: Int[Tensor, " place"]
    ) -> tuple[Float[Tensor, " place"], Float[Tensor, " place"]]:
        """KL(here ‖ there) and how much more likely the targets are there, both in nats, float64.

        Args:
            logits: there, on the same device, for the same places and vocabulary.
            targets: the token that came next.
        """
        vocabulary = self.logits.shape[-1]
        at_a_time = _ELEMENTS_AT_A_TIME.get(logits.device.type, _ELEMENTS_AT_A_TIME["other"])
        rows = max(1, at_a_time // vocabulary)
        divergences, gains = [], []
        # In pieces that stay in the processor's cache.
        for z, p, there, target in zip(
            *(part.split(rows) for part in (self.logits, self.probabilities, logits, targets)), strict=True
        ):
            x = _wide(there) - z
            mean = torch.linalg.vecdot(p, x)
            gain = x.gather(-1, target.unsqueeze(-1)).squeeze(-1) - mean
            x -= mean.unsqueeze(-1)
            divergence = torch.linalg.vecdot(p, x.expm1().sub_(x)).log1p().clamp(min=0)
            beyond = x.amax(-1) > _LARGEST_EXPONENT
            if bool(beyond.any()):
                divergence = torch.where(beyond, (p.log() + x).logsumexp(-1), divergence)
            divergences.append(divergence.double())
            # log Σ p e^δ, by which the normalising sums differ, is mean + divergence
            gains.append(gain.double() - divergence.double())
        return torch.cat(divergences), torch.cat(gains)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
