"""Lanes that a load without `other` left out: what depends on them is undefined, though Triton 3.7 writes zeros there.

Followed through registers lane by lane, and through shared memory. Selections and bitwise operations let it end where
another operand decides. Reported where it reaches global memory, an address or a guard. Costs nothing in programs
whose masked loads all say `other`.
"""

import numpy as np

from ptx.access import elements, space_of
from ptx.formats import numpy_type
from ptx.machine import WARP, Block, Mask
from ptx.memory import SharedSpace
from ptx.parse import Address, Instruction

CLEAN = np.zeros(0, bool)


class Poison:
    """Args: spots, the source places of the loads."""

    def __init__(self, spots: frozenset[tuple[str, int, int]]) -> None:
        self.spots = spots
        self.block: Block | None = None
        self.registers: dict[str, np.ndarray] = {}
        self.shared = CLEAN

    def follow(self, block: Block, i: Instruction, mask: Mask) -> None:
        """After an instruction ran."""
        if block is not self.block:
            self.block, self.registers, self.shared = block, {}, np.zeros(len(block.shared.cells), bool)
        active = block.active(mask)
        self._report_uses(block, i, active)
        if i.op[0] in ("ld", "ldmatrix") and i.op[1] != "param":
            self._load(block, i, active)
        elif i.op[0] == "st":
            self._store(block, i, active)
        elif i.operands and not self.registers.keys().isdisjoint(i.names):
            self._compute(block, i, active)

    def at(self, block: Block, operand: object) -> np.ndarray:
        """(threads,) bool."""
        names = operand if isinstance(operand, tuple) and not isinstance(operand, Address) else (operand,)
        found = np.zeros(block.n, bool)
        for name in names:
            name = name.base if isinstance(name, Address) else name
            found = found | self.registers.get(str(name), False)
        return found

    def _set(self, block: Block, name: str, lanes: np.ndarray, active: np.ndarray) -> None:
        merged = np.where(active, lanes, self.at(block, name))
        if merged.any():
            self.registers[name] = merged
        else:
            self.registers.pop(name, None)

    def _report_uses(self, block: Block, i: Instruction, active: np.ndarray) -> None:
        for operand in i.operands:
            if isinstance(operand, Address) and (self.at(block, operand) & active).any():
                block.faults.report("masked", i, f"address {operand.base} depends on a lane that a load left out")
        if i.guard is not None and self.at(block, i.guard).any():
            block.faults.report("masked", i, f"guard {i.guard} depends on a lane that a load left out")

    def _load(self, block: Block, i: Instruction, active: np.ndarray) -> None:
        names = elements(i.operands[0])
        if not isinstance(space_of(block, i), SharedSpace):
            left_out = ~active if i.spot in self.spots and i.guard is not None else np.zeros(block.n, bool)
            everyone = np.ones(block.n, bool) if block.team.mask is None else block.team.mask
            for name in names:
                self._set(block, name, left_out, everyone)
            return
        if not self.shared.any():
            dirty = np.zeros((block.n, len(names)), bool)
        elif i.op[0] == "ldmatrix":
            # Coarse: any lane of the warp.
            dirty = np.repeat(self._cells(block, i, 16, i.operands[1]).reshape(-1, WARP, 1).any(1), WARP, 0)
        else:
            dirty = self._cells(block, i, numpy_type(i.kind).itemsize * len(names), i.operands[1])
        for name in names:
            self._set(block, name, dirty.any(1), active)

    def _cells(self, block: Block, i: Instruction, width: int, operand: object) -> np.ndarray:
        """(threads, units) of what an access touches, those beyond the end as the last one."""
        first = block.address(operand)[:, None] // block.shared.unit  # type: ignore[arg-type]
        where = np.clip(first + np.arange(width // block.shared.unit), 0, len(self.shared) - 1)
        return self.shared[where]

    def _store(self, block: Block, i: Instruction, active: np.ndarray) -> None:
        lanes = self.at(block, i.operands[1])
        space = space_of(block, i)
        if not isinstance(space, SharedSpace):
            if (lanes & active).any():
                block.faults.report("masked", i, "stores what depends on a lane that a load left out")
            return
        width = numpy_type(i.kind).itemsize * len(elements(i.operands[1])) // space.unit
        where = np.clip(block.address(i.operands[0])[:, None] // space.unit + np.arange(width), 0, len(self.shared) - 1)
        self.shared[where[active]] = lanes[active][:, None]

    def _compute(self, block: Block, i: Instruction, active: np.ndarray) -> None:
        target, *sources = i.operands
        lanes = [self.at(block, o) for o in sources]
        dirty = np.logical_or.reduce(lanes)
        if i.op[0] == "selp":
            choice = block.value(sources[2], "pred")
            dirty = np.where(choice, lanes[0], lanes[1]) | lanes[2]
        elif i.op[0] in ("and", "or") and len(sources) == 2:
            dirty = dirty & ~self._decided(block, i, sources, lanes)
        elif i.op[0] in ("shfl", "redux", "mma", "wgmma", "stmatrix"):
            # Coarse: any lane of the warp.
            dirty = np.repeat(dirty.reshape(-1, WARP).any(1), WARP)
        for name in target if isinstance(target, tuple) else (target,):
            self._set(block, str(name), dirty, active)

    def _decided(self, block: Block, i: Instruction, sources: list[object], lanes: list[np.ndarray]) -> np.ndarray:
        """Where one operand, itself known, fixes every bit of an `and` or `or`."""
        fixed = np.zeros(block.n, bool)
        for operand, lane in zip(sources, lanes, strict=True):
            value = block.value(operand, i.kind)  # type: ignore[arg-type]
            bits = value if i.op[0] == "and" else ~value
            fixed |= ~lane & (bits == 0)
        return fixed
