"""TMA: boxes of a matrix copied to shared memory by one thread, and the mbarriers that say when they are there."""

from dataclasses import dataclass, field

import numpy as np

from ptx.machine import MAP_TOKEN, Block, Mask
from ptx.memory import Access
from ptx.operations import acts
from ptx.parse import Address, Instruction, Unsupported


@dataclass
class TensorMap:
    """What a descriptor says of a row-major matrix: where it is, its size, and the box that one copy brings."""

    address: int
    rows: int
    columns: int
    element: int
    """Bytes."""
    box: tuple[int, int]
    stride: int = 0
    """Elements from row to row; 0: as many as there are columns."""

    @property
    def swizzle(self) -> int:
        """Bytes of a box's row, which Triton swizzles over."""
        width = self.box[1] * self.element
        if width not in (32, 64, 128):
            raise Unsupported(f"a box of {width} bytes a row")
        return width


@dataclass
class Barrier:
    """An mbarrier: arrivals and bytes that the current phase still waits for."""

    count: int
    pending: int
    made_at: int
    """Epoch."""
    made_by: int
    """Warp."""
    bytes: int = 0
    phase: int = 0
    fenced: bool = False
    """Whether its maker has made it visible to the asynchronous proxy."""
    copies: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count


def barrier_at(block: Block, i: Instruction, address: int, warp: int) -> Barrier | None:
    """The mbarrier at an address, if this warp may know of it."""
    barrier = block.barriers.get(address)
    if barrier is None:
        block.faults.report("unwritten", i, f"no mbarrier at shared byte {address}")
    elif barrier.made_at == block.shared.epoch and barrier.made_by != warp:
        block.faults.report("race", i, f"the mbarrier was made by warp {barrier.made_by} and no bar.sync since")
    return barrier


@acts("mbarrier")
def mbarrier(block: Block, i: Instruction, mask: Mask) -> None:
    what = i.op[1]
    addresses = block.address(next(o for o in i.operands if isinstance(o, Address)))
    threads = np.flatnonzero(block.active(mask))
    if what in ("try_wait", "test_wait"):
        return _wait(block, i, addresses, threads)
    for t in threads:
        address, warp = int(addresses[t]), int(block.warp[t])
        if what == "init":
            count = int(block.value(i.operands[1], "u32")[t])
            block.barriers[address] = Barrier(count, count, block.shared.epoch, warp)
        elif what == "inval":
            block.barriers.pop(address, None)
        elif what == "arrive":
            _arrive(block, i, barrier_at(block, i, address, warp), int(t))
        else:
            raise Unsupported(i.text)
    return None


def _arrive(block: Block, i: Instruction, barrier: Barrier | None, t: int) -> None:
    if barrier is not None:
        barrier.pending -= 1
        barrier.bytes += int(block.value(i.operands[-1], "u32")[t]) if "expect_tx" in i.op else 0
        barrier.settle()


def _wait(block: Block, i: Instruction, addresses: np.ndarray, threads: np.ndarray) -> None:
    """Lands the copies of phases that are over. A wait for one that is not leaves the threads where they stand."""
    parity = block.value(i.operands[2], "u32")
    for t in threads:
        barrier = barrier_at(block, i, int(addresses[t]), int(block.warp[t]))
        if barrier is None or barrier.phase == int(parity[t]):
            block.waited_in_vain = True
            return
    for address in np.unique(addresses[threads]):
        barrier = block.barriers[int(address)]
        for where, cells in barrier.copies:
            block.shared.land(where, cells)
            # Whoever has waited sees them.
            block.shared.wrote[where] = -1
        barrier.copies.clear()
    block.put(i.operands[0], np.ones(block.n, bool))


@acts("cp.async.bulk")
def copy_box(block: Block, i: Instruction, mask: Mask) -> None:
    """cp.async.bulk.tensor.2d [shared], [map, {column, row}], [mbarrier]."""
    if i.op[3:5] != ("tensor", "2d") or not any("complete_tx" in part for part in i.op):
        raise Unsupported(i.text)
    target, source, counter = i.operands
    assert isinstance(source, Address)
    columns, rows = (block.value(c, "s32") for c in source.coordinates)
    targets, counters, maps = block.address(target), block.address(counter), block.value(source.base, "u64")
    for t in np.flatnonzero(block.active(mask)):
        barrier = barrier_at(block, i, int(counters[t]), int(block.warp[t]))
        if barrier is None:
            continue
        if not barrier.fenced:
            block.faults.report("proxy", i, "the mbarrier was made without fence.proxy.async since")
        map_ = block.run.maps[int(maps[t]) - MAP_TOKEN]
        data = _box(block, i, map_, int(rows[t]), int(columns[t]), int(t))
        access = _target(block, i, map_, int(targets[t]), int(t))
        block.shared.check_proxy(i, access.where)
        block.shared.claim(access)
        barrier.copies.append((access.where, data.view(block.shared.cells.dtype)))
        barrier.bytes -= data.nbytes
        barrier.settle()


def _box(block: Block, i: Instruction, map_: TensorMap, row: int, column: int, thread: int) -> np.ndarray:
    """(rows, bytes) of the box, zeros beyond the matrix."""
    height, width = map_.box
    r, c = row + np.arange(height)[:, None], column + np.arange(width)[None, :]
    inside = (r >= 0) & (r < map_.rows) & (c >= 0) & (c < map_.columns)
    at = map_.address + (r.astype(np.int64) * (map_.stride or map_.columns) + c) * map_.element
    data = np.zeros((height * width, map_.element), np.uint8)
    warps = np.full(at.size, block.warp[thread])
    access = block.space.access(i, at.reshape(-1), map_.element, np.flatnonzero(inside), warps)
    data[access.who] = block.space.load(access)
    return data.reshape(height, width * map_.element)


def _target(block: Block, i: Instruction, map_: TensorMap, start: int, thread: int) -> Access:
    """Where the box goes: row by row, its 16-byte pieces exchanged by the swizzle. Written by the copying thread."""
    shared = block.shared
    if start % 128:
        shared.faults.report("aligned", i, f"shared byte {start}, not at a multiple of 128")
    at = start + np.arange(map_.box[0])[:, None] * map_.swizzle + np.arange(0, map_.swizzle, shared.unit)[None, :]
    at ^= (at >> 7 & (map_.swizzle // 16 - 1)) << 4
    who = np.full(len(at), thread)
    where = at // shared.unit
    outside = shared.outside(where[:, 0], 1) | shared.outside(where[:, -1], 1)
    if outside.any():
        shared.faults.report("bounds", i, f"shared {shared.place(int(where[outside][0, 0]))}")
        where = np.where(outside[:, None], 0, where)
    return Access(i, who, where, block.warp[who][:, None])
