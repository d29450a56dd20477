"""Whether more tokens would help: how fast the held-out FVU falls while the learning rate is constant.

A curve over one run falls for three reasons: the warm-up, the decay, and more tokens. Only the part at the peak rate
tells of the third, and only its last doubling of tokens, since the fall slows down.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

# A fall smaller than this, per doubling of tokens, is a plateau.
PLATEAU = 0.01
# Fewer values than this, or values over fewer doublings, give no trend.
LEAST_VALUES, LEAST_DOUBLINGS = 5, 0.6


class Point(NamedTuple):
    """A value of the held-out FVU, over ordinary rows, at the peak learning rate."""

    tokens: int
    fvu: float
    rows: int
    """Held-out rows it is of: values over different rows are not compared."""


class Trend(NamedTuple):
    """How fast the held-out FVU falls with the tokens."""

    fall: float
    """Share of itself that it loses per doubling of tokens."""
    error: float
    """Standard error of that."""

    @property
    def flat(self) -> bool:
        return self.fall < PLATEAU

    @property
    def surely_flat(self) -> bool:
        """What ends a run: noise alone makes a falling curve look flat now and then."""
        return self.fall + self.error < PLATEAU

    def __str__(self) -> str:
        rate = f"({self.fall:.1%} ±{self.error:.1%} per doubling of tokens)"
        return f"flat {rate}: more tokens would hardly help" if self.flat else f"still falling {rate}: train longer"


def trend(curve: Sequence[Point]) -> Trend | None:
    """Fits log FVU against log tokens over the last doubling; None where that is too short to tell."""
    if not curve:
        return None
    last = curve[-1]
    part = [p for p in curve if 2 * p.tokens >= last.tokens and p.rows == last.rows]
    if len(part) < LEAST_VALUES or math.log2(last.tokens / part[0].tokens) < LEAST_DOUBLINGS:
        return None
    x, y = [math.log2(p.tokens) for p in part], [math.log2(p.fvu) for p in part]
    mean_x, mean_y = (math.fsum(values) / len(part) for values in (x, y))
    spread = math.fsum((a - mean_x) ** 2 for a in x)
    slope = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    left = math.fsum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    fall = 1 - 2**slope
    return Trend(fall, (1 - fall) * math.log(2) * math.sqrt(left / (len(part) - 2) / spread))
