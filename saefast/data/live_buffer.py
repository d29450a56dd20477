"""LiveBuffer: shuffled batches from anything that gives rows as it goes, a running harvest above all."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from saefast.data.reservoir import LAG, Reservoir
from saefast.data.source import Batch, Device, Source, X, check_batch_size, check_state, identity
from saefast.errors import InputError

# Seconds that closing a live source waits for the batch that its iterable is making: at most LINGER, as long as this
# process computes. If it has computed nothing for IDLE, the iterable hangs (in a download, say) and is abandoned.
LINGER, IDLE = 120.0, 0.5


class Producer:
    """A thread that draws an iterator's batches and pushes them into a reservoir, until that is closed.

    It must be stopped before the interpreter ends. A thread that asks for the interpreter after that is unwound by
    Python, which aborts the process if C++ code (this module's, torch's) is on the thread's stack.

    failure: what the iterator raised.
    """

    def __init__(self, batches: Iterator[Batch], reservoir: Reservoir, name: str) -> None:
        self.failure: BaseException | None = None
        self._batches, self._reservoir, self._name = batches, reservoir, name
        self._thread = threading.Thread(target=self._run, daemon=True, name="saefast-live")
        self._thread.start()

    def stop(self) -> bool:
        """Closes the reservoir and waits for the thread, unless it hangs; whether it has ended."""
        self._reservoir.close()
        # Garbage may be collected on any thread: a thread that makes batches could wait here for one that waits for it.
        if not threading.current_thread().name.startswith("saefast-"):
            self._wait()
        return not self._thread.is_alive()

    def _wait(self) -> None:
        end, working = time.monotonic() + LINGER, True
        while self._thread.is_alive() and working and time.monotonic() < end:
            before = time.process_time()
            self._thread.join(IDLE)
            # Waiting itself takes some microseconds.
            working = time.process_time() - before > 1e-3

    def _run(self) -> None:
        try:
            self._push_all()
            self._reservoir.finish()
        except BaseException as error:
            self.failure = error
            self._reservoir.finish(f"{self._name}: {type(error).__name__}: {error}")

    def _push_all(self) -> None:
        for batch in self._batches:
            # One slot holds all of a row's tensors, side by side.
            rows = torch.cat(list(batch.values()), dim=1) if len(batch) > 1 else batch[next(iter(batch))].contiguous()
            while not self._reservoir.closed and not self._reservoir.push(rows):
                pass
            if self._reservoir.closed:
                return


class Stream(Protocol):
    """What LiveBuffer shuffles: an IterableSource, or the part of one that it needs."""

    source_name: str
    widths: Mapping[str, int]
    n_rows: int | None

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]: ...

    def heldout(
        self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32, before: int | None = None
    ) -> Iterator[Batch]: ...

    def holds_all(self) -> bool: ...

    def stored_dtype(self, name: str = X) -> torch.dtype | None: ...

    def close(self) -> None: ...


class LiveBuffer(Source):
    """Shuffles an iterable of batches, such as a running harvest, through a reservoir.

    A thread draws from the iterable and waits while the reservoir is full. An exception in the iterable is raised by
    the next draw. Batches end when the iterable does; the last one may be short. Resuming draws from the beginning
    again and drops what was trained on, so the iterable must give the same rows each time.

    heldout() has the held-out rows that came before as many rows as were drawn: how far the reading thread is ahead
    changes no figure, and a run that goes on has those of one that was never stopped.

    The thread ends with close(), when the buffer is dropped, and before the interpreter's end; each waits for the batch
    that the iterable is making.
    """

    def __init__(self, data: Stream, *, reservoir_rows: int = 1 << 16) -> None:
        self._data, self._reservoir_rows = data, reservoir_rows
        self.source_name, self.widths, self.n_rows = data.source_name, data.widths, data.n_rows
        self._seed, self._drawn, self._batch_size = 0, 0, 0
        # What the reservoir holds.
        self._stored = torch.float32
        # Batches that the run to resume had drawn: as told, and those that are being drawn once more.
        self._skip, self._again = 0, 0
        self._open: Reservoir | None = None
        self._producer: Producer | None = None
        self._end: Any = None  # stops the producer, once, if nobody else does

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        check_batch_size(batch_size)
        if self._skip and (seed, batch_size) != (self._seed, self._batch_size):
            raise InputError(
                f"seed {seed} and batch_size {batch_size}, but the position to resume from was reached with "
                f"{self._seed} and {self._batch_size}: use those"
            )
        self._stop()
        self._seed, self._batch_size, self._drawn = seed, batch_size, 0
        self._stored = torch.float64 if dtype == torch.float64 else torch.float32
        rows = self._data.batches(batch_size, seed, "cpu", self._stored)
        reservoir = Reservoir(
            self._stored.itemsize * sum(self.widths.values()),
            max(self._reservoir_rows, (LAG + 2) * batch_size),
            batch_size,
        )
        reservoir.read_queue(seed)
        self._open, self._producer = reservoir, Producer(rows, reservoir, self.source_name)
        self._end = weakref.finalize(self, self._producer.stop)
        self._skip, self._again = 0, self._skip
        return self._draw(reservoir, self._producer, torch.device(device), dtype)

    def _draw(
        self, reservoir: Reservoir, producer: Producer, device: torch.device, dtype: torch.dtype
    ) -> Iterator[Batch]:
        self._draw_again(reservoir, producer)
        while (raw := self._next(reservoir, producer)) is not None:
            columns = raw.view(self._stored).split(list(self.widths.values()), dim=1)
            yield {
                name: column.to(device, dtype, copy=True).contiguous()
                for name, column in zip(self.widths, columns, strict=True)
            }

    def _draw_again(self, reservoir: Reservoir, producer: Producer, enough: Callable[[], bool] = lambda: False) -> None:
        """After a resume: draws and drops what was drawn before, or as much of it as is enough."""
        while self._drawn < self._again and not enough():
            if self._next(reservoir, producer) is None:
                return

    def _next(self, reservoir: Reservoir, producer: Producer) -> Tensor | None:
        try:
            raw = reservoir.next()
        except InputError as error:
            if producer.failure is None:
                raise
            raise producer.failure from error
        self._drawn += raw is not None
        return raw

    def state_dict(self) -> dict[str, Any]:
        return self._identity() | {"seed": self._seed, "batches": self._drawn, "batch_size": self._batch_size}

    def _identity(self) -> dict[str, Any]:
        return {"kind": "live", "reservoir_rows": self._reservoir_rows, "lag": LAG} | identity(self.widths)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(self.source_name, state, self._identity())
        self._seed, self._skip, self._batch_size = (int(state[k]) for k in ("seed", "batches", "batch_size"))

    @property
    def rows_drawn(self) -> int:
        """Rows drawn since the beginning, those before a resume included."""
        return max(self._drawn, self._again) * self._batch_size

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        if self._open is not None and self._producer is not None:
            # A run that goes on may ask before it draws.
            self._draw_again(self._open, self._producer, self._data.holds_all)
        return self._data.heldout(batch_size, device, dtype, before=self.rows_drawn)

    def describe_row(self, i: int, name: str = X) -> str:
        assert self._open is not None
        return f"{self.source_name}, row {self._open.row_number(i)} of what it gave to train on"

    def stored_dtype(self, name: str = X) -> torch.dtype | None:
        return self._data.stored_dtype(name)

    def close(self) -> None:
        """Ends the threads and frees the reservoir; iterators handed out are of no more use. Held-out rows stay."""
        if self._stop():
            self._data.close()

    def _stop(self) -> bool:
        """Whether nothing draws from the iterable any more."""
        ended = self._producer is None or self._producer.stop()
        if self._end is not None:
            self._end.detach()
        self._open = self._producer = self._end = None
        return ended
