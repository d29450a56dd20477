"""ld, st and cp.async, and the fence between what they write and the asynchronous proxy."""

import numpy as np

from ptx.formats import numpy_type
from ptx.machine import Block, Mask
from ptx.memory import Access, Space
from ptx.operations import acts
from ptx.parse import Address, Instruction, Unsupported


def space_of(block: Block, i: Instruction) -> Space:
    for name in i.op[1:]:
        if name == "global":
            return block.space
        if name.startswith("shared"):
            return block.shared
    raise Unsupported(i.text)


def touched(block: Block, space: Space, i: Instruction, address: np.ndarray, width: int, mask: np.ndarray) -> Access:
    return space.access(i, address, width, np.flatnonzero(mask), block.warp)


def elements(operand: object) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) and not isinstance(operand, Address) else (str(operand),)


@acts("ld", "ldu")
def load(block: Block, i: Instruction, mask: Mask) -> None:
    dtype, names = numpy_type(i.kind), elements(i.operands[0])
    if i.op[1] == "param":
        return _load_parameter(block, i, mask)
    space = space_of(block, i)
    access = touched(block, space, i, block.address(i.operands[1]), dtype.itemsize * len(names), block.active(mask))
    raw = space.load(access)
    covered = None
    if len(access.who) < block.n:
        covered = np.zeros(block.n, bool)
        covered[access.who] = True
    for n, name in enumerate(names):
        part = np.ascontiguousarray(raw[:, n * dtype.itemsize : (n + 1) * dtype.itemsize]).view(dtype).reshape(-1)
        if dtype.itemsize == 1:
            # 8-bit values live in 16-bit registers.
            part = part.astype(np.int16 if dtype.kind == "i" else np.uint16)
        full = part
        if covered is not None:
            full = np.zeros(block.n, part.dtype)
            full[access.who] = part
        block.put(name, full, covered)
    return None


def _load_parameter(block: Block, i: Instruction, mask: Mask) -> None:
    source = i.operands[1]
    assert isinstance(source, Address)
    start, dtype = block.run.offsets[source.base] + source.offset, numpy_type(i.kind)
    word = np.frombuffer(block.run.parameters, np.uint8)[start : start + dtype.itemsize].view(dtype)
    block.put(i.operands[0], np.repeat(word, block.n), mask)


@acts("st")
def store(block: Block, i: Instruction, mask: Mask) -> None:
    dtype, names, space = numpy_type(i.kind), elements(i.operands[1]), space_of(block, i)
    values = [np.ascontiguousarray(block.value(n, i.kind)).view(np.uint8).reshape(block.n, -1) for n in names]
    data = np.concatenate(values, 1)
    access = touched(block, space, i, block.address(i.operands[0]), dtype.itemsize * len(names), block.active(mask))
    space.store(access, data[access.who])


@acts("cp")
def copy(block: Block, i: Instruction, mask: Mask) -> None:
    if i.op[1] != "async":
        raise Unsupported(i.text)
    if i.op[2] == "commit_group":
        _groups(block).append([])
    elif i.op[2] in ("wait_group", "wait_all"):
        _land(block, int(str(i.operands[0])) if i.operands else 0)
    elif i.op[2] in ("cg", "ca"):
        _start_copy(block, i, block.active(mask))
    elif i.op[2] == "bulk":
        block.handlers["cp.async.bulk"](block, i, mask)
    else:
        raise Unsupported(i.text)


def _groups(block: Block) -> list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """The groups of copies under way of the threads that run now; the last one is not committed."""
    return block.copies.setdefault(int(block.team.threads[0]), [[]])


def _start_copy(block: Block, i: Instruction, mask: np.ndarray) -> None:
    """cp.async [shared], [global], bytes, bytes that are read; the others are zeros."""
    width = int(str(i.operands[2]), 0)
    size = block.value(i.operands[3], "u32") if len(i.operands) > 3 else np.full(block.n, width)
    if ((size != 0) & (size != width))[mask].any():
        raise Unsupported(f"a copy of part of its bytes: {i.text}")
    data = np.zeros((block.n, width), np.uint8)
    source = touched(block, block.space, i, block.address(i.operands[1]), width, mask & (size > 0))
    data[source.who] = block.space.load(source)
    target = touched(block, block.shared, i, block.address(i.operands[0]), width, mask)
    block.shared.claim(target)
    cells = np.ascontiguousarray(data[target.who]).view(block.shared.cells.dtype)
    _groups(block)[-1].append((target.where, cells, target.warp))


def _land(block: Block, left: int) -> None:
    """All committed groups but the newest land; their writes count from now on, as the copying threads' own."""
    groups = _groups(block)
    landed = max(0, len(groups) - 1 - left)
    for where, cells, warp in (copied for group in groups[:landed] for copied in group):
        block.shared.land(where, cells)
        block.shared.stamp_written(where, warp, 0)
        block.shared.unfenced[where] = True
    del groups[:landed]


@acts("fence")
def fence(block: Block, i: Instruction, mask: Mask) -> None:
    """Of the asynchronous proxy; the others order what bar.sync orders here."""
    if i.op[1:3] == ("proxy", "async"):
        warps = np.unique(block.warp[block.active(mask)])
        block.shared.fence(warps)
        for barrier in block.barriers.values():
            barrier.fenced |= barrier.made_by in warps
