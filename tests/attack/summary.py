"""The attack's figures: counted by part, subject and outcome, kept in a JSON file, shown as a table."""

import json
import platform
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attack.outcome import FAULTS, GOOD
from attack.pool import ROOT

ORDER = ("kill", "fuzz", "formats", "latents", "arguments", "soak")


@dataclass(frozen=True)
class Row:
    """One case: what was attacked, what came of it, how in one line, and the command that does it again.

    count: cases that this one stands for; a killed run stands for its kills.
    """

    subject: str
    outcome: str
    what: str = ""
    detail: str = ""
    again: str = ""
    count: int = 1


class Results:
    """Counts by part. A part that is run again takes the place of its older figures; the others stay."""

    def __init__(self, file: Path | None, seed: int) -> None:
        self._file, self._seed = file, seed
        self._parts: dict[str, Any] = json.loads(file.read_text())["parts"] if file and file.exists() else {}
        self._counts: dict[str, Counter[str]] = {}
        self._begun = time.monotonic()

    def add(self, part: str, row: Row) -> None:
        self._counts.setdefault(row.subject, Counter())[row.outcome] += row.count

    def finish(self, part: str) -> None:
        """The part is done: its figures, with the commit that they are of."""
        self._parts[part] = {
            "commit": commit(),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "seed": self._seed,
            "seconds": round(time.monotonic() - self._begun),
            "counts": {subject: dict(sorted(counts.items())) for subject, counts in sorted(self._counts.items())},
        }
        self._counts, self._begun = {}, time.monotonic()

    def write(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps({"parts": self._parts}, indent=2) + "\n")
            page = self._file.with_suffix(".md")
            if page.exists():
                page.write_text(with_table(page.read_text(encoding="utf-8"), self.table()), encoding="utf-8")

    def faults(self, parts: list[str]) -> int:
        return sum(
            n
            for part in parts
            for counts in self._parts[part]["counts"].values()
            for k, n in counts.items()
            if k in FAULTS
        )

    def table(self) -> str:
        return table(self._parts)


def table(parts: dict[str, Any]) -> str:
    """Markdown: a line for each part and subject, a column for each outcome that came up and each kind of fault."""
    seen = {name for part in parts.values() for counts in part["counts"].values() for name in counts}
    columns = [name for name in GOOD if name in seen] + list(FAULTS)
    lines = [f"| | cases | {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) + 1)]
    for part, figures in sorted(parts.items(), key=lambda item: ORDER.index(item[0])):
        total: Counter[str] = Counter()
        for counts in figures["counts"].values():
            total.update(counts)
        lines.append(_line(f"**{part}** ({figures['commit']}, {figures['seconds']} s)", total, columns))
        lines += [_line(subject, counts, columns) for subject, counts in figures["counts"].items()]
    return "\n".join(lines)


def with_table(page: str, lines: str) -> str:
    """A page of Markdown with this table between its marks."""
    before, mark, rest = page.partition("<!-- attack -->\n")
    _, end, after = rest.partition("<!-- /attack -->")
    if not (mark and end):
        raise ValueError("the page has no place for the table")
    return f"{before}{mark}{lines}\n{end}{after}"


def _line(subject: str, counts: Any, columns: list[str]) -> str:
    cells = [f"{counts.get(name, 0):,}" for name in columns]
    return f"| {subject} | {sum(counts.values()):,} | {' | '.join(cells)} |"


def commit() -> str:
    """The commit, with a + where tracked files differ from it."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
        return name.strip() + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
