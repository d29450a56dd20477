"""Reads latents.db: a latent with its tokens, contexts and relatives, pages of latents, sequences with their codes.

Needs sqlite3 and NumPy alone, so that a page is served without waiting for torch. May be read from several threads.

`LatentsDB.meta` has these names:

    n_latents, n_rows, n_sequences    sizes; n_sequences is 0 where rows are of no known sequence
    kind        text, images, audio or another kind of input; rows: nothing but rows is known
    unit        what a row is: tokens, patches, frames, positions or rows
    l0          latents that fire on a row, on average
    sae         digest: sha256 of all tensors, of those before it too where it is a residual SAE; architecture, d_in,
                d_out, k; hook and model: their names; path: of the folder that it lay in
    rows        source: in words; data: the text, or a path; folder: of the harvest, or null; rows: how many were read;
                available: how many there were; digest: by which the same rows are known
    score       how latents were ranked, in sentences; null where rows have no tokens
    contexts    top, intervals, each: how many examples a latent has at most; why: why there are none, or null
    logits      what: "logit", or "embedding" for cosines with input embeddings; null where there are none, and why;
                where: in words, which of several hooks is meant, "" of one
    map         method: "umap" or "pca"; variance: the share that two directions of a PCA hold, null of UMAP
    clusters    the name of each, "" where no word is its own
    tokenizer   where it was loaded from; null where rows are of no text
    grid, images    of images alone: see images.write_images
    built, seconds  when, ISO 8601 in UTC, and how long it took
"""

import functools
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, TypeVar

import numpy as np

from saefast.errors import InputError
from saefast.latents.schema import BINS, UNREADABLE, connect

Sort = Literal["telling", "latent", "density", "mean_act", "max_act", "score"]
LONGEST_LABEL = 1000


class Latent(NamedTuple):
    """A row of the table `latents`, and what a person has called it ("" where nobody has)."""

    latent: int
    n_fired: int
    density: float
    mean_act: float
    max_act: float
    score: float | None
    dead: bool
    dense: bool
    title: str
    label: str


class TokenShare(NamedTuple):
    token: int
    text: str
    share: float
    covered: float
    own: bool


class LogitWeight(NamedTuple):
    token: int
    text: str
    value: float


class Relative(NamedTuple):
    """Another latent: value is the cosine of decoder rows, or the lift of firing together on n rows."""

    latent: int
    title: str
    label: str
    value: float
    n: int | None


class Context(NamedTuple):
    """A stretch of a sequence. pieces: the text of each position; joined, they are the text."""

    context: int
    sequence: int
    start: int
    stop: int
    pieces: list[str]


class Example(NamedTuple):
    """A context that a latent fires in. acts: (stop - start,) float32, the latent's activation at each position.

    peak: place of the strongest in the context.
    """

    part: int
    act: float
    peak: int
    acts: np.ndarray
    context: Context


class SequenceRow(NamedTuple):
    """tokens: (n,) int32, empty where rows are of no text."""

    sequence: int
    source_sequence: int
    name: str | None
    tokens: np.ndarray
    n: int


class Codes(NamedTuple):
    """The sparse code of a sequence's rows, sorted by latent and then position: (entries,) int32, uint16, float32."""

    latents: np.ndarray
    positions: np.ndarray
    acts: np.ndarray

    def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and activations of one latent."""
        first, last = np.searchsorted(self.latents, [latent, latent + 1])
        return self.positions[first:last], self.acts[first:last]


_CONTEXT = "SELECT context, sequence, start, stop, text, lengths FROM contexts"
_LATENT = "l.latent, n_fired, density, mean_act, max_act, score, dead, dense, title, coalesce(labels.text, '')"
_FROM = "FROM latents l LEFT JOIN labels ON labels.latent = l.latent"
_ALL = "FROM latents l"
_TELLING = "FROM telling JOIN latents l ON l.latent = telling.latent"
_SORTS: dict[str, str] = {name: f"l.{name}" for name in ("latent", "density", "mean_act", "max_act", "score")}


P = ParamSpec("P")
T = TypeVar("T")
Method = Callable[Concatenate["LatentsDB", P], T]


def _reads(method: Method[P, T]) -> Method[P, T]:
    """Says so where what is read cannot be: the file is SQLite's, and what it holds was altered."""

    @functools.wraps(method)
    def reading(self: "LatentsDB", /, *args: P.args, **more: P.kwargs) -> T:
        try:
            return method(self, *args, **more)
        except InputError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self.damaged(error) from None

    return reading


class LatentsDB:
    """latents.db, open for reading; labels can be written.

    Attributes:
        path: of the file. n_latents.
        meta: what it is of; the names are above.

    Raises:
        InputError: see `schema.connect`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._threads = threading.local()
        found = self.query("SELECT name, value FROM meta")
        try:
            self.meta: dict[str, Any] = {name: json.loads(value) for name, value in found}
            self.n_latents = int(self.meta["n_latents"])
        except (LookupError, TypeError, ValueError) as error:
            raise self.damaged(error) from None

    def damaged(self, error: Exception) -> InputError:
        """What is said of a file that SQLite reads and that does not hold what it should."""
        return InputError(f"{self.path} is damaged ({type(error).__name__}: {error}): saefast features makes it anew")

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a statement that reads."""
        if not hasattr(self._threads, "connection"):
            self._threads.connection = connect(self.path)
        try:
            rows: list[tuple[Any, ...]] = self._threads.connection.execute(sql, values).fetchall()
        except UNREADABLE as error:
            raise InputError(f"{self.path} cannot be read ({error}): saefast features makes it anew") from None
        return rows

    @_reads
    def latent(self, latent: int) -> Latent:
        """Raises InputError for one that is not there."""
        known = 0 <= latent < self.n_latents
        rows = self.query(f"SELECT {_LATENT} {_FROM} WHERE l.latent = ?", (latent,)) if known else []
        if not rows:
            raise InputError(f"there is no latent {latent}: expected 0 to {self.n_latents - 1}")
        return _latent(rows[0])

    @_reads
    def latents(self, latents: Sequence[int]) -> list[Latent]:
        """Some latents, in the order asked for; those that are not there are left out."""
        marks = ", ".join("?" * len(latents))
        rows = self.query(f"SELECT {_LATENT} {_FROM} WHERE l.latent IN ({marks})", list(latents))
        found = {row[0]: _latent(row) for row in rows}
        return [found[latent] for latent in latents if latent in found]

    @_reads
    def page(
        self,
        sort: Sort = "score",
        descending: bool = True,
        offset: int = 0,
        limit: int = 50,
        *,
        dead: bool | None = None,
        dense: bool | None = None,
        labelled: bool = False,
        within: Mapping[Sort, tuple[float, float]] | None = None,
    ) -> tuple[list[Latent], int]:
        """Some latents in an order, and how many there are in all.

        Args:
            sort: by which column; of equals the lower number comes first, and latents with none there (score without
                tokens) come last. "telling" has the most telling ones first, as `telling`, then all others by score.
            descending: False is the same list backwards.
            dead, dense: only those that are, or are not. labelled: only those with a label.
            within: only those whose values lie from the first to the second, both included, of these columns.
        """
        where, values = _where(dead, dense, labelled, within or {})
        (total,) = self.query(f"SELECT count(*) {_ALL} {where}", values)[0]
        ids: list[int] = []
        for (source, filters, order), size in self._parts(sort, descending, where, values, int(total)):
            missing = limit - len(ids)
            if offset < size and missing > 0:
                # Only numbers, so that what comes before the page is passed over in an index.
                sql = f"SELECT l.latent {source} {filters} ORDER BY {order} LIMIT ? OFFSET ?"
                ids += [latent for (latent,) in self.query(sql, [*values, missing, max(offset, 0)])]
            offset -= size
        return self.latents(ids), int(total)

    def _parts(
        self, sort: Sort, descending: bool, where: str, values: list[Any], total: int
    ) -> list[tuple[tuple[str, str, str], int]]:
        """FROM, WHERE and ORDER BY of what follows each other on pages, and how many latents each has."""
        direction, back = ("DESC", "ASC") if descending else ("ASC", "DESC")
        if sort != "telling":
            order = f"{_SORTS[sort]} {direction}" + ("" if sort == "latent" else f", l.latent {back}")
            return [((_ALL, where, order), total)]
        (n,) = self.query(f"SELECT count(*) {_TELLING} {where}", values)[0]
        rest = f"{where} AND l.latent NOT IN (SELECT latent FROM telling)"
        parts = [
            ((_TELLING, where, f"rank {back}"), int(n)),
            ((_ALL, rest, f"score {direction}, l.latent {back}"), total - int(n)),
        ]
        return parts if descending else parts[::-1]

    @_reads
    def telling(self, n: int | None = None) -> list[int]:
        """The most telling latents, best first: each of other tokens than those before it. At most n, None is all."""
        return [
            latent
            for (latent,) in self.query("SELECT latent FROM telling ORDER BY rank LIMIT ?", (-1 if n is None else n,))
        ]

    @_reads
    def histogram(self, latent: int) -> np.ndarray:
        """(BINS,) int32 firings by activation, bins of equal width from 0 to the largest; zeros for a dead latent."""
        rows = self.query("SELECT counts FROM histograms WHERE latent = ?", (latent,))
        return np.frombuffer(rows[0][0], "<i4") if rows else np.zeros(BINS, np.int32)

    @_reads
    def tokens_of(self, latent: int) -> list[TokenShare]:
        """The tokens with the most activation of a latent."""
        rows = self.query(
            "SELECT token, text, share, covered, own FROM latent_tokens JOIN tokens USING (token) "
            "WHERE latent = ? ORDER BY rank",
            (latent,),
        )
        return [TokenShare(token, text, share, covered, bool(own)) for token, text, share, covered, own in rows]

    @_reads
    def logit_weights(self, latent: int) -> tuple[list[LogitWeight], list[LogitWeight]]:
        """Tokens that the latent raises most and lowers most, the most first; see meta["logits"] for what is meant."""
        sql = (
            "SELECT token, text, value FROM logit_weights JOIN tokens USING (token) "
            "WHERE latent = ? AND side = ? ORDER BY rank"
        )
        raised, lowered = ([LogitWeight(*row) for row in self.query(sql, (latent, side))] for side in (1, -1))
        return raised, lowered

    def neighbours(self, latent: int) -> list[Relative]:
        """The latents with the most similar decoder rows."""
        return self._relatives("neighbours", "cosine, NULL", latent)

    def cofiring(self, latent: int) -> list[Relative]:
        """Latents that fire on the same rows."""
        return self._relatives("cofiring", "lift, n", latent)

    @_reads
    def _relatives(self, table: str, columns: str, latent: int) -> list[Relative]:
        rows = self.query(
            f"SELECT other, title, coalesce(labels.text, ''), {columns} "
            f"FROM {table} t JOIN latents l ON l.latent = t.other LEFT JOIN labels ON labels.latent = t.other "
            "WHERE t.latent = ? ORDER BY rank",
            (latent,),
        )
        return [Relative(*row) for row in rows]

    @_reads
    def examples(self, latent: int, part: int | None = None) -> list[Example]:
        """Contexts that a latent fires in, the strongest first and then by interval; one part alone where asked."""
        chosen, values = ("AND part = ?", (latent, part)) if part is not None else ("", (latent,))
        rows = self.query(
            f"SELECT part, act, position, context FROM examples WHERE latent = ? {chosen} ORDER BY part, rank", values
        )
        contexts = {number: self.context(number) for _, _, _, number in rows}
        codes = {sequence: self.codes(sequence) for sequence in {c.sequence for c in contexts.values()}}
        return [
            Example(part, act, position - (c := contexts[number]).start, acts_in(c, codes[c.sequence], latent), c)
            for part, act, position, number in rows
        ]

    @_reads
    def context(self, context: int) -> Context:
        rows = self.query(
            "SELECT context, sequence, start, stop, text, lengths FROM contexts WHERE context = ?", (context,)
        )
        if not rows:
            raise InputError(f"{self.path} has no context {context}")
        return _context(rows[0])

    @_reads
    def contexts_of(self, sequence: int) -> list[Context]:
        """All of a sequence, end to end."""
        rows = self.query(
            "SELECT context, sequence, start, stop, text, lengths FROM contexts WHERE sequence = ? ORDER BY start",
            (sequence,),
        )
        return [_context(row) for row in rows]

    def beside(self, context: Context) -> tuple[Context | None, Context | None]:
        """The contexts before and after one in its sequence; None where it is the first or last."""
        order = ("start < ? ORDER BY start DESC LIMIT 1", context.start), ("start = ?", context.stop)
        found = [
            self.query(f"{_CONTEXT} WHERE sequence = ? AND {where}", (context.sequence, at)) for where, at in order
        ]
        before, after = (_context(rows[0]) if rows else None for rows in found)
        return before, after

    @_reads
    def sequence(self, sequence: int) -> SequenceRow:
        rows = self.query(
            "SELECT sequence, source_sequence, name, tokens, n FROM sequences WHERE sequence = ?", (sequence,)
        )
        if not rows:
            raise InputError(f"{self.path} has no sequence {sequence}")
        number, source, name, tokens, n = rows[0]
        return SequenceRow(number, source, name, np.frombuffer(tokens, "<i4"), n)

    @_reads
    def codes(self, sequence: int) -> Codes:
        rows = self.query("SELECT latents, positions, acts FROM codes WHERE sequence = ?", (sequence,))
        if not rows:
            raise InputError(f"{self.path} has no sequence {sequence}")
        return _codes(*rows[0])

    def all_codes(self) -> Iterator[tuple[SequenceRow, Codes]]:
        """Every sequence with its code, in order, one at a time in memory."""
        with closing(connect(self.path)) as connection:
            try:
                for sequence, source, name, tokens, n, *columns in connection.execute(
                    "SELECT s.sequence, source_sequence, name, tokens, n, latents, positions, acts "
                    "FROM sequences s JOIN codes USING (sequence) ORDER BY s.sequence"
                ):
                    row = SequenceRow(sequence, source, name, np.frombuffer(tokens, "<i4"), n)
                    codes = _codes(*columns)
                    yield row, codes
            except UNREADABLE as error:
                raise self.damaged(error) from None

    @_reads
    def image(self, sequence: int) -> tuple[str, bytes] | None:
        """Type and bytes of a sequence's image; None where there is none."""
        rows = self.query("SELECT mime, data FROM images WHERE sequence = ?", (sequence,))
        return (rows[0][0], rows[0][1]) if rows else None

    @_reads
    def array(self, name: str) -> np.ndarray | None:
        """A column over all latents; None where the file has none of that name."""
        rows = self.query("SELECT dtype, shape, data FROM arrays WHERE name = ?", (name,))
        if not rows:
            return None
        dtype, shape, data = rows[0]
        return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(json.loads(shape))

    @_reads
    def label_of(self, latent: int) -> tuple[str, str, bool] | None:
        """A latent's label: text, when it was written, and whether it was written for these very weights."""
        rows = self.query("SELECT text, written, sae FROM labels WHERE latent = ?", (latent,))
        return (rows[0][0], rows[0][1], rows[0][2] == self.meta["sae"]["digest"]) if rows else None

    def write_label(self, latent: int, text: str) -> None:
        """Sets what a latent is called; "" takes it away.

        Raises:
            InputError: no such latent, a label over LONGEST_LABEL characters, or a file that cannot be written.
        """
        self.latent(latent)
        text = text.strip()
        if len(text) > LONGEST_LABEL:
            raise InputError(f"the label has {len(text)} characters: expected at most {LONGEST_LABEL}")
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            with closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
                connection.execute("DELETE FROM labels WHERE latent = ?", (latent,))
                if text:
                    row = (latent, text, now, self.meta["sae"]["digest"])
                    connection.execute("INSERT INTO labels VALUES (?, ?, ?, ?)", row)
        except sqlite3.OperationalError as error:
            raise InputError(f"the label cannot be written to {self.path}: {error}") from None


def acts_in(context: Context, codes: Codes, latent: int) -> np.ndarray:
    """(stop - start,) float32: a latent's activation at each position of a context."""
    acts = np.zeros(context.stop - context.start, np.float32)
    positions, values = codes.of(latent)
    inside = (positions >= context.start) & (positions < context.stop)
    acts[positions[inside].astype(np.int64) - context.start] = values[inside]
    return acts


def _latent(row: tuple[Any, ...]) -> Latent:
    latent, n_fired, density, mean_act, max_act, score, dead, dense, title, label = row
    return Latent(latent, n_fired, density, mean_act, max_act, score, bool(dead), bool(dense), title, label)


def _context(row: tuple[Any, ...]) -> Context:
    context, sequence, start, stop, text, lengths = row
    ends = np.frombuffer(lengths, "<u2").cumsum(dtype=np.int64).tolist()
    pieces = [text[first:last] for first, last in zip([0, *ends], ends, strict=False)]
    return Context(context, sequence, start, stop, pieces)


def _codes(latents: bytes, positions: bytes, acts: bytes) -> Codes:
    return Codes(np.frombuffer(latents, "<i4"), np.frombuffer(positions, "<u2"), np.frombuffer(acts, "<f4"))


def _where(
    dead: bool | None, dense: bool | None, labelled: bool, within: Mapping[Sort, tuple[float, float]]
) -> tuple[str, list[Any]]:
    """A WHERE clause and its values."""
    terms: list[str] = ["true"]
    values: list[Any] = []
    for name, wanted in (("dead", dead), ("dense", dense)):
        if wanted is not None:
            terms.append(f"{name} = ?")
            values.append(int(wanted))
    if labelled:
        terms.append("l.latent IN (SELECT latent FROM labels)")
    for column, bounds in within.items():
        # With the plus, the index of the order is read, and not that of this column and then sorted.
        terms.append(f"+{_SORTS[column]} BETWEEN ? AND ?")
        values.extend(bounds)
    return f"WHERE {' AND '.join(terms)}", values
