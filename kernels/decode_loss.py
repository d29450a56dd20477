"""Decode, residual, sums of squares and gradient to the activations.  Reference: saefast.optim.reference.decode_loss.

One program per token. `decode_loss` is for codes of K entries a token: a block of columns of all K decoder rows is
held in registers, summed down for the reconstruction, and once the residual of those columns is known, summed across
for the gradient. So every decoder row is read exactly once, not counting on caches. `decode_loss_csr` is for codes of
any number of entries a token: it goes through them, a few at a time, for the residual and once more for the gradient.
Sums are taken in an order fixed by the tile: results repeat bit for bit.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["B", "K"])
def decode_loss(
    x_ptr,  # (B, D)
    acts_ptr,  # (B, K)
    idx_ptr,  # (B, K) int32
    W_ptr,  # (L, D)
    b_ptr,  # (D,), or None
    weight_ptr,  # (P,) fp32
    bounds_ptr,  # (P,) int32
    residual_ptr,  # (P, B, D) out
    error_ptr,  # (B, D) out, or None
    squares_ptr,  # (P, B) out
    grad_ptr,  # (B, K) out
    B,
    D,
    K,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    BY_LATENT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    plane_stride = B.to(tl.int64) * D
    offs_k, offs_p = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    mask_k = offs_k < K
    latent = tl.load(idx_ptr + b * K + offs_k, mask=mask_k, other=0)
    act = tl.load(acts_ptr + b * K + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    prefix = prefix_of(latent if BY_LATENT else offs_k, bounds_ptr, P)
    inside = mask_k & (prefix < P)
    # An activation of 0 adds nothing and, behind ReLU, gets no gradient: its row is not read.
    used = inside & (act > 0 if RELU else inside)
    loaded = used | (inside & (act != 0))
    squares, dots = tl.zeros((BLOCK_P,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        w_ptrs = W_ptr + latent.to(tl.int64)[:, None] * D + offs_d[None, :]
        w = tl.load(w_ptrs, mask=loaded[:, None] & mask_d[None, :], other=0.0).to(tl.float32)
        left = tl.load(x_ptr + b * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        if b_ptr is not None:
            left -= tl.load(b_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        r_ptrs = residual_ptr + b * D + offs_d
        plane = tl.zeros((BLOCK_D,), tl.float32)
        for p in range(P):
            left -= tl.sum(tl.where(prefix == p, act, 0.0)[:, None] * w, 0)
            squares += tl.where(offs_p == p, tl.sum(left * left, 0), 0.0)
            plane = tl.load(weight_ptr + p) * left
            if error_ptr is not None:
                tl.store(error_ptr + b * D + offs_d, left, mask=mask_d & (p == MAIN))
            tl.store(r_ptrs + p * plane_stride, plane, mask=mask_d)
        dots += tl.where(prefix == P - 1, tl.sum(plane[None, :] * w, 1), 0.0)
        if P > 1:
            # Other threads may read what these have stored.
            tl.debug_barrier()
            for q in range(1, P):
                p = P - 1 - q
                plane += tl.load(r_ptrs + p * plane_stride, mask=mask_d, other=0.0)
                # Where columns are fewer than threads, several load what one of them stores next.
                tl.debug_barrier()
                tl.store(r_ptrs + p * plane_stride, plane, mask=mask_d)
                dots += tl.where(prefix == p, tl.sum(plane[None, :] * w, 1), 0.0)
    tl.store(squares_ptr + offs_p * B.to(tl.int64) + b, squares, mask=offs_p < P)
    tl.store(grad_ptr + b * K + offs_k, tl.where(used, -2 * dots, 0.0), mask=mask_k)


@triton.jit(do_not_specialize=["B"])
def decode_loss_csr(
    x_ptr,  # (B, D)
    row_ptr,  # (B + 1,) int32
    acts_ptr,  # (entries,)
    idx_ptr,  # (entries,) int32
    W_ptr,  # (L, D)
    b_ptr,  # (D,), or None
    weight_ptr,  # (P,) fp32
    bounds_ptr,  # (P,) int32
    residual_ptr,  # (P, B, D) out
    error_ptr,  # (B, D) out, or None
    squares_ptr,  # (P, B) out
    grad_ptr,  # (entries,) out
    B,
    D,
    P: tl.constexpr,
    MAIN: tl.constexpr,
    BY_LATENT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(row_ptr + b), tl.load(row_ptr + b + 1)
    plane_stride = B.to(tl.int64) * D
    offs_k, offs_p = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    squares = tl.zeros((BLOCK_P,), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        left = tl.load(x_ptr + b * D + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        if b_ptr is not None:
            left -= tl.load(b_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        r_ptrs = residual_ptr + b * D + offs_d
        for p in range(P):
            for first in range(begin, end, BLOCK_K):
                e = first + offs_k
                latent, act, prefix = entries_at(e, e < end, begin, acts_ptr, idx_ptr, bounds_ptr, P, BY_LATENT)
                w = rows_at(W_ptr, latent, (prefix == p) & (act != 0), D, offs_d, mask_d)
                left -= tl.sum(act[:, None] * w, 0)
            squares += tl.where(offs_p == p, tl.sum(left * left, 0), 0.0)
            if error_ptr is not None:
                tl.store(error_ptr + b * D + offs_d, left, mask=mask_d & (p == MAIN))
            tl.store(r_ptrs + p * plane_stride, tl.load(weight_ptr + p) * left, mask=mask_d)
        # Other threads may read what these have stored.
        tl.debug_barrier()
        for q in range(1, P):
            p = P - 1 - q
            later = tl.load(r_ptrs + (p + 1) * plane_stride, mask=mask_d, other=0.0)
            plane = later + tl.load(r_ptrs + p * plane_stride, mask=mask_d, other=0.0)
            # Where columns are fewer than threads, several load what one of them stores next.
            tl.debug_barrier()
            tl.store(r_ptrs + p * plane_stride, plane, mask=mask_d)
            tl.debug_barrier()
    tl.store(squares_ptr + offs_p * B.to(tl.int64) + b, squares, mask=offs_p < P)
    for first in range(begin, end, BLOCK_K):
        e = first + offs_k
        latent, act, prefix = entries_at(e, e < end, begin, acts_ptr, idx_ptr, bounds_ptr, P, BY_LATENT)
        used = (prefix < P) & (act > 0 if RELU else prefix < P)
        dots = tl.zeros((BLOCK_K,), tl.float32)
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask_d = offs_d < D
            w = rows_at(W_ptr, latent, used, D, offs_d, mask_d)
            for p in range(P):
                r = tl.load(residual_ptr + p * plane_stride + b * D + offs_d, mask=mask_d, other=0.0)
                dots += tl.where(prefix == p, tl.sum(r[None, :] * w, 1), 0.0)
        tl.store(grad_ptr + e, tl.where(used, -2 * dots, 0.0), mask=e < end)


@triton.jit
def entries_at(e, live, begin, acts_ptr, idx_ptr, bounds_ptr, P: tl.constexpr, BY_LATENT: tl.constexpr):
    """Latents, activations and prefixes of entries; the prefix is P where there is none, or no entry."""
    latent = tl.load(idx_ptr + e, mask=live, other=0)
    act = tl.load(acts_ptr + e, mask=live, other=0.0).to(tl.float32)
    prefix = prefix_of(latent if BY_LATENT else e - begin, bounds_ptr, P)
    return latent, act, tl.where(live, prefix, P)


@triton.jit
def rows_at(W_ptr, latent, used, D, offs_d, mask_d):
    """Columns of the rows of latents, 0 where a row is not used."""
    ptrs = W_ptr + latent.to(tl.int64)[:, None] * D + offs_d[None, :]
    return tl.load(ptrs, mask=used[:, None] & mask_d[None, :], other=0.0).to(tl.float32)


@triton.jit
def prefix_of(key, bounds_ptr, P: tl.constexpr):
    """The first prefix p with key < bounds[p]; P where there is none."""
    found = tl.zeros_like(key)
    for p in range(P):
        found += (key >= tl.load(bounds_ptr + p)).to(tl.int32)
    return found
