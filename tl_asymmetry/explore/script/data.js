// The packed data of the page, and the values a map can show.

const $ = (id) => document.getElementById(id);
const settings = JSON.parse($("page-settings").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const data = await read($("explorer-data"));
const {
  significant: SIGNIFICANT,
  small_eigengap: SMALL_EIGENGAP,
  rounding_flagged: ROUNDING_FLAGGED,
  rounding_dominated: ROUNDING_DOMINATED,
} = settings.thresholds;
const FIRST_ROWS = 200;

async function read(element) {
  const buffer = await unpacked(element).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const kinds = {f4: Float32Array, f8: Float64Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array};
  const arrays = header.arrays.map((a) => new kinds[a.kind](buffer, 4 + length + a.at, a.length));
  return JSON.parse(JSON.stringify(header), (key, value) =>
    value && typeof value === "object" && "array" in value
      ? value.words
        ? {words: value.words, at: arrays[value.array]}
        : arrays[value.array]
      : value,
  );
}

const maps = data.maps.map((m, i) => ({...m, i, count: m.heads === null ? 1 : m.heads}));
const mapOf = (matrix, subspace) => maps.find((m) => m.matrix === matrix && m.subspace === subspace);

// A column of a map at (layer, head, rank); head counts from 0, also for a matrix without heads.
function at(map, column, layer, head, rank) {
  const held = map.columns[column];
  if (!held) {
    return NaN;
  }
  const where = (layer * map.count + head) * data.ranks.length + rank;
  return held.words ? held.words[held.at[where]] : held[where];
}

const inRelative = (fraction, rank) => (fraction * data.d) / data.ranks[rank];

const VALUES = {
  relative: {
    label: "relative fraction over the isotropic null",
    ratio: true,
    meaning: "1 = chance: what a random subspace of the same rank holds.",
    of: (m, l, h, r) => at(m, "relative", l, h, r),
  },
  excess: {
    label: "excess over the activation-matched reference",
    ratio: true,
    meaning: "1 = what a plain sum of gradients on these inputs would hold. Write matrices have no such reference.",
    of: (m, l, h, r) => at(m, "excess", l, h, r),
  },
  gradient_excess: {
    label: "excess over the gradient-matched reference",
    ratio: true,
    meaning: "1 = what the named objective's gradients would hold.",
    of: (m, l, h, r) => at(m, "gradient_excess", l, h, r),
  },
  unrounded: {
    label: "relative fraction over the isotropic null, rounding removed",
    ratio: true,
    meaning: "1 = chance: what a random subspace of the same rank holds.",
    of: (m, l, h, r) => inRelative(at(m, "fraction_unrounded", l, h, r), r),
  },
  z: {
    label: "isotropic z",
    meaning: "0 = chance: standard deviations of a random subspace from its mean.",
    of: (m, l, h, r) => at(m, "isotropic_z", l, h, r),
  },
  delta_relative_norm: {
    label: "size of the change, ‖ΔW‖/‖W‖",
    amount: true,
    meaning: "0 = unchanged.",
    of: (m, l, h, r) => at(m, "delta_relative_norm", l, h, r),
  },
  rounding_share: {
    label: "rounding share",
    amount: true,
    meaning: "Share of ‖ΔW‖² that storing the weights explains by itself.",
    of: (m, l, h, r) => at(m, "rounding_share", l, h, r),
  },
};
for (const name of Object.keys(VALUES)) {
  // offer only what some map has
  const column = {unrounded: "fraction_unrounded", z: "isotropic_z"}[name] || name;
  const there = maps.some((m) => m.columns[column] && m.columns[column].some((v) => !Number.isNaN(v)));
  if (!there && name !== "relative") {
    delete VALUES[name];
  }
}
