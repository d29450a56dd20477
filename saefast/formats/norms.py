"""Norms of the decoder in a file, of which a weight on disk has to be made."""

import torch
from torch import Tensor

from saefast.formats.format import rows_of, wide
from saefast.formats.source import Source


def column_norms(source: Source, file: str, key: str, n: int) -> Tensor:
    """(n,) norms of the columns of a matrix (d, n), 1 for a column of zeros; read some rows at a time.

    Where it is not such a matrix they are 1: that it is not is for whoever loads it to say.
    """
    return _norms(source, file, key, n, by_row=False)


def row_norms(source: Source, file: str, key: str, n: int) -> Tensor:
    """(n,) norms of the rows of a matrix (n, d), as `column_norms`."""
    return _norms(source, file, key, n, by_row=True)


def _norms(source: Source, file: str, key: str, n: int, *, by_row: bool) -> Tensor:
    entry = source.entries(file).get(key)
    if entry is None or len(entry.shape) != 2 or entry.shape[0 if by_row else 1] != n:
        return torch.ones(n, dtype=torch.float32, device="cpu")
    W = source.values(file, key)
    squares = torch.zeros(n, dtype=torch.float64, device="cpu")
    for rows in rows_of(W):
        piece = wide(W[rows]).square()
        if by_row:
            squares[rows] = piece.sum(1).double()
        else:
            squares += piece.sum(0)
    norms = squares.sqrt().to(wide(W[:0]).dtype)
    return torch.where(norms > 0, norms, 1)
