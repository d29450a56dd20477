"""select_kth on a GPU: kernels/select_kth.py."""

import torch
import triton
from torch import Tensor

from saefast.kernels import select_kth as kernels
from saefast.kernels import tuning
from saefast.ops.triton_launch import on_device

# Shifts of the four bits that each launch finds; the highest bit of a key is its sign.
SHIFTS = range(28, -1, -4)


def select_kth(keys: Tensor, k: int) -> Tensor:
    """As `saefast.ops.select_kth`, int32. The host waits for nothing."""
    n, programs = len(keys), triton.cdiv(len(keys), tuning.SELECT_KEYS)
    if n == 0:
        return keys.new_zeros(())
    # Rows of 16 bytes, so that no launch is compiled for memory off their boundaries.
    found = torch.empty((len(SHIFTS), 4), dtype=torch.int32, device=keys.device)
    counts = torch.empty((len(SHIFTS), programs, kernels.WAYS.value), dtype=torch.int32, device=keys.device)
    with on_device(keys):
        for i, shift in enumerate(SHIFTS):
            before = (None, None) if i == 0 else (found[i - 1], counts[i - 1])
            kernels.count_from[(programs,)](
                keys, *before, found[i], counts[i], n, k, programs, shift,
                BLOCK=tuning.SELECT_KEYS, num_warps=4, num_stages=1,
            )  # fmt: skip
    # The last four bits, as the kernel reads the others.
    last = (counts[-1].sum(0, dtype=torch.int32)[1:] >= k).sum(dtype=torch.int32)
    return found[-1, 0] + last
