// The charts of a card: concentration by rank, spectrum of the change.

// Points, references and the drawn curve of one head; `seen` bounds the axis.
function curve(item) {
  const map = mapOf(item.matrix, item.subspace),
    {layer, head} = item;
  const points = data.ranks
    .map((k, r) => ({
      k,
      relative: at(map, "relative", layer, head, r),
      low: at(map, "ci_low", layer, head, r),
      high: at(map, "ci_high", layer, head, r),
      q: at(map, "isotropic_q", layer, head, r),
      expected: others.map((n) => held(map, n.key, "expected", layer, head, r)),
    }))
    .filter((p) => Number.isFinite(p.relative));
  const profile = data.curves[item.matrix + "/" + item.subspace],
    count = profile ? profile.k.length : 0,
    where = (layer * map.count + head) * count;
  const line = profile ? Array.from(profile.relative.slice(where, where + count)) : [];
  const seen = points
    .flatMap((p) => [p.relative, p.low, p.high, ...p.expected])
    .concat(line)
    .filter((v) => v > 0);
  return {points, k: profile ? profile.k : [], line, seen};
}

function drawCurve(box, item, range) {
  const {points, k, line} = curve(item);
  if (!points.length) {
    box.textContent = "No value: the delta is zero, so its fractions are undefined.";
    box.style.minHeight = 0;
    return;
  }
  const [blue, orange] = theme().template.layout.colorway;
  const traces = [];
  const told = points.some((p) => Number.isFinite(p.low) && Number.isFinite(p.high));
  traces.push({
    x: k,
    y: line,
    mode: "lines",
    line: {color: blue, width: 1.5},
    name: "relative",
    hovertemplate: "relative %{y:.3g} at k = %{x}<extra></extra>",
  });
  const dashes = ["dash", "dashdot", "longdash", "longdashdot", "dot"];
  others.forEach((n, i) => {
    const known = points.filter((p) => Number.isFinite(p.expected[i]));
    if (known.length) {
      traces.push({
        x: known.map((p) => p.k),
        y: known.map((p) => p.expected[i]),
        mode: "lines",
        line: {color: orange, dash: dashes[i % dashes.length], width: 2},
        name: n.label,
        hovertemplate: n.label + " %{y:.3g} at k = %{x}<extra></extra>",
      });
    }
  });
  traces.push({
    x: points.map((p) => p.k),
    y: points.map((p) => p.relative),
    mode: "markers",
    name: `filled: ${FOUND}` + (told ? "; whiskers: 95 % interval" : ""),
    marker: {
      size: 9,
      color: blue,
      symbol: points.map((p) => (p.q <= SIGNIFICANT ? "circle" : "circle-open")),
      line: {color: blue, width: 1.5},
    },
    error_y: {
      visible: told,
      type: "data",
      symmetric: false,
      array: points.map((p) => p.high - p.relative),
      arrayminus: points.map((p) => p.relative - p.low),
      color: blue,
      thickness: 1.5,
      width: 4,
    },
    customdata: points.map((p) => [
      Number.isFinite(p.low) ? number(p.low) + " to " + number(p.high) : "none",
      number(p.q, 2),
    ]),
    hovertemplate:
      "<b>relative %{y:.3g}</b> at k = %{x}<br>95 % interval %{customdata[0]}<br>q %{customdata[1]}<extra></extra>",
  });
  plot(box, traces, {
    xaxis: {type: "log", title: {text: "rank k"}, tickvals: data.ranks, ticktext: data.ranks.map(String)},
    yaxis: {type: "log", title: {text: "relative"}, range, ...octaves(range)},
    shapes: [CHANCE],
  });
}

const CHANCE = {
  type: "line",
  xref: "paper",
  x0: 0,
  x1: 1,
  y0: 1,
  y1: 1,
  line: {dash: "dash", width: 1.5, color: "#828a94"},
};

// The range of a log axis that holds some ratios and chance, 1.
function around(values) {
  const seen = values.filter((v) => v > 0);
  return [Math.log10(Math.min(0.7, ...seen)) - 0.05, Math.log10(Math.max(1.4, ...seen)) + 0.05];
}

function octaves(range) {
  const first = Math.ceil(range[0] / Math.log10(2)),
    last = Math.floor(range[1] / Math.log10(2)),
    step = Math.max(1, Math.ceil((last - first) / 7));
  const exponents = [];
  for (let e = first; e <= last; e += 1) {
    if (e % step === 0) {
      exponents.push(e);
    }
  }
  if (exponents.length < 3) {
    // too narrow for powers of two alone
    const fine = [0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3].filter(
      (v) => Math.log10(v) >= range[0] && Math.log10(v) <= range[1],
    );
    return {tickvals: fine, ticktext: fine.map(String)};
  }
  return {
    tickvals: exponents.map((e) => 2 ** e),
    ticktext: exponents.map((e) => (e >= 0 ? String(2 ** e) : "1/" + 2 ** -e)),
  };
}

function drawSpectrum(box, item) {
  const spectrum = data.spectra[item.matrix],
    map = mapOf(item.matrix, item.subspace);
  const where = item.layer * map.count + item.head,
    x = spectrum.index;
  const y = Array.from(spectrum.share.slice(where * x.length, (where + 1) * x.length));
  if (!y.some((v) => v > 0)) {
    box.textContent = "No spectrum: the delta is zero.";
    box.style.minHeight = 0;
    return;
  }
  const [blue, , green] = theme().template.layout.colorway,
    edge = spectrum.edge[where];
  // Beyond the delta's rank only rounding is left; it would stretch the axis.
  const floor = y[0] * 1e-9;
  const traces = [
    {
      x,
      y: y.map((v) => (v > floor ? v : null)),
      mode: "lines+markers",
      marker: {size: 4, color: blue},
      line: {color: blue, width: 1.5},
      name: "eigenvalue of ΔW ΔWᵀ",
      hovertemplate: "%{x}: %{y:.3g} of ‖ΔW‖²<extra></extra>",
    },
  ];
  if (Number.isFinite(edge)) {
    traces.push({
      x: [1, x[x.length - 1]],
      y: [edge, edge],
      mode: "lines",
      line: {color: green, dash: "dash", width: 1.5},
      name: "Marchenko–Pastur edge",
      hovertemplate: "independent entries would end here: %{y:.3g}<extra></extra>",
    });
  }
  plot(box, traces, {
    xaxis: {type: "log", title: {text: "index (largest first)"}, dtick: 1},
    yaxis: {type: "log", title: {text: "share of ‖ΔW‖²"}, exponentformat: "power", dtick: 1},
  });
}

async function plot(box, traces, layout) {
  await plotly();
  // Below the plot: 46 pixels for the axis title, then room for four lines of legend on a telephone.
  const own = {
    height: 320,
    autosize: true,
    margin: {l: 56, r: 8, t: 8, b: 122},
    template: theme().template,
    dragmode: false,
    showlegend: true,
    legend: {orientation: "h", x: 0, y: -46 / 190, yanchor: "top", font: {size: 11}},
  };
  Plotly.react(
    box,
    traces,
    {...own, ...layout},
    {responsive: true, displayModeBar: false, showSendToCloud: false, plotlyServerURL: ""},
  );
}
