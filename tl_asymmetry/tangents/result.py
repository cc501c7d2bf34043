"""What `analyze_tangents` gives back: tables, bases, figures, a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from tl_asymmetry._lazy import pd
from tl_asymmetry.arguments import checked
from tl_asymmetry.names import BASIS_METHODS
from tl_asymmetry.results.report import FigureSection, Report, TableSection
from tl_asymmetry.results.result import Result
from tl_asymmetry.tangents.report import TANGENT_DEFINITIONS, headline, summary_table

if TYPE_CHECKING:
    import plotly.graph_objects as go


@checked
@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class TangentAnalysis(Result):
    """Fixed early directions against true gradients over training, beside normal controls and the spectrum-aware null.

    Made by `analyze_tangents` and `TangentProbe`. Printing it gives the summary; in a notebook it is a table.
    """

    TABLES = ("table", "strata", "frequency", "checkpoints", "bases")
    LISTED = ("ratio", "p", "q", "energy", "normal_energy", "excess")

    table: pd.DataFrame
    """One row per step × kind of gradient × site × layer × head (NA: the whole matrix) × method × rank. energy: share
    of the gradient's squared norm in the basis; normal_energy: mean over the controls; ratio, p (rank among the
    controls), q (over the layers and heads of one site); size: how often a random basis would get p ≤ 0.05 for this
    gradient; spectrum_expected: share of the activations' own energy in the basis at that step; excess: energy over it;
    largest_energy: the most any subspace of this rank holds; isotropy: of the gradients' covariance; anisotropy:
    isotropy gained when the basis is taken out, normal_anisotropy and anisotropy_p its counterparts; gradient_norm: of
    the mean loss for "weight", root mean square per token of the summed loss for "activation"; samples: rows behind the
    covariance."""
    strata: pd.DataFrame
    """Per-token gradients by token frequency: one row per step × layer × method × rank × stratum (1 = rarest). tokens:
    those with a gradient; gradient_share: of all squared norm; distance: mean distance of the block output from its
    centroid."""
    frequency: pd.DataFrame
    """Pearson correlation of log-frequency and distance to the centroid, per step and layer, with a 95 % interval over
    groups of sequences."""
    checkpoints: pd.DataFrame
    """Per step: phase ("early": the basis was fitted there; "late"; "single"), mean loss in nats per token."""
    bases: pd.DataFrame
    """Per method, rank, point and layer: explained, the share of the early activations' energy; overlap_pca, with the
    PCA basis of that rank; and for semi-NMF the error left, the spread of the starts' objectives, the stability of its
    directions among them, and how many of them are independent."""

    def basis(
        self, point: str, *, method: str | None = None, rank: int | None = None
    ) -> Float[np.ndarray, "layer d k"]:
        """The fixed basis of every layer at a point (attn_in, mlp_in or resid_post), float32.

        Raises:
            ValueError: what was not fitted.
        """
        method = self.config["methods"][0] if method is None else method
        rank = self.config["shown_rank"] if rank is None else rank
        name = f"basis/{method}/{rank}/{point}"
        if name not in self.arrays:
            there = ", ".join(sorted(n.removeprefix("basis/") for n in self.arrays))
            raise ValueError(f"expected one of {there}, got {method}/{rank}/{point}; pass what was fitted")
        return self.arrays[name].numpy()

    # -- figures -------------------------------------------------------------------------------------------------

    def plot_energy(
        self,
        gradient: str | None = None,
        *,
        method: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Energy of gradients in the basis over that of the controls, by layer and step.

        Args:
            gradient: "weight" or "activation"; None: the first there is.
            method: "pca" or "semi_nmf"; None: the first.
            rank: of the basis; None: the shown one.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import tangent_energy_figure

        return tangent_energy_figure(
            self.table, gradient=gradient, method=method, **self._basis(rank),
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_anisotropy(
        self,
        gradient: str | None = None,
        *,
        method: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Isotropy that gradients gain without the basis, by layer and step.

        Args:
            gradient: "weight" or "activation"; None: the first there is.
            method: "pca" or "semi_nmf"; None: the first.
            rank: of the basis; None: the shown one.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: what was not analysed.
        """
        from tl_asymmetry.plots import tangent_anisotropy_figure

        return tangent_anisotropy_figure(
            self.table, gradient=gradient, method=method, **self._basis(rank),
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def plot_strata(
        self,
        *,
        method: str | None = None,
        rank: int | None = None,
        title: str | None = None,
        template: Any = None,
        width: int | None = None,
        height: int | None = None,
    ) -> go.Figure:
        """Energy and distance to the centroid by token frequency.

        Args:
            method: "pca" or "semi_nmf"; None: the first.
            rank: of the basis; None: the shown one.
            title: first line of the title; None says what is shown. Plain text.
            template: None or "light", "dark", or any plotly template.
            width, height: pixels; None follows the page and the content.

        Raises:
            ValueError: analysed without strata or per-token gradients.
        """
        from tl_asymmetry.plots import tangent_strata_figure

        if self.strata.empty:
            raise ValueError(
                "expected an analysis with strata of per-token gradients, got one without; pass strata=5 and "
                'gradients=("activation",) to analyze_tangents'
            )
        return tangent_strata_figure(
            self.strata, method=method, rank=self.config["shown_rank"] if rank is None else rank,
            title=title, template=template, width=width, height=height,
        )  # fmt: skip

    def _basis(self, rank: int | None) -> dict[str, Any]:
        """The basis of a figure: its rank, and the last step it was fitted on where later ones follow."""
        steps = self.config["basis_steps"]
        late = len(steps) < len(self.config["checkpoints"])
        return {
            "rank": self.config["shown_rank"] if rank is None else rank,
            "basis_until": float(steps[-1]) if late and steps else None,
        }

    def _title(self) -> str:
        steps = [checkpoint["step"] for checkpoint in self.config["checkpoints"]]
        span = f", steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else ""
        return f"{self.config['model']['name']}{span}"

    def _facts(self) -> str:
        shape, config = self.config["shape"], self.config
        return (
            f"{config['kind']}, {shape['n_layers']} layers × {shape['n_heads']} heads, d_model {shape['d_model']}; "
            f"{len(config['checkpoints'])} checkpoint{'s' * (len(config['checkpoints']) > 1)}, bases from "
            f"{len(config['basis_steps'])}; {config['tokens']} "
            f"tokens in {config['sequences']} sequences, {config['targets']} predicted; ranks "
            f"{', '.join(map(str, config['ranks']))}, shown {config['shown_rank']}; {config['draws']} "
            f"{config['control']} controls"
        )

    def _summary_table(self) -> pd.DataFrame:
        return summary_table(self.table, self.config["shown_rank"])

    def _headline(self) -> list[str]:
        return headline(self.table, self.strata, self.frequency, self.config)

    def _report(self) -> Report:
        config = self.config
        return self._page(
            figures=self._figures(),
            tables=[
                TableSection("Summary", self._summary_table(), "Medians over matrices, layers and steps.", "summary"),
                TableSection(
                    "All rows", self.table, "One row per step, gradient, site, layer, head, method and rank.", "table"
                ),
                TableSection("Strata", self.strata, "Stratum 1 holds the rarest tokens.", "strata"),
                TableSection(
                    "Frequency and distance", self.frequency, "Correlation over tokens, layer by layer.", "frequency"
                ),
                TableSection("Bases", self.bases, "How well each basis describes the early activations.", "bases"),
                TableSection("Checkpoints", self.checkpoints, "", "checkpoints"),
            ],
            methods=[
                ("Bases", f"{', '.join(BASIS_METHODS[m] for m in config['methods'])}, rank "
                 f"{', '.join(map(str, config['ranks']))}, fitted on steps "
                 f"{', '.join(map(str, config['basis_steps']))} of {config['total_steps']}"),
                ("Controls", f"{config['draws']} random subspaces of equal rank for each basis, "
                 + ("orthogonal to it" if config["control"] == "complement" else "anywhere (Haar)")),
                ("Loss", "masked-language-model loss on seeded masks" if config["kind"] == "encoder"
                 else "next-token cross-entropy"),
                ("Strata", f"{config['strata']} of equal mass" if config["strata"] else "none"),
            ],
            definitions=TANGENT_DEFINITIONS,
        )  # fmt: skip

    def _figures(self) -> list[FigureSection]:
        families = [(g, m) for g in self.config["gradients"] for m in self.config["methods"]]
        energy: dict[str, go.Figure] = {}
        anisotropy: dict[str, go.Figure] = {}
        for gradient, method in families:
            name = f"{gradient} gradients, {BASIS_METHODS[method]}"
            energy[name] = self.plot_energy(gradient, method=method)
            anisotropy[name] = self.plot_anisotropy(gradient, method=method)
        figures = [
            FigureSection(
                "Energy in early directions", energy,
                "Solid above dotted: more than the activations' own spectrum would give. Solid above the dashed line "
                "alone says only that gradients are not spread evenly.",
            ),
            FigureSection(
                "Anisotropy in early directions", anisotropy,
                "Above the dotted line of the same colour: the basis holds more of the anisotropy than a normal "
                "control.",
            ),
        ]  # fmt: skip
        if len(self.strata):
            strata = {BASIS_METHODS[m]: self.plot_strata(method=m) for m in self.config["methods"]}
            figures.append(FigureSection("By token frequency", strata, "Drag the slider through training."))
        return figures
