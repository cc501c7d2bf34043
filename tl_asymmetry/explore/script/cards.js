// The open heads, side by side: numbers and what belongs to them.

async function drawCards() {
  if (state.open.length && !reading) {
    $("cards").textContent = "Reading …";
  }
  if (state.open.length) {
    await readCards();
  }
  const cards = state.open.map(card);
  $("cards").replaceChildren(...cards.map((c) => c.node));
  if (!cards.length) {
    $("cards").textContent = "None yet: choose a head in the map or the table.";
  }
  // One scale for all cards, so that they can be compared.
  const seen = state.open.flatMap((o) => curve(o).seen);
  cards.forEach((c) => c.draw(around(seen)));
}

// The verdict as the map shows it: sign and colour, and the word beside them.
function told(verdict) {
  const known = data.verdicts[codes[verdict]];
  if (!known) {
    return [];
  }
  const sample = element("b", {className: "mark verdict-sample", "aria-hidden": "true"}, known.sign);
  sample.style.backgroundColor = known.color;
  return [element("p", {className: "verdict"}, sample, " " + verdict + " at k = " + data.ranks[state.rank])];
}

function card(item) {
  const map = mapOf(item.matrix, item.subspace);
  const {layer, head} = item,
    r = state.rank,
    id = "card-" + address(item).replace(/\W/g, "-");
  const get = (column) => at(map, column, layer, head, r);
  const pin = element("button", {type: "button", "aria-pressed": String(item.pinned)}, item.pinned ? "Pinned" : "Pin");
  pin.addEventListener("click", () => {
    item.pinned = !item.pinned;
    say(title(item) + (item.pinned ? " pinned." : " no longer pinned."));
    reopened(".card [aria-pressed]", state.open.indexOf(item));
  });
  const close = element("button", {type: "button", "aria-label": "Close " + title(item)}, "Close");
  close.addEventListener("click", () => {
    state.open = state.open.filter((o) => o !== item);
    say(title(item) + " closed.");
    reopened();
    $("map").querySelector("td[tabindex='0']").focus();
  });
  const spaces = element("select", {id: id + "-space"});
  maps
    .filter((m) => m.matrix === item.matrix)
    .forEach((m) => spaces.append(new Option(m.subspace, m.subspace, false, m.subspace === item.subspace)));
  spaces.addEventListener("change", () => {
    const there = {...item, subspace: spaces.value};
    if (!state.open.some((o) => same(o, there))) {
      item.subspace = spaces.value;
    }
    reopened(".card select", state.open.indexOf(item));
  });
  const interval = Number.isNaN(get("ci_low"))
    ? "none" + (item.subspace === "prediction" ? " (weights only)" : "")
    : number(get("ci_low")) + " to " + number(get("ci_high"));
  // What a null says of this head.
  const against = (n) => {
    const of = (name) => held(map, n.key, name, layer, head, r);
    const parts = [];
    if (!Number.isNaN(of("expected"))) {
      parts.push(number(of("expected")));
    }
    if (!Number.isNaN(of("excess")) || !Number.isNaN(of("low"))) {
      parts.push(
        "excess " +
          number(of("excess")) +
          (Number.isNaN(of("low")) ? "" : " (" + number(of("low")) + " to " + number(of("high")) + ")"),
      );
    }
    ["p", "q"].forEach((name) => {
      if (!Number.isNaN(of(name))) {
        parts.push(name + " " + number(of(name), 2));
      }
    });
    return parts.length ? parts.join(", ") : "none: for " + n.applies;
  };
  const gap = get("eigengap"),
    rounding = get("rounding_share");
  const facts = [
    ...(map.latent ? [["reads", "a latent of width " + map.d + ", not the residual stream"]] : []),
    ...(map.experts ? [["routed to it", routed(map, layer, head, r)]] : []),
    [
      "relative at k = " + data.ranks[r],
      number(get("relative")) + " (fraction " + number(get("fraction")) + "; 1 = chance)",
    ],
    ["95 % interval over texts", interval],
    [
      chance.label,
      "z " +
        number(get("isotropic_z")) +
        ", p " +
        number(get("isotropic_p"), 2) +
        ", q " +
        number(get("isotropic_q"), 2) +
        " (" +
        get("p_method") +
        ")",
    ],
    ...others.map((n) => [n.label, against(n)]),
    [
      "rounding share",
      number(rounding) +
        (rounding >= ROUNDING_DOMINATED ? ", mostly storage" : "") +
        "; without it " +
        number(inRelative(map, get("fraction_unrounded"), r)),
    ],
    ["eigengap", number(gap) + (gap < SMALL_EIGENGAP ? ", too small to trust the edge" : "")],
    ["‖ΔW‖/‖W‖", number(get("delta_relative_norm")) + "; effective rank " + number(get("delta_effective_rank"))],
  ];
  const list = element("dl", {className: "facts"});
  facts.forEach(([name, value]) => list.append(element("dt", {}, name), element("dd", {}, value)));
  const curvePlot = element("div", {className: "chart"}),
    spectrumPlot = element("div", {className: "chart"});
  const node = element(
    "article",
    {className: "card", "aria-labelledby": id},
    element("h3", {id, tabIndex: -1}, title(item)),
    ...told(get("verdict")),
    element(
      "div",
      {className: "controls"},
      pin,
      close,
      element("span", {className: "control"}, element("label", {htmlFor: id + "-space"}, "against"), spaces),
    ),
    list,
    element("h4", {}, "Concentration by rank (dashed grey: 1 = chance)"),
    curvePlot,
    element("h4", {}, "Spectrum of the change"),
    element(
      "p",
      {className: "rows"},
      "Share of ‖ΔW‖² along each of the change's own directions. Dashed: where independent entries would end (descriptive).",
    ),
    spectrumPlot,
    element("h4", {}, "Leading directions"),
    ...directionBlocks(item),
  );
  const later = data.attached.map((table) => attachedBlock(table, item, node));
  if (data.frame) {
    later.unshift(frameBlock(data.frame, item, node));
  }
  return {
    node,
    draw(range) {
      drawCurve(curvePlot, item, range);
      drawSpectrum(spectrumPlot, item);
      later.forEach((f) => f && f());
    },
  };
}
