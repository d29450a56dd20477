"""EncodeTopK and Decode: the derivatives, written once over `saefast.ops`."""

from typing import Any

import torch
from torch import Tensor

from saefast.ops import dispatch as ops


class EncodeTopK(torch.autograd.Function):
    """Differentiable `ops.encode_topk`. Saves B·k entries, never a (B, L) tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        latents: Tensor | None,
        scale: Tensor | None,
        relu: bool,
        clip_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        acts, idx = ops.encode_topk(x, W_enc, b_enc, k, latents=latents, scale=scale, relu=relu)
        ctx.save_for_backward(x, W_enc, acts, idx)
        ctx.clip_grad, ctx.b_dtype = relu and clip_grad, b_enc.dtype
        ctx.mark_non_differentiable(idx)
        return acts, idx

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, acts, idx = ctx.saved_tensors
        grad = grads[0] * (acts > 0) if ctx.clip_grad else grads[0]  # (B, k)
        grad_x = ops.spmm(grad, idx, W_enc).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_W = ops.spmm_t(grad, idx, x, W_enc.shape[0]).to(W_enc.dtype) if ctx.needs_input_grad[1] else None
        grad_b = ops.sum_by_latent(grad, idx, W_enc.shape[0]).to(ctx.b_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_W, grad_b, None, None, None, None, None


class Decode(torch.autograd.Function):
    """Differentiable `ops.spmm`."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, idx: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(acts, idx, W_dec)
        return ops.spmm(acts, idx, W_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, idx, W_dec = ctx.saved_tensors
        grad = grads[0].contiguous()  # (B, D); autograd hands over expanded tensors after a sum
        grad_acts = ops.sddmm(grad, idx, W_dec).to(acts.dtype) if ctx.needs_input_grad[0] else None
        grad_W = ops.spmm_t(acts, idx, grad, W_dec.shape[0]).to(W_dec.dtype) if ctx.needs_input_grad[2] else None
        return grad_acts, None, grad_W


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    clip_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Differentiable top-k encoder; arguments and results as `saefast.ops.encode_topk`.

    Gradients reach x, W_enc and b_enc through the selected entries only, and stop where ReLU clipped.
    `clip_grad=False` lets them pass through clipped entries, which is wrong and what one peer does
    (see `TrainConfig.reproduce_bugs`). `scale` only ranks and gets no gradient.
    """
    return EncodeTopK.apply(x, W_enc, b_enc, k, latents, scale, relu, clip_grad)


def decode(acts: Tensor, idx: Tensor, W_dec: Tensor) -> Tensor:
    """Differentiable Σ_j acts[b, j] · W_dec[idx[b, j]], without b_dec. acts, idx (B, K), W_dec (L, D) -> (B, D)."""
    return Decode.apply(acts, idx, W_dec)
