"""A bounded reservoir of rows that C++ threads keep full (csrc/buffer.hpp): shuffled batches come out of it."""

import os
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saefast import extension
from saefast.errors import InputError
from saefast.placement import require_memory

# Batches from the one that frees a slot to the first that may draw the slot's next row. A seed's order depends on it.
LAG = 8
PREFETCH = 4

# Per shard its rows, and for each column the file it lies in and the byte where it starts.
Files = list[tuple[int, list[tuple[str, int]]]]


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
        # Made first, so that it is freed first: its threads write into the two tensors until then.
        self._native: Any = None
        self.batch_size, self.row_bytes, self.rows = batch_size, row_bytes, rows
        pinned = torch.cuda.is_available()
        self._reservoir, self._ring = (
            torch.zeros(n * row_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            for n in (rows, PREFETCH * batch_size)
        )
        self._settings = native_module().BufferSettings(
            slot_bytes=row_bytes,
            capacity=rows,
            batch=batch_size,
            lag=LAG,
            prefetch=PREFETCH,
            threads=threads or default_threads(),
            consumers=readers,
            first_batch=first_batch,
        )
        self._place = 0
        # Per reader: batches drawn here, and the thread that drew last.
        self._drawn, self._threads = [0] * readers, [0] * readers

    def read_files(self, files: Files, column_bytes: list[int], epochs: int, seed: int) -> None:
        """Starts reading rows that lie in columns, each of so many bytes a row."""
        memory = (self._reservoir, self._ring)
        self._run(native_module().open_files(files, column_bytes, *memory, self._settings, epochs, seed))

    def read_queue(self, seed: int) -> None:
        """Starts waiting for push()."""
        memory = (self._reservoir, self._ring)
        self._run(native_module().open_queue(2 * self.batch_size, *memory, self._settings, seed))

    def _run(self, native: Any) -> None:
        self._native = native
        # Threads write into the two tensors, which must outlive them in any order of garbage collection.
        self._close = weakref.finalize(self, _shut_down, native, self._reservoir, self._ring)

    def next(self, reader: int = 0) -> Tensor | None:
        """The reader's next batch (n, row_bytes) uint8, valid until its next call; None when the data has ended.

        Raises InputError with the error that a reading thread met, or where the reader would wait for ever.
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
        """Raises InputError where a reader would wait for the slowest one, which the same thread has to draw from."""
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


def default_threads() -> int:
    return max(1, min(8, os.cpu_count() or 1))


def native_module() -> ModuleType:
    module = extension.load()
    if module is None:
        raise InputError("the shuffle buffer needs saefast's C++ extension, which is not built; use shuffle='mapped'")
    return module
