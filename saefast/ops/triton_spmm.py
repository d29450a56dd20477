"""spmm, spmm_t and sum_by_latent on a GPU: all three are kernels/spmm.py.

Arguments are validated by `saefast.ops`; tensors are contiguous, on one CUDA device, of a 2-byte dtype or fp32.
"""

import torch
import triton
from torch import Tensor

from saefast.kernels import spmm as spmm_kernels
from saefast.kernels import tuning
from saefast.ops.triton_launch import (
    MAX_PROGRAMS,
    architecture,
    autotunes,
    check_device,
    on_device,
    parts,
    readable,
    written,
)


def spmm(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """out[b] = Σ_j acts[b, j] · W[idx[b, j]]; see `reference.spmm`. Entries are added in order j, in fp32."""
    return _spmm(acts, idx, None, W, idx.shape[0], W.dtype)


def spmm_t(acts: Tensor, idx: Tensor, x: Tensor, n_latents: int) -> Tensor:
    """out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j] · x[b]; see `saefast.ops.reference.spmm_t`.

    One stable sort by latent, then spmm over the groups: each latent's entries are added in ascending order of (b, j),
    without atomics, so the result repeats bit for bit. Dense (n_latents, D) fp32.
    """
    check_device(x)
    latent, entry = idx.flatten().sort(stable=True)
    rows = torch.arange(n_latents + 1, device=x.device, dtype=latent.dtype)
    row_ptr = torch.searchsorted(latent, rows)
    return _spmm(acts.flatten()[entry], entry // max(1, idx.shape[1]), row_ptr, x, n_latents, torch.float32)


def sum_by_latent(acts: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    """out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j], in acts' dtype and in a fixed order. -> (n_latents,)."""
    ones = torch.ones((idx.shape[0], 1), dtype=torch.float32, device=acts.device)
    return spmm_t(acts, idx, ones, n_latents)[:, 0].to(acts.dtype)


def _spmm(acts: Tensor, idx: Tensor, row_ptr: Tensor | None, W: Tensor, B: int, dtype: torch.dtype) -> Tensor:
    """spmm over K entries a row, or over CSR rows. -> (B, D) in dtype."""
    check_device(W)
    D = W.shape[1]
    acts, W = readable(acts), readable(W)
    out = W.new_empty((B, D), dtype=written(dtype, W))
    if not out.numel():
        return out.to(dtype)

    def run(config: tuning.Spmm) -> None:
        blocks = triton.cdiv(D, config.block_d)
        for part in parts(B, MAX_PROGRAMS // blocks):
            rows = out[part]
            code = (acts[part], idx[part], None) if row_ptr is None else (acts, idx, row_ptr[part.start :])
            spmm_kernels.spmm[(rows.shape[0] * blocks,)](
                *code, W, rows, D, 0 if row_ptr is not None else idx.shape[1],
                BLOCK_D=config.block_d, UNROLL=config.unroll, num_warps=config.warps, num_stages=1,
            )  # fmt: skip

    with on_device(W):
        config = tuning.spmm(D)
        if autotunes(W):
            key = ("spmm", architecture(W.device), config)
            config = tuning.autotune(key, tuning.spmm_candidates(config), run)
        run(config)
    return out.to(dtype)
