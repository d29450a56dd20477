"""sum_by_latent: a sparse code summed over the batch, the gradient of b_enc."""

from torch import Tensor

from saefast.ops import backends, checks, reference
from saefast.typed import typed


@typed
def sum_by_latent(acts: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    """out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j]. Repeats bit for bit. Has no derivative of its own.

    Args:
        acts: (B, K) float. idx: (B, K) int32 or int64, 0 <= idx < n_latents.

    Returns:
        (n_latents,) in acts' dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    checks.entries(acts, idx, n_latents)
    acts, idx = acts.contiguous(), idx.contiguous()
    if backends.backend(acts) == "triton":
        from saefast.ops import triton_spmm

        return triton_spmm.sum_by_latent(acts, idx, n_latents)
    return reference.sum_by_latent(acts, idx, n_latents)
