"""Captures the launches of test files, each file in a process that interprets, and replays them here as PTX."""

import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from ptx.child import ROOT, environment
from ptx.mutate import Tally, subjects, tried
from ptx.replay import Outcome, load, replay

# What a test file imports if it launches kernels in the interpreter.
LAUNCHERS = ("import interp", "rows_triton")


# The first architecture that has descriptors; on others no driver launches one.
TMA = 90


def launching_files() -> list[Path]:
    """Those that may launch kernels in the interpreter."""
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [file for file in found if any(name in file.read_text() for name in LAUNCHERS)]


def captured(files: Iterable[Path | str], folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs test files as ever, the plugin in `ptx.capture` beside them. more: arguments to pytest."""
    wanted = environment(TRITON_INTERPRET="1", SAEFAST_PTX_LAUNCHES=str(folder), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "ptx.capture", "-p", "no:cacheprovider"]
    command += ["-p", "no:xdist", "-m", "not gpu and not peers", *map(str, files), *more]
    return subprocess.run(command, env=wanted, cwd=ROOT, capture_output=True, text=True)


def _replay(job: tuple[Path, int]) -> Outcome | None:
    torch.set_num_threads(1)
    file, sm = job
    launch = load(file)
    if sm < TMA and any(a.kind == "descriptor" for a in launch.call.arguments.values()):
        return None
    outcome = replay(launch, sm)
    outcome.file = file.name
    return outcome


def replayed(folder: Path, architectures: Iterable[int], jobs: int) -> Iterator[Outcome]:
    """Every launch in a folder, in any order."""
    work = [(file, sm) for file in sorted(folder.glob("*.pickle")) for sm in architectures]
    if jobs == 1:
        yield from filter(None, map(_replay, work))
        return
    # Not forked: this process has threads.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        yield from filter(None, pool.map(_replay, work, chunksize=4))


@dataclass
class Row:
    """What became of one kernel's launches on one architecture."""

    kernel: str
    sm: int
    launches: int = 0
    equal: int = 0
    """Bit by bit."""
    close: int = 0
    """Within what rounding explains."""
    failed: int = 0
    faults: int = 0
    formal: int = 0
    share: float = 0
    """The largest difference over what is allowed."""
    instructions: int = 0
    seconds: float = 0

    def add(self, o: Outcome) -> None:
        self.launches += 1
        self.equal += not o.problem and not o.gaps
        self.close += not o.problem and bool(o.gaps)
        self.failed += bool(o.problem)
        self.faults += len(o.faults)
        self.formal += o.formal
        self.share = max([self.share, *(g.share for g in o.gaps.values())])
        self.instructions += o.steps
        self.seconds += o.seconds


def _experiment(sm: int) -> list[Tally]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return [tried(subject) for subject in subjects(sm)]


def experimented(architectures: Iterable[int], jobs: int) -> list[Tally]:
    """Everything that can be taken out of a launch of each kernel, one at a time."""
    if jobs == 1:
        return [tally for sm in architectures for tally in _experiment(sm)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return [tally for tallies in pool.map(_experiment, architectures) for tally in tallies]


def table(outcomes: Iterable[Outcome]) -> list[Row]:
    rows: dict[tuple[str, int], Row] = {}
    for o in outcomes:
        rows.setdefault((o.kernel, o.sm), Row(o.kernel, o.sm)).add(o)
    return [rows[key] for key in sorted(rows)]
