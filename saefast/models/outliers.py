"""What the first rows of some data say of all of it: where they lie, how far apart, and which are far outside."""

import math
from typing import Literal

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.metrics.ordinary import Ordinary
from saefast.models.init import geometric_median, wide

Multiple = float | Literal["auto"] | None

# Rows that are looked at: enough for a median to half a percent and a rare kind of row to show.
FIRST_ROWS = 8192
# "auto": rows this many times the median distance from the centre are outliers, unless more of the rows are than MOST.
# Rows of two MiniLM layers, a 135M language model, a one-layer one and a synthetic world lie at most 2.1 times as far,
# but for sinks. One row in 128 at 10 times costs the others 11 % in FVU, at 5 times 5 % (MiniLM, as bench/ugly.py).
FAR, MOST = 5.0, 0.02
# A median below this share of the mean distance says that most rows are copies of one.
_NOTHING = 1e-5


def check_multiple(multiple: Multiple) -> None:
    """Raises InputError for a number that would leave out half of the rows or more, or none ever."""
    if isinstance(multiple, float | int) and not 1 < multiple < math.inf:
        raise InputError(f"max_norm_multiple is {multiple!r}: expected a finite number above 1, 'auto', or None")


def ordinary_rows(rows: Tensor, multiple: Multiple = "auto") -> Ordinary:
    """Measures the first rows (n, D) of some data.

    The centre is their geometric median and the usual distance the median one, so up to nearly half of the rows may lie
    anywhere without moving either far. Where more than half are copies of one row, it is the mean distance.

    Args:
        multiple: up to how many times the usual distance a row is ordinary; None is any. "auto" is FAR, or any where
            more than a share MOST of these rows would lie beyond, or more than half are copies of one.
    """
    centre, distances = _distances(rows[:FIRST_ROWS])
    usual = _usual(distances)
    if multiple is None or not 0 < usual < math.inf:
        return Ordinary(centre, usual)
    if multiple != "auto":
        return Ordinary(centre, usual, float(multiple))
    share = float((distances > FAR * usual).double().mean())
    # Where more than half are copies of one row, the distances of the others are not usual ones.
    copies = float(distances.median()) < usual
    return Ordinary(centre, usual, FAR if share <= MOST and not copies else math.inf)


def variance_of_few(rows: Tensor) -> tuple[float, float]:
    """How few of rows (n, D) hold most of their summed squared distance from the centre.

    Returns:
        A share of the rows, the farthest, and the share of the sum that they hold: those beyond FAR times the median
        distance where these are more than one percent, else one percent of the rows (none of fewer than 100 rows).
    """
    distances = _distances(rows[:FIRST_ROWS])[1].sort(descending=True).values
    beyond = int((distances > FAR * _usual(distances)).sum())
    n = max(beyond, len(distances) // 100)
    squares = (distances / distances[0].clamp_min(torch.finfo(torch.float64).tiny)).square()
    total = float(squares.sum())
    return n / len(distances), float(squares[:n].sum()) / total if total > 0 else 0.0


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
