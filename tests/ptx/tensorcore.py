"""Matrix opcodes: ldmatrix, stmatrix, mma of sm_80 and wgmma of sm_90.

Products are summed in float64 and rounded once, so only data whose sums are exact in fp32 can be compared bit for bit.
A wgmma's sums are there at once, but touching them before wgmma.wait_group is reported, and so is overwriting its
operands in shared memory.
"""

import re
from typing import NamedTuple

import numpy as np

from ptx.formats import unpacked
from ptx.machine import WARP, Block, Mask
from ptx.memory import Access
from ptx.operations import acts
from ptx.parse import Instruction, Operand, Unsupported

LANE = np.arange(WARP)
# Threads of a warpgroup, the rows of its product, bytes of K that one wgmma takes.
GROUP, ROWS, DEPTH = 128, 64, 32
# Bytes of a swizzled row, by the descriptor's mode.
SWIZZLE = {1: 128, 2: 64, 3: 32}


def registers(operand: Operand) -> tuple[str, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def matrix_rows(block: Block, i: Instruction, operand: Operand, count: int) -> Access:
    """Eight rows of 16 bytes a matrix; row r of matrix m is at the address of lane 8 m + r."""
    given = (block.lane < 8 * count) & block.active(None)
    return block.shared.access(i, block.address(operand), 16, np.flatnonzero(given), block.warp)


def spots(transposed: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row and column of an 8 x 8 matrix that a lane's lower and upper half hold."""
    places = [(LANE // 4, 2 * (LANE % 4) + half) for half in (0, 1)]
    return [(column, row) if transposed else (row, column) for row, column in places]


@acts("ldmatrix")
def load_matrices(block: Block, i: Instruction, mask: Mask) -> None:
    names = registers(i.operands[0])
    access = matrix_rows(block, i, i.operands[1], len(names))
    rows = np.zeros((block.n, 16), np.uint8)
    rows[access.who] = block.shared.load(access)
    matrices = rows.view(np.uint16).reshape(-1, WARP, 8)
    for m, name in enumerate(names):
        matrix = matrices[:, 8 * m : 8 * m + 8]
        halves = [matrix[:, row, column].astype(np.uint32) for row, column in spots("trans" in i.op)]
        block.put(name, (halves[0] | halves[1] << np.uint32(16)).reshape(-1), mask)


@acts("stmatrix")
def store_matrices(block: Block, i: Instruction, mask: Mask) -> None:
    names = registers(i.operands[1])
    rows = np.zeros((block.n // WARP, WARP, 8), np.uint16)
    for m, name in enumerate(names):
        halves = np.ascontiguousarray(block.value(name, "b32")).view(np.uint16).reshape(-1, WARP, 2)
        for half, (row, column) in enumerate(spots("trans" in i.op)):
            rows[:, 8 * m + row, column] = halves[:, :, half]
    access = matrix_rows(block, i, i.operands[0], len(names))
    block.shared.store(access, rows.reshape(block.n, 8)[access.who].view(np.uint8))


@acts("mma")
def multiply(block: Block, i: Instruction, mask: Mask) -> None:
    """m16n8k16 of bf16 and f16, m16n8k8 of tf32, summed in fp32, row by column."""
    shape, kind = next(s for s in i.op if re.fullmatch(r"m\d+n\d+k\d+", s)), i.op[-2]
    if (shape, kind) not in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32")) or i.op[-1] != "f32":
        raise Unsupported(i.text)
    warps, k = block.n // WARP, int(shape.split("k")[1])
    a, b = np.zeros((warps, 16, k)), np.zeros((warps, k, 8))
    per = 2 if k == 16 else 1
    for n, name in enumerate(registers(i.operands[1])):
        for h, value in enumerate(unpacked(block.value(name, "b32").reshape(warps, WARP), kind)):
            a[:, LANE // 4 + 8 * (n % 2), per * (LANE % 4) + h + 4 * per * (n // 2)] = value
    for n, name in enumerate(registers(i.operands[2])):
        for h, value in enumerate(unpacked(block.value(name, "b32").reshape(warps, WARP), kind)):
            b[:, per * (LANE % 4) + h + 4 * per * n, LANE // 4] = value
    product = a @ b
    sums = []
    for n, name in enumerate(registers(i.operands[3])):
        part = product[:, LANE // 4 + 8 * (n // 2), 2 * (LANE % 4) + n % 2].reshape(-1)
        sums.append((part + block.value(name, "f32")).astype(np.float32))
    for name, value in zip(registers(i.operands[0]), sums, strict=True):
        block.put(name, value, mask)


class Product(NamedTuple):
    """A wgmma under way."""

    tiles: list[np.ndarray]
    """Units of shared memory it reads."""
    sums: frozenset[str]


def products(block: Block, group: int) -> list[list[Product]]:
    """A warpgroup's groups of wgmma under way; the last one is not committed."""
    return block.products.setdefault(group, [[]])


def warpgroups(block: Block) -> list[int]:
    """Those with threads that run now."""
    return [int(g) for g in np.unique(block.team.threads // GROUP)]


@acts("wgmma")
def warpgroup(block: Block, i: Instruction, mask: Mask) -> None:
    if i.op[1] == "mma_async":
        return warpgroup_multiply(block, i)
    for group in warpgroups(block):
        if i.op[1] == "commit_group":
            products(block, group).append([])
        elif i.op[1] == "wait_group":
            _retire(block, group, int(str(i.operands[0])))
    # wgmma.fence orders registers, which are in order here.
    block.sums = frozenset().union(*(p.sums for gs in block.products.values() for g in gs for p in g))
    return None


def _retire(block: Block, group: int, left: int) -> None:
    under_way = products(block, group)
    landed = max(0, len(under_way) - 1 - left)
    for product in (p for g in under_way[:landed] for p in g):
        for where in product.tiles:
            block.shared.flying[where] -= 1
    del under_way[:landed]


def warpgroup_multiply(block: Block, i: Instruction) -> None:
    """m64nNk16 of bf16 or f16 and m64nNk8 of tf32: {sums}, A, B, add to the sums, signs, transpositions."""
    shape = next(found for x in i.op if (found := re.fullmatch(r"m64n(\d+)k(\d+)", x)))
    n, k, kind, o = int(shape[1]), int(shape[2]), i.op[-1], i.operands
    if i.op[-3] != "f32" or kind not in ("bf16", "f16", "tf32") or o[4:6] != ("1", "1") or any(x != "0" for x in o[6:]):
        raise Unsupported(i.text)
    held = np.stack([block.value(name, "f32") for name in registers(o[0])], 1)
    out = held.copy()
    for group in warpgroups(block):
        first = GROUP * group
        someone = int(block.team.threads[block.team.threads // GROUP == group][0])
        tiles: list[np.ndarray] = []
        b = _tile(block, i, int(block.value(o[2], "u64")[someone]), n, kind, tiles)
        if isinstance(o[1], tuple):
            a = _held_rows(block, registers(o[1]), k, kind, first)
        else:
            a = _tile(block, i, int(block.value(o[1], "u64")[someone]), ROWS, kind, tiles)
        adds = bool(block.value(o[3], "pred")[someone])
        out[first : first + GROUP] = _sums(a @ b.T, held[first : first + GROUP], adds)
        products(block, group)[-1].append(Product(tiles, frozenset(registers(o[0]))))
    for j, name in enumerate(registers(o[0])):
        block.put(name, np.ascontiguousarray(out[:, j]))
    block.sums |= frozenset(registers(o[0]))


def _held_rows(block: Block, names: tuple[str, ...], k: int, kind: str, first: int) -> np.ndarray:
    """A from registers: (64, k)."""
    lane, per, a = np.arange(GROUP), 2 if k == 16 else 1, np.zeros((ROWS, k))
    for j, name in enumerate(names):
        words = np.ascontiguousarray(block.value(name, "b32")[first : first + GROUP])
        for h, value in enumerate(unpacked(words, kind)):
            a[lane // 32 * 16 + lane % 32 // 4 + 8 * (j % 2), per * (lane % 4) + h + 4 * per * (j // 2)] = value
    return a


def _sums(product: np.ndarray, held: np.ndarray, adds: bool) -> np.ndarray:
    """A warpgroup's registers: (128, N / 2) fp32."""
    lane, j = np.arange(GROUP)[:, None], np.arange(held.shape[1])[None, :]
    row, column = lane // 32 * 16 + lane % 32 // 4 + 8 * (j // 2 % 2), 8 * (j // 4) + 2 * (lane % 4) + j % 2
    return (product[row, column] + (held if adds else 0)).astype(np.float32)


def _tile(block: Block, i: Instruction, descriptor: int, rows: int, kind: str, tiles: list[np.ndarray]) -> np.ndarray:
    """(rows, 32 bytes of K) through a shared-memory descriptor: 8-row groups, swizzled by the row within one."""
    start, stride, mode = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, descriptor >> 62 & 3
    if mode not in SWIZZLE:
        raise Unsupported(f"a descriptor without swizzle: {i.text}")
    width = SWIZZLE[mode]
    r, byte = np.arange(rows)[:, None], np.arange(0, DEPTH, 16)[None, :]
    at = start + r // 8 * stride + r % 8 * width + byte
    at ^= (at >> 7 & (width // 16 - 1)) << 4
    shared = block.shared
    where = (at[..., None] // shared.unit + np.arange(16 // shared.unit)).reshape(rows, DEPTH // shared.unit)
    _check_tile(block, i, where)
    tiles.append(where)
    shared.flying[where] += 1
    shared.is_multiplied = True
    raw = np.ascontiguousarray(shared.cells[where]).view(np.uint8)
    values = unpacked(np.ascontiguousarray(raw).view(np.uint32), kind)
    return np.stack(values, -1).reshape(rows, -1)


def _check_tile(block: Block, i: Instruction, where: np.ndarray) -> None:
    """A read by every warp of the team, through the asynchronous proxy."""
    shared = block.shared
    shared.check_async(i, where, False)
    shared.check_proxy(i, where)
    if not shared.known[where].all():
        shared.faults.report("unwritten", i, f"shared {shared.place(int(where[~shared.known[where]][0]))}")
    warp = int(block.warp[block.team.threads[0]])
    for w in range(warp, warp + len(block.team.warps)) if not shared.one_warp else []:
        shared.check_read(Access(i, block.team.threads[:1], where, np.full((len(where), 1), w)))
