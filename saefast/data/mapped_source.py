"""MappedSource: rows in mapped files or in memory, drawn from all over them, in an order that a seed fixes."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.data.gather import RowTable, gather_rows
from saefast.data.masks import runs
from saefast.data.permutation import Permutation
from saefast.data.segments import Segment
from saefast.data.shards import ShardFolder
from saefast.data.source import Batch, Device, Source, X, beside, check_batch_size, check_state, identity
from saefast.errors import InputError

# Rows that a stretch has on average, at least, where a mask leaves rows as they lie.
SHORTEST = 8


class Located(NamedTuple):
    """Rows x (B, d_in) with their sequences and positions (B,), None where the source does not know them."""

    x: Tensor
    seq: Tensor | None
    pos: Tensor | None


class Rows:
    """Segments one after the other, gathered by row number."""

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.starts = np.cumsum([0] + [len(s.rows) for s in segments])
        kinds = {(s.rows.dtype, s.rows.device.type, s.scale is None) for s in segments}
        together = len(kinds) == 1 and all(s.rows.device.type == "cpu" for s in segments)
        scales = [s.scale for s in segments if s.scale is not None]
        self._table = RowTable([s.rows for s in segments]) if together else None
        self._scales = RowTable(scales) if together and scales else None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, numbers: np.ndarray, device: Device, dtype: torch.dtype) -> Tensor:
        """Rows (n, d) by number (n,) int64; they cross to the device as they are stored and are widened there."""
        if self._table is None:
            return self._gather_by_segment(numbers, dtype).to(device)
        index = torch.from_numpy(numbers)
        rows = self._table.gather(index).to(device).to(dtype)
        if self._scales is None:
            return rows
        return rows * self._scales.gather(index).to(device)[:, None].to(dtype)

    def _gather_by_segment(self, numbers: np.ndarray, dtype: torch.dtype) -> Tensor:
        """For segments that differ in dtype, as files of one folder may, or that lie on a GPU."""
        first = self.segments[0].rows
        owner = np.searchsorted(self.starts, numbers, side="right") - 1
        out = torch.empty(len(numbers), first.shape[1], dtype=dtype, device=first.device)
        for number in np.unique(owner):
            places = np.flatnonzero(owner == number)
            rows = _gather(self.segments[number], numbers[places] - self.starts[number], dtype)
            out[torch.from_numpy(places).to(out.device)] = rows
        return out

    @property
    def widths(self) -> tuple[int, ...]:
        """Of what lies side by side in a row."""
        return (int(self.segments[0].rows.shape[1]),)

    @property
    def nbytes(self) -> int:
        return sum(segment.rows.nbytes for segment in self.segments)

    def cuts(self) -> set[int]:
        """The numbers of rows that segments begin at, and the number of all rows."""
        return {int(start) for start in self.starts}

    def read(self, start: int, stop: int, device: Device, dtype: torch.dtype) -> Tensor:
        """Rows start to stop (exclusive), which have to lie in one segment."""
        return self.piece(start, stop).read(device, dtype)

    def piece(self, start: int, stop: int) -> Segment:
        """Rows start to stop (exclusive), which have to lie in one segment."""
        segment, place = self.locate(start)
        return segment.part(place, place + stop - start)

    def locate(self, number: int) -> tuple[Segment, int]:
        """The segment of a row, and the row's place in it."""
        owner = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.segments[owner], number - int(self.starts[owner])

    def split_tail(self, n: int) -> tuple["Rows", "Rows"]:
        """All but the last n rows, and the last n."""
        cut = len(self) - n
        head, tail = [], []
        for segment, start in zip(self.segments, self.starts, strict=False):
            rows, keep = len(segment.rows), min(max(cut - int(start), 0), len(segment.rows))
            if keep:
                head.append(segment.part(0, keep))
            if keep < rows:
                tail.append(segment.part(keep, rows))
        return Rows(head), Rows(tail)

    def kept(self, mask: np.ndarray) -> "Rows":
        """The rows for which mask (n,) bool says so, in their order: stretches of them as they lie, and as copies where
        those are short or on a GPU."""
        found: list[Segment] = []
        for segment, start in zip(self.segments, self.starts, strict=False):
            here = mask[int(start) : int(start) + len(segment.rows)]
            stretches = list(runs(here))
            if segment.rows.device.type == "cpu" and SHORTEST * len(stretches) <= here.sum():
                found += [segment.part(*stretch) for stretch in stretches]
            elif stretches:
                found.append(segment.where(torch.from_numpy(here)))
        return Rows(found)

    def describe(self, number: int) -> str:
        """File and row of a row, and its sequence and position where they are known."""
        segment, place = self.locate(number)
        text = f"{segment.name} row {segment.first + place}"
        if segment.seq is None or segment.pos is None:
            return text
        return f"{text} (sequence {int(segment.seq[place])}, position {int(segment.pos[place])})"


class SideBySide(Rows):
    """Rows of the same tokens from several places: row i is row i of each, one after the other in its columns.

    Segments, sequences and positions are those of the first.
    """

    def __init__(self, parts: list[Rows]) -> None:
        super().__init__(parts[0].segments)
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for part in self.parts for width in part.widths)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def piece(self, start: int, stop: int) -> Segment:
        return self.parts[0].piece(start, stop)

    def locate(self, number: int) -> tuple[Segment, int]:
        return self.parts[0].locate(number)

    def cuts(self) -> set[int]:
        return set[int]().union(*(part.cuts() for part in self.parts))

    def gather(self, numbers: np.ndarray, device: Device, dtype: torch.dtype) -> Tensor:
        return beside([part.gather(numbers, device, dtype) for part in self.parts])

    def read(self, start: int, stop: int, device: Device, dtype: torch.dtype) -> Tensor:
        return beside([part.read(start, stop, device, dtype) for part in self.parts])

    def split_tail(self, n: int) -> tuple[Rows, Rows]:
        heads, tails = zip(*(part.split_tail(n) for part in self.parts), strict=True)
        return SideBySide(list(heads)), SideBySide(list(tails))

    def kept(self, mask: np.ndarray) -> Rows:
        return SideBySide([part.kept(mask) for part in self.parts])

    def describe(self, number: int) -> str:
        return " beside ".join(part.describe(number) for part in self.parts)


def joined_rows(parts: list[Rows]) -> Rows:
    """The rows of several places side by side; those of one place as they are."""
    return parts[0] if len(parts) == 1 else SideBySide(parts)


class MappedSource(Source):
    """A source over segments. Held out is what `held` holds; see open_source for which rows that are.

    train, held: by tensor, as many rows of each. folder: of shards; hooks: those in the columns of each tensor; others:
    further folders that columns of x come from (several_folders.py).
    """

    def __init__(
        self,
        name: str,
        train: Mapping[str, Rows],
        held: Mapping[str, Rows],
        folder: ShardFolder | None = None,
        hooks: Mapping[str, tuple[str, ...]] | None = None,
        rows_masked: int = 0,
        others: tuple[ShardFolder, ...] = (),
    ) -> None:
        self._rows_masked = rows_masked
        self.source_name, self.train, self.held, self.folder, self.hooks = name, train, held, folder, dict(hooks or {})
        self.others = others
        self.widths = {tensor: sum(rows.widths) for tensor, rows in train.items()}
        self.n_rows = self._n = len(next(iter(train.values())))
        self._seed, self._epoch, self._cursor = 0, 0, 0
        self._restored = False
        self._last = np.zeros(0, np.int64)

    def batches(
        self, batch_size: int, seed: int = 0, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Batch]:
        check_batch_size(batch_size)
        if self._restored and seed != self._seed:
            raise InputError(
                f"seed is {seed}, but the position to resume from was reached with seed {self._seed}: use that seed"
            )
        if not self._restored:
            self._seed, self._epoch, self._cursor = seed, 0, 0
        self._restored = False
        return self._draw(batch_size, Permutation(self._n, seed), device, dtype)

    def _draw(self, batch_size: int, order: Permutation, device: Device, dtype: torch.dtype) -> Iterator[Batch]:
        while True:
            parts, missing = [], batch_size
            while missing:
                stop = min(self._cursor + missing, self._n)
                parts.append(order.rows(self._epoch, self._cursor, stop))
                missing -= stop - self._cursor
                self._cursor = stop
                if stop == self._n:
                    self._epoch, self._cursor = self._epoch + 1, 0
            self._last = parts[0] if len(parts) == 1 else np.concatenate(parts)
            yield {name: rows.gather(self._last, device, dtype) for name, rows in self.train.items()}

    @property
    def rows_masked(self) -> int:
        return self._rows_masked

    def state_dict(self) -> dict[str, Any]:
        return self._identity() | {"seed": self._seed, "epoch": self._epoch, "cursor": self._cursor}

    def _identity(self) -> dict[str, Any]:
        masked = {"rows_masked": self._rows_masked} if self._rows_masked else {}
        return {"kind": "rows", "n_rows": self.n_rows} | masked | identity(self.widths)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(self.source_name, state, self._identity())
        self._seed, self._epoch, self._cursor = (int(state[k]) for k in ("seed", "epoch", "cursor"))
        self._restored = True

    def heldout(self, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        check_batch_size(batch_size)
        return (
            {name: rows.read(start, stop, device, dtype) for name, rows in self.held.items()}
            for start, stop in _pieces(self.held.values(), batch_size)
        )

    def located(
        self, split: str, batch_size: int, device: Device = "cpu", dtype: torch.dtype = torch.float32
    ) -> Iterator[Located]:
        """x of a split ("train" or "heldout") once, in order, with sequence and position of each row."""
        rows = (self.train if split == "train" else self.held)[X]
        for start, stop in _pieces([rows], batch_size):
            part = rows.piece(start, stop)
            yield Located(rows.read(start, stop, device, dtype), part.seq, part.pos)

    def describe_row(self, i: int, name: str = X) -> str:
        return self.describe_number(int(self._last[i]), name)

    def describe_number(self, number: int, name: str = X) -> str:
        """File, row, sequence and position of a row of the training share, by its number in it."""
        return self.train[name].describe(number)

    def describe_heldout(self, i: int, name: str = X) -> str:
        return self.held[name].describe(i)

    def part_widths(self, name: str = X) -> tuple[int, ...]:
        return self.train[name].widths

    def stored_dtype(self, name: str = X) -> torch.dtype | None:
        dtype: torch.dtype = self.train[name].segments[0].rows.dtype
        return dtype if dtype.is_floating_point else None

    def tokens(self, seq: int) -> Tensor:
        return super().tokens(seq) if self.folder is None else self.folder.tokens(seq)


def _pieces(tensors: Iterable[Rows], batch_size: int) -> Iterator[tuple[int, int]]:
    """Where to cut rows into batches of at most batch_size that lie in one segment of each tensor: start and stop."""
    for first, end in pairwise(sorted(set[int]().union(*(rows.cuts() for rows in tensors)))):
        for start in range(first, end, batch_size):
            yield start, min(start + batch_size, end)


def _gather(segment: Segment, numbers: np.ndarray, dtype: torch.dtype) -> Tensor:
    index = torch.from_numpy(numbers).to(segment.rows.device)
    rows = gather_rows(segment.rows, index).to(dtype)
    return rows if segment.scale is None else rows * segment.scale[index, None].to(dtype)
