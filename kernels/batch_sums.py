"""Sums of a batch's rows and of their squares, in fp64.  Reference: saefast.optim.reference.batch_sums.

One program per block of rows and of columns, with the first row as the origin: the rows' variance is then the
difference of two sums of its own size, which fp64 holds to ten digits. No copy of the batch in fp64 is made.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B"])
def batch_sums(
    x_ptr,  # (B, D) fp32
    origin_ptr,  # (D,): its first row
    shifted_ptr,  # (row blocks, D) fp64 out: Σ of x - x[0] down a block's rows
    spread_ptr,  # (row blocks, column blocks) fp64 out: Σ (x - x[0])²
    squares_ptr,  # (row blocks, column blocks) fp64 out: Σ x²
    B,
    D,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    rows, columns = pid // blocks, (pid % blocks).to(tl.int32)
    offs_d = columns * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    origin = tl.load(origin_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float64)
    shifted = tl.zeros((BLOCK_D,), tl.float64)
    spread, squares = tl.zeros((BLOCK_D,), tl.float64), tl.zeros((BLOCK_D,), tl.float64)
    begin = rows * ROWS
    for first in range(begin, begin + ROWS, UNROLL):
        # Unrolled so that several rows are on their way at once.
        for u in tl.static_range(UNROLL):
            mask = mask_d & (first + u < B)
            x = tl.load(x_ptr + (first + u) * D + offs_d, mask=mask, other=0.0).to(tl.float64)
            away = tl.where(mask, x - origin, 0.0)
            shifted += away
            spread += away * away
            squares += x * x
    tl.store(shifted_ptr + rows * D + offs_d, shifted, mask=mask_d)
    tl.store(spread_ptr + pid, tl.sum(spread, 0))
    tl.store(squares_ptr + pid, tl.sum(squares, 0))
