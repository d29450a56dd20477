"""The one place that picks a backend."""

import importlib.util
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from saefast import extension

Backend = Literal["triton", "native", "reference"]
# What the C++ extension serves; sums are kept in fp32.
NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def backend(x: Tensor, served: tuple[torch.dtype, ...] = NATIVE) -> Backend:
    """What serves tensors like x: kernels for CUDA tensors, C++ for CPU tensors, plain torch for everything else.

    Plain torch serves float64 too, and stands in where Triton is not installed or the extension was not built.

    Args:
        served: the dtypes that kernels and C++ take, where they are not the ops' floats.
    """
    if x.dtype not in served:
        return "reference"
    if x.is_cuda and _has_triton():
        return "triton"
    if x.device.type == "cpu" and extension.available():
        return "native"
    return "reference"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
