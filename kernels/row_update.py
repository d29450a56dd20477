"""Gradient rows summed over groups and used by Adam on the spot.

Reference: saefast.optim.reference.update_rows, gradient_squares, catch_up and normalise_rows.

One program per row and block of columns; what needs a whole row (projection, norms) is asked for with one block only.
A group longer than CUT is summed in pieces of CUT entries by `piece_sums`, and its row adds up the pieces: no program
walks a long group, and the order of additions is fixed, so results repeat bit for bit.
What a row missed in the steps since its last update (moments' decay, drift) is looked up in the table of saefast.optim.
"""

import triton
import triton.language as tl

# saefast.optim.state.Norm.
BEFORE, AFTER = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def sum_entries(
    source_ptr, row_ptr, coef_ptr, begin, end, D, offs_d, mask_d, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr
):
    """Σ coef[e] · source[row[e]] over e in begin .. end; row e itself and weight 1 where those are None. A row of -1
    adds nothing."""
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, UNROLL):
        # Unrolled so that several rows are on their way at once.
        for u in tl.static_range(UNROLL):
            e = first + u
            live = e < end
            row = e if row_ptr is None else tl.load(row_ptr + e, mask=live, other=0)
            there = mask_d & live & (row >= 0)
            value = tl.load(source_ptr + row.to(tl.int64) * D + offs_d, mask=there, other=0.0).to(tl.float32)
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
    # One return: behind an early one the compiler would go on to type-check what needs the pointer, which is None.
    if pieces_ptr is None:
        acc = sum_entries(source_ptr, row_ptr, coef_ptr, begin, end, D, offs_d, mask_d, BLOCK_D, UNROLL)
    else:
        piece, last = tl.load(first_ptr + r), tl.load(first_ptr + r + 1)
        end = tl.where(last > piece, begin, end)
        acc = sum_entries(pieces_ptr, None, None, piece, last, D, offs_d, mask_d, BLOCK_D, UNROLL)
        acc += sum_entries(source_ptr, row_ptr, coef_ptr, begin, end, D, offs_d, mask_d, BLOCK_D, UNROLL)
    return acc


@triton.jit(do_not_specialize=["n"])
def piece_sums(
    source_ptr,  # (rows, D)
    offsets_ptr,  # (n + 1,) int32
    row_ptr,  # (entries,) int32, or None
    coef_ptr,  # (entries,), or None
    first_ptr,  # (n + 1,) int32: group r has pieces first[r] .. first[r + 1]
    group_ptr,  # (pieces,) int32: the group of each piece
    out_ptr,  # (pieces, D) fp32
    n,
    D,
    CUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # Block after block of columns, each with all pieces: the part of source that they all gather from stays in L2.
    room = tl.num_programs(0) // tl.cdiv(D, BLOCK_D)
    piece = (tl.program_id(0) % room).to(tl.int64)
    # There is room for more pieces than there may be.
    if piece < tl.load(first_ptr + n):
        r = tl.load(group_ptr + piece).to(tl.int64)
        offs_d = tl.program_id(0) // room * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        begin = tl.load(offsets_ptr + r) + (piece.to(tl.int32) - tl.load(first_ptr + r)) * CUT
        end = tl.minimum(begin + CUT, tl.load(offsets_ptr + r + 1))
        acc = sum_entries(source_ptr, row_ptr, coef_ptr, begin, end, D, offs_d, mask_d, BLOCK_D, UNROLL)
        tl.store(out_ptr + piece * D + offs_d, acc, mask=mask_d)


@triton.jit
def unit(w):
    """w at unit norm, as saefast.optim.lean.unit."""
    return tl.div_rn(w, tl.maximum(tl.sqrt_rn(tl.sum(w * w, 0)), 1.1920928955078125e-07))


@triton.jit
def project_out(g, w):
    """g without its part along w, as saefast.optim.lean.project_out."""
    along = tl.sum(g * w, 0) / tl.maximum(tl.sum(w * w, 0), 1.1754943508222875e-38)
    return g - along * w


@triton.jit
def add_along(g, w, along_ptr, r, D, offs_d, mask_d, ALONG: tl.constexpr):
    """g with the part of gradient row r along its weights w: saefast.optim.lean.add_along."""
    if along_ptr is not None:
        if ALONG == 1:
            g += tl.load(along_ptr + r) * w
        else:
            g += tl.load(along_ptr + r * ALONG + offs_d // (D // ALONG), mask=mask_d, other=0.0) * w
    return g


@triton.jit
def row_of(rows_ptr, r):
    """The matrix's row of a job's r-th row; negative for those that only fill the job up to a fixed size."""
    return r if rows_ptr is None else tl.load(rows_ptr + r).to(tl.int64)


@triton.jit
def missed_by(last_ptr, drift_ptr, drift_eps_ptr, i, until, log1, log2):
    """What row i missed up to step `until` (see DriftTable): whether anything, drift, drift_eps, two decays."""
    since = tl.minimum(tl.load(last_ptr + i), until)
    steps = (until - since).to(tl.float32)
    late = steps > 0
    drift = tl.load(drift_ptr + since).to(tl.float32)
    # Entries that the table does not have yet are 0, and so may v be.
    eps = tl.where(late, tl.load(drift_eps_ptr + since).to(tl.float32), 1.0)
    # 1 where nothing was missed: 0 times the logarithm of a beta of 0 is NaN.
    return late, drift, eps, tl.where(late, tl.exp2(steps * log1), 1.0), tl.where(late, tl.exp2(steps * log2), 1.0)


@triton.jit
def settle(w, m, v, late, drift, eps, decay1, decay2, NORM: tl.constexpr):
    """The row as of step `until`: see saefast.optim.reference.catch_up."""
    moved = unit(w) if NORM == BEFORE else w
    moved = moved - drift * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    moved = unit(moved) if NORM == AFTER else moved
    return tl.where(late, moved, w), m * decay1, v * decay2


@triton.jit(do_not_specialize=["n", "step"])
def mark_rows(
    rows_ptr,  # (n,) int32
    last_ptr,  # (R,) int32
    n,
    step,
    BLOCK: tl.constexpr,
):
    """The rows stand at `step` now, or at a later one as before."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.load(rows_ptr + offs, mask=offs < n, other=-1)
    last = tl.load(last_ptr + i, mask=i >= 0, other=0)
    tl.store(last_ptr + i, tl.maximum(last, step), mask=i >= 0)


@triton.jit
def store_weights(w, w_ptr, shadow_ptr, norms_ptr, i, at, mask_d):
    tl.store(w_ptr + at, w, mask=mask_d)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + at, w.to(tl.bfloat16), mask=mask_d)
    if norms_ptr is not None:
        tl.store(norms_ptr + i, tl.sqrt_rn(tl.sum(w * w, 0)))


@triton.jit
def gradient_rows(
    source_ptr,
    offsets_ptr,
    row_ptr,
    coef_ptr,
    pieces_ptr,
    first_ptr,
    along_ptr,  # (n, ALONG), or None
    rows_ptr,  # (n,) int32, or None
    w_ptr,  # (R, D), fp32 or bf16, or None: nothing is projected or added along it
    out_ptr,  # (n, D) fp32 out, or None
    squares_ptr,  # (n, blocks) fp32 out, or None
    D,
    PROJECT: tl.constexpr,
    ALONG: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Gradient rows where they, or Σ grad² of every row and block after projection, are all that is wanted."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    r = pid // blocks
    offs_d = (pid % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    g = group_gradient(
        source_ptr, offsets_ptr, row_ptr, coef_ptr, pieces_ptr, first_ptr, r, D, offs_d, mask_d, BLOCK_D, UNROLL
    )
    if out_ptr is not None:
        tl.store(out_ptr + r * D + offs_d, g, mask=mask_d)
    if squares_ptr is not None:
        if PROJECT or along_ptr is not None:
            i = row_of(rows_ptr, r)
            # A row that is not there has no entry either: nothing to project.
            w = tl.load(w_ptr + i * D + offs_d, mask=mask_d & (i >= 0), other=0.0).to(tl.float32)
            g = add_along(g, w, along_ptr, r, D, offs_d, mask_d, ALONG)
            g = project_out(g, w) if PROJECT else g
        tl.store(squares_ptr + pid, tl.sum(g * g, 0))


@triton.jit(do_not_specialize=["until", "log1", "log2"])
def settle_rows(
    rows_ptr,  # (n,) int32, or None; negative ones are passed over
    last_ptr,  # (R,) int32, or None: nothing is settled, rows are scaled to unit norm only
    drift_ptr,  # (steps + 1,) fp64
    drift_eps_ptr,
    w_ptr,
    m_ptr,
    v_ptr,
    shadow_ptr,  # (R, D) bf16, or None
    norms_ptr,  # (R,) fp32, or None
    until,
    log1,  # log2 β1
    log2,
    D,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """catch_up and normalise_rows."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    offs_d = (pid % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    i = row_of(rows_ptr, pid // blocks)
    at = i * D + offs_d
    if i >= 0:
        if last_ptr is None:
            w = unit(tl.load(w_ptr + at, mask=mask_d, other=0.0))
            store_weights(w, w_ptr, shadow_ptr, norms_ptr, i, at, mask_d)
        else:
            late, drift, eps, decay1, decay2 = missed_by(last_ptr, drift_ptr, drift_eps_ptr, i, until, log1, log2)
            if late:
                # A column beyond the row has drift_eps below its v of 0: no 0 / 0 there.
                w, m = tl.load(w_ptr + at, mask=mask_d, other=0.0), tl.load(m_ptr + at, mask=mask_d, other=0.0)
                v = tl.load(v_ptr + at, mask=mask_d, other=0.0)
                w, m, v = settle(w, m, v, late, drift, eps, decay1, decay2, NORM)
                store_weights(w, w_ptr, shadow_ptr, norms_ptr, i, at, mask_d)
                tl.store(m_ptr + at, m, mask=mask_d)
                tl.store(v_ptr + at, v, mask=mask_d)


@triton.jit(
    do_not_specialize=["until", "log1", "log2", "grad_scale", "lerp1", "beta2", "lerp2", "rate", "root2", "eps"]
)
def row_update(
    source_ptr,
    offsets_ptr,
    row_ptr,
    coef_ptr,
    pieces_ptr,  # (pieces, D) of `piece_sums`, or None: no group was cut
    first_ptr,
    along_ptr,  # (n, ALONG), or None
    rows_ptr,
    last_ptr,
    drift_ptr,
    drift_eps_ptr,
    w_ptr,
    m_ptr,
    v_ptr,
    shadow_ptr,
    norms_ptr,
    squares_ptr,  # (n, blocks) out; rows that are passed over leave theirs
    until,  # the step before
    log1,
    log2,
    D,
    grad_scale,
    lerp1,  # 1 - β1
    beta2,
    lerp2,  # 1 - β2
    rate,  # lr / (1 - β1^step)
    root2,  # √(1 - β2^step)
    eps,
    PROJECT: tl.constexpr,
    ALONG: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    r = pid // blocks
    offs_d = (pid % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    i = row_of(rows_ptr, r)
    at = i * D + offs_d
    if i >= 0:
        g = group_gradient(
            source_ptr, offsets_ptr, row_ptr, coef_ptr, pieces_ptr, first_ptr, r, D, offs_d, mask_d, BLOCK_D, UNROLL
        )
        late, drift, due, decay1, decay2 = missed_by(last_ptr, drift_ptr, drift_eps_ptr, i, until, log1, log2)
        w, m = tl.load(w_ptr + at, mask=mask_d, other=0.0), tl.load(m_ptr + at, mask=mask_d, other=0.0)
        v = tl.load(v_ptr + at, mask=mask_d, other=0.0)
        w, m, v = settle(w, m, v, late, drift, due, decay1, decay2, NORM)
        g = add_along(g, w, along_ptr, r, D, offs_d, mask_d, ALONG)
        w = unit(w) if NORM == BEFORE else w
        g = project_out(g, w) if PROJECT else g
        tl.store(squares_ptr + pid, tl.sum(g * g, 0))
        g *= grad_scale
        m += (g - m) * lerp1
        v = v * beta2 + lerp2 * g * g
        w -= rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
        w = unit(w) if NORM == AFTER else w
        store_weights(w, w_ptr, shadow_ptr, norms_ptr, i, at, mask_d)
        tl.store(m_ptr + at, m, mask=mask_d)
        tl.store(v_ptr + at, v, mask=mask_d)


# saefast.optim.lean: the hash of a row and of a column.
ROW, COLUMN = tl.constexpr(0x85EBCA6B), tl.constexpr(0x9E3779B9)


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
def lean_store_moment(m, bits, m_ptr, scale_ptr, i, at, offs_d, mask_d, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """m as 8-bit integers times a scale a block, rounded stochastically."""
    inverse = tl.zeros_like(m)
    for b in tl.static_range(BLOCKS):
        here = offs_d // WIDTH == b
        most = tl.div_rn(tl.max(tl.where(here, tl.abs(m), 0.0), 0), 127.0)
        # Rounded up to bf16, so that no value exceeds 127 scales.
        scale = as_float(((most.to(tl.uint32, bitcast=True) + 0xFFFF) >> 16) << 16)
        tl.store(scale_ptr + i * BLOCKS + b, scale.to(tl.bfloat16))
        # A block of zeros, or of values too small for a normal scale, is stored as zeros.
        normal = scale >= 1.1754943508222875e-38
        inverse = tl.where(here, tl.where(normal, tl.div_rn(1.0, tl.where(normal, scale, 1.0)), 0.0), inverse)
    q = tl.floor(m * inverse + (bits >> 16).to(tl.float32) * 0.0000152587890625)
    tl.store(m_ptr + at, tl.minimum(tl.maximum(q, -127.0), 127.0).to(tl.int8), mask=mask_d)


@triton.jit
def lean_settle(w, m, v, late, drift, eps, decay1, decay2, NORM: tl.constexpr):
    """settle, with one second moment for the whole row."""
    moved = unit(w) if NORM == BEFORE else w
    moved = moved - tl.div_rn(drift, tl.sqrt_rn(v) + eps) * m
    moved = unit(moved) if NORM == AFTER else moved
    return tl.where(late, moved, w), m * decay1, v * decay2


@triton.jit(do_not_specialize=["until", "log1", "log2", "when"])
def lean_settle_rows(
    rows_ptr,  # (n,) int32, or None; negative ones are passed over
    last_ptr,  # (R,) int32, or None: rows are scaled to unit norm only
    drift_ptr,
    drift_eps_ptr,
    w_ptr,  # (R, D) bf16
    m_ptr,  # (R, D) int8
    scale_ptr,  # (R, BLOCKS) bf16
    v_ptr,  # (R,) fp32
    norms_ptr,
    until,
    log1,
    log2,
    D,
    when,  # the hash of seed and step
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,  # a power of 2, at least BLOCKS
    BLOCK_D: tl.constexpr,
):
    """catch_up and normalise_rows of a lean matrix, a row a program."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    i = row_of(rows_ptr, tl.program_id(0).to(tl.int64))
    at = i * D + offs_d
    if i >= 0:
        if last_ptr is None:
            w = unit(tl.load(w_ptr + at, mask=mask_d, other=0.0).to(tl.float32))
            lean_store_weights(w, random_bits(when, i, offs_d), w_ptr, norms_ptr, i, at, mask_d)
        else:
            late, drift, eps, decay1, decay2 = missed_by(last_ptr, drift_ptr, drift_eps_ptr, i, until, log1, log2)
            if late:
                w = tl.load(w_ptr + at, mask=mask_d, other=0.0).to(tl.float32)
                m = lean_moment(m_ptr, scale_ptr, i, at, offs_d, mask_d, WIDTH, BLOCKS)
                v = tl.load(v_ptr + i)
                offs_b = tl.arange(0, ROOM)
                scale_ptrs, mask_b = scale_ptr + i * BLOCKS + offs_b, offs_b < BLOCKS
                scale = tl.load(scale_ptrs, mask=mask_b, other=0.0).to(tl.float32)
                # Every warp has read v and the scales before one of them overwrites either.
                tl.debug_barrier()
                w, _, v = lean_settle(w, m, v, late, drift, eps, decay1, decay2, NORM)
                lean_store_weights(w, random_bits(when, i, offs_d), w_ptr, norms_ptr, i, at, mask_d)
                tl.store(v_ptr + i, v)
                # Only the scales shrink: the 8-bit values stay.
                tl.store(scale_ptrs, nearest(scale * decay1).to(tl.bfloat16), mask=mask_b)


@triton.jit
def nearest(x):
    """x rounded to the nearest bf16, ties to even, bit by bit; in fp32, so that no cast rounds it otherwise."""
    words = x.to(tl.uint32, bitcast=True)
    return as_float(((words + 0x7FFF + ((words >> 16) & 1)) >> 16) << 16)


@triton.jit(
    do_not_specialize=["until", "log1", "log2", "when", "grad_scale", "lerp1", "beta2", "lerp2", "rate", "root2", "eps"]
)
def lean_row_update(
    source_ptr,
    offsets_ptr,
    row_ptr,
    coef_ptr,
    pieces_ptr,
    first_ptr,
    along_ptr,  # (n, ALONG), or None
    rows_ptr,
    last_ptr,
    drift_ptr,
    drift_eps_ptr,
    w_ptr,
    m_ptr,
    scale_ptr,
    v_ptr,
    norms_ptr,
    squares_ptr,  # (n,) out
    until,
    log1,
    log2,
    D,
    when,
    grad_scale,
    lerp1,
    beta2,
    lerp2,
    rate,
    root2,
    eps,
    PROJECT: tl.constexpr,
    ALONG: tl.constexpr,
    NORM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """row_update of a lean matrix, a row a program."""
    r = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    i = row_of(rows_ptr, r)
    at = i * D + offs_d
    if i >= 0:
        g = group_gradient(
            source_ptr, offsets_ptr, row_ptr, coef_ptr, pieces_ptr, first_ptr, r, D, offs_d, mask_d, BLOCK_D, UNROLL
        )
        late, drift, due, decay1, decay2 = missed_by(last_ptr, drift_ptr, drift_eps_ptr, i, until, log1, log2)
        w = tl.load(w_ptr + at, mask=mask_d, other=0.0).to(tl.float32)
        m = lean_moment(m_ptr, scale_ptr, i, at, offs_d, mask_d, WIDTH, BLOCKS)
        w, m, v = lean_settle(w, m, tl.load(v_ptr + i), late, drift, due, decay1, decay2, NORM)
        g = add_along(g, w, along_ptr, r, D, offs_d, mask_d, ALONG)
        w = unit(w) if NORM == BEFORE else w
        g = project_out(g, w) if PROJECT else g
        tl.store(squares_ptr + r, tl.sum(g * g, 0))
        g *= grad_scale
        m += (g - m) * lerp1
        v = v * beta2 + lerp2 * (tl.sum(g * g, 0) / D)
        w -= tl.div_rn(rate, tl.div_rn(tl.sqrt_rn(v), root2) + eps) * m
        w = unit(w) if NORM == AFTER else w
        bits = random_bits(when, i, offs_d)
        lean_store_weights(w, bits, w_ptr, norms_ptr, i, at, mask_d)
        lean_store_moment(m, bits, m_ptr, scale_ptr, i, at, offs_d, mask_d, WIDTH, BLOCKS)
        # The sums over the row stand between this and the loads of v and the scales by other warps.
        tl.store(v_ptr + i, v)
