"""Sampled dot products: out[b, j] = x[b] · W[idx[b, j]].  Reference: saefast.ops.reference.sddmm.

One program per row and block of its entries; partial sums stay in registers over all of D and are added across
threads once, in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["K"])
def sddmm(
    x_ptr,  # (B, D)
    idx_ptr,  # (B, K) integers
    W_ptr,  # (L, D)
    out_ptr,  # (B, K) fp32
    D,
    K,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K, BLOCK_K)
    b = pid // blocks
    offs_k = (pid % blocks).to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    latent = tl.load(idx_ptr + b * K + offs_k, mask=mask_k, other=0).to(tl.int64)
    acc = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = tl.load(x_ptr + b * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        w_ptrs = W_ptr + latent[:, None] * D + offs_d[None, :]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0.0)
        acc += x[None, :] * w.to(tl.float32)
    tl.store(out_ptr + b * K + offs_k, tl.sum(acc, 1), mask=mask_k)
