"""What a step asks of a batch on a GPU: its sums, its code grouped by latent, the entries as updates want them.

Sizes depend on the batch's shape alone, not on its values, so the host waits for nothing. `saefast.optim.triton` has
these functions beside those on rows of weights.
"""

from functools import cache

import torch
import triton
from torch import Tensor

from saefast.kernels import batch_sums as kernels
from saefast.kernels import fill_entries as entry_kernels
from saefast.kernels import tuning
from saefast.ops.code import Code, Prefixes
from saefast.ops.groups import Entries, Groups
from saefast.ops.triton_launch import on_device


@cache
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """(n,) int32 on the device, copied there once a process: such a copy makes the host wait."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def batch_sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `saefast.optim.reference.batch_sums`, 0-d fp64 on x's device. x (B, D) fp32, contiguous."""
    (B, D), config = x.shape, tuning.batch_sums(x.shape[1])
    down, across = triton.cdiv(B, config.rows), triton.cdiv(D, config.block_d)
    shifted = x.new_empty((down, D), dtype=torch.float64)
    sums = x.new_empty((2, down * across), dtype=torch.float64)
    with on_device(x):
        kernels.batch_sums[(down * across,)](
            x, x[0], shifted, *sums, B, D, ROWS=config.rows, UNROLL=config.unroll, BLOCK_D=config.block_d,
            num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    spread, squares = sums.sum(1)
    return spread - shifted.sum(0).square().sum() / B, squares


def group_entries(idx: Tensor, keep: Tensor, n_latents: int) -> Groups:
    """As `saefast.ops.groups.group_entries`, with room for as many groups as there may be: see `Groups.latents`."""
    n = len(idx)
    room = min(n, n_latents)
    # What is not kept comes last, as a latent beyond all others.
    latent, order = torch.where(keep, idx, n_latents).sort(stable=True)
    there = latent < n_latents
    begins = there.clone()
    begins[1:] &= latent[1:] != latent[:-1]
    # Group r begins where the r-th flag is; those that do not exist begin at n.
    ordinals = torch.arange(1, room + 1, dtype=torch.int32, device=idx.device)
    first = torch.searchsorted(begins.cumsum(0, dtype=torch.int32), ordinals, out_int32=True)
    kept = there.sum(dtype=torch.int32)
    latents = torch.where(first < n, latent[first.clamp_max(n - 1).long()], -1) if n else idx
    return Groups(order.int(), latents, torch.cat([torch.minimum(first, kept), kept[None]]))


def fill_entries(groups: Groups, parts: list[tuple[Code, Tensor]], prefixes: Prefixes, n_latents: int) -> Entries:
    """As `saefast.optim.reference.fill_entries`. fp32."""
    n, (code, _), device = len(groups.order), parts[0], groups.order.device
    dec_row, enc_row = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
    dec_coef, enc_coef = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(2))
    sums = torch.zeros(n_latents, dtype=torch.float32, device=device)
    found = Entries(dec_row, dec_coef, enc_row, enc_coef, sums)
    if n == 0:
        return found
    acts, grad = _flat([code.acts for code, _ in parts]), _flat([grad for _, grad in parts])
    token = None if code.row_ptr is None else code.tokens().int()
    columns = constant(tuple(c.idx.shape[1] for c, _ in parts[1:]) or (0,), device)
    with on_device(acts):
        entry_kernels.fill_entries[(triton.cdiv(n, tuning.ENTRIES),)](
            groups.order, acts, grad, code.idx if prefixes.by_latent else None, code.row_ptr, token,
            constant(tuple(prefixes.bounds), device), columns, *found[:4], n, code.rows,
            code.idx.shape[1] if token is None else 1, code.idx.numel(), len(prefixes.bounds), len(parts) - 1,
            BLOCK=tuning.ENTRIES, num_warps=8, num_stages=1, maxnreg=tuning.ROW_REGISTERS,
        )  # fmt: skip
        entry_kernels.sum_groups[(len(groups.latents),)](
            found.enc_coef, groups.offsets, groups.latents, found.grad_by_latent,
            BLOCK=tuning.SUMMED, num_warps=1, num_stages=1,
        )  # fmt: skip
    return found


def _flat(parts: list[Tensor]) -> Tensor:
    return parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])
