// The map of all latents: where one looks, what is under the pointer, colours, and latents that a search marks.

import { act, ask, colour, count, share } from "./base.js";
import { Grid, Painter, bounds, ramp, rgb } from "./map_points.js";

const map = document.getElementById("map");
const $ = (id) => document.getElementById(id);

// Lightness falls (on dark paper rises) along these alone, so that those who see few colours read them too.
const RAMPS = {
  light: ["#b9d5e8", "#6fb1d6", "#3a86bd", "#4b5aa6", "#5b2a80", "#4a0a4f"],
  dark: ["#2d3f63", "#34659a", "#3c93b5", "#58bfa8", "#a9e08a", "#f9f6b8"],
};
const LEVELS = 48;
// Grey of base.css's series stands for what has no colour.
const SERIES = [1, 2, 3, 4, 6, 7, 8].map((number) => `--series-${number}`);
const REACH = 14, STEP = 80, ZOOM_KEY = 1.5, CLOSEST = 4000;
const PHONE = matchMedia("(max-width: 700px)");

class LatentMap {
  constructor(buffer) {
    this.n = Number(map.dataset.latents);
    this._columns(buffer);
    this.grid = new Grid(this.xs, this.ys);
    this.painter = new Painter($("points"));
    this.over = $("over").getContext("2d");
    this.names = [...document.querySelectorAll("#clusters button")];
    this.centres = this._centres();
    this.clusterColour = this._clusterColours();
    Object.assign(this, { hits: [], near: -1, only: -1, moved: false, latents: new Map(), pointers: new Map() });
    this._controls();
    this._listen();
    this._resize();
    this.recolour();
  }

  /** map.py's COLUMNS. y grows upwards in the data and downwards on a screen. */
  _columns(buffer) {
    const { n } = this, has = map.dataset.columns.split(" ");
    const points = new Float32Array(buffer, 0, 2 * n);
    this.xs = new Float32Array(n);
    this.ys = new Float32Array(n);
    for (let i = 0; i < n; i++) [this.xs[i], this.ys[i]] = [points[2 * i], -points[2 * i + 1]];
    let at = 8 * n;
    this.density = null;
    this.cluster = null;
    if (has.includes("density")) {
      this.density = new Float32Array(buffer, at, n);
      at += 4 * n;
    }
    if (has.includes("cluster")) this.cluster = new Int16Array(buffer, at, n);
    this.dead = Uint8Array.from({ length: n }, (_, i) => (this.density ? this.density[i] === 0 : 0));
  }

  /** Of each cluster: how many latents, and where the middle one lies. */
  _centres() {
    const members = this.names.map(() => []);
    for (let i = 0; i < (this.cluster ? this.n : 0); i++) {
      if (!this.dead[i] && Number.isFinite(this.xs[i])) members[this.cluster[i]]?.push(i);
    }
    const middle = (ids, values) => Float32Array.from(ids, (i) => values[i]).sort()[ids.length >> 1];
    return members.map((ids) => ({ size: ids.length, x: middle(ids, this.xs), y: middle(ids, this.ys) }));
  }

  /** The number of each cluster's colour: clusters that lie near each other get different ones. */
  _clusterColours() {
    const chosen = new Int8Array(this.names.length).fill(-1);
    const order = this.centres.map((_, i) => i).sort((a, b) => this.centres[b].size - this.centres[a].size);
    for (const i of order) {
      const room = SERIES.map((_, colour) => Math.min(...order.filter((j) => chosen[j] === colour).map((j) =>
        Math.hypot(this.centres[i].x - this.centres[j].x, this.centres[i].y - this.centres[j].y))));
      chosen[i] = room.indexOf(Math.max(...room));
    }
    return chosen;
  }

  /** Colours anew: of another choice, or of day and night. */
  recolour() {
    const by = document.querySelector("[name=colour]:checked").value;
    const paper = rgb(colour("--card")), grey = mixed(rgb(colour("--faint")), paper, 0.55);
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const scale = ramp(RAMPS[dark ? "dark" : "light"].map(rgb), LEVELS);
    const palette = by === "cluster" ? SERIES.map((name) => rgb(colour(name))) : scale;
    // What a search has marked stands out from all the rest.
    const rest = this.hits.length ? 0.35 : 1;
    this.painter.colours(paper, [grey, ...palette].map((one) => mixed(one, paper, rest)));
    this.painter.points(this.xs, this.ys, by === "cluster" ? this._byCluster() : this._byDensity());
    $("scale").hidden = by === "cluster" || !this.density;
    $("clusters").hidden = by !== "cluster";
    this.byCluster = by === "cluster";
    this._legend(scale);
    this.draw();
  }

  _hidden(i) {
    return this.dead[i] && !$("dead").checked;
  }

  _byCluster() {
    return Int16Array.from(this.cluster, (cluster, i) => {
      if (this._hidden(i)) return -1;
      const plain = this.dead[i] || !(cluster in this.clusterColour) || (this.only >= 0 && cluster !== this.only);
      return plain ? 0 : 1 + this.clusterColour[cluster];
    });
  }

  _byDensity() {
    if (!this.density) return new Int16Array(this.n).fill(LEVELS >> 1);
    // The few latents at either end would take up all the colours.
    const alive = this.density.filter((value) => value > 0).sort();
    this.ends = [0.01, 0.99].map((share) => alive[Math.round(share * (alive.length - 1))] ?? 1);
    const [from, to] = this.ends.map(Math.log), step = (to - from || 1) / LEVELS;
    return Int16Array.from(this.density, (value, i) => {
      if (this._hidden(i)) return -1;
      return value > 0 ? 1 + Math.min(Math.max(Math.floor((Math.log(value) - from) / step), 0), LEVELS - 1) : 0;
    });
  }

  _legend(scale) {
    const bar = $("bar"), context = bar.getContext("2d");
    bar.width = scale.length;
    scale.forEach(([r, g, b], i) => {
      context.fillStyle = `rgb(${r} ${g} ${b})`;
      context.fillRect(i, 0, 1, bar.height);
    });
    if (this.ends) $("low").textContent = `≤ ${share(this.ends[0])}`;
    if (this.ends) $("high").textContent = `≥ ${share(this.ends[1])}`;
    this.names.forEach((button, i) => {
      button.style.setProperty("--mine", `var(${SERIES[this.clusterColour[i]]})`);
      button.querySelector("b").textContent = count(this.centres[i].size);
      button.parentElement.hidden = !this.centres[i].size;
    });
  }

  // Where one looks. this.scale and this.at: CSS pixels = scale · point + at.

  _resize() {
    const { width, height } = $("field").getBoundingClientRect();
    const ratio = Math.min(devicePixelRatio || 1, 2);
    if (!width || !height) return;
    const before = this.size;
    this.size = { width, height, ratio };
    for (const canvas of [$("points"), $("over")]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    if (!before || !this.moved) this.whole();
    else this.at = { x: this.at.x + (width - before.width) / 2, y: this.at.y + (height - before.height) / 2 };
    this.draw();
  }

  whole() {
    const { left, right, top, bottom } = bounds(this.xs, this.ys), { width, height } = this.size;
    const room = Math.min(width, height) * 0.05 + 6;
    const fits = [(width - 2 * room) / (right - left), (height - 2 * room) / (bottom - top)].filter(Number.isFinite);
    this.least = Math.max(Math.min(...fits, 1e6), 1e-6);
    this.scale = this.least;
    this.at = { x: width / 2 - (this.scale * (left + right)) / 2, y: height / 2 - (this.scale * (top + bottom)) / 2 };
    this.moved = false;
    this.draw();
  }

  /** Zooms so that what lies at (x, y) stays there. */
  zoom(factor, x = this.size.width / 2, y = this.size.height / 2) {
    const scale = Math.min(Math.max(this.scale * factor, this.least / 2), this.least * CLOSEST);
    const by = scale / this.scale;
    this.at = { x: x - (x - this.at.x) * by, y: y - (y - this.at.y) * by };
    this.scale = scale;
    this.move(0, 0);
  }

  move(dx, dy) {
    this.at = { x: this.at.x + dx, y: this.at.y + dy };
    this.moved = true;
    this.draw();
  }

  place(i) {
    return { x: this.scale * this.xs[i] + this.at.x, y: this.scale * this.ys[i] + this.at.y };
  }

  /** Moves so that a latent is in sight. */
  reveal(i) {
    const { x, y } = this.place(i), { width, height } = this.size, edge = 40;
    if (x < edge || y < edge || x > width - edge || y > height - edge) this.move(width / 2 - x, height / 2 - y);
  }

  // Drawing.

  draw() {
    this.stale = true;
    this._soon();
  }

  mark() {
    this._soon();
  }

  _soon() {
    this.asked ??= requestAnimationFrame(() => {
      this.asked = null;
      if (this.stale) this._points();
      this.stale = false;
      this._over();
    });
  }

  /** Radius of a point in CSS pixels: small where many are in sight. */
  radius() {
    const { width, height } = this.size;
    const room = Math.sqrt((width * height) / (14 * Math.max(this.n, 1)));
    return Math.min(Math.min(Math.max(room, 0.8), 4) * Math.max(this.scale / this.least, 1) ** 0.35, 7);
  }

  _points() {
    const begun = performance.now(), { ratio } = this.size;
    const view = { scale: this.scale * ratio, x: this.at.x * ratio, y: this.at.y * ratio };
    const drawn = this.painter.draw(view, this.radius() * ratio, 0.85);
    $("points").dataset.drawn = drawn;
    $("points").dataset.milliseconds = (performance.now() - begun).toFixed(2);
  }

  _over() {
    const { over } = this, { width, height, ratio } = this.size;
    over.setTransform(ratio, 0, 0, ratio, 0, 0);
    over.clearRect(0, 0, width, height);
    const paper = colour("--card"), ink = colour("--ink"), shade = colour("--shade");
    const size = Math.max(this.radius() * 1.3, 4);
    // The best of what a search has found are the largest, and lie above the others.
    for (const { i, share } of this.hits) this._ring(i, size * (0.75 + 0.75 * share), paper, shade);
    if (this.byCluster) this._names(paper, ink);
    if (this.near >= 0) {
      over.lineWidth = 2;
      const { x, y } = this.place(this.near);
      circle(over, x, y, this.radius() + 4.5, null, ink);
    }
    if (this.crossed) this._cross(ink);
  }

  _ring(i, size, paper, shade) {
    const { x, y } = this.place(i);
    this.over.lineWidth = 1.5;
    circle(this.over, x, y, size, shade, paper);
  }

  /** Where keys look: the middle. */
  _cross(ink) {
    const { over } = this, { width, height } = this.size;
    over.strokeStyle = ink;
    over.lineWidth = 1;
    over.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      over.moveTo(width / 2 + 5 * dx, height / 2 + 5 * dy);
      over.lineTo(width / 2 + 11 * dx, height / 2 + 11 * dy);
    }
    over.stroke();
  }

  /** Names of clusters at their middles, the largest first, where they cover no other name. */
  _names(paper, ink) {
    const { over } = this, taken = [];
    over.font = `600 12px ${colour("--sans")}`;
    over.textAlign = "center";
    over.textBaseline = "middle";
    over.lineJoin = "round";
    const order = this.centres.map((_, i) => i).sort((a, b) => this.centres[b].size - this.centres[a].size);
    for (const i of order) {
      if (!this.centres[i].size || (this.only >= 0 && i !== this.only)) continue;
      const text = cut(this.names[i].querySelector("span").textContent, 28);
      const x = this.scale * this.centres[i].x + this.at.x, y = this.scale * this.centres[i].y + this.at.y;
      const half = over.measureText(text).width / 2 + 6;
      if (taken.some((other) => Math.abs(other.x - x) < other.half + half && Math.abs(other.y - y) < 18)) continue;
      taken.push({ x, y, half });
      over.lineWidth = 4;
      over.strokeStyle = paper;
      over.strokeText(text, x, y);
      over.fillStyle = ink;
      over.fillText(text, x, y);
    }
  }

  // Under the pointer.

  at_(event) {
    const { left, top } = $("over").getBoundingClientRect();
    return { x: event.clientX - left, y: event.clientY - top };
  }

  find(x, y, reach = REACH) {
    const allowed = (i) => !this._hidden(i);
    return this.grid.nearest((x - this.at.x) / this.scale, (y - this.at.y) / this.scale, reach / this.scale, allowed);
  }

  /** Puts the ring and the card on a latent; -1: on none. */
  async look(i) {
    if (i === this.near) {
      this._placeTip();
      return;
    }
    this.near = i;
    $("over").classList.toggle("near", i >= 0);
    this.mark();
    if (i < 0) {
      $("tip").hidden = true;
      return;
    }
    if (!this.latents.has(i)) {
      // Nobody asks for what a pointer only passes over.
      await new Promise((resolve) => setTimeout(resolve, 30));
      if (this.near !== i) return;
      const { latents } = await ask(`/map/latents?ids=${i}`).catch(() => ({ latents: [] }));
      for (const latent of latents) this.latents.set(latent.latent, latent);
      if (this.near !== i) return;
    }
    this._tip(this.latents.get(i) ?? { latent: i, title: "", label: "", density: null, max_act: null });
  }

  _tip({ latent, title, label, density, max_act, dead }) {
    const tip = $("tip");
    tip.replaceChildren(made("strong", title || (dead ? "dead" : "no tokens known")));
    if (label) tip.append(made("em", label));
    const fires = dead ? "on no row" : `on ${share(density)} of rows · max ${act(max_act)}`;
    tip.append(made("span", `latent ${latent} · ${fires}`));
    const cluster = this.names[this.cluster?.[latent]]?.querySelector("span").textContent;
    if (cluster) tip.append(document.createElement("br"), made("span", `cluster “${cluster}”`));
    if (PHONE.matches) {
      const link = made("a", "open it");
      link.href = `/latent/${latent}`;
      tip.append(document.createElement("br"), link);
    }
    tip.hidden = false;
    this._placeTip();
  }

  /** Beside the latent, on the side where there is room. */
  _placeTip() {
    const tip = $("tip");
    if (tip.hidden || this.near < 0) return;
    const { x, y } = this.place(this.near), { width, height } = this.size;
    const left = x + 16 + tip.offsetWidth > width ? x - 16 - tip.offsetWidth : x + 16;
    const top = Math.min(Math.max(y - 14, 6), height - tip.offsetHeight - 6);
    tip.style.transform = `translate(${Math.round(Math.max(left, 4))}px, ${Math.round(top)}px)`;
  }

  // What people do.

  _listen() {
    const over = $("over");
    over.addEventListener("pointerdown", (event) => this._down(event));
    over.addEventListener("pointermove", (event) => this._moved(event));
    for (const name of ["pointerup", "pointercancel"]) over.addEventListener(name, (event) => this._up(event));
    over.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.look(-1));
    over.addEventListener("wheel", (event) => this._wheel(event), { passive: false });
    over.addEventListener("keydown", (event) => this._key(event));
    over.addEventListener("dblclick", (event) => event.preventDefault());
    over.addEventListener("blur", () => this._crossed(false));
    new ResizeObserver(() => this._resize()).observe($("field"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.recolour());
  }

  _down(event) {
    if (event.button > 1) return;
    $("over").setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.at_(event));
    this.travelled = this.pointers.size > 1 ? Infinity : 0;
    this._crossed(false);
  }

  _moved(event) {
    const now = this.at_(event), before = this.pointers.get(event.pointerId);
    if (!before) {
      if (event.pointerType === "mouse") this.look(this.find(now.x, now.y));
      return;
    }
    this.travelled += Math.hypot(now.x - before.x, now.y - before.y);
    if (this.travelled > 4) {
      $("over").classList.add("held");
      if (this.pointers.size === 2) this._pinch(event.pointerId, now);
      else this.move(now.x - before.x, now.y - before.y);
      this.look(-1);
    }
    if (this.travelled > 4 || this.pointers.size > 1) this.pointers.set(event.pointerId, now);
  }

  _pinch(id, now) {
    const before = this.pointers.get(id), other = [...this.pointers].find(([key]) => key !== id)[1];
    const by = Math.hypot(now.x - other.x, now.y - other.y) / (Math.hypot(before.x - other.x, before.y - other.y) || 1);
    this.move((now.x - before.x) / 2, (now.y - before.y) / 2);
    this.zoom(by, (now.x + other.x) / 2, (now.y + other.y) / 2);
  }

  _up(event) {
    const known = this.pointers.delete(event.pointerId);
    $("over").classList.remove("held");
    if (!known || this.travelled > 4 || event.type === "pointercancel") return;
    const { x, y } = this.at_(event), i = this.find(x, y, event.pointerType === "mouse" ? REACH : 2 * REACH);
    // A finger has nothing to hover with: its first touch shows the latent, and the card leads to it.
    if (event.pointerType !== "mouse" && i !== this.near) this.look(i);
    else if (i >= 0) this.open(i, event.ctrlKey || event.metaKey || event.button === 1);
  }

  open(i, apart) {
    if (apart) window.open(`/latent/${i}`, "_blank", "noopener");
    else location.assign(`/latent/${i}`);
  }

  _wheel(event) {
    event.preventDefault();
    const { x, y } = this.at_(event), unit = [1, 30, 300][event.deltaMode] ?? 1;
    this.zoom(Math.exp(-event.deltaY * unit * (event.ctrlKey ? 0.01 : 0.002)), x, y);
    this.look(this.find(x, y));
  }

  _key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const moves = { ArrowLeft: [STEP, 0], ArrowRight: [-STEP, 0], ArrowUp: [0, STEP], ArrowDown: [0, -STEP] };
    const zooms = { "+": ZOOM_KEY, "=": ZOOM_KEY, "-": 1 / ZOOM_KEY, "_": 1 / ZOOM_KEY };
    if (event.key in moves) this.move(...moves[event.key]);
    else if (event.key in zooms) this.zoom(zooms[event.key]);
    else if (event.key === "0" || event.key === "Home") this.whole();
    else if (event.key === "Enter" && this.near >= 0) this.open(this.near, false);
    else return;
    event.preventDefault();
    this._crossed(true);
    this.look(this.find(this.size.width / 2, this.size.height / 2, 30));
  }

  _crossed(crossed) {
    this.crossed = crossed;
    this.mark();
  }

  _controls() {
    $("closer").addEventListener("click", () => this.zoom(ZOOM_KEY));
    $("farther").addEventListener("click", () => this.zoom(1 / ZOOM_KEY));
    $("whole").addEventListener("click", () => this.whole());
    for (const input of [$("dead"), ...document.querySelectorAll("[name=colour]")]) {
      input.addEventListener("change", () => this.recolour());
    }
    const dead = this.dead.reduce((sum, one) => sum + one, 0);
    $("dead-count").textContent = count(dead);
    $("dead-label").hidden = !dead;
    this.names.forEach((button, cluster) => button.addEventListener("click", () => this._single(cluster)));
  }

  /** One cluster alone in colour; again: all. */
  _single(cluster) {
    this.only = this.only === cluster ? -1 : cluster;
    this.names.forEach((button, i) => button.setAttribute("aria-pressed", `${i === this.only}`));
    this.recolour();
  }

  /** Marks latents: {latent, title, label, score, …} each. */
  markHits(found) {
    for (const latent of found) this.latents.set(latent.latent, latent);
    const most = Math.max(...found.map(({ score }) => score), 1e-9);
    this.hits = found.map(({ latent, score }) => ({ i: latent, share: score / most }));
    this.hits = this.hits.filter(({ i }) => Number.isFinite(this.xs[i])).sort((a, b) => a.share - b.share);
    this.recolour();
  }
}

function mixed(one, other, share) {
  return one.map((value, channel) => Math.round(value * share + other[channel] * (1 - share)));
}

function circle(context, x, y, radius, fill, stroke) {
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  if (fill) {
    context.fillStyle = fill;
    context.fill();
  }
  context.strokeStyle = stroke;
  context.stroke();
}

function made(name, text) {
  const element = document.createElement(name);
  element.textContent = text;
  if (name !== "a") element.dir = "auto";
  return element;
}

function cut(text, most) {
  const signs = [...text];
  return signs.length > most ? `${signs.slice(0, most - 1).join("")}…` : text;
}

/** The field that marks latents, and the list of them. */
class Finder {
  constructor(latentMap) {
    this.map = latentMap;
    this.asked = 0;
    const word = $("word"), later = () => {
      clearTimeout(this.timer);
      this.timer = setTimeout(() => this.find(word.value), 250);
    };
    // Escape empties the field in some browsers, and they say so in other ways.
    for (const name of ["input", "search", "change"]) word.addEventListener(name, later);
    $("find").addEventListener("submit", (event) => {
      event.preventDefault();
      clearTimeout(this.timer);
      this.find(word.value);
    });
    const query = new URLSearchParams(location.search);
    if (query.get("q")) {
      word.value = query.get("q");
      this.find(word.value);
    }
    const latent = query.get("latent");
    if (/^\d+$/.test(latent ?? "") && Number(latent) < latentMap.n) {
      latentMap.zoom(8, latentMap.place(Number(latent)).x, latentMap.place(Number(latent)).y);
      latentMap.reveal(Number(latent));
      latentMap.look(Number(latent));
    }
  }

  async find(text) {
    const asked = ++this.asked;
    let answer = { latents: [], how: "" };
    if (text.trim()) {
      try {
        answer = await ask(`/map/search?q=${encodeURIComponent(text.trim())}`);
      } catch (error) {
        answer = { latents: [], how: error.message };
      }
    }
    if (asked === this.asked) this.show(text, answer);
  }

  show(text, { latents, how }) {
    $("found").hidden = !text.trim();
    $("how-many").textContent = how;
    $("hits").replaceChildren(...latents.map((latent) => this.row(latent)));
    this.map.markHits(latents);
  }

  row(latent) {
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = `/latent/${latent.latent}`;
    link.dataset.walk = "";
    link.append(made("span", latent.label || latent.title || "dead"), made("i", latent.latent));
    const look = () => {
      this.map.reveal(latent.latent);
      this.map.look(latent.latent);
    };
    link.addEventListener("pointerenter", look);
    link.addEventListener("focus", look);
    item.append(link);
    return item;
  }
}

async function begin() {
  try {
    const answer = await fetch(map.dataset.points, { credentials: "same-origin" });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const latentMap = new LatentMap(await answer.arrayBuffer());
    new Finder(latentMap);
    $("wait").hidden = true;
    map.dataset.ready = "";
  } catch (error) {
    $("wait").textContent = `The map could not be drawn: ${error.message}`;
    throw error;
  }
}

if (map) begin();
