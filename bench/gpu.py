"""`make gpu`, for a CUDA machine: build in place, the tests marked gpu, every benchmark, inside one time limit.

Each step is a process of its own, so that one that crashes or hangs costs its share of the time and nothing else.
Benchmarks are the modules of bench/ with a main(argv) that takes --device, --out and --quick; a new one is found by
itself. Writes <out>/gpu_run.json: the machine, each step's outcome and last lines, and what the benchmarks wrote.
"""

import argparse
import ast
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_BENCHMARKS = {"common", "gpu"}
# The machine ends a command at ten minutes; what is written by then has to be complete.
LIMIT_S = 540.0
TESTS_SHARE = 0.4
# A benchmark may use this many times its even share of what is left, since most need less.
OVERDRAFT = 2.0
TAIL_LINES = 25


@dataclass
class Step:
    name: str
    outcome: str
    seconds: float
    tail: list[str]

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def benchmarks(folder: Path = ROOT / "bench") -> list[str]:
    """Names of the modules that define main, in alphabetical order."""
    names = []
    for path in sorted(folder.glob("*.py")):
        body = ast.parse(path.read_text()).body
        if path.stem not in NOT_BENCHMARKS and any(isinstance(n, ast.FunctionDef) and n.name == "main" for n in body):
            names.append(path.stem)
    return names


def run_step(name: str, command: Sequence[str], seconds: float) -> Step:
    """Runs a command for at most so many seconds; its whole process group ends with it."""
    start = time.monotonic()
    if seconds <= 0:
        return Step(name, "no time left", 0.0, [])
    print(f"--- {name} (at most {seconds:.0f} s)", flush=True)
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
            outcome = "passed" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {seconds:.0f} s"
        finally:
            end_group(process)
        log.seek(0)
        tail = log.read().splitlines()[-TAIL_LINES:]
    print(*tail, sep="\n", flush=True)
    step = Step(name, outcome, round(time.monotonic() - start, 1), tail)
    print(f"--- {name}: {outcome}, {step.seconds} s", flush=True)
    return step


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import torch
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def written(out: Path, since: float) -> dict[str, Any]:
    """The JSON files that the benchmarks left in a folder, by name."""
    results = {}
    for path in sorted(out.glob("*.json")):
        if path.name != "gpu_run.json" and path.stat().st_mtime >= since:
            try:
                results[path.stem] = json.loads(path.read_text())
            except ValueError as error:
                results[path.stem] = f"not readable: {error}"
    return results


def run_all(options: argparse.Namespace, deadline: float) -> list[Step]:
    def left() -> float:
        return deadline - time.monotonic()

    python = sys.executable
    steps = [run_step("build", [python, "setup.py", "build_ext", "--inplace"], min(120.0, left()))]
    if not options.no_tests:
        tests = [python, "-m", "pytest", "-q", "-m", "gpu", "--maxfail=20", "--continue-on-collection-errors"]
        steps.append(run_step("tests", tests, left() * TESTS_SHARE))
    names = [name for name in benchmarks() if not options.only or name in options.only]
    for i, name in enumerate(names):
        command = [python, "-m", f"bench.{name}", "--device", options.device, "--out", str(options.out)]
        share = left() / (len(names) - i) * OVERDRAFT
        steps.append(run_step(name, command + ["--quick"] * options.quick, min(share, left())))
    return steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--device", default="cuda", help="given to the benchmarks")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all of it")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter timings")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these benchmarks only")
    options = parser.parse_args(argv)
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)

    began = time.time()
    steps = run_all(options, time.monotonic() + options.limit)
    report = {"machine": machine(), "steps": [asdict(step) for step in steps], "results": written(options.out, began)}
    path = options.out / "gpu_run.json"
    path.write_text(json.dumps(report, indent=1) + "\n")

    for step in steps:
        print(f"{step.name:<20} {step.seconds:>7.1f} s  {step.outcome}")
    print(f"written: {path}")
    return 0 if all(step.passed for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
