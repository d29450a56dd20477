"""How far the next-token distributions of two passes of one model are apart, differentiable, at the size of a chunk."""

from typing import Any

import torch
from torch import Tensor

# Numbers of logits that are widened at a time: of a vocabulary of 100,000 tokens, so many positions are 80.
_CHUNK = 1 << 23


class _MeanKL(torch.autograd.Function):
    """Works out the gradient beside the value, chunk by chunk, so that no distribution over all positions is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, clean: Tensor, where: Tensor) -> Tensor:
        places, V = where.flatten().nonzero()[:, 0], logits.shape[-1]
        now, before = logits.reshape(-1, V), clean.reshape(-1, V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        total, grad = torch.zeros((), dtype=torch.float64, device=logits.device), torch.zeros_like(now)
        for part in places.split(max(_CHUNK // V, 1)):
            log_p, log_q = (rows[part].to(wide).log_softmax(-1) for rows in (before, now))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum(dtype=torch.float64)
            grad[part] = ((log_q.exp() - p) / len(places)).to(grad.dtype)
        ctx.save_for_backward(grad.view_as(logits))
        return (total / len(places)).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None


def mean_kl(logits: Tensor, clean: Tensor, where: Tensor) -> Tensor:
    """Mean over positions of KL(clean ‖ logits) in nats, 0-d, at least float32, with its gradient to logits.

    Args:
        logits: (B, T, V), any floating-point dtype; in bfloat16 the gradient is rounded to that.
        clean: (B, T, V), not differentiated.
        where: (B, T) bool, the positions that count: at least one.
    """
    found: Tensor = _MeanKL.apply(logits, clean, where)
    return found
