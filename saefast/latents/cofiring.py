"""Latents that fire on the same rows, more often than chance has it: counted exactly, never all pairs at once.

Latents i and j that fire on n_i and n_j of N rows without regard to each other meet on about n_i n_j / N of them. What
they meet more often is the lift, n · N / (n_i n_j). The highest lifts of all pairs are chance: where two latents fire
on ten rows each of a million, to meet on one is a lift of 10,000, and with 131,072 others to meet some do. So pairs are
ranked by the lift that is certain: with the least number of meetings in place of n that n is still a plausible outcome
of (the lower limit of a Poisson mean by Byar's approximation; Breslow and Day 1987):

    n (1 - 1 / (9 n) - z / (3 √n))³

z is such that of L latents without anything in common with i, one passes for more than chance in less than one list of
twenty. Pairs whose certain lift is 1 or less are left out. To meet once is never enough, and of ten pairs with equal
lift those that were seen together most often come first.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch

from saefast import extension
from saefast.errors import InputError
from saefast.latents.spool import Entries, Spool

# Of how many lists one may hold a pair that only chance brought together.
_LISTS = 20
# Rows that a latent is followed on. One that fires on more is followed on so many of them, drawn by a fixed rule: the
# share of them that it has in common with another is then known to a standard error of 0.2 % at most.
MOST_ROWS = 1 << 16


class Cofiring(NamedTuple):
    """Of each latent of a range, the others it meets most: ids (m, n) int32, -1 where there are fewer; lift (m, n)
    float32, rows in common over those that chance would give; rows (m, n) int64 in common, an estimate for latents that
    fire on more than MOST_ROWS rows. The highest certain lift first, ties to the lower id."""

    ids: np.ndarray
    lift: np.ndarray
    rows: np.ndarray


def cofiring(spool: Spool, entries: Entries, first: int, n: int = 10) -> Cofiring:
    """The n latents that each of a range fires together with most, in lift over chance that is certain (see above).

    Counts are exact, but for latents that fire on more than MOST_ROWS rows: those are followed on that many, drawn by
    row number alone, evenly and the same at every call, and their lift is as large as it would be over all rows on
    average. Memory: 4 bytes for each latent of the dictionary and thread.

    Args:
        entries: `spool.by_latent(first, first + m)`.
        first: the first latent of the range.

    Raises:
        InputError: n < 1.
    """
    if n < 1:
        raise InputError(f"n is {n}: expected how many latents are listed of each, 1 or more")
    m = len(entries.ptr) - 1
    fired = np.diff(entries.ptr)
    ptr, row = _followed(entries.ptr, entries.row)
    followed = np.diff(ptr)
    # worth[c] / n_j is the certain lift but for n_i / N, which all pairs of i share: a lift of 1 is that number.
    worth = certain(int(followed.max(initial=0)), spool.n_latents)
    least = followed / max(spool.n_rows, 1)
    ids, counts = _counted(spool, ptr, row, first, worth, least, n)
    others = np.where(ids >= 0, spool.n_fired[ids], 1)
    chance = followed[:, None] * others / max(spool.n_rows, 1)
    lift = np.divide(counts, chance, out=np.zeros((m, n)), where=counts > 0)
    share = np.divide(fired, followed, out=np.ones(m), where=followed > 0)
    return Cofiring(ids, lift.astype(np.float32), np.rint(counts * share[:, None]).astype(np.int64))


def certain(most: int, n_latents: int) -> np.ndarray:
    """(most + 1,) float64: of 0 to `most` meetings, how many are no chance, where so many latents could have met."""
    z = NormalDist().inv_cdf(1 - 1 / (_LISTS * max(n_latents, 1)))
    n = np.arange(1, most + 1, dtype=np.float64)
    root = np.maximum(1 - 1 / (9 * n) - z / (3 * np.sqrt(n)), 0)
    return np.concatenate([[0.0], n * root * root * root])


def _followed(ptr: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of each latent that it is followed on, in the same form."""
    fired = np.diff(ptr)
    if not (fired > MOST_ROWS).any():
        return ptr, row
    kept = np.ones(len(row), bool)
    for latent in np.flatnonzero(fired > MOST_ROWS).tolist():
        here = slice(ptr[latent], ptr[latent + 1])
        # A row's number, thoroughly mixed, is as good as drawn: evenly spaced rows would meet a text's own rhythm.
        kept[here] = _mixed(row[here]) < np.uint64(MOST_ROWS / fired[latent] * 2**64)
    kept_before = np.concatenate([[0], np.cumsum(kept)])
    return kept_before[ptr].astype(np.int64), row[kept]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """(n,) uint64, each number's bits mixed (splitmix64; Steele, Lea and Flood 2014)."""
    x = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _counted(
    spool: Spool, ptr: np.ndarray, row: np.ndarray, first: int, worth: np.ndarray, least: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """ids (m, n) int32 and counts (m, n) int64 of the others with the largest worth[count] / n_fired, above least."""
    native = extension.load()
    if native is None:
        return counted(spool, ptr, row, first, worth, least, n)
    m = len(ptr) - 1
    ids, counts = np.empty((m, n), np.int32), np.empty((m, n), np.int64)
    arrays = (ptr, row, spool.n_fired, worth, least, ids, counts)
    native.cofiring(
        *(torch.from_numpy(spool.row_ptr), torch.from_numpy(spool.idx), spool.n_latents, first),
        *(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays),
        torch.get_num_threads(),
    )
    return ids, counts


def counted(
    spool: Spool, ptr: np.ndarray, row: np.ndarray, first: int, worth: np.ndarray, least: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """`_counted` in plain NumPy, latent by latent: what the C++ is held to, and does where it is not built."""
    m = len(ptr) - 1
    ids, counts = np.full((m, n), -1, np.int32), np.zeros((m, n), np.int64)
    for i in range(m):
        rows = row[ptr[i] : ptr[i + 1]]
        begin, length = spool.row_ptr[rows], spool.row_ptr[rows + 1] - spool.row_ptr[rows]
        places = np.repeat(begin - np.cumsum(length) + length, length) + np.arange(length.sum())
        others, met = np.unique(spool.idx[places], return_counts=True)
        rank = worth[met] / spool.n_fired[others]
        kept = (others != first + i) & (rank > least[i])
        others, met, rank = others[kept], met[kept], rank[kept]
        best = np.argsort(-rank, kind="stable")[:n]
        ids[i, : len(best)], counts[i, : len(best)] = others[best], met[best]
    return ids, counts
