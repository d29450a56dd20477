"""Measurements as lines of JSON in one file, on the disk as soon as they are known.

`bench.gpu` names the file, the stage and a list of what was begun in its stages' environments; a benchmark started by
hand has none of these and `record` does nothing. Whatever ends a process, the lines written before it stay.
"""

import json
import math
import os
import time
import traceback
from pathlib import Path
from typing import Any

FILE, STAGE, BEGUN = "SAEFAST_BENCH_LINES", "SAEFAST_BENCH_STAGE", "SAEFAST_BENCH_BEGUN"
# Said in every line where it is set: a rehearsal's figures must not be taken for a GPU's.
DEVICE = "SAEFAST_BENCH_DEVICE"
# Exit code of a process that can measure no more but has written down why: its CUDA context is lost.
LOST = 86
FRAMES = 6


def append(path: Path, line: dict[str, Any]) -> None:
    """One write, then a flush to the disk; two processes' lines do not mix, since the file is open for appending."""
    data = (json.dumps(strict(line), allow_nan=False, default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def strict(value: Any) -> Any:
    """The same with numbers that JSON does not know as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): strict(inner) for key, inner in value.items()}
    return [strict(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def record(case: str, outcome: str = "ok", **fields: Any) -> None:
    """A line of the stage this process runs, where it runs one."""
    if path := os.environ.get(FILE):
        device = {"device": os.environ[DEVICE]} if DEVICE in os.environ else {}
        head = {"time": now(), "stage": os.environ.get(STAGE), "case": case, "outcome": outcome}
        append(Path(path), head | device | fields)


def record_failure(case: str, error: BaseException) -> None:
    record(case, "failed", **described(error))


def described(error: BaseException) -> dict[str, Any]:
    """Type, message and the last frames, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-FRAMES:]
    where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames]
    return {"error": type(error).__name__, "message": str(error)[:2000], "traceback": where}


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def begin(case: str) -> None:
    """Notes that a case is begun: should the process die, this is the one at fault, and it is not begun again."""
    if path := os.environ.get(BEGUN):
        with open(path, "a") as file:
            file.write(case + "\n")


def begun(path: str | Path | None = None) -> list[str]:
    """Cases begun so far by this stage's processes, in order."""
    path = path or os.environ.get(BEGUN)
    return Path(path).read_text().splitlines() if path and Path(path).exists() else []


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; what a process left half written is passed over."""
    found = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def end_line(path: Path) -> None:
    """Ends a line that a process left half written, so that the next one begins afresh."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
