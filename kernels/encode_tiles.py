"""Tiles of x · W_encᵀ + b_enc that store only what can still be selected.

Reference: saefast.ops.reference.encode_topk.

One launch covers a chunk of columns (column c of a chunk is latent start + c, or latents[start + c]). Columns form
groups of GROUP. Of each group a tile always stores one number, and the fp32 values only where that number says they
can matter:

    top-k      the group's maximum; values where it beats `threshold` of the row (the k-th best so far, NaN = none yet)
    COUNT      how many values beat `threshold` of their latent; values where there is one

so the store is predicated per group, there is no counter, no capacity, and nothing depends on the order of programs.
Comparisons are written `~(a <= b)`: a NaN always passes and surfaces in the result.

Three sources of the product, one epilogue: pointers (any architecture, any alignment, gathers rows of a latent list),
host TMA descriptors in a persistent grid (sm_90 and later), and a finished product of the GEMM library in scratch.
All three have run on an H100 (bench/NOTES.md). The second has changed since, by a fence and by how wide tiles are
stored: as it stands it is unproven on a GPU, and has run as PTX on a CPU.
"""

import triton
import triton.language as tl

# A new batch size, chunk or list length must not compile a new kernel.
RUNTIME = ["B", "n", "start", "span"]


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile_at(tile, B, n, span, BLOCK_B: tl.constexpr, BLOCK_L: tl.constexpr):
    """Tile number -> (row block, column block). Row blocks run fastest within `span` of them, so that their part of
    x stays in L2 while W_enc streams past once per span."""
    blocks_b = tl.cdiv(B, BLOCK_B)
    per_span = span * tl.cdiv(n, BLOCK_L)
    first = tile // per_span * span
    height = tl.minimum(blocks_b - first, span)
    within = tile % per_span
    return first + within % height, within // height


@triton.jit
def _store_groups(
    acc,  # (BLOCK_B, BLOCK_L) fp32 products
    offs_b,
    offs_l,
    block_l,
    B,
    n,
    start,
    stride,
    bias_ptr,
    scale_ptr,
    threshold_ptr,
    threshold_step,
    groups_ptr,
    scratch_ptr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    WRITE: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK_L // GROUP
    # Columns past the end repeat the last one or hold zeros: merge_topk never looks at them.
    cols = start + tl.minimum(offs_l, n - 1)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols)[None, :]
    rank = acc
    if scale_ptr is not None:
        rank = acc * tl.load(scale_ptr + cols)[None, :]

    mask_b = offs_b < B
    if COUNT:
        theta = tl.load(threshold_ptr + cols * threshold_step)
        on = ~(acc <= theta[None, :]) & (offs_l < n)[None, :]
        summary = tl.sum(tl.reshape(on.to(tl.int32), (BLOCK_B, GROUPS, GROUP)), 2)
        keep = summary > 0
    else:
        tau = tl.load(threshold_ptr + offs_b, mask=mask_b, other=float("inf"))
        summary = tl.reduce(tl.reshape(rank, (BLOCK_B, GROUPS, GROUP)), 2, nan_max)
        keep = ~(summary <= tau[:, None])

    offs_g = block_l * GROUPS + tl.arange(0, GROUPS)
    row = offs_b.to(tl.int64)
    mask = mask_b[:, None] & (offs_g * GROUP < n)[None, :]
    tl.store(groups_ptr + row[:, None] * (stride // GROUP) + offs_g[None, :], summary, mask=mask)
    if WRITE:
        offs = (offs_g * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
        dest = scratch_ptr + (row * stride)[:, None, None] + offs[None, :, :]
        values = tl.reshape(acc, (BLOCK_B, GROUPS, GROUP))
        tl.store(dest, values, mask=tl.broadcast_to((keep & mask)[:, :, None], (BLOCK_B, GROUPS, GROUP)))


@triton.jit(do_not_specialize=RUNTIME)
def tiles_pointer(
    x_ptr,  # (B, D)
    W_ptr,  # (L, D)
    latents_ptr,  # (>= start + n,) ids of the rows of W, or None
    bias_ptr,  # (columns,) fp32 or None, by column
    scale_ptr,  # (columns,) fp32 or None
    threshold_ptr,  # (B,) fp32, or with COUNT (columns,) fp32
    groups_ptr,  # (B, stride // GROUP) fp32, or with COUNT int32
    scratch_ptr,  # (B, stride) fp32
    B,
    n,
    start,
    D,
    stride,
    threshold_step,
    span,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile a program, operands through pointers."""
    block_b, block_l = _tile_at(tl.program_id(0), B, n, span, BLOCK_B, BLOCK_L)
    offs_b = block_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_l = block_l * BLOCK_L + tl.arange(0, BLOCK_L)
    offs_d = tl.arange(0, BLOCK_D)
    # Rows past an edge repeat the last one, which spares the loop a mask.
    rows = start + tl.minimum(offs_l, n - 1)
    if latents_ptr is not None:
        rows = tl.load(latents_ptr + rows)
    x_ptrs = x_ptr + tl.minimum(offs_b, B - 1).to(tl.int64)[:, None] * D + offs_d[None, :]
    W_ptrs = W_ptr + rows.to(tl.int64)[None, :] * D + offs_d[:, None]
    acc = tl.zeros((BLOCK_B, BLOCK_L), tl.float32)
    for d in range(0, D, BLOCK_D):
        x = tl.load(x_ptrs, mask=(offs_d < D - d)[None, :], other=0.0)
        w = tl.load(W_ptrs, mask=(offs_d < D - d)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_D
        W_ptrs += BLOCK_D
    _store_groups(
        acc, offs_b, offs_l, block_l, B, n, start, stride, bias_ptr, scale_ptr, threshold_ptr, threshold_step,
        groups_ptr, scratch_ptr, BLOCK_B, BLOCK_L, GROUP, COUNT, True,
    )  # fmt: skip


@triton.jit
def _fenced(tile):
    """The tile's number, once what this thread wrote to shared memory is there for TMA: the start of the mbarriers,
    behind which the compiler leaves the fence out of a flattened loop."""
    return tl.inline_asm_elementwise(
        "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [tile], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=RUNTIME)
def tiles_descriptor(
    x_desc,  # (B, D) in blocks (BLOCK_B, BLOCK_D)
    W_desc,  # (L, D) in blocks (BLOCK_L, BLOCK_D)
    bias_ptr,
    scale_ptr,
    threshold_ptr,
    groups_ptr,
    scratch_ptr,
    B,
    n,
    start,
    D,
    stride,
    threshold_step,
    span,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    FENCE: tl.constexpr,  # False in the interpreter, which knows no assembly
):
    """Persistent: program p does tiles p, p + programs, …; TMA fills what lies past an edge with zeros."""
    tiles = tl.cdiv(B, BLOCK_B) * tl.cdiv(n, BLOCK_L)
    # Flattened, the next tile's operands are on their way while this one is filtered and stored.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block_b, block_l = _tile_at(_fenced(tile) if FENCE else tile, B, n, span, BLOCK_B, BLOCK_L)
        acc = tl.zeros((BLOCK_B, BLOCK_L), tl.float32)
        for d in range(0, D, BLOCK_D):
            x = x_desc.load([block_b * BLOCK_B, d])
            w = W_desc.load([start + block_l * BLOCK_L, d])
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        offs_b = block_b * BLOCK_B + tl.arange(0, BLOCK_B)
        # A wide tile is stored half by half: on its way to other threads all of it has no room beside the next
        # operands.
        PARTS: tl.constexpr = 2 if BLOCK_L > 128 else 1
        WIDTH: tl.constexpr = BLOCK_L // PARTS
        if PARTS == 2:  # noqa: SIM108 -- a branch of constants, of which the compiler sees one
            parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_B, 2, WIDTH)), (0, 2, 1)))
        else:
            parts = (acc,)
        for p in tl.static_range(PARTS):
            block = block_l * PARTS + p
            offs_l = block * WIDTH + tl.arange(0, WIDTH)
            _store_groups(
                parts[p], offs_b, offs_l, block, B, n, start, stride, bias_ptr, scale_ptr, threshold_ptr,
                threshold_step, groups_ptr, scratch_ptr, BLOCK_B, WIDTH, GROUP, COUNT, True,
            )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def tiles_library(
    bias_ptr,
    scale_ptr,
    threshold_ptr,
    groups_ptr,
    scratch_ptr,  # (B, stride) fp32 from a product's first column; the bias is added where groups pass
    B,
    n,
    start,
    stride,
    threshold_step,
    span,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The epilogue alone, on a product that a library GEMM left in scratch."""
    block_b, block_l = _tile_at(tl.program_id(0), B, n, span, BLOCK_B, BLOCK_L)
    offs_b = block_b * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_l = block_l * BLOCK_L + tl.arange(0, BLOCK_L)
    source = scratch_ptr + offs_b.to(tl.int64)[:, None] * stride + offs_l[None, :]
    # Whole groups, not to n: loads stay wide, and what stands past n is never looked at.
    reach = tl.cdiv(n, GROUP) * GROUP
    acc = tl.load(source, mask=(offs_b < B)[:, None] & (offs_l < reach)[None, :], other=0.0)
    _store_groups(
        acc, offs_b, offs_l, block_l, B, n, start, stride, bias_ptr, scale_ptr, threshold_ptr, threshold_step,
        groups_ptr, scratch_ptr, BLOCK_B, BLOCK_L, GROUP, COUNT, bias_ptr is not None,
    )  # fmt: skip
