"""threshold_encode: every pre-activation above a threshold, as CSR."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saefast.ops import backends, checks, native, reference
from saefast.ops.code import Code
from saefast.ops.registered import Registered, low_precision
from saefast.ops.selected import gradients, remember
from saefast.typed import typed


@typed
def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """Every pre-activation above a threshold, as CSR with exact counts (JumpReLU; BatchTopK at inference).

    Differentiable in x, W_enc and b_enc, through the entries that are on. A threshold gets no gradient: what is above
    it does not change with it, and where an entry comes or goes there is no derivative. Autocast as for `encode_topk`.

    Args:
        x: (B, D). W_enc: (L, D). b_enc: (L,) or None.
        threshold: one number, or (L,) with one per latent. On where pre > threshold; NaN counts as on.

    Returns:
        row_ptr (B + 1,) int64, idx (nnz,) int32 ascending within each row, acts (nnz,) fp32 (fp64 for fp64 inputs).

    Raises:
        InputError: a shape, dtype or device that cannot be served.
    """
    low = low_precision(x, W_enc)
    checks.encoder(x, W_enc, b_enc, low)
    each = threshold if isinstance(threshold, Tensor) else None
    if each is not None and each.dim() > 0:
        checks.vector("threshold", each, W_enc)
    one = 0.0 if isinstance(threshold, Tensor) else float(threshold)
    acts, idx, row_ptr = _threshold_encode(x, W_enc, b_enc, each, one, low)
    return row_ptr, idx, acts


def _run(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, each: Tensor | None, one: float, low: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """each: a threshold for each latent, or 0-d; None where `one` is that of all. -> acts, idx, row_ptr."""
    threshold: Tensor | float = one if each is None else each
    if each is None and x.dtype != torch.float64:
        threshold = ctypes.c_float(one).value  # what fp32 has no number for becomes infinite, as products do
    if low is not None:
        x, W_enc = x.to(low), W_enc.to(low)
    x, W_enc = x.contiguous(), W_enc.contiguous()
    row_ptr, idx, acts = _encoder(backends.backend(x))(x, W_enc, b_enc, threshold)
    return acts, idx, row_ptr


def _encoder(backend: backends.Backend) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    match backend:
        case "triton":
            from saefast.ops import triton_threshold_encode

            return triton_threshold_encode.threshold_encode
        case "native":
            return native.threshold_encode
    return reference.threshold_encode


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    entries = torch.library.get_ctx().new_dynamic_size()
    acts = x.new_empty(entries, dtype=reference.accumulate_dtype(x.dtype))
    return acts, x.new_empty(entries, dtype=torch.int32), x.new_empty(x.shape[0] + 1, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, b_enc = inputs[:3]
    remember(ctx, x, W_enc, b_enc, Code(*output), clip=False)


def _backward(ctx: Any, grad_acts: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return gradients(ctx, grad_acts) + (None,) * 3


_threshold_encode = Registered("threshold_encode", _run, _fake, save=_save, backward=_backward)
