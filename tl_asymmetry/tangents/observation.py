"""One checkpoint of a tangent analysis: activations and gradients, reduced to what any basis can be held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.sample import RowSample
from tl_asymmetry.models.capture import Site
from tl_asymmetry.models.texts import batches
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.models.weight_gradients import WeightGradients, WeightSite
from tl_asymmetry.names import MATRICES, POINTS, kind_of
from tl_asymmetry.tangents.data import COUNTED, GROUP, INPUT, ORIGINAL, STRATUM, TARGET, TangentData
from tl_asymmetry.training.masking import sequence_generator
from tl_asymmetry.training.objectives import TokenBatch, sequence_log_probs

OUTPUT = "resid_post"
"""Where per-token gradients are taken: what a block hands on."""

SUMS = ("n", "f", "ff", "d", "dd", "fd")
"""What a correlation of log-frequency f and distance d needs: sums of 1, f, f², d, d² and f·d."""


@dataclass(frozen=True)
class Observation:
    """What one checkpoint has shown. It knows no basis, so that it can be taken before one is fitted."""

    step: int
    """Training step."""
    loss: float
    """Mean loss in nats per predicted token."""
    activations: dict[Site, StreamingMoments]
    """Moments of the activations a basis is fitted on, by point and layer."""
    samples: dict[Site, RowSample]
    """Rows of the same activations, for semi-NMF; empty unless asked for."""
    weights: dict[WeightSite, Tensor]
    """∂L/∂W of the mean loss, float64, shaped like the weights."""
    tokens: dict[tuple[int, int], StreamingMoments]
    """Per layer and stratum: moments of ∂(Σ loss)/∂x at the block output over the tokens where it is not zero."""
    distances: Float[Tensor, "layer stratum two"]
    """Number of tokens and sum of their distances from the centroid of the block output."""
    correlation: Float[Tensor, "layer group six"]
    """`SUMS` for each group of sequences."""

    def arrays(self) -> dict[str, Tensor]:
        """All numbers as named arrays; the inverse of `from_arrays`."""
        arrays = {"distances": self.distances, "correlation": self.correlation}
        arrays["loss"] = torch.tensor(self.loss, dtype=torch.float64)
        for (layer, matrix), gradient in self.weights.items():
            arrays[f"weight/{layer}/{matrix}"] = gradient
        held: list[tuple[str, StreamingMoments]] = [
            *((f"activation/{point}/{layer}", m) for (point, layer), m in self.activations.items()),
            *((f"token/{layer}/{stratum}", m) for (layer, stratum), m in self.tokens.items()),
        ]
        for name, moments in held:
            if moments.count:
                arrays |= {f"{name}/{part}": value for part, value in moments.state_dict().items()}
        for (point, layer), sample in self.samples.items():
            arrays[f"sample/{point}/{layer}/rows"], arrays[f"sample/{point}/{layer}/keys"] = sample.rows, sample.keys
        return arrays

    @classmethod
    def from_arrays(cls, step: int, arrays: Mapping[str, Tensor]) -> Observation:
        """What `arrays` gave, again."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for name, array in arrays.items():
            owner, _, part = name.rpartition("/")
            by_name.setdefault(owner, {})[part] = array
        activations: dict[Site, StreamingMoments] = {}
        samples: dict[Site, RowSample] = {}
        weights: dict[WeightSite, Tensor] = {}
        tokens: dict[tuple[int, int], StreamingMoments] = {}
        for owner, parts in by_name.items():
            kind, _, rest = owner.partition("/")
            if kind == "activation":
                point, layer = rest.split("/")
                activations[point, int(layer)] = StreamingMoments.from_state(parts)
            elif kind == "token":
                at, stratum = rest.split("/")
                tokens[int(at), int(stratum)] = StreamingMoments.from_state(parts)
            elif kind == "sample":
                point, layer = rest.split("/")
                sample = samples[point, int(layer)] = RowSample(len(parts["keys"]))
                sample.update(parts["rows"], parts["keys"])
            elif kind == "weight":
                weights |= {(int(rest), matrix): gradient for matrix, gradient in parts.items()}
        return cls(
            step=step,
            loss=float(arrays["loss"]),
            # in the order in which `observe` makes them: a file forgets it
            activations={site: activations[site] for site in sorted(activations, key=_place)},
            samples={site: samples[site] for site in sorted(samples, key=_place)},
            weights={site: weights[site] for site in sorted(weights, key=lambda s: (s[0], list(MATRICES).index(s[1])))},
            tokens={key: tokens[key] for key in sorted(tokens)},
            distances=arrays["distances"],
            correlation=arrays["correlation"],
        )


def observe(
    view: ModelView,
    data: TangentData,
    step: int,
    *,
    matrices: Sequence[str],
    per_token: bool,
    sample_rows: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Observation:
    """Run the texts twice: forward for the activations, then forward and backward for the gradients.

    The model runs in evaluation mode and comes back as it was; `.grad` is left alone.

    Args:
        view: the checkpoint.
        data: its tokens.
        step: its step.
        matrices: read matrices whose gradients are wanted; none: only per-token gradients.
        per_token: whether per-token gradients at block outputs are wanted.
        sample_rows: rows to keep of each activation; 0: none.
        batch_size: sequences per pass.
        seed: of the sample.
        progress: show a progress bar.
    """
    layers = range(view.n_layers)
    points = [*dict.fromkeys(kind_of(matrix).point for matrix in matrices), *([OUTPUT] if per_token else [])]
    sites = [(point, layer) for point in points for layer in layers]
    # softmax ignores what all keys of a sequence share, and so does the gradient of W_K
    within = view.key_shift_invariant and "W_K" in matrices
    activations = {site: StreamingMoments(view.d_model, sequences=within and site[0] == "attn_in") for site in sites}
    samples = {site: RowSample(sample_rows) for site in sites} if sample_rows else {}
    bar = tqdm(total=2 * len(data.sequences), desc=f"step {step}", unit="seq", disable=not progress, leave=False)
    with bar, view.evaluating():
        with torch.no_grad(), torch.autocast(view.device.type, enabled=False):
            for packed, real in batches(data.sequences, batch_size, causal=view.causal):
                keys = _keys(packed, real, seed, step) if samples else None
                counted = packed[..., COUNTED].bool()
                with view.hooks({site: _reader(activations[site], samples.get(site), counted, keys) for site in sites}):
                    view.run(packed[..., INPUT])
                bar.update(len(packed))
        backward = _Backward(view, data, matrices, activations if per_token else None)
        with backward.gradients.tracked():
            for packed, real in batches(data.sequences, batch_size, causal=view.causal):
                backward.take(packed, real)
                bar.update(len(packed))
    return Observation(
        step=step,
        loss=backward.loss / data.targets,
        activations={site: moments.cpu() for site, moments in activations.items()},
        samples=samples,
        weights={site: total / data.targets for site, total in backward.weights.items()},
        tokens={key: backward.tokens[key].cpu() for key in sorted(backward.tokens)},
        distances=backward.distances,
        correlation=backward.correlation,
    )


def _place(site: Site) -> tuple[int, int]:
    return POINTS.index(site[0]), site[1]


class _Backward:
    """Gradients of the loss summed over predicted tokens, so that no token's depends on its batch."""

    def __init__(
        self,
        view: ModelView,
        data: TangentData,
        matrices: Sequence[str],
        activations: Mapping[Site, StreamingMoments] | None,
    ) -> None:
        self.view, self.data = view, data
        layers = range(view.n_layers)
        sites = [(layer, matrix) for layer in layers for matrix in matrices]
        # Per-token gradients need a graph that begins below the first block's output, whatever the caller has frozen.
        below = [(0, matrix) for matrix in view.matrices if matrix in ("W_Q", "W_in")][:1]
        self.wanted = sites
        self.gradients = WeightGradients(view, sites or below)
        self.weights = {site: torch.zeros(view.weight(*site).shape, dtype=torch.float64) for site in sites}
        self.per_token = activations is not None
        self.tokens: dict[tuple[int, int], StreamingMoments] = {}
        self.distances = torch.zeros(view.n_layers, data.strata, 2, dtype=torch.float64)
        self.correlation = torch.zeros(view.n_layers, data.groups, len(SUMS), dtype=torch.float64)
        self.centroids = {} if activations is None else {layer: activations[OUTPUT, layer].mean for layer in layers}
        self.loss = 0.0

    def take(self, packed: Tensor, real: Tensor) -> None:
        """One batch forward and backward."""
        outputs: dict[int, Tensor] = {}
        readers = {(OUTPUT, layer): _keeper(outputs, layer) for layer in self.centroids}
        with self.view.hooks(readers):
            loss = self._loss(packed, real)
        value = float(loss.detach())
        if not -torch.inf < value < torch.inf:
            raise ValueError(f"expected a finite loss, got {value}; pass a model whose training did not diverge")
        by_site, by_token = self.gradients.of(loss, [outputs[layer] for layer in self.centroids])
        if not all(bool(gradient.isfinite().all()) for gradient in (*by_site.values(), *by_token)):
            raise ValueError(
                f"expected finite gradients, got others in {self.view.dtype}; pass the model in float32 or a smaller "
                "batch_size"
            )
        self.loss += value
        for site in self.wanted:
            self.weights[site] += by_site[site].cpu()
        for layer, gradient in zip(self.centroids, by_token, strict=True):
            self._take_tokens(layer, packed, gradient)
            self._take_distances(layer, packed, outputs[layer].detach())

    def _loss(self, packed: Tensor, real: Tensor) -> Tensor:
        """Cross-entropy summed over the predicted tokens of a batch, in nats."""
        inputs, originals = packed[..., INPUT], packed[..., ORIGINAL]

        def model(tokens: Tensor) -> Tensor | None:
            return self.view.run(tokens, logits=True)

        if self.view.causal:
            return -sequence_log_probs(model, TokenBatch(inputs, real)).sum()
        logits = model(inputs)
        if logits is None:
            raise RuntimeError("the model gave no logits")
        chosen = packed[..., TARGET].bool().to(logits.device)
        picked = logits[chosen]
        picked = picked.float() if picked.dtype in (torch.float16, torch.bfloat16) else picked
        labels = originals.to(logits.device)[chosen]
        return torch.nn.functional.cross_entropy(picked, labels, reduction="sum")

    def _take_tokens(self, layer: int, packed: Tensor, gradient: Tensor) -> None:
        stratum = packed[..., STRATUM].to(gradient.device)
        # A token nothing is predicted from has no gradient: it is not a direction.
        used = packed[..., COUNTED].bool().to(gradient.device) & (gradient != 0).any(-1)
        for number in range(self.data.strata):
            rows = gradient[used & (stratum == number)]
            if len(rows):
                moments = self.tokens.setdefault((layer, number), StreamingMoments(self.view.d_model))
                moments.update(rows)

    def _take_distances(self, layer: int, packed: Tensor, x: Tensor) -> None:
        distance = (x.cpu().double() - self.centroids[layer].cpu()).norm(dim=-1)
        # A masked token's activation is that of the mask.
        unmasked = packed[..., INPUT] == packed[..., ORIGINAL]
        f = self.data.log_frequency[packed[..., ORIGINAL]]
        used = packed[..., COUNTED].bool() & unmasked & f.isfinite()
        d, f, stratum, group = (values[used] for values in (distance, f, packed[..., STRATUM], packed[..., GROUP]))
        one = torch.ones_like(d)
        self.distances[layer].index_add_(0, stratum, torch.stack([one, d], -1))
        self.correlation[layer].index_add_(0, group, torch.stack([one, f, f * f, d, d * d, f * d], -1))


def _reader(
    moments: StreamingMoments, sample: RowSample | None, counted: Tensor, keys: Tensor | None
) -> Callable[[Tensor], None]:
    def read(x: Tensor) -> None:
        mask = counted.to(x.device)
        moments.update(x, mask)
        if sample is not None and keys is not None:
            sample.update(x[mask].to(torch.float64 if x.dtype == torch.float64 else torch.float32), keys[counted])

    return read


def _keeper(outputs: dict[int, Tensor], layer: int) -> Callable[[Tensor], None]:
    def keep(x: Tensor) -> None:
        outputs[layer] = x

    return keep


def _keys(packed: Tensor, real: Tensor, seed: int, step: int) -> Tensor:
    """A random number for each position, told by its sequence, the seed and the step alone."""
    keys = torch.zeros(real.shape, dtype=torch.int64)
    for row, sequence, inside in zip(keys, packed[..., ORIGINAL], real, strict=True):
        generator = sequence_generator(sequence[inside], seed * 1_000_003 + step)
        row[inside] = torch.randint(2**62, (int(inside.sum()),), generator=generator)
    return keys
