"""spmm: a sparse code times a dense matrix, which is decoding."""

from typing import Any

from torch import Tensor

from saefast.ops import backends, checks, native, reference
from saefast.ops.code import to_rows
from saefast.ops.registered import Registered
from saefast.ops.sddmm import sddmm
from saefast.ops.spmm_t import spmm_t
from saefast.typed import typed


@typed
def spmm(acts: Tensor, idx: Tensor, W: Tensor, row_ptr: Tensor | None = None) -> Tensor:
    """Sparse @ dense: out[b] = Σ_j acts[b, j] · W[idx[b, j]], summed in fp32 (fp64 for fp64 W).

    Differentiable in acts and W, twice. Autocast changes nothing. torch.vmap may map over acts and idx.

    Args:
        acts: (B, K) float. idx: (B, K) int32 or int64, 0 <= idx < L. W: (L, D).
        row_ptr: (B + 1,) ints for a CSR code, whose acts and idx are (n,): row b has the entries row_ptr[b] to
            row_ptr[b + 1]; those from row_ptr[B] on count for nothing.

    Returns:
        (B, D) in W's dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    checks.code(acts, idx, W, row_ptr=row_ptr)
    out: Tensor = _spmm(acts, idx, W, row_ptr)
    return out


def _run(acts: Tensor, idx: Tensor, W: Tensor, row_ptr: Tensor | None) -> Tensor:
    if row_ptr is not None:
        checks.pointers(row_ptr, len(idx))
        acts, idx = to_rows(acts, row_ptr), to_rows(idx, row_ptr)
    acts, idx, W = acts.contiguous(), idx.contiguous(), W.contiguous()
    match backends.backend(W):
        case "triton":
            from saefast.ops import triton_spmm

            return triton_spmm.spmm(acts, idx, W)
        case "native":
            return native.spmm(acts, idx, W)
    checks.inside(idx, W.shape[0])
    return reference.spmm(acts, idx, W)


def _fake(acts: Tensor, idx: Tensor, W: Tensor, row_ptr: Tensor | None) -> Tensor:
    return W.new_empty((acts.shape[0] if row_ptr is None else row_ptr.shape[0] - 1, W.shape[1]), dtype=W.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """grad_acts is an sddmm, grad_W an spmm_t."""
    acts, idx, W, row_ptr = ctx.saved_tensors
    grad = grad.contiguous()  # (B, D); autograd hands over expanded tensors after a sum
    grad_acts = sddmm(grad, idx, W, row_ptr).to(acts.dtype) if ctx.needs_input_grad[0] else None
    grad_W = spmm_t(acts, idx, grad, W.shape[0], row_ptr).to(W.dtype) if ctx.needs_input_grad[2] else None
    return grad_acts, None, grad_W, None


_spmm = Registered("spmm", _run, _fake, save=_save, backward=_backward, rows=("acts", "idx"))
