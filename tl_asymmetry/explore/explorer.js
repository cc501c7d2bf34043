// The head explorer. Reads the packed data, keeps one state, and redraws what depends on what changed.
// Every word of a model or user reaches the page as text content, never as markup.
(async function () {
  "use strict";

  // -- data ----------------------------------------------------------------------------------------------------

  const $ = (id) => document.getElementById(id);
  const settings = JSON.parse($("page-settings").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const data = await unpack($("explorer-data").textContent);
  const LEVEL = 0.05, FLAG = 0.1, DOMINATED = 0.5, FIRST_ROWS = 200;

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const buffer = await new Response(stream).arrayBuffer();
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    const kinds = {f4: Float32Array, f8: Float64Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array};
    const arrays = header.arrays.map((a) => new kinds[a.kind](buffer, 4 + length + a.at, a.length));
    return JSON.parse(JSON.stringify(header), (key, value) =>
      value && typeof value === "object" && "array" in value
        ? (value.words ? {words: value.words, at: arrays[value.array]} : arrays[value.array]) : value);
  }

  const maps = data.maps.map((m, i) => ({...m, i, count: m.heads === null ? 1 : m.heads}));
  const mapOf = (matrix, subspace) => maps.find((m) => m.matrix === matrix && m.subspace === subspace);

  // A column of a map at (layer, head, rank); head counts from 0, also for a matrix without heads.
  function at(map, column, layer, head, rank) {
    const held = map.columns[column];
    if (!held) { return NaN; }
    const where = (layer * map.count + head) * data.ranks.length + rank;
    return held.words ? held.words[held.at[where]] : held[where];
  }

  const inRelative = (fraction, rank) => fraction * data.d / data.ranks[rank];

  const VALUES = {
    relative: {label: "relative fraction over the isotropic null", ratio: true,
      meaning: "1 = chance: what a random subspace of the same rank holds.", of: (m, l, h, r) => at(m, "relative", l, h, r)},
    excess: {label: "excess over the activation-matched reference", ratio: true,
      meaning: "1 = what a plain sum of gradients on these inputs would hold. Write matrices have no such reference.",
      of: (m, l, h, r) => at(m, "excess", l, h, r)},
    gradient_excess: {label: "excess over the gradient-matched reference", ratio: true,
      meaning: "1 = what the named objective's gradients would hold.", of: (m, l, h, r) => at(m, "gradient_excess", l, h, r)},
    unrounded: {label: "relative fraction over the isotropic null, rounding removed", ratio: true,
      meaning: "1 = chance: what a random subspace of the same rank holds.",
      of: (m, l, h, r) => inRelative(at(m, "fraction_unrounded", l, h, r), r)},
    z: {label: "isotropic z", meaning: "0 = chance: standard deviations of a random subspace from its mean.",
      of: (m, l, h, r) => at(m, "isotropic_z", l, h, r)},
    delta_relative_norm: {label: "size of the change, ‖ΔW‖/‖W‖", amount: true, meaning: "0 = unchanged.",
      of: (m, l, h, r) => at(m, "delta_relative_norm", l, h, r)},
    rounding_share: {label: "rounding share", amount: true,
      meaning: "Share of ‖ΔW‖² that storing the weights explains by itself.", of: (m, l, h, r) => at(m, "rounding_share", l, h, r)}
  };
  for (const name of Object.keys(VALUES)) {  // offer only what some map has
    const column = {unrounded: "fraction_unrounded", z: "isotropic_z"}[name] || name;
    const there = maps.some((m) => m.columns[column] && m.columns[column].some((v) => !Number.isNaN(v)));
    if (!there && name !== "relative") { delete VALUES[name]; }
  }

  // -- state and address ----------------------------------------------------------------------------------------

  const state = {
    map: 0, value: "relative", rank: data.ranks.indexOf(data.shown), search: "", focus: {layer: 0, head: 0},
    open: [],  // {layer, head, matrix, subspace, pinned}: pinned ones first, the current one last
    sort: null, down: true, rows: FIRST_ROWS
  };

  function headName(map, layer, head) {
    if (map.heads === null) { return "L" + layer; }
    if (!map.kv) { return "L" + layer + "H" + head; }
    const first = head * map.group;
    return "L" + layer + " KV head " + head + (map.group > 1 ? " (query heads " + first + "–" + (first + map.group - 1) + ")" : "");
  }

  function address(item) {
    const map = mapOf(item.matrix, item.subspace);
    const name = "L" + item.layer + (map.heads === null ? "" : "H" + item.head) + "/" + item.matrix;
    return encodeURIComponent(name).replace(/%2F/g, "/") +
      (item.subspace === data.usual[item.matrix] ? "" : "/" + encodeURIComponent(item.subspace));
  }

  // "L7H3/W_Q", "L7H3/W_Q/prediction" or "L7/W_in"; several joined by "+".
  function parse(hash) {
    const found = [];
    for (const part of hash.replace(/^#/, "").split("+").filter(Boolean)) {
      let pieces;
      try { pieces = part.split("/").map(decodeURIComponent); } catch (error) { continue; }
      const name = /^L(\d+)(?:H(\d+))?$/.exec(pieces[0]);
      const matrix = pieces[1];
      const map = name && mapOf(matrix, pieces[2] || data.usual[matrix]);
      if (!map || (map.heads === null) !== (name[2] === undefined)) { continue; }
      const item = {layer: +name[1], head: +(name[2] || 0), matrix, subspace: map.subspace, pinned: true};
      if (item.layer < data.layers && item.head < map.count) { found.push(item); }
    }
    if (found.length) { found[found.length - 1].pinned = false; }
    return found;
  }

  function setAddress() {
    const hash = "#" + state.open.map(address).join("+");
    if (hash !== location.hash && (state.open.length || location.hash)) { history.replaceState(null, "", hash); }
  }

  const same = (a, b) => a.layer === b.layer && a.head === b.head && a.matrix === b.matrix && a.subspace === b.subspace;

  function openHead(item) {
    if (state.open.some((o) => same(o, item))) { return say(title(item) + " is open already."); }
    state.open = state.open.filter((o) => o.pinned).concat([{...item, pinned: false}]);
    say(title(item) + " opened.");
    refresh();
  }

  const title = (item) => headName(mapOf(item.matrix, item.subspace), item.layer, item.head) + " · " + item.matrix;
  function say(words) { $("said").textContent = words; }

  // -- words and colours -----------------------------------------------------------------------------------------

  const number = (value, digits = 3) => Number.isFinite(value) ? String(+value.toPrecision(digits)) : "–";
  const theme = () => settings[dark.matches ? "dark" : "light"];

  function element(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node && !name.includes("-")) { node[name] = value; } else { node.setAttribute(name, value); }
    }
    node.append(...children);
    return node;
  }

  function mix(stops, where) {
    let i = 1;
    while (i < stops.length - 1 && stops[i][0] < where) { i += 1; }
    const [a, first] = stops[i - 1], [b, second] = stops[i];
    const t = (where - a) / (b - a);
    const channel = (c, n) => parseInt(c.slice(1 + 2 * n, 3 + 2 * n), 16);
    return "rgb(" + [0, 1, 2].map((n) => Math.round(channel(first, n) + t * (channel(second, n) - channel(first, n)))).join(",") + ")";
  }

  // Where a value lies on the scale, 0 to 1: chance in the middle, an amount in the upper half.
  function place(value, kind, limit) {
    if (Number.isNaN(value)) { return NaN; }
    if (kind.amount) { return 0.5 + 0.5 * Math.min(1, value / limit); }
    const distance = kind.ratio ? (value <= 0 ? -limit : Math.log2(value)) : value;
    return 0.5 + 0.5 * Math.max(-1, Math.min(1, distance / limit));
  }

  // One limit for all matrices at a value and rank, so that their maps can be compared.
  const limits = {};
  function limitOf(value, rank) {
    const key = value + "/" + rank;
    if (!(key in limits)) {
      const kind = VALUES[value];
      let most = 0;
      for (const map of maps) {
        for (let l = 0; l < data.layers; l += 1) {
          for (let h = 0; h < map.count; h += 1) {
            const v = kind.of(map, l, h, rank);
            const size = kind.ratio ? (v > 0 ? Math.abs(Math.log2(v)) : 0) : Math.abs(v);
            if (Number.isFinite(size) && size > most) { most = size; }
          }
        }
      }
      limits[key] = kind.amount ? most || 1 : kind.ratio ? Math.max(1, Math.ceil(most)) : Math.max(2, most);
    }
    return limits[key];
  }

  // -- search ----------------------------------------------------------------------------------------------------

  const SHORT = {q: "isotropic_q", z: "isotropic_z", p: "isotropic_p", rounding: "rounding_share", norm: "delta_relative_norm"};
  const TESTS = {"<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b};

  // A test of (map, layer, head, rank) for each word, and the words nobody understood.
  function understand(text) {
    const tests = [], unknown = [];
    for (const word of text.trim().split(/\s+/).filter(Boolean)) {
      const condition = /^([A-Za-z_]\w*)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/i.exec(word);
      const name = /^(?:L(\d+))?(?:H(\d+))?$/i.exec(word);
      const matrix = maps.find((m) => m.matrix.toLowerCase() === word.toLowerCase());
      const column = condition && (SHORT[condition[1]] || condition[1]);
      if (condition && ["layer", "head", "rank"].includes(column)) {
        tests.push((m, l, h, r) => TESTS[condition[2]]({layer: l, head: m.heads === null ? NaN : h, rank: data.ranks[r]}[column], +condition[3]));
      } else if (condition && maps[0].columns[column] && !maps[0].columns[column].words) {
        tests.push((m, l, h, r) => TESTS[condition[2]](at(m, column, l, h, r), +condition[3]));
      } else if (name && (name[1] || name[2])) {
        tests.push((m, l, h) => (name[1] === undefined || +name[1] === l) && (name[2] === undefined || (m.heads !== null && +name[2] === h)));
      } else if (matrix) {
        tests.push((m) => m.matrix === matrix.matrix);
      } else { unknown.push(word); }
    }
    return {test: (m, l, h, r) => tests.every((t) => t(m, l, h, r)), unknown};
  }

  // -- map -------------------------------------------------------------------------------------------------------

  function drawMap() {
    const map = maps[state.map], kind = VALUES[state.value], limit = limitOf(state.value, state.rank);
    const stops = theme().diverging;
    const hits = understand(state.search);
    state.focus.layer = Math.min(state.focus.layer, data.layers - 1);
    state.focus.head = Math.min(state.focus.head, map.count - 1);
    const widest = Math.max(...maps.map((m) => m.count));
    const room = Math.max(240, ($("map").clientWidth || 800) - 60);
    const width = Math.max(18, Math.min(64, Math.floor(room / widest))) * widest / map.count;
    const what = map.heads === null ? "no heads: one value a layer" : map.kv ? "KV head" : "head";
    const table = element("table", {className: "map", role: "grid", "aria-label": map.matrix + " against " + map.subspace + ", layer by " + what});
    const top = element("tr", {}, element("th", {scope: "col"}, "layer"));
    for (let h = 0; h < map.count; h += 1) {
      const label = map.heads === null ? "MLP" : map.count > 16 && h % 4 ? "" : String(h);
      top.append(element("th", {scope: "col"}, label));
    }
    const body = element("tbody");
    let found = 0;
    for (let l = 0; l < data.layers; l += 1) {
      const row = element("tr", {}, element("th", {scope: "row"}, String(l)));
      for (let h = 0; h < map.count; h += 1) {
        const value = kind.of(map, l, h, state.rank);
        const q = at(map, "isotropic_q", l, h, state.rank), rounding = at(map, "rounding_share", l, h, state.rank);
        const where = place(value, kind, limit);
        const marks = (rounding >= DOMINATED ? "✕" : rounding >= FLAG ? "◆" : "") + (q < LEVEL ? "●" : "");
        const words = headName(map, l, h) + ": " + number(value) + (q < LEVEL ? ", q below 0.05" : "") +
          (rounding >= DOMINATED ? ", mostly rounding" : rounding >= FLAG ? ", rounding share " + number(rounding, 2) : "");
        const cell = element("td", {role: "gridcell", tabIndex: l === state.focus.layer && h === state.focus.head ? 0 : -1,
          title: words, "aria-label": words}, element("span", {className: "mark", "aria-hidden": "true"}, marks));
        cell.dataset.layer = l;
        cell.dataset.head = h;
        cell.style.width = width + "px";
        cell.style.minWidth = width + "px";
        if (Number.isNaN(where)) { cell.classList.add("none"); } else { cell.style.backgroundColor = mix(stops, where); }
        if (rounding >= DOMINATED) { cell.classList.add("dominated"); }
        if (state.search && !hits.test(map, l, h, state.rank)) { cell.classList.add("dim"); } else { found += 1; }
        if (state.open.some((o) => o.matrix === map.matrix && o.layer === l && o.head === h)) { cell.classList.add("open"); }
        row.append(cell);
      }
      body.append(row);
    }
    const focused = $("map").contains(document.activeElement);
    table.append(element("thead", {}, top), body);
    $("map").replaceChildren(table);
    if (focused) { focusCell(); }
    $("found").textContent = !state.search ? "" : found + " of " + data.layers * map.count + " heads match." +
      (hits.unknown.length ? " Not understood: " + hits.unknown.join(" ") : "");
    $("meaning").textContent = map.matrix + " against " + map.subspace + ": " + kind.label + ". " + kind.meaning;
    drawLegend(kind, limit, stops);
  }

  function drawLegend(kind, limit, stops) {
    const first = kind.amount ? 0.5 : 0;
    const ramp = element("div", {className: "ramp"});
    ramp.style.background = "linear-gradient(to right," + [0, 1, 2, 3, 4, 5, 6, 7, 8].map((i) => mix(stops, first + (1 - first) * i / 8)).join(",") + ")";
    const power = (e) => e >= 0 ? String(2 ** e) : "1/" + 2 ** -e;
    const ends = kind.amount ? ["0", number(limit)] : kind.ratio ? [power(-limit), "1", power(limit)] : [number(-limit), "0", number(limit)];
    const ticks = element("div", {className: "ticks"}, ...ends.map((t) => element("span", {}, t)));
    $("legend").replaceChildren(element("div", {className: "bar"}, ramp, ticks),
      element("span", {}, "one scale for all matrices at this rank"));
  }

  function cellAt(layer, head) { return $("map").querySelector("td[data-layer='" + layer + "'][data-head='" + head + "']"); }

  function focusCell() {
    $("map").querySelectorAll("td[tabindex='0']").forEach((cell) => { cell.tabIndex = -1; });
    const cell = cellAt(state.focus.layer, state.focus.head);
    cell.tabIndex = 0;
    cell.focus();
  }

  function openCell(cell) {
    const map = maps[state.map];
    state.focus = {layer: +cell.dataset.layer, head: +cell.dataset.head};
    openHead({layer: state.focus.layer, head: state.focus.head, matrix: map.matrix, subspace: map.subspace});
  }

  // -- cards -----------------------------------------------------------------------------------------------------

  function drawCards() {
    const cards = state.open.map(card);
    $("cards").replaceChildren(...cards.map((c) => c.node));
    if (!cards.length) { $("cards").textContent = "None yet: choose a head in the map or the table."; }
    // One scale for all cards, so that they can be compared.
    const seen = state.open.flatMap((o) => curve(o).seen);
    const range = seen.length ? [Math.log10(Math.min(0.7, ...seen)) - 0.05, Math.log10(Math.max(1.4, ...seen)) + 0.05] : null;
    cards.forEach((c) => c.draw(range));
  }

  function card(item) {
    const map = mapOf(item.matrix, item.subspace);
    const {layer, head} = item, r = state.rank, id = "card-" + address(item).replace(/\W/g, "-");
    const get = (column) => at(map, column, layer, head, r);
    const pin = element("button", {type: "button", "aria-pressed": String(item.pinned)}, item.pinned ? "Pinned" : "Pin");
    pin.addEventListener("click", () => { item.pinned = !item.pinned; say(title(item) + (item.pinned ? " pinned." : " no longer pinned.")); refresh(".card [aria-pressed]", state.open.indexOf(item)); });
    const close = element("button", {type: "button", "aria-label": "Close " + title(item)}, "Close");
    close.addEventListener("click", () => { state.open = state.open.filter((o) => o !== item); say(title(item) + " closed."); refresh(); $("map").querySelector("td[tabindex='0']").focus(); });
    const spaces = element("select", {id: id + "-space"});
    maps.filter((m) => m.matrix === item.matrix).forEach((m) => spaces.append(new Option(m.subspace, m.subspace, false, m.subspace === item.subspace)));
    spaces.addEventListener("change", () => {
      const there = {...item, subspace: spaces.value};
      if (!state.open.some((o) => same(o, there))) { item.subspace = spaces.value; }
      refresh(".card select", state.open.indexOf(item));
    });
    const interval = Number.isNaN(get("ci_low")) ? "none" + (item.subspace === "prediction" ? " (weights only)" : "") : number(get("ci_low")) + " to " + number(get("ci_high"));
    const gap = get("eigengap"), rounding = get("rounding_share");
    const facts = [
      ["relative at k = " + data.ranks[r], number(get("relative")) + " (fraction " + number(get("fraction")) + "; 1 = chance)"],
      ["95 % interval over texts", interval],
      ["isotropic null", "z " + number(get("isotropic_z")) + ", p " + number(get("isotropic_p"), 2) + ", q " + number(get("isotropic_q"), 2) + " (" + get("p_method") + ")"],
      ["activation-matched", number(inRelative(get("activation_matched"), r)) + ", excess " + number(get("excess"))],
      ["gradient-matched", number(inRelative(get("gradient_matched"), r)) + ", excess " + number(get("gradient_excess"))],
      ["rounding share", number(rounding) + (rounding >= DOMINATED ? ", mostly storage" : "") + "; without it " + number(inRelative(get("fraction_unrounded"), r))],
      ["eigengap", number(gap) + (gap < 0.05 ? ", too small to trust the edge" : "")],
      ["‖ΔW‖/‖W‖", number(get("delta_relative_norm")) + "; effective rank " + number(get("delta_effective_rank"))]
    ];
    const list = element("dl", {className: "facts"});
    facts.forEach(([name, value]) => list.append(element("dt", {}, name), element("dd", {}, value)));
    const curvePlot = element("div", {className: "chart"}), spectrumPlot = element("div", {className: "chart"});
    const node = element("article", {className: "card", "aria-labelledby": id},
      element("h3", {id, tabIndex: -1}, title(item)),
      element("div", {className: "controls"}, pin, close,
        element("span", {className: "control"}, element("label", {htmlFor: id + "-space"}, "against"), spaces)),
      list, element("h4", {}, "Concentration by rank (dashed grey: 1 = chance)"), curvePlot, element("h4", {}, "Spectrum of the change"), spectrumPlot,
      element("h4", {}, "Leading directions"), ...directionBlocks(item));
    const later = data.attached.map((table) => attachedBlock(table, item, node));
    return {node, draw(range) { drawCurve(curvePlot, item, range); drawSpectrum(spectrumPlot, item); later.forEach((f) => f && f()); }};
  }

  // Points, references and the drawn curve of one head; `seen` bounds the axis.
  function curve(item) {
    const map = mapOf(item.matrix, item.subspace), {layer, head} = item;
    const points = data.ranks.map((k, r) => ({k, relative: at(map, "relative", layer, head, r), low: at(map, "ci_low", layer, head, r),
      high: at(map, "ci_high", layer, head, r), q: at(map, "isotropic_q", layer, head, r),
      matched: inRelative(at(map, "activation_matched", layer, head, r), r),
      gradient: inRelative(at(map, "gradient_matched", layer, head, r), r)})).filter((p) => Number.isFinite(p.relative));
    const held = data.curves[item.matrix + "/" + item.subspace];
    const line = held ? held.k.map((k, n) => held.fraction[(layer * map.count + head) * held.k.length + n] * data.d / k) : [];
    const seen = points.flatMap((p) => [p.relative, p.low, p.high, p.matched, p.gradient]).concat(line).filter((v) => v > 0);
    return {points, k: held ? held.k : [], line, seen};
  }

  function drawCurve(box, item, range) {
    const {points, k, line} = curve(item);
    if (!points.length) { box.textContent = "No value: the delta is zero, so its fractions are undefined."; box.style.minHeight = 0; return; }
    const [blue, orange, green] = theme().template.layout.colorway;
    const traces = [];
    const banded = points.filter((p) => Number.isFinite(p.low) && Number.isFinite(p.high));
    if (banded.length) {
      traces.push({x: banded.map((p) => p.k).concat(banded.map((p) => p.k).reverse()), y: banded.map((p) => p.low).concat(banded.map((p) => p.high).reverse()),
        fill: "toself", mode: "none", fillcolor: blue, opacity: 0.22, hoverinfo: "skip", name: "95 % interval (texts)"});
    }
    traces.push({x: k, y: line, mode: "lines", line: {color: blue, width: 1.5}, name: "relative", hovertemplate: "relative %{y:.3g} at k = %{x}<extra></extra>"});
    [["matched", "activation-matched", orange, "dash"], ["gradient", "gradient-matched", green, "dashdot"]].forEach(([key, name, color, dash]) => {
      const told = points.filter((p) => Number.isFinite(p[key]));
      if (told.length) { traces.push({x: told.map((p) => p.k), y: told.map((p) => p[key]), mode: "lines", line: {color, dash, width: 2}, name, hovertemplate: name + " %{y:.3g} at k = %{x}<extra></extra>"}); }
    });
    traces.push({x: points.map((p) => p.k), y: points.map((p) => p.relative), mode: "markers", name: "filled: q < 0.05".replace("<", "&lt;"),
      marker: {size: 9, color: blue, symbol: points.map((p) => p.q < LEVEL ? "circle" : "circle-open"), line: {color: blue, width: 1.5}},
      customdata: points.map((p) => [Number.isFinite(p.low) ? number(p.low) + " to " + number(p.high) : "none", number(p.q, 2)]),
      hovertemplate: "<b>relative %{y:.3g}</b> at k = %{x}<br>95 % interval %{customdata[0]}<br>q %{customdata[1]}<extra></extra>"});
    const chance = {type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: {dash: "dash", width: 1.5, color: "#828a94"}};
    plot(box, traces, {xaxis: {type: "log", title: {text: "rank k"}, tickvals: data.ranks, ticktext: data.ranks.map(String)},
      yaxis: {type: "log", title: {text: "relative"}, range, ...octaves(range)}, shapes: [chance]});
  }

  function octaves(range) {
    const first = Math.ceil(range[0] / Math.log10(2)), last = Math.floor(range[1] / Math.log10(2)), step = Math.max(1, Math.ceil((last - first) / 7));
    const exponents = [];
    for (let e = first; e <= last; e += 1) { if (e % step === 0) { exponents.push(e); } }
    return {tickvals: exponents.map((e) => 2 ** e), ticktext: exponents.map((e) => e >= 0 ? String(2 ** e) : "1/" + 2 ** -e)};
  }

  function drawSpectrum(box, item) {
    const held = data.spectra[item.matrix], map = mapOf(item.matrix, item.subspace);
    const where = item.layer * map.count + item.head;
    const y = Array.from(held.share.slice(where * held.length, (where + 1) * held.length));
    if (!y.some((v) => v > 0)) { box.textContent = "No spectrum: the delta is zero."; box.style.minHeight = 0; return; }
    const [blue, , green] = theme().template.layout.colorway, edge = held.edge[where];
    // Beyond the delta's rank only rounding is left; it would stretch the axis.
    const floor = y[0] * 1e-9, x = y.map((_, i) => i + 1);
    const traces = [{x, y: y.map((v) => v > floor ? v : null), mode: "lines+markers", marker: {size: 4, color: blue}, line: {color: blue, width: 1.5}, name: "eigenvalue of ΔW ΔWᵀ",
      hovertemplate: "%{x}: %{y:.3g} of ‖ΔW‖²<extra></extra>"}];
    if (Number.isFinite(edge)) {
      traces.push({x: [1, held.length], y: [edge, edge], mode: "lines", line: {color: green, dash: "dash", width: 1.5}, name: "Marchenko–Pastur edge",
        hovertemplate: "independent entries would end here: %{y:.3g}<extra></extra>"});
    }
    plot(box, traces, {xaxis: {type: "log", title: {text: "index (largest first)"}, dtick: 1}, yaxis: {type: "log", title: {text: "share of ‖ΔW‖²"}, exponentformat: "power", dtick: 1}});
  }

  function plot(box, traces, layout) {
    // Below the plot: 46 pixels for the axis title, then room for four lines of legend on a telephone.
    const own = {height: 320, autosize: true, margin: {l: 56, r: 8, t: 8, b: 122}, template: theme().template, dragmode: false,
      showlegend: true, legend: {orientation: "h", x: 0, y: -46 / 190, yanchor: "top", font: {size: 11}}};
    Plotly.react(box, traces, {...own, ...layout}, {responsive: true, displayModeBar: false, showSendToCloud: false, plotlyServerURL: ""});
  }

  function directionBlocks(item) {
    if (data.directions.missing) { return [element("p", {className: "rows"}, data.directions.missing)]; }
    const held = data.directions.matrices[item.matrix], map = mapOf(item.matrix, item.subspace);
    const head = item.layer * map.count + item.head;
    const verb = map.pathway === "read" ? "excited most by" : "written most after";
    if (!(held.energy[head * held.n] >= 0)) { return [element("p", {className: "rows"}, "None: the delta is zero.")]; }
    const blocks = [];
    for (let i = 0; i < held.n; i += 1) {
      const block = element("div", {className: "direction"}, element("p", {}, element("b", {}, "Direction " + (i + 1)), ": " + number(100 * held.energy[head * held.n + i]) + " % of ‖ΔW‖²"));
      ["+", "−"].forEach((sign, s) => {
        const side = (head * held.n + i) * 2 + s;
        ["embedding", "unembedding"].forEach((kind) => {
          const line = element("p", {}, sign + " " + kind + ": ");
          for (let t = 0; t < held.tokens; t += 1) {
            const token = held[kind][side * held.tokens + t], cosine = held[kind + "_cosine"][side * held.tokens + t];
            line.append(element("span", {className: "token", title: "cosine " + number(cosine)}, visible(data.directions.tokens[token])), " ");
          }
          block.append(line);
        });
        const texts = element("p", {}, sign + " " + verb + ": ");
        for (let c = 0; c < held.contexts; c += 1) {
          const value = held.projection[side * held.contexts + c];
          texts.append(element("span", {className: "context"}, "“" + data.directions.contexts[held.context[side * held.contexts + c]] + "”"), " (" + number(value, 2) + ")" + (c + 1 < held.contexts ? "; " : ""));
        }
        block.append(texts);
      });
      blocks.push(block);
    }
    return blocks;
  }

  const visible = (token) => token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";

  function attachedBlock(table, item, node) {
    const map = mapOf(item.matrix, item.subspace), value = (name, i) => {
      const held = table.columns[name];
      return held.words ? held.words[held.at[i]] : held[i];
    };
    const rows = [];
    for (let i = 0; i < table.rows; i += 1) {
      const head = value("head", i);
      if (value("matrix", i) === item.matrix && value("layer", i) === item.layer && (map.heads === null ? Number.isNaN(head) : head === item.head)) { rows.push(i); }
    }
    node.append(element("h4", {}, table.name));
    if (!rows.length) { node.append(element("p", {className: "rows"}, "No rows for this head and matrix.")); return null; }
    const columns = Object.keys(table.columns).filter((c) => !["layer", "head", "matrix"].includes(c));
    const chart = "step" in table.columns && "relative" in table.columns ? element("div", {className: "chart"}) : null;
    if (chart) { node.append(chart); }
    const shown = rows.slice(0, 60);
    const head = element("tr", {}, ...columns.map((c) => element("th", {scope: "col"}, c)));
    const body = shown.map((i) => element("tr", {}, ...columns.map((c) => { const v = value(c, i); return element("td", {}, typeof v === "number" ? number(v, 4) : v); })));
    if (rows.length > shown.length || table.note) { node.append(element("p", {className: "rows"}, table.note + (rows.length > shown.length ? " First " + shown.length + " of " + rows.length + " rows." : ""))); }
    node.append(element("div", {className: "scroll", tabIndex: 0, role: "region", "aria-label": table.name + " of " + title(item)}, element("table", {}, element("thead", {}, head), element("tbody", {}, ...body))));
    if (!chart) { return null; }
    return () => {
      const series = {};
      rows.forEach((i) => {
        if ("rank" in table.columns && value("rank", i) !== data.ranks[state.rank]) { return; }
        const key = ["subspace", "delta"].filter((c) => c in table.columns).map((c) => value(c, i)).join(", ") || "relative";
        (series[key] = series[key] || []).push([value("step", i), value("relative", i)]);
      });
      const dashes = ["solid", "dash", "dot", "dashdot"];
      const traces = Object.entries(series).map(([name, pairs], n) => { pairs.sort((a, b) => a[0] - b[0]); return {x: pairs.map((p) => p[0]), y: pairs.map((p) => p[1]), mode: "lines+markers", line: {dash: dashes[n % 4]}, name: escaped(name)}; });
      if (!traces.length) { chart.textContent = "No rows at this rank."; return; }
      plot(chart, traces, {xaxis: {title: {text: "step"}}, yaxis: {title: {text: "relative (1 = chance)"}, type: "log"}});
    };
  }

  // plotly reads a subset of HTML and templates in names.
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;").replace(/%\{/g, "%\u200b{");

  // -- table -----------------------------------------------------------------------------------------------------

  const COLUMNS = [["relative", "relative"], ["ci_low", "95 % from"], ["ci_high", "to"], ["isotropic_z", "z"], ["isotropic_q", "q"],
    ["activation_matched", "matched (relative)"], ["excess", "excess"], ["gradient_excess", "gradient excess"], ["rounding_share", "rounding"], ["delta_relative_norm", "‖ΔW‖/‖W‖"]];
  const shownValue = (row, column) => column === "activation_matched" ? inRelative(at(row.map, column, row.layer, row.head, state.rank), state.rank) : at(row.map, column, row.layer, row.head, state.rank);

  function tableRows() {
    const hits = understand(state.search), all = $("choose-rows").value === "all", rows = [];
    for (const map of all ? maps : [maps[state.map]]) {
      for (let layer = 0; layer < data.layers; layer += 1) {
        for (let head = 0; head < map.count; head += 1) {
          if (Number.isNaN(at(map, "rounding_share", layer, head, state.rank)) && Number.isNaN(at(map, "delta_norm", layer, head, state.rank))) { continue; }  // no such row
          if (!hits.test(map, layer, head, state.rank)) { continue; }
          if ($("only-q").checked && !(at(map, "isotropic_q", layer, head, state.rank) < LEVEL)) { continue; }
          if ($("no-rounding").checked && at(map, "rounding_share", layer, head, state.rank) >= DOMINATED) { continue; }
          rows.push({map, layer, head});
        }
      }
    }
    if (state.sort !== null) {
      const key = (row) => shownValue(row, COLUMNS[state.sort][0]);
      const sign = state.down ? -1 : 1;
      rows.sort((a, b) => { const x = key(a), y = key(b); return Number.isNaN(x) ? (Number.isNaN(y) ? 0 : 1) : Number.isNaN(y) ? -1 : sign * (x - y); });
    }
    return rows;
  }

  function drawTable() {
    const rows = tableRows();
    const columns = COLUMNS.filter(([name]) => maps.some((m) => m.columns[name] && m.columns[name].some((v) => !Number.isNaN(v))));
    const head = ["head", "matrix", "against"].map((name) => element("th", {scope: "col"}, name));
    columns.forEach(([name, label]) => {
      const n = COLUMNS.findIndex((c) => c[0] === name);
      const button = element("button", {type: "button"}, label + (state.sort === n ? (state.down ? " ▼" : " ▲") : ""));
      button.addEventListener("click", () => { state.down = state.sort === n ? !state.down : true; state.sort = n; drawTable(); $("rows").querySelector("th[data-n='" + n + "'] button").focus(); });
      const cell = element("th", {scope: "col", "aria-sort": state.sort === n ? (state.down ? "descending" : "ascending") : "none"}, button);
      cell.dataset.n = n;
      head.push(cell);
    });
    $("rows").querySelector("thead tr").replaceChildren(...head);
    $("rows").querySelector("tbody").replaceChildren(...rows.slice(0, state.rows).map((row) => {
      const button = element("button", {type: "button"}, headName(row.map, row.layer, row.head));
      button.addEventListener("click", () => { openHead({layer: row.layer, head: row.head, matrix: row.map.matrix, subspace: row.map.subspace}); focusCard(); });
      return element("tr", {}, element("td", {}, button), element("td", {}, row.map.matrix), element("td", {}, row.map.subspace),
        ...columns.map(([name]) => element("td", {}, number(shownValue(row, name)))));
    }));
    $("counted").textContent = rows.length + " rows at rank " + data.ranks[state.rank] + (rows.length > state.rows ? ", the first " + state.rows + " shown." : ".");
    $("more").hidden = rows.length <= state.rows;
  }

  function focusCard() {
    const card = $("cards").lastElementChild;
    if (card) { card.scrollIntoView({block: "nearest"}); card.querySelector("h3").focus({preventScroll: true}); }
  }

  function download() {
    const cell = (value) => {
      if (typeof value !== "string") { return Number.isNaN(value) ? "" : String(+value.toPrecision(value !== 0 && Math.abs(value) < 1.2e-38 ? 15 : 7)); }
      // A spreadsheet must not take a name for a formula.
      const plain = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
      return /[",\n\r]/.test(plain) ? '"' + plain.replace(/"/g, '""') + '"' : plain;
    };
    const lines = [data.columns.map(cell).join(",")];
    for (const {map, layer, head} of tableRows()) {
      const keys = {layer, head: map.heads === null ? NaN : head, matrix: map.matrix, subspace: map.subspace, rank: data.ranks[state.rank], pathway: map.pathway};
      lines.push(data.columns.map((c) => cell(c in keys ? keys[c] : at(map, c, layer, head, state.rank))).join(","));
    }
    const link = element("a", {href: URL.createObjectURL(new Blob([lines.join("\n") + "\n"], {type: "text/csv"})), download: "heads.csv"});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  // -- wiring ----------------------------------------------------------------------------------------------------

  function refresh(selector, n) {
    setAddress();
    drawMap();
    drawCards();
    drawTable();
    const node = selector && $("cards").children[n] && $("cards").children[n].querySelector(selector.replace(".card ", ""));
    if (node) { node.focus(); }
  }

  function follow() {
    const items = parse(location.hash);
    if (location.hash.length > 1 && !items.length) { say("The address names no head of this page: " + location.hash); return; }
    state.open = items;
    const last = items[items.length - 1];
    if (last) {
      state.map = maps.indexOf(mapOf(last.matrix, last.subspace));
      state.focus = {layer: last.layer, head: last.head};
      $("choose-map").value = state.map;
    }
    refresh();
  }

  $("facts").textContent = data.facts;
  if (data.notes.length) {
    $("notes").hidden = false;
    $("notes").querySelector("summary").textContent = "Notes (" + data.notes.length + ")";
    $("notes").querySelector("ul").append(...data.notes.map((n) => element("li", {}, n)));
  }
  maps.forEach((m) => $("choose-map").append(new Option(m.matrix + " in " + m.subspace, m.i)));
  state.map = maps.indexOf(mapOf(maps[0].matrix, data.usual[maps[0].matrix]));
  $("choose-map").value = state.map;
  Object.entries(VALUES).forEach(([name, v]) => $("choose-value").append(new Option(v.label, name)));
  $("choose-rank").max = data.ranks.length - 1;
  $("choose-rank").value = state.rank;
  const tellRank = () => { $("rank-shown").textContent = data.ranks[state.rank]; $("choose-rank").setAttribute("aria-valuetext", data.ranks[state.rank]); };
  tellRank();

  $("choose-map").addEventListener("change", (e) => { state.map = +e.target.value; state.rows = FIRST_ROWS; drawMap(); drawTable(); });
  $("choose-value").addEventListener("change", (e) => { state.value = e.target.value; drawMap(); });
  $("choose-rank").addEventListener("input", (e) => { state.rank = +e.target.value; tellRank(); refresh(); });
  $("search").addEventListener("input", (e) => { state.search = e.target.value.trim(); drawMap(); drawTable(); });
  ["choose-rows", "only-q", "no-rounding"].forEach((id) => $(id).addEventListener("change", drawTable));
  $("more").addEventListener("click", () => { state.rows += 1000; drawTable(); });
  $("download").addEventListener("click", download);
  $("map").addEventListener("click", (e) => { const cell = e.target.closest("td"); if (cell) { openCell(cell); } });
  $("map").addEventListener("keydown", (e) => {
    const cell = e.target.closest("td");
    if (!cell) { return; }
    const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity]};
    if (e.key === "Enter" || e.key === " ") { e.preventDefault(); openCell(cell); return; }
    if (!(e.key in steps)) { return; }
    e.preventDefault();
    const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));
    state.focus = {layer: clamp(+cell.dataset.layer + steps[e.key][0], data.layers), head: clamp(+cell.dataset.head + steps[e.key][1], maps[state.map].count)};
    focusCell();
  });
  addEventListener("hashchange", follow);
  dark.addEventListener("change", () => refresh());
  let resized;
  addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(drawMap, 150); });
  follow();
  document.documentElement.dataset.ready = "yes";
})().catch(function (error) {
  document.getElementById("map").textContent = "This page could not be shown: " + error;
});
