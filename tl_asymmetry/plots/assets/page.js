// A report's figures, their controls, and its downloads.
//
// This script stands in the middle of the page, before all data but the first figure's, so that the reader sees a figure
// while the rest is still being read.

const settings = JSON.parse(document.getElementById("page-settings").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => settings[dark.matches ? "dark" : "light"];
const drawn = [];
const whole = new Promise((resolve) => {
  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", resolve);
  } else {
    resolve();
  }
});

plotly();

const idle = () => new Promise((resolve) => (window.requestIdleCallback || setTimeout)(resolve));

async function held(id) {
  if (!document.getElementById(id)) {
    await whole;
  }
  return document.getElementById(id);
}

// Explicit colour scales do not follow a template, so the diverging one is exchanged by hand.
function paint(figure) {
  for (const part of [figure, ...(figure.frames || [])]) {
    for (const trace of part.data || []) {
      if (trace.meta === "diverging") {
        trace.colorscale = theme().diverging;
      }
    }
  }
  figure.layout.template ||= theme().template;
}

// Labels are escaped for plotly; here they become text content, which needs none.
const plain = (label) =>
  label.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&#36;/g, "$").replace(/&amp;/g, "&");

// Titles come wrapped for a telephone; a wider page has room for longer lines.
function wrap(words, columns) {
  const lines = [""];
  // A name longer than a line is cut, unless that could cut an escape in two.
  const pieces = words
    .split(" ")
    .flatMap((word) => (word.includes("&") ? [word] : word.match(new RegExp(`.{1,${Math.floor(columns)}}`, "gu")) || []));
  for (const word of pieces) {
    const last = lines[lines.length - 1];
    if (last && plain(last + " " + word).length > columns) {
      lines.push(word);
    } else {
      lines[lines.length - 1] = last ? last + " " + word : word;
    }
  }
  return lines;
}

const SMALL = "<span style='font-size:12px'>";

function fitted(title, width) {
  const [head, ...small] = title.replaceAll("</b><br><b>", " ").split("<br>");
  const words = small.map((line) => line.replace(SMALL, "").replace("</span>", "")).join(" ");
  const bold = wrap(head.replace("<b>", "").replace("</b>", ""), Math.max(30, (width - 16) / 9));
  const lines = words ? wrap(words, Math.max(40, (width - 14) / 6.5)) : [];
  return [...bold.map((line) => `<b>${line}</b>`), ...lines.map((line) => `${SMALL}${line}</span>`)].join("<br>");
}

const linesOf = (title) => title.split("<br>").length;

// The letters of each entry in a figure's legend.
const entriesOf = ({data, layout}) =>
  data
    .filter((t) => layout.showlegend && t.visible !== false && t.showlegend !== false && t.type !== "heatmap")
    .map((t) => plain(t.name || "").length);

// Pixels that a legend needs beyond those kept for it under the axis: where the page is narrow it has more rows, and
// would be laid over the axis.
function legendNeeds(own, width) {
  const columns = Math.max(1, Math.floor((width - 56) / (6.8 * Math.max(0, ...own.entries) + 46)));
  return Math.max(0, 20 * Math.ceil(own.entries.length / columns) - (own.bottom - 50));
}

// The layout with its title on as few lines as the width allows, and room for its legend.
function fit(layout, own, width) {
  const saved = own.lines - Math.max(...own.titles.map((title) => linesOf(fitted(title, width)))),
    more = legendNeeds(own, width);
  return {
    "title.text": fitted(layout.title.text, width),
    "margin.t": own.top - saved * own.line,
    "margin.b": own.bottom + more,
    height: own.height - saved * own.line + more,
  };
}

function run(plot, step, own) {
  // A copy: plotly keeps and changes what it is given.
  const args = structuredClone(step.args);
  for (const part of args) {
    if (own && part && part["title.text"]) {
      part["title.text"] = fitted(part["title.text"], plot.clientWidth);
    }
  }
  Plotly[step.method](plot, ...args);
}

function addControl(holder, id, name, node) {
  const label = document.createElement("label");
  label.textContent = name;
  label.htmlFor = node.id = id;
  const group = document.createElement("span");
  group.className = "control";
  group.append(label, node);
  holder.append(group);
  return group;
}

function addButton(holder, words, press) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = words;
  button.addEventListener("click", press);
  holder.append(button);
}

function addMenu(holder, plot, menu, n, own) {
  if (menu.type === "buttons") {
    menu.buttons.forEach((step) => addButton(holder, plain(step.label), () => run(plot, step, own)));
    return;
  }
  const select = document.createElement("select");
  menu.buttons.forEach((button, i) => {
    select.append(new Option(plain(button.label), i, false, i === (menu.active || 0)));
  });
  select.addEventListener("change", () => run(plot, menu.buttons[+select.value], own));
  addControl(holder, `${plot.id}-menu-${n}`, menu.name || "show", select);
}

function addSlider(holder, plot, slider, n, own) {
  const range = document.createElement("input");
  range.type = "range";
  range.min = 0;
  range.max = slider.steps.length - 1;
  range.value = slider.active || 0;
  const shown = document.createElement("output");
  const tell = () => {
    const label = plain(slider.steps[+range.value].label);
    shown.textContent = label;
    range.setAttribute("aria-valuetext", label);
  };
  range.addEventListener("input", () => {
    tell();
    run(plot, slider.steps[+range.value], own);
  });
  tell();
  addControl(holder, `${plot.id}-slider-${n}`, slider.name || "step", range).append(shown);
}

async function draw(box) {
  if (box.dataset.drawn || box.hidden) {
    return;
  }
  box.dataset.drawn = "yes";
  const plot = box.querySelector(".plot");
  try {
    const source = await held(`${plot.id}-data`);
    const packed = source.type === "application/gzip";
    const figure = packed ? await unpacked(source).json() : JSON.parse(source.textContent);
    await plotly();
    await show(box, plot, figure);
    if (packed) {
      addHover(plot);
    }
  } catch (error) {
    plot.textContent = "This figure could not be drawn: " + error;
  }
}

// Every title a figure can have: its own, and those its controls and frames set.
function titlesOf(layout, frames) {
  const steps = [...(layout.updatemenus || []), ...(layout.sliders || [])].flatMap((c) => c.buttons || c.steps || []);
  const set = steps.flatMap((step) => (step.args || []).map((part) => part && part["title.text"]));
  const moved = (frames || []).map((frame) => frame.layout && frame.layout.title && frame.layout.title.text);
  return [layout.title.text, ...set, ...moved].filter(Boolean);
}

async function show(box, plot, figure) {
  const layout = figure.layout;
  const ours = !layout.template;
  const meta = layout.meta && layout.meta.tl_asymmetry;
  let own = null;
  paint(figure);
  if (meta) {
    layout.height -= meta.menu + meta.slider;
    layout.margin.t -= meta.menu;
    layout.margin.b -= meta.slider;
    own = {titles: titlesOf(layout, figure.frames), lines: linesOf(layout.title.text), line: meta.line};
    own.top = layout.margin.t;
    own.bottom = layout.margin.b;
    own.entries = entriesOf(figure);
    own.height = layout.height;
    const fits = fit(layout, own, plot.clientWidth);
    layout.title.text = fits["title.text"];
    layout.margin.t = fits["margin.t"];
    layout.margin.b = fits["margin.b"];
    layout.height = fits.height;
    for (const frame of figure.frames || []) {
      if (frame.layout && frame.layout.title) {
        frame.layout.title.text = fitted(frame.layout.title.text, plot.clientWidth);
      }
    }
  }
  const holder = box.querySelector(".controls");
  (layout.updatemenus || []).forEach((menu, n) => addMenu(holder, plot, menu, n, own));
  (layout.sliders || []).forEach((slider, n) => addSlider(holder, plot, slider, n, own));
  addButton(holder, "Save as PNG", () =>
    Plotly.downloadImage(plot, {format: "png", scale: 2, filename: box.getAttribute("aria-label")}),
  );
  delete layout.updatemenus;
  delete layout.sliders;
  layout.autosize = true;
  // Over a narrow plot plotly's buttons would cover the title; the page's own button saves the picture too.
  // plotly.js 4 offers by default to send the chart to a server: not from here.
  await Plotly.newPlot(plot, figure.data, layout, {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false,
    plotlyServerURL: "",
    displayModeBar: plot.clientWidth < 640 ? false : "hover",
    modeBarButtonsToRemove: ["sendChartToCloud", "lasso2d", "select2d", "autoScale2d"],
  });
  if (figure.frames) {
    await Plotly.addFrames(plot, figure.frames);
  }
  plot.style.minHeight = "";
  drawn.push({plot, ours, own, width: plot.clientWidth});
}

// The words of a large figure's hovers come after the figure itself, once the browser has nothing better to do.
async function addHover(plot) {
  await whole;
  const source = document.getElementById(`${plot.id}-hover`);
  if (!source) {
    return;
  }
  const {traces, ...words} = await unpacked(source).json();
  await idle();
  await Plotly.restyle(plot, words, traces);
  plot.dataset.hover = "yes";
}

dark.addEventListener("change", () => {
  for (const {plot, ours} of drawn.filter((item) => item.ours)) {
    const maps = plot.data.flatMap((trace, i) => (trace.meta === "diverging" ? [i] : []));
    if (maps.length) {
      Plotly.restyle(plot, {colorscale: [theme().diverging]}, maps);
    }
    Plotly.relayout(plot, {template: theme().template});
  }
});

let resized;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => {
    for (const item of drawn) {
      const width = item.plot.clientWidth;
      if (item.own && width && width !== item.width) {
        item.width = width;
        Plotly.relayout(item.plot, fit(item.plot.layout, item.own, width));
      }
    }
  }, 150);
});

const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watcher.unobserve(entry.target);
      draw(entry.target);
    }
  },
  {rootMargin: "800px"},
);
const boxes = Array.from(document.querySelectorAll(".figure-box"));
// The first figure has the browser to itself.
(boxes.length ? draw(boxes[0]) : whole).then(() => {
  boxes.forEach((box) => watcher.observe(box));
  whole.then(idle).then(async () => {
    document.querySelectorAll(".scroll.long").forEach((box) => box.classList.remove("long"));
    // What is printed must have been drawn before: a print does not wait.
    for (const box of boxes) {
      await idle();
      await draw(box);
    }
  });
});
addEventListener("beforeprint", () => boxes.forEach(draw));

for (const select of document.querySelectorAll("select[data-figures]")) {
  select.addEventListener("change", () => {
    document.querySelectorAll(`[data-group='${select.dataset.figures}']`).forEach((box, i) => {
      box.hidden = i !== +select.value;
      draw(box);
    });
  });
}

for (const button of document.querySelectorAll("button[data-file]")) {
  button.addEventListener("click", async () => {
    const content = await unpacked(await held(button.dataset.held)).blob();
    saveAs(new Blob([content], {type: "text/csv"}), button.dataset.file);
  });
}
