// The table under the map: sorted, filtered, downloaded.

const COLUMNS = [
  ["relative", "relative"],
  ["ci_low", "95 % from"],
  ["ci_high", "to"],
  ["isotropic_z", "z"],
  ["isotropic_q", "q"],
  ...others.map((n) => ["null:" + n.key, "excess over " + n.over]),
  ["rounding_share", "rounding"],
  ["delta_relative_norm", "‖ΔW‖/‖W‖"],
  ["tokens_routed", "tokens routed"],
  ["routing_weight", "routing weight"],
];
const shownValue = (row, column) =>
  column.startsWith("null:")
    ? held(row.map, column.slice(5), "excess", row.layer, row.head, state.rank)
    : at(row.map, column, row.layer, row.head, state.rank);

function tableRows() {
  const hits = understand(state.search),
    all = $("choose-rows").value === "all",
    rows = [];
  for (const map of all ? maps : [maps[state.map]]) {
    for (let layer = 0; layer < data.layers; layer += 1) {
      for (let head = 0; head < map.count; head += 1) {
        if (
          Number.isNaN(at(map, "rounding_share", layer, head, state.rank)) &&
          Number.isNaN(at(map, "delta_norm", layer, head, state.rank))
        ) {
          continue;
        } // no such row
        if (!hits.test(map, layer, head, state.rank)) {
          continue;
        }
        if ($("only-q").checked && !(at(map, "isotropic_q", layer, head, state.rank) <= SIGNIFICANT)) {
          continue;
        }
        if ($("no-rounding").checked && at(map, "rounding_share", layer, head, state.rank) >= ROUNDING_DOMINATED) {
          continue;
        }
        rows.push({map, layer, head});
      }
    }
  }
  if (state.sort !== null) {
    const key = (row) => shownValue(row, COLUMNS[state.sort][0]);
    const sign = state.down ? -1 : 1;
    rows.sort((a, b) => {
      const x = key(a),
        y = key(b);
      return Number.isNaN(x) ? (Number.isNaN(y) ? 0 : 1) : Number.isNaN(y) ? -1 : sign * (x - y);
    });
  }
  return rows;
}

function drawTable() {
  const rows = tableRows();
  const columns = COLUMNS.filter(([name]) =>
    name.startsWith("null:")
      ? name.slice(5) in VALUES
      : maps.some((m) => m.columns[name] && m.columns[name].some((v) => !Number.isNaN(v))),
  );
  const unit = maps.some((m) => m.experts) ? "head or expert" : "head";
  const head = [unit, "matrix", "against"].map((name) => element("th", {scope: "col"}, name));
  columns.forEach(([name, label]) => {
    const n = COLUMNS.findIndex((c) => c[0] === name);
    const button = element("button", {type: "button"}, label + (state.sort === n ? (state.down ? " ▼" : " ▲") : ""));
    button.addEventListener("click", () => {
      state.down = state.sort === n ? !state.down : true;
      state.sort = n;
      setAddress();
      drawTable();
      $("rows")
        .querySelector("th[data-n='" + n + "'] button")
        .focus();
    });
    const cell = element(
      "th",
      {scope: "col", "aria-sort": state.sort === n ? (state.down ? "descending" : "ascending") : "none"},
      button,
    );
    cell.dataset.n = n;
    head.push(cell);
  });
  $("rows")
    .querySelector("thead tr")
    .replaceChildren(...head);
  $("rows")
    .querySelector("tbody")
    .replaceChildren(
      ...rows.slice(0, state.rows).map((row) => {
        const button = element("button", {type: "button"}, headName(row.map, row.layer, row.head));
        button.addEventListener("click", async () => {
          await openHead({layer: row.layer, head: row.head, matrix: row.map.matrix, subspace: row.map.subspace});
          focusCard();
        });
        return element(
          "tr",
          {},
          element("td", {}, button),
          element("td", {}, row.map.matrix),
          element("td", {}, row.map.subspace),
          ...columns.map(([name]) => element("td", {}, number(shownValue(row, name)))),
        );
      }),
    );
  $("counted").textContent =
    rows.length +
    " rows at rank " +
    data.ranks[state.rank] +
    (rows.length > state.rows ? ", the first " + state.rows + " shown." : ".");
  $("more").hidden = rows.length <= state.rows;
}

function focusCard() {
  const card = $("cards").lastElementChild;
  if (card) {
    card.scrollIntoView({block: "nearest"});
    card.querySelector("h3").focus({preventScroll: true});
  }
}

// The fewest digits that give the held number back; most are held in single precision.
function shortest(value) {
  if (Math.fround(value) !== value) {
    return String(value);
  }
  let digits = 6;
  while (digits < 9 && Math.fround(+value.toPrecision(digits)) !== value) {
    digits += 1;
  }
  return String(+value.toPrecision(digits));
}

function download() {
  const cell = (value) => {
    if (typeof value !== "string") {
      return Number.isNaN(value) ? "" : shortest(value);
    }
    // A spreadsheet must not take a name for a formula.
    const plain = /^[=+\-@\t\r]/.test(value) ? "'" + value : value;
    return /[",\n\r]/.test(plain) ? '"' + plain.replace(/"/g, '""') + '"' : plain;
  };
  const lines = [data.columns.map(cell).join(",")];
  for (const {map, layer, head} of tableRows()) {
    const keys = {
      layer,
      head: map.heads === null || map.experts ? NaN : head,
      matrix: map.matrix,
      subspace: map.subspace,
      rank: data.ranks[state.rank],
      pathway: map.pathway,
    };
    lines.push(data.columns.map((c) => cell(c in keys ? keys[c] : at(map, c, layer, head, state.rank))).join(","));
  }
  saveAs(new Blob([lines.join("\n") + "\n"], {type: "text/csv"}), "heads.csv");
}
