"""What the first rows of some data say of all of it: where they lie, how far apart, and which are far outside."""

import math
from typing import Literal

from torch import Tensor

from saefast.metrics.ordinary import Ordinary
from saefast.models.init import geometric_median, wide

Multiple = float | Literal["auto"] | None

# Rows that are looked at: enough for a median to half a percent and a rare kind of row to show.
FIRST_ROWS = 8192
# "auto": rows this many times the median distance from the centre are outliers, unless more of the rows are than MOST.
FAR, MOST = 10.0, 0.02
# A median below this share of the mean distance says that most rows are copies of one.
_NOTHING = 1e-5


def ordinary_rows(rows: Tensor, multiple: Multiple = "auto") -> Ordinary:
    """Measures the first rows (n, D) of some data.

    The centre is their geometric median and the usual distance the median one, so up to nearly half of the rows may lie
    anywhere without moving either far. Where more than half are copies of one row, it is the mean distance.

    Args:
        multiple: up to how many times the usual distance a row is ordinary; None is any. "auto" is FAR, or any where
            more than a share MOST of these rows would lie beyond: then they are a part of the data like another.
    """
    centre, distances = _distances(rows[:FIRST_ROWS])
    usual = _usual(distances)
    if multiple is None or not 0 < usual < math.inf:
        return Ordinary(centre, usual)
    if multiple != "auto":
        return Ordinary(centre, usual, float(multiple))
    share = float((distances > FAR * usual).double().mean())
    return Ordinary(centre, usual, FAR if share <= MOST else math.inf)


def share_of_largest(rows: Tensor) -> float:
    """The share of the summed squared distance from the centre that one percent of rows (n, D) hold, the farthest.

    0 for fewer than 100 rows.
    """
    squares = _distances(rows[:FIRST_ROWS])[1].square()
    largest, total = squares.topk(len(squares) // 100).values.sum(), squares.sum()
    return float(largest / total) if total > 0 else 0.0


def _distances(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The geometric median (D,) of rows (n, D), and how far from it each is, (n,) float64."""
    rows = wide(rows)
    # Squares of very large or small numbers are beyond what floats hold.
    largest = float(rows.abs().max()) or 1.0
    rows = rows / largest
    centre = geometric_median(rows)
    return centre * largest, (rows - centre).norm(dim=1).double() * largest


def _usual(distances: Tensor) -> float:
    median, mean = float(distances.median()), float(distances.mean())
    return median if median > _NOTHING * mean else mean
