// Requests to the server that sent this page; there is no other.

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export class Unreachable extends Error {}

async function ask(path, options) {
  let reply;
  try {
    reply = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Unreachable("the server does not answer; start hmg-gpu review again and open the address that it prints");
  }
  if (reply.ok) return reply;
  const text = await reply.text();
  let why = text;
  try {
    why = JSON.parse(text).error;
  } catch {
    // not one of ours
  }
  throw new Refused(reply.status, why);
}

export async function get(path) {
  return (await ask(path)).json();
}

export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).json();
}

const TYPES = { uint8: Uint8Array, uint16: Uint16Array, float32: Float32Array };

// {row, height, width, type, values}: the image in its own intensities, row by row.
export async function getPixels(row) {
  const reply = await ask(`/api/images/${row}/pixels`);
  const [height, width] = ["X-Height", "X-Width"].map((name) => Number(reply.headers.get(name)));
  const type = reply.headers.get("X-Type");
  return { row, height, width, type, values: new TYPES[type](await reply.arrayBuffer()) };
}

// The images used last, up to so many bytes.
export class PixelCache {
  constructor(limit = 2 ** 28) {
    this.limit = limit;
    this.kept = new Map();
  }

  get(row) {
    const known = this.kept.get(row) ?? getPixels(row);
    this.kept.delete(row);
    this.kept.set(row, known);
    known.then(() => this.shrink(), () => this.kept.delete(row));
    return known;
  }

  async shrink() {
    let bytes = 0;
    for (const [row, promise] of [...this.kept].reverse()) {
      const size = (await promise.catch(() => null))?.values.byteLength ?? 0;
      if (bytes && bytes + size > this.limit) this.kept.delete(row);
      else bytes += size;
    }
  }
}
