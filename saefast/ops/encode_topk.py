"""encode_topk: the k largest pre-activations of every row."""

from typing import Any, Literal

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops import backends, checks, native, reference
from saefast.ops.code import Code
from saefast.ops.registered import Registered, low_precision
from saefast.ops.selected import gradients, remember
from saefast.typed import typed

Method = Literal["auto", "fused", "chunked"]
Precision = Literal["ieee", "tf32"]


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
    clip_grad: bool = True,
    method: Method = "auto",
    precision: Precision = "ieee",
    max_scratch_bytes: int = 1 << 30,
) -> tuple[Tensor, Tensor]:
    """The exact k largest of x W_encᵀ + b_enc for every row, without ever writing the (B, L) matrix.

    Exact over fp32 accumulators (fp64 for fp64 inputs): values descend, ties go to the lower index, NaN ranks
    above +inf, and each row holds k distinct indices even where fewer than k values are positive.
    Differentiable in x, W_enc and b_enc, through the entries selected and not where ReLU clipped. Under autocast x and
    W_enc are rounded to its dtype for the product, exact over that; derivatives are those of x and W_enc as given.
    torch.vmap may map over x.

    Args:
        x: (B, D) float. Any strides; copied once if not contiguous.
        W_enc: (L, D), x's dtype (any but float64 under autocast) and device.
        b_enc: (L,) float, or None.
        k: latents kept per row, 1 <= k <= L (or the number of `latents`).
        latents: (n,) sorted int ids: only these compete. Ids returned are still those of W_enc.
        scale: (L,) positive floats: ranks by scale · pre, returns pre. Gets no gradient.
        relu: clip the returned values at zero; the indices do not change.
        clip_grad: False lets gradients through where ReLU clipped, which is wrong and what one peer does
            (`TrainConfig.reproduce_bugs`).
        method: GPU only. "fused" filters in the GEMM's epilogue, "chunked" runs a library GEMM on chunks that fit in
            L2 and filters after, "auto" follows measurements (kernels/tuning.py).
        precision: products of fp32 inputs on a GPU: "ieee", or "tf32" (faster, 10-bit mantissa).
        max_scratch_bytes: scratch memory allowed beside inputs and results.

    Returns:
        acts (B, k) fp32 (fp64 for fp64 inputs), idx (B, k) int32.

    Raises:
        InputError: a shape, dtype, device, k or option that cannot be served.
    """
    low = low_precision(x, W_enc)
    n = checks.encoder(x, W_enc, b_enc, low)
    if latents is not None:
        checks.listed(latents, W_enc)
        n = latents.shape[0]
    if not 1 <= k <= n:
        what = "len(latents)" if latents is not None else "n_latents"
        raise InputError(f"k is {k!r}: expected an int between 1 and {what} = {n}")
    if scale is not None:
        checks.vector("scale", scale, W_enc)
    if method not in ("auto", "fused", "chunked"):
        raise InputError(f"method is {method!r}: expected 'auto', 'fused' or 'chunked'")
    if precision not in ("ieee", "tf32"):
        raise InputError(f"precision is {precision!r}: expected 'ieee' or 'tf32'")
    if max_scratch_bytes < 1:
        raise InputError(f"max_scratch_bytes is {max_scratch_bytes}: expected a positive number of bytes")
    found: tuple[Tensor, Tensor] = _encode_topk(
        x, W_enc, b_enc, k, latents, scale, relu, clip_grad, method, precision, min(max_scratch_bytes, 1 << 62), low
    )
    return found


def _run(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, latents: Tensor | None, scale: Tensor | None, relu: bool,
    clip_grad: bool, method: str, precision: str, scratch: int, low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if latents is not None:
        checks.ascending(latents, len(W_enc))
    if low is not None:
        x, W_enc = x.to(low), W_enc.to(low)
    x, W_enc = x.contiguous(), W_enc.contiguous()
    match backends.backend(x):
        case "triton":
            from saefast.ops import triton_encode_topk

            return triton_encode_topk.encode_topk(
                x, W_enc, b_enc, k, latents=latents, scale=scale, relu=relu, method=method, precision=precision,
                max_scratch_bytes=scratch,
            )  # fmt: skip
        case "native":
            return native.encode_topk(
                x, W_enc, b_enc, k, latents=latents, scale=scale, relu=relu, max_scratch_bytes=scratch
            )
    return reference.encode_topk(x, W_enc, b_enc, k, latents=latents, scale=scale, relu=relu)


def _fake(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *options: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    acts = x.new_empty(shape, dtype=reference.accumulate_dtype(x.dtype))
    return acts, x.new_empty(shape, dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, b_enc, _, _, _, relu, clip_grad = inputs[:8]
    remember(ctx, x, W_enc, b_enc, Code(*output), clip=relu and clip_grad)


def _backward(ctx: Any, grad_acts: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return gradients(ctx, grad_acts) + (None,) * 9


_encode_topk = Registered("encode_topk", _run, _fake, save=_save, backward=_backward, rows=("x",))
