"""The data of a pair's analysis: tables, profiles, and figures of them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.geometry.precision import with_fresh_settings
from tl_asymmetry.geometry.spectrum import marchenko_pastur_edge
from tl_asymmetry.names import EXPERT_INPUT, POINTS, Place, Side, kind_of, nearest, whole_place
from tl_asymmetry.pair.lookups import Lookups
from tl_asymmetry.pair.sensitivity import sensitivity_table
from tl_asymmetry.pair.stability import stability_table
from tl_asymmetry.results.nulls import described
from tl_asymmetry.results.result import Result
from tl_asymmetry.results.top import shown_rows

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_asymmetry.plots.layout import Layout

_CURVE_POINTS = 200
"""Ranks beyond 64 at which a curve is drawn, log-spaced."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class PairData(Result):
    """What `PairAnalysis` holds, without the words."""

    TABLES = ("table", "nulls", "tests", "asymmetry", "other_changes", "circuits")
    CAPTION = (
        "Medians over the heads and matrices that changed; min and max of relative; found above (↑) and below (↓)."
    )
    LISTED = (
        "excess", "excess_low", "excess_high", "excess_q", "relative", "ci_low", "ci_high", "isotropic_q", "verdict",
        "delta_relative_norm", "flags",
    )  # fmt: skip
    UNIT = "unit"

    table: pd.DataFrame
    """Tidy: one row per layer × head × matrix × subspace × rank; `tables.PAIR_COLUMNS` says what the columns mean."""
    nulls: pd.DataFrame
    """What each row is held against, one row for each row of the table and null; `results.nulls.NULL_COLUMNS` says what
    the columns mean, `results.nulls.NULLS` what the nulls are."""
    tests: pd.DataFrame
    """The hierarchy behind `vs_chance` and `vs_reference`: families and layers; `verdicts.TEST_COLUMNS` says what the
    columns mean."""
    asymmetry: pd.DataFrame
    """Read against write per head, and per layer (head NA): log2 ratio, its expectation by chance, an interval."""
    other_changes: pd.DataFrame
    """What has no head: biases, norm gains, embeddings; norms and the shrink component."""
    circuits: pd.DataFrame
    """Per head: change of the products W_Q W_Kᵀ and W_V W_O, and the fraction of it on each side."""
    _model: weakref.ref[Any] | None = None
    _lookups: Lookups = field(default_factory=Lookups, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the model, and what was looked up in it, is not a part of the result."""
        return {**vars(self), "_model": None, "_lookups": Lookups()}

    def _listed(self) -> pd.DataFrame:
        """Rows under the names of their places; of the matrices of a head one has the line."""
        rows = shown_rows(self.table, self.config)
        labels = [rows[name] for name in ("layer", "matrix", "head", "expert")]
        places = [
            str(Place(int(layer), str(matrix), *(None if pd.isna(unit) else int(unit) for unit in units)))
            for layer, matrix, *units in zip(*labels, strict=True)
        ]
        # Under grouped-query attention a key-value head is not the query head of its number.
        heads = rows["matrix"].map(self.table.groupby("matrix")["head"].max())
        units = [f"{place.partition('.')[0]} of {n}" for place, n in zip(places, heads, strict=True)]
        listed = rows.assign(unit=units)
        listed.insert(0, "place", places)
        return listed

    def width(self, matrix: str) -> int:
        """d of a matrix: d_model, or the width of the latent that it reads."""
        self._require_matrix(matrix)
        return self.arrays[f"directions/{matrix}"].shape[-1]

    # -- numbers -------------------------------------------------------------------------------------------------

    def energy_profile(self, matrix: str, subspace: str) -> Float[np.ndarray, "layer head k"]:
        """Share of ‖ΔW‖² along each ordered direction of a subspace; its cumulative sum is the fraction at each rank.

        Returns:
            float32 `[layer, head, d_model]` (an MLP matrix has one head; a given subspace has its own rank); NaN beyond
            the directions that a subspace has (`Subspace.existing`).

        Raises:
            ValueError: a matrix or subspace that was not analysed.
        """
        return self._array("profile", matrix, subspace)

    def eigenvalues(self, subspace: str) -> Float[np.ndarray, "layer *expert k"]:
        """Variance along each ordered direction of a subspace, float64; NaN for a subspace without eigenvalues.

        Of "expert_in" `[layer, expert, k]`.
        """
        return self._array("eigenvalues", subspace)

    def is_ordered(self, subspace: str) -> bool:
        """Whether some of its directions lead the others; own ones without eigenvalues have a number and no order."""
        return bool(np.isfinite(self.eigenvalues(subspace)).any())

    def delta_spectrum(self, matrix: str) -> Float[np.ndarray, "layer head r"]:
        """Eigenvalues of ΔW ΔWᵀ of each head, descending, float64."""
        return self._array("spectrum", matrix)

    @with_fresh_settings
    def sensitivity(self) -> pd.DataFrame:
        """The fractions under every other choice of subspace: whose activations, centring, first position, final norm.

        Raises:
            ValueError: analysed without `sensitivity=True`.
        """
        if not any(name.startswith("sensitivity/") for name in self.arrays):
            if self.config["arguments"]["sensitivity"]:
                raise ValueError(
                    "expected a subspace that can be chosen otherwise, got only given ones; pass subspaces by name"
                )
            raise ValueError(
                "expected an analysis with sensitivity=True, got one without; pass sensitivity=True to analyze_pair"
            )
        places = self.table[["matrix", "layer", "head", "expert"]].drop_duplicates().groupby("matrix")
        there = {str(matrix): rows.drop(columns="matrix") for matrix, rows in places}
        found, measured = sensitivity_table(self.arrays, self.config["ranks"], there), self.config["measured"]
        asked = [k in measured[name] for name, k in zip(found["subspace"], found["rank"], strict=True)]
        return found[asked].reset_index(drop=True)

    @with_fresh_settings
    def stability(self) -> pd.DataFrame:
        """How much each head's verdict depends on the choice of subspace; columns in `stability.STABILITY_COLUMNS`.

        Every variant of `sensitivity()` is held against the isotropic null of the same delta, and corrected as the
        analysis is, in the place of its own choice.

        Raises:
            ValueError: analysed without `sensitivity=True`.
        """
        spectra = {
            name.removeprefix("spectrum/"): (array, self.arrays.get(f"pooled_{name}"))
            for name, array in self.arrays.items()
            if name.startswith("spectrum/")
        }
        widths = {matrix: self.width(matrix) for matrix in spectra}
        return stability_table(
            self.sensitivity(), self.table, spectra, widths=widths, seed=self.config["arguments"]["seed"]
        )

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_heads(
        self,
        matrix: str | Sequence[str] | None = None,
        *,
        subspace: str | None = None,
        rank: int | None = None,
        value: str = "relative",
        side_by_side: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Layer × head map of one matrix, or of several with a menu; the hover gives the value and every null.

        A mixture's experts stand where heads do, with what was routed to them in the hover. A cell without a row says
        in its hover why there is none.

        Args:
            matrix: its name, or several; None gives all.
            subspace: shown (first); None: a read matrix's own input, "prediction" for a write matrix.
            rank: the only one of one matrix, the first of several; None: all with a slider, the shown rank first.
            value: shown first: "relative", "excess" or "gradient_excess" (over the references of the table), the key of
                a null in `nulls`, "unrounded" (relative with the rounding share removed), "z" or "verdict".
            side_by_side: all matrices at once, so many in a row, without menus: as for a paper.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analysed, or a value that is NaN everywhere.
        """
        from tl_asymmetry.plots import head_maps_figure, head_sheet_figure, heads_figure
        from tl_asymmetry.plots.style import some_of

        layout: Layout = {"title": title, "template": template, "width": width, "height": height}
        shown = self._shown_rank(subspace)
        if isinstance(matrix, str) and side_by_side is None:
            return heads_figure(
                self.table, matrix, nulls=described(self.nulls), subspace=subspace, rank=rank, value=value,
                default_rank=shown, d_model=self._d, **self._kv(matrix), **layout,
            )  # fmt: skip
        table, first = self.table, None
        if matrix is not None:
            names = some_of("matrix", matrix, list(dict.fromkeys(table["matrix"])))
            table, first = table[table["matrix"].isin(names)], names[0]
        if side_by_side is not None:
            return head_sheet_figure(
                table, nulls=described(self.nulls), subspace=subspace, rank=rank, value=value, default_rank=shown,
                d_model=self._d, across=side_by_side, **layout,
            )  # fmt: skip
        return head_maps_figure(
            table, nulls=described(self.nulls), matrix=first, subspace=subspace, value=value,
            default_rank=shown if rank is None else rank, d_model=self._d, **layout,
        )  # fmt: skip

    def plot_layers(
        self,
        matrices: str | Sequence[str] | None = None,
        *,
        subspace: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Every matrix over the layers, reads above, writes below: median head, middle half, matched reference.

        Args:
            matrices: which, one or several; None: all.
            subspace: hold every matrix against this one; None: reads against their own input, writes against
                "prediction".
            rank: the only one; None: all with a slider, the shown rank first.
            title, template, width, height: as in `plot_heads`.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import layers_figure

        return layers_figure(
            self.table, matrices=matrices, subspace=subspace, rank=rank,
            default_rank=self._shown_rank(subspace), d_model=self._d,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_rank_curve(
        self,
        matrix: str,
        layer: int | None = None,
        head: int | None = None,
        *,
        subspace: str | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Relative fraction against rank, at every k, with every null that expects a number and the interval.

        Args:
            matrix: its name; or the whole place, spelled "L7H3.W_Q", "L7.W_in" or "L7E12.W_in".
            layer: the layer.
            head: the head (the KV head for W_K and W_V) or expert; None: all of the layer.
            subspace: None: a read matrix's own input, "prediction" for a write matrix.
            title, template, width, height: as in `plot_heads`.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import rank_curve_figure
        from tl_asymmetry.plots.rows import default_subspace

        if layer is None:
            layer, matrix, head, expert = whole_place(matrix, head)
            head = head if expert is None else expert
        self._require_matrix(matrix)
        space = default_subspace(self.table, matrix) if subspace is None else subspace
        nulls = described(self.nulls[self.nulls["matrix"] == matrix])
        return rank_curve_figure(
            self.table, matrix, nulls=nulls, curves=self._curves(matrix, space, layer), layer=layer,
            head=head, subspace=space, d_model=self._d, **self._kv(matrix),
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_asymmetry(
        self,
        *,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Read against write, one point per head, and the index over layers beside what is expected.

        Args:
            rank: the only one; None: all with a slider, the shown rank first.
            title, template, width, height: as in `plot_heads`.

        Raises:
            ValueError: an analysis without both sides.
        """
        from tl_asymmetry.plots import asymmetry_figure

        if self.asymmetry.empty:
            raise ValueError(
                "expected an analysis of W_Q and W_K against attn_in and of W_O against prediction, got one without; "
                "pass the default matrices and subspaces to analyze_pair"
            )
        return asymmetry_figure(
            self.asymmetry, rank=rank, default_rank=self.config["shown_rank"],
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_sensitivity(
        self,
        matrix: str | None = None,
        *,
        subspace: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """How stable each head's verdict is over the choices of subspace.

        Args:
            matrix, subspace: shown first; None: the first that has choices.
            rank: the only one; None: all with a slider, the shown rank first.
            title, template, width, height: as in `plot_heads`.

        Raises:
            ValueError: analysed without `sensitivity=True`; a matrix, subspace or rank that was not.
        """
        from tl_asymmetry.plots import stability_figure
        from tl_asymmetry.plots.style import one_of

        for name, given in (("matrix", matrix), ("subspace", subspace), ("rank", rank)):
            if given is not None:  # before the tests, which take their time
                one_of(name, given, self.table[name].unique().tolist(), name)
        return stability_figure(
            self.stability(), matrix=matrix, subspace=subspace, rank=rank,
            default_rank=self.config["shown_rank"],
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_spectrum(
        self,
        subspace: str = "attn_in",
        *,
        layer: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Eigenvalue spectra of a subspace, or of a delta by its matrix's name.

        Activations carry the Marchenko–Pastur edge of as many independent samples as there were tokens.

        Args:
            subspace: its name, or a matrix's.
            layer: shown first; None: all.
            title, template, width, height: as in `plot_heads`.

        Raises:
            ValueError: what was not analysed, or a subspace without eigenvalues.
        """
        from tl_asymmetry.plots import spectrum_figure

        layout: Layout = {"title": title, "template": template, "width": width, "height": height}
        if f"spectrum/{subspace}" in self.arrays:
            spectra = _of_layers(np.nansum(self.delta_spectrum(subspace), 1))  # heads pooled
            return spectrum_figure(spectra, name=f"ΔW of {subspace}, heads pooled", layer=layer, **layout)
        eigenvalues = self.eigenvalues(subspace)
        if np.isnan(eigenvalues).all():
            raise ValueError(f"expected a subspace with eigenvalues, got {subspace!r}, given without; pass another one")
        if subspace == EXPERT_INPUT:
            of_experts = {
                f"L{i}E{expert}": λ
                for i, spectra in enumerate(eigenvalues)
                for expert, λ in enumerate(spectra)
                if np.isfinite(λ).all() and layer in (None, i)
            }
            return spectrum_figure(of_experts, name=subspace, ranks=self.config["ranks"], **layout)
        edges = self._edges(subspace, eigenvalues)
        return spectrum_figure(
            _of_layers(eigenvalues), name=subspace, ranks=self.config["ranks"], edge=edges, layer=layer, **layout
        )

    def _shown_rank(self, subspace: str | None) -> int:
        """The rank to show first of this subspace: own directions have their own number."""
        shown: int = self.config["shown_rank"]
        ranks = self.table.loc[self.table["subspace"] == subspace, "rank"]
        return shown if ranks.empty else int(min(ranks, key=lambda k: (abs(k - shown), k)))

    def _curves(self, matrix: str, subspace: str, layer: int) -> pd.DataFrame | None:
        """Relative fractions of one layer's heads at every rank that can be told apart on a screen, with what each null
        expects there; None for what has no profile. Directions in no order have one rank, their number."""
        name = f"{matrix}/{subspace}"
        profiles = self.arrays.get(f"profile/{name}")
        if profiles is None or not 0 <= layer < len(profiles):
            return None
        d = self.width(matrix)
        fraction = np.cumsum(profiles[layer].numpy().astype(np.float64), axis=-1)
        ks = np.unique(np.concatenate([np.arange(1, 65), np.geomspace(64, d, _CURVE_POINTS).round()]).astype(int))
        ks = ks[ks <= fraction.shape[-1]] if self.is_ordered(subspace) else np.array([fraction.shape[-1]])
        whole = len(fraction) == 1 and kind_of(matrix, self._side(matrix)).heads is None
        heads: list[int | None] = [None] if whole else [*range(len(fraction))]
        expected = {
            array.split("/")[1]: values[layer].numpy()
            for array, values in self.arrays.items()
            if array.startswith("expected/") and array.endswith(f"/{name}")
        }
        relative = fraction[:, ks - 1] * d / ks
        curves = pd.DataFrame({"rank": np.tile(ks, len(heads)), "relative": relative.ravel()})
        curves["head"] = pd.array([pd.NA if h is None else h for h in heads for _ in ks], dtype="Int64")
        for null, of_null in expected.items():
            held = np.full((len(heads), len(ks)), np.nan)
            there = ks <= of_null.shape[-1]
            held[:, there] = of_null[:, ks[there] - 1] * d / ks[there]
            curves[null] = held.ravel()
        return curves

    def _side(self, matrix: str) -> Side:
        return self.table.loc[self.table["matrix"] == matrix, "pathway"].iloc[0]

    def _require_matrix(self, matrix: str) -> None:
        there = list(dict.fromkeys(self.table["matrix"]))
        if matrix not in there:
            raise ValueError(
                f"expected matrix to be one of {', '.join(there)}, got {matrix!r}; pass {nearest(matrix, there)}"
            )

    def _edges(self, subspace: str, eigenvalues: Float[np.ndarray, "layer k"]) -> dict[str, float] | None:
        """Marchenko–Pastur edge of each layer's captured activations; None for what is no moment of tokens."""
        if subspace not in POINTS:
            return None
        tokens = self.config["tokens"]
        return {
            f"L{layer}": marchenko_pastur_edge(torch.from_numpy(λ), tokens)
            for layer, λ in enumerate(eigenvalues)
            if (λ > 0).any()
        }

    @property
    def _d(self) -> int:
        return self.config["shape"]["d_model"]

    def _kv(self, matrix: str) -> dict[str, bool]:
        self._require_matrix(matrix)
        shape = self.config["shape"]
        return {"kv": kind_of(matrix, self._side(matrix)).heads == "kv" and shape["n_kv_heads"] < shape["n_heads"]}

    def _array(self, kind: str, *keys: str) -> np.ndarray:
        name = "/".join((kind, *keys))
        if name not in self.arrays:
            there = sorted(n.removeprefix(f"{kind}/") for n in self.arrays if n.startswith(f"{kind}/"))
            asked = "/".join(keys)
            raise ValueError(f"expected one of {', '.join(there)}, got {asked!r}; pass {nearest(asked, there)}")
        return self.arrays[name].numpy()


def _of_layers(spectra: Float[np.ndarray, "layer d"]) -> dict[str, np.ndarray]:
    """Spectra by layer, of the layers that have one."""
    return {f"L{layer}": λ for layer, λ in enumerate(spectra) if np.isfinite(λ).all() and λ.any()}
