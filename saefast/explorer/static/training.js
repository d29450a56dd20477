// The curves of a run: asks for what is new every few seconds, fewer times where nobody writes, never while hidden.

import { act, ask, count, share } from "./base.js";
import { Chart, short } from "./chart.js";

const LIVE_MS = 2000, IDLE_MS = 10000;
// A curve that has grown by this many points is thinned anew by the server.
const MOST_POINTS = 3000;

const known = { generation: -1, lines: 0, curves: new Map() };
const charts = [...document.querySelectorAll(".chart")].map(makeChart);

function makeChart(figure) {
  const percent = figure.dataset.unit === "%";
  const plot = figure.querySelector(".plot"), button = figure.querySelector(".log");
  const entries = [...figure.querySelectorAll(".legend li")];
  const write = percent ? (value, digits) => `${short(value, digits)} %` : short;
  const made = { figure, plot, entries, percent, chart: new Chart(plot, { zero: "zero" in figure.dataset, write }) };
  button.addEventListener("click", () => {
    button.setAttribute("aria-pressed", `${button.getAttribute("aria-pressed") !== "true"}`);
    show(made);
  });
  plot.addEventListener("pointermove", (event) => {
    pointAll(made.chart.back(event.clientX - plot.getBoundingClientRect().left));
  });
  plot.addEventListener("pointerleave", () => pointAll(null));
  plot.addEventListener("blur", () => pointAll(null));
  plot.addEventListener("keydown", (event) => walk(made, event));
  return made;
}

/** Arrow keys walk over the points of the curve that has the most of them. */
function walk({ chart }, event) {
  const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: 20, PageDown: -20, Home: -Infinity, End: Infinity }[event.key];
  if (step === undefined || !chart.curves.length) return;
  event.preventDefault();
  const { xs } = chart.curves.reduce((a, b) => (b.xs.length > a.xs.length ? b : a));
  const now = chart.cursor === null ? xs.length - 1 : xs.findIndex((x) => x >= chart.cursor);
  const next = Math.min(Math.max((now < 0 ? xs.length - 1 : now) + step, 0), xs.length - 1);
  pointAll(xs[next]);
}

function pointAll(x) {
  for (const made of charts) {
    if (!made.figure.hidden) values(made, made.chart.point(x));
  }
}

/** Writes values beside their names: the last ones, or those under the cursor. */
function values({ plot, entries, percent, chart }, found) {
  const said = [];
  for (const { curve, y } of found) {
    const text = y === null ? "–" : percent ? share(y / 100) : act(y);
    entries[curve.place].querySelector("b").textContent = text;
    said.push(`${entries[curve.place].querySelector("span").textContent} ${text}`);
  }
  if (!found.length) return;
  const at = chart.cursor === null ? chart.right : found[0].x;
  plot.setAttribute("aria-valuemax", chart.right);
  plot.setAttribute("aria-valuenow", at);
  plot.setAttribute("aria-valuetext", `at ${short(at)} tokens: ${said.join(", ")}`);
}

function zip(curve) {
  return curve ? curve[0].map((x, i) => [x, curve[1][i]]) : [];
}

function show(made) {
  const { figure, entries, percent, chart } = made;
  const curves = [], rows = new Map(zip(known.curves.get("heldout/rows")));
  entries.forEach((entry, place) => {
    const data = known.curves.get(entry.dataset.name);
    // A loss that is not part of this run is 0 all along.
    entry.hidden = !data || (place > 0 && !percent && data[1].every((y) => y === 0));
    if (entry.hidden) return;
    const ys = percent ? data[1].map((y) => 100 * y) : data[1];
    const few = "few" in entry.dataset, xs = data[0];
    // The last figures are of all held-out rows, those before of some: no line leads from the one to the other.
    const joined = few && ((i) => i > 0 && rows.get(xs[i]) === rows.get(xs[i - 1]));
    curves.push({ xs, ys, className: `series-${place + 1}`, few, joined, place });
  });
  figure.hidden = !curves.length;
  if (figure.hidden) return;
  chart.show(curves, figure.querySelector(".log").getAttribute("aria-pressed") === "true");
  values(made, chart.point(chart.cursor));
}

function take(answer) {
  if (answer.since === 0) known.curves.clear();
  for (const [name, [xs, ys]] of Object.entries(answer.curves)) {
    const before = known.curves.get(name) ?? [[], []];
    known.curves.set(name, [before[0].concat(xs), before[1].concat(ys)]);
  }
  const most = Math.max(0, ...[...known.curves.values()].map(([xs]) => xs.length));
  known.generation = most > MOST_POINTS ? -1 : answer.generation;
  known.lines = answer.lines;
  document.getElementById("charts").hidden = !known.curves.size;
  if (answer.since === 0 || Object.keys(answer.curves).length) charts.forEach(show);
}

/** 5025 -> "1 h 23 min" */
export function duration(seconds) {
  const whole = Math.max(Math.round(seconds), 0), minutes = Math.round(whole / 60);
  if (whole < 60) return `${whole} s`;
  if (whole < 600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (minutes < 60) return `${minutes} min`;
  return minutes < 2880 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${(minutes / 1440).toFixed(1)} days`;
}

function say(state, unreadable) {
  const is = document.getElementById("is"), bar = document.getElementById("progress");
  is.textContent = { live: "live", finished: "finished", stopped: "stopped", none: "no figures yet" }[state.is];
  is.className = `chip ${state.is}`;
  const parts = [];
  const steps = state.steps === null ? "" : ` of ${count(state.steps)}`;
  if (state.step !== null) parts.push(`step ${count(state.step)}${steps}`);
  if (state.tokens !== null) {
    const all = state.all_tokens !== null && state.is !== "finished" ? ` of ${short(state.all_tokens)}` : "";
    parts.push(`${short(state.tokens)}${all} tokens`);
  }
  if (state.seconds !== null) parts.push(`${duration(state.seconds)} of training`);
  if (state.is === "live" && state.seconds_left) parts.push(`about ${duration(state.seconds_left)} left`);
  if (state.is === "stopped") parts.push(`last figures ${duration(state.seconds_ago)} ago`);
  document.getElementById("how-far").textContent = parts.join(" · ");
  bar.hidden = state.is === "finished" || !state.steps;
  if (!bar.hidden) bar.value = state.step / state.steps;
  note(noteOf(state, unreadable));
}

function noteOf(state, unreadable) {
  if (state.is === "none") {
    return "There is no metrics.jsonl yet: the first figures are still to come, or the SAE was trained elsewhere.";
  }
  const lines = unreadable === 1 ? "One line of metrics.jsonl is" : `${count(unreadable)} lines of metrics.jsonl are`;
  return unreadable ? `${lines} damaged and left out.` : "";
}

function note(words) {
  const place = document.getElementById("note");
  place.hidden = !words;
  place.textContent = words;
}

let timer = 0;

async function poll() {
  clearTimeout(timer);
  let wait = IDLE_MS;
  if (!document.hidden) {
    try {
      const answer = await ask(`/training/data?generation=${known.generation}&since=${known.lines}`);
      take(answer);
      say(answer.state, answer.unreadable);
      if (answer.state.is === "live") wait = LIVE_MS;
    } catch (error) {
      note(`Nothing new comes from saefast explore (${error.message}).`);
    }
  }
  timer = setTimeout(poll, wait);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) poll();
});
poll();
