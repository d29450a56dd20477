"""What every launch of a Triton kernel needs to know about its tensors and their device.

CPU tensors are served only by Triton's interpreter (TRITON_INTERPRET=1 before the first import), which is how tests
run the kernels where there is no GPU.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saefast.errors import InputError
from saefast.kernels import spmm, tuning

# Programs of one launch; a grid's first dimension ends at 2**31 - 1.
MAX_PROGRAMS = 1 << 30


def check_device(x: Tensor) -> None:
    if not x.is_cuda and not interpreted():
        raise InputError(
            f"tensors are on {x.device}: expected CUDA tensors; elsewhere saefast.ops.reference and saefast.ops.native "
            "serve, or Triton's interpreter with TRITON_INTERPRET=1"
        )
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(
            f"tensors are {x.dtype}: expected float32, float16 or bfloat16; saefast.ops.reference serves others"
        )


@cache
def interpreted() -> bool:
    return not isinstance(spmm.spmm, triton.JITFunction)


def readable(t: Tensor) -> Tensor:
    """The interpreter computes on the bit patterns of bf16, so there it gets the same values in fp32."""
    return t.float() if t.dtype == torch.bfloat16 and interpreted() else t


def aligned(t: Tensor) -> Tensor:
    """t, or a copy where its memory starts off the 16-byte boundaries that wide loads and TMA descriptors need."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def descriptor_fits(t: Tensor) -> bool:
    """Whether a TMA descriptor can address a contiguous (rows, D): its base and rows lie on 16-byte boundaries."""
    return t.data_ptr() % 16 == 0 and t.shape[1] * t.element_size() % 16 == 0


def descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of a contiguous (rows, D) that `descriptor_fits`, in blocks of `block`.

    A single row counts as contiguous with any stride, which a slice keeps from the wider matrix: so the strides are
    taken from its shape.
    """
    return TensorDescriptor(t, list(t.shape), [t.shape[1], 1], block)


def autotunes(t: Tensor) -> bool:
    """Whether launch settings are to be timed where t lies (`tuning.autotune`)."""
    return t.is_cuda and tuning.autotuning()


def written(dtype: torch.dtype, W: Tensor) -> torch.dtype:
    """What a kernel writes for results of a dtype. The interpreter truncates on its way to bf16: there torch rounds."""
    return dtype if W.is_cuda else torch.float32


def architecture(device: torch.device) -> int:
    return tuning.architecture(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def parts(B: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, B)) for start in range(0, B, max(1, rows)))


@contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """fp32 products of torch's in tf32, or in full: one setting of the process, as it was before when this ends."""
    matmul: Any = torch.backends.cuda.matmul  # its settings are made on the fly, which its types do not say
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if allow else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
