"""Global and shared memory that remember who touched what.

A Space is bytes, seen in units: the narrowest access of a program, so that wider ones touch whole units. Of each unit
it keeps the time and warp of the last write and the time and warps of the reads since; time is counted in epochs, which
end at bar.sync. Two warps that meet in a unit within one epoch are in a race, unless both store the same value, as
replicated layouts do all the time. Lanes of one warp count as ordered, which is what Triton relies on.
"""

from dataclasses import dataclass

import numpy as np

from ptx.faults import Faults
from ptx.formats import UNSIGNED
from ptx.parse import Instruction

# A write's stamp is its epoch and warp; a read's, its epoch and a bit for each warp.
WARPS = 32
EPOCH_BITS = np.int64(32)


@dataclass
class Access:
    """Some threads of a block at some units."""

    instruction: Instruction
    who: np.ndarray
    """(k,) threads."""
    where: np.ndarray
    """(k, units)."""
    warp: np.ndarray
    """(k, 1)."""
    data: np.ndarray | None = None
    """(k, units), of a write."""


class Space:
    """Args: bytes; unit; the address of the first byte; faults to report to."""

    def __init__(self, bytes_: np.ndarray, unit: int, base: int, faults: Faults) -> None:
        self.bytes, self.unit, self.base, self.faults = bytes_, unit, base, faults
        self.cells = bytes_.view(UNSIGNED[unit])
        size = len(self.cells)
        self.epoch, self.one_warp = 0, False
        # Threads that store to one place at once: 1 lets the last of them win, -1 the first. PTX does not say which.
        self.winner = 1
        self.wrote, self.read = np.full(size, -1, np.int64), np.full(size, -1, np.int64)
        # The instructions that did, for reports.
        self.wrote_at, self.read_at = np.zeros(size, np.int32), np.zeros(size, np.int32)

    def place(self, unit: int) -> str:
        """A unit, for people."""
        return f"byte {unit * self.unit}"

    def outside(self, first: np.ndarray, width: int) -> np.ndarray:
        """Which of some first units are not in the space with `width` units."""
        return (first < 0) | (first + width > len(self.cells))

    def access(self, i: Instruction, address: np.ndarray, width: int, who: np.ndarray, warp: np.ndarray) -> Access:
        """Checks alignment and bounds: the access of threads `who` (k,) to `width` bytes each, strays left out."""
        at = address[who] - self.base
        stray = at % width != 0
        if stray.any():
            self.faults.report("aligned", i, f"address {int(at[stray][0])} for {width} bytes")
        first, units = at // self.unit, width // self.unit
        outside = self.outside(first, units)
        if outside.any():
            self.faults.report("bounds", i, f"{self.place(int(first[outside][0]))} of {width} bytes")
            who, first = who[~outside], first[~outside]
        return Access(i, who, first[:, None] + np.arange(units), warp[who][:, None])

    def load(self, a: Access) -> np.ndarray:
        """(k, bytes)."""
        if not self.one_warp:
            self.check_read(a)
        return np.ascontiguousarray(self.cells[a.where]).view(np.uint8)

    def store(self, a: Access, data: np.ndarray) -> None:
        """data (k, bytes)."""
        a.data = np.ascontiguousarray(data).view(self.cells.dtype)
        if not self.one_warp:
            self.check_write(a)
        if self.winner == 1:
            self.cells[a.where] = a.data
        else:
            # Copies: numpy may walk a reversed view forwards.
            self.cells[a.where[::-1].copy()] = a.data[::-1].copy()
        differ = self.cells[a.where] != a.data
        if differ.any():
            at = self.place(int(a.where[differ][0]))
            self.faults.report("race", a.instruction, f"threads store different values to {at} at once")

    def check_read(self, a: Access) -> None:
        self._meet_writer(a, "read")
        start = self.epoch << EPOCH_BITS
        before = self.read[a.where]
        self.read[a.where] = np.where(before < start, start, before)
        np.bitwise_or.at(self.read, a.where, np.left_shift(np.int64(1), a.warp))
        self.read_at[a.where] = a.instruction.number

    def check_write(self, a: Access) -> None:
        self._meet_writer(a, "write")
        start = self.epoch << EPOCH_BITS
        readers = self.read[a.where]
        others = (readers >= start) & ((readers & ~np.left_shift(np.int64(1), a.warp) & 0xFFFFFFFF) != 0)
        if others.any():
            at = a.where[others][0]
            self._race(a, f"write of {self.place(int(at))}, read by another warp", int(self.read_at[at]))
        self.stamp_written(a.where, a.warp, a.instruction.number)

    def stamp_written(self, where: np.ndarray, warp: np.ndarray | int, number: int) -> None:
        self.wrote[where], self.wrote_at[where] = self.epoch * WARPS + warp, number

    def _meet_writer(self, a: Access, what: str) -> None:
        stamps = self.wrote[a.where]
        others = (stamps >= self.epoch * WARPS) & (stamps != self.epoch * WARPS + a.warp)
        if others.any() and a.data is not None:
            others &= a.data != self.cells[a.where]
        if others.any():
            at, stamp = a.where[others][0], int(stamps[others][0])
            self._race(a, f"{what} of {self.place(int(at))}, written by warp {stamp % WARPS}", int(self.wrote_at[at]))

    def _race(self, a: Access, detail: str, number: int) -> None:
        self.faults.report("race", a.instruction, f"{detail} at instruction {number}")


class Memory:
    """Global memory being laid out: buffers side by side, with room between them."""

    BASE, GAP = 1 << 32, 256

    def __init__(self) -> None:
        self.bytes = np.zeros(self.GAP, np.uint8)
        self.spans: list[tuple[int, int, str]] = []

    def add(self, array: np.ndarray, name: str = "") -> int:
        """The address of a copy of the array."""
        start = len(self.bytes)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        room = -(-raw.size // self.GAP) * self.GAP + self.GAP
        self.bytes = np.concatenate([self.bytes, raw, np.zeros(room - raw.size, np.uint8)])
        self.spans.append((start, start + raw.size, name or f"buffer {len(self.spans)}"))
        return self.BASE + start

    def take(self, address: int, like: np.ndarray) -> np.ndarray:
        """What stands at an address now, in the shape and type of another array."""
        start = address - self.BASE
        return self.bytes[start : start + like.nbytes].view(like.dtype).reshape(like.shape).copy()


class GlobalSpace(Space):
    """A Memory in use. Knows its buffers, and which blocks of the grid touched what."""

    def __init__(self, memory: Memory, unit: int, faults: Faults) -> None:
        super().__init__(memory.bytes, unit, Memory.BASE, faults)
        self.spans = memory.spans
        self.inside = np.zeros(len(self.cells), bool)
        for a, b, _ in memory.spans:
            self.inside[a // unit : -(-b // unit)] = True
        self.block, self.one_block = 0, False
        # 0: nobody yet; -1: several readers.
        self.writer_block, self.reader_block = np.zeros((2, len(self.cells)), np.int32)

    def place(self, unit: int) -> str:
        at = unit * self.unit
        for a, b, name in self.spans:
            if a <= at < b:
                return f"{name}[byte {at - a}]"
        nearest = min(self.spans, key=lambda s: min(abs(at - s[0]), abs(at - s[1])), default=(0, 0, "nothing"))
        return f"{at - nearest[0]} bytes from the start of {nearest[2]}"

    def outside(self, first: np.ndarray, width: int) -> np.ndarray:
        beyond = super().outside(first, width)
        within = np.where(beyond, 0, first)
        return beyond | ~self.inside[within] | ~self.inside[np.minimum(within + width - 1, len(self.cells) - 1)]

    def load(self, a: Access) -> np.ndarray:
        if not self.one_block:
            readers, writers = self.reader_block[a.where], self.writer_block[a.where]
            self._clash(a, (writers != 0) & (writers != self.block))
            self.reader_block[a.where] = np.where((readers == 0) | (readers == self.block), self.block, -1)
        return super().load(a)

    def store(self, a: Access, data: np.ndarray) -> None:
        if not self.one_block:
            readers, writers = self.reader_block[a.where], self.writer_block[a.where]
            alien = (writers != 0) & (writers != self.block) | (readers != 0) & (readers != self.block)
            self._clash(a, alien)
            self.writer_block[a.where] = self.block
        super().store(a, data)

    def _clash(self, a: Access, others: np.ndarray) -> None:
        if others.any():
            self.faults.report("programs", a.instruction, self.place(int(a.where[others][0])))


class SharedSpace(Space):
    """A block's shared memory: what is known, on its way, or read by a wgmma under way."""

    def __init__(self, size: int, unit: int, faults: Faults) -> None:
        size = -(-max(size, 16) // 16) * 16
        super().__init__(np.full(size, 0xA5, np.uint8), unit, 0, faults)
        n = len(self.cells)
        self.known, self.pending = np.zeros((2, n), bool)
        # Written by st or cp.async since the writer's last fence.proxy.async.
        self.unfenced = np.zeros(n, bool)
        # How many wgmma that have not been waited for read a unit.
        self.flying = np.zeros(n, np.int16)
        self.is_copied = self.is_multiplied = False

    def check_async(self, i: Instruction, where: np.ndarray, write: bool) -> None:
        """Whether units are still on their way, or written under a wgmma."""
        if self.is_copied:
            self._report_where(self.pending[where], i, where, "async", "is still on its way")
        if write and self.is_multiplied:
            self._report_where(self.flying[where] > 0, i, where, "async", "is an operand of a wgmma under way")

    def load(self, a: Access) -> np.ndarray:
        self.check_async(a.instruction, a.where, False)
        self._report_where(~self.known[a.where], a.instruction, a.where, "unwritten", "was never written")
        return super().load(a)

    def store(self, a: Access, data: np.ndarray) -> None:
        self.check_async(a.instruction, a.where, True)
        super().store(a, data)
        self.known[a.where] = self.unfenced[a.where] = True

    def claim(self, a: Access) -> None:
        """A copy starts that will write here."""
        self.check_async(a.instruction, a.where, True)
        if not self.one_warp:
            self.check_write(a)
        self.pending[a.where] = self.is_copied = True

    def land(self, where: np.ndarray, data: np.ndarray) -> None:
        """A copy has ended. data as cells."""
        self.cells[where] = data
        self.known[where], self.pending[where] = True, False

    def fence(self, warps: np.ndarray) -> None:
        """fence.proxy.async by some warps: their own writes are there for the asynchronous proxy."""
        at = np.flatnonzero(self.unfenced)
        mine = at if self.one_warp else at[np.isin(self.wrote[at] % WARPS, warps)]
        self.unfenced[mine] = False

    def check_proxy(self, i: Instruction, where: np.ndarray) -> None:
        self._report_where(self.unfenced[where], i, where, "proxy", "was written without fence.proxy.async since")

    def _report_where(self, bad: np.ndarray, i: Instruction, where: np.ndarray, kind: str, what: str) -> None:
        if bad.any():
            self.faults.report(kind, i, f"shared {self.place(int(where[bad][0]))} {what}")
