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
const FOUND = `q ≤ ${SIGNIFICANT}`;
const FIRST_ROWS = 200;

async function read(element) {
  const buffer = await unpacked(element).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const arrays = [];
  let from = 4 + length;
  const kinds = {f4: Float32Array, f8: Float64Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array};
  const {arrays: layout, ...header} = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  for (const {kind, length: count} of layout) {
    const numbers = new kinds[kind](count);
    together(new Uint8Array(buffer, from, numbers.byteLength), numbers);
    arrays.push(numbers);
    from += numbers.byteLength;
  }
  return inPlace(header, arrays);
}

// All first bytes of an array come before all second ones.
function together(bytes, numbers) {
  const size = numbers.BYTES_PER_ELEMENT,
    out = new Uint8Array(numbers.buffer);
  for (let b = 0, i = 0; b < size; b += 1) {
    for (let at = b; at < out.length; at += size, i += 1) {
      out[at] = bytes[i];
    }
  }
}

// The header with its arrays where a number stands for one.
function inPlace(value, arrays) {
  if (Array.isArray(value)) {
    return value.map((v) => inPlace(v, arrays));
  }
  if (value === null || typeof value !== "object") {
    return value;
  }
  if (!Number.isInteger(value.array)) {
    return Object.fromEntries(Object.entries(value).map(([name, v]) => [name, inPlace(v, arrays)]));
  }
  const held = arrays[value.array];
  return value.words ? {words: value.words, at: held} : value.first ? printed(held, value) : held;
}

// Numbers of few decimal digits from their places: NaN, 0, the positive ones by size, the negative ones. `first` is the
// least of so many digits, `power` the power of ten of the smallest number's last one.
function printed(places, {first, power, positive}) {
  return Float64Array.from(places, (place) => {
    if (place < 2) {
      return place ? 0 : NaN;
    }
    const i = (place - 2) % positive,
      size = (first + (i % (9 * first))) * 10 ** (power + Math.floor(i / (9 * first)));
    return place < 2 + positive ? size : -size;
  });
}

// What only the cards of open heads show is read when the first one opens.
let reading;
const readCards = () => (reading ||= read($("explorer-cards")).then((found) => Object.assign(data, found)));

const maps = data.maps.map((m, i) => ({...m, i, count: m.heads === null ? 1 : m.heads}));
const mapOf = (matrix, subspace) => maps.find((m) => m.matrix === matrix && m.subspace === subspace);

// A column of a map at (layer, head, rank); head counts from 0, also for a matrix without heads.
function at(map, column, layer, head, rank) {
  const held = map.columns[column];
  if (!held) {
    return NaN;
  }
  const where = (rank * data.layers + layer) * map.count + head;
  return held.words ? held.words[held.at[where]] : held[where];
}

const inRelative = (map, fraction, rank) => (fraction * map.d) / data.ranks[rank];

// A number of a null (relation; but of the isotropic one, expected over chance, excess, low, high, p, q) of a map's head;
// NaN where it does not apply.
function held(map, key, name, layer, head, rank) {
  const null_ = map.nulls[key];
  return null_ ? null_[name][(rank * data.layers + layer) * map.count + head] : NaN;
}

const ISOTROPIC = "isotropic";
const chance = data.nulls.find((n) => n.key === ISOTROPIC);
const others = data.nulls.filter((n) => n.key !== ISOTROPIC);
const codes = Object.fromEntries(data.verdicts.map((v, i) => [v.verdict, i]));

// What a map can show; `null` is the null whose test its dots mean.
const VALUES = {
  relative: {
    label: "relative fraction over " + chance.over,
    ratio: true,
    meaning: chance.meaning,
    null: ISOTROPIC,
    of: (m, l, h, r) => at(m, "relative", l, h, r),
  },
};
for (const n of others) {
  VALUES[n.key] = {
    label: "excess over " + n.over,
    ratio: true,
    meaning: n.meaning + " For " + n.applies + ".",
    null: n.key,
    of: (m, l, h, r) => held(m, n.key, "excess", l, h, r),
  };
}
Object.assign(VALUES, {
  verdict: {
    label: "verdict",
    verdict: true,
    meaning: "What the tests of both nulls say together.",
    of: (m, l, h, r) => {
      const code = codes[at(m, "verdict", l, h, r)];
      return code === undefined ? NaN : code;
    },
  },
  unrounded: {
    label: "relative fraction over " + chance.over + ", rounding removed",
    ratio: true,
    meaning: chance.meaning,
    null: ISOTROPIC,
    of: (m, l, h, r) => inRelative(m, at(m, "fraction_unrounded", l, h, r), r),
  },
  z: {
    label: "isotropic z",
    meaning: "0 = chance: standard deviations of a random subspace from its mean.",
    null: ISOTROPIC,
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
});
for (const name of Object.keys(VALUES)) {
  // offer only what some map has
  const there = maps.some((m) => {
    for (let l = 0; l < data.layers; l += 1) {
      for (let h = 0; h < m.count; h += 1) {
        if (data.ranks.some((_, r) => !Number.isNaN(VALUES[name].of(m, l, h, r)))) {
          return true;
        }
      }
    }
    return false;
  });
  if (!there && name !== "relative") {
    delete VALUES[name];
  }
}
