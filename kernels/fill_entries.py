"""A code's entries, grouped by latent, as both matrices' updates want them.

Reference: saefast.optim.reference.fill_entries.

Unproven on a GPU: so far run under Triton's interpreter and compiled ahead of time (tests/test_aot.py).
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "n_tokens", "K", "K_more"])
def fill_entries(
    order_ptr,  # (n,) int32: places in the flattened parts, one part after the other
    acts_ptr,  # (n,)
    grad_ptr,  # (n,)
    bounds_ptr,  # (P,) int32
    dec_row_ptr,  # (n,) int32 out, as the three below
    dec_coef_ptr,
    enc_row_ptr,
    enc_coef_ptr,
    n,
    n_tokens,
    K,  # columns of the first part
    K_more,  # columns of a second one, or 1
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = e < n
    place = tl.load(order_ptr + e, mask=live, other=0)
    second = place >= n_tokens * K
    token = tl.where(second, (place - n_tokens * K) // K_more, place // K)
    plane = tl.zeros_like(place)
    for p in range(P):
        plane += (place - token * K >= tl.load(bounds_ptr + p)).to(tl.int32)
    plane = tl.where(second, P, plane)
    tl.store(dec_row_ptr + e, plane * n_tokens + token, mask=live)
    tl.store(dec_coef_ptr + e, -2 * tl.load(acts_ptr + place, mask=live, other=0.0), mask=live)
    tl.store(enc_row_ptr + e, token, mask=live)
    tl.store(enc_coef_ptr + e, tl.load(grad_ptr + place, mask=live, other=0.0), mask=live)


@triton.jit
def sum_runs(
    coef_ptr,  # (entries,) fp32
    offsets_ptr,  # (n + 1,) int32
    latents_ptr,  # (n,) int32; negative ones have no run
    out_ptr,  # (L,) fp32 out
    BLOCK: tl.constexpr,
):
    """The sum of each run, at its latent's place; a run a program."""
    r = tl.program_id(0)
    latent = tl.load(latents_ptr + r)
    if latent >= 0:
        begin, end = tl.load(offsets_ptr + r), tl.load(offsets_ptr + r + 1)
        acc = tl.zeros((BLOCK,), tl.float32)
        for first in range(begin, end, BLOCK):
            e = first + tl.arange(0, BLOCK)
            acc += tl.load(coef_ptr + e, mask=e < end, other=0.0)
        tl.store(out_ptr + latent, tl.sum(acc, 0))
