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
from saefast.data.source import Device, Source, check_batch_size, check_state
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
        if mapped.folder is None or mapped.hook is None:
            raise InputError(f"{mapped.source_name} is no shard folder: only those are buffered from disk")
        self.source_name, self.d_in, self.n_rows = mapped.source_name, mapped.d_in, mapped.n_rows
        self._mapped, self.folder, self._hook = mapped, mapped.folder, mapped.hook
        self._reservoir_rows, self._threads = reservoir_rows, threads or default_threads()
        self._reuse_memory, self._on_device = reuse_memory, on_device
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
        stream = native_module().RowStream(
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
