"""Pictures of a run as PNG files: training curves, densities of the latents, telling latents in their contexts.

matplotlib is imported where a picture is drawn, without a display.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from saefast.analysis.page import Shown
from saefast.errors import InputError
from saefast.files import replacing
from saefast.latents.database import Example
from saefast.metrics.streaming import density_histogram
from saefast.readable import visible

BLUE, ORANGE, GREY, INK = "#2a6fbb", "#d9730d", "#9aa3ad", "#22272e"
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of width × height inches, written to `path` when the block ends.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise InputError("matplotlib is not installed: pip install 'saefast[demo]'") from None
    figure_class = importlib.import_module("matplotlib.figure").Figure
    with matplotlib.rc_context(_STYLE):
        # A bare Figure draws with Agg and touches no global state, so no window system is asked for.
        made = figure_class(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
        yield made
        with replacing(path) as temporary:
            made.savefig(temporary, format="png")


def draw_curves(lines: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Loss, fraction of variance unexplained, and silent latents over training, from the lines of metrics.jsonl."""
    with figure(path, 11, 3.6) as fig:
        loss, fvu, dead = fig.subplots(1, 3, width_ratios=[1, 1.25, 0.9])
        if title:
            fig.suptitle(title, fontsize=10, x=0.01, ha="left")
        _series(loss, lines, "losses/overall_loss", BLUE, None)
        loss.set(title="Loss", ylabel="loss per batch")
        _series(fvu, lines, "fvu", BLUE, "training batches")
        held = _series(fvu, lines, "heldout/fvu", ORANGE, "held-out rows", marker="o")
        fvu.set(title="Fraction of variance unexplained", ylabel="FVU")
        if held:
            _end_label(fvu, *held, ORANGE)
            fvu.legend(loc="upper right")
        for axis in (loss, fvu):
            if all(y > 0 for line in axis.lines for y in line.get_ydata()):
                _log_axis(axis)
        _series(dead, lines, "sparsity/silent_share", BLUE, "silent of late", scale=100)
        _series(dead, lines, "sparsity/never_fired_share", ORANGE, "never fired", scale=100)
        _series(dead, lines, "dead_share", GREY, "dead", scale=100)
        dead.set(title="Latents that do not fire", ylabel="% of latents")
        dead.legend(loc="upper right")
        dead.set_ylim(0, max(1.0, dead.get_ylim()[1]))
        for axis in (loss, fvu, dead):
            axis.set_xlabel("tokens")
            axis.xaxis.set_major_formatter(_short_number)
            axis.set_xlim(left=0)


def draw_density(counts: Tensor, n_rows: int, path: Path) -> None:
    """Histogram of firing densities on a log axis. counts (L,) int64: rows each latent fired on, of n_rows."""
    edges, heights, never = density_histogram(counts, n_rows)
    first = next((i for i, h in enumerate(heights) if h), 0)
    edges, heights = edges[first:], heights[first:]
    n_latents = len(counts)
    dense = int((counts > 0.01 * n_rows).sum())
    with figure(path, 7.5, 4.2) as fig:
        axis = fig.subplots()
        width = edges[1] - edges[0]
        colours = [ORANGE if edge >= -2 - 1e-9 else BLUE for edge in edges[:-1]]
        axis.bar(edges[:-1], heights, width=width, align="edge", color=colours, edgecolor="white", linewidth=0.6)
        mean = float(counts.sum()) / max(n_rows, 1) / n_latents
        if mean > 0:
            place = _log10(mean)
            axis.axvline(place, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axis.annotate(
                f"mean {mean:.2%}", (place, 1), xycoords=("data", "axes fraction"), xytext=(4, -2),
                textcoords="offset points", va="top", fontsize=9,
            )  # fmt: skip
        axis.set(
            title=f"How often each of {n_latents:,} latents fires",
            xlabel=f"share of tokens a latent fires on (of {n_rows:,} held-out tokens)",
            ylabel="latents",
        )
        decades = range(int(edges[0] // 1), 1)
        axis.set_xticks(list(decades), [_percent(10.0**d) for d in decades])
        axis.set_xlim(min(edges[0], -4), 0)
        axis.grid(axis="x", visible=False)
        notes = f"{never:,} never fired ({never / n_latents:.1%})\n{dense:,} fire on more than 1% of tokens"
        notes += f"\nL0 {float(counts.sum()) / max(n_rows, 1):.1f}"
        axis.text(0.985, 0.86, notes, transform=axis.transAxes, ha="right", va="top", fontsize=9, linespacing=1.5)


def _series(
    axis: Any,
    lines: Sequence[dict[str, Any]],
    name: str,
    colour: str,
    label: str | None,
    marker: str = "",
    scale: float = 1,
) -> tuple[float, float] | None:
    """Draws one figure of metrics.jsonl over tokens; its last point, or None where no line has it."""
    points = [(line["tokens"], scale * line[name]) for line in lines if line.get(name) is not None]
    if not points:
        return None
    xs, ys = zip(*points, strict=True)
    axis.plot(xs, ys, color=colour, label=label, marker=marker, markersize=3.5)
    return points[-1]


def _end_label(axis: Any, x: float, y: float, colour: str) -> None:
    place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "right", "va": "bottom"}
    axis.annotate(f"{y:.3f}", (x, y), color=colour, fontsize=10, fontweight="bold", **place)


def _log_axis(axis: Any) -> None:
    """A log axis with plain numbers at 1, 2, 5 of each decade."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def _short_number(x: float, _position: int = 0) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:g}%"


def _log10(value: float) -> float:
    return float(importlib.import_module("math").log10(value))


# A page of monospaced text: characters a line, lines of context a latent, and a cell's size in inches.
_COLUMNS, _CONTEXTS, _CELL = 124, 3, (0.0715, 0.175)


def draw_features(features: Sequence[Shown], path: Path, title: str) -> list[Path]:
    """Some latents as a picture, tokens shaded. -> [path]"""
    per_latent = _CONTEXTS + 2.3
    height = _CELL[1] * (3.2 + per_latent * max(len(features), 1))
    with figure(path, _CELL[0] * (_COLUMNS + 4), height) as fig:
        fig.set_layout_engine("none")
        axis = fig.add_axes((0, 0, 1, 1))
        axis.set(xlim=(-2, _COLUMNS + 2), ylim=(height / _CELL[1], 0))
        axis.axis("off")
        axis.text(0, 1.2, title, fontsize=12, fontweight="bold", va="center")
        for number, feature in enumerate(features):
            _draw_feature(axis, feature, 3.2 + number * per_latent)
    return [path]


def _draw_feature(axis: Any, feature: Shown, top: float) -> None:
    mono = {"family": "DejaVu Sans Mono", "fontsize": 8.55, "va": "center"}
    tokens, latent = "", feature.latent
    for token in feature.tokens:
        part = f"{visible(token.text)} {token.share:.0%}   "
        if len(tokens) + len(part) > _COLUMNS - 44:
            break
        tokens += part
    axis.axhline(top - 0.75, color="#e1e4e8", linewidth=0.8)
    axis.text(0, top, _plain(tokens), color=BLUE, fontweight="bold", **mono)
    facts = f"latent {latent.latent}, on {latent.density:.2%} of rows"
    axis.text(_COLUMNS, top, facts, color=GREY, ha="right", **mono)
    for line, example in enumerate(feature.strongest[:_CONTEXTS], start=1):
        _draw_context(axis, example, latent.max_act, top + 0.1 + line, mono)


def _draw_context(axis: Any, example: Example, max_act: float, y: float, mono: dict[str, Any]) -> None:
    """One line of context, the firing token in the middle of the page."""
    patches = importlib.import_module("matplotlib.patches")
    texts = [visible(piece) for piece in example.context.pieces]
    x = _COLUMNS // 2 - sum(map(len, texts[: example.peak]))
    for place, (text, act) in enumerate(zip(texts, example.acts.tolist(), strict=True)):
        shown = text if x >= 0 else text[-x:] if x + len(text) > 0 else ""
        left = max(x, 0)
        shown = shown[: _COLUMNS - left] if left < _COLUMNS else ""
        if act > 0 and shown.strip():
            lead = len(shown) - len(shown.lstrip())
            box = (left + lead - 0.1, y - 0.46), len(shown.strip()) + 0.2, 0.92
            axis.add_patch(patches.Rectangle(*box, color=ORANGE, alpha=0.15 + 0.6 * min(act / max_act, 1), linewidth=0))
        weight = "bold" if place == example.peak else "normal"
        axis.text(left, y, _plain(shown), fontweight=weight, **mono)
        x += len(text)


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is: a $ would begin a formula."""
    return text.replace("$", r"\$")
