"""Harvests of several models over the same text, side by side: row i is one token's activations in all of them."""

from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from saefast.data.mapped_source import MappedSource, Rows, joined_rows
from saefast.data.segments import Segment, from_shard
from saefast.data.shards import ShardFolder
from saefast.data.source import Device, X
from saefast.errors import InputError

# Sequences whose tokens are compared, spread over all of them.
_COMPARED = 1000


class PickedRows(Rows):
    """Some rows of others, in an order of their own.

    numbers: (n,) int64, those of the rows.
    """

    def __init__(self, rows: Rows, numbers: np.ndarray) -> None:
        super().__init__(rows.segments)
        self._rows, self._numbers = rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def cuts(self) -> set[int]:
        return {0, len(self)}

    def gather(self, numbers: np.ndarray, device: Device, dtype: torch.dtype) -> Tensor:
        return self._rows.gather(self._numbers[numbers], device, dtype)

    def read(self, start: int, stop: int, device: Device, dtype: torch.dtype) -> Tensor:
        return self._rows.gather(self._numbers[start:stop], device, dtype)

    def piece(self, start: int, stop: int) -> Segment:
        seq, pos = (part[self._numbers[start:stop]] for part in _places(self._rows))
        return Segment(self.segments[0].name, self.read(start, stop, "cpu", torch.float32), None, seq, pos, start)

    def locate(self, number: int) -> tuple[Segment, int]:
        return self._rows.locate(int(self._numbers[number]))


def open_side_by_side(folders: list[ShardFolder], hooks: list[str | None]) -> MappedSource:
    """The rows that all folders have, those of folder i at its hook i: x is as wide as all of them together.

    Rows are brought together by sequence and position, because a harvest may have left out some tokens of its own.

    Raises:
        InputError: another number of hooks than folders, folders of different text or tokens, no rows in common.
    """
    if len(hooks) != len(folders):
        raise InputError(
            f"{len(hooks)} hooks and {len(folders)} folders are given: expected a hook for each folder, in their order"
        )
    for folder in folders:
        folder.require_text()
    for folder in folders[1:]:
        _check_same_text(folders[0], folder)
    names = tuple(folder.hook(hook) for folder, hook in zip(folders, hooks, strict=True))
    train, held = (_common(folders, names, split) for split in ("train", "heldout"))
    if not len(train):
        raise InputError(f"{' and '.join(str(folder.path) for folder in folders)} have no rows of the same tokens")
    shown = ", ".join(f"{folder.path} ({name})" for folder, name in zip(folders, names, strict=True))
    return MappedSource(shown, {X: train}, {X: held}, folders[0], {X: names}, others=tuple(folders[1:]))


def _common(folders: list[ShardFolder], hooks: tuple[str, ...], split: str) -> Rows:
    """The rows of one split, side by side."""
    parts = [
        Rows([from_shard(folder.open(info, hook)) for info in folder.shards(split, hook)])
        for folder, hook in zip(folders, hooks, strict=True)
    ]
    keys = [_keys(rows) for rows in parts]
    if any(not np.array_equal(a, b) for a, b in pairwise(keys)):
        shared = reduce(np.intersect1d, keys)
        parts = [PickedRows(rows, _numbers(found, shared)) for rows, found in zip(parts, keys, strict=True)]
    return joined_rows(parts)


def _numbers(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(n,) int64: where each of the wanted keys is."""
    order = np.argsort(keys, kind="stable")
    found: np.ndarray = order[np.searchsorted(keys, wanted, sorter=order)]
    return found


def _keys(rows: Rows) -> np.ndarray:
    """(n,) int64, different for every token."""
    seq, pos = _places(rows)
    keys: np.ndarray = ((seq.long() << 16) + pos.long()).numpy()
    return keys


def _places(rows: Rows) -> tuple[Tensor, Tensor]:
    """(n,) int each: sequence and position of the rows."""
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    found = [(part.seq, part.pos) for part in rows.segments if part.seq is not None and part.pos is not None]
    seqs, positions = ([pair[i] for pair in found] for i in range(2))
    return torch.cat([none, *seqs]), torch.cat([none, *positions])


def _check_same_text(a: ShardFolder, b: ShardFolder) -> None:
    """Raises InputError where sequences of the same number are of different tokens."""
    n = min(a.n_sequences, b.n_sequences)
    for seq in np.unique(np.linspace(0, n - 1, min(n, _COMPARED)).astype(np.int64)) if n else []:
        if not torch.equal(a.tokens(int(seq)), b.tokens(int(seq))):
            raise InputError(
                f"{a.path} and {b.path}: sequence {seq} is of different tokens; harvest both models with the same "
                "text, tokenizer and ctx_len"
            )
