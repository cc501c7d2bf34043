// What the reader has chosen and opened, and the address that names it.

const FIRST_MAP = maps.indexOf(mapOf(maps[0].matrix, data.usual[maps[0].matrix]));

const state = {
  map: 0,
  value: "relative",
  rank: data.ranks.indexOf(data.shown),
  search: "",
  focus: {layer: 0, head: 0},
  open: [], // {layer, head, matrix, subspace, pinned}: pinned ones first, the current one last
  sort: null,
  down: true,
  scroll: [0, 0], // of the page, and of the open heads where they stand beside the map
  rows: FIRST_ROWS,
};

// Whether a layer has the matrix in one piece: no heads, or in a mixture's map no experts.
const isWhole = (map, layer) => map.heads === null || map.whole.includes(layer);

function headName(map, layer, head) {
  if (isWhole(map, layer)) {
    return "L" + layer;
  }
  if (!map.kv) {
    return "L" + layer + (map.experts ? "E" : "H") + head;
  }
  const first = head * map.group;
  return (
    "L" +
    layer +
    " KV head " +
    head +
    (map.group > 1 ? " (query heads " + first + "–" + (first + map.group - 1) + ")" : "")
  );
}

function address(item) {
  const map = mapOf(item.matrix, item.subspace);
  const name =
    "L" + item.layer + (isWhole(map, item.layer) ? "" : (map.experts ? "E" : "H") + item.head) + "/" + item.matrix;
  return (
    encodeURIComponent(name).replace(/%2F/g, "/") +
    (item.subspace === data.usual[item.matrix] ? "" : "/" + encodeURIComponent(item.subspace))
  );
}

// "L7H3/W_Q", "L7H3/W_Q/prediction", "L7E12/W_in" or "L7/W_in"; several joined by "+"; then what is not as at first (`choices`).
function parse(hash) {
  const found = [];
  for (const part of hash.replace(/^#/, "").split(";")[0].split("+").filter(Boolean)) {
    let pieces;
    try {
      pieces = part.split("/").map(decodeURIComponent);
    } catch (error) {
      continue;
    }
    const name = /^L(\d+)(?:[HE](\d+))?$/.exec(pieces[0]);
    const matrix = pieces[1];
    const map = name && mapOf(matrix, pieces[2] || data.usual[matrix]);
    if (!map || isWhole(map, +name[1]) !== (name[2] === undefined)) {
      continue;
    }
    const item = {layer: +name[1], head: +(name[2] || 0), matrix, subspace: map.subspace, pinned: true};
    if (item.layer < data.layers && item.head < map.count) {
      found.push(item);
    }
  }
  if (found.length) {
    found[found.length - 1].pinned = false;
  }
  return found;
}

// What restricts the table, by the name it has in the address.
const ONLY = {q: "only-q", rounding: "no-rounding"};

// ";map=W_K/prediction;value=verdict;rank=16;search=q<0.05;rows=all;sort=-relative;only=q;scroll=300,0": what the reader
// has chosen and where they were, each only where it is not as at first.
function choices() {
  const map = maps[state.map],
    last = state.open[state.open.length - 1],
    first = last ? mapOf(last.matrix, last.subspace) : maps[FIRST_MAP];
  return Object.entries({
    map: map === first ? "" : map.matrix + "/" + map.subspace,
    value: state.value === "relative" ? "" : state.value,
    rank: data.ranks[state.rank] === data.shown ? "" : String(data.ranks[state.rank]),
    search: state.search,
    rows: $("choose-rows").value === "map" ? "" : $("choose-rows").value,
    sort: state.sort === null ? "" : (state.down ? "-" : "") + COLUMNS[state.sort][0],
    only: Object.keys(ONLY)
      .filter((name) => $(ONLY[name]).checked)
      .join(","),
    scroll: state.scroll.some(Boolean) ? state.scroll.join(",") : "",
  })
    .filter(([, chosen]) => chosen)
    .map(([name, chosen]) => ";" + name + "=" + encodeURIComponent(chosen))
    .join("");
}

// The choices that an address names and this page has.
function chosen(hash) {
  const found = {};
  for (const part of hash.split(";").slice(1)) {
    const [name, value] = part.split("=");
    try {
      found[name] = decodeURIComponent(value || "");
    } catch (error) {
      continue;
    }
  }
  const [matrix, ...space] = (found.map || "").split("/");
  return {
    map: maps.indexOf(mapOf(matrix, space.join("/"))),
    value: found.value in VALUES ? found.value : "relative",
    rank: data.ranks.indexOf(+found.rank || data.shown),
    search: found.search || "",
    rows: found.rows === "all" ? "all" : "map",
    sort: COLUMNS.findIndex(([name]) => name === (found.sort || "").replace(/^-/, "")),
    down: /^-/.test(found.sort || "-"),
    only: (found.only || "").split(","),
    scroll: [0, 1].map((i) => Math.max(0, Math.round(+(found.scroll || "").split(",")[i]) || 0)),
  };
}

function setAddress() {
  const hash = "#" + state.open.map(address).join("+") + choices();
  if (hash !== location.hash && (hash.length > 1 || location.hash)) {
    history.replaceState(null, "", hash);
  }
}

const same = (a, b) => a.layer === b.layer && a.head === b.head && a.matrix === b.matrix && a.subspace === b.subspace;

async function openHead(item) {
  if (state.open.some((o) => same(o, item))) {
    return say(title(item) + " is open already.");
  }
  state.open = state.open.filter((o) => o.pinned).concat([{...item, pinned: false}]);
  say(title(item) + " opened.");
  await reopened();
}

const title = (item) => headName(mapOf(item.matrix, item.subspace), item.layer, item.head) + " · " + item.matrix;
function say(words) {
  $("said").textContent = words;
}
