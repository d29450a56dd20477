"""One timing core for all benchmarks: interleaved rounds, medians with their spread, roofline shares, peak memory.

Contenders take turns (A B C A B C …), so that a machine that slows down does so for all of them. On a GPU each call is
timed by events, after L2 was flushed, and where it can be captured as a CUDA graph, so that the host's launches are not
what is measured.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple, TypeVar

import torch

from bench import lines
from saefast import devices

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# Where quick runs write: what is measured in a hurry must not take the place of results that are committed.
QUICK_RESULTS = ROOT / "build" / "bench"

Call = Callable[[], object]


class Spread(NamedTuple):
    """Seconds of one call: the median, and what a fifth of the calls stayed under and over."""

    median: float
    p20: float
    p80: float

    @property
    def ms(self) -> str:
        return f"{self.median * 1e3:.3f} [{self.p20 * 1e3:.3f}, {self.p80 * 1e3:.3f}]"


def spread(seconds: Sequence[float]) -> Spread:
    if len(seconds) < 2:
        return Spread(seconds[0], seconds[0], seconds[0])
    fifths = quantiles(seconds, n=5, method="inclusive")
    return Spread(median(seconds), fifths[0], fifths[3])


def interleaved(calls: Mapping[str, Call], rounds: int) -> dict[str, Spread]:
    """Seconds by the host's clock, in turn, after one call of each to warm up. Calls wait for what they start."""
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: spread(times) for name, times in seconds.items()}


def measure(calls: Mapping[str, Call], device: str, budget: float = 10.0, *, capture: bool = True) -> dict[str, Spread]:
    """Spreads of all calls, in turn, with as many rounds (3 to 100) as take about `budget` seconds.

    On a GPU a call that can be captured is timed as a CUDA graph, unless `capture` is False.
    """
    start = time.perf_counter()
    for call in calls.values():
        call()  # compiles, fills caches
        call()
    synchronize(device)
    rounds = int(min(100, max(3, budget / max(1e-9, (time.perf_counter() - start) / 2))))
    if device != "cuda":
        return interleaved(calls, rounds)
    return _events({name: graphed(call) if capture else call for name, call in calls.items()}, rounds)


def _events(calls: Mapping[str, Call], rounds: int) -> dict[str, Spread]:
    cache = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            cache.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: spread([a.elapsed_time(b) / 1e3 for a, b in pairs]) for name, pairs in events.items()}


def graphed(call: Call) -> Call:
    """The call as a CUDA graph, or as it is where it cannot be captured (it waits for the device, say)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    # The graph writes into what the capture returned, so that has to stay.
    return lambda: (graph.replay(), kept)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(call: Call, device: str) -> int:
    """Memory that a call needs at its worst beyond what was there before it, its result included.

    On a CPU this is growth of resident memory: only a first call in a fresh process shows all of it, because later
    ones find pages that earlier ones left (see `peak_in_child`).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_in_child(module: str, *arguments: str) -> int:
    """peak_bytes as printed last by a fresh `python -m module arguments`."""
    found = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)} failed:\n{found.stderr[-2000:]}")
    return int(found.stdout.split()[-1])


def kind(dtype: torch.dtype, precision: str = "ieee") -> str:
    return "half" if dtype.itemsize == 2 else precision


def share(device: str, operands: str, flops: float, moved: float, seconds: float) -> float | None:
    """The time that large operations would take at the rates of `saefast.devices`, over the time taken.

    None for a device, or a kind of operand, that is not in the table.
    """
    key = devices.find(device_name(device))
    if key is None or (flops and operands not in ("half", "ieee")):
        return None
    known = devices.DEVICES[key]
    rate = known.flops if operands == "half" else known.flops_fp32
    return max(flops / rate, moved / known.bandwidth) / seconds


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    return f"{model.group(1).strip() if model else platform.processor() or 'CPU'} x{torch.get_num_threads()}"


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found | {"cuda": torch.version.cuda}


def write_results(out: Path, device: str, what: str, results: object) -> Path:
    """Writes <out>/<device>-<what>.json: the machine, the versions and the results."""
    path = write_named(out, device_name(device), what, versions(), {"results": results})
    print(f"written: {path}")
    return path


def write_named(out: Path, device: str, what: str, of: Mapping[str, Any], body: Mapping[str, object]) -> Path:
    """The same for a device of this name and versions `of` it, which need not be this machine's."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / file_name(device, what)
    text = json.dumps({"device": device, "what": what, "versions": of, **body}, indent=1)
    path.write_text(text + "\n")
    return path


def file_name(device: str, what: str) -> str:
    """Of the results of a benchmark on a device of this name."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{what}.json"


def print_table(rows: object) -> None:
    """Rows (dicts) under their column names; columns that no row has a value for are left out."""
    table = rows if isinstance(rows, list) else [rows]
    every = dict.fromkeys(name for row in table for name in row)
    names = [name for name in every if any(row.get(name) is not None for row in table)]
    cells = [names, *([_cell(row.get(name)) for name in names] for row in table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def timed_row(
    what: str,
    taken: Spread,
    device: str,
    *,
    operands: str,
    flops: float = 0.0,
    moved: float = 0.0,
    peak: int | None = None,
) -> dict[str, Any]:
    """One contender's line: ms, its rate (TFLOP/s where products dominate, else GB/s), share of the roofline, peak."""
    rate = {"TFLOP/s": flops / taken.median / 1e12} if flops else {"GB/s": moved / taken.median / 1e9}
    of_roof = share(device, operands, flops, moved, taken.median)
    return {
        "what": what,
        "ms [p20, p80]": taken.ms,
        **rate,
        "of roofline": None if of_roof is None else round(of_roof, 3),
        "peak MB": None if peak is None else round(peak / 1e6, 1),
        "seconds": list(taken),
    }


def print_timed(rows: Sequence[Mapping[str, Any]]) -> None:
    print_table([{name: value for name, value in row.items() if name != "seconds"} for row in rows])


def check(device: str, *files: str) -> None:
    """Runs an op's tests, those for the device at hand, and ends the program if one fails."""
    marker = "gpu" if device == "cuda" else "not gpu and not peers"
    tests = [str(ROOT / "tests" / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", marker, *tests]
    # 5 says that no test of these is for this device.
    if subprocess.run(command, cwd=ROOT).returncode not in (0, 5):
        raise SystemExit("the op's own tests fail: its timing means nothing (--no-check skips them)")


Result = TypeVar("Result")


def attempt(case: str, run: Callable[[], Result]) -> Result | None:
    """A case's result, also written as a line where lines are kept; None if it fails: the others go on."""
    try:
        found = run()
    except (Exception, SystemExit) as error:
        lines.record_failure(case, error)
        traceback.print_exc()
        return None
    lines.record(case, result=found)
    return found


def arguments(module: str, description: str | None, argv: Sequence[str] | None, **extra: Any) -> argparse.Namespace:
    """The options all benchmarks share; `extra` maps an option's name to its argparse settings."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(description or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: bench/results, or build/bench with --quick)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter timings")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes: whether it runs, no figures")
    parser.add_argument("--no-check", action="store_true", help="do not run the op's tests first")
    for name, settings in extra.items():
        parser.add_argument(f"--{name}", **settings)
    found = parser.parse_args(argv)
    if found.out is None:
        found.out = QUICK_RESULTS if found.quick or found.rehearse else RESULTS
    return found
