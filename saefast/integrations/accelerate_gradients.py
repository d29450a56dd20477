"""Derivatives of a code and of decoding for other people's optimisers, which want a dense gradient of every matrix.

On a CPU such a gradient is as dear to get memory for as to fill: 25 000 pages of 4 KB for 100 MB, anew with every step.
So its memory is kept from step to step, and it is made a part that stays in the caches at a time.
"""

import math
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag
from torch.utils.weak import WeakTensorKeyDictionary

from saefast.ops.code import Code
from saefast.ops.sddmm import sddmm
from saefast.ops.spmm import spmm
from saefast.ops.spmm_t import spmm_t
from saefast.ops.sum_by_latent import sum_by_latent

# Bytes of a gradient that are worked on at a time.
PART = 1 << 21
# What vector instructions like addresses to be multiples of.
LINE = 64
# Arrays that are kept for each matrix: its copy in bf16, its gradient, and that of AuxK.
KEPT = 3


class Chosen(torch.autograd.Function):
    """The activations of a code that is known, with gradients to x (B, D), W_enc (L, D) and b_enc (L,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, acts: Tensor, idx: Tensor, clip: bool) -> Tensor:
        ctx.save_for_backward(x, W_enc, acts, idx)
        ctx.clip, ctx.b_dtype = clip, b_enc.dtype
        return acts.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, acts, idx = ctx.saved_tensors
        grad = grads[0] * (acts > 0) if ctx.clip else grads[0]
        wanted, L = ctx.needs_input_grad, len(W_enc)
        grad_x = spmm(grad, idx, W_enc).to(x.dtype) if wanted[0] else None
        grad_W = gradient_rows(grad, idx, x, W_enc).to(W_enc.dtype) if wanted[1] else None
        grad_b = sum_by_latent(grad, idx, L).to(ctx.b_dtype) if wanted[2] else None
        return grad_x, grad_W, grad_b, None, None, None


class Decoded(torch.autograd.Function):
    """acts (B, K) and idx (B, K) times W_dec (L, D) -> (B, D), with gradients to acts and W_dec."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, idx: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(acts, idx, W_dec)
        return spmm(acts, idx, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        acts, idx, W_dec = ctx.saved_tensors
        grad = grads[0].contiguous()  # autograd hands over expanded tensors after a sum
        grad_acts = sddmm(grad, idx, W_dec).to(acts.dtype) if ctx.needs_input_grad[0] else None
        grad_W = gradient_rows(acts, idx, grad, W_dec).to(W_dec.dtype) if ctx.needs_input_grad[2] else None
        return grad_acts, None, grad_W


def chosen(x: Tensor, W_enc: Tensor, b_enc: Tensor, code: Code, *, clip: bool) -> Tensor:
    """The activations (B, K) of a code of these tensors.

    Args:
        clip: gradients stop where an activation is not above 0, as behind a ReLU.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, W_enc, b_enc))):
        return code.acts
    found: Tensor = Chosen.apply(x, W_enc, b_enc, code.acts, code.idx, clip)
    return found


def decoded(code: Code, W_dec: Tensor) -> Tensor:
    """(B, D) in W_dec's dtype."""
    found: Tensor = Decoded.apply(code.acts, code.idx, W_dec)
    return found


@torch.no_grad()
def gradient_rows(coef: Tensor, idx: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """`saefast.ops.spmm_t`: Σ over a latent's entries of coef · the row of x. coef, idx (B, K), x (B, D) -> (L, D).

    Args:
        W: (L, D) what it is the gradient of.
    """
    n_latents, D = W.shape
    if x.device.type != "cpu":
        return spmm_t(coef, idx, x, n_latents)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(dtype)
    out = room_for(W, dtype)
    kept = coef.flatten().nonzero().squeeze(1)
    by_latent, order = idx.flatten()[kept].sort(stable=True)
    entries = kept[order]
    token, weight = entries // max(idx.shape[1], 1), coef.flatten()[entries].to(dtype)
    bounds = torch.searchsorted(by_latent, torch.arange(n_latents + 1, dtype=idx.dtype, device=idx.device))
    step = max(1, PART // max(1, D * dtype.itemsize))
    ends = bounds[[min(end, n_latents) for end in range(0, n_latents + step, step)]].tolist()
    for part, begin in enumerate(range(0, n_latents, step)):
        first, last = ends[part], ends[part + 1]
        rows = out[begin : begin + step]
        if first == last:
            rows.zero_()
            continue
        starts = bounds[begin : begin + len(rows)] - first
        rows.copy_(embedding_bag(token[first:last], x, starts, mode="sum", per_sample_weights=weight[first:last]))
    return out


_kept: Any = WeakTensorKeyDictionary()
_lock = threading.Lock()


def room_for(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory of the CPU in the shape of W, not set to anything: what had it in a step before, if nobody holds that.

    It is kept for as long as the parameter lives that W is, or is a view of.
    """
    size = W.numel() * dtype.itemsize + LINE
    with _lock:
        arrays = _kept.setdefault(W if W._base is None else W._base, [])
        for array in arrays:
            # The list, `array` and the call hold it. A tensor on its memory would, for as long as there is one.
            if array.nbytes == size and sys.getrefcount(array) == 3:
                return _on(array, tuple(W.shape), dtype)
        array = np.empty(size, dtype=np.uint8)
        arrays[:] = [*arrays[len(arrays) + 1 - KEPT :], array]
        return _on(array, tuple(W.shape), dtype)


def release(module: nn.Module) -> None:
    """Gives back what is kept for a module's parameters."""
    with _lock:
        for parameter in module.parameters():
            _kept.pop(parameter, None)


def _on(array: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the memory of an array of bytes, which has LINE more than it needs."""
    memory = torch.from_numpy(array)
    start = -memory.data_ptr() % LINE
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
