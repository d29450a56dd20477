"""encode_topk and threshold_encode on a GPU: the functions of `saefast.ops.reference`, driving the Triton kernels.

Arguments are validated by `saefast.ops`; tensors are contiguous, on one CUDA device, of one 2-byte or fp32 dtype.
No GPU has run this module yet: it is unproven on a GPU.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saefast.kernels import encode_tiles, fill_csr, merge_topk, tuning
from saefast.ops import reference
from saefast.ops.chunks import Cut, chunks, cut_csr, cut_sort, cut_topk, run_width, steady
from saefast.ops.triton_launch import (
    aligned,
    architecture,
    autotunes,
    check_device,
    descriptor,
    descriptor_fits,
    on_device,
    parts,
    processors,
    readable,
    tf32,
)


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
    """The k largest pre-activations of every row; see `saefast.ops.reference.encode_topk`.

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
    x = aligned(readable(x))
    acts = x.new_empty((x.shape[0], k), dtype=torch.float32)
    idx = x.new_empty((x.shape[0], k), dtype=torch.int32)
    with on_device(x):
        if k > tuning.MERGE_MAX_K:
            _topk_by_sort(enc, x, k, acts, idx, max_scratch_bytes)
        else:
            cut = _cut_topk(enc, x, k, chunk, max_scratch_bytes)
            for part in parts(x.shape[0], cut.rows):
                _topk_rows(enc, x[part], cut, acts[part], idx[part])
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
    """All pre-activations above a threshold, as CSR; see `saefast.ops.reference.threshold_encode`.

    Hits are counted in the tiles' epilogue, summed, and written to their exact places. The size of the result is
    read back once per chunk, so unlike encode_topk this waits for the device.
    """
    if isinstance(threshold, Tensor):
        theta = threshold.to(x.device, torch.float32).reshape(-1).contiguous()
    else:
        theta = x.new_full((1,), threshold, dtype=torch.float32)
    enc = replace(_encoder(x, W_enc, b_enc, None, None, method, precision), theta=theta)
    x = aligned(readable(x))
    with on_device(x):
        cut = _cut_csr(enc, x, chunk, max_scratch_bytes)
        blocks = [_csr_rows(enc, x[part], cut) for part in parts(x.shape[0], cut.rows)]
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

    @property
    def plain(self) -> bool:
        """Neither scales nor counts, which take registers."""
        return self.theta is None and self.scale is None

    @property
    def described(self) -> bool:
        """Whether the operands are read through TMA descriptors: whole rows whose bytes are aligned, no list."""
        persistent = tuning.tiles(self.arch, self.kind, self.W.shape[1], self.plain).per_sm > 0
        return persistent and self.latents is None and descriptor_fits(self.W)

    def tiles(self) -> tuning.Tiles:
        arch, kind, D = self.arch, self.kind, self.W.shape[1]
        return tuning.tiles(arch, kind, D, self.plain) if self.described else tuning.pointer_tiles(arch, kind, D)


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
    enc = _Encoder(W_enc, latents, bias, scale, columns, tuning.group(columns), arch, kind, method, precision)
    if method != "auto":
        return enc
    # Pointers are followed 16 bytes at a time only where the compiler can tell that all rows are aligned.
    wide = enc.described or (descriptor_fits(W_enc) and W_enc.shape[1] % 16 == 0)
    return replace(enc, method=tuning.method(arch, kind, W_enc.shape[1], wide))


def _cut_topk(enc: _Encoder, x: Tensor, k: int, first: int | None, budget: int) -> Cut:
    copied = 0 if enc.latents is None else x.shape[1] * x.element_size()
    return cut_topk(
        *(x.shape[0], enc.columns, k, budget), block=enc.tiles().block_b, first=first, product=_product(enc, x),
        copied=copied,
    )  # fmt: skip


def _cut_csr(enc: _Encoder, x: Tensor, first: int | None, budget: int) -> Cut:
    return cut_csr(x.shape[0], enc.columns, budget, block=enc.tiles().block_b, first=first, product=_product(enc, x))


def _product(enc: _Encoder, x: Tensor) -> int:
    return _library_columns(x) if enc.method == "chunked" else 0


def _topk_rows(enc: _Encoder, x: Tensor, cut: Cut, acts: Tensor, idx: Tensor) -> None:
    """Chunk after chunk: tiles against the row's threshold, then the merge that raises it."""
    B, k = acts.shape
    run = run_width(k)
    visit = max(config.visit for config in _merge_settings(run, enc.group, autotunes(x)))
    scratch = x.new_empty(B * cut.widest, dtype=torch.float32)
    groups = x.new_empty(B * cut.widest // enc.group, dtype=torch.float32)
    passed = torch.empty_like(groups, dtype=torch.int32)
    keys = x.new_empty(B * (run + visit * enc.group), dtype=torch.int64)
    tau = x.new_full((B,), math.nan, dtype=torch.float32)
    best = _Best(acts, idx, tau)
    for chunk in chunks(enc.columns, cut):
        # Timed where the thresholds are known: while they are not, every group is stored, as in no later chunk.
        timed = autotunes(x) and chunk == steady(enc.columns, cut)
        _run_tiles(enc, x, *chunk, tau, groups, scratch, product=cut.product, timed=timed)
        _merge(enc, (groups, scratch, enc.scale, passed, keys), best, *chunk, timed=timed)


class _Best(NamedTuple):
    """The running top-k of some rows."""

    acts: Tensor
    idx: Tensor
    tau: Tensor


def _merge_settings(run: int, group: int, swept: bool) -> list[tuning.Merge]:
    config = tuning.merge(run, group)
    return tuning.merge_candidates(config, group) if swept else [config]


def _merge(enc: _Encoder, scratch: tuple[Tensor | None, ...], best: _Best, start: int, n: int, *, timed: bool) -> None:
    (B, k), run = best.acts.shape, run_width(best.acts.shape[1])
    stride = triton.cdiv(n, enc.group) * enc.group
    sorted_groups = triton.next_power_of_2(stride // enc.group)
    bounded = start == 0 and n // enc.group >= k and sorted_groups <= tuning.BOUND_MAX_GROUPS

    def launch(config: tuning.Merge, best: _Best) -> None:
        merge_topk.merge_topk[(B,)](
            *scratch, *best, n, start, k, stride,
            FIRST=start == 0, BOUND=sorted_groups if bounded else 0, LOG=run.bit_length() - 1, GROUP=enc.group,
            BLOCK_G=config.block_g, VISIT=config.visit, num_warps=config.warps, num_stages=1,
            maxnreg=config.registers,
        )  # fmt: skip

    key, config = ("merge_topk", enc.arch, run, enc.group), tuning.merge(run, enc.group)
    if timed:
        # A second merge of the same chunk would find nothing left to do, so each takes a copy of what stood before.
        candidates = tuning.merge_candidates(config, enc.group)
        tuning.autotune(key, candidates, lambda config: launch(config, _Best(*(t.clone() for t in best))))
    launch(tuning.chosen(key, config), best)


def _csr_rows(enc: _Encoder, x: Tensor, cut: Cut) -> tuple[Tensor, Tensor, Tensor]:
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
    enc: _Encoder, x: Tensor, start: int, n: int, groups: Tensor, scratch: Tensor, product: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(counts (B,), idx, acts) of one chunk."""
    assert enc.theta is not None
    B, stride = x.shape[0], triton.cdiv(n, enc.group) * enc.group
    _run_tiles(enc, x, start, n, None, groups, scratch, product=product, timed=autotunes(x))
    hits = groups[: B * stride // enc.group]
    ends = hits.cumsum(0, dtype=torch.int64)
    total = int(ends[-1])
    idx = x.new_empty(total, dtype=torch.int32)
    acts = x.new_empty(total, dtype=torch.float32)
    visit = min(64, triton.next_power_of_2(stride // enc.group))
    if total:
        fill_csr.fill_csr[(B * triton.cdiv(stride // enc.group, visit),)](
            hits, ends, scratch, enc.theta, idx, acts, n, start, stride, _theta_step(enc),
            GROUP=enc.group, VISIT=visit, num_warps=4,
        )  # fmt: skip
    return hits.view(B, -1).sum(1, dtype=torch.int64), idx, acts


def _run_tiles(
    enc: _Encoder, x: Tensor, start: int, n: int, tau: Tensor | None, groups: Tensor, scratch: Tensor, *,
    product: int = 0, timed: bool = False,
) -> None:  # fmt: skip
    """Groups and scratch of columns start .. start + n, against enc.theta or else against tau.

    Args:
        product: columns of a library product at a time, where the method is "chunked".
        timed: let autotuning find the settings.
    """
    if enc.method == "chunked":
        return _filter_products(enc, x, start, n, tau, groups, scratch, product)
    key = ("encode_tiles", enc.arch, enc.kind, x.shape[1] > tuning.NARROW, enc.described, enc.plain)
    config = enc.tiles()

    def run(config: tuning.Tiles) -> None:
        _launch_tiles(enc, x, start, n, tau, groups, scratch, config)

    if timed:
        tuning.autotune(key, tuning.tiles_candidates(enc.arch, enc.kind, config), run)
    return run(tuning.chosen(key, config))


def _launch_tiles(
    enc: _Encoder, x: Tensor, start: int, n: int, tau: Tensor | None, groups: Tensor, scratch: Tensor,
    config: tuning.Tiles,
) -> None:  # fmt: skip
    B, D, stride = x.shape[0], x.shape[1], triton.cdiv(n, enc.group) * enc.group
    span = min(triton.cdiv(B, config.block_b), max(1, tuning.SPAN_BYTES // (config.block_b * D * x.element_size() + 1)))
    tiles = triton.cdiv(B, config.block_b) * triton.cdiv(n, config.block_l)
    tail = (*_vectors(enc, tau), groups, scratch, B, n, start, D, stride, _theta_step(enc), span)
    options = {
        "BLOCK_B": config.block_b, "BLOCK_L": config.block_l, "BLOCK_D": config.block_d, "GROUP": enc.group,
        "COUNT": enc.theta is not None, "PRECISION": enc.precision, "num_warps": config.warps,
        "num_stages": config.stages,
    }  # fmt: skip
    if enc.described:
        operands = descriptor(x, [config.block_b, config.block_d]), descriptor(enc.W, [config.block_l, config.block_d])
        grid = (min(tiles, config.per_sm * processors(x.device)),)
        encode_tiles.tiles_descriptor[grid](*operands, *tail, **options)
    else:
        encode_tiles.tiles_pointer[(tiles,)](x, enc.W, enc.latents, *tail, **options)


def _filter_products(
    enc: _Encoder, x: Tensor, start: int, n: int, tau: Tensor | None, groups: Tensor, scratch: Tensor, product: int
) -> None:
    """The same by library products of `product` columns, each filtered while it is still in L2."""
    B, stride = x.shape[0], triton.cdiv(n, enc.group) * enc.group
    matrix = scratch[: B * stride].view(B, stride)
    span = min(triton.cdiv(B, 64), max(1, tuning.SPAN_BYTES // (64 * x.shape[1] * x.element_size() + 1)))
    for at in range(0, n, product):
        width = min(product, n - at)
        _library_product(enc, x, start + at, width, matrix[:, at : at + width])
        encode_tiles.tiles_library[(triton.cdiv(B, 64) * triton.cdiv(width, 128),)](
            *_vectors(enc, tau), groups[at // enc.group :], scratch[at:], B, width, start + at, stride,
            _theta_step(enc), span, BLOCK_B=64, BLOCK_L=128, GROUP=enc.group, COUNT=enc.theta is not None,
        )  # fmt: skip


def _vectors(enc: _Encoder, tau: Tensor | None) -> tuple[Tensor | None, ...]:
    return enc.bias, enc.scale, tau if enc.theta is None else enc.theta


def _theta_step(enc: _Encoder) -> int:
    return int(enc.theta is not None and len(enc.theta) > 1)


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
    height, width = cut_sort(x.shape[0], enc.columns, k, budget)
    for part in parts(x.shape[0], height):
        pre = x.new_empty(((part.stop - part.start), 0), dtype=torch.float32)
        rank, cols = pre, torch.empty(pre.shape, dtype=torch.int64, device=x.device)
        for start in range(0, enc.columns, width):
            best, best_rank, held = pre, rank, pre.shape[1]
            pre, rank = _ranked_products(enc, x[part], start, min(width, enc.columns - start))
            if held:
                pre, rank = torch.cat([best, pre], 1), torch.cat([best_rank, rank], 1)
            # Those held stand first, so ties go to the lower latent.
            order = reference.stable_topk(rank, min(k, rank.shape[1]))
            pre, rank = pre.gather(1, order), rank.gather(1, order)
            found = order + (start - held)
            cols = torch.where(order < held, cols.gather(1, order.clamp_max(held - 1)), found) if held else found
        acts[part], idx[part] = pre, cols.int()


def _ranked_products(enc: _Encoder, x: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """Pre-activations (rows, n) of columns start .. start + n, and what they rank by."""
    pre = x.new_empty((x.shape[0], n), dtype=torch.float32)
    _library_product(enc, x, start, n, pre)
    if enc.bias is not None:
        pre += enc.bias[start : start + n]
    return pre, pre if enc.scale is None else pre * enc.scale[start : start + n]


def _library_columns(x: Tensor) -> int:
    """Columns of a library product that fills half of L2."""
    if not x.is_cuda:
        return 4096
    half = torch.cuda.get_device_properties(x.device).L2_cache_size // 2
    return max(1024, half // (4 * max(1, x.shape[0])) // 256 * 256)
