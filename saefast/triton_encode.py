"""encode_topk and threshold_encode on a GPU: the functions of `saefast.reference`, driving the Triton kernels.

Arguments are validated by `saefast.ops`; tensors are contiguous, on one CUDA device, of one 2-byte or fp32 dtype.
No GPU has run this module yet: it is unproven on a GPU.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saefast import reference
from saefast.errors import InputError
from saefast.kernels import encode_tiles, fill_csr, merge_topk, tuning
from saefast.triton_launch import architecture, check_device, on_device, parts, processors, readable, tf32

# fp32 values, their rank, keys and positions, twice while they are sorted: bytes per candidate of a large k.
SORT_BYTES = 64


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    chunk: int | None = None,
    method: str = "auto",
    max_scratch_bytes: int = 1 << 30,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of every row; see `saefast.reference.encode_topk`.

    Chunks of columns double in width from max(4096, 64 k), within `max_scratch_bytes`; rows are taken in parts where
    even one chunk would not fit. A k above `tuning.MERGE_MAX_K` takes library products and sorts for either method.

    Args:
        chunk: width of the first chunk, for tests and measurements.
        method, max_scratch_bytes, precision: see `saefast.ops.encode_topk`.

    Returns:
        acts (B, k) fp32, idx (B, k) int32.

    Raises:
        InputError: a dtype or device the kernels do not serve, or no room in max_scratch_bytes for one group.
    """
    enc = _encoder(x, W_enc, b_enc, latents, scale, method, precision)
    x = readable(x)
    acts = x.new_empty((x.shape[0], k), dtype=torch.float32)
    idx = x.new_empty((x.shape[0], k), dtype=torch.int32)
    with on_device(x):
        if k > tuning.MERGE_MAX_K:
            _topk_by_sort(enc, x, k, acts, idx, max_scratch_bytes)
        else:
            plan = _plan_topk(enc, x, k, chunk, max_scratch_bytes)
            for part in parts(x.shape[0], plan.rows):
                _topk_rows(enc, x[part], plan, acts[part], idx[part])
    if latents is not None:
        idx = latents[idx.long()].int()
    return (acts.relu_() if relu else acts), idx


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
    """All pre-activations above a threshold, as CSR; see `saefast.reference.threshold_encode`.

    Hits are counted in the tiles' epilogue, summed, and written to their exact places. The size of the result is
    read back once per chunk, so unlike encode_topk this waits for the device.
    """
    theta = torch.as_tensor(threshold, device=x.device).to(torch.float32).reshape(-1).contiguous()
    enc = replace(_encoder(x, W_enc, b_enc, None, None, method, precision), theta=theta)
    x = readable(x)
    with on_device(x):
        plan = _plan_csr(enc, x, chunk, max_scratch_bytes)
        blocks = [_csr_rows(enc, x[part], plan) for part in parts(x.shape[0], plan.rows)]
    counts = torch.cat([x.new_zeros(1, dtype=torch.int64), *(block[0] for block in blocks)])
    idx = torch.cat([x.new_zeros(0, dtype=torch.int32), *(block[1] for block in blocks)])
    acts = torch.cat([x.new_zeros(0, dtype=torch.float32), *(block[2] for block in blocks)])
    return counts.cumsum(0), idx, acts


@dataclass(frozen=True)
class _Encoder:
    """What one call ranks: column c is latent c, or latents[c]; bias, scale and theta go by column."""

    W: Tensor
    latents: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    columns: int
    group: int
    arch: int
    kind: str
    method: str
    precision: str
    theta: Tensor | None = None  # thresholds of latents: count and collect instead of ranking

    def tiles(self) -> tuple[tuning.Tiles, bool]:
        """Settings, and whether the operands can be read through descriptors: whole rows, 16-byte aligned."""
        D, plain = self.W.shape[1], self.theta is None and self.scale is None
        config = tuning.tiles(self.arch, self.kind, D, plain)
        aligned = self.W.data_ptr() % 16 == 0 and D * self.W.element_size() % 16 == 0
        if config.per_sm and aligned and self.latents is None:
            return config, True
        return tuning.pointer_tiles(self.arch, self.kind, D), False


def _encoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    scale: Tensor | None,
    method: str,
    precision: str,
) -> _Encoder:
    check_device(x)
    W_enc = readable(W_enc)
    bias = None if b_enc is None else b_enc.float().contiguous()
    scale = None if scale is None else scale.float().contiguous()
    if latents is not None:
        latents = latents.contiguous()
        bias = None if bias is None else bias[latents.long()]
        scale = None if scale is None else scale[latents.long()]
    columns = W_enc.shape[0] if latents is None else latents.shape[0]
    arch = architecture(x.device)
    kind = tuning.product_kind(W_enc.element_size(), precision)
    method = tuning.method(arch, W_enc.shape[1]) if method == "auto" else method
    return _Encoder(W_enc, latents, bias, scale, columns, tuning.group(columns), arch, kind, method, precision)


class _Plan(NamedTuple):
    """Rows taken at once, and the widths of the first and the widest chunk of columns (multiples of the group)."""

    rows: int
    first: int
    widest: int


def _plan_topk(enc: _Encoder, x: Tensor, k: int, chunk: int | None, budget: int) -> _Plan:
    run = _run_width(k)
    per_row = 4 + 8 * (run + tuning.merge(run, enc.group).visit * enc.group)
    first = chunk or (max(4096, 64 * k) if enc.method == "fused" else _library_columns(x))
    plan = _plan(enc, x, first, 8, per_row, budget)
    # A library product is wide enough when it fills the device, and no wider than L2.
    return plan if enc.method == "fused" else plan._replace(widest=plan.first)


def _plan_csr(enc: _Encoder, x: Tensor, chunk: int | None, budget: int) -> _Plan:
    first = chunk or (1 << 16 if enc.method == "fused" else _library_columns(x))
    plan = _plan(enc, x, first, 12, 8, budget)
    return plan._replace(widest=plan.first)


def _plan(enc: _Encoder, x: Tensor, first: int, per_group: int, per_row: int, budget: int) -> _Plan:
    """Fits chunks into `budget` bytes: per value 4, per group of a row `per_group`, per row `per_row`."""
    B, group = max(1, x.shape[0]), enc.group
    # The library multiplies whole matrices, so rows of a latent list are copied a chunk at a time.
    shared = group * x.shape[1] * x.element_size() if enc.method == "chunked" and enc.latents is not None else 0
    block = enc.tiles()[0].block_b
    every = triton.cdiv(enc.columns, group) * group
    first = min(triton.cdiv(first, group) * group, every)

    def afford(rows: int) -> int:
        return (budget - rows * per_row) // (rows * (4 * group + per_group) + shared) * group

    rows = B
    if afford(rows) < first:
        fit = (budget - shared * first // group) // (per_row + first * 4 + first // group * per_group)
        rows = min(B, max(block, fit // block * block))
    # Less than a block of rows wastes the tiles' work, so a narrower chunk comes first.
    while rows > 1 and afford(rows) < min(first, 8 * group):
        rows = (rows + 1) // 2
    widest = min(afford(rows), every)
    if widest > 1024:
        widest -= widest % 256 * (widest < every)  # whole tiles
    if widest < group:
        least = per_row + 4 * group + per_group + shared
        raise InputError(f"max_scratch_bytes is {budget}: expected at least {least} for one row and {group} latents")
    return _Plan(rows, min(first, widest), widest)


def _topk_rows(enc: _Encoder, x: Tensor, plan: _Plan, acts: Tensor, idx: Tensor) -> None:
    """Chunk after chunk: tiles against the row's threshold, then the merge that raises it."""
    B, k = acts.shape
    run = _run_width(k)
    config = tuning.merge(run, enc.group)
    scratch = x.new_empty(B * plan.widest, dtype=torch.float32)
    groups = x.new_empty(B * plan.widest // enc.group, dtype=torch.float32)
    passed = torch.empty_like(groups, dtype=torch.int32)
    keys = x.new_empty(B * (run + config.visit * enc.group), dtype=torch.int64)
    tau = x.new_full((B,), math.nan, dtype=torch.float32)
    for start, n in _chunks(enc.columns, plan):
        _run_tiles(enc, x, start, n, tau, groups, scratch)
        stride = triton.cdiv(n, enc.group) * enc.group
        sorted_groups = triton.next_power_of_2(stride // enc.group)
        bounded = start == 0 and n // enc.group >= k and sorted_groups <= tuning.BOUND_MAX_GROUPS
        merge_topk.merge_topk[(B,)](
            groups, scratch, enc.scale, passed, keys, acts, idx, tau, n, start, k, stride,
            FIRST=start == 0, BOUND=sorted_groups if bounded else 0, LOG=run.bit_length() - 1, GROUP=enc.group,
            BLOCK_G=config.block_g, VISIT=config.visit, num_warps=config.warps, num_stages=1,
            maxnreg=config.registers,
        )  # fmt: skip


def _csr_rows(enc: _Encoder, x: Tensor, plan: _Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(counts (B,), idx, acts) of some rows: every chunk's entries, then put in order of rows."""
    B = x.shape[0]
    scratch = x.new_empty(B * plan.widest, dtype=torch.float32)
    groups = x.new_empty(B * plan.widest // enc.group, dtype=torch.int32)
    pieces = [_csr_piece(enc, x, start, n, groups, scratch) for start, n in _chunks(enc.columns, plan)]
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
    enc: _Encoder, x: Tensor, start: int, n: int, groups: Tensor, scratch: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(counts (B,), idx, acts) of one chunk."""
    assert enc.theta is not None
    B, stride = x.shape[0], triton.cdiv(n, enc.group) * enc.group
    _run_tiles(enc, x, start, n, None, groups, scratch)
    hits = groups[: B * stride // enc.group]
    ends = hits.cumsum(0, dtype=torch.int64)
    total = int(ends[-1])
    idx = x.new_empty(total, dtype=torch.int32)
    acts = x.new_empty(total, dtype=torch.float32)
    visit = min(64, triton.next_power_of_2(stride // enc.group))
    if total:
        fill_csr.fill_csr[(B * triton.cdiv(stride // enc.group, visit),)](
            hits, ends, scratch, enc.theta, idx, acts, n, start, stride, int(len(enc.theta) > 1),
            GROUP=enc.group, VISIT=visit, num_warps=4,
        )  # fmt: skip
    return hits.view(B, -1).sum(1, dtype=torch.int64), idx, acts


def _run_tiles(
    enc: _Encoder, x: Tensor, start: int, n: int, tau: Tensor | None, groups: Tensor, scratch: Tensor
) -> None:
    """Groups and scratch of columns start .. start + n, against enc.theta or else against tau."""
    count = enc.theta is not None
    vectors = (enc.bias, enc.scale, enc.theta if count else tau, groups, scratch)
    step = int(enc.theta is not None and len(enc.theta) > 1)
    B, D, stride = x.shape[0], x.shape[1], triton.cdiv(n, enc.group) * enc.group
    config, described = enc.tiles()
    span = min(triton.cdiv(B, config.block_b), max(1, tuning.SPAN_BYTES // (config.block_b * D * x.element_size() + 1)))
    if enc.method == "chunked":
        _library_product(enc, x, start, n, scratch[: B * stride].view(B, stride)[:, :n])
        encode_tiles.tiles_library[(triton.cdiv(B, 64) * triton.cdiv(n, 128),)](
            *vectors, B, n, start, stride, step, span, BLOCK_B=64, BLOCK_L=128, GROUP=enc.group, COUNT=count
        )
        return

    def run(config: tuning.Tiles) -> None:
        sizes = {"BLOCK_B": config.block_b, "BLOCK_L": config.block_l, "BLOCK_D": config.block_d}
        options = {"GROUP": enc.group, "COUNT": count, "PRECISION": enc.precision}
        tiles = triton.cdiv(B, config.block_b) * triton.cdiv(n, config.block_l)
        tail = (*vectors, B, n, start, D, stride, step, span)
        launch = {"num_warps": config.warps, "num_stages": config.stages}
        if described and x.data_ptr() % 16 == 0:
            blocks = [config.block_b, config.block_d], [config.block_l, config.block_d]
            operands = TensorDescriptor.from_tensor(x, blocks[0]), TensorDescriptor.from_tensor(enc.W, blocks[1])
            grid = (min(tiles, config.per_sm * processors(x.device)),)
            encode_tiles.tiles_descriptor[grid](*operands, *tail, **sizes, **options, **launch)
        else:
            encode_tiles.tiles_pointer[(tiles,)](x, enc.W, enc.latents, *tail, **sizes, **options, **launch)

    if tuning.sweeping() and x.is_cuda:
        key = ("encode_tiles", enc.arch, enc.kind, D > tuning.NARROW, described)
        config = tuning.sweep(key, tuning.tiles_candidates(enc.arch, enc.kind, config), run)
    run(config)


def _library_product(enc: _Encoder, x: Tensor, start: int, n: int, out: Tensor) -> None:
    """out (B, n) fp32 = x · W[columns]ᵀ by torch's GEMM, with fp32 accumulators left unrounded."""
    columns = slice(start, start + n)
    W = enc.W[columns] if enc.latents is None else enc.W[enc.latents[columns].long()]
    if x.dtype == torch.float32:
        with tf32(enc.precision == "tf32"):
            torch.mm(x, W.T, out=out)
    elif x.is_cuda:
        torch.mm(x, W.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), W.float().T, out=out)


def _topk_by_sort(enc: _Encoder, x: Tensor, k: int, acts: Tensor, idx: Tensor, budget: int) -> None:
    """Top-k for a k that no program can sort: library products, candidates ranked by torch, chunk by chunk."""
    width = min(enc.columns, max(4096, k))
    rows = budget // (SORT_BYTES * (k + width))
    if rows < 1:
        raise InputError(
            f"max_scratch_bytes is {budget}: expected at least {SORT_BYTES * (k + width)} to sort k = {k} for one row"
        )
    for part in parts(x.shape[0], rows):
        best = rank = x.new_empty((part.stop - part.start, 0), dtype=torch.float32)
        cols = best.long()
        for start in range(0, enc.columns, width):
            n = min(width, enc.columns - start)
            pre = x.new_empty((best.shape[0], n), dtype=torch.float32)
            _library_product(enc, x[part], start, n, pre)
            pre = pre if enc.bias is None else pre.add_(enc.bias[start : start + n])
            scaled = pre if enc.scale is None else pre * enc.scale[start : start + n]
            best, rank = torch.cat([best, pre], 1), torch.cat([rank, scaled], 1)
            cols = torch.cat([cols, torch.arange(start, start + n, device=x.device).expand(len(best), -1)], 1)
            order = reference.stable_topk(rank, min(k, rank.shape[1]))
            best, rank, cols = best.gather(1, order), rank.gather(1, order), cols.gather(1, order)
        acts[part], idx[part] = best, cols.int()


def _chunks(columns: int, plan: _Plan) -> Iterator[tuple[int, int]]:
    """(start, width) of chunks that double in width up to the widest."""
    start, width = 0, plan.first
    while start < columns:
        n = min(width, columns - start)
        yield start, n
        start, width = start + n, min(2 * width, plan.widest)


def _run_width(k: int) -> int:
    return max(32, triton.next_power_of_2(k))


def _library_columns(x: Tensor) -> int:
    """Columns of a library product that fills half of L2."""
    if not x.is_cuda:
        return 4096
    half = torch.cuda.get_device_properties(x.device).L2_cache_size // 2
    return max(1024, half // (4 * max(1, x.shape[0])) // 256 * 256)
