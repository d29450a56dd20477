"""The activations of latents that have been chosen, differentiable: what every choice of latents has in common."""

from typing import Any

import torch
from torch import Tensor

from saefast.ops.code import Code
from saefast.ops.registered import Registered
from saefast.ops.spmm import spmm
from saefast.ops.spmm_t import spmm_t
from saefast.ops.sum_by_latent import sum_by_latent


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
    found: Tensor = _selected(x, W_enc, b_enc, acts, idx, clip)
    return found.view(code.acts.shape)


def remember(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, code: Code, clip: bool) -> None:
    """Keeps what `gradients` needs of a choice: beside the inputs, an index and with clip a byte for each entry.

    A code with padding, whose acts are 0, is clipped: nothing comes back from what belongs to no row.
    """
    passed = code.acts > 0 if clip else None
    ctx.save_for_backward(x, W_enc, code.idx, code.row_ptr, passed)
    ctx.b_dtype = None if b_enc is None else b_enc.dtype


def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad, in the shape of acts -> the gradients of x, W_enc and b_enc, the op's first three inputs."""
    x, W_enc, idx, row_ptr, passed = ctx.saved_tensors
    grad = grad if passed is None else grad * passed
    L, wanted = W_enc.shape[0], ctx.needs_input_grad
    grad_x = spmm(grad, idx, W_enc, row_ptr).to(x.dtype) if wanted[0] else None
    grad_W = spmm_t(grad, idx, x, L, row_ptr).to(W_enc.dtype) if wanted[1] else None
    grad_b = sum_by_latent(grad, idx, L).to(ctx.b_dtype) if wanted[2] else None
    return grad_x, grad_W, grad_b


def _run(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, acts: Tensor, idx: Tensor, clip: bool) -> Tensor:
    return acts.clone(memory_format=torch.contiguous_format)


def _fake(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, acts: Tensor, idx: Tensor, clip: bool) -> Tensor:
    return acts.new_empty(acts.shape, dtype=acts.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, W_enc, b_enc, acts, idx, clip = inputs
    remember(ctx, x, W_enc, b_enc, Code(acts, idx), clip)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *gradients(ctx, grad), None, None, None


_selected = Registered("selected", _run, _fake, save=_save, backward=_backward)
