"""What a run reports while it goes: metrics.jsonl for programs and plots, a progress bar for the person who waits."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from saefast.errors import InputError
from saefast.files import no_pipe, parse_json, usable
from saefast.schema import check
from saefast.typed import typed

METRICS = "metrics.jsonl"
# Latents that fired on none of the last so many tokens, how many these are, and latents that never fired.
SILENT = ("sparsity/silent_share", "sparsity/silent_tokens", "sparsity/never_fired_share")


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with "step", in ascending order; flushed as it is written.

    Strict JSON: a figure that is NaN or infinite is null.

    Args:
        folder: where the file lies.
        after: lines of later steps are cut off, as is a line that a kill left unfinished: the run goes on from there.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        self.path = folder / METRICS
        self._cut(after)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._last: tuple[int, int] | None = None  # step and place of the last line written here

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line, whole or not at all; one of the same step as the last takes its place. Raises OSError."""
        if self._last is not None and self._last[0] == line["step"]:
            self._file.truncate(self._last[1])
        # Not tell(): in append mode that is the end only after a write.
        size = os.fstat(self._file.fileno()).st_size
        try:
            self._file.write(json.dumps({name: _number(value) for name, value in line.items()}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError:
            # Closing the file writes what its buffer still holds: after that it is cut back to its last whole line.
            self._abandon(size)
            raise
        self._last = (line["step"], size)

    def sync(self) -> None:
        """Puts the lines on the disk, so that a checkpoint never outlives the lines before it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _abandon(self, size: int) -> None:
        with suppress(OSError):
            self._file.close()
        os.truncate(self.path, size)
        self._file = self.path.open("a", encoding="utf-8")

    def _cut(self, after: int) -> None:
        if not self.path.exists():
            return
        keep = 0
        with no_pipe(self.path).open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n") or _step_of(raw) > after:
                    break
                keep += len(raw)
        os.truncate(self.path, keep)


def _number(value: Any) -> Any:
    """NaN and inf become null: JSON has no words for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(raw: bytes) -> float:
    """The step of a line; inf for one that a crash garbled, so that it is cut off."""
    try:
        return int(json.loads(raw)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


@typed
def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl (the file, or the folder it lies in). An unfinished last line is left out.

    Raises:
        InputError: no such file, or a line that is no JSON.
    """
    file = usable(path)
    file = file / METRICS if file.is_dir() else file
    if not file.is_file():
        raise InputError(f"{file} does not exist: expected the folder of a run, holding {METRICS}")
    lines = file.read_bytes().split(b"\n")[:-1]
    places = ((line, f"{file} line {number}") for number, line in enumerate(lines, start=1))
    return [check(parse_json(line, place), dict[str, Any], place) for line, place in places]


def silent(line: Mapping[str, Any]) -> str:
    """The latents that do nothing, of a line of metrics, in words."""
    return f"silent {line['sparsity/silent_share']:.1%} (last {line['sparsity/silent_tokens']:,} tok)"


class Bar:
    """The progress bar: tokens done, tokens/s, loss, FVU, L0 and silent latents. Nothing at all where it is off."""

    def __init__(self, total_tokens: int, done: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total_tokens, initial=done, unit="tok", unit_scale=True, desc="train", leave=True)

    def advance(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(tokens)

    def shorten(self, tokens: int) -> None:
        """The run ends so many tokens earlier than was said."""
        if self._bar is not None:
            self._bar.total -= tokens

    def show(self, line: Mapping[str, Any]) -> None:
        if self._bar is not None:
            shown = f"loss {line['losses/overall_loss']:.4g}, FVU {line['fvu']:.4f}"
            shown += f", L0 {line['metrics/l0']:.1f}, {silent(line)}"
            self._bar.set_postfix_str(shown, refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def bar(total_tokens: int, done: int, shown: bool | None) -> Iterator[Bar]:
    """A progress bar on stderr; `shown` None means only where a person watches (a terminal)."""
    wanted = sys.stderr.isatty() if shown is None else shown
    made = Bar(total_tokens, done, wanted)
    try:
        yield made
    finally:
        made.close()
