"""make ptx: everything that the tests launch, compiled for sm_80 and sm_90, run on this CPU and compared.

    python -m ptx [--keep FOLDER] [--jobs N] [--write]       # PYTHONPATH=tests:.

Captures the launches of every test file that has some and replays them, takes barriers, waits and fences out of the
kernels one at a time, and runs the tests of tests/ptx/ in full. Prints tables; exits with 1 on any fault, on anything
that does not compile or is not modelled, on a difference beyond what rounding explains, and on an experiment missed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ptx.child import ROOT, environment
from ptx.everything import Row, captured, experimented, launching_files, replayed, table
from ptx.report import as_data, count, markdown, write

ARCHITECTURES = (80, 90)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--keep", type=Path, help="a folder for captured launches; those that are there are used again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes; default: one a core")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/ptx.json and docs/ptx.md")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        rows = launches(options.keep or Path(scratch), options.jobs)
    found = as_data(rows, experimented(ARCHITECTURES, options.jobs))
    print(markdown(found), flush=True)
    if options.write:
        write(found)
    spread = ["-n", str(options.jobs)] if options.jobs > 1 else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, "tests/ptx"]
    tests = subprocess.run(command, env=environment(SAEFAST_PTX="all"), cwd=ROOT)
    print(f"{time.perf_counter() - start:.0f} s")
    return int(any(row.failed for row in rows) or count(found["experiments"], "missed") > 0 or tests.returncode != 0)


def launches(folder: Path, jobs: int) -> list[Row]:
    """The table of all captured launches; what is wrong is printed."""
    if not any(folder.glob("*.pickle")):
        folder.mkdir(parents=True, exist_ok=True)
        for file in launching_files():
            print(f"capturing {file.name}", file=sys.stderr, flush=True)
            child = captured([file], folder)
            # 5: nothing was collected.
            if child.returncode not in (0, 5):
                raise SystemExit(f"{child.stdout[-3000:]}\n{file.name} fails in the interpreter: mend that first")
    outcomes = list(replayed(folder, ARCHITECTURES, jobs))
    for o in outcomes:
        if o.problem:
            print(f"{o.file} sm_{o.sm}: {o.problem}", file=sys.stderr)
    return table(outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
