"""What draws the map and the curves, by its numbers: the nearest point, pixels of points, round numbers on axes."""

from typing import Any

import pytest
from browsing import Open

pytestmark = pytest.mark.browser

# A generator of its own, so that the same points come every time.
RANDOM = "let seed = 1; const random = () => (seed = (seed * 48271) % 2147483647) / 2147483647;"


@pytest.fixture
def page(visit: Open) -> Any:
    return visit("/training")


def test_the_nearest_point_is_that_of_all(page: Any) -> None:
    wrong = page.evaluate(
        f"""async () => {{ {RANDOM}
      const {{ Grid }} = await import("/static/map_points.js");
      const wrong = [];
      for (const [name, n, of] of [
        ["cloud", 3000, () => random() - 0.5], ["line", 500, (i, axis) => (axis ? 2 : i / 500)],
        ["one place", 50, () => 3], ["one", 1, () => 0.25], ["none", 0, () => 0],
        ["far", 400, () => random() * 1e6 - 3e5],
      ]) {{
        const xs = Float32Array.from({{ length: n }}, (_, i) => of(i, 0));
        const ys = Float32Array.from({{ length: n }}, (_, i) => of(i, 1));
        for (let i = 7; i < n; i += 97) xs[i] = NaN;
        const grid = new Grid(xs, ys), size = (grid.right - grid.left) || 1;
        for (let k = 0; k < 400; k++) {{
          const x = grid.left + size * (1.4 * random() - 0.2), y = grid.top + size * (1.4 * random() - 0.2);
          const reach = size * random() ** 3, allowed = (i) => i % 5 !== 0;
          let best = -1, distance = reach * reach;
          for (let i = 0; i < n; i++) {{
            const d = (xs[i] - x) ** 2 + (ys[i] - y) ** 2;
            if (allowed(i) && d < distance) [best, distance] = [i, d];
          }}
          const found = grid.nearest(x, y, reach, allowed);
          const same = found >= 0 && best >= 0 && (xs[found] - x) ** 2 + (ys[found] - y) ** 2 === distance;
          if (found !== best && !same) wrong.push([name, found, best]);
        }}
      }}
      return wrong;
    }}"""
    )
    assert wrong == []


def test_points_are_drawn_where_they_are_in_their_colours(page: Any) -> None:
    """Each pixel is that of blending the discs one by one, in floating point."""
    found = page.evaluate(
        f"""async () => {{ {RANDOM}
      const {{ Painter }} = await import("/static/map_points.js");
      const worst = [];
      for (const [width, height, radius] of [[90, 60, 0.8], [61, 47, 2.5], [40, 30, 7]]) {{
        const canvas = Object.assign(document.createElement("canvas"), {{ width, height }});
        const painter = new Painter(canvas), n = 60, paper = [250, 240, 20];
        const colours = [[10, 20, 30], [255, 0, 128], [0, 255, 255]];
        const xs = Float32Array.from({{ length: n }}, () => random() * 1.2 - 0.1);
        const ys = Float32Array.from({{ length: n }}, () => random() * 1.2 - 0.1);
        const levels = Int16Array.from({{ length: n }}, (_, i) => (i % 4) - 1);
        xs[5] = NaN; ys[6] = Infinity;
        painter.colours(paper, colours);
        painter.points(xs, ys, levels);
        const view = {{ scale: 50, x: 3, y: -2 }}, drawn = painter.draw(view, radius, 0.85);
        const expected = Array.from({{ length: width * height }}, () => [...paper]);
        let inside = 0;
        const order = [...levels.keys()].filter((i) => levels[i] >= 0).sort((a, b) => levels[a] - levels[b] || a - b);
        for (const i of order) {{
          const px = Math.fround(xs[i]) * view.scale + view.x, py = ys[i] * view.scale + view.y;
          if (!Number.isFinite(px + py)) continue;
          inside += px > 0 && px < width && py > 0 && py < height;
          const cx = Math.floor(px + 0.5), cy = Math.floor(py + 0.5);
          for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {{
            const cover = Math.min(Math.max(radius + 0.5 - Math.hypot(x - cx, y - cy), 0), 1);
            if (cover < 0.02) continue;
            const pixel = expected[y * width + x], colour = colours[levels[i]];
            for (let c = 0; c < 3; c++) pixel[c] += (colour[c] - pixel[c]) * cover * 0.85;
          }}
        }}
        const {{ data }} = canvas.getContext("2d").getImageData(0, 0, width, height);
        let off = 0;
        expected.forEach((pixel, at) => {{
          off = Math.max(off, ...pixel.map((value, c) => Math.abs(value - data[4 * at + c])));
        }});
        worst.push({{ off, drawn, inside }});
      }}
      return worst;
    }}"""
    )
    for one in found:
        # Each of a few discs over one another rounds once in eight bits, and its opacity in eight bits.
        assert one["off"] < 8, found
        assert one["drawn"] >= one["inside"] > 10


def test_axes_have_round_numbers(page: Any) -> None:
    found = page.evaluate(
        """async () => {
      const { ticks, logTicks, short, nearest } = await import("/static/chart.js");
      return {
        plain: ticks(0, 284160, 5), shares: ticks(0, 6.1, 4), below: ticks(-0.3, 0.25, 4), level: ticks(3, 3, 4),
        near: logTicks(0.11, 0.28, 4), decade: logTicks(0.02, 0.9, 4), many: logTicks(1e-8, 3, 4),
        short: [0, 284160, 1e6, 999999, 2.5e9, 0.0015, 0.00002, -1200].map((value) => short(value)),
        nearest: [[1, 2, 4, 8], [5], [1, 1, 1]].map((xs) => [-1, 2.9, 3.1, 7, 100].map((x) => nearest(xs, x))),
      };
    }"""
    )
    assert found["plain"] == [0, 50000, 100000, 150000, 200000, 250000]
    assert found["shares"] == [0, 2, 4, 6]
    assert found["below"] == [-0.2, 0, 0.2]
    assert found["level"] == [3]
    assert found["near"] == [0.15, 0.2, 0.25]
    assert found["decade"] == [0.02, 0.05, 0.1, 0.2, 0.5]
    assert found["many"] == [1e-6, 0.001, 1]
    assert found["short"] == ["0", "284k", "1M", "1M", "2.5B", "0.0015", "2e−5", "-1.2k"]
    assert found["nearest"] == [[0, 1, 2, 3, 3], [0, 0, 0, 0, 0], [0, 2, 2, 2, 2]]
