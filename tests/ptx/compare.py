"""How far two results of one launch may be apart: Triton's interpreter's, and the compiled code's.

Integers, and floats that are only moved and compared, are equal bit by bit. Sums are not: the compiler contracts a
product and a sum into one rounding, and adds in another order. If either result went through n roundings, each off by
at most u of the largest number around (2^-24 in fp32, 2^-53 in fp64), then they are at most 2 n u of it apart; n is
counted while the code runs, in the block with the most, and the largest number is the buffer's, before and after.
On top of that: bf16 and fp16 may differ by one step, because the interpreter truncates where the hardware rounds and
because what is rounded differs in its last bits; so may the 8-bit moments of the lean optimiser.
"""

from dataclasses import dataclass

import numpy as np
import torch

from ptx.formats import from_bf16

# A rounding's largest error, as a share of the number.
U = {torch.float64: 2.0**-53}
U_FP32 = 2.0**-24
# One step of a number, as a share of it.
STEP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass
class Gap:
    """A buffer's differences."""

    differing: int
    elements: int
    share: float
    """The largest difference over what is allowed; above 1 is a failure."""
    relative: float
    """The largest difference over the buffer's largest number."""


def values(raw: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Bytes -> float64, or int64."""
    if dtype == torch.bfloat16:
        return from_bf16(raw.view(np.uint16)).astype(np.float64)
    found = raw.view(torch.empty(0, dtype=dtype).numpy().dtype)
    return found.astype(np.float64 if dtype.is_floating_point else np.int64)


def gap(got: np.ndarray, want: np.ndarray, before: np.ndarray, dtype: torch.dtype, rounds: int) -> Gap:
    """Of two results' bytes."""
    a, b, old = (values(raw, dtype) for raw in (got, want, before))
    differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if not dtype.is_floating_point:
        off = np.abs(a - b)
        allowed = 1 if dtype == torch.int8 else 0
        share = float(off.max(initial=0)) / allowed if allowed else float("inf") if differ.any() else 0.0
        return Gap(int(differ.sum()), a.size, share, float(off.max(initial=0)))
    finite = np.concatenate([np.abs(x[np.isfinite(x)]) for x in (b, old)])
    largest = float(finite.max(initial=0))
    with np.errstate(invalid="ignore"):
        off = np.where(differ, np.abs(a - b), 0)
        allowed = 2 * rounds * U.get(dtype, U_FP32) * largest + STEP.get(dtype, 0) * np.maximum(np.abs(a), np.abs(b))
    # A NaN or an infinity that only one side has is not near.
    off = np.where(differ & ~np.isfinite(off), np.inf, off)
    share = float((off / np.maximum(np.nan_to_num(allowed), 1e-300))[differ].max(initial=0))
    return Gap(int(differ.sum()), a.size, share, float(off.max(initial=0)) / (largest or 1))
