"""Rows drawn by index, the way training takes shuffled batches: C++ on a CPU, a kernel of our own on a GPU."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saefast import extension
from saefast.errors import InputError


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
    _check_rows(src)
    _check_index(index, src)
    shape = (index.shape[0], *src.shape[1:])
    if out is None:
        out = torch.empty(shape, dtype=src.dtype, device=src.device)
    else:
        _check_out(src, shape, out)
    ext = extension.load()
    if ext is None or src.device.type not in ("cpu", "cuda") or (src.is_cuda and not ext.HAS_CUDA):
        _check_range(index, src.shape[0])
        return torch.index_select(src, 0, index, out=out)
    gather = _gather_cuda if src.is_cuda else _gather_cpu
    gather(ext, src, index, out)
    return out


class RowTable:
    """CPU tensors whose rows count as one matrix's: source s holds the rows after those of s - 1.

    Args:
        sources: each (n_s, ...) contiguous, alike in dtype and row shape.

    Raises:
        InputError: sources that differ, or are not contiguous CPU tensors.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        first = sources[0]
        for source in sources:
            _check_rows(source)
            if source.dtype != first.dtype or source.shape[1:] != first.shape[1:] or source.device.type != "cpu":
                raise InputError(
                    f"sources: {_about(first)} and {_about(source)}, expected CPU tensors alike but for rows"
                )
        self._sources = list(sources)
        self._n_rows = sum(len(source) for source in sources)
        ext = extension.load() if len(self._sources) > 1 else None
        self._table = None if ext is None else ext.Sources(self._sources)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowTable, (self._sources,)

    def gather(self, index: Tensor) -> Tensor:
        """gather_rows: index (n,) contiguous int64, each below the sum of n_s."""
        first = self._sources[0]
        if self._table is None:
            return gather_rows(first if len(self._sources) == 1 else torch.cat(self._sources), index)
        _check_index(index, first)
        out = torch.empty((index.shape[0], *first.shape[1:]), dtype=first.dtype, device="cpu")
        try:
            self._table.gather(index, out, torch.get_num_threads())
        except IndexError as error:
            raise InputError(f"index: {error}; the sources hold {self._n_rows} rows") from None
        return out


def _about(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def _gather_cpu(ext: ModuleType, src: Tensor, index: Tensor, out: Tensor) -> None:
    try:
        ext.gather_rows(src, index, out, torch.get_num_threads())
    except IndexError as error:
        raise InputError(f"index: {error}; src has shape {tuple(src.shape)}") from None


def _gather_cuda(ext: ModuleType, src: Tensor, index: Tensor, out: Tensor) -> None:
    n = index.shape[0]
    first_bad = torch.full((), n, dtype=torch.int64, device=src.device)
    with torch.cuda.device(src.device):
        ext.gather_rows_cuda(src, index, out, first_bad, torch.cuda.current_stream().cuda_stream)
    if int(first_bad) < n:
        _check_range(index, src.shape[0])


def _check_rows(src: Tensor) -> None:
    if src.ndim == 0 or not src.is_contiguous():
        raise InputError(
            f"src: got shape {tuple(src.shape)} with strides {src.stride()}; rows must be contiguous (src.contiguous())"
        )


def _check_index(index: Tensor, src: Tensor) -> None:
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
