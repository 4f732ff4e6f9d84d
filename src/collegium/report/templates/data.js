// Reading what pack.py wrote: columns in one compressed block.

const ARRAYS = { Uint8Array, Uint16Array, Uint32Array, Int8Array, Int32Array, Float32Array };

/** The columns in the script element `id`: name -> {values: typed array, words: list or undefined}. */
async function readBlock(id) {
  const text = document.getElementById(id).textContent.trim();
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const block = await new Response(stream).arrayBuffer();
  const size = new DataView(block).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(block, 4, size)));
  const columns = {};
  for (const [name, entry] of Object.entries(header)) {
    const values = new ARRAYS[entry.type](block, 4 + size + entry.offset, entry.length);
    columns[name] = { values, words: entry.words };
  }
  return columns;
}

/** One value of a column; null for what is not a number. */
function valueAt(column, row) {
  const value = column.values[row];
  if (column.words) return column.words[value];
  return Number.isNaN(value) ? null : value;
}

/** Let the browser save `blob` as a file. */
function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** An element with properties and children; words become text, never markup. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
