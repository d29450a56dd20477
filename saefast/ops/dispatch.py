"""The ops: checks their arguments and hands them to the module that serves the tensors.

Three modules hold the same functions under the same names: `triton`, `native` and `reference`.
"""

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops import backends, native, reference
from saefast.placement import require_memory
from saefast.typed import typed

Method = Literal["auto", "fused", "chunked"]
Precision = Literal["ieee", "tf32"]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _module(x: Tensor) -> ModuleType:
    """The module whose functions serve tensors like x."""
    match backends.backend(x):
        case "triton":
            from saefast.ops import triton

            return triton
        case "native":
            return native
    return reference


@typed
def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    method: Method = "auto",
    precision: Precision = "ieee",
    max_scratch_bytes: int = 1 << 30,
) -> tuple[Tensor, Tensor]:
    """The exact k largest of x W_encᵀ + b_enc for every row, without ever writing the (B, L) matrix.

    Exact over fp32 accumulators (fp64 for fp64 inputs): values descend, ties go to the lower index, NaN ranks
    above +inf, and each row holds k distinct indices even where fewer than k values are positive.

    Args:
        x: (B, D) float. Any strides; copied once if not contiguous.
        W_enc: (L, D), x's dtype and device.
        b_enc: (L,) float, or None.
        k: latents kept per row, 1 <= k <= L (or the number of `latents`).
        latents: (n,) sorted int ids: only these compete. Ids returned are still those of W_enc.
        scale: (L,) positive floats: ranks by scale · pre, returns pre.
        relu: clip the returned values at zero; the indices do not change.
        method: GPU only. "fused" filters in the GEMM's epilogue, "chunked" runs a library GEMM on chunks that fit in
            L2 and filters after, "auto" follows measurements (kernels/tuning.py).
        precision: products of fp32 inputs on a GPU: "ieee", or "tf32" (faster, 10-bit mantissa).
        max_scratch_bytes: scratch memory allowed beside inputs and results.

    Returns:
        acts (B, k) fp32 (fp64 for fp64 inputs), idx (B, k) int32.

    Raises:
        InputError: a shape, dtype, device, k or option that cannot be served.
    """
    n = _check_encoder(x, W_enc, b_enc)
    if latents is not None:
        _check_latents(latents, W_enc)
        n = latents.shape[0]
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n:
        what = "len(latents)" if latents is not None else "n_latents"
        raise InputError(f"k is {k!r}: expected an int between 1 and {what} = {n}")
    if scale is not None:
        _check_vector("scale", scale, W_enc)
    if method not in ("auto", "fused", "chunked"):
        raise InputError(f"method is {method!r}: expected 'auto', 'fused' or 'chunked'")
    if precision not in ("ieee", "tf32"):
        raise InputError(f"precision is {precision!r}: expected 'ieee' or 'tf32'")
    if max_scratch_bytes < 1:
        raise InputError(f"max_scratch_bytes is {max_scratch_bytes}: expected a positive number of bytes")
    impl = _module(x)
    extra: dict[str, object] = {}
    if impl is not reference:
        extra["max_scratch_bytes"] = min(max_scratch_bytes, 1 << 62)
    if impl is not reference and impl is not native:
        extra |= {"method": method, "precision": precision}
    acts, idx = impl.encode_topk(
        x.contiguous(), W_enc.contiguous(), b_enc, k, latents=latents, scale=scale, relu=relu, **extra
    )
    return acts, idx


@typed
def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Every pre-activation above a threshold, as CSR with exact counts (JumpReLU; BatchTopK at inference).

    Args:
        x: (B, D). W_enc: (L, D). b_enc: (L,) or None.
        threshold: one number, or (L,) with one per latent. On where pre > threshold; NaN counts as on.

    Returns:
        row_ptr (B + 1,) int64, idx (nnz,) int32 ascending within each row, acts (nnz,) fp32 (fp64 for fp64 inputs).

    Raises:
        InputError: a shape, dtype or device that cannot be served.
    """
    _check_encoder(x, W_enc, b_enc)
    if isinstance(threshold, Tensor) and threshold.dim() > 0:
        _check_vector("threshold", threshold, W_enc)
    row_ptr, idx, acts = _module(x).threshold_encode(x.contiguous(), W_enc.contiguous(), b_enc, threshold)
    return row_ptr, idx, acts


@typed
def spmm(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """Sparse @ dense: out[b] = Σ_j acts[b, j] · W[idx[b, j]], summed in fp32 (fp64 for fp64 W).

    Args:
        acts: (B, K) float. idx: (B, K) int32 or int64, 0 <= idx < L. W: (L, D).

    Returns:
        (B, D) in W's dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    _check_code(acts, idx, W)
    return _module(W).spmm(acts.contiguous(), idx.contiguous(), W.contiguous())


@typed
def sddmm(x: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """Sampled dot products: out[b, j] = x[b] · W[idx[b, j]].

    Args:
        x: (B, D) float. idx: (B, K) int32 or int64, 0 <= idx < L. W: (L, D).

    Returns:
        (B, K) fp32 (fp64 for fp64 x).

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    _check_width("x", x, W)
    _check_code(None, idx, W, rows=x.shape[0])
    return _module(x).sddmm(x.contiguous(), idx.contiguous(), W.contiguous())


@typed
def spmm_t(acts: Tensor, idx: Tensor, x: Tensor, n_latents: int) -> Tensor:
    """Transposed product: out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j] · x[b]. -> dense (n_latents, D).

    The gradient of a weight matrix, for the autograd engine; the fused step works on runs. Repeats bit for bit.
    """
    _check_entries(acts, idx, n_latents)
    _check_dense(x=x)
    if x.dim() != 2 or x.shape[0] != acts.shape[0] or x.dtype not in FLOATS or x.device != acts.device:
        raise InputError(f"x is {_of(x)}: expected floats (batch, D) with a row for each of acts' {_of(acts)}")
    # torch adds by atomics on a GPU, in whatever order they come.
    return _transposed(x).spmm_t(acts.contiguous(), idx.contiguous(), x.contiguous(), n_latents)


@typed
def sum_by_latent(acts: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    """out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j]: the gradient of b_enc. Repeats bit for bit."""
    _check_entries(acts, idx, n_latents)
    return _transposed(acts).sum_by_latent(acts.contiguous(), idx.contiguous(), n_latents)


def _transposed(x: Tensor) -> ModuleType:
    return _module(x) if x.is_cuda else reference


def _check_entries(acts: Tensor, idx: Tensor, n_latents: int) -> None:
    """A code of which only the number of latents is known."""
    _check_dense(acts=acts, idx=idx)
    if acts.dim() != 2 or acts.shape != idx.shape or acts.dtype not in FLOATS or acts.device != idx.device:
        raise InputError(f"acts is {_of(acts)} and idx {_of(idx)}: expected floats and ints, both (batch, k)")
    if idx.dtype not in (torch.int32, torch.int64):
        raise InputError(f"idx is {_of(idx)}: expected int32 or int64")
    if not 1 <= n_latents < 2**31:
        raise InputError(f"n_latents is {n_latents}: expected an int from 1 to 2**31 - 1")
    require_memory(acts.device, n_latents * 4, f"one number for each of n_latents = {n_latents}")
    _check_range(idx, n_latents)


def _of(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def _check_range(idx: Tensor, n_latents: int) -> None:
    """On a GPU the check would stall the stream."""
    if idx.device.type == "cpu" and idx.numel():
        low, high = torch.aminmax(idx)
        if int(low) < 0 or int(high) >= n_latents:
            raise InputError(f"idx holds {int(low)}..{int(high)}: expected values in [0, {n_latents})")


def _check_dense(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise InputError(f"{name} is {tensor.layout}: expected a dense tensor; use {name}.to_dense()")


def _check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> int:
    """Checks shapes, dtypes and devices of an encoder's arguments and returns L."""
    _check_dense(x=x, W_enc=W_enc)
    if W_enc.dim() != 2 or W_enc.shape[0] == 0:
        raise InputError(f"W_enc has shape {tuple(W_enc.shape)}: expected (n_latents, d_in) with n_latents >= 1")
    _check_width("x", x, W_enc)
    if W_enc.shape[0] >= 2**31:
        raise InputError(f"W_enc has {W_enc.shape[0]} latents: at most 2**31 - 1 fit the int32 indices")
    if x.dtype not in FLOATS or W_enc.dtype != x.dtype:
        raise InputError(f"x is {x.dtype} and W_enc {W_enc.dtype}: expected one floating dtype for both; cast one")
    if b_enc is not None:
        _check_vector("b_enc", b_enc, W_enc)
    return W_enc.shape[0]


def _check_vector(name: str, vector: Tensor, W: Tensor) -> None:
    _check_dense(**{name: vector})
    if vector.shape != W.shape[:1]:
        raise InputError(f"{name} has shape {tuple(vector.shape)}: expected ({W.shape[0]},), one value per latent")
    if vector.dtype not in FLOATS or vector.device != W.device:
        raise InputError(f"{name} is {vector.dtype} on {vector.device}: expected a float tensor on {W.device}")


def _check_width(name: str, x: Tensor, W: Tensor) -> None:
    _check_dense(**{name: x})
    if x.dim() != 2 or W.dim() != 2 or x.shape[1] != W.shape[1]:
        raise InputError(f"{name} has shape {tuple(x.shape)} and W {tuple(W.shape)}: expected (batch, D) and (L, D)")
    if x.device != W.device:
        raise InputError(f"{name} is on {x.device} and W on {W.device}: expected one device; move one with .to()")


def _check_latents(latents: Tensor, W: Tensor) -> None:
    _check_dense(latents=latents)
    if latents.dim() != 1 or latents.dtype not in (torch.int32, torch.int64) or latents.device != W.device:
        raise InputError(
            f"latents is {latents.dtype} of shape {tuple(latents.shape)} on {latents.device}: "
            f"expected a 1-D int32 or int64 tensor on {W.device}"
        )
    if latents.device.type == "cpu" and len(latents):  # on a GPU the check would stall the stream
        ascending = bool((latents[1:] > latents[:-1]).all())
        if not ascending or latents[0] < 0 or latents[-1] >= W.shape[0]:
            raise InputError(f"latents must be strictly ascending ids in [0, {W.shape[0]}): sort and deduplicate them")


def _check_code(acts: Tensor | None, idx: Tensor, W: Tensor, rows: int | None = None) -> None:
    _check_dense(idx=idx, W=W, **({} if acts is None else {"acts": acts}))
    if W.dim() != 2 or W.dtype not in FLOATS:
        raise InputError(f"W is {W.dtype} of shape {tuple(W.shape)}: expected a floating (n_latents, D) tensor")
    if idx.dim() != 2 or idx.dtype not in (torch.int32, torch.int64):
        raise InputError(f"idx is {idx.dtype} of shape {tuple(idx.shape)}: expected (batch, k) int32 or int64")
    if acts is not None and (acts.shape != idx.shape or acts.dtype not in FLOATS):
        raise InputError(
            f"acts is {acts.dtype} of shape {tuple(acts.shape)}: expected floats of idx's {tuple(idx.shape)}"
        )
    if rows is not None and idx.shape[0] != rows:
        raise InputError(f"idx has {idx.shape[0]} rows and x {rows}: expected as many")
    if idx.device != W.device or (acts is not None and acts.device != W.device):
        raise InputError(f"acts and idx must be on W's device {W.device}, idx is on {idx.device}")
    _check_range(idx, W.shape[0])
