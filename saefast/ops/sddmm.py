"""sddmm: dot products at the places of a sparse code."""

from torch import Tensor

from saefast.ops import backends, checks, native, reference
from saefast.typed import typed


@typed
def sddmm(x: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """Sampled dot products: out[b, j] = x[b] · W[idx[b, j]]. Has no derivative of its own.

    Args:
        x: (B, D) float. idx: (B, K) int32 or int64, 0 <= idx < L. W: (L, D).

    Returns:
        (B, K) fp32 (fp64 for fp64 x).

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    checks.width("x", x, W)
    checks.code(None, idx, W, rows=x.shape[0])
    x, idx, W = x.contiguous(), idx.contiguous(), W.contiguous()
    match backends.backend(x):
        case "triton":
            from saefast.ops import triton_sddmm

            return triton_sddmm.sddmm(x, idx, W)
        case "native":
            return native.sddmm(x, idx, W)
    return reference.sddmm(x, idx, W)
