"""Where a text is cut into contexts: at the ends of sentences, as people write them in prose, in lists and in code."""

import re
from itertools import accumulate

import numpy as np

# Tokens of a context, at most; a sentence with less than the least is joined to the next one, and so are short lines
# of code or a list.
LONGEST, LEAST, LEAST_OF_LINES = 48, 8, 16
# What a longer sentence is cut to, about, so that the places to choose from are many.
_HANDY = 40

_CLOSERS = "\"'”’»)\\]}*_`"
# A sentence ends with these and a space; with those of scripts that write no space, or have no small letters, at once.
# Each run of signs, of spaces and of lines is gone through once, however long it is.
_END = re.compile(
    rf"(?<![.!?…‼⁇⁈⁉])(?P<sign>[.!?…‼⁇⁈⁉]++)[{_CLOSERS}]*+(?=\s|\Z)"
    rf"|[。！？｡؟۔।॥።]++[」』”’）】》〉{_CLOSERS}]*+|(?P<lines>\n(?:[^\S\n]*+\n)*+)"
)
_LINES = re.compile(r"[^\S\n]*+\n(?:[^\S\n]*+\n)*+")
_WORD_BEFORE = re.compile(r"[^\s(\[{\"'“‘«]*\Z")
# What ends with a full stop inside a sentence, besides single letters and numbers of a list.
_ABBREVIATIONS = set(
    "mr mrs ms dr prof st sr jr rev gen col sgt capt lt gov sen rep hon messrs mme mlle "  # noqa: SIM905
    "vs cf al eg ie e.g i.e viz approx ca resp incl fig figs eq eqs sec ch vol no nos pp p art ed eds ref refs "
    "inc ltd co corp dept est univ assn bros jan feb mar apr jun jul aug sep sept oct nov dec a.m p.m "
    "z.b d.h u.a bzw usw vgl nr str bd m.e p.ex sra dra".split()
)
_NUMBER_OF_LIST = re.compile(r"(?:\A|\n)[^\S\n]*(?:\d{1,3}|[A-Za-z]|[ivxIVX]{1,4})\Z")
# What a line of a list, a quotation or a table begins with.
_ITEM = re.compile(r"\s*(?:[-*•◦▪‣–—>#@|+]|:\w|\d{1,3}[.)]\s|[A-Za-z][.)]\s)")
# A line as long as this goes on in the next one, unless a sign says otherwise.
_WRAPPED = 50
# East Asian scripts, which write no spaces.
_UNSPACED = re.compile("[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")


def cut(pieces: list[str], special: list[bool]) -> list[int]:
    """Where to cut a sequence into contexts of at most LONGEST tokens.

    Args:
        pieces: text of each token (Texts.run).
        special: whether it is a mark of the tokenizer; a text ends before such.

    Returns:
        The place after the last token of each context, ascending; the last is len(pieces).
    """
    stops: list[int] = []
    start = before = 0
    for stop, least in _sentences(pieces, special):
        if stop - start > LONGEST and before > start:
            # A short one before a long one stays by itself.
            stops.append(before)
            start = before
        before = stop
        if stop - start >= least:
            stops += _parts(pieces, special, start, stop)
            start = stop
    if start < len(pieces):
        _add_rest(stops, len(pieces), special)
    return stops


def _add_rest(stops: list[int], end: int, special: list[bool]) -> None:
    """What is left at the end, less than LEAST tokens, goes to the context before it where that is no other text."""
    start = stops[-1] if stops else 0
    first = stops[-2] if len(stops) > 1 else 0
    if stops and end - first <= LONGEST and (not special[start] or all(special[start:])):
        stops[-1] = end
    else:
        stops.append(end)


def _sentences(pieces: list[str], special: list[bool]) -> list[tuple[int, int]]:
    """The places after the tokens that end a sentence, ascending, and how many tokens a context has at least there."""
    n = len(pieces)
    if not n:
        return []
    ends = np.fromiter(accumulate(map(len, pieces)), np.int64, n)
    found = sentence_ends("".join(pieces))
    places = np.searchsorted(ends, [place for place, _ in found]) + 1
    least: dict[int, int] = {}
    for place, (_, is_line) in zip(places.tolist(), found, strict=True):
        least[place] = min(LEAST_OF_LINES if is_line else LEAST, least.get(place, LONGEST))
    # Marks at the end of the sequence begin no other text.
    marks = np.asarray(special, bool)
    texts = np.flatnonzero(marks[1:] & ~marks[:-1]) + 1
    least |= dict.fromkeys((texts[texts < np.flatnonzero(~marks).max(initial=0)]).tolist(), 1)
    least[n] = least.get(n, LEAST)
    return sorted((place, count) for place, count in least.items() if place <= n)


def sentence_ends(text: str) -> list[tuple[int, bool]]:
    """The places in a text after each sentence, with the line ends that follow it, and after each line of a list or of
    code: then with True. A place may be named twice.
    """
    cased = text != text.lower()
    ends = []
    for found in _END.finditer(text):
        lines = found["lines"]
        if lines is None:
            if _is_end(text, found.start(), found.end(), found["sign"], cased):
                ends.append((_after_lines(text, found.end()), False))
        elif lines.count("\n") > 1:
            ends.append((found.end(), False))
        elif _line_is_whole(text, found.start(), found.end()):
            ends.append((found.end(), True))
    return ends


def _after_lines(text: str, place: int) -> int:
    lines = _LINES.match(text, place)
    return lines.end() if lines else place


def _is_end(text: str, start: int, stop: int, sign: str | None, cased: bool) -> bool:
    """Whether ., ! or ? with a space behind it ends a sentence: no abbreviation, and no small letter goes on.

    sign is None for those of other scripts, which end one wherever they are.
    """
    if sign is None:
        return True
    follows = text[stop : stop + 8]
    after = follows.lstrip()[:1]
    if cased and after.islower() and "\n" not in follows[: len(follows) - len(follows.lstrip())]:
        return False
    if sign != ".":
        return True
    before = text[max(start - 24, 0) : start]
    if _NUMBER_OF_LIST.search(before):
        return False
    found = _WORD_BEFORE.search(before)
    word = found[0] if found else ""
    initial = len(word) == 1 and word.isalpha() and word != "I" and not _UNSPACED.match(word)
    return not initial and word.lower() not in _ABBREVIATIONS


def _line_is_whole(text: str, start: int, stop: int) -> bool:
    """Whether a sentence, an item of a list or a line of code ends with the line that ends at `start`."""
    line = text[text.rfind("\n", 0, start) + 1 : start].rstrip()
    after = text[stop : stop + 40]
    last, first = line[-1:], after.lstrip()[:1]
    if line.lstrip().startswith(">>> ") and not after.lstrip().startswith(">>> "):
        # What Python answers belongs to what it was asked.
        return False
    if _ITEM.match(after) or last in {":", ";", "{", "}"} or _UNSPACED.match(last):
        return True
    return not first.islower() and len(line) < _WRAPPED and last not in {",", "-"}


def _parts(pieces: list[str], special: list[bool], start: int, stop: int) -> list[int]:
    """The places after the parts of at most LONGEST tokens that a sentence is cut into, about as long as each other."""
    stops = []
    while stop - start > LONGEST:
        n = stop - start
        parts = -(-n // _HANDY)
        first, last = max(LEAST, n - (parts - 1) * LONGEST), min(LONGEST, n - LEAST)
        middle = start + n / parts
        price = {
            place: _price(pieces, special, place) + abs(place - middle) * parts / n
            for place in range(start + first, start + last + 1)
        }
        start = min(price, key=price.__getitem__)
        stops.append(start)
    return [*stops, stop]


def _price(pieces: list[str], special: list[bool], place: int) -> float:
    """How little one would cut before the token at a place: 0 at a line end, 4 inside a character."""
    before, after = pieces[place - 1], pieces[place]
    if not before and not special[place - 1]:
        return 4.0
    if "\n" in before[len(before.rstrip()) :]:
        return 0.0
    for signs, price in ((";:—–；：", 0.2), (",،、，", 0.3), (')]}"”»」』）', 0.5)):
        if before.rstrip()[-1:] in set(signs):
            return price
    if after[:1].isspace():
        return 0.4 if after.lstrip()[:1] in {"(", "[", "“", "—", "–"} else 0.7
    return _price_inside(before[-1:], after[:1])


def _price_inside(before: str, after: str) -> float:
    """As `_price`, between two characters of which the second is no space."""
    if before.isspace() or _UNSPACED.match(before) or _UNSPACED.match(after):
        return 0.9
    return 2.0 if before.isalnum() and after.isalnum() else 1.2
