"""A child process and its memory, looked at many times a second, while it says which step it is at."""

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bench.common import ROOT

EVERY = 0.02


class Step(NamedTuple):
    """A step of a child: seconds; the most memory that it had resident, and of that what is no file's, in bytes."""

    name: str
    seconds: float
    resident: int
    anonymous: int


def steps_of(module: str, *arguments: str) -> list[Step]:
    """Runs `python -m module arguments`, which prints the name of each step as it begins.

    Pages of files that are mapped count as resident, although the system takes them back as it needs.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
        encoding="utf-8",
    )
    begun: list[tuple[str, float]] = [("start", time.perf_counter())]

    def read() -> None:
        assert child.stdout is not None
        begun.extend((line.strip(), time.perf_counter()) for line in child.stdout)

    reader = threading.Thread(target=read)
    reader.start()
    most: dict[int, tuple[int, int]] = {}
    while child.poll() is None:
        at = len(begun) - 1
        most[at] = tuple(map(max, zip(most.get(at, (0, 0)), _memory(child.pid), strict=True)))  # type: ignore[assignment]
        time.sleep(EVERY)
    reader.join()
    if child.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed")
    ends = [when for _, when in begun[1:]] + [time.perf_counter()]
    return [
        Step(name, end - when, *most.get(at, (0, 0)))
        for at, ((name, when), end) in enumerate(zip(begun, ends, strict=True))
    ]


def _memory(pid: int) -> Sequence[int]:
    """Bytes: resident, and anonymous; zeros once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    found = {
        name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines) if " kB" in rest
    }
    return found.get("VmRSS", 0), found.get("RssAnon", 0)
