"""spmm: a sparse code times a dense matrix, which is decoding."""

from typing import Any

import torch
from torch import Tensor

from saefast.ops import backends, checks, native, reference
from saefast.ops.sddmm import sddmm
from saefast.ops.spmm_t import spmm_t
from saefast.typed import typed


@typed
def spmm(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """Sparse @ dense: out[b] = Σ_j acts[b, j] · W[idx[b, j]], summed in fp32 (fp64 for fp64 W).

    Differentiable in acts and W.

    Args:
        acts: (B, K) float. idx: (B, K) int32 or int64, 0 <= idx < L. W: (L, D).

    Returns:
        (B, D) in W's dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    checks.code(acts, idx, W)
    if torch.is_grad_enabled() and (acts.requires_grad or W.requires_grad):
        out: Tensor = Spmm.apply(acts, idx, W)
        return out
    return _spmm(acts, idx, W)


class Spmm(torch.autograd.Function):
    """`spmm` with its derivative: grad_acts is an sddmm, grad_W an spmm_t."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(acts, idx, W)
        return _spmm(acts, idx, W)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, idx, W = ctx.saved_tensors
        grad = grads[0].contiguous()  # (B, D); autograd hands over expanded tensors after a sum
        grad_acts = sddmm(grad, idx, W).to(acts.dtype) if ctx.needs_input_grad[0] else None
        grad_W = spmm_t(acts, idx, grad, W.shape[0]).to(W.dtype) if ctx.needs_input_grad[2] else None
        return grad_acts, None, grad_W


def _spmm(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    acts, idx, W = acts.contiguous(), idx.contiguous(), W.contiguous()
    match backends.backend(W):
        case "triton":
            from saefast.ops import triton_spmm

            return triton_spmm.spmm(acts, idx, W)
        case "native":
            return native.spmm(acts, idx, W)
    return reference.spmm(acts, idx, W)
