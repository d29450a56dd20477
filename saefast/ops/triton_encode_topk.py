"""encode_topk on a GPU: chunk after chunk of tiles (`triton_encode_tiles`), merged by kernels/merge_topk.py.

Arguments are validated by `saefast.ops`; tensors are contiguous, on one CUDA device, of one 2-byte or fp32 dtype.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saefast.kernels import merge_topk, tuning
from saefast.ops import reference
from saefast.ops.chunks import Cut, chunks, cut_sort, cut_topk, sorted_width, steady
from saefast.ops.triton_encode_tiles import Encoder, make_encoder, product_columns, ranked_products, run_tiles
from saefast.ops.triton_launch import aligned, autotunes, on_device, parts, readable


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
    enc = make_encoder(x, W_enc, b_enc, latents, scale, method, precision)
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


def _cut_topk(enc: Encoder, x: Tensor, k: int, first: int | None, budget: int) -> Cut:
    copied = 0 if enc.latents is None else x.shape[1] * x.element_size()
    return cut_topk(
        *(x.shape[0], enc.columns, k, budget), block=enc.tiles().block_b, first=first, product=product_columns(enc, x),
        copied=copied,
    )  # fmt: skip


def _topk_rows(enc: Encoder, x: Tensor, cut: Cut, acts: Tensor, idx: Tensor) -> None:
    """Chunk after chunk: tiles against the row's threshold, then the merge that raises it."""
    B, k = acts.shape
    width = sorted_width(k)
    visit = max(config.visit for config in _merge_settings(width, enc.group, autotunes(x)))
    scratch = x.new_empty(B * cut.widest, dtype=torch.float32)
    groups = x.new_empty(B * cut.widest // enc.group, dtype=torch.float32)
    passed = torch.empty_like(groups, dtype=torch.int32)
    keys = x.new_empty(B * (width + visit * enc.group), dtype=torch.int64)
    tau = x.new_full((B,), math.nan, dtype=torch.float32)
    best = Best(acts, idx, tau)
    for chunk in chunks(enc.columns, cut):
        # Timed where the thresholds are known: while they are not, every group is stored, as in no later chunk.
        timed = autotunes(x) and chunk == steady(enc.columns, cut)
        run_tiles(enc, x, *chunk, tau, groups, scratch, product=cut.product, timed=timed)
        merge(enc, (groups, scratch, enc.scale, passed, keys), best, *chunk, timed=timed)


class Best(NamedTuple):
    """The running top-k of some rows."""

    acts: Tensor
    idx: Tensor
    tau: Tensor


def _merge_settings(width: int, group: int, timed: bool) -> list[tuning.Merge]:
    config = tuning.merge(width, group)
    return tuning.merge_candidates(config, group) if timed else [config]


def merge(enc: Encoder, scratch: tuple[Tensor | None, ...], best: Best, start: int, n: int, *, timed: bool) -> None:
    (B, k), width = best.acts.shape, sorted_width(best.acts.shape[1])
    stride = triton.cdiv(n, enc.group) * enc.group
    sorted_groups = triton.next_power_of_2(stride // enc.group)
    bounded = start == 0 and n // enc.group >= k and sorted_groups <= tuning.BOUND_MAX_GROUPS

    def launch(config: tuning.Merge, best: Best) -> None:
        merge_topk.merge_topk[(B,)](
            *scratch, *best, n, start, k, stride,
            FIRST=start == 0, BOUND=sorted_groups if bounded else 0, LOG=width.bit_length() - 1, GROUP=enc.group,
            BLOCK_G=config.block_g, VISIT=config.visit, num_warps=config.warps, num_stages=1,
            maxnreg=config.registers,
        )  # fmt: skip

    key, config = ("merge_topk", enc.arch, width, enc.group), tuning.merge(width, enc.group)
    if timed:
        # A second merge of the same chunk would find nothing left to do, so each takes a copy of what stood before.
        candidates = tuning.merge_candidates(config, enc.group)
        tuning.autotune(key, candidates, lambda config: launch(config, Best(*(t.clone() for t in best))))
    launch(tuning.chosen(key, config), best)


def _topk_by_sort(enc: Encoder, x: Tensor, k: int, acts: Tensor, idx: Tensor, budget: int) -> None:
    """Top-k for a k that no program can sort: library products, candidates ranked by torch, chunk by chunk."""
    height, width = cut_sort(x.shape[0], enc.columns, k, budget)
    for part in parts(x.shape[0], height):
        pre = x.new_empty(((part.stop - part.start), 0), dtype=torch.float32)
        rank, cols = pre, torch.empty(pre.shape, dtype=torch.int64, device=x.device)
        for start in range(0, enc.columns, width):
            best, best_rank, held = pre, rank, pre.shape[1]
            pre, rank = ranked_products(enc, x[part], start, min(width, enc.columns - start))
            if held:
                pre, rank = torch.cat([best, pre], 1), torch.cat([best_rank, rank], 1)
            # Those held stand first, so ties go to the lower latent.
            order = reference.stable_topk(rank, min(k, rank.shape[1]))
            pre, rank = pre.gather(1, order), rank.gather(1, order)
            found = order + (start - held)
            cols = torch.where(order < held, cols.gather(1, order.clamp_max(held - 1)), found) if held else found
        acts[part], idx[part] = pre, cols.int()
