// The words of a card: leading directions, and the rows of attached analyses.

function directionBlocks(item) {
  if (data.directions.missing) {
    return [element("p", {className: "rows"}, data.directions.missing)];
  }
  const held = data.directions.matrices[item.matrix],
    map = mapOf(item.matrix, item.subspace);
  const head = item.layer * map.count + item.head;
  const verb = map.pathway === "read" ? "excited most by" : "written most after";
  if (!held) {
    if (map.latent) {
      return [element("p", {className: "rows"}, "None: they are directions of a latent, which no token has.")];
    }
    const one = address(item).split("/")[0] + "." + item.matrix;
    return [element("p", {className: "rows"}, `Of experts and of matrices that some layers lack they are looked up one by one: directions("${one}").`)];
  }
  if (!(held.energy[head * held.n] >= 0)) {
    return [element("p", {className: "rows"}, "None: the delta is zero.")];
  }
  const blocks = [
    element(
      "p",
      {className: "rows"},
      "Residual directions of the change, + and − the two ways along each: the tokens whose embedding and unembedding lie " +
        "nearest, and the calibration contexts at whose marked token the " +
        (map.pathway === "read" ? "matrix's input reaches" : "change writes") +
        " farthest (in brackets: how far).",
    ),
  ];
  for (let i = 0; i < held.n; i += 1) {
    const block = element(
      "div",
      {className: "direction"},
      element(
        "p",
        {},
        element("b", {}, "Direction " + (i + 1)),
        ": " + number(100 * held.energy[head * held.n + i]) + " % of ‖ΔW‖²",
      ),
    );
    ["+", "−"].forEach((sign, s) => {
      const side = (head * held.n + i) * 2 + s;
      ["embedding", "unembedding"].forEach((kind) => {
        const line = element("p", {}, sign + " " + kind + ": ");
        for (let t = 0; t < held.tokens; t += 1) {
          const token = held[kind][side * held.tokens + t],
            cosine = held[kind + "_cosine"][side * held.tokens + t];
          line.append(
            element(
              "span",
              {className: "token", title: "cosine " + number(cosine)},
              visible(data.directions.tokens[token]),
            ),
            " ",
          );
        }
        block.append(line);
      });
      const texts = element("ul", {className: "contexts"});
      for (let c = 0; c < held.contexts; c += 1) {
        const value = held.projection[side * held.contexts + c];
        const [before, token, after] = data.directions.contexts[held.context[side * held.contexts + c]];
        const [, space, word] = token.trim() ? /^( *)(.*)$/s.exec(token) : ["", "", visible(token)];
        texts.append(
          element(
            "li",
            {},
            element("span", {className: "context"}, before + space, element("mark", {}, word), after),
            " (" + number(value, 2) + ")",
          ),
        );
      }
      block.append(element("p", {}, sign + " " + verb + ":"), texts);
    });
    blocks.push(block);
  }
  return blocks;
}

const visible = (token) => token.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";

// What reads a cell of an attached table, a word or a number.
function cellOf(table) {
  return (name, i) => {
    const held = table.columns[name];
    return held.words ? held.words[held.at[i]] : held[i];
  };
}

// The rows of an attached table that belong to an open head.
function rowsOf(table, item) {
  const map = mapOf(item.matrix, item.subspace),
    value = cellOf(table);
  return Array.from({length: table.rows}, (_, i) => i).filter((i) => {
    const head = value("head", i);
    return (
      value("matrix", i) === item.matrix &&
      value("layer", i) === item.layer &&
      (map.heads === null ? Number.isNaN(head) : head === item.head)
    );
  });
}

function attachedBlock(table, item, node) {
  const rows = rowsOf(table, item),
    value = cellOf(table);
  node.append(element("h4", {}, table.name));
  if (!rows.length) {
    node.append(element("p", {className: "rows"}, "No rows for this head and matrix."));
    return null;
  }
  const columns = Object.keys(table.columns).filter((c) => !["layer", "head", "matrix"].includes(c));
  const chart = "step" in table.columns && "relative" in table.columns ? element("div", {className: "chart"}) : null;
  if (chart) {
    node.append(chart);
  }
  const shown = rows.slice(0, 60);
  if (rows.length === 1 && !chart) {
    const list = element("dl", {className: "facts"});
    for (const column of columns) {
      const v = value(column, rows[0]);
      list.append(element("dt", {}, column), element("dd", {}, typeof v === "number" ? number(v, 4) : v));
    }
    node.append(list);
    return null;
  }
  const head = element("tr", {}, ...columns.map((c) => element("th", {scope: "col"}, c)));
  const body = shown.map((i) =>
    element(
      "tr",
      {},
      ...columns.map((c) => {
        const v = value(c, i);
        return element("td", {}, typeof v === "number" ? number(v, 4) : v);
      }),
    ),
  );
  if (rows.length > shown.length || table.note) {
    node.append(
      element(
        "p",
        {className: "rows"},
        table.note + (rows.length > shown.length ? " First " + shown.length + " of " + rows.length + " rows." : ""),
      ),
    );
  }
  node.append(
    element(
      "div",
      {className: "scroll", tabIndex: 0, role: "region", "aria-label": table.name + " of " + title(item)},
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)),
    ),
  );
  if (!chart) {
    return null;
  }
  return () => {
    const series = {};
    rows.forEach((i) => {
      if ("rank" in table.columns && value("rank", i) !== data.ranks[state.rank]) {
        return;
      }
      // Whatever else tells rows apart (subspace, which delta) makes lines of its own.
      const key =
        columns
          .filter((c) => table.columns[c].words)
          .map((c) => (c === "reference" && SINCE[value(c, i)]) || value(c, i))
          .join(", ") || "relative";
      (series[key] = series[key] || []).push([value("step", i), value("relative", i)]);
    });
    const dashes = ["solid", "dash", "dot", "dashdot"];
    const traces = Object.entries(series).map(([name, pairs], n) => {
      pairs.sort((a, b) => a[0] - b[0]);
      return {
        x: pairs.map((p) => p[0]),
        y: pairs.map((p) => p[1]),
        mode: "lines+markers",
        line: {dash: dashes[n % 4]},
        name: escaped(name),
      };
    });
    if (!traces.length) {
      chart.textContent = "No rows at this rank.";
      return;
    }
    const range = around(traces.flatMap((t) => t.y));
    plot(chart, traces, {
      xaxis: {title: {text: "step"}},
      yaxis: {title: {text: "relative"}, type: "log", range, ...octaves(range)},
      shapes: [CHANCE],
    });
  };
}

const SINCE = {first: "since the first checkpoint", previous: "since the previous checkpoint"};

// plotly reads a subset of HTML and templates in names.
const escaped = (text) =>
  text
    .replace(/&/g, "&amp;")
    .replace(/</g, "&lt;")
    .replace(/>/g, "&gt;")
    .replace(/\$/g, "&#36;")
    .replace(/%\{/g, "%\u200b{");
