"""The largest products of rows with the rows of a matrix: exact, at the speed of bf16 where that is faster.

Neighbours, logit weights and matches are all of this kind.
"""

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops.encode_topk import encode_topk
from saefast.ops.mixed import pays_off
from saefast.ops.reference import stable_topk
from saefast.ops.sddmm import sddmm

# Rows taken at a time: a second or two of work on two cores, so that a bar moves and Ctrl-C is answered.
ROWS = 2048
# Candidates beside those asked for. The first 32 of many cost bf16 products no more than the first 10.
_SPARE = 24


class Products:
    """Largest products with the rows of W, to be asked for many times.

    bf16 products choose candidates, fp32 products decide among them, and rows where bf16 may have missed one are
    computed in fp32 altogether: what is found is exactly what fp32 products alone find, but for their own rounding.

    Args:
        W: (M, d) fp32. Where bf16 is faster, a copy of half its size is kept.
    """

    def __init__(self, W: Tensor) -> None:
        self.W = W.contiguous()
        self.low: Tensor | None = None
        if pays_off(W) and len(W):
            self.low = self.W.to(torch.bfloat16)
            # Bounds by Cauchy and Schwarz, see `_missed`.
            self._largest, self._furthest = 0.0, 0.0
            for rows, low in zip(self.W.split(ROWS), self.low.split(ROWS), strict=True):
                self._largest = max(self._largest, float(rows.norm(dim=1).max()))
                self._furthest = max(self._furthest, float((rows - low.float()).norm(dim=1).max()))

    def largest(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x (B, d) fp32 -> values (B, k) fp32, descending, and ids (B, k) int32 of rows of W; ties to the lower id.

        1 <= k <= M. Values may be negative.
        """
        n = min(k + _SPARE, len(self.W))
        if self.low is None or n == len(self.W):
            return encode_topk(x, self.W, None, k, relu=False)
        x_low = x.to(torch.bfloat16)
        chosen, ids = encode_topk(x_low, self.low, None, n, relu=False)
        products = sddmm(x, ids, self.W)
        best = stable_topk(products, k, ids)
        values, found = products.gather(1, best), ids.gather(1, best)
        again = self._missed(x, x_low, chosen[:, -1], values[:, -1]).nonzero()[:, 0]
        if len(again):
            values[again], found[again] = encode_topk(x[again], self.W, None, k, relu=False)
        return values, found

    def _missed(self, x: Tensor, x_low: Tensor, last: Tensor, worst: Tensor) -> Tensor:
        """(B,) bool: whether a row of W that is no candidate may belong among those found.

        Its bf16 product is at most `last`, that of the last candidate. With x' and w' for what is rounded,
        x·w = x'·w' + (x - x')·w + x'·(w - w'), so its true product is at most |x - x'| |w| + |x'| |w - w'| more. Sums
        of d terms in fp32 are off by up to d 2^-24 |x| |w|, here and in `worst`, the least product found.
        """
        norm, off = x.norm(dim=1), (x - x_low.float()).norm(dim=1)
        rounding = 3 * x.shape[1] * 2**-24
        margin = off * self._largest + (norm + off) * self._furthest + rounding * norm * self._largest
        return ~(worst > last + margin)


def unit_rows(rows: Tensor, name: str) -> Tensor:
    """(L, d) of any float dtype as new fp32 rows of length 1; rows of zeros stay zeros.

    Raises:
        InputError: no matrix of real numbers, or values that are not finite.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise InputError(f"{name} is {rows.dtype} of shape {tuple(rows.shape)}: expected a matrix of real numbers")
    units = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS].detach().double()
        # By the largest value first: squares of tiny numbers are zero.
        scale = part.abs().amax(1, keepdim=True) if rows.shape[1] else part.new_zeros(len(part), 1)
        if not bool(scale.isfinite().all()):
            bad = start + int((~scale.isfinite()).nonzero()[0, 0])
            raise InputError(f"{name} has a value in row {bad} that is not finite: such weights cannot be compared")
        part = part / torch.where(scale > 0, scale, 1)
        units[start : start + len(part)] = part / part.norm(dim=1, keepdim=True).clamp_min(1)
    return units
