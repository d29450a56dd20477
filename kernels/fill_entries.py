"""A code's entries, grouped by latent, as both matrices' updates want them.

Reference: saefast.optim.reference.fill_entries.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "B", "K", "begin", "P", "MORE"])
def fill_entries(
    order_ptr,  # (n,) int32: places in the flattened parts, one part after the other
    acts_ptr,  # (entries of all parts,)
    grad_ptr,
    idx_ptr,  # (first part's entries,) int32, or None: prefixes are by place
    row_ptr,  # (B + 1,) int32 of the first part, or None: it has K entries a row
    token_ptr,  # (first part's entries,) int32, or None
    bounds_ptr,  # (P,) int32
    columns_ptr,  # (MORE,) int32: entries a row of the parts after the first
    dec_row_ptr,  # (n,) int32 out, as the three below
    dec_coef_ptr,
    enc_row_ptr,
    enc_coef_ptr,
    n,
    B,
    K,
    begin,  # entries of the first part
    P,  # not constants: unrolled, the comparisons take more registers than there are for them
    MORE,
    BLOCK: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = e < n
    place = tl.load(order_ptr + e, mask=live, other=0)
    first = live & (place < begin)
    if row_ptr is None:
        token = place // K
        key = place - token * K
    else:
        token = tl.load(token_ptr + place, mask=first, other=0)
        key = place - tl.load(row_ptr + token, mask=first, other=0)
    if idx_ptr is not None:
        key = tl.load(idx_ptr + place, mask=first, other=0)
    plane = tl.zeros_like(place)
    for p in range(P):
        plane += (key >= tl.load(bounds_ptr + p)).to(tl.int32)
    act = tl.load(acts_ptr + place, mask=live, other=0.0)
    act = tl.where(first & (plane == P), 0.0, act)
    plane = tl.minimum(plane, P - 1)
    for m in range(MORE):
        columns = tl.load(columns_ptr + m)
        inside = place >= begin
        token = tl.where(inside, (place - begin) // columns, token)
        plane = tl.where(inside, P + m, plane)
        begin += B * columns
    tl.store(dec_row_ptr + e, plane * B + token, mask=live)
    tl.store(dec_coef_ptr + e, -2 * act, mask=live)
    tl.store(enc_row_ptr + e, token, mask=live)
    tl.store(enc_coef_ptr + e, tl.load(grad_ptr + place, mask=live, other=0.0), mask=live)


@triton.jit
def sum_groups(
    coef_ptr,  # (entries,) fp32
    offsets_ptr,  # (n + 1,) int32
    latents_ptr,  # (n,) int32; negative ones have no group
    out_ptr,  # (L,) fp32 out
    BLOCK: tl.constexpr,
):
    """The sum of each group, at its latent's place; a group a program."""
    r = tl.program_id(0)
    latent = tl.load(latents_ptr + r)
    if latent >= 0:
        begin, end = tl.load(offsets_ptr + r), tl.load(offsets_ptr + r + 1)
        acc = tl.zeros((BLOCK,), tl.float32)
        for first in range(begin, end, BLOCK):
            e = first + tl.arange(0, BLOCK)
            acc += tl.load(coef_ptr + e, mask=e < end, other=0.0)
        tl.store(out_ptr + latent, tl.sum(acc, 0))
