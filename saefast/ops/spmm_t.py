"""spmm_t: a sparse code's transpose times a dense matrix, the gradient of a weight matrix."""

from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops import backends, checks, reference
from saefast.ops.code import to_rows
from saefast.ops.registered import Registered
from saefast.typed import typed


@typed
def spmm_t(acts: Tensor, idx: Tensor, x: Tensor, n_latents: int, row_ptr: Tensor | None = None) -> Tensor:
    """Transposed product: out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j] · x[b]. Repeats bit for bit.

    The dense gradient of a weight matrix: the fused engine works on groups of entries and never forms it.
    Differentiable in acts and x. Autocast changes nothing.

    Args:
        acts: (B, K) float. idx: (B, K) int32 or int64, 0 <= idx < n_latents. x: (B, D) float.
        row_ptr: (B + 1,) of a CSR code, whose acts and idx are (n,); as in `spmm`.

    Returns:
        (n_latents, D), dense, fp32 (fp64 for fp64 x).

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    rows = checks.entries(acts, idx, n_latents, row_ptr)
    checks.dense(x=x)
    if x.dim() != 2 or x.shape[0] != rows or x.dtype not in checks.FLOATS or x.device != acts.device:
        raise InputError(
            f"x is {checks.of(x)}: expected floats (batch, D) with a row for each of acts' {checks.of(acts)}"
        )
    out: Tensor = _spmm_t(acts, idx, x, n_latents, row_ptr)
    return out


def _run(acts: Tensor, idx: Tensor, x: Tensor, n_latents: int, row_ptr: Tensor | None) -> Tensor:
    checks.one_each(acts.device, n_latents)
    checks.inside(idx, n_latents)
    if row_ptr is not None:
        checks.pointers(row_ptr, len(idx))
        acts, idx = to_rows(acts, row_ptr), to_rows(idx, row_ptr)
    acts, idx, x = acts.contiguous(), idx.contiguous(), x.contiguous()
    # On a GPU torch would add by atomics, whose order changes from call to call.
    if backends.backend(x) == "triton":
        from saefast.ops import triton_spmm

        return triton_spmm.spmm_t(acts, idx, x, n_latents)
    return reference.spmm_t(acts, idx, x, n_latents)


def _fake(acts: Tensor, idx: Tensor, x: Tensor, n_latents: int, row_ptr: Tensor | None) -> Tensor:
    return x.new_empty((n_latents, x.shape[1]), dtype=reference.accumulate_dtype(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    acts, idx, x, _, row_ptr = inputs
    ctx.save_for_backward(acts, idx, x, row_ptr)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By name: the files of these ops import this one."""
    acts, idx, x, row_ptr = ctx.saved_tensors
    wanted, products = ctx.needs_input_grad, torch.ops.saefast
    grad_acts = products.sddmm(x, idx, grad, row_ptr).to(acts.dtype) if wanted[0] else None
    grad_x = products.spmm(acts, idx, grad, row_ptr).to(x.dtype) if wanted[2] else None
    return grad_acts, None, grad_x, None, None


_spmm_t = Registered("spmm_t", _run, _fake, save=_save, backward=_backward)
