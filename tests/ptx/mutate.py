"""Would the interpreter notice? One barrier, wait or fence is taken out of a kernel at a time, and it runs again.

caught      a fault is reported
redundant   nothing is reported, and in no order of threads is another byte stored: not needed on these inputs
missed      nothing is reported, yet some order stores another byte
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ptx.build import Binary
from ptx.emulate import Watched, copied, emulated, run
from ptx.launch import ORDERS
from ptx.parse import Program, Unsupported
from ptx.scenes import Sizes, decoding, decoding_csr, encoding, soon, training
from ptx.storage import bytes_of

KINDS = ("bar.sync", "cp.async.wait_group", "wgmma.wait_group", "mbarrier.try_wait", "fence.proxy.async")
# Rows of several warps each, and enough steps through K for every ring of buffers to be used more than once.
WIDE, DEEP, MANY = Sizes(D=768, L=64, K=8, B=4), 352, 100
RUNS, METHODS = ("several prefixes", "lean", "raw rows, clipped"), ("fused", "chunked")
# Programs of a launch that run.
PROGRAMS = 4


def removable(program: Program) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Kind, and numbers of the instructions to take out: of a wait in a loop, the branch too."""
    for i in program.body:
        kind = next((k for k in KINDS if ".".join(i.op).startswith(k)), None)
        if kind == "mbarrier.try_wait":
            yield kind, (i.number, i.number + 1)
        elif kind is not None:
            yield kind, (i.number,)


@dataclass
class Subject:
    """A launch to experiment on."""

    kernel: str
    sm: int
    binary: Binary
    before: dict[str, Any]
    grid: tuple[int, ...]

    def left(self, program: Program, **options: Any) -> tuple[bool, list[np.ndarray], set[int]]:
        """Whether faults are reported, the bytes left behind, and the instructions that ran."""
        given = copied(self.before)
        binary = self.binary._replace(program=program)
        result = run(binary, given, self.grid, programs=PROGRAMS, judge=False, **options)
        tensors = [v for v in given.values() if isinstance(v, torch.Tensor)]
        return bool(result.faults), [bytes_of(t) for t in tensors], result.executed

    def verdict(self, numbers: tuple[int, ...], expected: list[np.ndarray]) -> str:
        program = self.binary.program.without(*numbers)
        try:
            reported, _, _ = self.left(program)
            if reported:
                return "caught"
            for schedule in ORDERS:
                _, found, _ = self.left(program, schedule=schedule)
                if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
                    return "missed"
        except Unsupported:
            # Threads part ways where they never did, or waits end nowhere.
            return "caught"
        return "redundant"

    def trials(self) -> tuple[list[tuple[str, tuple[int, ...]]], list[np.ndarray]]:
        """What can be taken out of the instructions that run, and the bytes to expect."""
        _, expected, executed = self.left(self.binary.program)
        return [(kind, n) for kind, n in removable(self.binary.program) if n[0] in executed], expected


def subjects(sm: int, recipes: tuple[str, ...] = RUNS, methods: tuple[str, ...] = METHODS) -> list[Subject]:
    """Of each kernel that these launch, the launch that runs through the most of what can be taken out."""
    best: dict[str, tuple[int, Subject]] = {}

    def watch(launch: Watched) -> None:
        kernel, most = launch.call.kernel, best.get(launch.call.kernel, (0, None))[0]
        if launch.binary.warps > 1 and sum(1 for _ in removable(launch.binary.program)) > most:
            subject = Subject(kernel, sm, launch.binary, launch.before, launch.grid)
            if (count := len(subject.trials()[0])) > most:
                best[kernel] = count, subject

    with soon(), emulated(sm, watch):
        for recipe in recipes:
            training(recipe, WIDE)()
        for method in methods:
            encoding(torch.bfloat16, method, DEEP, k=MANY)
        decoding()
        decoding_csr()
    return [subject for _, (_, subject) in sorted(best.items())]


@dataclass
class Tally:
    kernel: str
    sm: int
    found: Counter[tuple[str, str]]
    """By kind and verdict."""

    def of(self, verdict: str) -> int:
        return sum(n for (_, v), n in self.found.items() if v == verdict)


def tried(subject: Subject, every: int = 1) -> Tally:
    """All experiments on a launch, or one in `every`, from the first on."""
    trials, expected = subject.trials()
    tally = Tally(subject.kernel, subject.sm, Counter())
    for kind, numbers in trials[::every]:
        tally.found[kind, subject.verdict(numbers, expected)] += 1
    return tally
