"""What is counted of every latent, exactly, from its entries: activations, their histogram, the tokens it fires on.

All of it is of a range of latents at a time, as the spool gives them.
"""

from typing import NamedTuple

import numpy as np
import torch

from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.latents.schema import BINS
from saefast.latents.spool import Entries, Spool

# Rows whose tokens are looked up at a time.
_ROWS = 1 << 20


class Moments(NamedTuple):
    """Of n latents: total and largest (n,) float64 activation, 0 where one never fired."""

    total: np.ndarray
    largest: np.ndarray


class Pairs(NamedTuple):
    """What latents do on single tokens, (pairs,) each, sorted by latent and then token: latent int64, counted from the
    first of the range; token int64; n int64 rows; act float64, the activation on them all together."""

    latent: np.ndarray
    token: np.ndarray
    n: np.ndarray
    act: np.ndarray


def moments(entries: Entries) -> Moments:
    """Sums in float64, in the order of rows."""
    n = len(entries.ptr) - 1
    total = np.bincount(entries.latent(), entries.acts, minlength=n)
    largest, fired = np.zeros(n), np.flatnonzero(np.diff(entries.ptr))
    if len(fired):
        largest[fired] = np.maximum.reduceat(entries.acts, entries.ptr[:-1][fired])
    return Moments(total, largest)


def histograms(entries: Entries, largest: np.ndarray) -> np.ndarray:
    """(n, BINS) int32 entries by activation, bins of equal width from 0 to the latent's largest (n,), which is in the
    last. One that lies on the border of two is in the higher."""
    latent = entries.latent()
    bins = (entries.acts.astype(np.float64) * BINS / largest[latent]).astype(np.int64)
    place = latent * BINS + np.minimum(bins, BINS - 1)
    return np.bincount(place, minlength=len(largest) * BINS).reshape(len(largest), BINS).astype(np.int32)


def tokens_of_rows(folder: ShardFolder, spool: Spool) -> np.ndarray:
    """(n_rows,) int32: the token of every row.

    Raises:
        InputError: rows of sequences or at positions that are not in the folder.
    """
    found = np.empty(spool.n_rows, np.int32)
    for first in range(0, spool.n_rows, _ROWS):
        part = slice(first, first + _ROWS)
        seq = torch.from_numpy(spool.source_sequences[spool.sequence[part]])
        found[part] = folder.token_ids(seq, torch.from_numpy(spool.position[part].astype(np.int64))).numpy()
    if len(found) and found.min() < 0:
        row = int(found.argmin())
        raise InputError(
            f"{folder.path}: row {row} is of sequence {spool.source_sequences[spool.sequence[row]]}, whose tokens are "
            "not there: the shard is damaged"
        )
    return found


def pairs(entries: Entries, tokens: np.ndarray) -> Pairs:
    """Sums over the rows of each latent that have the same token. tokens: (n_rows,) of every row."""
    vocabulary = int(tokens.max(initial=0)) + 1
    keys = torch.from_numpy(entries.latent() * vocabulary + tokens[entries.row])
    key, order = (tensor.numpy() for tensor in keys.sort(stable=True))
    if not len(key):
        return Pairs(*(np.zeros(0, kind) for kind in (np.int64, np.int64, np.int64, np.float64)))
    first = np.flatnonzero(np.diff(key, prepend=-1))
    act = np.add.reduceat(entries.acts[order].astype(np.float64), first)
    return Pairs(key[first] // vocabulary, key[first] % vocabulary, np.diff(first, append=len(key)), act)
