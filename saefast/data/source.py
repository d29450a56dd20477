"""Source, where training draws its batches from: one interface over shard folders, files, arrays and iterables."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError

Device = str | torch.device


def first_bad_row(batch: Tensor) -> int | None:
    """The first row of a batch (B, d_in) that holds NaN or inf, or None. One pass over clean data."""
    # A NaN or inf anywhere makes the sum NaN or inf; so does overflow, which the exact look then clears.
    if not batch.numel() or bool(torch.isfinite(batch.sum())):
        return None
    rows = (~torch.isfinite(batch)).any(1).nonzero()
    return int(rows[0]) if len(rows) else None


def where_it_ends(row: Tensor) -> str:
    """A remark on a row with inf and no NaN: it may have been finite in a dtype of more range."""
    if bool(row.isnan().any()):
        return ""
    return f" (numbers beyond {torch.finfo(row.dtype).max:.1e} are inf in {str(row.dtype).removeprefix('torch.')})"


class Source(ABC):
    """Rows to train on, and a held-out share that is never trained on.

    d_in: width of a row. n_rows: rows to train on per epoch, None where nobody knows. source_name: for messages.
    """

    d_in: int
    n_rows: int | None
    source_name: str

    @abstractmethod
    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]:
        """Batches (batch_size, d_in), epoch after epoch without end, each epoch in a new order.

        Every batch is full: one that an epoch's end would cut short goes on with the first rows of the next epoch.
        Starts at the beginning, or where load_state_dict put it just before.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the batch drawn last: plain numbers. Call it between two batches."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next call of batches() goes on from there, bit for bit, whatever its batch size. Raises InputError
        where this source is not the one the state came from."""

    @abstractmethod
    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """The held-out share once, in order, in batches of at most `batch_size` rows."""

    @abstractmethod
    def describe_row(self, i: int) -> str:
        """Where row i of the batch drawn last came from: file and row."""

    def close(self) -> None:
        """Ends the threads and frees the memory of drawing; iterators handed out are dead. Held-out rows stay."""
        return

    def describe_heldout(self, i: int) -> str:
        """Where row i of heldout() comes from, counted over its batches."""
        return f"held-out row {i} of {self.source_name}"

    def tokens(self, seq: int) -> Tensor:
        """Token ids (length,) int32 of a sequence; only shard folders know them."""
        raise InputError(f"{self.source_name} holds no tokens: harvest a shard folder to see contexts")


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")


def check_state(name: str, state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises InputError where a saved position cannot be one of this source."""
    for key, value in expected.items():
        if state.get(key) != value:
            raise InputError(
                f"{name}: the position to resume from has {key} = {state.get(key)!r}, this source {value!r};"
                " resume with the data the run began with"
            )
