// Numbers as saefast/latents/numbers.py writes them, and how scripts talk to the server.

/** 12345 -> 12,345 */
export function count(value) {
  return Math.trunc(value).toLocaleString("en-US");
}

/** Three digits, more before the point where it has them. */
export function act(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 0.001 || size >= 1e7)) return value.toExponential(1).replace(/e([+-])(\d)$/, "e$10$2");
  const places = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 || !size ? 2 : 3;
  return value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
}

/** A share of 1 in percent, in two digits. */
export function share(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const percent = 100 * value, size = Math.abs(percent);
  if (size === 0 || size >= 99.95) return `${percent.toFixed(0)} %`;
  if (size < 0.0001) return `${percent.toExponential(0).replace(/e([+-])(\d)$/, "e$10$2")} %`;
  const places = size >= 10 ? 0 : size >= 1 ? 1 : 1 - Math.floor(Math.log10(size));
  return `${percent.toFixed(places)} %`;
}

/** Class of a token's shade: s1 to s20, s0 for nothing. */
export function shade(value, most) {
  if (!(value > 0 && most > 0)) return "s0";
  return `s${Math.min(Math.max(Math.ceil((20 * value) / most), 1), 20)}`;
}

/** A colour of base.css by its name, as a canvas takes it: colour("--shade"). */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** JSON from the server; an Error with the server's words where there is none. */
export async function ask(address, options = {}) {
  const answer = await fetch(address, {
    credentials: "same-origin",
    ...options,
    headers: { Accept: "application/json", ...options.headers },
  });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error || `The server answered ${answer.status}.`);
  return body;
}

/** Posts fields as a form; key: the page's form key. */
export function post(address, fields, key) {
  return ask(address, { method: "POST", body: new URLSearchParams(fields), headers: { "X-Saefast-Key": key } });
}
