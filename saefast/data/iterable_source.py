"""IterableSource: batches out of a Python iterable: a list, a generator, a DataLoader, a model that is running."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from saefast import ambient
from saefast.data.segments import from_array
from saefast.data.source import Device, Source, check_batch_size, check_state
from saefast.errors import InputError

# Held-out rows of an iterable live in memory; once there are this many, all other batches are trained on.
HELDOUT_ROWS = 1 << 16


def _needs_nothing(function: Callable[..., Any]) -> bool:
    """Whether a function can be called without arguments, as far as it says."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    except ValueError:  # some functions of C do not say
        pass
    return True


class IterableSource(Source):
    """A source over tensors (B, d_in) in the order the iterable gives them, re-cut to the batch size asked for.

    The iterable is started again for every epoch: pass something that can be (a list, a DataLoader, an object with
    __iter__), or a function that returns a new iterator, and let it give the same batches each time. A generator works
    for one epoch: its batches end when it ends, and it cannot be resumed.

    Every n-th batch with n = round(1 / heldout), or the last one of a shorter list, is held out until HELDOUT_ROWS are.
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
        self._every = _every(data, heldout)
        self._epoch, self._pulled, self._used, self._trained = 0, 0, 0, 0
        self._seed, self._restored = 0, False
        # How many held-out batches the first epoch has set aside, and those of them met in this process.
        self._n_held, self._held = 0, list[Tensor]()
        self._last: list[tuple[int, int, int, int]] = []
        self._iterator: Iterator[Any] | None = self._restart()
        first = next(self._iterator, None)
        if first is None:
            raise InputError(f"{name} is empty: no batch came out of it")
        self.d_in = int(from_array(f"batch 0 of {name}", first).rows.shape[1])
        self._iterator = chain([first], self._iterator)

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]:
        """As Source says, but in the iterable's own order (`seed` is only kept), and ends with a generator's end."""
        check_batch_size(batch_size)
        if not self._restored:
            if self._pulled:
                self._refuse_once("started a second time")
                self._iterator = None
            self._epoch = self._pulled = self._used = self._trained = self._n_held = 0
        resume = self._restored and self._pulled > 0
        self._seed, self._restored = seed, False
        return self._draw(batch_size, resume, device, dtype)

    def _draw(self, batch_size: int, resume: bool, device: Device, dtype: torch.dtype) -> Iterator[Tensor]:
        rest = self._skip(self._pulled) if resume else None
        while True:
            parts, missing, last = [], batch_size, []
            while missing:
                if rest is None:
                    rest = self._pull()
                    if rest is None:
                        break
                part = rest[self._used : self._used + missing]
                last.append((self._epoch, self._pulled - 1, self._used, len(part)))
                # A copy, because an iterable may fill one buffer again and again.
                parts.append(part.to(device=device, dtype=dtype, copy=True))
                missing -= len(part)
                self._used += len(part)
                if self._used == len(rest):
                    rest, self._used = None, 0
            self._last = last
            if parts:
                yield parts[0] if len(parts) == 1 else torch.cat(parts)
            if missing:
                return

    def _pull(self) -> Tensor | None:
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
            if not held and len(rows):
                self._trained += 1
                return rows

    def _checked(self, number: int, item: Any) -> Tensor:
        """Rows (n, d_in) of batch `number`; n may be 0."""
        name = f"batch {number} of {self.source_name}"
        if getattr(item, "ndim", 0) >= 2 and 0 in item.shape:
            return torch.zeros(0, self.d_in, dtype=torch.float32, device="cpu")
        rows = from_array(name, item).rows
        if rows.shape[1] != self.d_in:
            raise InputError(f"{name} has {rows.shape[1]} columns, those before have {self.d_in}")
        return rows

    def _hold(self, number: int, rows: Tensor) -> bool:
        """Whether batch `number` of an epoch is held out; keeps it the first time it is met."""
        if not self._every or number % self._every != self._every - 1:
            return False
        place = number // self._every
        if self._epoch == 0 and place == self._n_held and self._held_rows(place) < HELDOUT_ROWS:
            self._n_held += 1
        if place >= self._n_held:
            return False
        if place == len(self._held):
            # A copy: what the iterable yields may be a buffer that it fills again.
            self._held.append(rows.to("cpu", copy=True))
        return True

    def _held_rows(self, n: int) -> int:
        return sum(len(rows) for rows in self._held[:n])

    def _skip(self, target: int) -> Tensor | None:
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
        with ambient.theirs():
            data = self._data if isinstance(self._data, Iterable) else self._data()
        if not isinstance(data, Iterable):
            raise InputError(f"{self.source_name}: the function returned a {type(data).__name__}, expected an iterator")
        return ambient.drawn(data)

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
            "held_batches": self._n_held,
            "d_in": self.d_in,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(self.source_name, state, {"kind": "iterable", "d_in": self.d_in})
        if state["batches"] or state["epoch"]:
            self._refuse_once("resumed")
        self._seed, self._epoch, self._pulled, self._used, self._trained, self._n_held = (
            int(state[k]) for k in ("seed", "epoch", "batches", "rows_used", "trained", "held_batches")
        )
        self._restored, self._held = True, []
        if self._pulled:
            self._iterator = None

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        check_batch_size(batch_size)
        self._collect_held()
        for rows in self._held:
            for part in rows.split(batch_size):
                yield part.to(device=device, dtype=dtype)

    def _collect_held(self) -> None:
        """After a resume in a later epoch the held-out batches come from a pass of their own."""
        if len(self._held) >= self._n_held:
            return
        for number, item in enumerate(self._restart()):
            if number // self._every == len(self._held) and number % self._every == self._every - 1:
                self._held.append(self._checked(number, item).to("cpu", copy=True))
            if len(self._held) == self._n_held:
                return

    def close(self) -> None:
        """Lets go of the iterator, with which a DataLoader's workers end; a generator belongs to who made it."""
        if not self._once:
            self._iterator = None

    def describe_heldout(self, i: int) -> str:
        for place, rows in enumerate(self._held):
            if i < len(rows):
                return f"batch {(place + 1) * self._every - 1} of {self.source_name}, row {i}"
            i -= len(rows)
        raise IndexError(i)

    def describe_row(self, i: int) -> str:
        for epoch, number, start, rows in self._last:
            if i < rows:
                again = f", epoch {epoch + 1}" if epoch else ""
                return f"batch {number} of {self.source_name}{again}, row {start + i}"
            i -= rows
        raise IndexError(i)


def _every(data: object, heldout: float) -> int:
    """Every how many batches one is held out; 0 for none."""
    if not heldout:
        return 0
    every = max(round(1 / heldout), 2)
    size = len(data) if isinstance(data, Sized) else every
    return min(every, size) if size >= 2 else 0
