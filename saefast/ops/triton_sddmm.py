"""sddmm on a GPU, by kernels/sddmm.py.

Arguments are validated by `saefast.ops`; tensors are contiguous, on one CUDA device, of a 2-byte dtype or fp32.
"""

import torch
import triton
from torch import Tensor

from saefast.kernels import sddmm as sddmm_kernels
from saefast.kernels import tuning
from saefast.ops.triton_launch import MAX_PROGRAMS, architecture, autotunes, check_device, on_device, parts, readable


def sddmm(x: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """out[b, j] = x[b] · W[idx[b, j]] in fp32; see `saefast.ops.reference.sddmm`."""
    check_device(x)
    (B, K), D = idx.shape, x.shape[1]
    x, W = readable(x), readable(W)
    out = x.new_empty((B, K), dtype=torch.float32)
    if not out.numel():
        return out

    def run(config: tuning.Sddmm) -> None:
        blocks = triton.cdiv(K, config.block_k)
        for part in parts(B, MAX_PROGRAMS // blocks):
            rows = out[part]
            sddmm_kernels.sddmm[(rows.shape[0] * blocks,)](
                x[part], idx[part], W, rows, D, K,
                BLOCK_K=config.block_k, BLOCK_D=config.block_d, num_warps=config.warps, num_stages=1,
            )  # fmt: skip

    with on_device(x):
        config = tuning.sddmm(D, K)
        if autotunes(x):
            key = ("sddmm", architecture(x.device), config)
            config = tuning.autotune(key, tuning.sddmm_candidates(config), run)
        run(config)
    return out
