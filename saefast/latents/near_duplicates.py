"""Which contexts say the same but for a word or a number: licences, docstrings from a template, tables.

MinHash (Broder 1997) over pairs of consecutive words: the share of equal minima of random orders estimates the share
of pairs that two contexts have in common (their Jaccard index). Contexts are compared where three of their minima,
of one of BANDS sets, are the same.
"""

import re
import zlib

import numpy as np

# Contexts that have this share of their pairs of words in common are near-duplicates: one word of eight may differ.
ALIKE = 0.5
BANDS, ROWS = 20, 3
# Pairs of contexts compared at a time: 12 MB.
_AT_A_TIME = 1 << 16
_FIRST, _LAST = 0x5851F42D, 0x14057B7E
# A word; a character of scripts that write no spaces; any other sign.
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W\d_]+|\d+|[^\w\s]|_")
_Array = np.ndarray


class Words:
    """Texts as numbers, one a word, equal for words in other letters' case and for all numbers."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def of(self, text: str) -> list[int]:
        return [self._code(word) for word in _WORD.findall(text.casefold())]

    def _code(self, word: str) -> int:
        if word not in self._codes:
            self._codes[word] = zlib.crc32(b"0" if word[0].isdigit() else word.encode("utf-8", "replace"))
        return self._codes[word]


def leaders(words: _Array, first: _Array) -> _Array:
    """For each context the first one that it is a near-duplicate of, itself where there is none.

    A leader is nobody's near-duplicate, so that no chain of small differences makes one of contexts that differ much.

    Args:
        words: (total,) uint64 numbers of words. first: (n + 1,) int64, where each context begins in them.

    Returns:
        (n,) int64.
    """
    n = len(first) - 1
    minima = _minima(words, first)
    pairs = _candidates(minima)
    leader = list(range(n))
    for one, other in pairs[_are_alike(minima, pairs)].tolist():
        # Ordered by the second and then the first, so that what the first of a pair is has been decided.
        if leader[other] == other and leader[one] == one:
            leader[other] = one
    return np.array(leader, np.int64)


def _minima(words: _Array, first: _Array) -> _Array:
    """(n, BANDS · ROWS) uint32: of each context the minima of its pairs of words in random orders."""
    left = np.insert(words, first[:-1], np.uint64(_FIRST))
    right = np.insert(words, first[1:], np.uint64(_LAST))
    pairs = mixed(left * np.uint64(0x9E3779B97F4A7C15) + mixed(right))
    # Each context has a pair more than words.
    starts = first[:-1] + np.arange(len(first) - 1)
    minima = np.empty((len(starts), BANDS * ROWS), np.uint32)
    for column in range(minima.shape[1]):
        order = (mixed(pairs + mixed(np.uint64(column + 1))) >> np.uint64(32)).astype(np.uint32)
        minima[:, column] = np.minimum.reduceat(order, starts) if len(starts) else 0
    return minima


def mixed(numbers: _Array | np.uint64) -> _Array:
    """uint64 numbers made random: the finish of splitmix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(numbers ^ (numbers >> np.uint64(31)))


def _candidates(minima: _Array) -> _Array:
    """(pairs, 2) contexts that agree in all of a band, each with the first that does and with the one before it.

    The smaller comes first; pairs are ordered by the second and then the first, each once.
    """
    n = np.int64(len(minima))
    found = []
    for band in range(BANDS):
        columns = minima[:, band * ROWS : (band + 1) * ROWS].astype(np.uint64)
        key = mixed(mixed(columns[:, 0] << np.uint64(32) | columns[:, 1]) ^ columns[:, 2])
        order = np.argsort(key, kind="stable")
        begins = np.flatnonzero(np.r_[True, key[order][1:] != key[order][:-1]]) if n else order
        heads = np.repeat(order[begins], np.diff(np.r_[begins, n]))
        for others in (heads, np.r_[heads[:1], order[:-1]]):
            same = (key[others] == key[order]) & (others < order)
            found.append(order[same] * n + others[same])
    both = np.unique(np.concatenate(found))
    return np.stack([both % max(n, 1), both // max(n, 1)], 1)


def _are_alike(minima: _Array, pairs: _Array) -> _Array:
    """(pairs,) bool: whether ALIKE of the minima agree."""
    parts = [pairs[start : start + _AT_A_TIME] for start in range(0, len(pairs), _AT_A_TIME)]
    alike = [(minima[part[:, 0]] == minima[part[:, 1]]).mean(1) >= ALIKE for part in parts]
    return np.concatenate(alike) if alike else np.zeros(0, bool)
