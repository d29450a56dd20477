"""Masks: which rows of what a caller gives count. The others are left out before anything else sees them."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefast.data.source import Batch, n_rows_of
from saefast.errors import InputError

# Beside "x" in a mapping: True, or a number that is not 0, where a row counts.
MASK = "mask"


def mask_of(name: str, given: Any) -> Tensor:
    """A mask as a flat (n,) bool tensor, where it lies.

    Raises InputError for what is no tensor or array of booleans or of 0 and 1, as a tokenizer's attention_mask is.
    """
    mask = torch.from_numpy(np.ascontiguousarray(given)) if isinstance(given, np.ndarray) else given
    if not isinstance(mask, Tensor) or mask.layout != torch.strided or mask.is_complex():
        raise InputError(f"{name} is a {type(given).__name__}: expected a tensor or array of booleans, one a row")
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        odd = mask[(mask != 0) & (mask != 1)].flatten()[0]
        raise InputError(
            f"{name} holds {odd.item()!r}: expected True, or 1, where a row counts and False, or 0, elsewhere"
        )
    return mask.detach().flatten().bool()


def without_masked(name: str, batch: Batch, given: Any) -> Batch:
    """The rows of a batch that its mask keeps; those of a mask that keeps all are not copied.

    Raises InputError where the mask is none, or has another number of rows.
    """
    mask = mask_of(f"{name}: {MASK!r}", given)
    check_length(name, mask, n_rows_of(batch))
    if bool(mask.all()):
        return batch
    return {tensor: rows[mask.to(rows.device)] for tensor, rows in batch.items()}


def check_length(name: str, mask: Tensor, n_rows: int) -> None:
    """Raises InputError for a mask that has not one place a row."""
    if len(mask) != n_rows:
        raise InputError(
            f"{name}: {MASK!r} has {len(mask)} places for {n_rows} rows: expected the shape of x without its last "
            "dimension"
        )


def n_masked(item: Any) -> int:
    """How many rows the mask of a batch leaves out; 0 where it has none."""
    given = item.get(MASK) if isinstance(item, Mapping) else None
    return 0 if given is None else int((~mask_of(MASK, given)).sum())


def runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """The stretches (start, stop) of a mask (n,) bool that are True."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
