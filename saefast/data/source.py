"""Source, where training draws its batches from: one interface over shard folders, files, arrays and iterables."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError

Device = str | torch.device
# Tensors (B, width) by name: row i of each is of one and the same token. "x" is what goes into an encoder, and "target"
# what a reconstruction is held to, where that is not x itself.
Batch = dict[str, Tensor]
X, TARGET = "x", "target"
# Hooks or keys: of each tensor by the tensor's name, several of which lie side by side in its columns; or a list where
# each is a tensor of that name.
Names = Mapping[str, str | Sequence[str]] | Sequence[str]


def first_bad_row(batch: Tensor) -> int | None:
    """The first row of a batch (B, d_in) that holds NaN or inf, or None. One pass over clean data."""
    # A NaN or inf anywhere makes the sum NaN or inf; so does overflow, which the exact look then clears.
    if not batch.numel() or bool(torch.isfinite(batch.sum())):
        return None
    rows = (~torch.isfinite(batch)).any(1).nonzero()
    return int(rows[0]) if len(rows) else None


def where_it_ends(row: Tensor, stored: torch.dtype | None = None) -> str:
    """A remark on a row with inf and no NaN: it may have been finite in a dtype of more range.

    Args:
        stored: the dtype that the row had before it was widened to this one.
    """
    dtype = min((row.dtype, stored or row.dtype), key=lambda kind: torch.finfo(kind).max)
    if bool(row.isnan().any()):
        return ""
    if dtype == torch.float16:
        return " (overflow in float16, which ends at 65504: store the activations in bfloat16)"
    return f" (numbers beyond {torch.finfo(dtype).max:.1e} are inf in {str(dtype).removeprefix('torch.')})"


class Source(ABC):
    """Rows to train on, and a held-out share that is never trained on. A row is one token's, in every named tensor.

    widths: of each tensor, by name. n_rows: rows to train on per epoch, None where it is not known. source_name: for
    messages.
    """

    widths: Mapping[str, int]
    n_rows: int | None
    source_name: str

    @property
    def d_in(self) -> int:
        """Width of x. Raises InputError where no tensor has that name."""
        if X not in self.widths:
            raise InputError(
                f"{self.source_name} has the tensors {', '.join(self.widths)} and none called {X!r}: give that name to "
                "the one that goes into the encoder"
            )
        return self.widths[X]

    @property
    def rows_masked(self) -> int:
        """How many rows masks have left out, of those that were read for the batches drawn so far; of data that is all
        there, of all of it."""
        return 0

    @abstractmethod
    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        """Batches of batch_size rows, epoch after epoch without end, each epoch in a new order.

        Every batch is full: one that an epoch's end would cut short goes on with the first rows of the next epoch.
        Starts at the beginning, or where load_state_dict put it just before.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The position after the batch drawn last: plain numbers. Call it between two batches."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next call of batches() goes on from there, bit for bit, with any batch size. Raises InputError
        where this source is not the one the state came from."""

    @abstractmethod
    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        """The held-out share once, in order, in batches of at most `batch_size` rows."""

    @abstractmethod
    def describe_row(self, i: int, name: str = X) -> str:
        """Where row i of the batch drawn last came from, in the tensor of that name: file and row."""

    def close(self) -> None:
        """Ends the threads and frees their memory; iterators handed out cannot be used any more. Held-out rows stay."""
        return

    def leave(self) -> None:
        """A run is done with drawing: what would be kept for it alone, beside sources fed by the same pass, is not."""
        return

    def describe_heldout(self, i: int, name: str = X) -> str:
        """Where row i of heldout() comes from, in the tensor of that name, counted over its batches."""
        return f"held-out row {i} of {self.source_name}"

    def part_widths(self, name: str = X) -> tuple[int, ...]:
        """Widths of what lies side by side in the columns of the tensor of that name: hooks, or arrays."""
        return (self.widths[name],)

    def stored_dtype(self, name: str = X) -> torch.dtype | None:
        """The floating-point dtype that the rows of the tensor of that name are stored in, where it is known."""
        return None

    def tokens(self, seq: int) -> Tensor:
        """Token ids (length,) int32 of a sequence; only shard folders know them."""
        raise InputError(f"{self.source_name} holds no tokens: harvest a shard folder to see contexts")


def check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")


def identity(widths: Mapping[str, int]) -> dict[str, Any]:
    """What a saved position says of the tensors, so that it is not taken for another source's."""
    return {"d_in": widths[X]} if set(widths) == {X} else {"widths": dict(widths)}


def by_tensor(names: Names) -> dict[str, str | list[str]]:
    """The hook or key of each tensor, or a list of those side by side in its columns: what JSON can hold."""
    given = names if isinstance(names, Mapping) else {name: name for name in names}
    for tensor, found in given.items():
        several = not isinstance(found, str) and isinstance(found, Sequence) and all(isinstance(n, str) for n in found)
        if not isinstance(tensor, str) or not (isinstance(found, str) or several):
            raise InputError(
                f"{tensor!a}: {found!a} is no name of a hook or key: expected names, or {{tensor: name or names}}"
            )
    return {tensor: found if isinstance(found, str) else list(found) for tensor, found in given.items()}


def side_by_side(names: Names) -> dict[str, tuple[str, ...]]:
    """The hooks or keys in the columns of each tensor."""
    return {tensor: (given,) if isinstance(given, str) else tuple(given) for tensor, given in by_tensor(names).items()}


def beside(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (n, width) side by side in one; a tensor alone is itself."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def n_rows_of(batch: Batch) -> int:
    """How many rows a batch has."""
    return len(next(iter(batch.values())))


def joined(parts: list[Batch]) -> Batch:
    """The rows of several batches, one after the other."""
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def check_state(name: str, state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises InputError where a saved position cannot be one of this source."""
    for key, value in expected.items():
        if state.get(key) != value:
            raise InputError(
                f"{name}: the position to resume from has {key} = {state.get(key)!r}, this source {value!r};"
                " resume with the data the run began with"
            )
