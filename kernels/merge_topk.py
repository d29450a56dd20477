"""Merges one chunk's passing groups into each row's running top-k.  Reference: saefast.ops.reference.encode_topk.

One program a row. It compacts the ids of the groups that passed, filters their values, collects the survivors in a
list, and sorts only when that is as long as the running top-k, or the chunk ends: nearly all passing groups hold one
survivor, so sorting before compacting would mostly sort empty places. A value travels as an int64 key,
(its order << 32) | ~column: keys of a row all differ, ties go to the lower column, every NaN stands above +inf.

The running top-k lives in its final form (`acts`, `idx`), so nothing is decoded afterwards. Work and memory follow
what passes; no list has a capacity that data could exceed.
"""

import triton
import triton.language as tl

EMPTY = tl.constexpr(-(2**63))
LOWEST = tl.constexpr(-(2**31))  # no value's order is this low


@triton.jit
def _order(value):
    """fp32 -> int32 ordered as the values are, -0 equal to +0, all NaNs equal and above +inf."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    bits = tl.where(value != value, 0x7FC00000, bits)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(order):
    """The fp32 value of an order; NaN for LOWEST."""
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def _key(order, col):
    return (order.to(tl.int64) << 32) | (0xFFFFFFFF - col.to(tl.int64))


@triton.jit
def _kth_order(best, offs_k, K):
    return tl.max(tl.where(offs_k == K - 1, (best >> 32).to(tl.int32), LOWEST), 0)


@triton.jit
def _load_best(acts_ptr, idx_ptr, scale_ptr, offs_k, K):
    """The running top-k as keys, descending as it was stored; EMPTY beyond K and in slots not filled yet."""
    col = tl.load(idx_ptr + offs_k, mask=offs_k < K, other=-1)
    rank = tl.load(acts_ptr + offs_k, mask=col >= 0, other=0.0)
    if scale_ptr is not None:
        rank *= tl.load(scale_ptr + col, mask=col >= 0, other=0.0)
    return tl.where(col >= 0, _key(_order(rank), col), EMPTY)


@triton.jit
def _store_best(best, acts_ptr, idx_ptr, scale_ptr, scratch_ptr, start, offs_k, K, FIRST: tl.constexpr):
    filled = (best != EMPTY) & (offs_k < K)
    col = (0xFFFFFFFF - (best & 0xFFFFFFFF)).to(tl.int32)
    value = _value((best >> 32).to(tl.int32))
    if scale_ptr is not None:
        # Ranks were scaled, results are not. New entries still stand in scratch; those kept from earlier chunks
        # kept their order too, so the i-th of them is the i-th stored.
        new = filled & (col >= start)
        value = tl.load(scratch_ptr + (col - start), mask=new, other=0.0)
        if not FIRST:
            kept = filled & (col < start)
            nth = tl.cumsum(kept.to(tl.int32), 0) - 1
            value = tl.where(kept, tl.load(acts_ptr + nth, mask=kept, other=0.0), value)
            tl.debug_barrier()
    tl.store(acts_ptr + offs_k, value, mask=offs_k < K)
    tl.store(idx_ptr + offs_k, tl.where(filled, col, -1), mask=offs_k < K)


@triton.jit
def _sort_bitonic(keys, LOG: tl.constexpr):
    """2**LOG keys that rise and then fall, or fall and then rise, in descending order: LOG steps where a sort takes
    LOG * (LOG + 1) / 2."""
    cube = tl.reshape(keys, [2] * LOG)
    for axis in tl.static_range(LOG):
        other = cube ^ tl.xor_sum(cube, axis, keep_dims=True)
        right = tl.reshape(tl.arange(0, 2), [1] * axis + [2] + [1] * (LOG - axis - 1)) == 1
        cube = tl.where((cube > other) != right, cube, other)
    return tl.reshape(cube, [2**LOG])


@triton.jit
def _bound(groups_ptr, n, K, GROUP: tl.constexpr, BOUND: tl.constexpr):
    """A floor for a row's first chunk: K groups have a maximum at or above the K-th largest of them, so K values do.
    The last group counts only if it is whole, because its maximum may come from past the edge."""
    offs_g = tl.arange(0, BOUND)
    whole = (offs_g + 1) * GROUP <= n
    best = tl.where(whole, _order(tl.load(groups_ptr + offs_g, mask=whole, other=0.0)), LOWEST)
    # Bisection of all orders: at least K groups reach `low`, fewer reach `high`.
    low, high = tl.full((), LOWEST, tl.int64), tl.full((), 2**31, tl.int64)
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum((best >= middle.to(tl.int32)).to(tl.int32), 0) >= K
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    # Values equal to it still count, so the floor lies one step below.
    return (tl.maximum(low, LOWEST + 1) - 1).to(tl.int32)


@triton.jit
def _compact_groups(groups_ptr, list_ptr, count, floor, BLOCK_G: tl.constexpr):
    """Writes the numbers of the groups above the floor to the list, ascending; returns how many."""
    found = 0
    for g in range(0, count, BLOCK_G):
        offs_g = g + tl.arange(0, BLOCK_G)
        best = tl.load(groups_ptr + offs_g, mask=offs_g < count, other=float("-inf"))
        hit = (_order(best) > floor) & (offs_g < count)
        nth = found + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(list_ptr + nth, offs_g, mask=hit)
        found += tl.sum(hit.to(tl.int32), 0)
    return found


@triton.jit
def _append_survivors(
    list_ptr,
    i,
    found,
    scratch_ptr,
    scale_ptr,
    keys_ptr,
    held,
    floor,
    n,
    start,
    GROUP: tl.constexpr,
    VISIT: tl.constexpr,
):
    """Filters the values of listed groups i .. i + VISIT, appends keys above the floor; returns how many are held."""
    offs_v = i + tl.arange(0, VISIT)
    group = tl.load(list_ptr + offs_v, mask=offs_v < found, other=0)
    cols = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = (offs_v < found)[:, None] & (cols < n)
    # Whole groups, so that loads are wide; what stands past column n is dropped by `live`.
    rank = tl.load(scratch_ptr + cols, mask=(offs_v < found)[:, None], other=0.0)
    if scale_ptr is not None:
        rank *= tl.load(scale_ptr + start + cols, mask=live, other=0.0)
    order = _order(rank)
    # Columns ascend, so an equal value seen later loses the tie: strictly above.
    live = live & (order > floor)
    each = tl.sum(live.to(tl.int32), 1)
    before = held + tl.cumsum(each, 0) - each
    nth = before[:, None] + tl.cumsum(live.to(tl.int32), 1) - 1
    tl.store(keys_ptr + nth, _key(order, start + cols), mask=live)
    return held + tl.sum(each, 0)


@triton.jit
def _merge_list(best, keys_ptr, held, offs_k, LOG: tl.constexpr):
    """The running top-k with the keys held. Barriers on both sides: other threads wrote them, and will again."""
    KP: tl.constexpr = 2**LOG
    tl.debug_barrier()
    for j in range(0, held, KP):
        block = tl.load(keys_ptr + j + offs_k, mask=j + offs_k < held, other=EMPTY)
        # A descending list against an ascending one: the elementwise maximum is the best KP of both.
        best = _sort_bitonic(tl.maximum(best, tl.sort(block)), LOG)
    tl.debug_barrier()
    return best


@triton.jit(do_not_specialize=["n", "start", "K"])
def merge_topk(
    groups_ptr,  # (B, stride // GROUP) fp32: maximum of each group of this chunk
    scratch_ptr,  # (B, stride) fp32: values of the groups that passed tau
    scale_ptr,  # (columns,) fp32 or None: rank by scale · value
    list_ptr,  # (B, stride // GROUP) int32 scratch
    keys_ptr,  # (B, 2**LOG + VISIT * GROUP) int64 scratch
    acts_ptr,  # (B, K) fp32: running top-k
    idx_ptr,  # (B, K) int32: its columns, -1 where not filled yet
    tau_ptr,  # (B,) fp32: out, the K-th best rank so far, NaN where there is none
    n,
    start,
    K,
    stride,
    FIRST: tl.constexpr,
    BOUND: tl.constexpr,
    LOG: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    VISIT: tl.constexpr,
):
    """One chunk, columns start .. start + n. 2**LOG >= K; BOUND is 0 or a power of two >= n / GROUP."""
    KP: tl.constexpr = 2**LOG
    row = tl.program_id(0).to(tl.int64)
    count = stride // GROUP
    groups_ptr += row * count
    list_ptr += row * count
    scratch_ptr += row * stride
    keys_ptr += row * (KP + VISIT * GROUP)
    acts_ptr += row * K
    idx_ptr += row * K

    offs_k = tl.arange(0, KP)
    best = tl.full((KP,), EMPTY, tl.int64) if FIRST else _load_best(acts_ptr, idx_ptr, scale_ptr, offs_k, K)
    floor = _kth_order(best, offs_k, K)
    if BOUND > 0:
        floor = _bound(groups_ptr, n, K, GROUP, BOUND)
    found = _compact_groups(groups_ptr, list_ptr, count, floor, BLOCK_G)
    tl.debug_barrier()

    held = 0
    for i in range(0, found, VISIT):
        held = _append_survivors(
            list_ptr, i, found, scratch_ptr, scale_ptr, keys_ptr, held, floor, n, start, GROUP, VISIT
        )
        if (held >= KP) | (i + VISIT >= found):
            best = _merge_list(best, keys_ptr, held, offs_k, LOG)
            floor = tl.maximum(floor, _kth_order(best, offs_k, K))
            held = 0

    _store_best(best, acts_ptr, idx_ptr, scale_ptr, scratch_ptr, start, offs_k, K, FIRST)
    tl.store(tau_ptr + row, _value(_kth_order(best, offs_k, K)))
