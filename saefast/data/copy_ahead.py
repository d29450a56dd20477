"""Batches copied to the device that trains while it works on the one before."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def copied_ahead(batches: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The batches on a device, in their order, each copied on a stream of its own while the one before is in use.

    A batch may lie in memory that the next draw reuses, so its copy is waited for first. Only the host waits, and for
    that copy alone, not for what the device still computes.
    """
    copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin() -> tuple[Tensor, Any] | None:
        batch = next(batches, None)
        if batch is None:
            return None
        with nullcontext() if copies is None else torch.cuda.stream(copies):
            return batch.to(device, non_blocking=True, copy=True), None if copies is None else copies.record_event()

    under_way = begin()
    while under_way is not None:
        batch, done = under_way
        if done is not None:
            done.synchronize()
            batch.record_stream(torch.cuda.current_stream(device))
        under_way = begin()
        yield batch
