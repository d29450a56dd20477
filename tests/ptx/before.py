"""Kernels of commit 01928dc with two faults that Triton's interpreter lets pass. For compiled_before.py alone.

`group_gradient` returns early where it has no pieces and goes on behind that with a pointer that is None: it does not
compile. `lean_settle_rows` loads v and the scales in every warp and lets one warp overwrite them, with nothing between.
"""

import triton
import triton.language as tl

BEFORE, AFTER = tl.constexpr(1), tl.constexpr(2)
ROW, COLUMN = tl.constexpr(0x85EBCA6B), tl.constexpr(0x9E3779B9)


@triton.jit
def sum_entries(
    source_ptr, row_ptr, coef_ptr, begin, end, D, offs_d, mask_d, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr
):
    """Σ coef[e] · source[row[e]] over e in begin .. end; row e itself and weight 1 where those are None."""
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, UNROLL):
        # Unrolled so that several rows are on their way at once.
        for u in tl.static_range(UNROLL):
            e = first + u
            live = e < end
            row = e if row_ptr is None else tl.load(row_ptr + e, mask=live, other=0)
            value = tl.load(source_ptr + row.to(tl.int64) * D + offs_d, mask=mask_d & live, other=0.0).to(tl.float32)
            acc += value if coef_ptr is None else tl.load(coef_ptr + e, mask=live, other=0.0) * value
    return acc


@triton.jit
def group_gradient(
    source_ptr,
    offsets_ptr,
    row_ptr,
    coef_ptr,
    pieces_ptr,
    first_ptr,
    r,
    D,
    offs_d,
    mask_d,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The gradient row of group r: its entries, or its pieces where it was cut."""
    begin, end = tl.load(offsets_ptr + r), tl.load(offsets_ptr + r + 1)
    if pieces_ptr is None:
        return sum_entries(source_ptr, row_ptr, coef_ptr, begin, end, D, offs_d, mask_d, BLOCK_D, UNROLL)
    piece, last = tl.load(first_ptr + r), tl.load(first_ptr + r + 1)
    end = tl.where(last > piece, begin, end)
    acc = sum_entries(pieces_ptr, None, None, piece, last, D, offs_d, mask_d, BLOCK_D, UNROLL)
    return acc + sum_entries(source_ptr, row_ptr, coef_ptr, begin, end, D, offs_d, mask_d, BLOCK_D, UNROLL)


@triton.jit
def project_out(g, w):
    """g without its part along w, as saefast.optim.lean.project_out."""
    along = tl.sum(g * w, 0) / tl.maximum(tl.sum(w * w, 0), 1.1754943508222875e-38)
    return g - along * w


@triton.jit
def gradient_squares(
    source_ptr,
    offsets_ptr,
    row_ptr,
    coef_ptr,
    pieces_ptr,
    first_ptr,
    rows_ptr,  # (n,) int32, or None
    w_ptr,  # (R, D), fp32 or bf16
    squares_ptr,  # (n, blocks) out
    D,
    PROJECT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Σ grad² of every row and block, after projection."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    r = pid // blocks
    offs_d = (pid % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    g = group_gradient(
        source_ptr, offsets_ptr, row_ptr, coef_ptr, pieces_ptr, first_ptr, r, D, offs_d, mask_d, BLOCK_D, UNROLL
    )
    if PROJECT:
        i = r if rows_ptr is None else tl.load(rows_ptr + r).to(tl.int64)
        g = project_out(g, tl.load(w_ptr + i * D + offs_d, mask=mask_d, other=0.0).to(tl.float32))
    tl.store(squares_ptr + pid, tl.sum(g * g, 0))


@triton.jit
def unit(w):
    """w at unit norm, as saefast.optim.lean.unit."""
    return tl.div_rn(w, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1.1920928955078125e-07))


@triton.jit
def mix(x):
    """saefast.optim.lean.mix, of uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_bits(when, i, offs_d):
    """saefast.optim.lean.random_bits for row i, `when` being the hash of seed and step."""
    key = mix(when.to(tl.uint32) ^ (i.to(tl.uint32) * ROW))
    return mix(key + offs_d.to(tl.uint32) * COLUMN)


@triton.jit
def as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def lean_moment(m_ptr, scale_ptr, i, at, offs_d, mask_d, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """The first moment in fp32."""
    m = tl.load(m_ptr + at, mask=mask_d, other=0).to(tl.float32)
    scale = tl.load(scale_ptr + i * BLOCKS + offs_d // WIDTH, mask=mask_d, other=0.0).to(tl.float32)
    return m * scale


@triton.jit
def lean_store_weights(w, bits, w_ptr, norms_ptr, i, at, mask_d):
    """w rounded stochastically to bf16: up with the probability of its distance from below."""
    words = w.to(tl.uint32, bitcast=True)
    # What is cast holds its value exactly, so that no other rounding follows.
    rounded = as_float(((words + (bits & 0xFFFF)) >> 16) << 16)
    tl.store(w_ptr + at, rounded.to(tl.bfloat16), mask=mask_d)
    if norms_ptr is not None:
        tl.store(norms_ptr + i, tl.sqrt_rn(tl.sum(w * w, 0)))


@triton.jit
def lean_settle(w, m, v, missed_ptr, r, n, NORM: tl.constexpr):
    """settle, with one second moment for the whole row."""
    late = tl.load(missed_ptr + r) > 0
    drift, eps = tl.load(missed_ptr + n + r), tl.load(missed_ptr + 2 * n + r)
    moved = unit(w) if NORM == BEFORE else w
    moved = moved - tl.div_rn(drift, tl.sqrt_rn(v) + eps) * m
    moved = unit(moved) if NORM == AFTER else moved
    return tl.where(late, moved, w), m * tl.load(missed_ptr + 3 * n + r), v * tl.load(missed_ptr + 4 * n + r)


@triton.jit(do_not_specialize=["n", "when"])
def lean_settle_rows(
    rows_ptr,  # (n,) int32, or None
    missed_ptr,  # (5, n) fp32, or None: rows are scaled to unit norm only
    w_ptr,  # (R, D) bf16
    m_ptr,  # (R, D) int8
    scale_ptr,  # (R, BLOCKS) bf16
    v_ptr,  # (R,) fp32
    norms_ptr,
    n,
    D,
    when,  # the hash of seed and step
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """catch_up and normalise_rows of a lean matrix, a row a program."""
    r = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    i = r if rows_ptr is None else tl.load(rows_ptr + r).to(tl.int64)
    at = i * D + offs_d
    if missed_ptr is None:
        w = unit(tl.load(w_ptr + at, mask=mask_d, other=0.0).to(tl.float32))
        lean_store_weights(w, random_bits(when, i, offs_d), w_ptr, norms_ptr, i, at, mask_d)
    elif tl.load(missed_ptr + r) > 0:
        w = tl.load(w_ptr + at, mask=mask_d, other=0.0).to(tl.float32)
        m = lean_moment(m_ptr, scale_ptr, i, at, offs_d, mask_d, WIDTH, BLOCKS)
        w, _, v = lean_settle(w, m, tl.load(v_ptr + i), missed_ptr, r, n, NORM)
        lean_store_weights(w, random_bits(when, i, offs_d), w_ptr, norms_ptr, i, at, mask_d)
        tl.store(v_ptr + i, v)
        # Only the scales shrink: the 8-bit values stay. Rounded to nearest bf16, ties to even, bit by bit.
        for b in tl.static_range(BLOCKS):
            scale = tl.load(scale_ptr + i * BLOCKS + b).to(tl.float32) * tl.load(missed_ptr + 3 * n + r)
            words = scale.to(tl.uint32, bitcast=True)
            words = ((words + 0x7FFF + ((words >> 16) & 1)) >> 16) << 16
            tl.store(scale_ptr + i * BLOCKS + b, as_float(words).to(tl.bfloat16))
