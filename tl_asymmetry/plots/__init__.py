"""Tables in, plotly figures out. Computes nothing, knows no model, never shows a figure.

Every function takes `title`, `template` (None or "light", "dark", or any plotly template), `width` and `height`, and
returns a `plotly.graph_objects.Figure` whose menus and sliders need nothing but a browser. plotly is imported here
and nowhere above, so the package itself stays light.
"""

from tl_asymmetry.plots.asymmetry import asymmetry_figure
from tl_asymmetry.plots.coupling import accuracy_figure, arms_figure, coupling_figure, windows_figure
from tl_asymmetry.plots.head_maps import head_maps_figure
from tl_asymmetry.plots.heads import heads_figure
from tl_asymmetry.plots.layers import layers_figure
from tl_asymmetry.plots.rank_curve import rank_curve_figure
from tl_asymmetry.plots.spectrum import spectrum_figure
from tl_asymmetry.plots.stability import stability_figure
from tl_asymmetry.plots.style import template

__all__ = [
    "accuracy_figure",
    "arms_figure",
    "asymmetry_figure",
    "coupling_figure",
    "head_maps_figure",
    "heads_figure",
    "layers_figure",
    "rank_curve_figure",
    "spectrum_figure",
    "stability_figure",
    "template",
    "windows_figure",
]
