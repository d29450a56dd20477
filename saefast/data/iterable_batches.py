"""What an iterable gives at a time: tensors by name, whose rows are of the same tokens."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from saefast.data.masks import MASK, n_masked, without_masked
from saefast.data.segments import from_array
from saefast.data.source import TARGET, Batch, X
from saefast.errors import InputError

# Rows at the beginning of a pass by which another pass is told from it.
_START = 64


def named(item: Any) -> Mapping[Any, Any]:
    """What an iterable gave, by name: a tensor alone is x, as it is in a tuple or list of it alone."""
    item = _alone(item)
    return item if isinstance(item, Mapping) else {X: item}


def tensors_of(name: str, item: Any) -> Batch:
    """The tensors of a batch, each (n, width), without the rows that its mask leaves out, if it has one.

    Raises InputError where it cannot be a batch.
    """
    if isinstance(item, tuple | list) and len(item) > 1:
        raise InputError(
            f"{name} is a {type(item).__name__} of {len(item)}: expected a tensor (rows, d_in), a tuple of one, or a "
            f"mapping {{{X!r}: ..., {TARGET!r}: ...}}"
        )
    item = _alone(item)
    if isinstance(item, Mapping) and not (item and all(isinstance(tensor, str) for tensor in item)):
        raise InputError(f"{name} is a mapping with the keys {list(item)!a}: expected names of tensors, such as {X!r}")
    given = {tensor: rows for tensor, rows in named(item).items() if tensor != MASK}
    if not given:
        raise InputError(f"{name} has a mask and nothing else: expected {X!r} beside it")
    of = {tensor: f"{name}: {tensor!r}" if isinstance(item, Mapping) else name for tensor in given}
    batch = {tensor: from_array(of[tensor], rows).rows for tensor, rows in given.items()}
    if len({len(rows) for rows in batch.values()}) > 1:
        sizes = ", ".join(f"{tensor!r} {len(rows)}" for tensor, rows in batch.items())
        raise InputError(
            f"{name} has tensors of different numbers of rows ({sizes}): row i of each must be of one token"
        )
    mask = named(item).get(MASK)
    return batch if mask is None else without_masked(name, batch, mask)


def masked_in(item: Any) -> int:
    """How many rows the mask of a batch, as `tensors_of` took it, leaves out."""
    return n_masked(_alone(item))


def _alone(item: Any) -> Any:
    return item[0] if isinstance(item, tuple | list) and len(item) == 1 else item


def n_bytes(rows: Batch) -> int:
    return sum(tensor.nbytes for tensor in rows.values())


def start_of(rows: Batch) -> str:
    """A digest of a batch's first rows."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in rows.values():
        found.update(
            tensor[:_START].to("cpu", torch.float32).resolve_neg().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def is_empty(item: Any) -> bool:
    """Whether what an iterable gave has no rows: nothing to look at."""
    given = [rows for tensor, rows in named(item).items() if tensor != MASK]
    return bool(given) and all(getattr(rows, "ndim", 0) >= 2 and 0 in rows.shape for rows in given)
