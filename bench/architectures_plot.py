"""The picture of bench.architectures: FVU against L0, a line for each architecture, the dense runs beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saefast.analysis.plots import BLUE, GREY, INK, ORANGE, figure

Line = dict[str, Any]
COLOURS = (BLUE, ORANGE, "#3a8f5c", "#8a5fb0", "#c2405c", "#7a6a4f", "#2aa1a8")
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def draw(lines: Sequence[Line], path: Path, panels: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Writes the picture.

    Args:
        panels: of each, its title and the labels of its architectures.
    """
    curves = {label: [line for line in lines if line["what"] == label] for _, labels in panels for label in labels}
    there = [(title, {label: curves[label] for label in labels if curves[label]}) for title, labels in panels]
    there = [panel for panel in there if panel[1]]
    with figure(path, 4.2 * len(there), 4.4) as fig:
        axes = fig.subplots(1, len(there), squeeze=False)[0]
        for axis, panel in zip(axes, there, strict=True):
            _panel(axis, *panel)
        if len(there) > 1:
            # The first two are judged by the same rows. (sharey would take the limits of the first alone.)
            low, high = zip(*(axis.get_ylim() for axis in axes[:2]), strict=True)
            for axis in axes[:2]:
                axis.set_ylim(min(low), max(high))
        axes[0].set_ylabel("fraction of variance unexplained, held out (log scale)")


def _panel(axis: Any, title: str, curves: dict[str, list[Line]]) -> None:
    ring: dict[str, Any] = dict(linestyle="none", marker="o", markersize=11, markerfacecolor="none")
    for (label, line), colour, mark in zip(curves.items(), COLOURS, MARKS, strict=False):
        points = sorted((one["L0"], one["FVU"]) for one in line)
        axis.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=5, label=label)
        beside = [(one["dense L0"], one["dense FVU"]) for one in line if "dense FVU" in one]
        if beside:
            axis.plot(*zip(*beside, strict=True), color=colour, **ring)
    axis.plot(
        [], [], linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=INK, label="dense torch"
    )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(title=title, xlabel="active latents a token, held out (L0)")
    axis.legend(fontsize=7.5, loc="best")
    _plain(axis)


def _plain(axis: Any) -> None:
    from matplotlib import ticker

    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_locator(ticker.NullLocator())
    axis.grid(color=GREY, alpha=0.25)
