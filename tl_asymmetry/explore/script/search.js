// Search: names and conditions, all of which must hold.

const SHORT = {
  q: "isotropic_q",
  z: "isotropic_z",
  p: "isotropic_p",
  rounding: "rounding_share",
  norm: "delta_relative_norm",
};
const TESTS = {
  "<": (a, b) => a < b,
  ">": (a, b) => a > b,
  "<=": (a, b) => a <= b,
  ">=": (a, b) => a >= b,
  "=": (a, b) => a === b,
};

// A test of (map, layer, head, rank) for each word, the words as they were understood, and those nobody understood.
// Spaces around a sign mean nothing: "q < 0.05" is "q<0.05".
function understand(text) {
  const tests = [],
    understood = [],
    unknown = [];
  for (const word of text.trim().replaceAll("≤", "<=").replaceAll("≥", ">=").replace(/\s*(<=|>=|<|>|=)\s*/g, "$1").split(/\s+/).filter(Boolean)) {
    const before = tests.length;
    const condition = /^([A-Za-z_]\w*)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/i.exec(word);
    const name = /^(?:L(\d+))?(?:[HE](\d+))?$/i.exec(word);
    const matrix = maps.find((m) => m.matrix.toLowerCase() === word.toLowerCase());
    const column = condition && (SHORT[condition[1]] || condition[1]);
    const null_ = condition && others.find((n) => column === n.key || column === n.key + "_q");
    if (condition && ["layer", "head", "rank"].includes(column)) {
      tests.push((m, l, h, r) =>
        TESTS[condition[2]]({layer: l, head: m.heads === null ? NaN : h, rank: data.ranks[r]}[column], +condition[3]),
      );
    } else if (condition && maps[0].columns[column] && !maps[0].columns[column].words) {
      tests.push((m, l, h, r) => TESTS[condition[2]](at(m, column, l, h, r), +condition[3]));
    } else if (null_) {
      const name = column === null_.key ? "excess" : "q";
      tests.push((m, l, h, r) => TESTS[condition[2]](held(m, null_.key, name, l, h, r), +condition[3]));
    } else if (name && (name[1] || name[2])) {
      tests.push(
        (m, l, h) =>
          (name[1] === undefined || +name[1] === l) && (name[2] === undefined || (m.heads !== null && +name[2] === h)),
      );
    } else if (matrix) {
      tests.push((m) => m.matrix === matrix.matrix);
    } else {
      unknown.push(word);
    }
    if (tests.length > before) {
      const subject = null_ && column === null_.key ? VALUES[null_.key].label : column;
      understood.push(condition ? [subject, ...condition.slice(2)].join(" ") : matrix ? matrix.matrix : word.toUpperCase());
    }
  }
  return {test: (m, l, h, r) => tests.every((t) => t(m, l, h, r)), understood, unknown};
}
