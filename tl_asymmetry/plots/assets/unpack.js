// What every page begins with: packed script elements (gzip in base64) are read; plotly.js, packed too, starts when asked.

function unpacked(element) {
  const binary = atob(element.textContent);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) {
    bytes[i] = binary.charCodeAt(i);
  }
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}

// Starts plotly.js, once, and resolves when `Plotly` is there; pages without figures carry none.
let starting;
const plotly = () =>
  (starting ||= (async () => {
    const packed = document.getElementById("plotly-code");
    if (packed) {
      const script = document.createElement("script");
      script.textContent = await unpacked(packed).text();
      document.head.append(script);
    }
  })());

function saveAs(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
