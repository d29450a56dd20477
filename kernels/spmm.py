"""Sparse @ dense: out[b] = Σ_j acts[b, j] · W[idx[b, j]].  Reference: saefast.ops.reference.spmm.

One program per row and block of columns; entries are added in the order they are stored, so a result does not depend
on how programs are scheduled or how many rows there are. Rows are K entries each, or CSR with `row_ptr`.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["K"])
def spmm(
    acts_ptr,  # (B, K) or (nnz,)
    idx_ptr,  # (B, K) or (nnz,) integers
    row_ptr,  # (B + 1,) int64, or None
    W_ptr,  # (L, D)
    out_ptr,  # (B, D)
    D,
    K,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    b = pid // blocks
    offs_d = (pid % blocks).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    if row_ptr is None:
        first, end = b * K, b * K + K
    else:
        first, end = tl.load(row_ptr + b), tl.load(row_ptr + b + 1)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(first, end, UNROLL):
        # Unrolled so that several rows of W are on their way at once.
        for u in tl.static_range(UNROLL):
            live = end - j > u
            latent = tl.load(idx_ptr + j + u, mask=live, other=0).to(tl.int64)
            act = tl.load(acts_ptr + j + u, mask=live, other=0.0).to(tl.float32)
            width = tl.where(live, D, 0)
            w = tl.load(W_ptr + latent * D + offs_d, mask=offs_d < width, other=0.0)
            acc += act * w.to(tl.float32)
    tl.store(out_ptr + b * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=offs_d < D)
