"""A block of threads: registers as arrays over threads, and the order in which its warps advance.

All threads advance together, one numpy operation an instruction; or, with a schedule, one warp at a time: "rising" and
"falling" run each warp from barrier to barrier in that order, a number draws warps and the instructions each may run.
Faults are found whatever the schedule, because what is compared is barriers, not time; a schedule shows whether a race
changes what is stored. What an opcode does is in the modules that `operations.py` gathers.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.faults import Faults
from ptx.formats import BOOL, UNSIGNED, numpy_type, resized
from ptx.memory import WARPS, GlobalSpace, SharedSpace
from ptx.parse import Address, Instruction, Operand, Program, Unsupported

WARP = 32
# An operand that is a tensor map's parameter is this plus the parameter's offset.
MAP_TOKEN = 1 << 60
# A drawn schedule lets a warp run up to this many instructions.
TURN = 64
SPECIAL = ("%tid", "%ntid", "%ctaid", "%nctaid", "%laneid", "%warpid", "%clusterid", "%cluster_ctarank")
Schedule = str | int | None
# All together, but of threads that store to one place at once the first wins.
FIRST_WINS = "first wins"
# Handlers get the threads that an instruction's guard lets through; None is every thread of the block.
Mask = np.ndarray | None


class Divergence(Unsupported):
    """Warps part ways while all threads advance together: a schedule is needed."""


@dataclass
class Team:
    """Threads that advance together, and where they stand."""

    threads: np.ndarray
    mask: Mask
    warps: np.ndarray
    at: int = 0
    state: str = "ready"
    """ready, barrier or done."""


@dataclass
class Run:
    """What the blocks of one launch share."""

    program: Program
    space: GlobalSpace
    faults: Faults
    parameters: bytes
    grid: tuple[int, int, int]
    threads: int
    shared: int
    unit: int
    schedule: Schedule = None
    limit: int = 2_000_000
    """Instructions a block may run."""
    maps: dict[int, Any] = field(default_factory=dict)
    """Tensor maps by their parameter's offset."""
    executed: set[int] = field(default_factory=set)
    """Numbers of the instructions that ran."""
    rounds: int = 0
    """Roundings that the longest block went through."""
    poison: Any = None
    offsets: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at = 0
        for name, size in self.program.parameters:
            self.offsets[name], at = at, at + size


class Block:
    """One block of a grid."""

    def __init__(self, run: Run, number: tuple[int, int, int], handlers: dict[str, Callable[..., None]]) -> None:
        self.run, self.number, self.handlers = run, number, handlers
        self.program, self.faults, self.space, self.n = run.program, run.faults, run.space, run.threads
        self.shared = SharedSpace(run.shared, run.unit, run.faults)
        self.shared.one_warp = self.space.one_warp = self.n <= WARP
        self.shared.winner = self.space.winner = -1 if run.schedule == FIRST_WINS else 1
        self.shared.epoch = self.space.epoch
        self.warp, self.lane = np.arange(self.n) // WARP, np.arange(self.n) % WARP
        self.registers: dict[str, np.ndarray] = {}
        self.constants: dict[tuple[str, np.dtype], np.ndarray] = {}
        # State of the asynchronous engines: see access.py, tma.py and tensorcore.py.
        self.copies: dict[int, list[list[Any]]] = {}
        self.barriers: dict[int, Any] = {}
        self.products: dict[int, list[list[Any]]] = {}
        self.sums: frozenset[str] = frozenset()
        self.waited_in_vain = False
        self.teams = self._teams()
        self.team = self.teams[0]
        seed = run.schedule if isinstance(run.schedule, int) else None
        self.random = None if seed is None else random.Random(seed)

    def _teams(self) -> list[Team]:
        if self.run.schedule in (None, FIRST_WINS):
            return [Team(np.arange(self.n), None, np.arange(self.n // WARP))]
        masks = [self.warp == w for w in range(self.n // WARP)]
        return [Team(np.flatnonzero(m), m if len(masks) > 1 else None, np.array([w])) for w, m in enumerate(masks)]

    # ---- operands

    def value(self, operand: Operand, kind: str) -> np.ndarray:
        """(threads,) of a type of PTX."""
        dtype = numpy_type(kind)
        held = self.registers.get(operand)  # type: ignore[arg-type]
        if held is not None:
            return held if held.dtype == dtype else resized(held, dtype)
        key = operand, dtype
        if key not in self.constants:
            self.constants[key] = np.broadcast_to(self._constant(operand, dtype), self.n)  # type: ignore[index,arg-type]
        return self.constants[key]  # type: ignore[index]

    def _constant(self, name: str, dtype: np.dtype) -> np.ndarray:
        if name.startswith("%"):
            return self._special(name, dtype)
        if name[:2] in ("0f", "0F", "0d", "0D") and len(name) in (10, 18):
            bits = np.array(int(name[2:], 16), UNSIGNED[(len(name) - 2) // 2])
            return bits.view(f"f{bits.itemsize}")
        if name[0] in "-0123456789":
            number = int(name.rstrip("U"), 0)
            if dtype == BOOL:
                return np.array(number != 0)
            return np.array(number & (1 << 8 * dtype.itemsize) - 1, UNSIGNED[dtype.itemsize]).view(dtype)
        if name in ("true", "false"):
            return np.array(name == "true")
        if name in self.run.offsets:
            return np.array(MAP_TOKEN + self.run.offsets[name], np.uint64)
        if name in self.program.shared and len(self.program.shared) == 1:
            return np.array(0, UNSIGNED[dtype.itemsize])
        raise Unsupported(f"operand {name}")

    def _special(self, name: str, dtype: np.dtype) -> np.ndarray:
        base, _, axis = name.partition(".")
        if re.fullmatch(r"%[a-z]+\d+", name):
            return garbage(dtype)
        if base not in SPECIAL:
            raise Unsupported(f"register {name}")
        dimension = "xyz".find(axis) if axis else 0
        table = {
            "%tid": np.arange(self.n) if dimension == 0 else 0,
            "%ntid": self.n if dimension == 0 else 1,
            "%ctaid": self.number[dimension], "%clusterid": self.number[dimension],
            "%nctaid": self.run.grid[dimension], "%laneid": self.lane, "%warpid": self.warp, "%cluster_ctarank": 0,
        }  # fmt: skip
        return np.asarray(table[base]).astype(UNSIGNED[dtype.itemsize]).view(dtype)

    def address(self, operand: Operand) -> np.ndarray:
        """(threads,) int64."""
        if not isinstance(operand, Address):
            raise Unsupported(f"address {operand}")
        found = self.value(operand.base, "u64" if operand.base.startswith("%rd") else "u32")
        return found.astype(np.int64) + operand.offset

    def active(self, mask: Mask) -> np.ndarray:
        """(threads,) bool: who takes part."""
        if mask is not None:
            return mask
        return np.ones(self.n, bool) if self.team.mask is None else self.team.mask

    def put(self, name: Operand, value: np.ndarray, mask: Mask = None) -> None:
        """Writes a register of the threads in mask, or of the team's."""
        if name == "_":
            return
        mask = self.team.mask if mask is None else mask
        if mask is not None:
            old = self.registers.get(name)  # type: ignore[arg-type]
            value = np.where(mask, value, garbage(value.dtype) if old is None else resized(old, value.dtype))
        self.registers[name] = value  # type: ignore[index]

    # ---- running

    def execute(self) -> int:
        """Runs the block to its end; the number of instructions."""
        steps, self.rounds = 0, 0
        while any(team.state != "done" for team in self.teams):
            moved = False
            for team in self._order():
                at = team.at
                steps += self._advance(team)
                # A turn that only found its wait not over yet is none.
                moved |= team.at != at or team.state != "ready"
            if steps > self.run.limit:
                raise Unsupported(f"more than {self.run.limit} instructions")
            if all(team.state != "ready" for team in self.teams):
                self._release()
            elif not moved:
                stuck = next(team for team in self.teams if team.state == "ready")
                self.faults.report("hang", self.program.body[stuck.at], f"warp {stuck.warps[0]} waits for ever")
                break
        self._release()
        self.run.rounds = max(self.run.rounds, self.rounds)
        return steps

    def _order(self) -> list[Team]:
        ready = [team for team in self.teams if team.state == "ready"]
        if self.run.schedule == "falling":
            ready.reverse()
        elif self.random is not None:
            self.random.shuffle(ready)
        return ready

    def _release(self) -> None:
        """All stand at the barrier: what came before it is ordered before what comes after."""
        for team in self.teams:
            team.state = "ready" if team.state == "barrier" else team.state
        self.space.epoch += 1
        self.shared.epoch += 1

    def _advance(self, team: Team) -> int:
        """Runs a team to the next barrier, a wait in vain, or the end of its turn; the number of instructions."""
        body, steps, self.team = self.program.body, 0, team
        turn = self.random.randint(1, TURN) if self.random else self.run.limit
        while team.state == "ready" and steps <= turn:
            if team.at >= len(body):
                team.state = "done"
                break
            i = body[team.at]
            team.at += 1
            steps += 1
            self.run.executed.add(i.number)
            self._step(i)
            if self.waited_in_vain:
                self.waited_in_vain, team.at = False, team.at - 1
                break
        return steps

    def _step(self, i: Instruction) -> None:
        mask = self.team.mask
        if i.guard is not None:
            guard = self.registers[i.guard]
            guard = ~guard if i.negated else guard
            mask = guard if mask is None else guard & mask
        if i.op[0] in ("bra", "ret", "exit", "bar", "barrier") and i.op[1:2] != ("warp",):
            self._control(i, mask)
        elif i.guard is None or mask.any():  # type: ignore[union-attr]
            handler = self.handlers.get(i.op[0])
            if handler is None:
                raise Unsupported(i.text)
            if self.sums and not self.sums.isdisjoint(i.names) and i.op[0] != "wgmma":
                self.faults.report("async", i, "touches the sums of a wgmma under way")
            self.rounds += i.rounds
            handler(self, i, mask)
            if self.run.poison is not None:
                self.run.poison.follow(self, i, mask)

    def _control(self, i: Instruction, mask: Mask) -> None:
        team = self.team
        if mask is not None:
            taken = mask[team.threads]
            if not taken.any():
                return
            if not taken.all():
                kind = Divergence if self.run.schedule is None else Unsupported
                raise kind(f"{i.place}: threads part ways at {i.text}")
        if i.op[0] in ("ret", "exit"):
            team.state = "done"
        elif i.op[0] == "bra":
            places = self.program.labels[i.operands[0]]  # type: ignore[index]
            team.at = places[0] if len(places) == 1 else max(p for p in places if p < i.number)
        elif len(i.operands) > 1:
            raise Unsupported(f"a barrier of some threads: {i.text}")
        else:
            team.state = "barrier"


def garbage(dtype: np.dtype) -> np.ndarray:
    """What a register holds before it is written: threads that a guard left out may read it, and must not use it."""
    return (
        np.array(False)
        if dtype == BOOL
        else np.array(int.from_bytes(b"\xa5" * dtype.itemsize), UNSIGNED[dtype.itemsize]).view(dtype)
    )


def threads_checked(threads: int) -> int:
    if threads % WARP or not 0 < threads <= WARP * WARPS:
        raise Unsupported(f"{threads} threads")
    return threads
