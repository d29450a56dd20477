"""Prose, JSON lines, JSON and tables of text, read piece by piece into documents and records."""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from saefast.harvest.records import Record, Unreadable
from saefast.harvest.unpack import DAMAGED, opened

# Longer files are cut into documents at blank lines, so that the held-out share can be whole documents.
DOCUMENT_CHARS = 16_384
# Characters of one record, and of one line of text: what is longer would fill the memory.
LONGEST = 1 << 26
_PIECE = 1 << 20


def prose(file: Path) -> Iterator[str]:
    """Documents of about DOCUMENT_CHARS. Raises UnicodeDecodeError for what is not UTF-8, or holds NUL bytes."""
    with opened(file) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig", newline=None) as stream:
        yield from _blocks(iter(lambda: stream.readline(LONGEST), ""))


def json_lines(file: Path) -> Iterator[Record]:
    """One record a line."""
    with _lenient(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST), ""), start=1):
            place = f"{file} line {number}"
            if line.isspace():
                continue
            if not _is_utf8(line):
                yield place, Unreadable("is not UTF-8 text")
                continue
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets by the thousand
                yield place, Unreadable(f"is not JSON ({_reason(error)})")


def json_values(file: Path) -> Iterator[Record]:
    """A record for each element of the array that the file is, or for each of the values that stand in it.

    What follows a broken one cannot be told apart and is left out. Raises UnicodeDecodeError for what is not UTF-8.
    """
    with opened(file) as packed:
        values = _Values(_decoded(packed))
        end = "]" if values.peek() == "[" else ""
        if end:
            values.take()
        number = 0
        while (first := values.peek()) not in ("", end):
            if end and number and first == "," and values.take() in ("", end):
                continue
            number += 1
            try:
                yield f"{file} record {number}", values.next()
            except (ValueError, RecursionError) as error:
                reason = f"is not JSON ({_reason(error)}), and what follows it is not read"
                yield f"{file} record {number}", Unreadable(reason)
                return
        if first != end:
            yield f"{file} record {number + 1}", Unreadable("is missing: the file ends inside its array")
        elif end and values.take():
            yield f"{file} record {number + 1}", Unreadable("is not read: it follows the array that the file is")


def table(file: Path, delimiter: str) -> Iterator[Record]:
    """A record a row, its fields named by the first row, as Python's csv module reads them."""
    with _lenient(file) as stream:
        header: list[str] | None = None
        for number, row in _rows(stream, delimiter):
            place = f"{file} line {number}"
            if isinstance(row, Unreadable):
                yield place, row
            elif not row:
                continue
            elif header is None:
                header = row
            elif len(row) != len(header):
                yield place, Unreadable(f"has {len(row)} fields, the first row {len(header)}")
            elif not _is_utf8("".join(row)):
                yield place, Unreadable("is not UTF-8 text")
            else:
                yield place, dict(zip(header, row, strict=True))


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_values,
    ".csv": lambda file: table(file, ","),
    ".tsv": lambda file: table(file, "\t"),
}


class _Values:
    """JSON values one after the other from pieces of text, of which no more is held than the longest value takes."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces, self._text, self._at = pieces, "", 0
        self._broken: BaseException | None = None
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self) -> str:
        """Advances past the character that was seen; the next one."""
        self._at += 1
        return self.peek()

    def next(self) -> object:
        """Raises ValueError or RecursionError for what is no JSON value."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                if not self._more():
                    raise
                continue
            if end < len(self._text):
                self._at = end
                return value
            # A number that ends where the piece does may go on in the next one.
            if not self._more():
                self._at = len(self._text)
                return value

    def _more(self) -> bool:
        """Reads on, twice as far each time; False at the end, or where one value is too long.

        Raises what reading raised, once all that came before it is used up.
        """
        if self._broken is not None:
            raise self._broken
        parts, size, wanted = [self._text[self._at :]], 0, max(_PIECE, len(self._text) - self._at)
        if len(parts[0]) > LONGEST:
            return False
        try:
            while size < wanted and (piece := next(self._pieces, "")):
                parts.append(piece)
                size += len(piece)
        except (UnicodeDecodeError, *DAMAGED) as error:
            self._broken = error
        self._text, self._at = "".join(parts), 0
        return size > 0 or self._broken is not None


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Documents of about DOCUMENT_CHARS, ended at a blank line, or at any line where none comes for as long again."""
    parts: list[str] = []
    size = 0
    try:
        for line in lines:
            if "\0" in line:
                raise UnicodeDecodeError("utf-8", b"", 0, 0, "NUL byte")
            # A line without end is cut too.
            for start in range(0, len(line), 2 * DOCUMENT_CHARS):
                parts.append(line[start : start + 2 * DOCUMENT_CHARS])
                size += len(parts[-1])
                if size >= 2 * DOCUMENT_CHARS or (size >= DOCUMENT_CHARS and not line.strip()):
                    yield "".join(parts)
                    parts, size = [], 0
    except DAMAGED:
        # What was read before a packed file broke off is text like any other.
        yield "".join(parts)
        raise
    yield "".join(parts)


def _rows(stream: io.TextIOBase, delimiter: str) -> Iterator[tuple[int, list[str] | Unreadable]]:
    """Rows of a table, each with the number of the line that it ends at."""
    reader = csv.reader(iter(lambda: stream.readline(LONGEST), ""), delimiter=delimiter, strict=True)
    while True:
        # The limit belongs to the whole process, and at first is less than a long document has.
        limit = csv.field_size_limit(LONGEST)
        try:
            row: list[str] | Unreadable = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            row = Unreadable(f"is no row of a table ({error})")
        finally:
            csv.field_size_limit(limit)
        yield reader.line_num, row


def _decoded(packed: Any) -> Iterator[str]:
    """The text in a file, piece by piece as it comes: nothing of what precedes an error is lost."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while data := packed.read1(_PIECE):
        # A piece may end, and begin, inside a character.
        if text := decoder.decode(data):
            yield text
    decoder.decode(b"", final=True)


def _lenient(file: Path) -> io.TextIOWrapper:
    """The file's text, with a lone surrogate for each byte that is not UTF-8: only its line is lost, not the rest."""
    return io.TextIOWrapper(opened(file), encoding="utf-8-sig", errors="surrogateescape", newline=None)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _reason(error: Exception) -> str:
    return getattr(error, "msg", None) or str(error).split(";")[0]
