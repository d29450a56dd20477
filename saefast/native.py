"""The CPU backend: torch tensors in, the C++ extension saefast._native underneath.

Where the extension was not built (no compiler at install), torch does the same work, after one warning.
"""

import importlib
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from saefast.errors import InputError


@cache
def extension() -> ModuleType | None:
    """The C++ extension, or None where it was not built: then the first call, and only that one, warns."""
    try:
        return importlib.import_module("saefast._native")
    except ImportError as error:
        warnings.warn(
            f"saefast runs on torch alone: its C++ extension is missing ({error}). To build it, install a C++17 "
            "compiler (Debian: apt install g++) and run `pip install --force-reinstall --no-deps saefast`, "
            "or `pip install -e .` in a checkout.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def available() -> bool:
    """Whether the C++ extension is there (warns once where it is not)."""
    return extension() is not None


def gather_rows(src: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """out[i] = src[index[i]]: rows drawn by index, the way training takes shuffled batches.

    On a CPU, torch.get_num_threads() threads copy; on a GPU built with nvcc, saefast's own kernel (which is waited for,
    to check the indices). Elsewhere torch.index_select. No derivative.

    Args:
        src: (n_rows, ...) contiguous, any dtype.
        index: (n,) contiguous int64 on src's device, each in [0, n_rows).
        out: (n, ...) contiguous, like src in dtype, device and row shape, apart from it in memory; made when not given.

    Raises:
        InputError: a wrong shape, dtype, device or layout; an index out of range (on a CPU nothing is written then).
    """
    _check_gather(src, index)
    shape = (index.shape[0], *src.shape[1:])
    if out is None:
        out = torch.empty(shape, dtype=src.dtype, device=src.device)
    else:
        _check_out(src, shape, out)
    ext = extension()
    if ext is None or src.device.type not in ("cpu", "cuda") or (src.is_cuda and not ext.HAS_CUDA):
        _check_range(index, src.shape[0])
        return torch.index_select(src, 0, index, out=out)
    gather = _gather_cuda if src.is_cuda else _gather_cpu
    gather(ext, src, index, out)
    return out


def _row_bytes(src: Tensor) -> int:
    return src.element_size() * src.shape[1:].numel()


def _gather_cpu(ext: ModuleType, src: Tensor, index: Tensor, out: Tensor) -> None:
    sizes = (src.shape[0], _row_bytes(src), index.data_ptr(), index.shape[0])
    try:
        ext.gather_rows(src.data_ptr(), *sizes, out.data_ptr(), torch.get_num_threads())
    except IndexError as error:
        raise InputError(f"index: {error}; src has shape {tuple(src.shape)}") from None


def _gather_cuda(ext: ModuleType, src: Tensor, index: Tensor, out: Tensor) -> None:
    n = index.shape[0]
    first_bad = torch.full((), n, dtype=torch.int64, device=src.device)
    sizes = (src.shape[0], _row_bytes(src), index.data_ptr(), n)
    with torch.cuda.device(src.device):
        stream = torch.cuda.current_stream().cuda_stream
        ext.gather_rows_cuda(src.data_ptr(), *sizes, out.data_ptr(), first_bad.data_ptr(), stream)
    if int(first_bad) < n:
        _check_range(index, src.shape[0])


def _check_gather(src: Tensor, index: Tensor) -> None:
    if src.ndim == 0 or not src.is_contiguous():
        raise InputError(
            f"src: got shape {tuple(src.shape)} with strides {src.stride()}; rows must be contiguous (src.contiguous())"
        )
    if index.dtype != torch.int64 or index.ndim != 1 or not index.is_contiguous():
        raise InputError(
            f"index: got {index.dtype} of shape {tuple(index.shape)} with strides {index.stride()}; expected a "
            "contiguous int64 vector (index.long().flatten().contiguous())"
        )
    if index.device != src.device:
        raise InputError(f"index: is on {index.device}, src on {src.device}; move one (index.to(src.device))")


def _check_out(src: Tensor, shape: tuple[int, ...], out: Tensor) -> None:
    if tuple(out.shape) != shape or out.dtype != src.dtype or out.device != src.device or not out.is_contiguous():
        raise InputError(
            f"out: got {out.dtype} {tuple(out.shape)} on {out.device}, strides {out.stride()}; expected contiguous "
            f"{src.dtype} {shape} on {src.device}, as torch.empty makes it"
        )


def _check_range(index: Tensor, n_rows: int) -> None:
    bad = ((index < 0) | (index >= n_rows)).nonzero()
    if len(bad):
        at = int(bad[0])
        raise InputError(f"index: index[{at}] is {int(index[at])}, outside [0, {n_rows})")


def supports(dtype: torch.dtype) -> bool:
    """Whether the ops of this module serve tensors of a dtype; `saefast.ops` takes `reference` where they do not."""
    return False
