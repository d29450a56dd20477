"""JumpReLU at the entries of a code, with the gradient estimators that SAELens and dictionary_learning train it by.

Threshold and pre-activation have one number an entry; near a threshold both functions are taken for a ramp as wide as
the bandwidth (Rajamanoharan et al. 2024, arXiv 2407.14435).
"""

from typing import Any

import torch
from torch import Tensor


class Step(torch.autograd.Function):
    """1 above the threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        slope = _near(pre, threshold, ctx.bandwidth) / ctx.bandwidth * grads[0]
        return slope if ctx.to_input else None, -slope, None, None


class Jump(torch.autograd.Function):
    """The pre-activation where it is above the threshold, else 0."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        slope = threshold / ctx.bandwidth * _near(pre, threshold, ctx.bandwidth) * grads[0]
        grad = (pre > threshold) * grads[0]
        return grad + slope if ctx.to_input else grad, -slope, None, None


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1 within half a bandwidth of the threshold, else 0."""
    return (((pre - threshold) / bandwidth).abs() < 0.5).to(pre.dtype)


def step(pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool = False) -> Tensor:
    """pre, threshold (B, K) -> (B, K). to_input: whether the estimated gradient also reaches pre."""
    found: Tensor = Step.apply(pre, threshold, bandwidth, to_input)
    return found


def jump(pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool = False) -> Tensor:
    found: Tensor = Jump.apply(pre, threshold, bandwidth, to_input)
    return found
