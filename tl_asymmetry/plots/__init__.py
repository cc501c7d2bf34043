"""Tables in, plotly figures out. Computes nothing, knows no model, never shows a figure.

Every function takes `title`, `template` (None or "light", "dark", or any plotly template), `width` and `height`, and
returns a `plotly.graph_objects.Figure` whose menus and sliders need nothing but a browser. plotly is imported here
and nowhere above, so the package itself stays light.
"""

from .asymmetry import asymmetry_figure
from .heads import heads_figure
from .layers import layers_figure
from .rank_curve import rank_curve_figure
from .spectrum import spectrum_figure
from .style import template

__all__ = [
    "asymmetry_figure",
    "heads_figure",
    "layers_figure",
    "rank_curve_figure",
    "spectrum_figure",
    "template",
]
