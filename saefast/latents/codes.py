"""The sparse code of each sequence, whole, into latents.db: by it a context is shaded, and any text of it is read."""

import sqlite3
from collections.abc import Iterator

import numpy as np
import torch

from saefast.latents.spool import Spool
from saefast.latents.steps import Advance, nothing

# Entries sorted at a time.
_AT_A_TIME = 1 << 21


def write_codes(db: sqlite3.Connection, spool: Spool, advance: Advance = nothing) -> None:
    """Fills the table `codes` from a spool whose sequences are known.

    Args:
        advance: is told how many rows more are done.
    """
    # Rows of a sequence, which may lie apart, side by side and in the order of their positions.
    rows = np.lexsort((spool.position, spool.sequence))
    ends = np.searchsorted(spool.sequence[rows], np.arange(len(spool.source_sequences)), side="right")
    for first, last in _groups(spool, rows, ends):
        begin = int(ends[first - 1]) if first else 0
        part = rows[begin : int(ends[last - 1])]
        lines = _lines(spool, part, first, last)
        db.executemany("INSERT INTO codes VALUES (?, ?, ?, ?)", lines)
        advance(len(part))


def _groups(spool: Spool, rows: np.ndarray, ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """Sequences (first, last), exclusive, that make up all: of at most so many entries together, or one alone."""
    entries = np.diff(spool.row_ptr)[rows].cumsum()[ends - 1]
    first, before = 0, 0
    while first < len(ends):
        last = max(int(np.searchsorted(entries, before + _AT_A_TIME, side="right")), first + 1)
        yield first, last
        first, before = last, int(entries[last - 1])


def _lines(spool: Spool, rows: np.ndarray, first: int, last: int) -> Iterator[tuple[int, bytes, bytes, bytes]]:
    """Rows of the table, of sequences first to last, whose rows these are."""
    starts, counts = spool.row_ptr[rows], np.diff(spool.row_ptr)[rows]
    entry = np.repeat(starts - np.r_[0, counts.cumsum()[:-1]], counts) + np.arange(counts.sum())
    latents = spool.idx[entry]
    sequence = np.repeat(spool.sequence[rows].astype(np.int64) - first, counts)
    order = torch.from_numpy(sequence * spool.n_latents + latents).sort(stable=True).indices.numpy()
    latents, acts = latents[order].astype("<i4"), spool.acts[entry[order]].astype("<f4")
    positions = np.repeat(spool.position[rows], counts)[order].astype("<u2")
    ends = np.bincount(sequence, minlength=last - first).cumsum()
    for number, (start, stop) in enumerate(zip(np.r_[0, ends[:-1]].tolist(), ends.tolist(), strict=True), start=first):
        yield number, *(column[start:stop].tobytes() for column in (latents, positions, acts))
