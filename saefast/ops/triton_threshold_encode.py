"""threshold_encode on a GPU: tiles (`triton_encode_tiles`) count hits, kernels/fill_csr.py writes them to their places.

Arguments are validated by `saefast.ops`; tensors are contiguous, on one CUDA device, of one 2-byte or fp32 dtype.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from saefast.kernels import fill_csr
from saefast.ops.chunks import Cut, chunks, cut_csr
from saefast.ops.triton_encode_tiles import Encoder, make_encoder, product_columns, run_tiles
from saefast.ops.triton_launch import aligned, autotunes, on_device, parts, readable


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | float,
    *,
    chunk: int | None = None,
    method: str = "auto",
    max_scratch_bytes: int = 1 << 30,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations above a threshold, as CSR; see `saefast.ops.reference.threshold_encode`.

    Hits are counted in the tiles' epilogue, summed, and written to their exact places. The size of the result is
    read back once per chunk, so unlike encode_topk this waits for the device.
    """
    if isinstance(threshold, Tensor):
        theta = threshold.to(x.device, torch.float32).reshape(-1).contiguous()
    else:
        theta = x.new_full((1,), threshold, dtype=torch.float32)
    enc = replace(make_encoder(x, W_enc, b_enc, None, None, method, precision), theta=theta)
    x = aligned(readable(x))
    with on_device(x):
        cut = _cut_csr(enc, x, chunk, max_scratch_bytes)
        blocks = [_csr_rows(enc, x[part], cut) for part in parts(x.shape[0], cut.rows)]
    counts = torch.cat([x.new_zeros(1, dtype=torch.int64), *(block[0] for block in blocks)])
    idx = torch.cat([x.new_zeros(0, dtype=torch.int32), *(block[1] for block in blocks)])
    acts = torch.cat([x.new_zeros(0, dtype=torch.float32), *(block[2] for block in blocks)])
    return counts.cumsum(0), idx, acts


def _cut_csr(enc: Encoder, x: Tensor, first: int | None, budget: int) -> Cut:
    return cut_csr(
        x.shape[0], enc.columns, budget, block=enc.tiles().block_b, first=first, product=product_columns(enc, x)
    )


def _csr_rows(enc: Encoder, x: Tensor, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """(counts (B,), idx, acts) of some rows: every chunk's entries, then put in order of rows."""
    B = x.shape[0]
    scratch = x.new_empty(B * cut.widest, dtype=torch.float32)
    groups = x.new_empty(B * cut.widest // enc.group, dtype=torch.int32)
    pieces = [_csr_piece(enc, x, *chunk, groups, scratch, cut.product) for chunk in chunks(enc.columns, cut)]
    if len(pieces) == 1:
        return pieces[0]
    counts = torch.stack([piece[0] for piece in pieces]).sum(0)
    place = counts.cumsum(0) - counts
    idx = x.new_empty(int(counts.sum()), dtype=torch.int32)
    acts = torch.empty_like(idx, dtype=torch.float32)
    for count, piece_idx, piece_acts in pieces:
        entry = torch.arange(piece_idx.shape[0], device=x.device)
        # Entry e of a piece stands at e less the entries of rows before its own, after those of earlier chunks.
        shift = place - (count.cumsum(0) - count)
        dest = entry + shift.repeat_interleave(count, output_size=piece_idx.shape[0])
        idx[dest], acts[dest] = piece_idx, piece_acts
        place += count
    return counts, idx, acts


def _csr_piece(
    enc: Encoder, x: Tensor, start: int, n: int, groups: Tensor, scratch: Tensor, product: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(counts (B,), idx, acts) of one chunk."""
    assert enc.theta is not None
    B, stride = x.shape[0], triton.cdiv(n, enc.group) * enc.group
    run_tiles(enc, x, start, n, None, groups, scratch, product=product, timed=autotunes(x))
    hits = groups[: B * stride // enc.group].view(B, -1)
    return hits.sum(1, dtype=torch.int64), *fill(enc, hits, scratch, start, n)


def fill(enc: Encoder, hits: Tensor, scratch: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """(idx, acts) of the values that `run_tiles` counted, hits (B, groups), and left in scratch."""
    (B, count), ends = hits.shape, hits.flatten().cumsum(0, dtype=torch.int64)
    total = int(ends[-1])
    idx = hits.new_empty(total)
    acts = scratch.new_empty(total)
    visit = min(64, triton.next_power_of_2(count))
    if total:
        fill_csr.fill_csr[(B * triton.cdiv(count, visit),)](
            hits, ends, scratch, enc.theta, idx, acts, n, start, count * enc.group, enc.threshold_step,
            GROUP=enc.group, VISIT=visit, num_warps=4,
        )  # fmt: skip
    return idx, acts
