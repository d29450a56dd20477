"""The spool: the sparse code of many rows on disk, read by row or, a range of latents at a time, by latent.

Its files have no names, so that nothing is left of them however the process ends. In memory are O(L) numbers, and what
is asked for.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast import ambient
from saefast.data.mapped_source import Located
from saefast.data.source import first_bad_row
from saefast.errors import InputError
from saefast.latents.steps import Advance, nothing
from saefast.models.sae import SAE

# Entries in memory where they are sorted by latent and then by token: about 100 bytes each while that is done.
MOST_ENTRIES = 1 << 23
# Latents looked at together, because what is found of each is in memory as well.
MOST_LATENTS = 1 << 14
# Entries looked through at a time for those of a range of latents.
_AT_A_TIME = 1 << 21
_LONGEST = np.iinfo(np.uint16).max


class Entries(NamedTuple):
    """The entries of a range of latents, latent by latent, those of each in the order of rows.

    The i-th latent of the range has the places ptr[i] to ptr[i + 1].
    """

    ptr: np.ndarray
    """(latents + 1,) int64"""
    row: np.ndarray
    """(n,) int64"""
    acts: np.ndarray
    """(n,) float32, all above 0"""

    def latent(self) -> np.ndarray:
        """(n,) int64: the latent of each entry, counted from the first of the range."""
        return np.repeat(np.arange(len(self.ptr) - 1), np.diff(self.ptr))


@dataclass(frozen=True)
class Spool:
    """The sparse code of rows, in arrays mapped from disk; only activations above 0 are in it.

    Attributes:
        row_ptr: (n_rows + 1,) int64: row r has the entries row_ptr[r] to row_ptr[r + 1].
        idx, acts: (entries,) int32 and float32, in the order of rows.
        sequence: (n_rows,) int32, numbers from 0 in the order in which sequences were met. Rows of one need not lie
            together. Empty where nothing is known of sequences, as the two below.
        position: (n_rows,) uint16, in the sequence.
        source_sequences: (n_sequences,) int64: the harvest's own numbers.
        n_fired: (n_latents,) int64 entries of each latent.
    """

    n_latents: int
    n_rows: int
    row_ptr: np.ndarray
    idx: np.ndarray
    acts: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    source_sequences: np.ndarray
    n_fired: np.ndarray

    @property
    def located(self) -> bool:
        """Whether it is known which sequence each row is of."""
        return len(self.source_sequences) > 0

    def ranges(self, entries: int = MOST_ENTRIES, latents: int = MOST_LATENTS) -> Iterator[tuple[int, int]]:
        """Ranges (start, stop) that make up all latents: at most so many, with so many entries or one latent alone."""
        ends, start = self.n_fired.cumsum(), 0
        while start < self.n_latents:
            before = ends[start] - self.n_fired[start]
            fitting = int(np.searchsorted(ends, before + entries, side="right"))
            stop = min(max(fitting, start + 1), start + latents, self.n_latents)
            yield start, stop
            start = stop

    def by_latent(self, start: int, stop: int) -> Entries:
        """The entries of latents start to stop (exclusive), sorted by latent, in memory."""
        counts = self.n_fired[start:stop]
        ptr = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        latent, row, acts = np.empty(ptr[-1], np.int32), np.empty(ptr[-1], np.int64), np.empty(ptr[-1], np.float32)
        filled = 0
        for first, last in self.stretches():
            begin, end = self.row_ptr[first], self.row_ptr[last]
            ids = self.idx[begin:end]
            at = np.flatnonzero((ids >= start) & (ids < stop))
            here = slice(filled, filled + len(at))
            latent[here], acts[here] = ids[at] - start, self.acts[begin:end][at]
            row[here] = np.repeat(np.arange(first, last), np.diff(self.row_ptr[first : last + 1]))[at]
            filled += len(at)
        order = torch.from_numpy(latent).sort(stable=True).indices.numpy()
        return Entries(ptr, row[order], acts[order])

    def stretches(self, entries: int = _AT_A_TIME) -> Iterator[tuple[int, int]]:
        """Rows (first, last), exclusive, that make up all rows: at most so many entries together, or one row alone."""
        first = 0
        while first < self.n_rows:
            fitting = int(np.searchsorted(self.row_ptr, self.row_ptr[first] + entries, side="right")) - 1
            last = min(max(fitting, first + 1), self.n_rows)
            yield first, last
            first = last


def code_of(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse code of x (B, d_in) as the SAE gives it: acts, idx (B, K) on the CPU.

    K may differ from batch to batch. An entry with act 0 is padding, of any id.
    """
    acts, idx = sae.encode_sparse(x.to(sae.device), mixed=True)
    return acts.cpu(), idx.cpu()


@ambient.plainly(grad=False)
def spool_codes(sae: SAE, batches: Iterable[Located], folder: str | Path, advance: Advance = nothing) -> Spool:
    """Encodes every batch once.

    Args:
        batches: rows with their sequences and positions. Where one batch has none, nothing is known of any.
        folder: where there is room for the code: 8 bytes an entry, and 14 a row.
        advance: is told how many rows more are done.

    Raises:
        InputError: a row or an activation with NaN or inf, or a position that is none.
        OSError: the disk is full.
    """
    with _Writer(sae.config.n_latents, Path(folder)) as writer:
        for batch in ambient.drawn(batches):
            if (bad := first_bad_row(batch.x)) is not None:
                raise InputError(f"row {writer.n_rows + bad}{_where(batch, bad)} holds NaN or inf: leave it out")
            writer.add(batch, *code_of(sae, batch.x))
            advance(len(batch.x))
        return writer.spool()


def _where(batch: Located, row: int) -> str:
    if batch.seq is None or batch.pos is None:
        return ""
    return f" (sequence {int(batch.seq[row])}, position {int(batch.pos[row])})"


def _unnamed(folder: Path) -> IO[bytes]:
    return tempfile.TemporaryFile(dir=folder)


class _Writer:
    """Appends the codes of batches to files without names."""

    def __init__(self, n_latents: int, folder: Path) -> None:
        self.n_latents, self.n_rows = n_latents, 0
        self._open = ExitStack()
        self._files: dict[str, IO[bytes]] = {}
        for name in ("row_ptr", "idx", "acts", "sequence", "position"):
            self._files[name] = self._open.enter_context(_unnamed(folder))
        self._n_entries = 0
        self._write("row_ptr", np.zeros(1, np.int64), np.int64)
        self._n_fired = np.zeros(n_latents, np.int64)
        self._numbers: dict[int, int] = {}
        self._located = True

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What is mapped stays there.
        self._open.close()

    def add(self, batch: Located, acts: Tensor, idx: Tensor) -> None:
        on = acts > 0
        if not bool(acts.isfinite().all()):
            row = int((~acts.isfinite()).any(1).nonzero()[0])
            where = f"row {self.n_rows + row}{_where(batch, row)}"
            raise InputError(
                f"the code of {where} holds NaN or inf: the SAE's weights are damaged, or of another scale"
            )
        ids = idx[on].numpy()
        self._write("row_ptr", self._n_entries + on.sum(1).cumsum(0).numpy(), np.int64)
        self._n_entries += len(ids)
        self._write("idx", ids, np.int32)
        self._write("acts", acts[on].numpy(), np.float32)
        self._n_fired += np.bincount(ids, minlength=self.n_latents)
        self._locate(batch)
        self.n_rows += len(acts)

    def _locate(self, batch: Located) -> None:
        if batch.seq is None or batch.pos is None:
            self._located = False
        if not self._located:
            return
        assert batch.seq is not None
        assert batch.pos is not None
        seq, pos = batch.seq.numpy(), batch.pos.numpy()
        if len(pos) and not 0 <= int(pos.min()) <= int(pos.max()) <= _LONGEST:
            seen = f"{int(pos.min())} to {int(pos.max())}"
            raise InputError(f"positions are {seen}: expected 0 to {_LONGEST}; the shard is damaged")
        found, first, place = np.unique(seq, return_index=True, return_inverse=True)
        numbers = np.empty(len(found), np.int32)
        for i in first.argsort().tolist():
            numbers[i] = self._numbers.setdefault(int(found[i]), len(self._numbers))
        self._write("sequence", numbers[place], np.int32)
        self._write("position", pos, np.uint16)

    def _write(self, name: str, values: np.ndarray, kind: Any) -> None:
        self._files[name].write(np.ascontiguousarray(values, kind).data)

    def spool(self) -> Spool:
        known = self._located
        return Spool(
            n_latents=self.n_latents,
            n_rows=self.n_rows,
            row_ptr=self._mapped("row_ptr", np.int64),
            idx=self._mapped("idx", np.int32),
            acts=self._mapped("acts", np.float32),
            sequence=self._mapped("sequence", np.int32) if known else np.zeros(0, np.int32),
            position=self._mapped("position", np.uint16) if known else np.zeros(0, np.uint16),
            source_sequences=np.fromiter(self._numbers if known else (), np.int64),
            n_fired=self._n_fired,
        )

    def _mapped(self, name: str, kind: Any) -> np.ndarray:
        file = self._files[name]
        file.flush()
        # A file of no bytes cannot be mapped. Copy on write, because torch takes no array that is not to be written.
        return np.asarray(np.memmap(file, kind, "c")) if file.tell() else np.zeros(0, kind)
