"""Sequences cut into contexts, in latents.db: sentences of texts, and all of an image or of what else has no words."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from saefast.data.mapped_source import MappedSource
from saefast.harvest.token_text import Texts
from saefast.latents.near_duplicates import Words, leaders
from saefast.latents.sentences import cut
from saefast.latents.spool import Spool
from saefast.latents.steps import Advance, nothing

# Sequences written at a time.
_AT_A_TIME = 256


@dataclass(frozen=True)
class Contexts:
    """Where the contexts lie, numbered from 0 in the order of sequences and in them, as in the table `contexts`.

    Attributes:
        sequence, start: (n,) int32: the sequence of each, and its first position there.
        fingerprint: (n,) int64, the same for near-duplicates: contexts that differ in a word or in numbers.
    """

    sequence: np.ndarray
    start: np.ndarray
    fingerprint: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def of(self, sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
        """(n,) int64: the contexts that positions of sequences are in. Both (n,) of whole numbers."""
        begins = _place(self.sequence, self.start)
        return np.asarray(np.searchsorted(begins, _place(sequence, position), side="right") - 1)


def _place(sequence: np.ndarray, position: np.ndarray) -> np.ndarray:
    return (sequence.astype(np.int64) << 16) + position.astype(np.int64)


def write_sequences(
    db: sqlite3.Connection, spool: Spool, source: MappedSource, texts: Texts | None, advance: Advance = nothing
) -> Contexts:
    """Fills the tables `sequences` and `contexts` with the sequences of a spool.

    Args:
        source: what the rows are of.
        texts: how its tokens read; without them contexts of a text have no text. Not asked for where rows are of no
            text, for which each sequence is one context.
        advance: is told how many rows more are done.

    Raises:
        InputError: the tokens or names of the source are damaged.
    """
    rows = np.bincount(spool.sequence, minlength=len(spool.source_sequences))
    is_text = source.folder is not None and source.folder.kind == "text"
    written = _Written()
    sequences = _texts(spool, source, texts, written) if is_text else _items(spool, source, written)
    waiting: list[tuple[int, int, str | None, bytes, int]] = []
    for line in sequences:
        waiting.append(line)
        if len(waiting) == _AT_A_TIME or line[0] == len(rows) - 1:
            db.executemany("INSERT INTO sequences VALUES (?, ?, ?, ?, ?)", waiting)
            db.executemany("INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?)", written.taken())
            advance(int(rows[waiting[0][0] : line[0] + 1].sum()))
            waiting = []
    return written.contexts()


class _Written:
    """Contexts on their way into the database, and what is kept of them."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, int, int, int, str, bytes]] = []
        self._places: list[tuple[int, int]] = []
        self._words = Words()
        # Numbers of all words so far, and how many each context has; of contexts without words none.
        self._numbers: list[np.ndarray] = []

    def add(self, sequence: int, start: int, pieces: list[str], words: list[int] | None = None) -> None:
        """words: in place of those of the text."""
        text = "".join(pieces)
        lengths = np.fromiter(map(len, pieces), "<u2", len(pieces)).tobytes()
        self._lines.append((len(self._places), sequence, start, start + len(pieces), text, lengths))
        self._places.append((sequence, start))
        self._numbers.append(np.array(self._words.of(text) if words is None else words, np.uint64))

    def taken(self) -> list[tuple[int, int, int, int, str, bytes]]:
        lines, self._lines = self._lines, []
        return lines

    def contexts(self) -> Contexts:
        places = np.array(self._places, np.int32).reshape(-1, 2)
        first = np.cumsum([0, *map(len, self._numbers)])
        words = np.concatenate(self._numbers) if self._numbers else np.zeros(0, np.uint64)
        return Contexts(places[:, 0], places[:, 1], leaders(words, first))


Line = tuple[int, int, str | None, bytes, int]


def _texts(spool: Spool, source: MappedSource, texts: Texts | None, written: _Written) -> Iterator[Line]:
    """Rows of the table `sequences`, and the contexts of each to `written`."""
    for sequence, number in enumerate(spool.source_sequences.tolist()):
        tokens = source.tokens(number).numpy()
        ids = tokens.tolist()
        pieces = texts.run(ids) if texts else [""] * len(ids)
        special = [texts.is_special(token) for token in ids] if texts else [False] * len(ids)
        for start, stop in pairwise([0, *cut(pieces, special)]):
            written.add(sequence, start, pieces[start:stop], None if texts else ids[start:stop])
        yield sequence, number, None, tokens.astype("<i4").tobytes(), len(ids)


def _items(spool: Spool, source: MappedSource, written: _Written) -> Iterator[Line]:
    """As `_texts`, of images and whatever else: as many positions as have been seen, and a name where it has one."""
    n = np.zeros(len(spool.source_sequences), np.int64)
    np.maximum.at(n, spool.sequence, spool.position.astype(np.int64) + 1)
    for sequence, (number, length) in enumerate(zip(spool.source_sequences.tolist(), n.tolist(), strict=True)):
        # A number of its own, so that it is no near-duplicate of another.
        written.add(sequence, 0, [""] * length, [sequence])
        name = source.folder.item(number) if source.folder else None
        yield sequence, number, _storable(name), b"", length


def _storable(name: str | None) -> str | None:
    """A file's name as UTF-8, in which broken characters are �."""
    return None if name is None else name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
