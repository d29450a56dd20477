"""threshold_encode: every pre-activation above a threshold, as CSR."""

from torch import Tensor

from saefast.ops import backends, checks, native, reference
from saefast.typed import typed


@typed
def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Every pre-activation above a threshold, as CSR with exact counts (JumpReLU; BatchTopK at inference).

    Has no derivative of its own.

    Args:
        x: (B, D). W_enc: (L, D). b_enc: (L,) or None.
        threshold: one number, or (L,) with one per latent. On where pre > threshold; NaN counts as on.

    Returns:
        row_ptr (B + 1,) int64, idx (nnz,) int32 ascending within each row, acts (nnz,) fp32 (fp64 for fp64 inputs).

    Raises:
        InputError: a shape, dtype or device that cannot be served.
    """
    checks.encoder(x, W_enc, b_enc)
    if isinstance(threshold, Tensor) and threshold.dim() > 0:
        checks.vector("threshold", threshold, W_enc)
    x, W_enc = x.contiguous(), W_enc.contiguous()
    match backends.backend(x):
        case "triton":
            from saefast.ops import triton_threshold_encode

            return triton_threshold_encode.threshold_encode(x, W_enc, b_enc, threshold)
        case "native":
            return native.threshold_encode(x, W_enc, b_enc, threshold)
    return reference.threshold_encode(x, W_enc, b_enc, threshold)
