"""spmm_t: a sparse code's transpose times a dense matrix, the gradient of a weight matrix."""

from torch import Tensor

from saefast.errors import InputError
from saefast.ops import backends, checks, reference
from saefast.typed import typed


@typed
def spmm_t(acts: Tensor, idx: Tensor, x: Tensor, n_latents: int) -> Tensor:
    """Transposed product: out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j] · x[b]. Repeats bit for bit.

    For the autograd engine: the fused one works on groups of entries and never forms it. Has no derivative of its own.

    Args:
        acts: (B, K) float. idx: (B, K) int32 or int64, 0 <= idx < n_latents. x: (B, D) float.

    Returns:
        (n_latents, D), dense, fp32 (fp64 for fp64 x).

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    checks.entries(acts, idx, n_latents)
    checks.dense(x=x)
    if x.dim() != 2 or x.shape[0] != acts.shape[0] or x.dtype not in checks.FLOATS or x.device != acts.device:
        raise InputError(
            f"x is {checks.of(x)}: expected floats (batch, D) with a row for each of acts' {checks.of(acts)}"
        )
    acts, idx, x = acts.contiguous(), idx.contiguous(), x.contiguous()
    # On a GPU torch would add by atomics, whose order changes from call to call.
    if backends.backend(x) == "triton":
        from saefast.ops import triton_spmm

        return triton_spmm.spmm_t(acts, idx, x, n_latents)
    return reference.spmm_t(acts, idx, x, n_latents)
