"""How busy other processes keep this machine."""

import os
import time
from pathlib import Path
from types import TracebackType

_STAT = Path("/proc/stat")
# Of a processor's line in /proc/stat: idle, and waiting for a disk.
_IDLE = (3, 4)


class Watch:
    """While open, counts what processes other than this one take of the cores that this one may use.

    share: their part of those cores' time, from 0 to 1, known once closed; 0 where there is no /proc/stat.
    """

    share = 0.0

    def __enter__(self) -> "Watch":
        self._start = time.perf_counter(), _busy_seconds(), time.process_time()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        begun, busy, own = self._start
        passed = time.perf_counter() - begun
        others = (_busy_seconds() - busy) - (time.process_time() - own)
        self.share = min(max(others / (passed * len(_cores())), 0.0), 1.0)


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _busy_seconds() -> float:
    """Seconds that this process's cores have worked since the machine started, for all processes."""
    if not _STAT.exists():
        return 0.0
    cores, ticks = _cores(), 0
    for line in _STAT.read_text(encoding="ascii").splitlines():
        name, *counts = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            # Guests' time, the last two, is in the user's already.
            ticks += sum(int(n) for place, n in enumerate(counts[:8]) if place not in _IDLE)
    return float(ticks) / os.sysconf("SC_CLK_TCK")
