"""Runs a grid of a program on a CPU, and says which of its races a GPU would notice."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import reduce
from math import gcd
from typing import Any

import numpy as np

# Every module that adds opcodes.
from ptx import access, arithmetic, lanes, tensorcore, tma  # noqa: F401
from ptx.faults import Fault, Faults
from ptx.machine import FIRST_WINS, WARP, Block, Divergence, Run, Schedule, threads_checked
from ptx.memory import GlobalSpace, Memory
from ptx.operations import HANDLERS
from ptx.parse import Program, parse
from ptx.tma import TensorMap

# Orders of threads that a race is tried in.
ORDERS: tuple[Schedule, ...] = ("rising", "falling", FIRST_WINS, 1, 2)


@dataclass
class Result:
    faults: Faults
    steps: int
    executed: set[int]
    rounds: int
    """Roundings of the longest block."""
    formal: list[Fault] = field(default_factory=list)
    """Races that no order of threads turned into another stored byte."""


def execute(
    ptx: str | Program,
    memory: Memory,
    arguments: Iterable[Any],
    grid: tuple[int, ...],
    warps: int,
    shared: int = 0,
    *,
    schedule: Schedule = None,
    blocks: Collection[tuple[int, int, int]] | None = None,
    poison: Any = None,
) -> Result:
    """Runs a grid; memory is what it leaves behind.

    Args:
        arguments: addresses, numbers and TensorMaps in PTX's order; the sizes and strides behind a map, and trailing
            parameters that Triton adds for scratch, may be left out.
        shared: bytes of shared memory.
        blocks: only these.

    Raises:
        Unsupported: PTX that is not modelled.
    """
    program = parse(ptx) if isinstance(ptx, str) else ptx
    unit, faults = smallest_access(program), Faults()
    words, maps = lay_out(program, list(arguments))
    sizes = (*grid, 1, 1)[:3]
    space = GlobalSpace(memory, unit, faults)
    run = Run(program, space, faults, words, sizes, threads_checked(warps * WARP), shared, unit, schedule, maps=maps)
    run.poison = poison
    if blocks is None:
        blocks = [(x, y, z) for z in range(sizes[2]) for y in range(sizes[1]) for x in range(sizes[0])]
    steps, space.one_block = 0, len(blocks) == 1
    with np.errstate(all="ignore"):
        for n, block in enumerate(blocks):
            space.block = n + 1
            steps += Block(run, block, HANDLERS).execute()
    return Result(faults, steps, run.executed, run.rounds)


def smallest_access(program: Program) -> int:
    """Bytes that every access of a program is a multiple of."""
    sizes = [8]
    for i in program.body:
        if i.op[0] in ("ld", "st") and i.op[1] != "param":
            sizes.append(int("".join(filter(str.isdigit, i.kind))) // 8)
        elif i.op[:2] == ("cp", "async"):
            # A box's element is read on its own; 2 bytes is the smallest that Triton's kernels have.
            sizes.append(2 if "bulk" in i.op else 4)
    return reduce(gcd, sizes)


def lay_out(program: Program, arguments: list[Any]) -> tuple[bytes, dict[int, TensorMap]]:
    """The parameters as bytes, and the tensor maps by their place in them."""
    words, maps, given = b"", {}, iter(arguments)
    sizes = [size for _, size in program.parameters]
    for size in sizes:
        argument = next(given, 0)
        if isinstance(argument, TensorMap):
            maps[len(words)] = argument
            argument = bytes(size)
        words += as_bytes(argument, size)
    return words, maps


def as_bytes(argument: Any, size: int) -> bytes:
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, float):
        return np.float32(argument).tobytes()
    return int(argument).to_bytes(size, "little", signed=int(argument) < 0)


def judged(ptx: str | Program, memory: Memory, arguments: Iterable[Any], **launch: Any) -> Result:
    """`execute`, in other orders of threads where there are races: a race counts if one of them changes a byte."""
    program, arguments = parse(ptx) if isinstance(ptx, str) else ptx, list(arguments)
    before = memory.bytes.copy()
    try:
        result = execute(program, memory, arguments, **launch)
    except Divergence:
        memory.bytes = before.copy()
        result = execute(program, memory, arguments, schedule="rising", **launch)
    races = [fault for fault in result.faults.found if fault.kind == "race"]
    if races and not any_order_differs(program, memory, before, arguments, launch):
        result.formal = races
        for fault in races:
            del result.faults.found[fault]
    return result


def any_order_differs(
    program: Program, memory: Memory, before: np.ndarray, arguments: list[Any], launch: dict[str, Any]
) -> bool:
    """Whether some order of threads leaves other bytes behind than `memory` holds."""
    for schedule in ORDERS:
        other = Memory()
        other.bytes, other.spans = before.copy(), memory.spans
        execute(program, other, arguments, schedule=schedule, **launch)
        if not np.array_equal(other.bytes, memory.bytes):
            return True
    return False
