"""Numbers as registers hold them: PTX's types as numpy's, and bf16, fp16 and tf32 as their bits."""

import re
from functools import cache

import numpy as np

UNSIGNED = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
KINDS = {"u": "u", "s": "i", "b": "u", "f": "f"}
BOOL = np.dtype(bool)


@cache
def numpy_type(name: str) -> np.dtype:
    """u32 -> uint32, pred -> bool; bf16 and its like -> uint16, their bits."""
    if name == "pred":
        return BOOL
    found = re.fullmatch(r"([usbf])(8|16|32|64)", name)
    return np.dtype(f"{KINDS[found[1]]}{int(found[2]) // 8}") if found else UNSIGNED[2]


def resized(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same bits as another type: cut, or filled up with zeros, where the widths differ."""
    if value.dtype == dtype or value.dtype == BOOL:
        return value
    if value.dtype.itemsize != dtype.itemsize:
        value = value.view(UNSIGNED[value.dtype.itemsize]).astype(UNSIGNED[dtype.itemsize])
    return value.view(dtype)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def to_tf32(value: np.ndarray) -> np.ndarray:
    """Rounded to 10 bits of mantissa, ties away from zero."""
    return ((value.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def unpacked(words: np.ndarray, kind: str) -> list[np.ndarray]:
    """The float64 values in 32-bit words: one tf32, or two of 16 bits, the lower half first."""
    if kind == "tf32":
        return [words.view(np.float32).astype(np.float64)]
    halves = [(words & np.uint32(0xFFFF)).astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)]
    if kind == "f16":
        return [h.view(np.float16).astype(np.float64) for h in halves]
    return [from_bf16(h).astype(np.float64) for h in halves]
