"""The table of `bench.recipe`: per cell the default, the best found and the peers; and what has to hold of them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from bench.recipe_cells import LIKE_DEFAULT, Cell

Result = Mapping[str, Any]

WORSE_THAN_BEST, SILENT, WORSE_THAN_SMALLER, WORSE_THAN_DEFAULT = 1.05, 0.02, 1.02, 1.05
# Tokens for each latent's share of the code from which on latents have had time to come alive.
TOKENS_A_LATENT = 1000
PEERS = ("SAELens", "sparsify", "dictionary_learning")
BEGIN, END = "<!-- made by python -m bench.recipe -->", "<!-- end of what it made -->"


def newest(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Without what a later result of the same has taken the place of; an earlier default is one of the variants now."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        asked = result["asked"]
        if asked["what"] == "default":
            key = ("default", result["cell"])
            if (before := found.get(json.dumps(key))) is not None:
                found[json.dumps([key, before["settings"]])] = before | {"name": "an earlier default"}
        elif asked["what"] == "peer":
            key = ("peer", result["cell"], asked["peer"], asked["as"])
        else:
            key = ("variant", result["cell"], asked)
        found[json.dumps(key)] = dict(result)
    return list(found.values())


def summary(results: Sequence[Result]) -> dict[str, list[dict[str, Any]]]:
    """{"cells": a row each, "peers": a row each that has some, "checks": what has to hold, and whether it does}."""
    cells: dict[Cell, list[Result]] = {}
    for result in results:
        cells.setdefault(Cell(**result["cell"]), []).append(result)
    # A cell counts once its default is there.
    cells = {cell: cells[cell] for cell in sorted(cells) if any(r["name"] == "default" for r in cells[cell])}
    rows = [_cell_row(cell, found) for cell, found in cells.items()]
    peers = [row for cell, found in cells.items() if (row := _peer_row(cell, found))]
    return {"cells": rows, "peers": peers, "checks": checks(rows, peers)}


def _named(cell: Cell) -> dict[str, Any]:
    return {"rows": cell.kind, "latents": cell.n_latents, "k": cell.k, "tokens": cell.tokens, "seed": cell.seed}


def _default(found: Sequence[Result]) -> Result:
    return next(result for result in found if result["name"] == "default")


def _cell_row(cell: Cell, found: Sequence[Result]) -> dict[str, Any]:
    default = _default(found)
    ours = [result for result in found if result["asked"]["what"] != "peer" and "fvu" in result]
    best = min(ours, key=lambda result: float(result["fvu"]), default=default)
    settings, fvu = default["settings"], default.get("fvu", float("inf"))
    return _named(cell) | {
        "batch": settings["batch_size"],
        "lr": settings["lr"],
        "FVU": fvu,
        "best": best.get("fvu", float("inf")),
        "best is": best["name"],
        "FVU / best": fvu / best["fvu"] if "fvu" in best else 1.0,
        **{
            f"{result['name']} / FVU": result.get("fvu", float("inf")) / fvu
            for result in found
            if result["name"] in LIKE_DEFAULT
        },
        "runs": len([result for result in found if result["asked"]["what"] != "peer"]),
        "silent": default.get("silent", 1.0),
        "silent in training": default.get("silent_in_training"),
        "CPU seconds": default["cpu_seconds"],
    }


def _peer_row(cell: Cell, found: Sequence[Result]) -> dict[str, Any] | None:
    ours = _default(found).get("fvu", float("inf"))
    by = {(r["asked"]["peer"], r["asked"]["as"]): r for r in found if r["asked"]["what"] == "peer"}
    if not by:
        return None
    row = _named(cell) | {"FVU": ours}
    for peer in PEERS:
        for what in ("tokens", "time"):
            result = by.get((peer, what))
            if result is not None:
                # A run that its package could not finish explains nothing.
                fvu = result.get("fvu", float("inf"))
                row |= {f"{peer}, same {what}": fvu, f"{peer}, same {what} / ours": fvu / ours}
                row[f"{peer}, same {what}, source"] = result["source"]
                row[f"{peer}, same {what}, tokens"] = result.get("tokens")
    return row


def checks(rows: Sequence[Result], peers: Sequence[Result]) -> list[dict[str, Any]]:
    """Each with the cell that comes closest to breaking it, and the figure there."""
    near = [(row["FVU / best"], _where(row)) for row in rows]
    alive = [
        (row["silent"], _where(row)) for row in rows if row["tokens"] >= TOKENS_A_LATENT * row["latents"] / row["k"]
    ]
    larger = [
        (large["FVU"] / small["FVU"], f"{_where(large)} against L {small['latents']:,}")
        for large, small in permutations(rows, 2)
        if large["latents"] > small["latents"]
        and all(large[name] == small[name] for name in ("rows", "k", "tokens", "seed"))
    ]
    found = [
        _check(f"FVU of the default ≤ {WORSE_THAN_BEST} × the best found", near, WORSE_THAN_BEST),
        _check(f"silent on held-out rows ≤ {SILENT:.0%} where tokens ≥ {TOKENS_A_LATENT} · L / k", alive, SILENT),
        _check(f"FVU of a larger dictionary ≤ {WORSE_THAN_SMALLER} × a smaller one's", larger, WORSE_THAN_SMALLER),
    ]
    for name in LIKE_DEFAULT:
        like = [(row[f"{name} / FVU"], _where(row)) for row in rows if f"{name} / FVU" in row]
        found.append(_check(f"FVU with {name} ≤ {WORSE_THAN_DEFAULT} × the default's", like, WORSE_THAN_DEFAULT))
    for what in ("tokens", "time"):
        names = [f"{peer}, same {what}" for peer in PEERS]
        # Ours over theirs, so that the largest is the nearest here too.
        closest = [(row["FVU"] / row[name], f"{_where(row)}: {name}") for row in peers for name in names if name in row]
        found.append(_check(f"FVU of the default below every peer's default, same {what}: ratio < 1", closest, 1.0))
    return [check for check in found if check is not None]


def _check(what: str, figures: Sequence[tuple[float, str]], limit: float) -> dict[str, Any] | None:
    if not figures:
        return None
    worst, where = max(figures)
    holds = worst < limit if "<" in what else worst <= limit
    return {"check": what, "holds": holds, "found": worst, "where": where, "of": len(figures)}


def _where(row: Result) -> str:
    return Cell(row["rows"], row["latents"], row["k"], row["tokens"], row["seed"]).label


def markdown(table: Mapping[str, Sequence[Result]]) -> str:
    parts = [_lines(CELL_COLUMNS, table["cells"])]
    if table["peers"]:
        parts += [PEER_NOTE, _lines(_peer_columns(table["peers"]), table["peers"])]
    said = []
    for check in table["checks"]:
        mark = "holds" if check["holds"] else "**does not hold**"
        said.append(f"- {check['check']}: {mark} at {check['of']}; nearest {check['found']:.3g} ({check['where']})")
    return "\n\n".join([CELL_NOTE, *parts, "\n".join(said)]) + "\n"


CELL_NOTE = (
    "The default at each cell that was run, and the best of all settings that were tried there (of how many). Silent: "
    "latents that no held-out row (of up to 20,000) fires, and those that did not fire in the last half of the run. "
    "CPU s: processor time of the whole run."
)
PEER_NOTE = (
    "Peers' defaults: held-out FVU, and how many times ours; p: the peer's recipe in our engine, which the tests hold "
    "equal to its package, else the package itself. Same time: as many tokens (in millions) as the package trained on, "
    "its imports not counted, in the processor time that our whole run took. Batches are the packages' own defaults: "
    "4096 tokens (SAELens), 8192 (dictionary_learning), 32 sequences (sparsify, here of 128 tokens). "
    "dictionary_learning warms up for 1000 steps, longer than these runs, and is told of a longer one: its trainer "
    "refuses any that is shorter. sparsify is always its package: that trains with signum, our preset with Adam. –: "
    "the package's step does not fit this machine's 24 GiB."
)
CELL_COLUMNS = {
    "rows": lambda row: row["rows"],
    "latents": lambda row: f"{row['latents']:,}",
    "k": lambda row: str(row["k"]),
    "tokens": lambda row: f"{row['tokens'] / 1e6:g}M",
    "seed": lambda row: str(row["seed"]),
    "batch": lambda row: f"{row['batch']:,}",
    "lr": lambda row: f"{row['lr']:.2g}",
    "FVU": lambda row: f"**{row['FVU']:.4f}**",
    "best found": lambda row: f"{row['best']:.4f}",
    "which is": lambda row: f"{row['best is']} (of {row['runs']})",
    "FVU / best": lambda row: f"{row['FVU / best']:.3f}",
    "silent, held out": lambda row: f"{row['silent']:.1%}",
    "in training": lambda row: "–" if row["silent in training"] is None else f"{row['silent in training']:.1%}",
    "CPU s": lambda row: f"{row['CPU seconds']:.0f}",
}


def _peer_columns(rows: Sequence[Result]) -> dict[str, Any]:
    def column(name: str, timed: bool) -> Any:
        def cell(row: Result) -> str:
            if name not in row:
                return "–"
            mark = " p" * (row[f"{name}, source"] == "preset")
            tokens = f", {row[f'{name}, tokens'] / 1e6:.2g}M" if timed and row[f"{name}, tokens"] else ""
            return f"{row[name]:.3f} ({row[f'{name} / ours']:.1f}×{tokens}){mark}"

        return cell

    named = {name: CELL_COLUMNS[name] for name in ("rows", "latents", "k", "tokens", "seed", "FVU")}
    return named | {
        f"{peer}, same {what}": column(f"{peer}, same {what}", what == "time")
        for what in ("tokens", "time")
        for peer in PEERS
    }


def _lines(columns: Mapping[str, Any], rows: Sequence[Result]) -> str:
    table = [list(columns), ["---"] * len(columns), *([show(row) for show in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def page(table: Mapping[str, Sequence[Result]], path: Path) -> None:
    """Puts the table on a page, between its marks; the rest of the page stays."""
    text = path.read_text(encoding="utf-8") if path.exists() else f"# The default recipe\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path} needs the lines {BEGIN} and {END}, to put the table between")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{BEGIN}\n\n{markdown(table)}\n{END}{after}", encoding="utf-8")
