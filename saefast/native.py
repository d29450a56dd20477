"""The CPU backend: torch tensors in, the C++ extension saefast._native underneath.

Where the extension was not built (no compiler at install), torch does the same work, after one warning.
"""

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saefast import reference
from saefast.errors import InputError

# The dtypes the ops below serve, sums being kept in fp32.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# csrc/bindings.cpp has the same number: both are raised where the bindings change.
INTERFACE = 2


@cache
def extension() -> ModuleType | None:
    """The C++ extension, or None where it was not built: then the first call, and only that one, warns.

    Raises:
        InputError: it was built from another version's sources, so that its functions take other arguments.
    """
    try:
        found = importlib.import_module("saefast._native")
    except ImportError as error:
        warnings.warn(
            f"saefast runs on torch alone: its C++ extension is missing ({error}). To build it, install a C++17 "
            "compiler (Debian: apt install g++) and run `pip install --force-reinstall --no-deps saefast`, "
            "or `pip install -e .` in a checkout.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if getattr(found, "INTERFACE", 1) != INTERFACE:
        raise InputError(
            "saefast's C++ extension was built from another version of its sources: build it anew with "
            "`pip install --force-reinstall --no-deps saefast`, in a checkout `python setup.py build_ext --inplace`"
        )
    return found


def available() -> bool:
    """Whether the C++ extension is there (warns once where it is not)."""
    return extension() is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether the ops of this module serve CPU tensors of a dtype."""
    return dtype in FLOATS and available()


def tile_kernels(dtype: torch.dtype) -> list[str]:
    """The instruction sets that encode_topk can use here for a dtype, its default first."""
    names: list[str] = _built().tile_kernel_names(dtype == torch.bfloat16)
    return names


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    max_scratch_bytes: int = 1 << 30,
    kernel: str | None = None,
) -> reference.Code:
    """`reference.encode_topk` in one pass: product tiles are filtered in registers, and only what may be among the k
    best of its row is ever stored. bf16 products are exact and summed in fp32 (subnormal bf16 count as zero).

    The values do not depend on the batch a row comes in, on threads or on scratch.

    Args:
        kernel: an instruction set of csrc/tiles.cpp, for tests and benchmarks; None takes the best this machine has.
    """
    _check_matrices(x, W_enc)
    bias, weight = _vector("b_enc", b_enc, W_enc), _vector("scale", scale, W_enc)
    ids = None if latents is None else latents.long().contiguous()
    acts, idx = _new_code(x.shape[0], k)
    try:
        _built().encode_topk(
            *(x, W_enc, bias, weight, ids, k, relu, acts, idx, max_scratch_bytes, kernel, torch.get_num_threads())
        )
    except (IndexError, ValueError) as error:
        raise InputError(f"encode_topk: {error}") from None
    return acts, idx


def encode_topk_mixed(
    x: Tensor,
    W_low: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    candidates: int | None = None,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    max_scratch_bytes: int = 1 << 30,
) -> reference.Code:
    """Top-k by way of a low-precision copy of the weights: its products choose candidates, fp32 products the k best.

    The candidates are exactly the best over x and W_enc rounded to W_low's dtype, summed in fp32. Values, order and
    ties of the result are those of x and W_enc; a latent is missed only where rounding put it behind all candidates.

    Args:
        x: (B, D) fp32.
        W_low: (L, D) bf16 or fp16, the rounded copy of W_enc.
        W_enc: (L, D) fp32.
        candidates: how many to decide among, at least k; None: k, so that the set is the low-precision product's.
        The rest as `encode_topk`.
    """
    low = x.to(W_low.dtype)
    _check_matrices(low, W_low)
    _check_matrices(x, W_enc)
    if x.dtype != torch.float32 or W_enc.shape != W_low.shape:
        raise InputError(
            f"x is {x.dtype}, W_enc {tuple(W_enc.shape)} and W_low {tuple(W_low.shape)}: expected fp32 x and W_enc, "
            "and W_low a rounded copy of W_enc"
        )
    bias, weight = _vector("b_enc", b_enc, W_enc), _vector("scale", scale, W_enc)
    ids = None if latents is None else latents.long().contiguous()
    n = W_enc.shape[0] if ids is None else ids.shape[0]
    acts, idx = _new_code(x.shape[0], k)
    try:
        _built().encode_topk_mixed(
            *(low, W_low, x, W_enc, bias, weight, ids, k if candidates is None else min(candidates, n), k, relu),
            *(acts, idx, max_scratch_bytes, torch.get_num_threads()),
        )
    except (IndexError, ValueError) as error:
        raise InputError(f"encode_topk_mixed: {error}") from None
    return acts, idx


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | float,
    *,
    max_scratch_bytes: int = 1 << 30,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.threshold_encode` over the tiles of `encode_topk`; memory grows with the entries found only."""
    theta = torch.as_tensor(threshold, dtype=torch.float32, device="cpu").expand(W_enc.shape[0])
    _check_matrices(x, W_enc)
    bias, bound = _vector("b_enc", b_enc, W_enc), _vector("threshold", theta, W_enc)
    scratch = (max_scratch_bytes, kernel, torch.get_num_threads())
    code = _built().ThresholdCode(x, W_enc, bias, bound, *scratch)
    row_ptr = torch.empty(x.shape[0] + 1, dtype=torch.int64, device="cpu")
    idx = torch.empty(code.size(), dtype=torch.int32, device="cpu")
    acts = torch.empty(code.size(), dtype=torch.float32, device="cpu")
    code.write(row_ptr, idx, acts)
    return row_ptr, idx, acts


def spmm(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """`reference.spmm`, W's rows gathered once and summed in fp32 in the order of j."""
    if W.dtype not in FLOATS:
        return reference.spmm(acts, idx, W)
    if acts.shape != idx.shape:
        raise InputError(f"acts has shape {tuple(acts.shape)} and idx {tuple(idx.shape)}: expected one shape")
    values = acts.float().contiguous()
    out = torch.empty((idx.shape[0], W.shape[1]), dtype=torch.float32, device="cpu")
    _gathered("spmm", idx, W, values, out)
    return out.to(W.dtype)


def sddmm(x: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """`reference.sddmm`, W's rows gathered once."""
    if W.dtype not in FLOATS:
        return reference.sddmm(x, idx, W)
    if x.shape != (idx.shape[0], W.shape[1]):
        raise InputError(f"x has shape {tuple(x.shape)}: expected {(idx.shape[0], W.shape[1])} to go with idx and W")
    out = torch.empty(idx.shape, dtype=torch.float32, device="cpu")
    _gathered("sddmm", idx, W, x.float().contiguous(), out)
    return out


def _gathered(op: str, idx: Tensor, W: Tensor, source: Tensor, out: Tensor) -> None:
    """Runs one of the two gathers."""
    W, idx = W.contiguous(), idx.contiguous()
    if W.dim() != 2 or idx.dim() != 2 or idx.dtype not in (torch.int32, torch.int64):
        raise InputError(f"idx is {idx.dtype} of shape {tuple(idx.shape)}: expected (batch, k) int32 or int64")
    try:
        getattr(_built(), op)(W, idx, source, out, torch.get_num_threads())
    except IndexError as error:
        raise InputError(f"{op}: {error}") from None


def _built() -> ModuleType:
    ext = extension()
    if ext is None:
        raise InputError("saefast's C++ extension is not built: call saefast.ops, which falls back to torch")
    return ext


def _new_code(B: int, k: int) -> reference.Code:
    """Room for acts and idx (B, k)."""
    acts = torch.empty((B, k), dtype=torch.float32, device="cpu")
    return acts, torch.empty((B, k), dtype=torch.int32, device="cpu")


def _check_matrices(x: Tensor, W: Tensor) -> None:
    """Raises InputError where x and W are not what the extension's encoders take."""
    if x.dim() != 2 or W.dim() != 2 or x.shape[1] != W.shape[1] or x.dtype != W.dtype or x.dtype not in FLOATS:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, W {W.dtype} {tuple(W.shape)}: expected (B, D) and (L, D), "
            "both fp32, bf16 or fp16"
        )
    if not (x.is_contiguous() and W.is_contiguous() and x.device.type == W.device.type == "cpu"):
        raise InputError("x and W must be contiguous CPU tensors: call .cpu() and .contiguous(), as saefast.ops does")


def _vector(name: str, vector: Tensor | None, W: Tensor) -> Tensor | None:
    if vector is None:
        return None
    if vector.shape != W.shape[:1]:
        raise InputError(f"{name} has shape {tuple(vector.shape)}: expected ({W.shape[0]},), one value per latent")
    return vector.float().contiguous()


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
    ext = extension()
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
        ext = extension() if len(self._sources) > 1 else None
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
