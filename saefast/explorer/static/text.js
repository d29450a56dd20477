// The text view: posts a text, and shows its tokens, their latents, and the whole text shaded by one of them.

import { act, ask, colour, count, post, shade, share } from "./base.js";

const $ = (id) => document.getElementById(id);
const form = $("ask"), words = $("words"), tokens = $("tokens"), rows = $("rows");
// Latents shown of a token, of a row of the table, and of the whole text at a time.
const OF_TOKEN = 10, OF_ROW = 5, OF_TEXT = 30;
const KEPT = "saefast-text";

// What was read; the token and the latent (its place in found.latents, or one that fires nowhere) that are chosen.
let found = null, token = -1, chosen = null, shown = OF_TEXT;

const asked = form.dataset.latent === "" ? null : {
  latent: Number(form.dataset.latent), title: form.dataset.title, label: form.dataset.label,
  most: Number(form.dataset.most), density: Number(form.dataset.density), n: 0, peak: -1,
};

function make(kind, className, text) {
  const element = document.createElement(kind);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const nameOf = (latent) => latent.label || latent.title || `latent ${latent.latent}`;
const valueAt = (entry) => found.acts[entry] / found.latents[found.place[entry]].most;

/* Asking */

function say(text, kind = "") {
  $("said").textContent = text;
  $("said").className = `soft ${kind}`;
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

/** Waits until the model is there. */
async function loaded() {
  for (;;) {
    const { state, why } = await ask("/text/state");
    if (state === "ready") return;
    if (state === "failed") throw new Error(`The model does not load: ${why}. Where it lies elsewhere, saefast explore takes --model, and --data for its harvest; reload this page to try again.`);
    say("Loading the model …", "busy");
    await pause(700);
  }
}

async function read() {
  // One text at a time, however often and in whatever way it is asked for.
  if ($("read").disabled) return;
  const text = words.value;
  if (!text.trim()) {
    say("Type or paste a text first.", "bad");
    words.focus();
    return;
  }
  $("read").disabled = true;
  try {
    sessionStorage.setItem(KEPT, text.slice(0, 200000));
    await loaded();
    say("Reading …", "busy");
    const before = found && chosen ? chosen.latent : asked?.latent;
    found = unpacked(await post("/text/read", { text }, form.dataset.key));
    say("");
    show(before);
  } catch (error) {
    say(error.message, "bad");
  } finally {
    $("read").disabled = false;
  }
}

/** The code by latent as well: of each, the tokens it fires on and the entries there. */
function unpacked(answer) {
  answer.at = answer.latents.map(() => []);
  answer.tokenOf = new Int32Array(answer.place.length);
  answer.texts.forEach((_, i) => {
    for (let entry = answer.row_ptr[i]; entry < answer.row_ptr[i + 1]; entry++) {
      answer.tokenOf[entry] = i;
      answer.at[answer.place[entry]].push(entry);
    }
  });
  answer.latents.forEach((latent, place) => { latent.place = place; });
  return answer;
}

/* Showing */

function show(latent) {
  $("found").hidden = false;
  shown = OF_TEXT;
  token = -1;
  draw();
  drawText();
  drawRows();
  drawNotes();
  choose(latent === undefined || latent === null ? found.latents[0] : byNumber(latent));
  if (chosen && chosen.n) select(chosen.peak);
  else select(found.kept.indexOf(1));
}

function byNumber(latent) {
  return found.latents.find((one) => one.latent === latent) ?? (asked?.latent === latent ? asked : { latent, n: 0 });
}

function draw() {
  const parts = document.createDocumentFragment();
  found.texts.forEach((text, i) => {
    if (i && found.starts.includes(i)) parts.append(make("span", "seam", "the model reads on from here, without what came before"));
    if (!found.kept[i] && !text) {
      parts.append(make("span", "special", found.names[i]));
      return;
    }
    const span = make("span", "", text);
    span.id = `t${i}`;
    span.dataset.token = i;
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    parts.append(span);
  });
  tokens.replaceChildren(parts);
}

function drawNotes() {
  const notes = [];
  if (found.left_out) notes.push(`The text was cut: the first ${count(found.texts.length)} tokens are here, ${count(found.left_out)} more were not read.`);
  if (!found.latents.length) notes.push("No latent fires on this text.");
  $("notes").textContent = notes.join(" ");
}

/** Entries of a token in the order that was asked for. */
function entriesOf(i) {
  const entries = [];
  for (let entry = found.row_ptr[i]; entry < found.row_ptr[i + 1]; entry++) entries.push(entry);
  if ($("order").value === "telling") {
    const told = (entry) => Math.min(valueAt(entry), 1) * found.latents[found.place[entry]].rarity;
    entries.sort((a, b) => told(b) - told(a));
  }
  return entries;
}

function drawRows() {
  if (rows.hidden || !found) return;
  const parts = document.createDocumentFragment();
  found.texts.forEach((text, i) => {
    const row = make("div", "row");
    const name = make("span", found.kept[i] ? "token" : "token out", text.trim() || found.names[i] || text);
    name.dataset.token = i;
    row.append(name);
    const five = make("div", "five");
    for (const entry of entriesOf(i).slice(0, OF_ROW)) {
      const latent = found.latents[found.place[entry]];
      const chip = make("button", shade(found.acts[entry], latent.most), nameOf(latent));
      chip.type = "button";
      chip.dataset.place = latent.place;
      chip.title = `latent ${latent.latent}: ${act(found.acts[entry])}, ${share(valueAt(entry))} of its largest`;
      five.append(chip);
    }
    if (!found.kept[i]) five.append(make("span", "soft", "left out, as in training"));
    row.append(five);
    parts.append(row);
  });
  rows.replaceChildren(parts);
  mark();
}

/** Shades the whole text by a latent. */
function choose(latent) {
  chosen = latent ?? null;
  const acts = new Float64Array(found.texts.length);
  const mine = chosen && chosen.place !== undefined ? found.at[chosen.place] : [];
  for (const entry of mine) acts[found.tokenOf[entry]] = found.acts[entry];
  for (const span of tokens.querySelectorAll("[data-token]")) {
    const value = acts[span.dataset.token];
    span.className = chosen ? shade(value, chosen.most) : "";
    span.classList.toggle("peak", value > 0 && Number(span.dataset.token) === chosen?.peak);
    span.title = value > 0 ? `${act(value)}, ${share(value / chosen.most)} of its largest` : "";
  }
  drawChosen();
  mark();
}

function drawChosen() {
  const line = $("shaded");
  line.replaceChildren();
  if (!chosen) return;
  const link = make("a", "", `latent ${chosen.latent}`);
  link.href = `/latent/${chosen.latent}`;
  line.append("Shaded by ", link);
  if (chosen.title || chosen.label) line.append(": ", make("bdi", "", nameOf(chosen)));
  const fires = chosen.n === 1 ? "fires on 1 token" : `fires on ${count(chosen.n)} tokens`;
  line.append(make("span", "soft", chosen.n ? ` ${fires}` : " fires on no token of this text"));
  const address = new URL(location.href);
  address.searchParams.set("latent", chosen.latent);
  history.replaceState(null, "", address);
}

/** Which buttons stand for the latent that is chosen. */
function mark() {
  for (const button of document.querySelectorAll("[data-place]")) {
    button.setAttribute("aria-pressed", String(chosen !== null && Number(button.dataset.place) === chosen.place));
  }
}

function select(i) {
  if (token >= 0) $(`t${token}`)?.setAttribute("aria-selected", "false");
  token = i;
  const span = i >= 0 ? $(`t${i}`) : null;
  if (span) {
    span.setAttribute("aria-selected", "true");
    span.scrollIntoView({ block: "nearest" });
    tokens.setAttribute("aria-activedescendant", span.id);
  }
  drawToken();
}

function drawToken() {
  const list = $("token-latents"), text = token >= 0 ? found.texts[token] : "";
  $("of-token").textContent = token < 0 ? "A token" : `On “${text.trim() || text || "…"}”`;
  list.replaceChildren(...(token < 0 ? [] : entriesOf(token).slice(0, OF_TOKEN)).map((entry) => {
    const latent = found.latents[found.place[entry]], part = valueAt(entry);
    const level = make("span", "level"), bar = make("i");
    bar.style.width = `${Math.min(100 * part, 100)}%`;
    level.append(bar);
    return line(latent, act(found.acts[entry]), `${share(part)} of its largest`, level);
  }));
  if (token >= 0 && !list.children.length) list.append(make("li", "soft", "No latent fires on this token."));
  mark();
}

function line(latent, value, more, picture) {
  const item = make("li"), pick = make("button", "pick"), name = make("span", "name");
  name.append(make("bdi", "", nameOf(latent)));
  pick.type = "button";
  pick.dataset.place = latent.place;
  pick.dataset.latent = latent.latent;
  pick.append(name, make("span", "value", value), make("span", "id", `latent ${latent.latent}`), make("span", "more-of", more), picture);
  const link = make("a", "", "›");
  link.href = `/latent/${latent.latent}`;
  link.setAttribute("aria-label", `The page of latent ${latent.latent}`);
  item.dataset.walk = "";
  item.append(pick, link);
  return item;
}

const RANKS = {
  telling: (latents) => latents,
  often: (latents) => [...latents].sort((a, b) => b.n - a.n),
  share: (latents) => [...latents].sort((a, b) => b.act / b.most - a.act / a.most),
};

function drawText() {
  const ranked = RANKS[$("rank").value](found.latents);
  const strips = [];
  $("text-latents").replaceChildren(...ranked.slice(0, shown).map((latent) => {
    const canvas = make("canvas");
    strips.push([canvas, latent]);
    const fires = latent.n === 1 ? "1 token" : `${count(latent.n)} tokens`;
    return line(latent, `up to ${act(latent.act)}`, `${share(latent.act / latent.most)} · ${fires}`, canvas);
  }));
  for (const [canvas, latent] of strips) strip(canvas, latent);
  $("more").hidden = shown >= ranked.length;
  $("of-text").textContent = `In the whole text: ${count(ranked.length)}`;
  mark();
}

/** Where in the text a latent fires, from its beginning to its end. */
function strip(canvas, latent) {
  const n = found.texts.length;
  canvas.width = Math.min(Math.max(n * 4, 400), 2048);
  canvas.height = 8;
  const pen = canvas.getContext("2d"), each = canvas.width / n;
  pen.fillStyle = colour("--shade");
  for (const entry of found.at[latent.place]) {
    pen.globalAlpha = Math.min(0.25 + 0.75 * valueAt(entry), 1);
    pen.fillRect(found.tokenOf[entry] * each, 0, Math.max(each - 0.5, 1), 8);
  }
}

/* What people do */

form.addEventListener("submit", (event) => { event.preventDefault(); read(); });
words.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); read(); }
});
for (const button of form.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => { words.value = button.dataset.example; read(); });
}
document.addEventListener("click", (event) => {
  const picked = event.target.closest("[data-place]"), at = event.target.closest("[data-token]");
  if (picked) choose(found.latents[Number(picked.dataset.place)]);
  else if (at) select(Number(at.dataset.token));
});
tokens.addEventListener("keydown", (event) => {
  const there = [...tokens.querySelectorAll("[data-token]")].map((span) => Number(span.dataset.token));
  const now = there.indexOf(token);
  const next = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: there.length - 1 }[event.key];
  if (next !== undefined) {
    event.preventDefault();
    select(there[Math.min(Math.max(next, 0), there.length - 1)]);
  } else if (event.key === "Enter") {
    $("token-latents").querySelector("[data-place]")?.click();
  }
});
$("order").addEventListener("change", () => { drawToken(); drawRows(); });
$("rank").addEventListener("change", () => { shown = OF_TEXT; drawText(); });
$("more").addEventListener("click", () => { shown += OF_TEXT; drawText(); });
$("number").addEventListener("change", (event) => {
  const number = event.target.value.trim().replace(/^#/, "");
  const there = /^\d{1,9}$/.test(number) && Number(number) < Number(form.dataset.latents);
  event.target.setCustomValidity(there ? "" : `Latents have the numbers 0 to ${form.dataset.latents - 1}.`);
  event.target.reportValidity();
  if (there) choose(byNumber(Number(number)));
});
function tab(asRows) {
  $("as-text").setAttribute("aria-pressed", String(!asRows));
  $("as-rows").setAttribute("aria-pressed", String(asRows));
  tokens.hidden = asRows;
  rows.hidden = !asRows;
  drawRows();
}
$("as-text").addEventListener("click", () => tab(false));
$("as-rows").addEventListener("click", () => tab(true));

words.value = sessionStorage.getItem(KEPT) ?? "";
loaded().then(() => { say("The model is ready."); if (words.value.trim()) read(); }).catch((error) => say(error.message, "bad"));
