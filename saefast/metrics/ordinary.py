"""Which rows are ordinary: those not many times farther from the centre than rows usually are.

Language models give some tokens (the first of a text, separators) activations hundreds of times larger than all others:
attention sinks. A few of them hold nearly all of the variance, so figures that add up squares are about them alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Distances whose squares float32 holds, even of rows a thousand times closer or farther.
_SMALL, _LARGE = 1e-15, 1e15


@dataclass(frozen=True)
class Ordinary:
    """Rows are ordinary up to `multiple` times the `usual` distance from the `centre`.

    Attributes:
        centre: (D,) where rows lie, in their units.
        usual: how far from it a row usually lies: the median distance.
        multiple: inf where all rows are ordinary.
    """

    centre: Tensor
    usual: float
    multiple: float = math.inf

    def times(self, rows: Tensor) -> Tensor:
        """(B,) how many times the usual distance each of rows (B, D) is from the centre, in the rows' dtype."""
        apart = rows - self.centre.to(rows)
        if _SMALL < self.usual < _LARGE:
            return apart.norm(dim=1) / self.usual
        return (apart / self.usual).norm(dim=1)

    def far(self, rows: Tensor) -> Tensor:
        """(B,) bool: which of rows (B, D) are not ordinary."""
        if self.multiple == math.inf:
            return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        return self.times(rows) > self.multiple

    def scaled(self, scale: float) -> "Ordinary":
        """The same of rows multiplied by a number."""
        return Ordinary(self.centre * scale, self.usual * scale, self.multiple)
