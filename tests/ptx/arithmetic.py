"""Opcodes of one thread that only compute.

fp32 is rounded as a GPU rounds, but for what PTX itself leaves open (div.full, ex2 and rsqrt are exact here, subnormals
are kept under .ftz) and for fma, which goes through float64: right but for rare double roundings.
"""

from collections.abc import Callable

import numpy as np

from ptx.formats import UNSIGNED, from_bf16, numpy_type, to_bf16, to_tf32
from ptx.machine import Block, Mask
from ptx.operations import acts, computes
from ptx.parse import Instruction, Unsupported

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
INTEGRAL = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}
ROUNDING = {"rn", "rz", "rm", "rp", "sat", "ftz", "relu", "rna", "satfinite", *INTEGRAL}


def is_float(kind: str) -> bool:
    return kind[0] == "f"


def apply(block: Block, i: Instruction, function: Callable[..., np.ndarray]) -> np.ndarray:
    values = (block.value(o, i.kind) for o in i.operands[1:])
    return function(*values).astype(numpy_type(i.kind), copy=False)


def simple(name: str, function: Callable[..., np.ndarray]) -> None:
    computes(name)(lambda block, i: apply(block, i, function))


for opcode, function in {
    "add": np.add, "sub": np.subtract, "abs": np.abs, "neg": np.negative, "not": np.invert, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
}.items():  # fmt: skip
    simple(opcode, function)


@computes("max")
def maximum(block: Block, i: Instruction) -> np.ndarray:
    return apply(block, i, np.maximum if "NaN" in i.op or not is_float(i.kind) else np.fmax)


@computes("min")
def minimum(block: Block, i: Instruction) -> np.ndarray:
    return apply(block, i, np.minimum if "NaN" in i.op or not is_float(i.kind) else np.fmin)


def product(block: Block, i: Instruction) -> np.ndarray:
    a, b = (block.value(o, i.kind) for o in i.operands[1:3])
    dtype = numpy_type(i.kind)
    if "wide" in i.op or "hi" in i.op:
        if dtype.itemsize == 8:
            raise Unsupported(i.text)
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        found = a.astype(wide) * b.astype(wide)
        return found if "wide" in i.op else (found >> 8 * dtype.itemsize).astype(dtype)
    return a * b


@computes("mul")
def multiply(block: Block, i: Instruction) -> np.ndarray:
    return product(block, i)


@computes("mad")
def multiply_add(block: Block, i: Instruction) -> np.ndarray:
    found = product(block, i)
    return found + block.value(i.operands[3], f"{i.kind[0]}{8 * found.dtype.itemsize}")


@computes("fma")
def fused(block: Block, i: Instruction) -> np.ndarray:
    a, b, c = (block.value(o, i.kind).astype(np.float64) for o in i.operands[1:])
    return (a * b + c).astype(numpy_type(i.kind))


@computes("div")
def divide(block: Block, i: Instruction) -> np.ndarray:
    a, b = (block.value(o, i.kind) for o in i.operands[1:])
    if is_float(i.kind):
        return a / b
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    # Towards zero, where numpy goes down.
    return a // safe + ((a % safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)


@computes("rem")
def remainder(block: Block, i: Instruction) -> np.ndarray:
    a, b = (block.value(o, i.kind) for o in i.operands[1:])
    return np.fmod(a, np.where(b == 0, 1, b)).astype(a.dtype)


def shift(block: Block, i: Instruction, function: Callable[..., np.ndarray]) -> np.ndarray:
    value, by = block.value(i.operands[1], i.kind), block.value(i.operands[2], "u32").astype(np.int64)
    bits = 8 * value.dtype.itemsize
    shifted = function(value, np.minimum(by, bits - 1).astype(value.dtype))
    # A shift by all bits or more leaves nothing, of a negative number its sign.
    rest = np.where(value < 0, -1, 0).astype(value.dtype) if function is np.right_shift else np.zeros_like(value)
    return np.where(by >= bits, rest, shifted)


@computes("shl")
def shift_left(block: Block, i: Instruction) -> np.ndarray:
    return shift(block, i, np.left_shift)


@computes("shr")
def shift_right(block: Block, i: Instruction) -> np.ndarray:
    return shift(block, i, np.right_shift)


@computes("setp", "set")
def compare(block: Block, i: Instruction) -> np.ndarray:
    if len(i.operands) > 3 or i.op[0] == "set":
        raise Unsupported(i.text)
    a, b = (block.value(o, i.kind) for o in i.operands[1:])
    how = i.op[1]
    if not is_float(i.kind):
        return COMPARE[how](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if how in ("nan", "num"):
        return nan if how == "nan" else ~nan
    # The unordered comparisons, which end in u, hold for a NaN.
    found = COMPARE[how.removesuffix("u")](a, b)
    return found | nan if how.endswith("u") else found & ~nan


@computes("selp")
def select(block: Block, i: Instruction) -> np.ndarray:
    choice = block.value(i.operands[3], "pred")
    return np.where(choice, block.value(i.operands[1], i.kind), block.value(i.operands[2], i.kind))


@computes("popc")
def count_ones(block: Block, i: Instruction) -> np.ndarray:
    bits = np.ascontiguousarray(block.value(i.operands[1], i.kind)).view(np.uint8).reshape(block.n, -1)
    return np.unpackbits(bits, axis=1).sum(1, dtype=np.uint32)


@computes("bfe")
def bit_field(block: Block, i: Instruction) -> np.ndarray:
    value = block.value(i.operands[1], i.kind)
    start, length = (block.value(o, "u32").astype(np.uint64) for o in i.operands[2:4])
    unsigned = UNSIGNED[value.dtype.itemsize]
    field = (value.view(unsigned).astype(np.uint64) >> start) & ((np.uint64(1) << length) - np.uint64(1))
    if i.kind[0] == "s":
        up = (np.uint64(64) - length).astype(np.int64)
        field = ((field.view(np.int64) << up) >> up).view(np.uint64)
    return field.astype(unsigned)


@computes("prmt")
def permute_bytes(block: Block, i: Instruction) -> np.ndarray:
    a, b, pick = (block.value(o, "u32").astype(np.uint64) for o in i.operands[1:4])
    both, out = a | b << np.uint64(32), np.zeros(block.n, np.uint64)
    for n in range(4):
        nibble = (pick >> np.uint64(4 * n)) & np.uint64(15)
        byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        out |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * n)
    return out.astype(np.uint32)


@computes("cvt")
def convert(block: Block, i: Instruction) -> np.ndarray:
    modes, types = [m for m in i.op[1:] if m in ROUNDING], [t for t in i.op[1:] if t not in ROUNDING]
    if types == ["bf16x2", "f32"]:
        high, low = (to_bf16(block.value(o, "f32")) for o in i.operands[1:3])
        return high.astype(np.uint32) << np.uint32(16) | low
    to, source = types
    value = block.value(i.operands[1], source)
    if source == "bf16":
        value = from_bf16(value)
    special = {"bf16": to_bf16, "tf32": to_tf32}.get(to)
    if special is not None:
        return special(value)
    return _converted(value, numpy_type(to), modes)


def _converted(value: np.ndarray, dtype: np.dtype, modes: list[str]) -> np.ndarray:
    if value.dtype.kind == "f":
        for mode in modes:
            value = INTEGRAL[mode](value) if mode in INTEGRAL else value
        if dtype.kind != "f":
            # Compared as float64, which holds the limits of every type but the widest.
            limits = np.iinfo(dtype)
            value = np.where(np.isnan(value), 0, np.clip(value.astype(np.float64), limits.min, limits.max))
    elif "sat" in modes:
        value = np.clip(value.astype(np.int64), np.iinfo(dtype).min, np.iinfo(dtype).max)
    result = value.astype(dtype)
    # 8-bit values live in 16-bit registers.
    return result.astype(np.int16 if dtype.kind == "i" else np.uint16) if dtype.itemsize == 1 else result


@acts("mov", "cvta")
def move(block: Block, i: Instruction, mask: Mask) -> None:
    target, source = i.operands
    if isinstance(target, tuple):
        whole = np.ascontiguousarray(block.value(source, i.kind)).view(np.uint8).reshape(block.n, -1)
        width = whole.shape[1] // len(target)
        for n, name in enumerate(target):
            part = np.ascontiguousarray(whole[:, n * width : (n + 1) * width])
            block.put(name, part.view(UNSIGNED[width]).reshape(-1), mask)
    elif isinstance(source, tuple):
        kind = f"b{8 * numpy_type(i.kind).itemsize // len(source)}"
        parts = [np.ascontiguousarray(block.value(n, kind)).view(np.uint8).reshape(block.n, -1) for n in source]
        block.put(target, np.concatenate(parts, 1).view(numpy_type(i.kind)).reshape(-1), mask)
    else:
        block.put(target, block.value(source, i.kind), mask)
