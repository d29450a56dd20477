"""Steering: the coefficient of a sparsity penalty, moved from step to step so that the mean L0 comes to k.

Over a wide range L0 falls by the factor by which the coefficient rises, so the controller works on logarithms, and a
step multiplies: coefficient = exp(memory + AT_ONCE · error), memory += rate · error, with error = log(L0 / k). The
memory holds what the run needs for L0 to stay where it is; what is answered at once keeps it from swinging. Nothing
but the L0 of past batches goes in, so a resumed run goes on to the bit.
"""

import math
from typing import Any

import torch
from torch import Tensor

from saefast.models.architecture import At
from saefast.models.pointwise import Pointwise, warmed_up
from saefast.ops.code import Number

# What a step answers at once, as a power of L0 / k.
AT_ONCE = 0.5
# Steps in which the memory takes up an error: a share of the run, and at least so many.
MEMORY_SHARE, MEMORY_STEPS = 1 / 30, 20
# L0 is averaged over about so many steps, and an error counts as no larger than this: a run that starts with half of
# all latents on says little of what it will need.
SMOOTH, LARGEST = 4, 1.0

LOG_COEF, LOG_L0 = "log_sparsity_coef", "log_l0"


def state(coef: float) -> dict[str, Tensor]:
    """What a run keeps for it, by name: 0-d float64 on the CPU.

    Args:
        coef: what the coefficient begins at.
    """
    begun = {LOG_COEF: math.log(coef), LOG_L0: math.nan}
    return {name: torch.tensor(value, dtype=torch.float64, device="cpu") for name, value in begun.items()}


def coefficient(kept: dict[str, Tensor], k: int) -> Tensor:
    """Of the step to come, 0-d."""
    return torch.exp(kept[LOG_COEF] + AT_ONCE * _error(kept[LOG_L0], k))


def counted(kept: dict[str, Tensor], l0: Number, k: int, at: At) -> dict[str, Tensor]:
    """What is kept after a step.

    Args:
        l0: mean number of active latents in its batch.
    """
    before = kept[LOG_L0]
    # Where nothing is active at all, that is not endlessly less than k.
    now = torch.as_tensor(l0, dtype=torch.float64, device=before.device).clamp_min(1e-3).log()
    log_l0 = torch.where(before.isnan(), now, torch.lerp(before, now, 1 / SMOOTH))
    rate = 1 / max(MEMORY_SHARE * at.total_steps, MEMORY_STEPS)
    return kept | {LOG_L0: log_l0, LOG_COEF: kept[LOG_COEF] + rate * _error(log_l0, k)}


def _error(log_l0: Tensor, k: int) -> Tensor:
    """log(L0 / k), 0 before the first step."""
    return (log_l0 - math.log(k)).nan_to_num(0.0).clamp(-LARGEST, LARGEST)


class Steered(Pointwise):
    """An L1 penalty whose coefficient is steered where none is given.

    Attributes:
        first_share: what the penalty of k equal activations that make up a whole row comes to at first, as a share of
            the row's variance.
    """

    first_share: float

    def state(self, train: Any) -> dict[str, Tensor]:
        if train.sparsity_coef is not None:
            return {}
        # Of a row with a variance of 1 a column, and of k orthogonal unit rows that make it up, Σ acts is √(d · k).
        paid = math.sqrt(self.config.d_in * self.config.k)
        return state(self.first_share * (self.config.d_in if train.loss == "sum" else 1) / paid)

    def coefficient(self, at: At, kept: dict[str, Tensor], l0: Number, train: Any) -> Number:
        if train.sparsity_coef is not None:
            return super().coefficient(at, kept, l0, train)
        return coefficient(kept, self.config.k) * warmed_up(at, train)

    def counted(self, kept: dict[str, Tensor], l0: Number, at: At, train: Any) -> Any:
        return kept if train.sparsity_coef is not None else counted(kept, l0, self.config.k, at)
