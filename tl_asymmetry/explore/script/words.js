// Words, elements and colours. Every word of a model or user becomes text content, never markup.

const number = (value, digits = 3) => (Number.isFinite(value) ? String(+value.toPrecision(digits)) : "–");
const theme = () => settings[dark.matches ? "dark" : "light"];

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node && !name.includes("-")) {
      node[name] = value;
    } else {
      node.setAttribute(name, value);
    }
  }
  node.append(...children);
  return node;
}

function mix(stops, where) {
  let i = 1;
  while (i < stops.length - 1 && stops[i][0] < where) {
    i += 1;
  }
  const [a, first] = stops[i - 1],
    [b, second] = stops[i];
  const t = (where - a) / (b - a);
  const channel = (c, n) => parseInt(c.slice(1 + 2 * n, 3 + 2 * n), 16);
  return (
    "rgb(" +
    [0, 1, 2].map((n) => Math.round(channel(first, n) + t * (channel(second, n) - channel(first, n)))).join(",") +
    ")"
  );
}

// Where a value lies on the scale, 0 to 1: chance in the middle, an amount in the upper half.
function place(value, kind, limit) {
  if (Number.isNaN(value) || kind.verdict) {
    return value;
  }
  if (kind.amount) {
    return 0.5 + 0.5 * Math.min(1, value / limit);
  }
  const distance = kind.ratio ? (value <= 0 ? -limit : Math.log2(value)) : value;
  return 0.5 + 0.5 * Math.max(-1, Math.min(1, distance / limit));
}

// One limit for all matrices at a value and rank, so that their maps can be compared.
const limits = {};
function limitOf(value, rank) {
  const key = value + "/" + rank;
  if (!(key in limits)) {
    const kind = VALUES[value];
    let most = 0;
    for (const map of maps) {
      for (let l = 0; l < data.layers; l += 1) {
        for (let h = 0; h < map.count; h += 1) {
          const v = kind.of(map, l, h, rank);
          const size = kind.ratio ? (v > 0 ? Math.abs(Math.log2(v)) : 0) : Math.abs(v);
          if (Number.isFinite(size) && size > most) {
            most = size;
          }
        }
      }
    }
    limits[key] = kind.amount ? most || 1 : kind.ratio ? Math.max(1, Math.ceil(most)) : Math.max(2, most);
  }
  return limits[key];
}
