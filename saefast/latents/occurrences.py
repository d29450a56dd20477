"""Where a word or phrase stands in the contexts of latents.db: in any letters' case, as whole words where it does."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from saefast.latents.database import LatentsDB
from saefast.latents.near_duplicates import mixed

# Contexts with it that are kept, and contexts that are read for them, at most.
MOST_KEPT, MOST_READ = 300, 1500
# Contexts read at a time.
_AT_A_TIME = 300
# The full-text index is of three characters in a row.
_SHORTEST = 3
# Words of a long query that the index is asked for; all of them are looked for after it.
_MOST_TERMS = 8
# Scripts that write no spaces between words, in which any place is as good as the next.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f"
# What a word goes on with: letters, numbers, and the accents and vowel signs of them.
_LETTER = rf"[^\W_{_UNSPACED}]|[\u0300-\u036f\u0900-\u0dff]"


class Occurrence(NamedTuple):
    """A context with the spans of it that are the words, as places in the context: first, and after the last."""

    context: int
    sequence: int
    start: int
    text: str
    lengths: np.ndarray
    spans: list[tuple[int, int]]


class Occurrences(NamedTuple):
    """Contexts with the words, in an order that has nothing to do with the text's: any first ones are a fair sample.

    n_candidates: contexts that may hold them, of which n_read were read. whole: whether they are whole words there.
    """

    found: list[Occurrence]
    n_candidates: int
    n_read: int
    whole: bool

    @property
    def n_contexts(self) -> int:
        """Contexts that hold them, of all; estimated where not all candidates were read."""
        return round(len(self.found) * self.n_candidates / max(self.n_read, 1))


def occurrences(db: LatentsDB, words: list[str]) -> Occurrences:
    """Contexts that hold words one after the other; where none has whole words, those with them inside of words.

    Args:
        words: not empty, without spaces and without characters that UTF-8 cannot say.
    """
    candidates = _candidates(db, words)
    # The same order whenever it is asked for.
    candidates = candidates[np.argsort(mixed(candidates.astype(np.uint64)), kind="stable")]
    patterns = pattern(words, whole=True), pattern(words, whole=False)
    lines: tuple[list[_Line], list[_Line]] = ([], [])
    n_read = 0
    for n_read, line in enumerate(_lines(db, candidates[:MOST_READ].tolist()), 1):  # noqa: B007
        for wanted, found in zip(patterns, lines, strict=True):
            if len(found) < MOST_KEPT and wanted.search(line[3]):
                found.append(line)
        if len(lines[0]) == MOST_KEPT:
            break
    whole = bool(lines[0])
    # Of those inside of words enough may have been found before all were read.
    wanted, found = (patterns[0], lines[0]) if whole else (patterns[1], lines[1])
    if len(found) == MOST_KEPT and not whole:
        n_read = candidates.tolist().index(found[-1][0]) + 1
    return Occurrences([_occurrence(line, wanted) for line in found], len(candidates), n_read, whole)


def pattern(words: Sequence[str], whole: bool) -> re.Pattern[str]:
    """What finds words with any spaces between them; whole: with no letter before and after."""
    inner = r"\s+".join(map(re.escape, words))
    if whole:
        letter = re.compile(_LETTER)
        before = f"(?<!{_LETTER})" if letter.match(words[0][0]) else ""
        after = f"(?!{_LETTER})" if letter.match(words[-1][-1]) else ""
        inner = f"{before}{inner}{after}"
    return re.compile(inner, re.IGNORECASE)


def fts_query(words: Sequence[str]) -> str:
    """What asks a trigram index for texts with all of some words, or "" where all are too short for it."""
    terms = sorted((word for word in words if len(word) >= _SHORTEST), key=len, reverse=True)[:_MOST_TERMS]
    return " AND ".join(map(_quoted, dict.fromkeys(terms)))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _candidates(db: LatentsDB, words: list[str]) -> np.ndarray:
    """(n,) int64 contexts that may hold the words."""
    asked = fts_query(words)
    found = _matching(db, asked) if asked else _scanned(db, words)
    if 1 < len(words) <= _MOST_TERMS and len(found) > MOST_READ and (as_written := _matching(db, _written(words))).size:
        # Words that are everywhere: all together they are in fewer places.
        return as_written
    return found


def _written(words: list[str]) -> str:
    """What asks for words with a space between any two, or a line end between two of them."""
    gaps = [[" "] * (len(words) - 1) for _ in words]
    for place, line in enumerate(gaps[1:]):
        line[place] = "\n"
    return " OR ".join(
        _quoted("".join(part for pair in zip(words, [*line, ""], strict=True) for part in pair)) for line in gaps
    )


def _matching(db: LatentsDB, asked: str) -> np.ndarray:
    return _column(db.query("SELECT rowid FROM context_search WHERE context_search MATCH ?", (asked,)))


def _scanned(db: LatentsDB, words: list[str]) -> np.ndarray:
    """Contexts with all of some short words, which no index knows."""
    terms = list(dict.fromkeys(words))[:_MOST_TERMS]
    clauses: list[str] = []
    values: list[str] = []
    for term in terms:
        # LIKE knows both cases of a to z alone.
        forms = [term] if term.isascii() else list(dict.fromkeys([term, term.lower(), term.upper(), term.capitalize()]))
        clauses.append("(" + " OR ".join(["text LIKE ? ESCAPE '\\'"] * len(forms)) + ")")
        values += ["%" + re.sub(r"([\\%_])", r"\\\1", form) + "%" for form in forms]
    return _column(db.query(f"SELECT context FROM contexts WHERE {' AND '.join(clauses)}", values))


def _column(rows: list[tuple[int]]) -> np.ndarray:
    return np.fromiter((row[0] for row in rows), np.int64, len(rows))


_Line = tuple[int, int, int, str, bytes]


def _lines(db: LatentsDB, contexts: list[int]) -> Iterator[_Line]:
    """context, sequence, start, text and lengths of some contexts, in their order."""
    for first in range(0, len(contexts), _AT_A_TIME):
        part = contexts[first : first + _AT_A_TIME]
        marks = ", ".join("?" * len(part))
        rows = db.query(
            f"SELECT context, sequence, start, text, lengths FROM contexts WHERE context IN ({marks})", part
        )
        found = {row[0]: row for row in rows}
        yield from (found[context] for context in part if context in found)


def _occurrence(line: _Line, wanted: re.Pattern[str]) -> Occurrence:
    context, sequence, start, text, lengths = line
    sizes = np.frombuffer(lengths, "<u2").astype(np.int64)
    spans = [match.span() for match in wanted.finditer(text)]
    return Occurrence(context, sequence, start, text, sizes, _positions(text, sizes, spans))


def _positions(text: str, lengths: np.ndarray, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of characters as spans of positions in the context."""
    ends = lengths.cumsum()
    firsts = np.searchsorted(ends, [start for start, _ in spans], side="right").tolist()
    lasts = np.searchsorted(ends, [stop for _, stop in spans], side="left").tolist()
    found = []
    for (start, _), first, last in zip(spans, firsts, lasts, strict=True):
        # The tokens before that are a part of its first character, whose text is with the last of them.
        while first and not lengths[first - 1] and text[start] > "\x7f" and ends[first - 1] == start:
            first -= 1
        found.append((first, last + 1))
    return found
