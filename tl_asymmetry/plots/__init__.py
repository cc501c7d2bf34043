"""Tables in, plotly figures out. Computes nothing, knows no model, never shows a figure.

Every function takes `title`, `template` (None or "light", "dark", or any plotly template), `width` and `height`, and
returns a `plotly.graph_objects.Figure` whose menus and sliders need nothing but a browser. plotly is imported here
and nowhere above, so the package itself stays light.
"""

from tl_asymmetry.plots.asymmetry import asymmetry_figure
from tl_asymmetry.plots.comparison import differences_figure, overlap_figure
from tl_asymmetry.plots.control import grades_figure
from tl_asymmetry.plots.coupling import accuracy_figure, arms_figure, coupling_figure, windows_figure
from tl_asymmetry.plots.deltas import deltas_figure
from tl_asymmetry.plots.gradients import effective_rank_figure
from tl_asymmetry.plots.head_maps import head_maps_figure
from tl_asymmetry.plots.head_sheet import head_sheet_figure
from tl_asymmetry.plots.heads import heads_figure
from tl_asymmetry.plots.interventions import controls_figure, doses_figure, effects_figure
from tl_asymmetry.plots.layers import layers_figure
from tl_asymmetry.plots.power import power_figure
from tl_asymmetry.plots.rank_curve import rank_curve_figure
from tl_asymmetry.plots.rewinding import rewind_curve_figure, rewind_heads_figure, rewind_path_figure
from tl_asymmetry.plots.shift import shift_figure
from tl_asymmetry.plots.spectra import spectra_figure
from tl_asymmetry.plots.spectrum import spectrum_figure
from tl_asymmetry.plots.stability import stability_figure
from tl_asymmetry.plots.stages import stage_cosines_figure, stage_flow_figure
from tl_asymmetry.plots.style import template
from tl_asymmetry.plots.tangents import tangent_anisotropy_figure, tangent_energy_figure, tangent_strata_figure
from tl_asymmetry.plots.trajectory import (
    animation_figure,
    curves_figure,
    emergence_figure,
    head_curves_figure,
)

__all__ = [
    "accuracy_figure",
    "animation_figure",
    "arms_figure",
    "asymmetry_figure",
    "controls_figure",
    "coupling_figure",
    "curves_figure",
    "deltas_figure",
    "differences_figure",
    "doses_figure",
    "effective_rank_figure",
    "effects_figure",
    "emergence_figure",
    "grades_figure",
    "head_curves_figure",
    "head_maps_figure",
    "head_sheet_figure",
    "heads_figure",
    "layers_figure",
    "overlap_figure",
    "power_figure",
    "rank_curve_figure",
    "rewind_curve_figure",
    "rewind_heads_figure",
    "rewind_path_figure",
    "shift_figure",
    "spectra_figure",
    "spectrum_figure",
    "stability_figure",
    "stage_cosines_figure",
    "stage_flow_figure",
    "tangent_anisotropy_figure",
    "tangent_energy_figure",
    "tangent_strata_figure",
    "template",
    "windows_figure",
]
