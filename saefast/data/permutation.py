"""Permutation, a shuffled order of n rows in hardly any memory: one seed, one order on every machine."""

import numpy as np

_U64 = np.uint64
_GOLDEN = 0x9E3779B97F4A7C15
# Up to here an order is a sort of random keys (8 bytes a row while an epoch lasts); beyond, a keyed permutation. A
# power of two.
SORTED_UP_TO = 1 << 20
_ROUNDS = 8


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 arrays: Steele, Lea, Flood, "Fast splittable pseudorandom generators", 2014."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _key(*numbers: int) -> int:
    """One 64-bit key out of several integers."""
    state = np.zeros(1, _U64)
    for number in numbers:
        state = mix(state * _U64(3) + np.array([number % (1 << 64)], _U64) + _U64(_GOLDEN))
    return int(state[0])


class Permutation:
    """A permutation of range(n) for every epoch, readable from any place.

    Small n: the ranks of splitmix64 keys. Large n: an eight-round Feistel network over the smallest even number of
    bits that hold n, re-applied until the value is below n (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002); no memory, and a resume at the end of an epoch costs nothing.
    """

    def __init__(self, n: int, seed: int) -> None:
        if n < 1:
            raise ValueError(f"n is {n}, expected at least 1")
        self.n, self.seed = n, seed
        self._epoch = -1
        self._sorted = np.zeros(0, np.int64)

    def rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Entries start to stop (exclusive) of the epoch's permutation, int64."""
        if self.n > SORTED_UP_TO:
            return self._feistel(np.arange(start, stop, dtype=_U64), epoch)
        if epoch != self._epoch:
            counter = np.arange(1, self.n + 1, dtype=_U64) * _U64(_GOLDEN)
            keys = mix(counter + _U64(_key(self.seed, epoch)))
            # Each row's number takes its key's low bits: sorting such keys is faster than an argsort, and ties are
            # settled.
            low = _U64(SORTED_UP_TO - 1)
            ranked = np.sort(keys & ~low | np.arange(self.n, dtype=_U64))
            self._sorted, self._epoch = (ranked & low).astype(np.int64), epoch
        return self._sorted[start:stop]

    def _feistel(self, x: np.ndarray, epoch: int) -> np.ndarray:
        half = ((self.n - 1).bit_length() + 1) // 2
        keys = [_U64(_key(self.seed, epoch, r)) for r in range(_ROUNDS)]
        x = _rounds(x, half, keys)
        outside = np.flatnonzero(x >= self.n)
        while len(outside):
            x[outside] = _rounds(x[outside], half, keys)
            outside = outside[x[outside] >= self.n]
        return x.astype(np.int64)


def _rounds(x: np.ndarray, half: int, keys: list[np.uint64]) -> np.ndarray:
    mask = _U64((1 << half) - 1)
    left, right = x >> _U64(half), x & mask
    for key in keys:
        left, right = right, left ^ (mix(right * _U64(_GOLDEN) + key) & mask)
    return (left << _U64(half)) | right
