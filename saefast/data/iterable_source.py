"""IterableSource: batches out of a Python iterable: a list, a generator, a DataLoader, a model that is running."""

import inspect
import warnings
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import chain
from typing import Any

import torch

from saefast import ambient
from saefast.data.iterable_batches import is_empty, masked_in, n_bytes, start_of, tensors_of
from saefast.data.source import (
    Batch,
    Device,
    Source,
    X,
    check_batch_size,
    check_state,
    identity,
    joined,
    n_rows_of,
)
from saefast.errors import InputError

# Held-out rows of an iterable live in memory; once there are this many of them, or they take so many bytes, all other
# batches are trained on.
HELDOUT_ROWS, HELDOUT_BYTES = 1 << 16, 1 << 28


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments, as far as its signature says."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        pass
    return True


class IterableSource(Source):
    """A source over tensors (B, d_in) in the order the iterable gives them, re-cut to the batch size asked for.

    Each may be a mapping of tensors (B, width) too, {"x": ..., "target": ...}: the same names, widths and dtypes every
    time, and row i of each of one token, with a "mask" beside them that says which rows count (see open_source); or a
    tuple or list of one tensor, as a DataLoader over a TensorDataset gives.

    The iterable is started again for every epoch: pass something that can be (a list, a DataLoader, an object with
    __iter__), or a function that returns a new iterator, and let it give the same batches each time: a RuntimeWarning
    says where it does not, as a DataLoader that shuffles. A generator works for one epoch: its batches end when it
    ends, and it cannot be resumed.

    Every n-th batch with n = round(1 / heldout), or the last one of a shorter list, is held out until there are
    HELDOUT_ROWS rows or HELDOUT_BYTES bytes of them; rows of such a batch beyond these bytes are not used at all.
    heldout() has those met so far.
    """

    def __init__(
        self,
        data: Iterable[Any] | Callable[[], Iterable[Any]],
        heldout: float = 0.05,
        name: str = "the iterable",
    ) -> None:
        self.source_name, self.n_rows = name, None
        if not isinstance(data, Iterable) and not _needs_nothing(data):
            raise InputError(f"{name} is a function that needs arguments: expected one that is called with none")
        self._data = data
        self._once = isinstance(data, Iterator)
        # Rows may be drawn on a thread that shuffles them.
        self._caller = ambient.caller()
        self._every = _every(data, heldout)
        self._epoch, self._pulled, self._used, self._trained = 0, 0, 0, 0
        self._seed, self._restored = 0, False
        # How many held-out batches the first epoch has set aside, and those of them met in this process.
        self._n_held, self._held = 0, list[Batch]()
        # How many rows to train on came before each of them; and of each batch to train on, how many came up to its
        # end, its epoch, and its number there.
        self._held_at = list[int]()
        self._ends, self._epochs, self._numbers = array("q"), array("q"), array("q")
        # Rows that masks left out in all batches up to the one drawn last, and up to each of those in `_ends`.
        self._masked, self._masked_at = 0, array("q")
        self._last: list[tuple[int, int, int, int]] = []
        self._iterator: Iterator[Any] | None = self._restart()
        first = next(self._iterator, None)
        if first is None:
            raise InputError(f"{name} is empty: no batch came out of it")
        tensors = tensors_of(f"batch 0 of {name}", first)
        self.widths = {tensor: rows.shape[1] for tensor, rows in tensors.items()}
        self._dtypes = {tensor: rows.dtype for tensor, rows in tensors.items()}
        self._iterator = chain([first], self._iterator)
        # A digest of its first rows, by which another pass is told from it.
        self.first, self._says_other = start_of(tensors), True

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        """As Source says, but in the iterable's own order (`seed` is only kept), and ends with a generator's end."""
        check_batch_size(batch_size)
        if not self._restored:
            if self._pulled:
                self._refuse_once("started a second time")
                self._iterator = None
            self._epoch = self._pulled = self._used = self._trained = self._n_held = 0
            self._ends, self._epochs, self._numbers = array("q"), array("q"), array("q")
            self._masked, self._masked_at = 0, array("q")
        resume = self._restored and self._pulled > 0
        self._seed, self._restored = seed, False
        return self._draw(batch_size, resume, device, dtype)

    def _draw(self, batch_size: int, resume: bool, device: Device, dtype: torch.dtype) -> Iterator[Batch]:
        rest = self._skip(self._pulled) if resume else None
        while True:
            parts, missing, last = [], batch_size, []
            while missing:
                if rest is None:
                    rest = self._pull()
                    if rest is None:
                        break
                n = min(missing, n_rows_of(rest) - self._used)
                last.append((self._epoch, self._pulled - 1, self._used, n))
                # A copy, because an iterable may fill one buffer again and again.
                cut = slice(self._used, self._used + n)
                parts.append({name: t[cut].to(device=device, dtype=dtype, copy=True) for name, t in rest.items()})
                missing -= n
                self._used += n
                if self._used == n_rows_of(rest):
                    rest, self._used = None, 0
            self._last = last
            if parts:
                yield joined(parts)
            if missing:
                return

    def _pull(self) -> Batch | None:
        """The next batch to train on, over the ends of epochs; None when a generator is used up."""
        while True:
            if self._iterator is None:
                self._iterator = self._restart()
            item = next(self._iterator, None)
            if item is None:
                self._iterator = None
                if not self._trained:
                    raise InputError(
                        f"{self.source_name} gave nothing to train on in an epoch of {self._pulled} batches"
                    )
                if self._once:
                    return None
                self._epoch, self._pulled, self._trained = self._epoch + 1, 0, 0
                continue
            rows = self._checked(self._pulled, item)
            held = self._hold(self._pulled, rows)
            self._pulled += 1
            self._masked += masked_in(item)
            if not held and n_rows_of(rows):
                self._trained += 1
                self._masked_at.append(self._masked)
                self._ends.append(self._given + n_rows_of(rows))
                self._epochs.append(self._epoch)
                self._numbers.append(self._pulled - 1)
                return rows

    @property
    def rows_masked(self) -> int:
        return self._masked

    def masked_before(self, n_rows: int) -> int:
        """How many rows masks left out of all batches up to the one that the last of so many rows to train on is in."""
        batch = bisect_left(self._ends, n_rows)
        return self._masked_at[min(batch, len(self._masked_at) - 1)] if n_rows and self._masked_at else 0

    @property
    def _given(self) -> int:
        """How many rows to train on there were so far, since batches() or the resume."""
        return self._ends[-1] if self._ends else 0

    def _checked(self, number: int, item: Any) -> Batch:
        """Rows of batch `number`, in the order of `widths`; there may be none."""
        name = f"batch {number} of {self.source_name}"
        if is_empty(item):
            return {
                tensor: torch.zeros(0, width, dtype=torch.float32, device="cpu")
                for tensor, width in self.widths.items()
            }
        batch = tensors_of(name, item)
        if batch.keys() != self.widths.keys():
            raise InputError(f"{name} has the tensors {', '.join(batch)}, those before have {', '.join(self.widths)}")
        for tensor, rows in batch.items():
            what = name if len(batch) == 1 else f"{name}: {tensor!r}"
            if rows.shape[1] != self.widths[tensor]:
                raise InputError(f"{what} has {rows.shape[1]} columns, those before have {self.widths[tensor]}")
            if rows.dtype != self._dtypes[tensor]:
                raise InputError(f"{what} has dtype {rows.dtype}, those before have {self._dtypes[tensor]}")
        if number == 0 and start_of(batch) != self.first:
            self._say_other()
        return {tensor: batch[tensor] for tensor in self.widths}

    def _say_other(self) -> None:
        """Warns, once, of other rows in a later pass."""
        if self._says_other:
            self._says_other = False
            warnings.warn(
                f"{self.source_name} gives other rows than the first time, as a DataLoader with shuffle=True does: "
                "rows held out once may be trained on later, and a run that goes on is not to the bit one that was "
                "never stopped; let it give the same batches each time",
                RuntimeWarning,
                stacklevel=2,
            )

    def _hold(self, number: int, rows: Batch) -> bool:
        """Whether batch `number` of an epoch is held out; keeps it the first time it is met."""
        if not self._every or number % self._every != self._every - 1:
            return False
        place = number // self._every
        if self._epoch == 0 and place == self._n_held and self._has_room(place):
            self._n_held += 1
        if place >= self._n_held:
            return False
        if place == len(self._held):
            self._keep(rows)
        return True

    def _has_room(self, place: int) -> bool:
        """Whether further rows will be held out, after those of the first `place` such batches."""
        held = self._held[:place]
        return sum(map(n_rows_of, held)) < HELDOUT_ROWS and sum(map(n_bytes, held)) < HELDOUT_BYTES

    def _keep(self, rows: Batch) -> None:
        """Holds a batch out: a copy on the CPU, as an iterable may yield one buffer again and again."""
        room, n = HELDOUT_BYTES - sum(map(n_bytes, self._held)), n_rows_of(rows)
        fit = max(room * n // max(n_bytes(rows), 1), 1)
        self._held_at.append(self._given)
        self._held.append({name: tensor[:fit].to("cpu", copy=True) for name, tensor in rows.items()})

    def holds_all(self) -> bool:
        """Whether no further rows will be held out."""
        return not self._every or self._epoch > 0 or not self._has_room(len(self._held))

    def _skip(self, target: int) -> Batch | None:
        """Goes through the batches of this epoch that were drawn before the resume; the last one if not used up."""
        self._iterator, self._pulled, rows = self._restart(), 0, None
        while self._pulled < target:
            item = next(self._iterator, None)
            if item is None:
                raise InputError(
                    f"{self.source_name} ended after {self._pulled} batches, the run to resume had drawn {target}"
                )
            rows = self._checked(self._pulled, item)
            self._hold(self._pulled, rows)
            self._pulled += 1
        return rows if self._used else None

    def _restart(self) -> Iterator[Any]:
        with ambient.anywhere(self._caller):
            data = self._data if isinstance(self._data, Iterable) else self._data()
        if not isinstance(data, Iterable):
            raise InputError(f"{self.source_name}: the function returned a {type(data).__name__}, expected an iterator")
        return ambient.drawn(data, self._caller)

    def _refuse_once(self, what: str) -> None:
        if self._once:
            raise InputError(
                f"{self.source_name} is a generator and cannot be {what}: pass a list, a DataLoader, or a function"
                " that returns a new iterator"
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "iterable",
            "seed": self._seed,
            "epoch": self._epoch,
            "batches": self._pulled,
            "rows_used": self._used,
            "trained": self._trained,
            "masked": self._masked,
            "held_batches": self._n_held,
            "first": self.first,
        } | identity(self.widths)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(self.source_name, state, {"kind": "iterable"} | identity(self.widths))
        if state["batches"] or state["epoch"]:
            self.check_resumable(state)
        self._seed, self._epoch, self._pulled, self._used, self._trained, self._n_held = (
            int(state[k]) for k in ("seed", "epoch", "batches", "rows_used", "trained", "held_batches")
        )
        # Not in positions of before there were masks.
        self._masked, self._masked_at = int(state.get("masked", 0)), array("q")
        self._restored, self._held, self._held_at = True, [], []
        if self._pulled:
            self._iterator = None

    def check_resumable(self, state: dict[str, Any]) -> None:
        """Raises InputError for a generator; warns where the first rows are not those of a saved position."""
        self._refuse_once("resumed")
        if state.get("first", self.first) != self.first:
            self._say_other()

    def heldout(
        self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32, before: int | None = None
    ) -> Iterator[Batch]:
        """The held-out rows met so far; with `before`, those that came before so many rows to train on."""
        check_batch_size(batch_size)
        if before is None:
            self._collect_held()
        # Another thread may be drawing, and holding out more.
        for rows, at in zip(list(self._held), self._held_at, strict=False):
            if before is not None and at >= before:
                return
            for start in range(0, n_rows_of(rows), batch_size):
                cut = slice(start, start + batch_size)
                yield {name: tensor[cut].to(device=device, dtype=dtype) for name, tensor in rows.items()}

    def _collect_held(self) -> None:
        """After a resume in a later epoch the held-out batches come from a pass of their own."""
        if len(self._held) >= self._n_held:
            return
        for number, item in enumerate(self._restart()):
            if number // self._every == len(self._held) and number % self._every == self._every - 1:
                self._keep(self._checked(number, item))
            if len(self._held) == self._n_held:
                return

    def close(self) -> None:
        """Drops the iterator, which ends a DataLoader's workers; a generator is left to the caller who made it."""
        if not self._once:
            self._iterator = None

    def describe_heldout(self, i: int, name: str = X) -> str:
        for place, rows in enumerate(self._held):
            if i < n_rows_of(rows):
                return f"batch {(place + 1) * self._every - 1} of {self.source_name}, row {i}"
            i -= n_rows_of(rows)
        raise IndexError(i)

    def describe_number(self, number: int) -> str:
        """Batch and row of a row to train on, by how many came before it."""
        batch = bisect_right(self._ends, number)
        before = self._ends[batch - 1] if batch else 0
        return self._place(self._epochs[batch], self._numbers[batch], number - before)

    def _place(self, epoch: int, number: int, row: int) -> str:
        return f"batch {number} of {self.source_name}{f', epoch {epoch + 1}' if epoch else ''}, row {row}"

    def describe_row(self, i: int, name: str = X) -> str:
        for epoch, number, start, rows in self._last:
            if i < rows:
                return self._place(epoch, number, start + i)
            i -= rows
        raise IndexError(i)

    def stored_dtype(self, name: str = X) -> torch.dtype | None:
        return self._dtypes[name]


def _every(data: object, heldout: float) -> int:
    """Every how many batches one is held out; 0 for none."""
    if not heldout:
        return 0
    every = max(round(1 / heldout), 2)
    size = len(data) if isinstance(data, Sized) else every
    return min(every, size) if size >= 2 else 0
