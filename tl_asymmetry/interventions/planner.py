"""The cells of a rank-1 study: which edit at which site, and the controls it is held against."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from tl_asymmetry.arguments import check_draws, checked, listed, shown
from tl_asymmetry.geometry.moments import StreamingMoments
from tl_asymmetry.geometry.seeds import seeded
from tl_asymmetry.geometry.subspace import Subspace, ordered_eigh, principal_subspace
from tl_asymmetry.interventions.design import CONTROL_KINDS, head_delta, insertion_edit, matched_controls, removal_edit
from tl_asymmetry.models.capture import capture
from tl_asymmetry.models.edits import HeadEdit, RankOneEdit
from tl_asymmetry.models.prediction import prediction_subspace
from tl_asymmetry.models.view import ModelView
from tl_asymmetry.names import ATTENTION, Place, PlaceLike, place_of
from tl_asymmetry.pair.deltas import residual_first
from tl_asymmetry.pair.plan import chosen_matrices

EditSite: TypeAlias = tuple[int, str, int | None]
"""Layer, matrix, head (None for a matrix of the MLP)."""

Directions: TypeAlias = Sequence[str] | Mapping[str, Subspace | Tensor | Sequence[Subspace | Tensor]]
"""Names out of `DIRECTIONS`, or a mapping from names to columns `[d_model, n]`, one for all layers or one for each."""

DIRECTIONS = ("delta", "activation", "prediction")
"""Directions a study can find by itself."""
INTERVENTIONS = ("removal", "insertion")
"""What it can do along them."""
"""Matrices whose heads are the sites by default."""


@dataclass(frozen=True)
class ControlDraw:
    """One control of a cell."""

    kind: str
    edit: HeadEdit
    norm_ratio: float
    norm_matched: bool
    overlap: float


@dataclass(frozen=True)
class Cell:
    """One direction at one site."""

    site: EditSite
    intervention: str
    direction: str
    index: int
    """1 is the leading direction of its kind."""
    target: RankOneEdit | None
    """None where the delta does nothing along the direction: there is nothing to remove or insert."""
    delta_share: float
    """‖qᵀΔW‖² / ‖ΔW‖², the share of the delta that is removed or inserted; NaN where ΔW is zero."""
    controls: tuple[ControlDraw, ...]
    draws: Mapping[str, int]
    """Number of controls of each kind, also where there is nothing to control for."""


class EditPlanner:
    """Makes the cells of a site, with what they need of moments and subspaces computed once.

    Args:
        base, aligned: views of the pair.
        moments: second moments of the base's activations by hook point and layer, see `study_moments`.
        directions, n_directions: as in `rank_one_study`.
        controls: kinds.
        draws: controls of each kind.
        seed: of the controls.

    Raises:
        ValueError: what are no views, directions or kinds of controls.
    """

    @checked
    def __init__(
        self,
        base: ModelView,
        aligned: ModelView,
        moments: Mapping[tuple[str, int], StreamingMoments],
        directions: Directions,
        *,
        n_directions: int,
        controls: Sequence[str],
        draws: int,
        seed: int,
    ) -> None:
        for role, view in (("base", base), ("aligned", aligned)):
            if not isinstance(view, ModelView):
                raise ValueError(f"expected {role} as a ModelView, got {shown(view)}; pass ModelView(model)")
        _check_names(controls, CONTROL_KINDS, "controls")
        self.base, self.aligned = base, aligned
        self._moments = moments
        self._given = given_directions(directions, base, n_directions)
        self.names = tuple(directions)
        self.kinds = tuple(controls)
        self._n, self._draws, self._seed = n_directions, draws, seed
        self.spectrum = lru_cache(maxsize=8)(self._spectrum)
        self._prediction: Subspace | None = None

    def cells(self, site: EditSite, intervention: str) -> Iterator[Cell]:
        """All directions at one site."""
        layer, matrix, head = site
        ΔW = head_delta(self.base, self.aligned, layer, matrix, head).double()
        energy = ΔW.square().sum()
        make = removal_edit if intervention == "removal" else insertion_edit
        for name in self.names:
            columns = self.directions(name, site, ΔW)
            for index, q in enumerate(columns.mT, start=1):
                edit = make(layer, matrix, head, ΔW.cpu(), q) if bool(energy > 0) and bool(q.any()) else None
                changes = edit is not None and bool(edit.other.any())
                yield Cell(
                    site=site,
                    intervention=intervention,
                    direction=name,
                    index=index,
                    target=edit if changes else None,
                    delta_share=(edit.other.square().sum() / energy).item() if edit is not None else float("nan"),
                    controls=tuple(self._drawn(edit, ΔW, name, index)) if edit is not None and changes else (),
                    draws={kind: self.draws(kind, matrix) for kind in self.kinds if self.draws(kind, matrix)},
                )

    @property
    def directions_at_a_site(self) -> int:
        """Directions of all kinds together."""
        return sum(self._given[name][0].shape[1] if name in self._given else self._n for name in self.names)

    def draws(self, kind: str, matrix: str) -> int:
        """How many controls of a kind a site of this matrix has: heads can be permuted only among those there are."""
        if kind != "permuted_heads":
            return self._draws
        return min(self._draws, (self.base.heads(matrix) or 1) - 1)

    def directions(self, name: str, site: EditSite, ΔW: Tensor) -> Float64[Tensor, "d_model n"]:
        """Leading directions of that kind, unit columns; zero columns where ΔW has none."""
        layer, matrix, _ = site
        if name in self._given:
            return self._given[name][layer]
        if name == "delta":
            return _leading_left(residual_first(matrix, ΔW)[0].cpu(), self._n)
        if name == "prediction":
            if self._prediction is None:
                self._prediction = prediction_subspace(self.base)
            return self._prediction.basis[:, : self._n]
        return self.spectrum(self.base.residual_point(matrix), layer).basis[:, : self._n]

    def _spectrum(self, point: str, layer: int) -> Subspace:
        return principal_subspace(self._moments[point, layer])

    def _drawn(self, edit: RankOneEdit, ΔW: Tensor, name: str, index: int) -> Iterator[ControlDraw]:
        for kind in self.kinds:
            draws = self.draws(kind, edit.matrix)
            if draws == 0:
                continue
            needs = kind in ("low_variance", "equal_variance")
            spectrum = self.spectrum(self.base.residual_point(edit.matrix), edit.layer) if needs else None
            controls = matched_controls(
                edit, kind, draws, _mixed(self._seed, name, index), delta=ΔW,
                second_moment=spectrum, heads=self.base.heads(edit.matrix),
            )  # fmt: skip
            for control, ratio in zip(controls, controls.norm_ratios.tolist(), strict=True):
                yield ControlDraw(kind, control, ratio, controls.norm_matched, controls.overlap)


def study_moments(
    view: ModelView,
    sequences: Sequence[Int[Tensor, " _pos"]],
    sites: Sequence[EditSite],
    directions: Directions,
    controls: Sequence[str],
    *,
    exclude_first: bool,
    batch_size: int,
    progress: bool,
) -> dict[tuple[str, int], StreamingMoments]:
    """Second moments that directions or controls are made from; empty, without a pass, where none is."""
    finds = not isinstance(directions, Mapping) and "activation" in directions
    if not finds and not {"low_variance", "equal_variance"} & set(controls):
        return {}
    points = sorted({(view.residual_point(matrix), layer) for layer, matrix, _ in sites})
    return capture(
        view, [sequences], points, exclude_first=exclude_first, batch_size=batch_size, progress=progress
    ).groups[0]


# --- what was asked for -----------------------------------------------------------------------------------------


def chosen_sites(
    view: ModelView, sites: PlaceLike | Sequence[PlaceLike] | None, matrices: Sequence[str] | None
) -> tuple[EditSite, ...]:
    """The sites in the order of layers; all heads of the attention matrices by default.

    Raises:
        ValueError: both sites and matrices, no site, or one that the model does not have.
    """
    if sites is None:
        attention = [m for m in view.matrices if m in ATTENTION] or None
        names = chosen_matrices(view, attention if matrices is None else matrices)
        return tuple(
            (layer, matrix, head)
            for layer in range(view.n_layers)
            for matrix in view.matrices
            if matrix in names
            for head in _heads(view, matrix)
        )
    if matrices is not None:
        raise ValueError("expected sites or matrices, got both; pass one of them")
    checked: list[EditSite] = []
    for layer, matrix, head, expert in _places(sites):
        missing = matrix not in view.matrices or layer not in range(view.n_layers) or expert is not None
        if missing or head not in _heads(view, matrix):
            raise ValueError(
                f"expected sites that the model has ({view.n_layers} layers; {_described_heads(view)}), got "
                f"{Place(layer, matrix, head, expert)}; pass (layer, matrix, head), head=None for a matrix of the MLP, "
                'or e.g. "L0H1.W_Q"'
            )
        checked.append((layer, matrix, head))
    if not checked:
        raise ValueError("expected at least one site, got none; pass sites=None for all heads")
    order = {matrix: i for i, matrix in enumerate(view.matrices)}
    return tuple(sorted(set(checked), key=lambda s: (s[0], order[s[1]], -1 if s[2] is None else s[2])))


def _places(sites: PlaceLike | Sequence[PlaceLike]) -> list[Place]:
    """Places from a list of them, or from a single one."""
    if not isinstance(sites, Iterable):
        raise ValueError(f'expected sites as places, got {shown(sites)}; pass "L7H3.W_Q", or a list of such')
    single = isinstance(sites, str) or (isinstance(sites, tuple) and sites and isinstance(sites[0], int))
    return [place_of(site) for site in ([sites] if single else sites)]


def _heads(view: ModelView, matrix: str) -> list[int | None]:
    count = view.heads(matrix)
    return [None] if count is None else list(range(count))


def _described_heads(view: ModelView) -> str:
    return ", ".join(f"{m} {view.heads(m) or 'no'} heads" for m in view.matrices)


def given_directions(directions: Directions, view: ModelView, n: int) -> dict[str, list[Float64[Tensor, "d_model n"]]]:
    """Directions given by the caller, unit columns, one tensor for each layer.

    Raises:
        ValueError: names that are not known, no direction, or columns of another length, zero or not finite.
    """
    if n < 1:
        raise ValueError(f"expected n_directions of at least 1, got {n}; pass how many directions of each kind")
    if n > view.d_model:
        raise ValueError(f"expected n_directions up to {view.d_model} (d_model), got {n}; pass fewer")
    if not isinstance(directions, Mapping | Sequence):
        raise ValueError(f"expected directions among {', '.join(DIRECTIONS)}, got {shown(directions)}; pass a list of "
                         "those, or a mapping from names to columns [d_model, n]")  # fmt: skip
    if not isinstance(directions, Mapping):
        unknown = [name for name in directions if name not in DIRECTIONS]
        if isinstance(directions, str) or unknown or not directions:
            raise ValueError(
                f"expected directions among {', '.join(DIRECTIONS)}, got {directions!r}; pass a list of those, or a "
                "mapping from names to columns [d_model, n]"
            )
        return {}
    if not directions:
        raise ValueError("expected at least one direction, got an empty mapping; pass e.g. {'mine': columns}")
    given = {}
    for name, value in directions.items():
        if not isinstance(value, Subspace | Iterable) or isinstance(value, str):
            raise ValueError(
                f"expected directions as columns [{view.d_model}, n] for {name!r}, got {shown(value)}; pass a tensor "
                "or a Subspace"
            )
        layers = [value] * view.n_layers if isinstance(value, Subspace | Tensor) else list(value)
        if len(layers) != view.n_layers:
            raise ValueError(f"expected columns, or {view.n_layers} of them, for {name!r}, got {len(layers)}; pass one "
                             "for all layers or one for each")  # fmt: skip
        given[name] = [_unit_columns(layer, name, view.d_model)[:, :n] for layer in layers]
    return given


def _unit_columns(value: Subspace | Tensor, name: str, d: int) -> Tensor:
    if not isinstance(value, Subspace | Tensor):
        raise ValueError(f"expected directions [{d}, n] for {name!r}, got {shown(value)}; pass columns of R^{d}")
    columns = (value.basis if isinstance(value, Subspace) else value).detach().double().cpu()
    columns = columns.unsqueeze(-1) if columns.ndim == 1 else columns
    if columns.ndim != 2 or len(columns) != d or columns.shape[1] == 0:
        raise ValueError(
            f"expected directions [{d}, n] for {name!r}, got {tuple(columns.shape)}; pass columns of R^{d}"
        )
    norms = columns.norm(dim=0)
    if not bool((norms > 0).all() & columns.isfinite().all()):
        raise ValueError(f"expected finite directions of some length for {name!r}, got a zero or NaN; pass others")
    return columns / norms


def check_choices(
    controls: Sequence[str], interventions: Sequence[str], scales: Sequence[float | int], draws: int
) -> None:
    """Refuse what a study cannot do, before anything runs."""
    _check_names(controls, CONTROL_KINDS, "controls")
    _check_names(interventions, INTERVENTIONS, "interventions")
    check_draws(draws)
    scales = listed("scales", scales, float, instead="scales=[0.5, 1, 2]")
    if not scales or not all(0 < abs(s) < float("inf") for s in scales):
        raise ValueError(f"expected finite scales other than 0, got {scales!r}; pass e.g. scales=[0.5, 1, 2]")


def _check_names(names: Sequence[str], known: Sequence[str], what: str) -> None:
    if isinstance(names, str) or not isinstance(names, Sequence) or not names or any(n not in known for n in names):
        raise ValueError(f"expected {what} among {', '.join(known)}, got {shown(names)}; pass a list of those")
    if len(set(names)) < len(names):
        raise ValueError(f"expected each of {what} once, got {names!r}; pass it without repeats")


def _leading_left(W: Float64[Tensor, "d_model other"], n: int) -> Float64[Tensor, "d_model n"]:
    """Top left singular vectors; zero columns beyond the rank, where there are none."""
    tall = W.shape[0] > W.shape[1]
    λ, V = ordered_eigh(W.mT @ W if tall else W @ W.mT)
    U = torch.zeros(len(W), n, dtype=W.dtype)
    kept = int((λ[:n] > λ[0] * 1e-20).sum()) if bool(λ[0] > 0) else 0
    U[:, :kept] = W @ V[:, :kept] if tall else V[:, :kept]
    norms = U.norm(dim=0, keepdim=True)
    return U / torch.where(norms > 0, norms, torch.ones_like(norms))


def _mixed(seed: int, name: str, index: int) -> int:
    """One number for a seed and a direction, so that directions do not share draws."""
    return seeded(seed, name, index).initial_seed()
