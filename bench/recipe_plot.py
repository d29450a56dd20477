"""The picture of `bench.recipe`: default, best found and peers at each cell, and which features of the world."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.recipe_cells import Cell
from bench.recipe_table import PEERS, Result
from saefast.analysis.plots import BLUE, GREY, INK, ORANGE, figure

COLOURS = {"SAELens": ORANGE, "sparsify": "#3a8f5c", "dictionary_learning": "#8a5fb0"}
MARKS = {"SAELens": "s", "sparsify": "^", "dictionary_learning": "D"}


def draw(table: Mapping[str, Sequence[Result]], results: Sequence[Result], path: Path) -> None:
    """Writes the picture; the right half only where there are cells of the world."""
    worlds = [result for result in results if "world" in result]
    rows = table["cells"]
    height = max(3.6, 1.7 + 0.27 * len(rows))
    with figure(path, 11.5 if worlds else 7.5, height) as fig:
        axes = fig.subplots(1, 2 if worlds else 1, width_ratios=[1.5, 1] if worlds else None, squeeze=False)[0]
        _cells(axes[0], rows, table["peers"])
        if worlds:
            _world(axes[1], worlds)


def _cells(axis: Any, rows: Sequence[Result], peers: Sequence[Result]) -> None:
    places = {_cell(row): place for place, row in enumerate(reversed(rows))}
    for peer in PEERS:
        for what, filled in (("tokens", True), ("time", False)):
            name = f"{peer}, same {what}"
            points = [(row[name], places[_cell(row)]) for row in peers if name in row]
            if points:
                axis.plot(
                    *zip(*points, strict=True), MARKS[peer], color=COLOURS[peer], markersize=5, label=name,
                    markerfacecolor=COLOURS[peer] if filled else "none",
                )  # fmt: skip
    ys = [places[_cell(row)] for row in rows]
    axis.plot([row["FVU"] for row in rows], ys, "o", color=BLUE, markersize=7, label="saefast, nothing set", zorder=3)
    axis.plot([row["best"] for row in rows], ys, "|", color=INK, markersize=13, label="best found", zorder=4)
    axis.set_xscale("log")
    axis.set_yticks(list(places.values()), [_short(cell) for cell in places], fontsize=8)
    axis.set(title="Held-out FVU of defaults", xlabel="fraction of variance unexplained (log scale)")
    _plain_ticks(axis)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[-2:] + handles[:-2], labels[-2:] + labels[:-2], fontsize=7.5, loc="upper center", ncols=4)
    axis.get_legend().set_bbox_to_anchor((0.3, -0.09), transform=axis.transAxes)


def _world(axis: Any, worlds: Sequence[Result]) -> None:
    """The curves of the world's cell with the most tokens among those with peers, else of the one with the most."""
    with_peers = {Cell(**r["cell"]) for r in worlds if r["asked"]["what"] == "peer"}
    cell = max(with_peers or {Cell(**r["cell"]) for r in worlds}, key=lambda cell: (cell.tokens, cell.n_latents))
    for result in (r for r in worlds if Cell(**r["cell"]) == cell):
        asked, found = result["asked"], result["world"]
        if result["name"] == "default":
            style: dict[str, Any] = dict(color=BLUE, linewidth=2.4, zorder=3, label="saefast, nothing set")
        elif asked["what"] == "peer" and asked["as"] == "tokens":
            style = dict(color=COLOURS[asked["peer"]], label=f"{asked['peer']}")
        else:
            continue
        axis.plot([10**p for p in found["log10_p"]], [100 * share for share in found["share"]], **style)
    axis.axvline(1000 / cell.tokens, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate(
        "1000 times\nin the run", (1000 / cell.tokens, 0.45), xycoords=("data", "axes fraction"), xytext=(4, 0),
        textcoords="offset points", fontsize=8, color=INK,
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set(
        title="Features found in a known world", xlabel="how often a feature fires",
        ylabel="% of features with a latent of cosine > 0.9", ylim=(-3, 103),
    )  # fmt: skip
    # Below the axis: every corner of it has a curve in it.
    axis.legend(fontsize=7.5, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False)


def _cell(row: Result) -> Cell:
    return Cell(row["rows"], row["latents"], row["k"], row["tokens"], row["seed"])


def _short(cell: Cell) -> str:
    return cell.label.replace("L ", "").replace(" k ", " k ")


def _plain_ticks(axis: Any) -> None:
    from matplotlib import ticker

    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
