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

// A test of (map, layer, head, rank) for each word, and the words nobody understood.
function understand(text) {
  const tests = [],
    unknown = [];
  for (const word of text.trim().split(/\s+/).filter(Boolean)) {
    const condition = /^([A-Za-z_]\w*)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/i.exec(word);
    const name = /^(?:L(\d+))?(?:H(\d+))?$/i.exec(word);
    const matrix = maps.find((m) => m.matrix.toLowerCase() === word.toLowerCase());
    const column = condition && (SHORT[condition[1]] || condition[1]);
    if (condition && ["layer", "head", "rank"].includes(column)) {
      tests.push((m, l, h, r) =>
        TESTS[condition[2]]({layer: l, head: m.heads === null ? NaN : h, rank: data.ranks[r]}[column], +condition[3]),
      );
    } else if (condition && maps[0].columns[column] && !maps[0].columns[column].words) {
      tests.push((m, l, h, r) => TESTS[condition[2]](at(m, column, l, h, r), +condition[3]));
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
  }
  return {test: (m, l, h, r) => tests.every((t) => t(m, l, h, r)), unknown};
}
