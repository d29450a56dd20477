"""sddmm: dot products at the places of a sparse code."""

from typing import Any

import torch
from torch import Tensor

from saefast.ops import backends, checks, native, reference
from saefast.ops.code import to_csr, to_rows
from saefast.ops.registered import Registered
from saefast.typed import typed


@typed
def sddmm(x: Tensor, idx: Tensor, W: Tensor, row_ptr: Tensor | None = None) -> Tensor:
    """Sampled dot products: out[b, j] = x[b] · W[idx[b, j]]: pre-activations of some latents, without a bias.

    Differentiable in x and W. Autocast changes nothing. torch.vmap may map over x and idx.

    Args:
        x: (B, D) float. idx: (B, K) int32 or int64, 0 <= idx < L. W: (L, D).
        row_ptr: (B + 1,) of a CSR code, whose idx is (n,); as in `spmm`.

    Returns:
        (B, K) fp32 (fp64 for fp64 x); (n,) where there is a row_ptr, 0 for entries that belong to no row.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    checks.width("x", x, W)
    checks.code(None, idx, W, rows=x.shape[0], row_ptr=row_ptr)
    out: Tensor = _sddmm(x, idx, W, row_ptr)
    return out


def _run(x: Tensor, idx: Tensor, W: Tensor, row_ptr: Tensor | None) -> Tensor:
    if row_ptr is not None:
        checks.pointers(row_ptr, len(idx))
        return to_csr(_run(x, to_rows(idx, row_ptr), W, None), row_ptr, len(idx))
    x, idx, W = x.contiguous(), idx.contiguous(), W.contiguous()
    match backends.backend(x):
        case "triton":
            from saefast.ops import triton_sddmm

            return triton_sddmm.sddmm(x, idx, W)
        case "native":
            return native.sddmm(x, idx, W)
    checks.inside(idx, W.shape[0])
    return reference.sddmm(x, idx, W)


def _fake(x: Tensor, idx: Tensor, W: Tensor, row_ptr: Tensor | None) -> Tensor:
    return x.new_empty(idx.shape, dtype=reference.accumulate_dtype(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By name: the files of these ops import this one."""
    x, idx, W, row_ptr = ctx.saved_tensors
    wanted, products = ctx.needs_input_grad, torch.ops.saefast
    grad_x = products.spmm(grad, idx, W, row_ptr).to(x.dtype) if wanted[0] else None
    grad_W = products.spmm_t(grad, idx, x, W.shape[0], row_ptr).to(W.dtype) if wanted[2] else None
    return grad_x, None, grad_W, None


_sddmm = Registered("sddmm", _run, _fake, save=_save, backward=_backward, rows=("x", "idx"))
