"""The engine of the tangent analysis: one checkpoint after another, from files or from within a training loop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_asymmetry.arguments import checked, listed, shown
from tl_asymmetry.geometry.memory import return_freed_memory
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.tangent import Control, check_controls
from tl_asymmetry.models.checks import check_finite, check_predicts_its_tokens, check_raw, check_token_count
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import kind_of
from tl_asymmetry.notes import Notes
from tl_asymmetry.results.provenance import described, model_record, shape_record, versions, weights_hash
from tl_asymmetry.store import Parts, open_store
from tl_asymmetry.tangents.bases import METHODS, TangentBases, bases_from, fit_bases
from tl_asymmetry.tangents.data import TangentData, tangent_data
from tl_asymmetry.tangents.observation import OUTPUT, Observation, observe
from tl_asymmetry.tangents.result import TangentAnalysis
from tl_asymmetry.tangents.tables import LAYOUTS, Held, frame, rows_of
from tl_asymmetry.trajectory.checkpoints import Checkpoint

GRADIENTS: tuple[str, ...] = ("weight", "activation")
"""Kinds of gradient."""

KIND = "tangents"
_SELF_CHECK_TOKENS = 16


@dataclass(frozen=True)
class TangentOptions:
    """Settings that `analyze_tangents` and `TangentProbe` share; see there."""

    rank: int | Sequence[int] = 16
    """Of the basis, one or several."""
    method: str | Sequence[str] = "pca"
    """ "pca", "semi_nmf" or both."""
    basis_from: float = 0.3
    """Share of the steps the basis is fitted on."""
    draws: int = 20
    """Control subspaces per basis."""
    control: str = "complement"
    """ "complement" or "haar"."""
    gradients: Sequence[str] = GRADIENTS
    """ "weight", "activation" or both."""
    strata: int = 5
    """Token-frequency strata; 0: none."""
    frequencies: Tensor | None = None
    """Counts of token ids in the corpus; None: in the texts."""
    mask_token: int | None = None
    """An encoder's mask token; None: its tokenizer's."""
    mask_share: float = 0.15
    """Share of an encoder's tokens to predict."""
    exclude_first: bool = True
    """Leave first positions (an encoder's special tokens) out."""
    centered: bool = False
    """Fit on centred activations."""
    batch_size: int = 8
    """Sequences per pass."""
    max_tokens: int | None = None
    """Use no more tokens."""
    groups: int = 8
    """Jackknife groups."""
    starts: int = 3
    """Of semi-NMF."""
    sample_rows: int = 4096
    """Rows semi-NMF is fitted on."""
    seed: int = 0
    """Of controls, masks and starts."""
    progress: bool = False
    """Show progress bars."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, rising."""
        return tuple(sorted({int(rank) for rank in listed("rank", self.rank, int, instead="rank=16")}))

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in the order of `METHODS`."""
        chosen = listed("method", self.method, str, instead='method="pca"')
        return tuple(method for method in METHODS if method in chosen)

    def check(self) -> None:
        """Refuse what cannot be chosen for any model.

        Raises:
            ValueError: saying what can.
        """
        for name, allowed in (("method", METHODS), ("gradients", GRADIENTS)):
            value = getattr(self, name)
            chosen = listed(name, value, str, instead=f"{name}={allowed[0]!r}")
            if not chosen or not set(chosen) <= set(allowed):
                raise ValueError(
                    f"expected {name} among {', '.join(allowed)}, got {value!r}; pass one of them or a list"
                )
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"expected ranks >= 1, got {self.rank!r}; pass rank=16")
        if "semi_nmf" in self.methods and self.sample_rows < max(self.ranks):
            raise ValueError(
                f"expected at least as many sample_rows as the largest rank, {max(self.ranks)}, got "
                f"{self.sample_rows}; pass sample_rows=4096"
            )
        if not 0 < self.basis_from < 1:
            raise ValueError(f"expected basis_from between 0 and 1, got {self.basis_from}; pass basis_from=0.3")
        if not 0 < self.mask_share <= 1:
            raise ValueError(f"expected mask_share above 0 and at most 1, got {self.mask_share}; pass mask_share=0.15")
        for name, least in (("batch_size", 1), ("groups", 1), ("starts", 1), ("strata", 0), ("sample_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} >= {least}, got {getattr(self, name)}; pass such a number")

    def described(self) -> dict[str, Any]:
        """All that decides numbers, JSON-ready: what a store must have been made with."""
        settings = {k: v for k, v in vars(self).items() if k not in ("progress", "batch_size", "rank", "method")}
        return described(**settings) | {"ranks": list(self.ranks), "methods": list(self.methods)}


def early_until(basis_from: float, total_steps: int) -> float:
    """Last step whose activations the basis may be fitted on; 0.29 of 100 steps are 29, whatever binary makes of it."""
    return round(basis_from * total_steps, 9)


@checked
class TangentProbe:
    """Takes a model's activations and gradients at steps of its training, and holds them against its early directions.

    Call `observe` (or the probe itself) with the step and the model, in the order of the steps, and `result` at the
    end. While the step is in the first `basis_from` of `total_steps`, the gradients are kept; the first step after that
    fixes the bases, and from then on a step leaves only its rows. The model comes back as it was: mode, gradients,
    flags.

    Args:
        texts, tokens, mask: as in `analyze_tangents`; the same for all steps.
        total_steps: length of the training.
        store: folder for what was observed, so that a training that was interrupted goes on; None keeps it in memory.
        options: all further settings; or pass them by name, as to `analyze_tangents`.
        settings: see `options`.

    Raises:
        ValueError: settings nothing can be made of; at the first step what `analyze_tangents` refuses.

    Example:
        >>> from tl_asymmetry.demo import demo_model, demo_texts
        >>> probe = TangentProbe(demo_texts(20, seed=1), total_steps=150, rank=4)
        >>> for step in (0, 50, 150):  # a training loop would train in between
        ...     probe.observe(step, demo_model(f"step{step}"))
        >>> probe.result().table["phase"].unique().tolist()
        ['early', 'late']
    """

    def __init__(
        self,
        texts: Sequence[Any] | None = None,
        *,
        tokens: Any = None,
        mask: Any = None,
        total_steps: int,
        store: str | Path | None = None,
        options: TangentOptions | None = None,
        **settings: Any,
    ) -> None:
        if options is not None and settings:
            raise ValueError(
                f"expected options or settings by name, got both ({', '.join(settings)}); pass one of them"
            )
        if options is not None and not isinstance(options, TangentOptions):
            raise ValueError(f"expected options as TangentOptions, got {shown(options)}; pass settings by name")
        self.options = options if options is not None else TangentOptions(**settings)
        self.options.check()
        if total_steps < 0:
            raise ValueError(f"expected total_steps >= 0, got {total_steps}; pass the length of the training")
        self.total_steps = total_steps
        self._texts, self._tokens, self._mask, self._folder = texts, tokens, mask, store
        self._arguments = described(
            texts=texts, tokens=tokens, mask=mask, total_steps=total_steps, **vars(self.options)
        )
        self._notes = Notes()
        self._run: _Run | None = None

    def __enter__(self) -> TangentProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, step: int, model: Any) -> None:
        """`observe`, for what takes a function of step and model."""
        self.observe(step, model)

    @with_fresh_settings
    def observe(self, step: int, model: Any) -> None:
        """Measure the model as it is at this step; what the store has of the same weights is not measured again.

        Raises:
            ValueError: a step out of order or beyond total_steps, another model than before, weights or a loss that are
                not finite.
        """
        view = ModelView(model)
        if self._run is None:
            self._run = _Run(self, view)
        self._run.take(int(step), view, f"step {step}", None)

    def take(self, checkpoint: Checkpoint) -> None:
        """The same for a checkpoint, which is not even opened where the store knows its files."""
        fingerprint = None
        if checkpoint.fingerprint is not None and self._run is not None:
            fingerprint = checkpoint.fingerprint()
            if self._run.finished(checkpoint.step, fingerprint):
                return
        with checkpoint.open() as model:
            view = ModelView(model)
            if self._run is None:
                self._run = _Run(self, view)
                if checkpoint.fingerprint is not None:
                    fingerprint = checkpoint.fingerprint()
            self._run.take(checkpoint.step, view, checkpoint.name, fingerprint)
            del model, view

    @with_fresh_settings
    def result(self) -> TangentAnalysis:
        """What was found so far. The probe stays usable, but its bases are fixed from now on.

        Raises:
            ValueError: nothing observed yet.
        """
        if self._run is None:
            raise ValueError("expected at least one observed step, got none; call observe(step, model) first")
        return self._run.result(self._arguments)

    def close(self) -> None:
        """Let other processes write to the store."""
        if self._run is not None:
            self._run.close()


class _Run:
    """What a probe knows once it has seen a model."""

    def __init__(self, probe: TangentProbe, view: ModelView) -> None:
        self.options = options = probe.options
        self.notes = probe._notes
        self.total_steps = probe.total_steps
        self.shape = shape_record(view)
        self.matrices = tuple(m for m in view.matrices if kind_of(m).reads) if "weight" in options.gradients else ()
        self.per_token = "activation" in options.gradients
        _check_model(view, options, self.notes)
        tokenizer = view.tokenizer
        mask = options.mask_token if options.mask_token is not None else getattr(tokenizer, "mask_token_id", None)
        self.data: TangentData = tangent_data(
            view, probe._texts, probe._tokens, probe._mask,
            max_tokens=options.max_tokens, exclude_first=options.exclude_first,
            strata=options.strata if self.per_token else 0, frequencies=options.frequencies, groups=options.groups,
            mask_token=mask if view.encoder else None, mask_share=options.mask_share, seed=options.seed,
            notes=self.notes.add,
        )  # fmt: skip
        check_token_count(self.data.counted, options.ranks)
        first = self.data.sequences[0][:_SELF_CHECK_TOKENS, 0].unsqueeze(0)
        view.self_check(first)
        check_block_outputs(view, first)
        self.model = model_record(view, weights_hash(view))
        self.centred_keys = view.key_shift_invariant
        self.encoder = view.encoder
        self.bases: TangentBases | None = None
        self.fitted: dict[str, str] = {}
        self.last_step = -1
        settings = options.described() | {
            "shape": self.shape,
            "total_steps": probe.total_steps,
            "tokens": _tokens_hash(self.data),
            "matrices": list(self.matrices),
        }
        self.store: Parts = open_store(probe._folder, KIND, settings, {"versions": versions(), "model": self.model})
        try:
            if "bases" in self.store:
                self.bases = self._read_bases()
                self._reduce_waiting()
            else:  # what was held against bases that are lost is made anew with them
                for step in set(self.store.steps).difference(self._waiting()):
                    self.store.drop(step)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.store.close()

    @property
    def basis_until(self) -> float:
        """Last step the basis may be fitted on."""
        return early_until(self.options.basis_from, self.total_steps)

    def phase(self, step: int) -> str:
        if self.total_steps == 0:
            return "single"
        return "early" if step <= self.basis_until else "late"

    # -- one checkpoint ------------------------------------------------------------------------------------------

    def finished(self, step: int, fingerprint: str) -> bool:
        """Whether the store has this step, going by its files."""
        if step not in self.store.steps or self.store.entry(step)["fingerprint"] != fingerprint:
            return False
        self.last_step = step
        return True

    def take(self, step: int, view: ModelView, name: str, fingerprint: str | None) -> None:
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"expected a step from 0 to total_steps={self.total_steps}, got {step}; pass such a step")
        if step <= self.last_step:
            raise ValueError(
                f"expected steps in rising order, got {step} after {self.last_step}; pass each step once, sorted"
            )
        if shape_record(view) != self.shape or view.encoder != self.encoder:
            raise ValueError(
                f"expected checkpoints of one model, got {shape_record(view)} at step {step} and {self.shape} before; "
                "pass checkpoints of one run"
            )
        check_finite(view, f"checkpoint at step {step}")
        weights = weights_hash(view)
        if step in self.store.steps:
            there = self.store.entry(step)["weights_xxh3"]
            if there != weights:
                raise ValueError(
                    f"expected the weights that the store has of step {step} ({there}), got others ({weights}); "
                    "pass the same run or another folder"
                )
            self.last_step = step
            return
        early = self.phase(step) != "late"
        if early and self.bases is not None and self.fitted.get(str(step)) != weights:
            raise ValueError(
                f"expected a step above {self.basis_until:g} now that the bases are fixed, got {step}; observe the "
                "early steps first"
            )
        if not early:
            self._fixed_bases()
        observation = observe(
            view, self.data, step, matrices=self.matrices, per_token=self.per_token,
            sample_rows=self.options.sample_rows if early and "semi_nmf" in self.options.methods else 0,
            batch_size=self.options.batch_size, seed=self.options.seed, progress=self.options.progress,
        )  # fmt: skip
        entry = {"name": name, "weights_xxh3": weights, "fingerprint": fingerprint}
        if self.bases is None:
            self.store.put(step, observation.arrays(), entry | {"rows": None})
        else:
            self._finish(observation, entry)
        self.last_step = step
        return_freed_memory()

    def _finish(self, observation: Observation, entry: Mapping[str, Any]) -> None:
        """Hold an observation against the bases, and keep its rows alone."""
        held = Held(
            bases=self._fixed_bases(),
            families=[(method, rank) for method in self.options.methods for rank in self.options.ranks],
            edges=self.data.edges,
            strata=bool(self.options.strata),
            centred_keys=self.centred_keys,
        )
        phase = self.phase(observation.step)
        rows = rows_of(observation, phase, held, basis=phase != "late")
        self.store.put(observation.step, {}, dict(entry) | {"rows": rows})

    # -- bases ---------------------------------------------------------------------------------------------------

    def _waiting(self) -> list[int]:
        return [step for step in self.store.steps if self.store.entry(step)["rows"] is None]

    def _fixed_bases(self) -> TangentBases:
        """The bases: at the first call fitted on what the early steps have shown, whose gradients are then held against
        them."""
        if self.bases is not None:
            return self.bases
        early = [Observation.from_arrays(step, self.store.arrays(step)) for step in self._waiting()]
        if not early:
            raise ValueError(
                f"expected a checkpoint in the first {self.options.basis_from:.0%} of {self.total_steps} steps (up to "
                f"{self.basis_until:g}), where the basis is fitted, got none; pass earlier checkpoints or a larger "
                "basis_from"
            )
        options = self.options
        self.bases = fit_bases(
            early, methods=options.methods, ranks=options.ranks, centered=options.centered, starts=options.starts,
            sample_rows=options.sample_rows, draws=options.draws, control=_control(options), seed=options.seed,
        )  # fmt: skip
        del early
        self.fitted = {str(step): self.store.entry(step)["weights_xxh3"] for step in self._waiting()}
        self.store.put("bases", self.bases.arrays(), {"rows": self.bases.rows, "fitted": self.fitted})
        self._reduce_waiting()
        return self.bases

    def _read_bases(self) -> TangentBases:
        options, entry = self.options, self.store.entry("bases")
        self.fitted = entry["fitted"]
        return bases_from(self.store.arrays("bases"), entry["rows"], options.draws, _control(options), options.seed)

    def _reduce_waiting(self) -> None:
        for step in self._waiting():
            entry = self.store.entry(step)
            self._finish(Observation.from_arrays(step, self.store.arrays(step)), entry)

    # -- the end -------------------------------------------------------------------------------------------------

    def result(self, arguments: Mapping[str, Any]) -> TangentAnalysis:
        bases = self._fixed_bases()
        options, steps = self.options, self.store.steps
        entries = {step: self.store.entry(step) for step in steps}
        tables = {
            name: frame([row for entry in entries.values() for row in entry["rows"][name]], layout)
            for name, layout in LAYOUTS.items()
        }
        return TangentAnalysis(
            **tables,
            bases=bases.table,
            config={
                "arguments": dict(arguments),
                "versions": versions(),
                "model": self.model,
                "checkpoints": [
                    {"step": step, "name": e["name"], "weights_xxh3": e["weights_xxh3"]} for step, e in entries.items()
                ],
                "shape": self.shape,
                "kind": "encoder" if self.encoder else "decoder",
                "total_steps": self.total_steps,
                "basis_steps": [step for step in steps if self.phase(step) != "late"],
                "methods": list(options.methods),
                "ranks": list(options.ranks),
                "shown_rank": min(options.ranks, key=lambda rank: (abs(rank - 16), rank)),
                "draws": options.draws,
                "control": options.control,
                "gradients": list(options.gradients),
                "matrices": list(self.matrices),
                "strata": self.data.strata if options.strata and self.per_token else 0,
                "tokens": self.data.counted,
                "targets": self.data.targets,
                "sequences": len(self.data.sequences),
            },
            notes=(*self.notes.lines, *bases.notes),
            arrays={name: Q.float() for name, Q in bases.arrays().items()},
        )


def check_block_outputs(view: ModelView, tokens: Tensor) -> None:
    """Verify that what a block hands on, where per-token gradients are taken, is what the next one gets.

    Raises:
        ValueError: a model in which the two differ.
    """
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(key: tuple[str, int]) -> Any:
        return lambda x: seen.__setitem__(key, x.detach())

    sites = [(OUTPUT, layer) for layer in range(view.n_layers - 1)]
    sites += [("resid_pre", layer) for layer in range(1, view.n_layers)]
    with torch.no_grad(), view.evaluating(), view.hooks({site: keep(site) for site in sites}):
        view.run(tokens)
    for layer in range(view.n_layers - 1):
        if not torch.equal(seen[OUTPUT, layer], seen["resid_pre", layer + 1]):
            raise ValueError(
                f"expected the output of block {layer} to be the input of block {layer + 1}, got two different "
                "tensors; pass a model without edited hooks"
            )


def _check_model(view: ModelView, options: TangentOptions, notes: Notes) -> None:
    """Refuse models and ranks before anything heavy runs."""
    for rank in options.ranks:
        check_controls(view.d_model, rank, options.draws, options.control)
    if view.encoder and not view.has_masked_lm_head:
        got = type(getattr(view.model, "original_model", view.model)).__name__
        raise ValueError(
            f"expected an encoder with a masked-language-model head, got {got}; pass e.g. a BertForMaskedLM"
        )
    if not (view.encoder or view.causal):
        raise ValueError(
            f"expected a causal model or an encoder of masked tokens, got the bidirectional {view.name!r}, whose "
            "positions see what they would have to predict; pass a causal model, a BERT or a RoBERTa"
        )
    if not view.encoder:
        check_predicts_its_tokens(view)
    check_finite(view)
    for warning in check_raw(view):
        notes.warn(warning)
    for note in view.notes:
        notes.add(note)
    if view.dtype in (torch.float16, torch.bfloat16):
        notes.warn(f"gradients are computed in {view.dtype}, the model's dtype: small ones are rounded")
    if options.control == "complement":
        notes.add(
            "controls come from the orthogonal complement of the basis: their mean energy is (1 − E) r / (d − r) "
            "whatever the gradient, so the ratio says no more than the energy E itself, and a random basis would get "
            "p ≤ 0.05 in the share of cases that the column size gives, not in 0.05; "
            'pass control="haar" for an exact rank test'
        )
    if view.key_shift_invariant and "weight" in options.gradients:
        notes.add(
            "spectrum_expected on W_K rows uses the input's covariance within sequences: softmax ignores what all keys "
            "of a sequence share"
        )


def _control(options: TangentOptions) -> Control:
    return "haar" if options.control == "haar" else "complement"


def _tokens_hash(data: TangentData) -> str:
    digest = hashlib.sha256(json.dumps(data.edges).encode())
    for sequence in data.sequences:
        digest.update(sequence.numpy().tobytes())
    return digest.hexdigest()
