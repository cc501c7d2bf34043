"""How figures live in a page of their own: plotly's code, a figure as data, and the script that draws it.

The script draws a figure when it comes near the screen, follows the reader's light or dark preference, and turns
plotly's menus and sliders, which are pictures a keyboard cannot reach, into HTML controls above the plot.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from tl_asymmetry.plots import style

PACK_ABOVE = 100_000
"""Characters of JSON above which a figure is packed: a map of 32 × 32 heads shrinks to a third."""


def safe_json(text: str) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def figure_json(figure: go.Figure) -> str:
    """A figure as JSON for a `<script type="application/json">`.

    The package's own template is left out (the page sets it, light or dark, once for all figures); another's stays.
    The width is left to the page.

    Raises:
        ValueError: for what is no plotly figure.
    """
    if not isinstance(figure, go.Figure):
        raise ValueError(f"expected a plotly Figure, got {type(figure).__name__}; pass what a plot_* method returns")
    content = json.loads(figure.to_json())
    layout = content["layout"]
    layout.pop("width", None)
    if _own(figure):
        layout.pop("template", None)
    return safe_json(json.dumps({"data": content["data"], "layout": layout}, separators=(",", ":")))


def figure_script(figure: go.Figure) -> str:
    """The script element that holds a figure: plain JSON, or packed (gzip in base64) where it is large.

    Raises:
        ValueError: for what is no plotly figure.
    """
    content = figure_json(figure)
    if len(content) <= PACK_ABOVE:
        return f'<script type="application/json">{content}</script>'
    # mtime fixed: the same figure gives the same page, byte for byte.
    packed = base64.b64encode(gzip.compress(content.encode(), 6, mtime=0)).decode()
    return f'<script type="application/gzip">{packed}</script>'


def controls_height(figure: go.Figure) -> tuple[int, int]:
    """Pixels the figure keeps for its own menus and slider, which the page cuts off: (menu, slider)."""
    meta = _meta(figure)
    return int(meta.get("menu", 0)), int(meta.get("slider", 0))


def write_image(figure: go.Figure, path: Path, *, format: str, width: int, scale: float) -> Path:
    """Write what a figure shows first as a static image, without the menus and sliders nobody can press on paper.

    Raises:
        ImportError: kaleido is not installed.
    """
    if not _kaleido_installed():
        raise ImportError("expected kaleido to be installed; pip install 'tl-asymmetry[report]'")
    still = go.Figure(figure)
    menu, slider = controls_height(figure)
    margin = still.layout.margin
    still.layout.updatemenus = still.layout.sliders = ()
    still.update_layout(
        width=width,
        height=(still.layout.height or 450) - menu - slider,
        margin={"t": (margin.t or 0) - menu, "b": (margin.b or 0) - slider} if menu or slider else {},
    )
    still.write_image(path, format=format, scale=scale)
    return path


def _kaleido_installed() -> bool:
    return importlib.util.find_spec("kaleido") is not None


def page_settings() -> str:
    """JSON of what the script needs once: both templates and both diverging scales."""
    return safe_json(
        json.dumps(
            {
                name: {"template": style.template(name).to_plotly_json(), "diverging": style.DIVERGING[name]}
                for name in style.PAPER
            }
        )
    )


def plotly_code() -> str:
    """plotly.js, in a form that cannot end the script element it stands in."""
    return get_plotlyjs().replace("</script", "<\\/script")


def _meta(figure: go.Figure) -> dict[str, Any]:
    meta = figure.layout.meta
    return meta.get("tl_asymmetry", {}) if isinstance(meta, dict) else {}


def _own(figure: go.Figure) -> bool:
    return _meta(figure).get("template") is not None


SCRIPT = r"""
(function () {
  "use strict";
  var settings = JSON.parse(document.getElementById("page-settings").textContent);
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var drawn = [];

  function theme() { return settings[dark.matches ? "dark" : "light"]; }

  function paint(figure) {
    // Explicit colour scales do not follow a template, so the diverging one is exchanged by hand.
    figure.data.forEach(function (trace) {
      if (trace.meta === "diverging") { trace.colorscale = theme().diverging; }
    });
    if (!figure.layout.template) { figure.layout.template = theme().template; }
  }

  function plain(label) {
    // Labels are escaped for plotly; here they become text content, which needs none.
    return label.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&#36;/g, "$").replace(/&amp;/g, "&");
  }

  function run(plot, step) {
    // A copy: plotly keeps and changes what it is given.
    var args = JSON.parse(JSON.stringify(step.args));
    Plotly[step.method].apply(Plotly, [plot].concat(args));
  }

  function addControl(holder, id, name, node) {
    var label = document.createElement("label");
    label.textContent = name;
    label.htmlFor = id;
    node.id = id;
    var group = document.createElement("span");
    group.className = "control";
    group.append(label, node);
    holder.append(group);
    return group;
  }

  function controls(box, plot, layout) {
    var holder = box.querySelector(".controls");
    (layout.updatemenus || []).forEach(function (menu, n) {
      var select = document.createElement("select");
      menu.buttons.forEach(function (button, i) {
        var option = document.createElement("option");
        option.value = i;
        option.textContent = plain(button.label);
        option.selected = i === (menu.active || 0);
        select.append(option);
      });
      select.addEventListener("change", function () { run(plot, menu.buttons[+select.value]); });
      addControl(holder, plot.id + "-menu-" + n, menu.name || "show", select);
    });
    (layout.sliders || []).forEach(function (slider, n) {
      var range = document.createElement("input");
      range.type = "range";
      range.min = 0;
      range.max = slider.steps.length - 1;
      range.value = slider.active || 0;
      var shown = document.createElement("output");
      function tell() {
        var label = plain(slider.steps[+range.value].label);
        shown.textContent = label;
        range.setAttribute("aria-valuetext", label);
      }
      range.addEventListener("input", function () { tell(); run(plot, slider.steps[+range.value]); });
      tell();
      addControl(holder, plot.id + "-slider-" + n, slider.name || "step", range).append(shown);
    });
  }

  function saveButton(box, plot) {
    var button = document.createElement("button");
    button.type = "button";
    button.textContent = "Save as PNG";
    button.addEventListener("click", function () {
      Plotly.downloadImage(plot, {format: "png", scale: 2, filename: box.getAttribute("aria-label")});
    });
    box.querySelector(".controls").append(button);
  }

  function read(box) {
    var held = box.querySelector("script");
    if (held.type === "application/json") { return Promise.resolve(JSON.parse(held.textContent)); }
    var bytes = Uint8Array.from(atob(held.textContent), function (c) { return c.charCodeAt(0); });
    var unpacked = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(unpacked).json();
  }

  function draw(box) {
    if (box.dataset.drawn || box.hidden) { return Promise.resolve(); }
    box.dataset.drawn = "yes";
    var plot = box.querySelector(".plot");
    return Promise.resolve(box).then(read).then(function (figure) { return show(box, plot, figure); })
      .catch(function (error) { plot.textContent = "This figure could not be drawn: " + error; });
  }

  function show(box, plot, figure) {
    var layout = figure.layout;
    var own = (layout.meta && layout.meta.tl_asymmetry) || {menu: 0, slider: 0};
    var ours = !layout.template;
    paint(figure);
    controls(box, plot, layout);
    saveButton(box, plot);
    if (layout.updatemenus || layout.sliders) {
      layout.height -= own.menu + own.slider;
      layout.margin.t -= own.menu;
      layout.margin.b -= own.slider;
      delete layout.updatemenus;
      delete layout.sliders;
    }
    layout.autosize = true;
    // Over a narrow plot plotly's buttons would cover the title; the page's own button saves the picture too.
    // plotly.js 4 offers by default to send the chart to a server: not from here.
    var options = {
      responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
      displayModeBar: plot.clientWidth < 640 ? false : "hover",
      modeBarButtonsToRemove: ["sendChartToCloud", "lasso2d", "select2d", "autoScale2d"]
    };
    return Plotly.newPlot(plot, figure.data, layout, options).then(function () {
      plot.style.minHeight = "";
      drawn.push({plot: plot, ours: ours});
    });
  }

  dark.addEventListener("change", function () {
    drawn.forEach(function (item) {
      if (!item.ours) { return; }
      var maps = [];
      item.plot.data.forEach(function (trace, i) { if (trace.meta === "diverging") { maps.push(i); } });
      if (maps.length) { Plotly.restyle(item.plot, {colorscale: [theme().diverging]}, maps); }
      Plotly.relayout(item.plot, {template: theme().template});
    });
  });

  var boxes = Array.prototype.slice.call(document.querySelectorAll(".figure-box"));
  var watcher = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) {
      if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
    });
  }, {rootMargin: "800px"});
  boxes.forEach(function (box) { watcher.observe(box); });
  window.addEventListener("beforeprint", function () { boxes.forEach(draw); });

  document.querySelectorAll("select[data-figures]").forEach(function (select) {
    select.addEventListener("change", function () {
      document.querySelectorAll("[data-group='" + select.dataset.figures + "']").forEach(function (box, i) {
        box.hidden = i !== +select.value;
        draw(box);
      });
    });
  });
})();
"""

CSS = """
:root{--paper:#ffffff;--ink:#1c2430;--soft:#4d5866;--line:#c3cad3;--panel:#f4f6f8;--link:#1a5fa8;--note:#fdf4e3;
--note-line:#b57614;--focus:#1a5fa8}
@media (prefers-color-scheme:dark){:root{--paper:#15181d;--ink:#e6e9ee;--soft:#a9b2be;--line:#454d58;
--panel:#1f242b;--link:#7db8f0;--note:#2d2618;--note-line:#d99a3d;--focus:#7db8f0}}
*{box-sizing:border-box}
html{scroll-behavior:smooth}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0 auto;max-width:1080px;padding:24px 20px 64px;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','Liberation Sans',sans-serif}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;line-height:1.3;margin:40px 0 8px;padding-top:12px;border-top:1px solid var(--line);
overflow-wrap:anywhere}
p,li,dd{max-width:74ch;overflow-wrap:anywhere}
.subtitle{color:var(--soft);margin:0}
a{color:var(--link)}
a:focus-visible,button:focus-visible,select:focus-visible,
input:focus-visible,[tabindex]:focus-visible{outline:3px solid var(--focus);
outline-offset:2px}
main:focus{outline:none}
.skip{position:absolute;left:-999px}
.skip:focus{left:8px;top:8px;background:var(--paper);padding:8px;z-index:9}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 18px;padding:10px 14px;margin:18px 0 0;
background:var(--panel);border-radius:6px}
nav a{display:inline-block;padding:3px 0}
nav .result{flex-basis:100%;font-weight:600}
nav .result ul{font-weight:400;margin:2px 0 6px;padding:0 0 0 16px}
h3{font-size:1.1rem;line-height:1.3;margin:28px 0 6px;overflow-wrap:anywhere}
section.result>h2{font-size:1.4rem}
.notes{background:var(--note);border-left:4px solid var(--note-line);padding:10px 14px 10px 32px;margin:8px 0;
border-radius:0 6px 6px 0}
.figure-box{margin:12px 0 0}
.figure-box[hidden]{display:none}
.plot{width:100%}
.controls{display:flex;flex-wrap:wrap;gap:8px 24px;margin:0 0 6px}
.control{display:inline-flex;flex-wrap:wrap;align-items:center;gap:4px 8px;max-width:100%;margin:0}
.control label{color:var(--soft);font-size:.9rem}
select,button{font:inherit;font-size:.9rem;padding:5px 8px;max-width:100%;color:var(--ink);background:var(--panel);
border:1px solid var(--soft);border-radius:5px}
input[type=range]{width:160px;min-height:28px;accent-color:var(--link)}
output{min-width:3ch;font-variant-numeric:tabular-nums}
.scroll{overflow:auto;max-height:440px;border:1px solid var(--line);border-radius:6px;max-width:100%}
table{border-collapse:collapse;font-size:.84rem;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:4px 10px;text-align:left;border-bottom:1px solid var(--line)}
thead th{position:sticky;top:0;background:var(--panel)}
td.n{text-align:right}
.settings table{white-space:normal}
.settings th{font-weight:600;vertical-align:top;white-space:nowrap}
.settings td{overflow-wrap:anywhere;min-width:160px}
.rows{color:var(--soft);font-size:.9rem;margin:8px 0}
dt{font-weight:600;margin-top:14px}
dd{margin:2px 0 0}
dd p{margin:0}
.mark{font-weight:400;font-size:.8rem;color:var(--soft);border:1px solid var(--line);border-radius:4px;
padding:1px 6px;white-space:nowrap}
.marks{list-style:none;padding:0}
@media (max-width:520px){body{padding:16px 12px 48px}h1{font-size:1.35rem}
.settings th{white-space:normal;min-width:96px}}
@media print{nav,.skip,.controls,.control{display:none}.scroll{max-height:none;overflow:visible}}
"""
