// What happens when: controls, keys, address, theme.

async function refresh() {
  setAddress();
  drawMap();
  drawTable();
  await drawCards();
}

// After a change of what is open alone: what the map and the table say is as before.
async function reopened(selector, n) {
  setAddress();
  markOpen();
  await drawCards();
  const node =
    selector && $("cards").children[n] && $("cards").children[n].querySelector(selector.replace(".card ", ""));
  if (node) {
    node.focus();
  }
}

async function follow() {
  const items = parse(location.hash),
    named = location.hash.replace(/^#/, "").split(";")[0];
  if (named && !items.length) {
    say("The address names no head of this page: " + location.hash);
    return;
  }
  const {map, rank, rows, sort, only, scroll, ...plain} = chosen(location.hash);
  const last = items[items.length - 1];
  Object.assign(state, {...plain, open: items, rank: rank < 0 ? state.rank : rank, sort: sort < 0 ? null : sort, scroll});
  if (last) {
    state.focus = {layer: last.layer, head: last.head};
  }
  state.map = map >= 0 ? map : last ? maps.indexOf(mapOf(last.matrix, last.subspace)) : state.map;
  $("choose-map").value = state.map;
  $("choose-value").value = state.value;
  $("choose-rank").value = state.rank;
  $("search").value = state.search;
  $("choose-rows").value = rows;
  Object.entries(ONLY).forEach(([name, id]) => {
    $(id).checked = only.includes(name);
  });
  tellRank();
  await refresh();
  scrollTo({top: scroll[0], behavior: "instant"});
  $("open").scrollTop = scroll[1];
}

// Where the reader is goes into the address once they rest.
let rested;
function rest() {
  clearTimeout(rested);
  rested = setTimeout(() => {
    state.scroll = [Math.round(scrollY), Math.round($("open").scrollTop)];
    setAddress();
  }, 300);
}

$("facts").textContent = data.facts;
if (data.notes.length) {
  $("notes").hidden = false;
  $("notes").querySelector("summary").textContent = "Notes (" + data.notes.length + ")";
  $("notes")
    .querySelector("ul")
    .append(...data.notes.map((n) => element("li", {}, n)));
}
maps.forEach((m) => $("choose-map").append(new Option(m.matrix + " in " + m.subspace, m.i)));
state.map = FIRST_MAP;
$("choose-map").value = state.map;
Object.entries(VALUES).forEach(([name, v]) => $("choose-value").append(new Option(v.label, name)));
$("choose-rank").max = data.ranks.length - 1;
$("choose-rank").value = state.rank;
const tellRank = () => {
  $("rank-shown").textContent = data.ranks[state.rank];
  $("choose-rank").setAttribute("aria-valuetext", data.ranks[state.rank]);
};
tellRank();

$("choose-map").addEventListener("change", (e) => {
  state.map = +e.target.value;
  state.rows = FIRST_ROWS;
  setAddress();
  drawMap();
  drawTable();
});
$("choose-value").addEventListener("change", (e) => {
  state.value = e.target.value;
  setAddress();
  drawMap();
});
$("choose-rank").addEventListener("input", (e) => {
  state.rank = +e.target.value;
  tellRank();
  refresh();
});
$("search").addEventListener("input", (e) => {
  state.search = e.target.value.trim();
  setAddress();
  drawMap();
  drawTable();
});
["choose-rows", ...Object.values(ONLY)].forEach((id) =>
  $(id).addEventListener("change", () => {
    setAddress();
    drawTable();
  }),
);
$("more").addEventListener("click", () => {
  state.rows += 1000;
  drawTable();
});
$("download").addEventListener("click", download);
$("map").addEventListener("click", (e) => {
  const cell = e.target.closest("td");
  if (cell) {
    openCell(cell);
  }
});
$("map").addEventListener("keydown", (e) => {
  const cell = e.target.closest("td");
  if (!cell) {
    return;
  }
  const steps = {
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
    Home: [0, -Infinity],
    End: [0, Infinity],
  };
  if (e.key === "Enter" || e.key === " ") {
    e.preventDefault();
    openCell(cell);
    return;
  }
  if (!(e.key in steps)) {
    return;
  }
  e.preventDefault();
  const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));
  state.focus = {
    layer: clamp(+cell.dataset.layer + steps[e.key][0], data.layers),
    head: clamp(+cell.dataset.head + steps[e.key][1], maps[state.map].count),
  };
  focusCell();
});
addEventListener("hashchange", follow);
addEventListener("scroll", rest, {passive: true});
$("open").addEventListener("scroll", rest, {passive: true});
dark.addEventListener("change", () => refresh());
let resized;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(drawMap, 150);
});
await follow();
document.documentElement.dataset.ready = "yes";
// What the first card needs, while the reader looks at the map.
(window.requestIdleCallback || setTimeout)(() => {
  readCards();
  plotly();
});
