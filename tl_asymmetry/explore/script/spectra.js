// Where a head's change lies in the base weight's own singular frame: `analyze_spectra`, if it was given.

function frameBlock(table, item, node) {
  const rows = rowsOf(table, item),
    value = cellOf(table);
  node.append(element("h4", {}, "In the base weight's own directions"));
  if (!rows.length) {
    node.append(element("p", {className: "rows"}, "No rows for this head and matrix."));
    return null;
  }
  const beside = (name, i, digits) => number(value(name, i), digits) + " (" + number(value(name + "_expected", i), digits) + ")";
  const shown = [
    ["k", (i) => value("rank", i)],
    ["share", (i) => number(value("on_principal", i))],
    ["over chance", (i) => number(value("on_principal_relative", i))],
    ["q", (i) => number(value("on_principal_q", i), 2)],
    ["coupling", (i) => number(value("coupling", i))],
    ["intruders (chance)", (i) => beside("intruders", i, 2)],
    ["rotation left (chance)", (i) => beside("rotation_left", i, 2)],
    ["right (chance)", (i) => beside("rotation_right", i, 2)],
  ];
  const head = element("tr", {}, ...shown.map(([name]) => element("th", {scope: "col"}, name)));
  const body = rows.map((i) => element("tr", {}, ...shown.map(([, cell]) => element("td", {}, String(cell(i))))));
  const chart = element("div", {className: "chart"});
  node.append(
    element(
      "p",
      {className: "rows"},
      "Share of ‖ΔW‖² between the base's k leading left and right singular vectors, over the k²/(mn) of a change that has " +
        "nothing to do with W (dashed).",
    ),
    chart,
    element(
      "div",
      {className: "scroll", tabIndex: 0, role: "region", "aria-label": "Own directions of " + title(item)},
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)),
    ),
  );
  return () => {
    const points = rows.filter((i) => value("on_principal_relative", i) > 0);
    if (!points.length) {
      chart.textContent = "No value: the delta is zero, so its shares are undefined.";
      chart.style.minHeight = 0;
      return;
    }
    const [blue] = theme().template.layout.colorway,
      k = points.map((i) => value("rank", i)),
      y = points.map((i) => value("on_principal_relative", i)),
      q = points.map((i) => value("on_principal_q", i)),
      range = around(y);
    plot(
      chart,
      [
        {
          x: k,
          y,
          mode: "lines+markers",
          line: {color: blue, width: 1.5},
          marker: {
            size: 9,
            color: blue,
            symbol: q.map((v) => (v <= SIGNIFICANT ? "circle" : "circle-open")),
            line: {color: blue, width: 1.5},
          },
          name: `filled: above chance, ${FOUND}`,
          customdata: q.map((v) => number(v, 2)),
          hovertemplate: "<b>%{y:.3g} times chance</b> at k = %{x}<br>q %{customdata}<extra></extra>",
        },
      ],
      {
        xaxis: {type: "log", title: {text: "rank k"}, tickvals: k, ticktext: k.map(String)},
        yaxis: {type: "log", title: {text: "share over chance"}, range, ...octaves(range)},
        shapes: [CHANCE],
      },
    );
  };
}
