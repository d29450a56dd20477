"""Writes the values above their threshold as CSR, at counted places.

Reference: saefast.ops.reference.threshold_encode.

`encode_tiles` with COUNT left the number of hits of every group; their running sum says where each group's hits go, so
programs are independent, counts are exact and latents ascend within a row.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n", "start"])
def fill_csr(
    counts_ptr,  # (B, stride // GROUP) int32: hits of each group
    ends_ptr,  # (B, stride // GROUP) int64: running sum of counts over rows and groups
    scratch_ptr,  # (B, stride) fp32: values of the groups with hits
    threshold_ptr,  # (columns,) fp32
    idx_ptr,  # (nnz,) int32 out
    acts_ptr,  # (nnz,) fp32 out
    n,
    start,
    stride,
    threshold_step,
    GROUP: tl.constexpr,
    VISIT: tl.constexpr,
):
    """Program p does groups VISIT * (p % blocks) onwards of row p // blocks."""
    count = stride // GROUP
    blocks = tl.cdiv(count, VISIT)
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    offs_g = pid % blocks * VISIT + tl.arange(0, VISIT)
    hits = tl.load(counts_ptr + row * count + offs_g, mask=offs_g < count, other=0)
    end = tl.load(ends_ptr + row * count + offs_g, mask=hits > 0, other=0)
    cols = offs_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    live = (hits > 0)[:, None] & (cols < n)
    value = tl.load(scratch_ptr + row * stride + cols, mask=(hits > 0)[:, None], other=0.0)
    theta = tl.load(threshold_ptr + (start + cols) * threshold_step, mask=live, other=0.0)
    live = live & ~(value <= theta)
    dest = (end - hits)[:, None] + tl.cumsum(live.to(tl.int32), 1) - 1
    tl.store(idx_ptr + dest, start + cols, mask=live)
    tl.store(acts_ptr + dest, value, mask=live)
