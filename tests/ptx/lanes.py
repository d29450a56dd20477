"""Opcodes that pass values between the lanes of a warp."""

import numpy as np

from ptx.machine import WARP, Block, Mask
from ptx.operations import acts, computes
from ptx.parse import Instruction, Unsupported

REDUCE = {
    "max": np.maximum.reduce, "min": np.minimum.reduce, "add": np.add.reduce,
    "or": np.bitwise_or.reduce, "and": np.bitwise_and.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip


@acts("shfl")
def shuffle(block: Block, i: Instruction, mask: Mask) -> None:
    """shfl.sync.how.b32 d|p, a, b, c, members: lane j's value; what lies outside the segment keeps its own."""
    b, c = (block.value(o, "u32").astype(np.int64) for o in i.operands[-3:-1])
    segment, clamp = (c >> 8) & 31, c & 31
    top, low = (block.lane & segment) | (clamp & ~segment), block.lane & segment
    how = i.op[2]
    j = {"bfly": block.lane ^ b, "up": block.lane - b, "down": block.lane + b, "idx": low | (b & ~segment)}[how]
    ok = j >= top if how == "up" else j <= top
    held = block.value(i.operands[-4], "b32")
    block.put(i.operands[0], held[block.warp * WARP + np.where(ok, j, block.lane)], mask)
    if len(i.operands) == 6:
        block.put(i.operands[1], ok, mask)


@computes("redux")
def reduce(block: Block, i: Instruction) -> np.ndarray:
    rows = block.value(i.operands[1], i.kind).reshape(-1, WARP)
    return np.repeat(REDUCE[i.op[2]](rows, axis=1).astype(rows.dtype), WARP)


@acts("elect")
def elect(block: Block, i: Instruction, mask: Mask) -> None:
    """elect.sync d|p, members: lane 0 of each warp."""
    block.put(i.operands[0], np.zeros(block.n, np.uint32), mask)
    block.put(i.operands[1], block.lane == 0, mask)


@acts("vote")
def vote(block: Block, i: Instruction, mask: Mask) -> None:
    if i.op[1:3] != ("sync", "ballot"):
        raise Unsupported(i.text)
    rows = block.value(i.operands[1], "pred").reshape(-1, WARP)
    words = (rows.astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1).astype(np.uint32)
    block.put(i.operands[0], np.repeat(words, WARP), mask)


@acts("nop", "membar", "prefetch", "griddepcontrol", "bar", "barrier", "activemask")
def nothing(block: Block, i: Instruction, mask: Mask) -> None:
    """Lanes are in step here, so bar.warp orders nothing new; the others concern speed or other blocks."""
    if i.op[0] == "activemask":
        raise Unsupported(i.text)
