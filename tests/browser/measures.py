"""What the tests ask of a page, in the page's own language."""

from __future__ import annotations

import time


def until(page, condition):
    """Wait for a condition; playwright's own waiting needs `eval`, which the pages forbid themselves."""
    end = time.monotonic() + 15
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never: {condition}"
        time.sleep(0.02)


SHOWN_MAP = """(selector) => {
  const plot = document.querySelector(selector), full = plot._fullLayout;
  const inside = (axis, v) => { const [a, b] = axis.range; return v > Math.min(a, b) && v < Math.max(a, b); };
  const trace = plot.data.find((t, i) => t.meta === "diverging" && plot._fullData[i].visible === true &&
    inside(full.yaxis, t.y[0]));
  const y = Array.from(trace.y), x = Array.from(trace.x);
  const columns = x.slice(1).map((v, j) => j).filter((j) => inside(full.xaxis, (x[j] + x[j + 1]) / 2));
  const z = y.map((v, i) => i).filter((i) => inside(full.yaxis, y[i])).map((i) => columns.map((j) => trace.z[i][j]));
  const dots = plot._fullData.filter((t) => /^(above|below) /.test(t.name || "") && t.visible === true);
  const marks = dots.map((t) => plot.querySelectorAll(".trace" + t.uid + " .points path").length);
  return {z, axis: full.xaxis.title.text, title: full.title.text, marks: marks.reduce((a, b) => a + b, 0)};
}"""
"""Numbers, titles and number of significance marks of the map inside a figure's window."""

CONTRASTS = """() => {
  const parse = (color) => {
    const m = color.match(/[\\d.]+/g).map(Number);
    return {rgb: m.slice(0, 3), alpha: m[3] === undefined ? 1 : m[3]};
  };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (let n = node; n; n = n.parentElement) {
      const c = parse(getComputedStyle(n).backgroundColor);
      if (c.alpha === 1) { return c.rgb; }
    }
    return [255, 255, 255];
  };
  const found = [], seen = new Set();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const hidden = "script, style, svg, noscript, [aria-hidden=true]";
    if (!walker.currentNode.data.trim() || seen.has(node) || node.closest(hidden) || !node.checkVisibility()) {
      continue;
    }
    seen.add(node);
    const style = getComputedStyle(node), a = light(parse(style.color).rgb), b = light(ground(node));
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && +style.fontWeight >= 700);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push({words: node.textContent.trim().slice(0, 40), ratio, needed: large ? 3 : 4.5});
  }
  return found;
}"""
"""Contrast of every visible text with what lies behind it, and what WCAG AA asks."""

LAID_OVER = """() => Array.from(document.querySelectorAll(".js-plotly-plot"))
  .filter((plot) => plot.checkVisibility() && plot.querySelector(".legend"))
  .filter((plot) => {
    const top = plot.querySelector(".legend").getBoundingClientRect().top;
    const titles = Array.from(plot.querySelectorAll("[class*=xtitle]"));
    return titles.some((title) => title.getBoundingClientRect().bottom > top + 1);
  })
  .map((plot) => plot.id)"""
"""Figures whose legend lies over the title of an axis."""

UNREACHED = """() => {
  const controls = Array.from(document.querySelectorAll("a[href], button, select, input, summary, [tabindex='0']"))
    .filter((n) => n.checkVisibility() && !n.disabled);
  const name = (n) => (n.id || n.getAttribute("aria-label") || n.textContent).slice(0, 40);
  return controls.filter((n) => !n.dataset.reached).map(name);
}"""
"""Controls on the page that the keyboard has not reached."""


def unreached_by_keyboard(page):
    """Controls that are left when Tab has been pressed as often as some were left, four times over."""
    page.evaluate("document.addEventListener('focusin', (event) => { event.target.dataset.reached = 'yes'; })")
    for _ in range(4):
        for _ in page.evaluate(UNREACHED):
            page.keyboard.press("Tab")
    return page.evaluate(UNREACHED)
