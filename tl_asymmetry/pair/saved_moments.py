"""Moments captured in one place and analysed in another: a forward pass on a cluster, the weights on one machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.models.capture import Capture, Site, capture
from tl_asymmetry.models.processes import ALONE, present_processes, together
from tl_asymmetry.models.texts import token_sequences
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import EXPERT_INPUT, canonical
from tl_asymmetry.notes import Notes
from tl_asymmetry.pair.memory_plan import plan_memory
from tl_asymmetry.pair.plan import Plan, counted_tokens, grouped_sequences, make_plan
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions
from tl_asymmetry.settings import PairSettings, check_products, checked_hash
from tl_asymmetry.store import StoreReader, open_store

KIND = "capture of moments"
_TEXTS = "texts"


@checked
@together
@with_fresh_settings
def save_moments(
    model: Any,
    folder: str | Path,
    texts: Sequence[str | Sequence[Mapping[str, Any]]] | None = None,
    *,
    tokens: Int[Tensor, "batch pos"] | Sequence[Int[Tensor, " _pos"]] | None = None,
    mask: Bool[Tensor, "batch pos"] | None = None,
    matrices: Sequence[str] | None = None,
    subspaces: Sequence[str] | Mapping[str, Subspace | Sequence[Subspace]] | None = None,
    exclude_first: bool = True,
    batch_size: int = 8,
    max_tokens: int | None = None,
    groups: int = 8,
    layers_per_pass: int | None = None,
    distributed: bool = True,
    progress: bool = True,
) -> Path:
    """Run the texts through a base once and keep what `analyze_pair` reads of its activations: second moments.

    `analyze_pair(base, aligned, moments=folder)` then runs no text: it may be on another machine, be repeated for every
    aligned model of that base, and needs one layer's moments in memory. Its numbers are those of the direct call.
    Killed and called again it goes on at the first layer that is missing.

    On disk for each layer, point and group 4 · d_model · (d_model + 1) bytes: at width 8,192, with 6 points, 1.6 GB a
    layer and group. Where that is too much pass `groups=1`, which has no intervals, or the `matrices` of interest.

    Args:
        model: the base, as `analyze_pair` takes it.
        folder: made if need be; a store of safetensors files, one for each layer.
        texts, tokens, mask: what to read, as in `analyze_pair`.
        matrices, subspaces: what will be analysed; by default all that `analyze_pair` does by default.
        exclude_first, groups: as in `analyze_pair`, which must then be given the same.
        batch_size, max_tokens, layers_per_pass, distributed, progress: as in `analyze_pair`.

    Returns:
        The folder.

    Raises:
        ValueError: what `analyze_pair` refuses of a base, texts, matrices and subspaces; a folder of other moments.

    Example:
        >>> from tl_asymmetry import analyze_pair
        >>> from tl_asymmetry.demo import demo_pair, demo_texts
        >>> base, aligned = demo_pair()
        >>> folder = save_moments(base, "moments", demo_texts(8, seed=0), groups=1, progress=False)
        >>> result = analyze_pair(base, aligned, moments=folder, groups=1, ranks=[4], progress=False)
        >>> result.config["sequences"]
        8
    """
    settings = PairSettings(
        matrices=matrices, ranks=[1], subspaces=subspaces, exclude_first=exclude_first, batch_size=batch_size,
        max_tokens=max_tokens, groups=groups, layers_per_pass=layers_per_pass, distributed=distributed,
        progress=progress,
    )  # fmt: skip
    view, notes = ModelView(model), Notes()
    sequences = token_sequences(view, texts, tokens, mask, max_tokens=max_tokens, notes=notes.add)
    plan = make_plan(view, settings, sequences, notes, available=canonical((*view.matrices, *view.irregular)))
    processes = present_processes() if distributed else ALONE
    memory = plan_memory(view, plan, sequences, settings, processes)
    weights = checked_hash(view, "model", warn=notes.warn)
    check_products(view, sequences[0])
    grouped, _ = grouped_sequences(sequences, settings, notes)
    about = {"versions": versions(), "model": model_record(view, weights), "notes": list(notes.lines)}
    asked = {
        "weights": weights,
        "shape": shape_record(view),
        "tokens": described(tokens=[sequence.tolist() for sequence in sequences])["tokens"],
        "points": [*plan.points, *plan.beside],
        "exclude_first": exclude_first,
        "groups": groups,
    }
    with open_store(folder, KIND, asked, about, processes=processes) as store:
        if _TEXTS not in store:
            lengths = torch.tensor([len(sequence) for sequence in sequences])
            store.put(_TEXTS, {"tokens": torch.cat(list(sequences)), "lengths": lengths}, {})
        for few in memory.passes:
            if all(_part(layer) in store for layer in few):
                continue
            found = capture(
                view, grouped, [(point, layer) for point in plan.points for layer in few if view.shows(layer, point)],
                exclude_first=exclude_first, beside=plan.beside, batch_size=batch_size, progress=progress,
                processes=processes,
            )  # fmt: skip
            for layer in few:
                arrays = {
                    f"{number}/{point}/{field}": tensor
                    for number, group in enumerate(found.groups)
                    for (point, there), moments in group.items()
                    # An expert may have no token of a group.
                    if there == layer and (moments.count or not point.startswith(EXPERT_INPUT))
                    for field, tensor in moments.state_dict().items()
                }
                store.put(_part(layer), arrays, {"groups": len(found.groups)})
    return Path(folder)


class SavedMoments:
    """What `save_moments` left, read layer by layer.

    Args:
        folder: the store.

    Raises:
        ValueError: no such store.
        DamagedFile: it is not as it was written.
    """

    sequences: list[Int[Tensor, " _pos"]]
    """The texts that were run, as token ids."""
    notes: list[str]
    """What must be said of them."""

    def __init__(self, folder: str | Path) -> None:
        self._store = StoreReader(folder)
        if self._store.kind != KIND:
            raise ValueError(f"expected a {KIND}, got a {self._store.kind} in {str(folder)!r}; pass a folder of "
                             "save_moments")  # fmt: skip
        texts = self._store.arrays(_TEXTS)
        self.sequences = list(texts["tokens"].split(texts["lengths"].tolist()))
        self.notes = list(self._store.about["notes"])

    def check_weights(self, weights: str) -> None:
        """Refuse moments of another model than the base with this hash.

        Raises:
            ValueError: with both hashes.
        """
        if self._store.settings["weights"] != weights:
            raise ValueError(
                f"expected moments of the base's weights ({weights}), got those of "
                f"{self._store.about['model']['name']!r} ({self._store.settings['weights']}); pass the base that "
                "save_moments ran"
            )

    def check(self, plan: Plan, settings: PairSettings, n_layers: int) -> None:
        """Refuse moments under other settings than those of an analysis, and such as have not all it needs.

        Raises:
            ValueError: naming what differs.
        """
        saved = self._store.settings
        if settings.captured != ("base",):
            raise ValueError(
                f"expected activations='base' and sensitivity=False with moments=, got {settings.activations!r} and "
                f"{settings.sensitivity}; pass texts instead"
            )
        if settings.max_tokens is not None:
            raise ValueError("expected max_tokens=None with moments=, got a number; pass it to save_moments")
        for name, asked in (("exclude_first", settings.exclude_first), ("groups", settings.groups)):
            if saved[name] != asked:
                raise ValueError(
                    f"expected {name}={saved[name]}, as these moments were captured, got {asked}; pass "
                    f"{name}={saved[name]}"
                )
        missing = [point for point in (*plan.points, *plan.beside) if point not in saved["points"]]
        if missing:
            raise ValueError(
                f"expected moments at {', '.join(missing)}, got only {', '.join(saved['points'])}; pass fewer matrices "
                "and subspaces, or call save_moments with these"
            )
        absent = [layer for layer in range(n_layers) if _part(layer) not in self._store]
        if absent:
            raise ValueError(
                f"expected moments of all {n_layers} layers, got none of {len(absent)} of them, the first being layer "
                f"{absent[0]}; call save_moments with the same arguments again, which goes on there"
            )

    def capture(self, layers: Sequence[int], plan: Plan, settings: PairSettings) -> Capture:
        """The moments of some layers, as `capture` gives them."""
        points = {*plan.points, *plan.beside}
        groups: list[dict[Site, StreamingMoments]] = []
        for layer in layers:
            arrays = self._store.arrays(_part(layer))
            states: dict[tuple[int, str], dict[str, Tensor]] = {}
            for name, tensor in arrays.items():
                number, point, field = name.split("/")
                if point in points:
                    states.setdefault((int(number), point), {})[field] = tensor
            groups += [{} for _ in range(self._store.entry(_part(layer))["groups"] - len(groups))]
            for (group, point), state in states.items():
                groups[group][point, layer] = StreamingMoments.from_state(state)
            routed = {point: state for (_, point), state in states.items() if point.startswith(EXPERT_INPUT)}
            for point, state in routed.items():
                for moments in groups:
                    moments.setdefault((point, layer), StreamingMoments(len(state["total"])))
        return Capture(tuple(groups), None, counted_tokens(self.sequences, settings), len(self.sequences))


def _part(layer: int) -> str:
    return f"layer-{layer}"
