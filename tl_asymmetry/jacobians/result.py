"""What `layer_jacobians` gives back: matrices, their spectra, gains, figures, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked, shown
from tl_asymmetry.geometry.spectrum import effective_rank, participation_ratio, stable_rank
from tl_asymmetry.geometry.subspace import Subspace
from tl_asymmetry.names import counted
from tl_asymmetry.results.report import Definition, FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go

KIND = {"same": "same position, ∂ out[t] / ∂ in[t]", "sum": "summed over sources, Σ_s ∂ out[t] / ∂ in[s]"}
"""In words, by `sources`."""

PART = {
    "block": "the whole block, residual included",
    "attn": "what attention adds, norms included",
    "mlp": "what the MLP adds, norms included",
    "ln": "the norm before attention",
    "ln2": "the norm before the MLP",
}
"""In words, by `part`."""


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class LayerJacobians(Result):
    """Jacobians of one part of every layer asked for. Made by `layer_jacobians`.

    `table` has one row per layer, of the mean Jacobian J̄: `norm` ‖J̄‖_F, `from_identity` ‖J̄ − I‖_F / ‖I‖_F, `trace`
    tr J̄ / d, `largest` and `smallest` singular value, `effective_rank`, `participation_ratio`, `stable_rank` (all three
    of σ²), and `spread` √(mean ‖J[t] − J̄‖²) / ‖J̄‖, NaN unless every token's matrix was kept: how little one matrix
    stands for all tokens.
    """

    TABLES: ClassVar[tuple[str, ...]] = ("table", "tokens")
    LISTED = ("largest", "from_identity", "effective_rank", "stable_rank", "spread")

    tokens: pd.DataFrame
    """With `reduce=None` one row per layer × token: `layer, sequence, position, token, norm` ‖J[t]‖_F and `departure`
    ‖J[t] − J̄‖_F / ‖J̄‖_F; else empty."""

    # -- matrices --------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were asked for."""
        return tuple(self.arrays["layers"].tolist())

    def mean(self, layer: int) -> Float[Tensor, "d_model d_model"]:
        """The mean Jacobian of a layer over all tokens: `J[i, j] = ∂ out_i / ∂ in_j`.

        Raises:
            ValueError: a layer that was not asked for.
        """
        return self.arrays["mean"][self._index(layer)]

    def per_token(self, layer: int) -> Float[Tensor, "batch pos d_model d_model"]:
        """Every token's Jacobian in a layer, sequences × positions asked for.

        Raises:
            ValueError: a layer that was not asked for; only the mean was kept.
        """
        if "per_token" not in self.arrays:
            raise ValueError(
                "expected Jacobians of every token, got their mean only; pass reduce=None to layer_jacobians"
            )
        return self.arrays["per_token"][self._index(layer)].unflatten(0, self.arrays["tokens"].shape)

    def head(self, layer: int, head: int) -> Float[Tensor, "d_model d_model"]:
        """The mean of what one head adds; the heads of a layer sum to the mean Jacobian of part "attn".

        Raises:
            ValueError: no such layer or head, or heads were not kept.
        """
        if "heads" not in self.arrays:
            raise ValueError("expected contributions of heads, got none; pass per_head=True to layer_jacobians")
        heads = self.arrays["heads"][self._index(layer)]
        if not 0 <= head < len(heads):
            raise ValueError(f"expected a head from 0 to {len(heads) - 1}, got {head}; pass such a head")
        return heads[head]

    def singular_values(self, layer: int | None = None) -> Float[Tensor, "*layer d_model"]:
        """Of the mean Jacobian, descending, float64; of every layer if none is named."""
        values = self.arrays["singular_values"]
        return values if layer is None else values[self._index(layer)]

    def determinant(self, layer: int, *, per_token: bool = False) -> tuple[Tensor, Tensor]:
        """Sign and log|det|, the log-volume, of the mean Jacobian, or of every token's `[batch, pos]`; float64.

        A sign of 0 (log-volume −∞) is a singular matrix, e.g. of a norm or of attention alone.
        """
        J = self.per_token(layer) if per_token else self.mean(layer)
        sign, volume = torch.linalg.slogdet(J.double())
        return sign, volume

    def gain(self, subspace: Subspace | Sequence[Subspace], *, layer: int | None = None) -> pd.DataFrame:
        """How much longer a layer makes the directions of a subspace: one row per layer and rank k.

        Args:
            subspace: of the part's input; one for all layers, or one for each layer asked for.
            layer: this layer only.

        Returns:
            `layer, rank, gain` ‖J̄ Q_k‖_F / √k (1: lengths kept on average), `direction_gain` ‖J̄ q_k‖ of the k-th
            direction alone, `name` of the subspace.

        Raises:
            ValueError: a subspace of another dimension, or not one for each layer.
        """
        given = [subspace] * len(self.layers) if isinstance(subspace, Subspace) else subspace
        if not isinstance(given, Sequence) or not all(isinstance(each, Subspace) for each in given):
            raise ValueError(
                f"expected a Subspace, or one for each layer, got {shown(subspace)}; pass Subspace(basis) or a list"
            )
        if len(given) != len(self.layers):
            raise ValueError(
                f"expected one subspace or {len(self.layers)}, one for each layer, got {len(given)}; pass these"
            )
        d = self.arrays["mean"].shape[-1]
        rows = []
        for i, (which, held) in enumerate(zip(self.layers, given, strict=True)):
            if held.d != d:
                raise ValueError(f"expected subspaces of R^{d}, got one of R^{held.d}; pass bases [d_model, k]")
            if layer is not None and i != self._index(layer):
                continue
            squares = (self.arrays["mean"][i].double() @ held.basis.double()).square().sum(0)
            k = torch.arange(1, len(squares) + 1)
            rows.append(
                pd.DataFrame(
                    {
                        "layer": which, "rank": k.numpy(), "gain": (squares.cumsum(0) / k).sqrt().numpy(),
                        "direction_gain": squares.sqrt().numpy(), "name": held.name,
                    }
                )
            )  # fmt: skip
        return pd.concat(rows, ignore_index=True)

    def _index(self, layer: int) -> int:
        layers = self.layers
        if layer not in layers:
            raise ValueError(f"expected a layer among {', '.join(map(str, layers))}, got {layer}; pass one of these")
        return layers.index(layer)

    # -- figures ---------------------------------------------------------------------------------------------------

    def plot_singular_values(
        self,
        *,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Singular values of the mean Jacobians, a line per layer.

        Args:
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.
        """
        from tl_asymmetry.plots.jacobians import singular_values_figure

        return singular_values_figure(
            self.singular_values().numpy(), self.layers, what=PART[self.config["part"]],
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_gain(
        self,
        subspace: Subspace | Sequence[Subspace],
        *,
        value: str = "gain",
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Gain along a subspace's directions, layer × rank.

        Args:
            subspace: one, or one for each layer.
            value: "gain" of the first k directions together, or "direction_gain" of the k-th alone.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: a subspace of another width, or an unknown value.
        """
        from tl_asymmetry.plots.jacobians import gain_figure

        return gain_figure(self.gain(subspace), value=value, title=title, template=template, width=width, height=height)

    # -- words -----------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        return self.config["model"]["name"]

    def _facts(self) -> str:
        config = self.config
        return (
            f"{PART[config['part']]}; {KIND[config['sources']]}; mean over {config['tokens']} tokens of "
            f"{counted(config['sequences'], 'sequence')}; by {config['method']}"
        )

    def _summary_table(self) -> pd.DataFrame:
        shown = self.table[
            ["layer", "norm", "from_identity", "largest", "smallest", "effective_rank", "stable_rank", "spread"]
        ]
        step = -(-len(shown) // 24)
        return shown.iloc[::step]

    def _headline(self) -> list[str]:
        table = self.table
        strongest = table.iloc[int(table["largest"].to_numpy().argmax())]
        lines = [f"The strongest mean amplification is {strongest['largest']:.3g}, in layer {int(strongest['layer'])}."]
        if self.config["part"] == "block":
            nearest = table.iloc[int(table["from_identity"].to_numpy().argmin())]
            lines.append(
                f"Layer {int(nearest['layer'])} is nearest to passing its input on unchanged: its mean Jacobian is "
                f"{nearest['from_identity']:.3g} of ‖I‖ away from the identity."
            )
        if table["spread"].notna().any():
            lines.append(
                f"Single tokens lie {table['spread'].median():.3g} of ‖J̄‖ away from the mean (median over layers): the "
                "mean stands for them only so far."
            )
        return lines

    def _report(self) -> Report:
        config = self.config
        memory = config["memory"]
        tables = [TableSection("Layers", self.table, "One row per layer, of the mean Jacobian.", "layers")]
        if len(self.tokens):
            tables.append(TableSection("Tokens", self.tokens, "One row per layer and token.", "tokens"))
        return self._page(
            title=f"Layer Jacobians of {self._title()}",
            figures=[FigureSection("Singular values", self.plot_singular_values())],
            tables=tables,
            methods=[
                ("Part", PART[config["part"]]),
                ("Kind", KIND[config["sources"]]),
                ("Method", f"{config['method']}, {memory['chunk']} {memory['chunk_of']} at once"),
            ],
            definitions=DEFINITIONS,
        )


DEFINITIONS = (
    Definition(
        "Jacobian", "[ours]",
        "J[i, j] = ∂ out_i / ∂ in_j at one token. Same position: by the token's own input. Summed over sources: by one "
        "change made at every position of the sequence.",
    ),
    Definition(
        "Mean Jacobian", "[ours]",
        "The average of the tokens' matrices. Its singular values are those of the average, not the average of the "
        "tokens' singular values.",
    ),
    Definition(
        "Gain", "[ours]",
        "‖J̄ Q‖ / √k for an orthonormal basis Q of k directions: 1 keeps their length on average.",
    ),
)  # fmt: skip


def jacobian_table(arrays: Mapping[str, Tensor], layers: Sequence[int], *, part: str, sources: str) -> pd.DataFrame:
    """One row per layer, of the mean Jacobian."""
    J, σ = arrays["mean"].double(), arrays["singular_values"]
    d = J.shape[-1]
    eye = torch.eye(d, dtype=J.dtype)
    norm = J.flatten(1).norm(dim=1)
    spread = torch.full_like(norm, torch.nan)
    if "per_token" in arrays:
        for i, every in enumerate(arrays["per_token"]):
            spread[i] = _departures(every, J[i]).square().mean().sqrt() / norm[i]
    return pd.DataFrame(
        {
            "layer": list(layers), "part": part, "sources": sources, "norm": norm.numpy(),
            "from_identity": ((J - eye).flatten(1).norm(dim=1) / d**0.5).numpy(),
            "trace": (J.diagonal(dim1=-2, dim2=-1).sum(-1) / d).numpy(),
            "largest": σ[:, 0].numpy(), "smallest": σ[:, -1].numpy(),
            "effective_rank": effective_rank(σ.square()).numpy(),
            "participation_ratio": participation_ratio(σ.square()).numpy(),
            "stable_rank": stable_rank(σ.square()).numpy(), "spread": spread.numpy(),
        }
    )  # fmt: skip


def token_table(arrays: Mapping[str, Tensor], layers: Sequence[int]) -> pd.DataFrame:
    """One row per layer and token; empty where only the mean was kept."""
    frames = []
    for i, layer in enumerate(layers if "per_token" in arrays else ()):
        batch, n = arrays["tokens"].shape  # sequences of several lengths keep a mean only and their tokens in a row
        every, mean = arrays["per_token"][i], arrays["mean"][i].double()
        frames.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "sequence": torch.arange(batch).repeat_interleave(n).numpy(),
                    "position": arrays["positions"].repeat(batch).numpy(),
                    "token": arrays["tokens"].flatten().numpy(),
                    "norm": _departures(every, torch.zeros_like(mean)).numpy(),
                    "departure": (_departures(every, mean) / mean.norm()).numpy(),
                }
            )
        )
    if not frames:
        return pd.DataFrame({name: [] for name in ("layer", "sequence", "position", "token", "norm", "departure")})
    return pd.concat(frames, ignore_index=True)


def _departures(every: Float[Tensor, "token d d"], mean: Float[Tensor, "d d"]) -> Float[Tensor, " token"]:
    """‖J[t] − J̄‖_F, one at a time: no second copy of them all."""
    return torch.stack([(J.double() - mean).norm() for J in every])
