// A line chart in SVG: axes with round numbers, a logarithmic axis where it is wanted, and the values under a cursor.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 46, right: 12, top: 8, bottom: 22 };

/** 284160 -> "284k", as on an axis. */
export function short(value, digits = 3) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * 0.99999) return `${Number((value / unit).toPrecision(digits))}${letter}`;
  }
  const round = Number(value.toPrecision(digits));
  return size && size < 1e-4 ? round.toExponential().replace("e-", "e−") : `${round}`;
}

/** Numbers as text, with the fewest digits that tell them apart. */
function labels(values, write) {
  for (let digits = 3; digits < 9; digits++) {
    const texts = values.map((value) => write(value, digits));
    if (new Set(texts).size === values.length) return texts;
  }
  return values.map((value) => write(value, 9));
}

/** About `wanted` round numbers from low to high. */
export function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(wanted, 1);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find((round) => round * power >= rough * 0.8) ?? 10);
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length: Math.max(count, 0) }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/** Round numbers on a logarithmic axis: powers of ten where there are many, else 1, 2 and 5 of each, else as above. */
export function logTicks(low, high, wanted) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return ticks(low, high, wanted);
  const steps = decades > 3 ? [1] : decades > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
  const every = decades > 3 ? Math.ceil(decades / wanted) : 1;
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    if (power % every === 0) found.push(...steps.map((step) => Number((step * 10 ** power).toPrecision(6))));
  }
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent?.append(made);
  return made;
}

/** Place of the value nearest to x in xs, which ascend. */
export function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return xs.length > 1 && x - xs[low] > xs[high] - x ? high : low;
}

function extent(curves, log) {
  let low = Infinity, high = -Infinity;
  for (const { ys } of curves) {
    for (const y of ys) {
      if (log && y <= 0) continue;
      if (y < low) low = y;
      if (y > high) high = y;
    }
  }
  return [low, high];
}

/**
 * A chart in an element.
 * place: the element, of a height of its own. zero: the axis has 0. write: how a value reads on the axis.
 */
export class Chart {
  constructor(place, { zero = false, write = short } = {}) {
    Object.assign(this, { place, zero, write, log: false, curves: [], cursor: null });
    new ResizeObserver(() => this.draw()).observe(place);
  }

  /**
   * curves: {xs, ys, className, few, joined}, xs ascending. few: each point is marked. joined: of places i, whether a
   * line leads from the point before (all, if left out). log: whether the axis is logarithmic, if the values allow it.
   */
  show(curves, log) {
    this.curves = curves.filter((curve) => curve.xs.length);
    this.log = log && extent(this.curves, true)[1] > 0;
    this.draw();
  }

  draw() {
    const width = this.place.clientWidth, height = this.place.clientHeight;
    if (!width || !height || !this.curves.length) return;
    this._scales(width, height);
    const svg = element("svg", { width, height, "aria-hidden": "true" });
    this._axes(svg, width, height);
    for (const curve of this.curves) this._curve(svg, curve);
    this.over = element("g", {}, svg);
    this.place.replaceChildren(svg);
    this.point(this.cursor);
  }

  _scales(width, height) {
    let [low, high] = extent(this.curves, this.log);
    if (this.log) {
      if (high < low * 1.05) [low, high] = [low / 1.05, high * 1.05];
      const room = (high / low) ** 0.04;
      [low, high] = [low / room, high * room];
    } else {
      if (this.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
      const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
      if (!(this.zero && low === 0)) low -= room;
      if (!(this.zero && high === 0 && low < 0)) high += room;
    }
    this.right = Math.max(...this.curves.map(({ xs }) => xs[xs.length - 1]), 1);
    [this.low, this.high] = [low, high];
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    const [from, to] = this.log ? [Math.log(low), Math.log(high)] : [low, high];
    this.x = (x) => MARGIN.left + (x / this.right) * inner.width;
    this.y = (y) => MARGIN.top + inner.height * (1 - ((this.log ? Math.log(y) : y) - from) / (to - from));
    this.back = (px) => ((px - MARGIN.left) / inner.width) * this.right;
  }

  _axes(svg, width, height) {
    const wanted = Math.max(Math.round(height / 48), 2);
    const rungs = (this.log ? logTicks : ticks)(this.low, this.high, wanted);
    const texts = labels(rungs, this.write);
    for (const [i, y] of rungs.entries()) {
      const at = Math.round(this.y(y)) + 0.5;
      element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }, svg);
      element("text", { x: MARGIN.left - 6, y: at + 4, "text-anchor": "end" }, svg).textContent = texts[i];
    }
    const xs = ticks(0, this.right, Math.max(Math.round(width / 110), 2));
    for (const x of xs) {
      const last = this.x(x) > width - 40;
      const text = element("text", { x: last ? width - 2 : this.x(x), y: height - 5 }, svg);
      text.setAttribute("text-anchor", last ? "end" : "middle");
      text.textContent = x === 0 ? "0 tokens" : short(x);
      if (x === 0) text.setAttribute("text-anchor", "start");
    }
  }

  _curve(svg, { xs, ys, className, few, joined }) {
    let path = "", pen = "M";
    for (let i = 0; i < xs.length; i++) {
      if (joined && !joined(i)) pen = "M";
      // A logarithmic axis has no place for 0: the line goes on after it.
      if (this.log && ys[i] <= 0) {
        pen = "M";
        continue;
      }
      path += `${pen}${this.x(xs[i]).toFixed(1)} ${this.y(ys[i]).toFixed(1)}`;
      pen = "L";
    }
    element("path", { class: `curve ${className}`, d: path }, svg);
    if (!few || xs.length > 80) return;
    for (let i = 0; i < xs.length; i++) {
      if (!this.log || ys[i] > 0) this._dot(svg, className, xs[i], ys[i], 3);
    }
  }

  _dot(parent, className, x, y, r) {
    element("circle", { class: className, cx: this.x(x), cy: this.y(y), r }, parent);
  }

  /** Marks the values nearest to x (null: none) and returns the nearest, or last, of each curve; y null: none near. */
  point(x) {
    this.cursor = x;
    if (!this.over) return [];
    this.over.replaceChildren();
    const found = this.curves.map((curve) => {
      const at = x === null ? curve.xs.length - 1 : nearest(curve.xs, x);
      const far = x !== null && Math.abs(curve.xs[at] - x) > this.right / 10;
      return { x: curve.xs[at], y: far ? null : curve.ys[at], curve };
    });
    if (x === null || !found.length) return found;
    const height = this.place.clientHeight, at = this.x(Math.min(Math.max(x, 0), this.right));
    element("line", { class: "cursor", x1: at, x2: at, y1: MARGIN.top, y2: height - MARGIN.bottom }, this.over);
    for (const { x: px, y, curve } of found) {
      if (y !== null && (!this.log || y > 0)) this._dot(this.over, curve.className, px, y, 4);
    }
    const side = at > this.place.clientWidth - 60 ? "end" : at < MARGIN.left + 30 ? "start" : "middle";
    const text = element("text", { class: "at", x: at, y: height - 5, "text-anchor": side }, this.over);
    text.textContent = short(found[0].x);
    return found;
  }
}
