// The layer x head map: a grid a mouse and a keyboard can walk.

function drawMap() {
  const map = maps[state.map],
    kind = VALUES[state.value],
    limit = limitOf(state.value, state.rank);
  const stops = theme().diverging;
  const hits = understand(state.search);
  state.focus.layer = Math.min(state.focus.layer, data.layers - 1);
  state.focus.head = Math.min(state.focus.head, map.count - 1);
  const widest = Math.max(...maps.map((m) => m.count));
  const room = Math.max(240, ($("map").clientWidth || 800) - 60);
  const width = (Math.max(18, Math.min(64, Math.floor(room / widest))) * widest) / map.count;
  const what = map.heads === null ? "no heads: one value a layer" : map.experts ? "expert" : map.kv ? "KV head" : "head";
  const table = element("table", {
    className: "map",
    role: "grid",
    "aria-label": map.matrix + " against " + map.subspace + ", layer by " + what,
  });
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
      const relation = kind.null ? held(map, kind.null, "relation", l, h, state.rank) : 0,
        rounding = at(map, "rounding_share", l, h, state.rank);
      const where = place(value, kind, limit);
      const stored = rounding >= ROUNDING_DOMINATED ? "✕" : rounding >= ROUNDING_FLAGGED ? "◆" : "";
      const told = kind.verdict && value >= 0 ? data.verdicts[value].sign : relation > 0 ? "●" : relation < 0 ? "○" : "";
      const marks = stored + told;
      const absent = whyEmpty(map, l, h, state.rank);
      const words = absent ||
        headName(map, l, h) +
        ": " +
        (kind.verdict ? at(map, "verdict", l, h, state.rank) : number(value)) +
        (map.experts ? ", " + routed(map, l, h, state.rank) : "") +
        (relation > 0 ? `, above it (${FOUND})` : relation < 0 ? `, below it (${FOUND})` : "") +
        (rounding >= ROUNDING_DOMINATED
          ? ", mostly rounding"
          : rounding >= ROUNDING_FLAGGED
            ? ", rounding share " + number(rounding, 2)
            : "");
      const cell = element(
        "td",
        {
          role: "gridcell",
          tabIndex: l === state.focus.layer && h === state.focus.head ? 0 : -1,
          title: words,
          "aria-label": words,
        },
        element("span", {className: "mark", "aria-hidden": "true"}, marks),
      );
      cell.dataset.layer = l;
      cell.dataset.head = h;
      cell.style.width = width + "px";
      cell.style.height = data.layers > 16 ? "22px" : "30px"; // few layers have room for a finger
      cell.style.minWidth = width + "px";
      if (Number.isNaN(where)) {
        cell.classList.add("none");
      } else {
        cell.style.backgroundColor = kind.verdict ? data.verdicts[value].color : mix(stops, where);
      }
      if (rounding >= ROUNDING_DOMINATED) {
        cell.classList.add("dominated");
      }
      if (state.search && !hits.test(map, l, h, state.rank)) {
        cell.classList.add("dim");
      } else {
        found += 1;
      }
      row.append(cell);
    }
    body.append(row);
  }
  const focused = $("map").contains(document.activeElement);
  table.append(element("thead", {}, top), body);
  $("map").replaceChildren(table);
  markOpen();
  if (focused) {
    focusCell();
  }
  $("found").textContent = !state.search
    ? ""
    : found +
      " of " +
      data.layers * map.count +
      " heads match." +
      (hits.understood.length ? " Understood: " + hits.understood.join(", ") + "." : "") +
      (hits.unknown.length ? " Not understood: " + hits.unknown.join(" ") : "");
  $("map-title").textContent = map.experts ? "Experts" : "Heads";
  $("meaning").textContent = map.matrix + " against " + map.subspace + ": " + kind.label + ". " + kind.meaning;
  drawLegend(kind, limit, stops);
}

// Why a cell has no row; nothing where it has one.
function whyEmpty(map, layer, head, rank) {
  const never = (map.empty[layer] || {})[head];
  if (never) {
    return never;
  }
  return Number.isNaN(at(map, "delta_norm", layer, head, rank))
    ? headName(map, layer, head) + ": the subspace has fewer directions than the rank there"
    : "";
}

// What an expert was given.
function routed(map, layer, head, rank) {
  if (isWhole(map, layer)) {
    return "no experts in this layer";
  }
  const tokens = at(map, "tokens_routed", layer, head, rank),
    weight = at(map, "routing_weight", layer, head, rank);
  if (Number.isNaN(tokens)) {
    return "routing not seen";
  }
  return tokens.toLocaleString("en") + " tokens routed" + (tokens ? ", mean weight " + number(weight) : "");
}

function drawLegend(kind, limit, stops) {
  const null_ = data.nulls.find((n) => n.key === kind.null);
  $("dots").hidden = !null_;
  if (null_) {
    $("dots").querySelector("span").textContent = `${null_.over} (${FOUND})`;
  }
  if (kind.verdict) {
    $("legend").replaceChildren(
      ...data.verdicts.map((v) => {
        const sample = element("b", {className: "mark verdict-sample", "aria-hidden": "true"}, v.sign);
        sample.style.backgroundColor = v.color;
        return element("span", {}, sample, " " + v.verdict);
      }),
    );
    return;
  }
  const first = kind.amount ? 0.5 : 0;
  const ramp = element("div", {className: "ramp"});
  ramp.style.background =
    "linear-gradient(to right," +
    [0, 1, 2, 3, 4, 5, 6, 7, 8].map((i) => mix(stops, first + ((1 - first) * i) / 8)).join(",") +
    ")";
  const power = (e) => (e >= 0 ? String(2 ** e) : "1/" + 2 ** -e);
  const ends = kind.amount
    ? ["0", number(limit)]
    : kind.ratio
      ? [power(-limit), "1", power(limit)]
      : [number(-limit), "0", number(limit)];
  const ticks = element("div", {className: "ticks"}, ...ends.map((t) => element("span", {}, t)));
  $("legend").replaceChildren(
    element("div", {className: "bar"}, ramp, ticks),
    element("span", {}, "one scale for all matrices at this rank"),
  );
}

// The frames of the cells whose heads are open.
function markOpen() {
  $("map").querySelectorAll("td.open").forEach((cell) => cell.classList.remove("open"));
  state.open
    .filter((o) => o.matrix === maps[state.map].matrix)
    .forEach((o) => cellAt(o.layer, o.head).classList.add("open"));
}

function cellAt(layer, head) {
  return $("map").querySelector("td[data-layer='" + layer + "'][data-head='" + head + "']");
}

function focusCell() {
  $("map")
    .querySelectorAll("td[tabindex='0']")
    .forEach((cell) => {
      cell.tabIndex = -1;
    });
  const cell = cellAt(state.focus.layer, state.focus.head);
  cell.tabIndex = 0;
  cell.focus();
}

function openCell(cell) {
  const map = maps[state.map];
  state.focus = {layer: +cell.dataset.layer, head: +cell.dataset.head};
  const absent = whyEmpty(map, state.focus.layer, state.focus.head, state.rank);
  if (absent) {
    return say("Nothing to open: " + absent + ".");
  }
  openHead({layer: state.focus.layer, head: state.focus.head, matrix: map.matrix, subspace: map.subspace});
}
