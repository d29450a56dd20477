"""Shuffled batches out of a bounded reservoir that C++ threads keep full (csrc/buffer.hpp).

`ShardBuffer` streams shard folders that need not fit in memory; `LiveBuffer` shuffles any iterable of tensors, a
running harvest above all. What a batch holds depends on the seed, never on threads or timing.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from saefast import extension
from saefast.data.ahead import copied_ahead
from saefast.data.device_reservoir import DeviceReservoir
from saefast.data.rows_source import RowsSource
from saefast.data.shards import dequantise
from saefast.data.source import Device, Source, check_batch_size, check_state
from saefast.errors import InputError
from saefast.placement import require_memory

# Batches between drawing a row's slot and drawing the row that follows in it. Part of what a seed means.
LAG = 8
PREFETCH = 4
# Seconds that closing a live source waits for the batch that its iterable is making: LINGER at most, while this process
# works; when it has done nothing for IDLE, the iterable hangs, in a download say, and is left behind.
LINGER, IDLE = 120.0, 0.5

# Per file its path, rows, and the byte where each column's matrix starts.
Files = list[tuple[str, int, list[int]]]


class Reservoir:
    """The memory and threads behind a buffer. Closed when dropped, at interpreter exit, or by close().

    row_bytes: bytes of a stored row. rows: of the reservoir; at least (LAG + 2) batches.
    """

    def __init__(
        self, row_bytes: int, rows: int, batch_size: int, *, first_batch: int = 0, threads: int = 0, readers: int = 1
    ) -> None:
        least = (LAG + 2) * batch_size
        if rows < least:
            raise InputError(
                f"the reservoir has {rows} rows: batches of {batch_size} need at least {least}; "
                "raise reservoir_rows or lower batch_size"
            )
        needed = (rows + PREFETCH * batch_size) * row_bytes
        require_memory("cpu", needed, f"a reservoir of {rows} rows, with batches of {batch_size} rows,")
        # Made first, so that it goes first: its threads write into the two tensors until it has gone.
        self._native: Any = None
        self.batch_size, self.row_bytes, self.rows = batch_size, row_bytes, rows
        pinned = torch.cuda.is_available()
        self._reservoir, self._ring = (
            torch.zeros(n * row_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            for n in (rows, PREFETCH * batch_size)
        )
        self._settings = _native().BufferSettings(
            slot_bytes=row_bytes,
            capacity=rows,
            batch=batch_size,
            lag=LAG,
            prefetch=PREFETCH,
            threads=threads or _threads(),
            consumers=readers,
            first_batch=first_batch,
        )
        self._place = 0
        # Per reader: batches drawn here, and the thread that drew last.
        self._drawn, self._threads = [0] * readers, [0] * readers

    def read_files(self, files: Files, column_bytes: list[int], epochs: int, seed: int) -> None:
        """Starts reading: per file its path, rows, and the byte where each column's matrix starts."""
        memory = (self._reservoir, self._ring)
        self._run(_native().open_files(files, column_bytes, *memory, self._settings, epochs, seed))

    def read_queue(self, seed: int) -> None:
        """Starts waiting for push()."""
        memory = (self._reservoir, self._ring)
        self._run(_native().open_queue(2 * self.batch_size, *memory, self._settings, seed))

    def _run(self, native: Any) -> None:
        self._native = native
        # Threads write into the two tensors, so they must outlive the threads, whatever is collected first.
        self._close = weakref.finalize(self, _shut_down, native, self._reservoir, self._ring)

    def next(self, reader: int = 0) -> Tensor | None:
        """The reader's next batch (n, row_bytes) uint8, valid until its next call; None when the data has ended.

        Raises InputError with what a reading thread ran into, or where the reader would wait for ever.
        """
        self._refuse_to_wait_for_myself(reader)
        try:
            number, n, self._place = self._native.next(reader)
        except RuntimeError as error:
            raise InputError(str(error)) from None
        if number < 0:
            return None
        self._drawn[reader] += 1
        start = self._place * self.batch_size * self.row_bytes
        return self._ring[start : start + n * self.row_bytes].view(n, self.row_bytes)

    def batches(self, reader: int = 0) -> Iterator[Tensor]:
        """What `next` gives until the data has ended."""
        while (batch := self.next(reader)) is not None:
            yield batch

    def _refuse_to_wait_for_myself(self, reader: int) -> None:
        """A reader that is far ahead waits for the slowest one: never, if that is this very thread's to draw."""
        self._threads[reader] = threading.get_ident()
        slowest = min(range(len(self._drawn)), key=self._drawn.__getitem__)
        ahead = self._drawn[reader] - max(self._drawn[slowest] - 1, 0)
        if ahead >= PREFETCH and self._threads[slowest] == self._threads[reader]:
            raise InputError(
                f"reader {reader} is {ahead} batches ahead of reader {slowest}, and both are drawn by one thread: "
                "draw from the readers in turn"
            )

    def row_number(self, i: int) -> int:
        """Which row, counted through the files, row i of the batch drawn last is."""
        return int(self._native.rows(self._place)[i])

    def push(self, rows: Tensor) -> bool:
        """Queues rows (n, row_bytes) uint8; False when there was no room for 50 ms, or the reservoir was closed."""
        return bool(self._native.push(rows))

    def finish(self, error: str = "") -> None:
        """No more rows will be pushed; with an error, the next draw raises it."""
        self._native.finish(error)

    @property
    def closed(self) -> bool:
        return not self._close.alive

    def close(self) -> None:
        self._close()


def _shut_down(native: Any, *kept_until_then: Tensor) -> None:
    native.close()


def _threads() -> int:
    return max(1, min(8, os.cpu_count() or 1))


def _native() -> ModuleType:
    module = extension.load()
    if module is None:
        raise InputError("the shuffle buffer needs saefast's C++ extension, which is not built; use shuffle='mapped'")
    return module


class ShardBuffer(Source):
    """Draws from a shard folder of any size through a reservoir of `reservoir_rows` rows.

    The order is that of a reservoir shuffle: shards in random order, rows mixed within the reservoir. Memory is
    reservoir + PREFETCH batches. Bits do not depend on `threads` (0: one per core, at most 8).

    reuse_memory: batches in the dtype they are stored in are views into the ring, valid until the next draw.
    on_device: keep the reservoir on the device that trains (device_reservoir.py). None does so on a GPU where it takes
    less than a quarter of the free memory. The batches are the same.
    """

    def __init__(
        self,
        mapped: RowsSource,
        *,
        reservoir_rows: int = 1 << 18,
        threads: int = 0,
        reuse_memory: bool = False,
        on_device: bool | None = None,
    ) -> None:
        if mapped.folder is None or mapped.hook is None:
            raise InputError(f"{mapped.source_name} is no shard folder: only those are buffered from disk")
        self.source_name, self.d_in, self.n_rows = mapped.source_name, mapped.d_in, mapped.n_rows
        self._mapped, self.folder, self._hook = mapped, mapped.folder, mapped.hook
        self._reservoir_rows, self._threads, self._reuse_memory = reservoir_rows, threads or _threads(), reuse_memory
        self._on_device = on_device
        self._seed, self._drawn, self._batch_size = 0, 0, 0
        self._restored = False
        self._open: Reservoir | DeviceReservoir | None = None

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]:
        target = torch.device(device)
        self._check_position(batch_size, seed)
        files, column_bytes = self._files()
        if self._belongs_on(target, sum(column_bytes)):
            self._open = self._begin_on_device(files, column_bytes, target)
            return self._draw_on_device(self._open, dtype)
        self._open = self._begin(files, column_bytes, readers=1)
        return self._draw(self._open, 0, target, dtype)

    def readers(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        device: Device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> list[Iterator[Tensor]]:
        """n iterators over the same batches, for several SAEs off one reservoir, each at its own pace.

        The fastest waits where it is PREFETCH - 1 batches ahead of the slowest: draw from them in turn, or each from a
        thread of its own. The position saved is reader 0's.
        """
        self._check_position(batch_size, seed)
        self._open = self._begin(*self._files(), readers=n)
        return [self._draw(self._open, reader, torch.device(device), dtype) for reader in range(n)]

    def _check_position(self, batch_size: int, seed: int) -> None:
        check_batch_size(batch_size)
        if self._restored and (seed, batch_size) != (self._seed, self._batch_size):
            raise InputError(
                f"seed {seed} and batch_size {batch_size}, but the position to resume from was reached with "
                f"{self._seed} and {self._batch_size}: use those"
            )
        if not self._restored:
            self._drawn = 0
        self._seed, self._batch_size, self._restored = seed, batch_size, False
        self.close()

    @property
    def _capacity(self) -> int:
        return max(self._reservoir_rows, (LAG + 2) * self._batch_size)

    def _begin(self, files: Files, column_bytes: list[int], readers: int) -> Reservoir:
        reservoir = Reservoir(
            sum(column_bytes),
            self._capacity,
            self._batch_size,
            first_batch=self._drawn,
            threads=self._threads,
            readers=readers,
        )
        reservoir.read_files(files, column_bytes, 0, self._seed)
        return reservoir

    def _belongs_on(self, device: torch.device, row_bytes: int) -> bool:
        if self._on_device is not None or device.type != "cuda":
            return bool(self._on_device)
        return self._capacity * row_bytes < torch.cuda.mem_get_info(device)[0] / 4

    def _begin_on_device(self, files: Files, column_bytes: list[int], device: torch.device) -> DeviceReservoir:
        stream = _native().RowStream(
            files, column_bytes, self._capacity, self._batch_size, LAG, self._seed, self._drawn
        )
        row_bytes = sum(column_bytes)
        return DeviceReservoir(stream, self._capacity, row_bytes, self._batch_size, LAG, device, self._threads)

    def _files(self) -> tuple[Files, list[int]]:
        """Path, rows and column offsets of each shard, and the bytes a row has in each column (acts [, scale])."""
        names = ["acts", "scale"] if self.folder.dtype == torch.int8 else ["acts"]
        files = []
        for info in self.folder.shards("train", self._hook):
            path, entries = self.folder.entries(info, self._hook)
            files.append((str(path), info.rows, [entries[name].start for name in names]))
        return files, [self.d_in * self.folder.dtype.itemsize, 4][: len(names)]

    def _draw(self, reservoir: Reservoir, reader: int, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
        drawn = reservoir.batches(reader)
        # Bytes cross as they are stored, half as many as fp32, and are widened on the other side.
        for raw in drawn if device.type == "cpu" else copied_ahead(drawn, device):
            # Counted when handed out, so that a position saved between two batches names the next one.
            if reader == 0:
                self._drawn += 1
            yield self._decode(raw, dtype)

    def _draw_on_device(self, reservoir: DeviceReservoir, dtype: torch.dtype) -> Iterator[Tensor]:
        while True:
            raw = reservoir.next()
            self._drawn += 1
            yield self._decode(raw, dtype)

    def _decode(self, raw: Tensor, dtype: torch.dtype) -> Tensor:
        """Stored bytes (n, row_bytes) -> rows (n, d_in), a copy unless reuse_memory."""
        width = self.d_in * self.folder.dtype.itemsize
        # Without a scale beside them the codes fill the row, and this is a view.
        acts = raw[:, :width].contiguous().view(self.folder.dtype)
        if self.folder.dtype == torch.int8:
            return dequantise(acts, raw[:, width:].contiguous().view(torch.float32)[:, 0]).to(dtype)
        return acts.to(dtype, copy=not self._reuse_memory)

    def state_dict(self) -> dict[str, Any]:
        return self._identity() | {
            "seed": self._seed,
            "batches": self._drawn,
            "batch_size": self._batch_size,
            "epoch": self._drawn * self._batch_size // max(self.n_rows or 1, 1),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "buffer",
            "n_rows": self.n_rows,
            "d_in": self.d_in,
            "reservoir_rows": self._reservoir_rows,
            "lag": LAG,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(self.source_name, state, self._identity())
        self._seed, self._drawn, self._batch_size = (int(state[k]) for k in ("seed", "batches", "batch_size"))
        self._restored = True

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        return self._mapped.heldout(batch_size, device, dtype)

    def describe_heldout(self, i: int) -> str:
        return self._mapped.describe_heldout(i)

    def describe_row(self, i: int) -> str:
        if isinstance(self._open, DeviceReservoir):
            return self._mapped.describe_number(int(self._open.rows[i]))
        assert self._open is not None
        return self._mapped.describe_number(self._open.row_number(i))

    def tokens(self, seq: int) -> Tensor:
        return self._mapped.tokens(seq)

    def close(self) -> None:
        """Ends the threads and frees the reservoir; the iterators handed out are dead."""
        if self._open is not None:
            self._open.close()
            self._open = None


class Producer:
    """A thread that draws an iterator's batches (n, d) and pushes them into a reservoir, until that is closed.

    It must be stopped before the interpreter ends: Python unwinds a thread that asks for the interpreter later than
    that, and where the thread comes out of C++ code (this module's, torch's) the process aborts.

    failure: what the iterator raised.
    """

    def __init__(self, batches: Iterator[Tensor], reservoir: Reservoir, name: str) -> None:
        self.failure: BaseException | None = None
        self._batches, self._reservoir, self._name = batches, reservoir, name
        self._thread = threading.Thread(target=self._run, daemon=True, name="saefast-live")
        self._thread.start()

    def stop(self) -> bool:
        """Closes the reservoir and waits for the thread, unless it hangs; whether it has ended."""
        self._reservoir.close()
        # Garbage may be collected on any thread: one that makes batches itself could wait for one that waits for it.
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
            while not self._reservoir.closed and not self._reservoir.push(batch.contiguous()):
                pass
            if self._reservoir.closed:
                return


class Stream(Protocol):
    """What LiveBuffer shuffles: an IterableSource, or the part of one that it needs."""

    source_name: str
    d_in: int
    n_rows: int | None

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]: ...

    def heldout(
        self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]: ...

    def close(self) -> None: ...


class LiveBuffer(Source):
    """Shuffles an iterable of (n, d_in) tensors, such as a running harvest, through a reservoir.

    A thread draws from the iterable and waits while the reservoir is full. An exception in the iterable is raised by
    the next draw. Batches end when the iterable does; the last one may be short. Resuming draws from the beginning
    again and drops what was trained on, so the iterable must give the same rows each time.

    The thread ends with close(), when the buffer is dropped, and before the interpreter's end; each waits for the batch
    that the iterable is making.
    """

    def __init__(self, data: Stream, *, reservoir_rows: int = 1 << 16) -> None:
        self._data, self._reservoir_rows = data, reservoir_rows
        self.source_name, self.d_in, self.n_rows = data.source_name, data.d_in, data.n_rows
        self._seed, self._drawn, self._batch_size = 0, 0, 0
        # Batches that the run to resume had drawn: as told, and those that are being drawn once more.
        self._skip, self._again = 0, 0
        self._open: Reservoir | None = None
        self._producer: Producer | None = None
        self._end: Any = None  # stops the producer, once, if nobody else does

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Tensor]:
        check_batch_size(batch_size)
        if self._skip and (seed, batch_size) != (self._seed, self._batch_size):
            raise InputError(
                f"seed {seed} and batch_size {batch_size}, but the position to resume from was reached with "
                f"{self._seed} and {self._batch_size}: use those"
            )
        self._stop()
        self._seed, self._batch_size, self._drawn = seed, batch_size, 0
        rows = self._data.batches(batch_size, seed, "cpu", torch.float32)
        reservoir = Reservoir(4 * self.d_in, max(self._reservoir_rows, (LAG + 2) * batch_size), batch_size)
        reservoir.read_queue(seed)
        self._open, self._producer = reservoir, Producer(rows, reservoir, self.source_name)
        self._end = weakref.finalize(self, self._producer.stop)
        self._skip, self._again = 0, self._skip
        return self._draw(reservoir, self._producer, torch.device(device), dtype)

    def _draw(
        self, reservoir: Reservoir, producer: Producer, device: torch.device, dtype: torch.dtype
    ) -> Iterator[Tensor]:
        self._draw_again(reservoir, producer)
        while (raw := self._next(reservoir, producer)) is not None:
            yield raw.view(torch.float32).to(device, dtype, copy=True)

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
        return {"kind": "live", "d_in": self.d_in, "reservoir_rows": self._reservoir_rows, "lag": LAG}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(self.source_name, state, self._identity())
        self._seed, self._skip, self._batch_size = (int(state[k]) for k in ("seed", "batches", "batch_size"))

    @property
    def rows_drawn(self) -> int:
        """Rows drawn since the beginning, those before a resume included."""
        return max(self._drawn, self._again) * self._batch_size

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        return self._data.heldout(batch_size, device, dtype)

    def describe_row(self, i: int) -> str:
        assert self._open is not None
        return f"{self.source_name}, row {self._open.row_number(i)} of what it gave to train on"

    def close(self) -> None:
        """Ends the threads and frees the reservoir; the iterator handed out is dead. The held-out rows stay."""
        if self._stop():
            self._data.close()

    def _stop(self) -> bool:
        """Whether nothing draws from the iterable any more."""
        ended = self._producer is None or self._producer.stop()
        if self._end is not None:
            self._end.detach()
        self._open = self._producer = self._end = None
        return ended
