"""The k-th largest of very many keys, four bits at a time.  Reference: saefast.ops.reference.select_kth.

A launch counts for each of 16 continuations of the bits found so far how many keys are at least that large; the next
launch reads its four bits off the counts. Programs count apart and their counts are integers, added by whoever reads
them: nothing is added by atomics, and the answer is exact.
"""

import triton
import triton.language as tl

# Bits found by a launch, and its continuations.
BITS, WAYS = tl.constexpr(4), tl.constexpr(16)


@triton.jit(do_not_specialize=["n", "k", "programs", "shift"])
def count_from(
    keys_ptr,  # (n,) int32, none negative
    before_ptr,  # (1,) int32: the bits that were known before the launch before; None in the first launch
    counts_ptr,  # (programs, WAYS) int32 of the launch before, or None
    found_ptr,  # (1,) int32 out: the bits known now
    out_ptr,  # (programs, WAYS) int32 out
    n,
    k,
    programs,
    shift,  # of the four bits that are counted
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys_ptr + offs, mask=offs < n, other=-1)
    found = 0
    if counts_ptr is not None:
        found = tl.load(before_ptr) + (next_bits(counts_ptr, k, programs) << (shift + BITS))
    ways = tl.arange(0, WAYS)
    # In int64, where the last continuations of the highest bits are no negative numbers.
    least = found + (ways.to(tl.int64) << shift)
    counts = tl.sum((key[:, None] >= least[None, :]).to(tl.int32), 0)
    tl.store(out_ptr + pid * WAYS + ways, counts)
    tl.store(found_ptr, found, mask=pid == 0)


@triton.jit
def next_bits(counts_ptr, k, programs):
    """The largest continuation that at least k keys reach; 0 where none does."""
    ways = tl.arange(0, WAYS)
    total = tl.zeros((WAYS,), tl.int32)
    for p in range(programs):
        total += tl.load(counts_ptr + p * WAYS + ways)
    return tl.sum(((total >= k) & (ways > 0)).to(tl.int32), 0)
