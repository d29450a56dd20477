"""The activations of latents that have been chosen, differentiable: what every choice of latents has in common."""

from typing import Any

import torch
from torch import Tensor

from saefast.ops.code import Code
from saefast.ops.spmm import spmm
from saefast.ops.spmm_t import spmm_t
from saefast.ops.sum_by_latent import sum_by_latent


class Selected(torch.autograd.Function):
    """Lets gradients through the entries of a code whose activations are known. Saves B·K entries."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, acts: Tensor, idx: Tensor, clip: bool
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc, acts, idx)
        ctx.clip, ctx.b_dtype = clip, None if b_enc is None else b_enc.dtype
        return acts.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, acts, idx = ctx.saved_tensors
        grad = grads[0] * (acts > 0) if ctx.clip else grads[0]  # (B, K)
        L = W_enc.shape[0]
        grad_x = spmm(grad, idx, W_enc).to(x.dtype) if ctx.needs_input_grad[0] else None
        grad_W = spmm_t(grad, idx, x, L).to(W_enc.dtype) if ctx.needs_input_grad[1] else None
        grad_b = sum_by_latent(grad, idx, L).to(ctx.b_dtype) if ctx.needs_input_grad[2] else None
        return grad_x, grad_W, grad_b, None, None, None


def selected(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, code: Code, *, clip: bool = True) -> Tensor:
    """The activations of a code (B, K) of x (B, D), with gradients to x, W_enc (L, D) and b_enc (L,). -> (B, K).

    Args:
        code: of these very tensors; its activations are taken as they are.
            Where x holds the rows of M layers side by side, of which a row of W_enc reads one, the code has K / M
            entries of each, those of the first layer first.
        clip: gradients stop where an activation is not above 0, as ReLU's derivative does; False lets them pass, which
            is wrong behind a ReLU and what one peer does (see `TrainConfig.reproduce_bugs`).
    """
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, W_enc, b_enc))):
        return code.acts
    acts, idx, width = code.acts, code.idx, W_enc.shape[1]
    if (layers := x.shape[1] // width) > 1:
        x, acts, idx = x.reshape(-1, width), *(t.reshape(len(t) * layers, t.shape[1] // layers) for t in (acts, idx))
    found: Tensor = Selected.apply(x, W_enc, b_enc, acts, idx, clip)
    return found.view(code.acts.shape)
