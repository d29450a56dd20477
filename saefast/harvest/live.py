"""Training while harvesting: one pass of a model, a shuffled source of rows for each of its hooks."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch

from saefast.data import live_buffer
from saefast.data.iterable_source import HELDOUT_BYTES, HELDOUT_ROWS
from saefast.data.live_buffer import LiveBuffer
from saefast.data.shards import Identity
from saefast.data.source import Batch, Device, Names, X, beside, n_rows_of, side_by_side
from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.harvest.harvester import Harvester
from saefast.harvest.hooks import expand_names
from saefast.harvest.item_harvester import ItemHarvester, harvester_for
from saefast.harvest.reader import HarvestBatch
from saefast.typed import typed


@typed
def live_sources(
    config: HarvestConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    text: Any = None,
    items: Any = None,
    processor: Any = None,
    reservoir_rows: int = 1 << 16,
) -> dict[str, "HookBuffer"]:
    """A source per hook of the config, all fed by the same passes of the model over the text.

    Rows are shuffled in a reservoir per hook of `reservoir_rows` rows; with one seed and batch size, batches of
    different hooks hold the same tokens. Draw from the sources in step: what the fastest has taken waits in memory for
    the slowest. heldout() has the held-out rows that came before as many rows as were drawn, up to HELDOUT_ROWS
    of them, or HELDOUT_BYTES in memory.
    Resuming runs the model again from the beginning of the text.

    Arguments are `harvest`'s; raises InputError as it does.
    """
    harvester = harvester_for(config, model=model, tokenizer=tokenizer, text=text, items=items, processor=processor)
    hooks = [hook["name"] for hook in harvester.runner.hooks]
    shared = Shared(lambda: _with_rows(harvester.batches()), readers=len(hooks))
    return {
        hook: HookBuffer(
            HookStream(shared, reader, {X: (hook,)}, _name(harvester, [hook])),
            reservoir_rows=reservoir_rows,
            identity=harvester.identity,
        )
        for reader, hook in enumerate(hooks)
    }


@typed
def live_source(
    config: HarvestConfig,
    hooks: Names | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    text: Any = None,
    items: Any = None,
    processor: Any = None,
    reservoir_rows: int = 1 << 16,
) -> "HookBuffer":
    """One source of several hooks of the config: its batches hold a tensor of each, row for row of the same tokens.

    hooks: {"x": "layers.3.mlp.in", "target": "layers.3.mlp.out"} names the tensors, a list (None: all hooks of the
    config) leaves them the hooks' names; {"x": ["layers.1", "layers.2"]} has both side by side in the columns of x. The
    rest is as in live_sources. Raises InputError for a hook that the config does not name.
    """
    harvester = harvester_for(config, model=model, tokenizer=tokenizer, text=text, items=items, processor=processor)
    names = {name: hook["name"] for hook in harvester.runner.hooks for name in (hook["hf_name"], hook["name"])}
    every = [hook["name"] for hook in harvester.runner.hooks]
    asked = side_by_side(every if hooks is None else hooks)
    asked = {tensor: expand_names(every, several) for tensor, several in asked.items()}
    if missing := [hook for several in asked.values() for hook in several if hook not in names]:
        raise InputError(f"hooks names {missing[0]!r}: expected hooks of the config, {', '.join(every)}")
    picked = {tensor: tuple(names[hook] for hook in several) for tensor, several in asked.items()}
    shown = _name(harvester, [hook for several in picked.values() for hook in several])
    stream = HookStream(Shared(lambda: _with_rows(harvester.batches()), readers=1), 0, picked, shown)
    return HookBuffer(stream, reservoir_rows=reservoir_rows, identity=harvester.identity)


def _with_rows(batches: Generator[HarvestBatch]) -> Generator[HarvestBatch]:
    """The batches but those of items that could not be read, which have no rows at any hook."""
    with contextlib.closing(batches):
        yield from (batch for batch in batches if batch.rows)


def _name(harvester: Harvester | ItemHarvester, hooks: list[str]) -> str:
    return f"{harvester.model_name} on {harvester.name}, {', '.join(hooks)}"


class Shared:
    """Batches of endless passes, made once and read by several readers, each in order and at its own pace."""

    def __init__(self, begin: Callable[[], Generator[HarvestBatch]], readers: int) -> None:
        self._begin, self._passes = begin, begin()
        self._trains = False  # whether this pass has had rows to train on
        self._lock = threading.Lock()
        self._first = 0  # number of the oldest batch kept
        self._kept: deque[HarvestBatch] = deque()
        self._next = [0] * readers
        self._left: set[int] = set()

    def read(self, reader: int, number: int) -> HarvestBatch:
        """Batch `number`, counted over all passes; a reader asks for each once, in order."""
        with self._lock:
            while number >= self._first + len(self._kept):
                self._kept.append(self._make())
            batch = self._kept[number - self._first]
            self._next[reader] = number + 1
            self._forget()
            return batch

    def leave(self, reader: int) -> None:
        """The reader draws no more: nothing is kept for it, and after the last one the model is dropped."""
        self._left.add(reader)
        # Another reader may be in the middle of a pass, or hang there: it will clean up when it leaves.
        if self._lock.acquire(timeout=live_buffer.IDLE):
            try:
                self._forget()
                if len(self._left) == len(self._next):
                    self._passes.close()
            finally:
                self._lock.release()

    def _forget(self) -> None:
        """Drops what every reader has read, or will not read."""
        least = min((n for i, n in enumerate(self._next) if i not in self._left), default=self._first + len(self._kept))
        while self._kept and self._first < least:
            self._kept.popleft()
            self._first += 1

    def _make(self) -> HarvestBatch:
        batch = next(self._passes, None)
        if batch is None:
            if not self._trains:
                raise InputError(
                    "the text gives no row to train on: all its documents are held out, or all their tokens dropped; "
                    "give more text, or lower heldout"
                )
            self._passes, self._trains = self._begin(), False
            batch = next(self._passes)
        self._trains |= batch.split == "train" and bool(len(batch.seq))
        return batch


class HookStream:
    """What a shared pass gives of some hooks, as LiveBuffer takes it: rows to train on without end, and held-out ones.

    hooks: of each tensor, side by side in its columns.
    """

    n_rows: int | None = None

    def __init__(self, shared: Shared, reader: int, hooks: Mapping[str, tuple[str, ...]], name: str) -> None:
        self._shared, self._reader, self.hooks, self.source_name = shared, reader, hooks, name
        self._held: list[tuple[int, Batch]] = []  # held-out rows, and how many rows to train on came before them
        self._n_held = self._held_bytes = 0
        self._begun = False
        self._first = shared.read(reader, 0)
        first = self._rows(self._first)
        self.widths: Mapping[str, int] = {tensor: int(rows.shape[1]) for tensor, rows in first.items()}
        self._dtypes = {tensor: rows.dtype for tensor, rows in first.items()}

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        """Rows as they come; batch_size and seed are the buffer's business. Once: then InputError."""
        if self._begun:
            raise InputError(f"{self.source_name} was drawn from already: a live source can be drawn from once")
        self._begun = True
        return self._draw(device, dtype)

    def _draw(self, device: Device, dtype: torch.dtype) -> Iterator[Batch]:
        batch, number, given = self._first, 0, 0
        while True:
            rows, n = self._rows(batch), len(batch.seq)
            if batch.split == "train":
                given += n
                yield {tensor: part.to(device, dtype) for tensor, part in rows.items()}
            elif not self.holds_all():
                self._held.append((given, {tensor: part.to("cpu") for tensor, part in rows.items()}))
                self._n_held += n
                self._held_bytes += sum(part.nbytes for part in rows.values())
            number += 1
            batch = self._shared.read(self._reader, number)

    def _rows(self, batch: HarvestBatch) -> Batch:
        return {tensor: beside([batch.rows[hook] for hook in hooks]) for tensor, hooks in self.hooks.items()}

    def holds_all(self) -> bool:
        """Whether no further rows will be held out."""
        return self._n_held >= HELDOUT_ROWS or self._held_bytes >= HELDOUT_BYTES

    def part_widths(self, name: str = X) -> tuple[int, ...]:
        return tuple(int(self._first.rows[hook].shape[1]) for hook in self.hooks[name])

    def stored_dtype(self, name: str = X) -> torch.dtype:
        return self._dtypes[name]

    def close(self) -> None:
        self._shared.leave(self._reader)

    def heldout(
        self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32, before: int | None = None
    ) -> Iterator[Batch]:
        """The held-out rows met so far; with `before`, those that came before so many rows to train on."""
        for given, rows in list(self._held):
            if before is None or given < before:
                for start in range(0, n_rows_of(rows), batch_size):
                    cut = slice(start, start + batch_size)
                    yield {tensor: part[cut].to(device, dtype) for tensor, part in rows.items()}


class HookBuffer(LiveBuffer):
    """Shuffled rows of a HookStream, and its hooks. identity: digests of the model that reads, and of its tokenizer."""

    def __init__(self, stream: HookStream, *, reservoir_rows: int, identity: Identity) -> None:
        super().__init__(stream, reservoir_rows=reservoir_rows)
        self._stream, self.identity, self.hooks = stream, identity, stream.hooks

    def part_widths(self, name: str = X) -> tuple[int, ...]:
        return self._stream.part_widths(name)

    def leave(self) -> None:
        # The pass that feeds the other hooks goes on, and this one can be drawn from once only.
        self.close()
