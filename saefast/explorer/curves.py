"""The curves of a run: its metrics.jsonl, read while the run still writes to it, and thinned to what a chart can show.

Needs NumPy alone, so that a page is served without waiting for torch.
"""

import itertools
import json
import math
import os
import threading
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from saefast.errors import InputError

# As training.progress calls it, which cannot be imported without torch.
METRICS = "metrics.jsonl"
# Points of a curve that a chart as wide as a screen can tell apart.
MOST_POINTS = 1200


class Read(NamedTuple):
    """What a reading of the file found.

    Attributes:
        generation: another number whenever lines that were read before are no longer there.
        since: the first line that is told, 0 for the first of all. lines: how many there are.
        unreadable: lines that are no figures of a step, which are left out.
        curves: of each name the tokens and the values of the lines told, float64, where the line has a value.
        last: all figures of the last line, those that are no finite numbers left out.
        written: when the file was last written to, seconds since 1970; interval: seconds between its last two lines.
    """

    generation: int
    since: int
    lines: int
    unreadable: int
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    last: dict[str, float]
    written: float
    interval: float


class Curves:
    """The figures of a run's metrics.jsonl; every line is parsed once, however often it is asked for.

    A last line without its end is left for the next reading. A file that was cut, as by a run that is resumed, is read
    anew. Lines of a step that had come before take the place of those from that step on. For several threads.

    Args:
        folder: of the run; the file need not be there.
        names: the figures to keep.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.path = folder / METRICS
        self._names = tuple(names)
        self._lock = threading.Lock()
        self._generation = 0
        self._forget()

    def read(self, generation: int = -1, since: int = 0) -> Read:
        """The lines from `since` on, or all of them where `generation` is no longer the file's."""
        with self._lock:
            self._catch_up()
            lines = len(self._steps)
            first = since if generation == self._generation and 0 <= since <= lines else 0
            tokens = np.array(self._tokens[first:], np.float64)
            curves = {name: _finite(tokens, np.array(self._values[name][first:], np.float64)) for name in self._names}
            told = (self._generation, first, lines, self._unreadable, curves)
            return Read(*told, dict(self._last), self._written, self._interval)

    def _forget(self) -> None:
        self._generation += 1
        self._steps, self._tokens = array("d"), array("d")
        self._values = {name: array("d") for name in self._names}
        self._last: dict[str, float] = {}
        self._unreadable = 0
        self._written = self._interval = 0.0
        # Where the lines that are read end, and the last of them, by which a file that was written anew is told.
        self._end, self._tail = 0, b""

    def _catch_up(self) -> None:
        # A pipe of that name would be waited for.
        if not self.path.is_file():
            if self._end:
                self._forget()
            return
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}") from None
        with file:
            self._written = os.fstat(file.fileno()).st_mtime
            file.seek(self._end - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._forget()
                file.seek(0)
            for raw in _whole_lines(file):
                self._end, self._tail = self._end + len(raw), raw
                self._add(raw)

    def _add(self, raw: bytes) -> None:
        figures = _figures(raw)
        if "step" not in figures or "tokens" not in figures:
            self._unreadable += 1
            return
        if self._steps and figures["step"] <= self._steps[-1]:
            self._cut(figures["step"])
        self._steps.append(figures["step"])
        self._tokens.append(figures["tokens"])
        for name, values in self._values.items():
            values.append(figures.get(name, math.nan))
        self._interval = max(figures.get("seconds", 0.0) - self._last.get("seconds", 0.0), 0.0)
        self._last = figures

    def _cut(self, step: float) -> None:
        """Takes away the lines from a step on."""
        keep = int(np.searchsorted(np.array(self._steps, np.float64), step))
        for column in (self._steps, self._tokens, *self._values.values()):
            del column[keep:]
        self._generation += 1


def thinned(xs: np.ndarray, ys: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points that draw the same picture: the lowest and the highest of each of most // 2 stretches.

    Args:
        xs, ys: (n,) float64.
    """
    if len(xs) <= most:
        return xs, ys
    bounds = np.linspace(0, len(xs), most // 2 + 1).astype(np.int64).tolist()
    places = [
        first + at
        for first, last in itertools.pairwise(bounds)
        for at in sorted({int(ys[first:last].argmin()), int(ys[first:last].argmax())})
    ]
    # The last point is what people look at first.
    places[-1] = len(xs) - 1
    return xs[places], ys[places]


def numbers(values: np.ndarray, digits: int = 6) -> list[float]:
    """Finite numbers with as many digits as a chart can show, for JSON."""
    return [float(f"{value:.{digits}g}") for value in values.tolist()]


def _finite(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    there = np.isfinite(ys)
    return xs[there], ys[there]


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; not a last one that is still being written."""
    for raw in file:
        if not raw.endswith(b"\n"):
            return
        yield raw


def _figures(raw: bytes) -> dict[str, float]:
    """The finite numbers of a line; none of one that is damaged."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    found = {name: finite(value) for name, value in line.items()} if isinstance(line, dict) else {}
    return {name: value for name, value in found.items() if value is not None}


def finite(value: Any) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
