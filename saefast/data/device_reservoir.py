"""The shuffle buffer's reservoir in the memory of the device that trains: batches are gathered there.

Draws the same batches as the host's reservoir (reservoir.py), from the same plan. Rows cross the bus once, when they
enter the reservoir, on a stream of their own; training waits for nothing but the gather.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefast.data.gather import gather_rows
from saefast.errors import InputError

# Rows per copy while the reservoir is first filled.
PIECE = 1 << 14


@dataclass
class Staging:
    """Host memory (pinned on CUDA) for the rows of one refill, and the event after which it may be read into again."""

    rows: Tensor
    copied: Any = None


@dataclass
class Refill:
    """Rows on their way from disk into slots of the reservoir."""

    slots: Tensor
    staging: Staging
    read: Future[None]


class DeviceReservoir:
    """A reservoir of stored rows (capacity, row_bytes) uint8 on a device.

    stream: a native RowStream, which plans and reads. lag: batches until a refill is drawn from; the plan's own.
    threads: readers.
    """

    def __init__(
        self, stream: Any, capacity: int, row_bytes: int, batch_size: int, lag: int, device: torch.device, threads: int
    ) -> None:
        self.row_bytes, self.device, self._stream, self._lag = row_bytes, device, stream, lag
        self.rows = np.zeros(0, np.int64)  # of the batch drawn last
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="saefast-read")
        self._slots = torch.zeros(capacity, row_bytes, dtype=torch.uint8, device=device)
        self._free = deque(Staging(self._host(batch_size)) for _ in range(lag))
        self._refills: deque[Refill] = deque()
        self._fill()

    def next(self) -> Tensor:
        """The next batch (n, row_bytes) uint8 on the device. Raises InputError with the error that a reader met."""
        if len(self._refills) == self._lag:
            self._settle(self._refills.popleft())
        slots, self.rows, refill = self._stream.next()
        index = torch.from_numpy(slots).long().to(self.device, non_blocking=True)
        batch = gather_rows(self._slots, index)
        if self._copies is not None:
            # The copies that will overwrite these slots wait for the gather that reads them.
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        staging = self._free.popleft()
        self._refills.append(Refill(index[: len(refill)], staging, self._readers.submit(self._read, refill, staging)))
        return batch

    def close(self) -> None:
        self._readers.shutdown(wait=True, cancel_futures=True)

    def _read(self, rows: np.ndarray, staging: Staging) -> None:
        if staging.copied is not None:
            staging.copied.synchronize()
        self._stream.read(rows, staging.rows)

    def _settle(self, refill: Refill) -> None:
        """Copies rows that have been read into their slots; gathers that follow wait for it, on the device."""
        try:
            refill.read.result()
        except RuntimeError as error:
            raise InputError(str(error)) from None
        n, staging = len(refill.slots), refill.staging
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            self._slots.index_copy_(0, refill.slots, staging.rows[:n].to(self.device, non_blocking=True))
        if self._copies is not None:
            staging.copied = self._copies.record_event()
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        self._free.append(staging)

    def _fill(self) -> None:
        """Everything that stands in the reservoir at the position it starts from, read front to back."""
        resident = self._stream.resident()
        slots = np.flatnonzero(resident >= 0)
        slots = slots[np.argsort(resident[slots], kind="stable")]
        staging = self._host(PIECE)
        for start in range(0, len(slots), PIECE):
            part = slots[start : start + PIECE]
            try:
                self._stream.read(resident[part], staging)
            except RuntimeError as error:
                raise InputError(str(error)) from None
            self._slots.index_copy_(0, torch.from_numpy(part).to(self.device), staging[: len(part)].to(self.device))

    def _host(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.row_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._copies is not None)
