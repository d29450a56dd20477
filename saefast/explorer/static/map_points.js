// Many points on a canvas, by writing pixels: a redraw of 131k points stays within a frame without a GPU.

/** Widest stamp, in device pixels from its middle; the picture has so much more on each side: none is clipped. */
const WIDEST = 24;

/** [r, g, b] as a pixel of ImageData, on little-endian machines, as all browsers run on. */
function packed([r, g, b]) {
  return (255 << 24) | (b << 16) | (g << 8) | r;
}

/** "#1d5fae" or "rgb(29, 95, 174)" -> [29, 95, 174] */
export function rgb(text) {
  if (text.startsWith("#")) return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  return text.match(/[\d.]+/g).slice(0, 3).map(Number);
}

/** Colours between some, evenly: `count` of them. */
export function ramp(stops, count) {
  return Array.from({ length: count }, (_, i) => {
    const at = (i / Math.max(count - 1, 1)) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
    return stops[low].map((value, channel) => Math.round(value + (at - low) * (stops[low + 1][channel] - value)));
  });
}

/** Offsets and opacities (0 to 256) of a disc with soft edges. */
function disc(radius, opacity, stride) {
  const reach = Math.min(Math.ceil(radius + 0.5), WIDEST - 1);
  const offsets = [], alphas = [];
  for (let y = -reach; y <= reach; y++) {
    for (let x = -reach; x <= reach; x++) {
      const cover = Math.min(Math.max(radius + 0.5 - Math.hypot(x, y), 0), 1);
      if (cover < 0.02) continue;
      offsets.push(y * stride + x);
      alphas.push(Math.round(256 * cover * opacity));
    }
  }
  return { offsets: Int32Array.from(offsets), alphas: Int32Array.from(alphas) };
}

/** Draws points of few colours. */
export class Painter {
  /** canvas: sized in device pixels by whoever has it. */
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
  }

  /**
   * Which points there are. levels: of each point its colour, -1 for none at all; those of a low level lie under those
   * of a high one.
   */
  points(xs, ys, levels) {
    const counts = new Uint32Array(258);
    for (const level of levels) counts[level + 2]++;
    for (let i = 1; i < counts.length; i++) counts[i] += counts[i - 1];
    const hidden = counts[1];
    this.xs = new Float32Array(levels.length - hidden);
    this.ys = new Float32Array(levels.length - hidden);
    this.levels = new Uint8Array(levels.length - hidden);
    for (let i = 0; i < levels.length; i++) {
      if (levels[i] < 0) continue;
      const place = counts[levels[i] + 1]++ - hidden;
      this.xs[place] = xs[i];
      this.ys[place] = ys[i];
      this.levels[place] = levels[i];
    }
  }

  /** paper: what lies under the points; colours: of the levels. All [r, g, b]. */
  colours(paper, colours) {
    this.paper = packed(paper);
    this.palette = colours;
  }

  /** view: {scale, x, y}, device pixels = scale · point + (x, y); radius in device pixels. -> points drawn */
  draw({ scale, x, y }, radius, opacity) {
    const { width, height } = this.canvas;
    const stride = width + 2 * WIDEST, rows = height + 2 * WIDEST;
    if (this.image?.width !== stride || this.image.height !== rows) {
      this.image = this.context.createImageData(stride, rows);
      this.pixels = new Int32Array(this.image.data.buffer);
    }
    this.pixels.fill(this.paper);
    const { offsets, alphas } = disc(radius, opacity, stride);
    const drawn = this._stamp(scale, x + WIDEST, y + WIDEST, stride, rows, offsets, alphas);
    this.context.putImageData(this.image, -WIDEST, -WIDEST);
    return drawn;
  }

  _stamp(scale, dx, dy, stride, rows, offsets, alphas) {
    const { xs, ys, levels, pixels } = this, size = offsets.length;
    const { even, odd } = this._products(alphas);
    const low = WIDEST / 2, right = stride - low, bottom = rows - low;
    let drawn = 0;
    for (let i = 0; i < xs.length; i++) {
      const px = xs[i] * scale + dx, py = ys[i] * scale + dy;
      // False for NaN too.
      if (!(px > low && px < right && py > low && py < bottom)) continue;
      drawn++;
      const middle = ((py + 0.5) | 0) * stride + ((px + 0.5) | 0);
      for (let j = 0, at = levels[i] * size; j < size; j++, at++) {
        const place = middle + offsets[j], under = pixels[place], rest = 256 - alphas[j];
        // Red and blue at once, then green: each has eight bits of room above it.
        const redBlue = ((Math.imul(under & 0xff00ff, rest) + even[at]) >>> 8) & 0xff00ff;
        const green = ((Math.imul(under & 0xff00, rest) + odd[at]) >>> 8) & 0xff00;
        pixels[place] = 0xff000000 | redBlue | green;
      }
    }
    return drawn;
  }

  /** Of each colour and each pixel of the stamp: colour · opacity, red with blue, and green. */
  _products(alphas) {
    const even = new Int32Array(this.palette.length * alphas.length), odd = new Int32Array(even.length);
    this.palette.forEach(([r, g, b], level) => {
      alphas.forEach((alpha, j) => {
        even[level * alphas.length + j] = Math.imul((b << 16) | r, alpha);
        odd[level * alphas.length + j] = Math.imul(g << 8, alpha);
      });
    });
    return { even, odd };
  }
}

/** Finds the point nearest to a place, by cells that hold some four points each on average. */
export class Grid {
  constructor(xs, ys) {
    Object.assign(this, { xs, ys, ...bounds(xs, ys) });
    this.side = Math.max(Math.ceil(Math.sqrt(xs.length / 4)), 1);
    this.cell = Math.max(this.right - this.left, this.bottom - this.top, 1e-30) / this.side || 1;
    const cells = new Int32Array(xs.length);
    this.starts = new Uint32Array(this.side * this.side + 1);
    for (let i = 0; i < xs.length; i++) {
      cells[i] = Number.isFinite(xs[i] + ys[i]) ? this._row(ys[i]) * this.side + this._column(xs[i]) : -1;
      if (cells[i] >= 0) this.starts[cells[i] + 1]++;
    }
    for (let i = 1; i < this.starts.length; i++) this.starts[i] += this.starts[i - 1];
    this.order = new Uint32Array(this.starts[this.side * this.side]);
    const next = this.starts.slice();
    for (let i = 0; i < xs.length; i++) if (cells[i] >= 0) this.order[next[cells[i]]++] = i;
  }

  _column(x) {
    return Math.min(Math.max(Math.floor((x - this.left) / this.cell), 0), this.side - 1);
  }

  _row(y) {
    return Math.min(Math.max(Math.floor((y - this.top) / this.cell), 0), this.side - 1);
  }

  /** The point nearest to (x, y) within `reach` for which `allowed`; -1 where there is none. */
  nearest(x, y, reach, allowed) {
    let best = -1, distance = reach * reach;
    const from = this._column(x - reach), to = this._column(x + reach);
    for (let row = this._row(y - reach); row <= this._row(y + reach); row++) {
      for (let k = this.starts[row * this.side + from]; k < this.starts[row * this.side + to + 1]; k++) {
        const i = this.order[k], dx = this.xs[i] - x, dy = this.ys[i] - y, d = dx * dx + dy * dy;
        if (d < distance && allowed(i)) [best, distance] = [i, d];
      }
    }
    return best;
  }
}

/** {left, right, top, bottom} of finite points; a square of 1 where there are none. */
export function bounds(xs, ys) {
  let left = Infinity, right = -Infinity, top = Infinity, bottom = -Infinity;
  for (let i = 0; i < xs.length; i++) {
    if (!Number.isFinite(xs[i] + ys[i])) continue;
    if (xs[i] < left) left = xs[i];
    if (xs[i] > right) right = xs[i];
    if (ys[i] < top) top = ys[i];
    if (ys[i] > bottom) bottom = ys[i];
  }
  return left <= right ? { left, right, top, bottom } : { left: 0, right: 1, top: 0, bottom: 1 };
}
