"""ShuffledIterable: the batches of an iterable, their rows mixed on the way into training."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from saefast.data.iterable_source import IterableSource
from saefast.data.live_buffer import LiveBuffer
from saefast.data.source import Batch, Device, X
from saefast.extension import available

# Rows that are mixed, and what they may take in memory; never fewer than a few batches.
SHUFFLE_ROWS, SHUFFLE_BYTES = 1 << 16, 1 << 30


class ShuffledIterable(LiveBuffer):
    """Rows of an IterableSource, drawn at random from a reservoir of `shuffle_rows` of them that a thread keeps full.

    Neighbouring rows of most iterables are of one text, and one topic comes after another: in their own order a run
    would forget what came first. Where saefast's C++ extension is missing they stay in that order, and a RuntimeWarning
    says so. A run that goes on draws everything again from the beginning, to the bit if the iterable gives the same.
    """

    def __init__(self, data: IterableSource, shuffle_rows: int = SHUFFLE_ROWS) -> None:
        row_bytes = 4 * sum(data.widths.values())
        super().__init__(data, reservoir_rows=max(min(shuffle_rows, SHUFFLE_BYTES // row_bytes), 1))
        self._iterable = data
        # As runs were begun before there was a reservoir, or where it cannot be had.
        self._in_order = False

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        if not available() and not self._in_order:
            self._in_order = True
            warnings.warn(
                f"rows of {self.source_name} are trained on in the order in which they come: to shuffle them, "
                "saefast's C++ extension is needed, which is not built",
                RuntimeWarning,
                stacklevel=2,
            )
        if self._in_order:
            return self._iterable.batches(batch_size, seed, device, dtype)
        return super().batches(batch_size, seed, device, dtype)

    @property
    def rows_masked(self) -> int:
        # How far the reading thread is ahead makes no difference.
        return self._iterable.rows_masked if self._in_order else self._iterable.masked_before(self.rows_drawn)

    def state_dict(self) -> dict[str, Any]:
        if self._in_order:
            return self._iterable.state_dict()
        return super().state_dict() | {"first": self._iterable.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("kind") == "iterable":
            self._in_order = True
            self._iterable.load_state_dict(state)
            return
        # A run of more tokens may have begun with a larger one.
        if isinstance(rows := state.get("reservoir_rows"), int) and rows > 0:
            self._reservoir_rows = rows
        super().load_state_dict(state)
        if state["batches"]:
            self._iterable.check_resumable(state)

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        if self._in_order:
            return self._iterable.heldout(batch_size, device, dtype)
        return super().heldout(batch_size, device, dtype)

    def describe_row(self, i: int, name: str = X) -> str:
        if self._in_order:
            return self._iterable.describe_row(i, name)
        assert self._open is not None
        return self._iterable.describe_number(self._open.row_number(i))

    def describe_heldout(self, i: int, name: str = X) -> str:
        return self._iterable.describe_heldout(i, name)
