"""The tables of `make ptx`, as JSON that is kept and as Markdown in docs/ptx.md."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ptx.child import ROOT

KEPT, PAGE = ROOT / "docs" / "ptx.json", ROOT / "docs" / "ptx.md"
# Around what is written by the command.
BEGIN, END = "<!-- written by make ptx -->", "<!-- end -->"


def as_data(rows: Iterable[Any], tallies: Iterable[Any]) -> dict[str, Any]:
    """What is kept: nothing that differs from run to run or from machine to machine."""
    launches = [{k: v for k, v in asdict(row).items() if k not in ("seconds", "instructions")} for row in rows]
    experiments = [
        dict(kernel=t.kernel, sm=t.sm, kind=kind, verdict=verdict, count=n)
        for t in tallies
        for (kind, verdict), n in sorted(t.found.items())
    ]
    return {"launches": launches, "experiments": experiments}


def markdown(found: dict[str, Any]) -> str:
    lines = [
        "| kernel | sm | launches | equal to the bit | within rounding | failed | faults | races without effect |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = ("kernel", "sm", "launches", "equal", "close", "failed", "faults", "formal")
    lines += ["| " + " | ".join(str(row[n]) for n in names) + " |" for row in found["launches"]]
    lines += ["", *experiments(found["experiments"])]
    return "\n".join(lines)


def experiments(found: list[dict[str, Any]]) -> list[str]:
    """By architecture and what was taken out."""
    lines = ["| sm | taken out | times | caught | changes nothing | missed |", "|---|---|---|---|---|---|"]
    for sm, kind in sorted({(e["sm"], e["kind"]) for e in found}):
        mine = [e for e in found if (e["sm"], e["kind"]) == (sm, kind)]
        counts = [count(mine, verdict) for verdict in ("caught", "redundant", "missed")]
        lines.append(f"| {sm} | `{kind}` | {sum(counts)} | " + " | ".join(map(str, counts)) + " |")
    caught, total = count(found, "caught"), sum(e["count"] for e in found)
    lines += ["", f"Caught: {caught} of {total}; missed: {count(found, 'missed')}."]
    return lines


def count(found: Iterable[dict[str, Any]], verdict: str) -> int:
    return sum(e["count"] for e in found if e["verdict"] == verdict)


def page(text: str, found: dict[str, Any]) -> str:
    """A page with its tables renewed."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{markdown(found)}\n{END}{rest.partition(END)[2]}"


def write(found: dict[str, Any]) -> None:
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
