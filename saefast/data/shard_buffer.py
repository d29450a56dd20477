"""ShardBuffer: shuffled batches from a shard folder that need not fit in memory, streamed through a reservoir.

What a batch holds depends on the seed, never on threads or timing.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saefast.data.copy_ahead import copied_ahead
from saefast.data.device_reservoir import DeviceReservoir
from saefast.data.mapped_source import MappedSource
from saefast.data.reservoir import LAG, Files, Reservoir, default_threads, native_module
from saefast.data.shards import dequantise
from saefast.data.source import Batch, Device, Source, X, beside, check_batch_size, check_state, identity
from saefast.errors import InputError


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
        mapped: MappedSource,
        *,
        reservoir_rows: int = 1 << 18,
        threads: int = 0,
        reuse_memory: bool = False,
        on_device: bool | None = None,
    ) -> None:
        if mapped.folder is None:
            raise InputError(f"{mapped.source_name} is no shard folder: only those are buffered from disk")
        self.source_name, self.widths, self.n_rows = mapped.source_name, mapped.widths, mapped.n_rows
        self._mapped, self.folder, self.hooks = mapped, mapped.folder, mapped.hooks
        self._reservoir_rows, self._threads = reservoir_rows, threads or default_threads()
        self._reuse_memory, self._on_device = reuse_memory, on_device
        self._seed, self._drawn, self._batch_size = 0, 0, 0
        self._restored = False
        self._open: Reservoir | DeviceReservoir | None = None

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        place = torch.device(device)
        self._check_position(batch_size, seed)
        if self._belongs_on(place):
            self._open = self._begin_on_device(place)
            return self._draw_on_device(self._open, dtype)
        self._open = self._begin(readers=1)
        return self._draw(self._open, 0, place, dtype)

    def readers(
        self,
        n: int,
        batch_size: int,
        seed: int = 0,
        device: Device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> list[Iterator[Batch]]:
        """n iterators over the same batches, for several SAEs from one reservoir, each at its own pace.

        The fastest waits where it is PREFETCH - 1 batches ahead of the slowest: draw from them in turn, or each from a
        thread of its own. The position saved is reader 0's.
        """
        self._check_position(batch_size, seed)
        self._open = self._begin(readers=n)
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

    def _begin(self, readers: int) -> Reservoir:
        files, column_bytes = self._files(), self._column_bytes
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

    def _belongs_on(self, device: torch.device) -> bool:
        if self._on_device is not None or device.type != "cuda":
            return bool(self._on_device)
        return self._capacity * sum(self._column_bytes) < torch.cuda.mem_get_info(device)[0] / 4

    def _begin_on_device(self, device: torch.device) -> DeviceReservoir:
        files, row_bytes = self._files(), sum(self._column_bytes)
        stream = native_module().RowStream(
            files, self._column_bytes, self._capacity, self._batch_size, LAG, self._seed, self._drawn
        )
        return DeviceReservoir(stream, self._capacity, row_bytes, self._batch_size, LAG, device, self._threads)

    def _files(self) -> Files:
        files: Files = []
        for info in self.folder.shards_of_all("train", self._every_hook):
            columns = []
            for hook in self._every_hook:
                path, entries = self.folder.entries(info, hook)
                columns += [(str(path), entries[name].start) for name in self._stored]
            files.append((info.rows, columns))
        return files

    @property
    def _every_hook(self) -> list[str]:
        """Tensor by tensor, those in its columns."""
        return [hook for hooks in self.hooks.values() for hook in hooks]

    @property
    def _stored(self) -> tuple[str, ...]:
        """What a shard keeps of each row of a hook."""
        return ("acts", "scale") if self.folder.dtype == torch.int8 else ("acts",)

    @property
    def _column_bytes(self) -> list[int]:
        """Bytes of a row in each column: hook by hook, its acts [, scale]."""
        item, widths = self.folder.dtype.itemsize, map(self.folder.d, self._every_hook)
        return [size for width in widths for size in (width * item, 4)[: len(self._stored)]]

    def _draw(self, reservoir: Reservoir, reader: int, device: torch.device, dtype: torch.dtype) -> Iterator[Batch]:
        drawn = reservoir.batches(reader)
        # Bytes cross as they are stored, half as many as fp32, and are widened on the other side.
        for raw in drawn if device.type == "cpu" else copied_ahead(drawn, device):
            # Counted when handed out, so that a position saved between two batches names the next one.
            if reader == 0:
                self._drawn += 1
            yield self._decode(raw, dtype)

    def _draw_on_device(self, reservoir: DeviceReservoir, dtype: torch.dtype) -> Iterator[Batch]:
        while True:
            raw = reservoir.next()
            self._drawn += 1
            yield self._decode(raw, dtype)

    def _decode(self, raw: Tensor, dtype: torch.dtype) -> Batch:
        """Stored bytes (n, row_bytes) -> each tensor's rows (n, width), copies unless reuse_memory."""
        columns, batch = iter(raw.split(self._column_bytes, dim=1)), {}
        for name, hooks in self.hooks.items():
            batch[name] = beside([self._rows_of(columns, raw, dtype) for _ in hooks])
        return batch

    def _rows_of(self, columns: Iterator[Tensor], raw: Tensor, dtype: torch.dtype) -> Tensor:
        """The next hook's rows (n, width), out of the columns that are left of raw."""
        acts = _apart(next(columns), raw).view(self.folder.dtype)
        if self.folder.dtype == torch.int8:
            return dequantise(acts, _apart(next(columns), raw).view(torch.float32)[:, 0]).to(dtype)
        in_ring = acts.shape[1] * acts.element_size() == raw.shape[1]
        return acts.to(dtype, copy=in_ring and not self._reuse_memory)

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
            "reservoir_rows": self._reservoir_rows,
            "lag": LAG,
        } | identity(self.widths)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(self.source_name, state, self._identity())
        self._seed, self._drawn, self._batch_size = (int(state[k]) for k in ("seed", "batches", "batch_size"))
        self._restored = True

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        return self._mapped.heldout(batch_size, device, dtype)

    def describe_heldout(self, i: int, name: str = X) -> str:
        return self._mapped.describe_heldout(i, name)

    def describe_row(self, i: int, name: str = X) -> str:
        assert self._open is not None
        number = int(self._open.rows[i]) if isinstance(self._open, DeviceReservoir) else self._open.row_number(i)
        return self._mapped.describe_number(number, name)

    def part_widths(self, name: str = X) -> tuple[int, ...]:
        return self._mapped.part_widths(name)

    def stored_dtype(self, name: str = X) -> torch.dtype | None:
        return self._mapped.stored_dtype(name)

    def tokens(self, seq: int) -> Tensor:
        return self._mapped.tokens(seq)

    def close(self) -> None:
        """Ends the threads and frees the reservoir; iterators handed out cannot be used any more."""
        if self._open is not None:
            self._open.close()
            self._open = None


def _apart(column: Tensor, raw: Tensor) -> Tensor:
    """A column's bytes (n, size), contiguous; without a copy where the column is all there is in a row."""
    return column if column.shape[1] == raw.shape[1] else column.clone(memory_format=torch.contiguous_format)
