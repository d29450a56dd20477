"""Token ids as text to read, for every kind of tokenizer: byte-level BPE, sentencepiece, word pieces, whole words."""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from saefast.readable import visible

# The character that a decoder writes for bytes that are no whole character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# How byte-level tokens spell bytes (Radford et al. 2019): these as the character of that number, others from 256 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PLAIN}
_BYTES |= {chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))}
_SPACE = next(sign for sign, byte in _BYTES.items() if byte == ord(" "))
# Halves of characters, which no UTF-8 can say.
_SURROGATES = re.compile("[\ud800-\udfff]")
# How sentencepiece names a byte that is in no token.
_FALLBACK = re.compile("<0x[0-9A-F]{2}>")
# Tokens that a broken character may have: after so many it is shown broken, and a run of such tokens costs no more.
_LONGEST_CHARACTER = 4


class Texts:
    """Token ids as text to read."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._unknown = _unknown(tokenizer)
        self._special = set(tokenizer.all_special_ids) - {self._unknown}
        self._wordpiece = _is_wordpiece(tokenizer)
        self._byte_level = not self._wordpiece and _is_byte_level(tokenizer)
        self._spelled: dict[int, str | bytes] = {}

    def token(self, token: int) -> str:
        """A token by itself; -ize is one that continues a word, \\xe2\\x80 one that is a part of a character."""
        name = self._name(token)
        if self._wordpiece:
            return visible("-" + name[2:] if name.startswith("##") else name)
        text = self._decode([token])
        if _BROKEN in text and all(sign in _BYTES for sign in name):
            return "".join(f"\\x{_BYTES[sign]:02x}" for sign in name)
        # sentencepiece drops a space at the beginning, which only the token's name shows.
        return visible(text.strip()) or repr(text or name.replace("\N{LOWER ONE EIGHTH BLOCK}", " "))

    def n_words(self, tokens: list[int]) -> int:
        """Different words of three letters or more among the tokens; forms of one word are one."""
        words: list[str] = []
        for token in tokens:
            text = self.token(token)
            if sum(map(str.isalpha, text)) >= 3 and not any(same_word(text, word) for word in words):
                words.append(text)
        return len(words)

    def run(self, ids: list[int]) -> list[str]:
        """Texts of consecutive tokens, (n,) as many as ids, that joined are the text they came from.

        That is what the tokenizer itself decodes the whole to, line ends and control characters included (see
        `readable.visible`); word pieces, whose decoder keeps no spaces, read as one would write them. Special tokens
        are empty, and so are those that end inside a character: the one that ends it has all of it. A token that stands
        for what the tokenizer does not know is �. Takes time linear in n.
        """
        if self._wordpiece:
            return self._word_pieces(ids)
        pieces = iter(self._decoded([token for token in ids if token not in self._special]))
        texts = ["" if token in self._special else next(pieces) for token in ids]
        return [
            text[: text.startswith(" ")] + _BROKEN if token == self._unknown else text
            for token, text in zip(ids, texts, strict=True)
        ]

    def continues(self, ids: list[int], texts: list[str], i: int) -> bool:
        """Whether token i of a run stands in the text of the one after it, being a part of a character."""
        return not texts[i] and ids[i] not in self._special and i + 1 < len(ids)

    def is_special(self, token: int) -> bool:
        """Whether a token is a mark of the tokenizer's, such as the one that begins a text, and has no text."""
        return token in self._special

    def _decoded(self, kept: list[int]) -> list[str]:
        """Texts of consecutive tokens without special ones, from what each is by itself where that is the whole text.

        The tokenizer's own decoder has the last word. Most leave out a space that the first token begins with.
        """
        pieces = _joined([self._spelling(token) for token in kept], self._byte_level)
        text, whole = "".join(pieces), self._decode(kept)
        if text == whole:
            return pieces
        if text == " " + whole:
            first = next(place for place, piece in enumerate(pieces) if piece)
            pieces[first] = pieces[first][1:]
            return pieces
        return self._read_on(kept)

    def _spelling(self, token: int) -> str | bytes:
        """A token's text inside a text, or its bytes where they are no whole characters."""
        if token not in self._spelled:
            self._spelled[token] = self._spell(token)
        return self._spelled[token]

    def _spell(self, token: int) -> str | bytes:
        name = self._name(token)
        if self._byte_level:
            if not all(sign in _BYTES for sign in name):
                return name  # added by hand, and spelled as it is
            spelled = bytes(_BYTES[sign] for sign in name)
            return spelled.decode() if _is_whole(spelled) else spelled
        once = self._decode([token])
        if _FALLBACK.fullmatch(name) and once != name:
            return bytes([int(name[3:5], 16)])
        # What a second one adds to the first: a space that it begins with is only seen there.
        return self._decode([token, token])[len(once) :]

    def _read_on(self, kept: list[int]) -> list[str]:
        """What each token adds to the character before it, for decoders that no table of tokens tells all of."""
        pieces: list[str] = []
        start = waiting = 0
        for stop in range(1, len(kept) + 1):
            before, whole = self._decode(kept[start:waiting]), self._decode(kept[start:stop])
            inside = whole.endswith(_BROKEN) and stop < len(kept) and stop - waiting < _LONGEST_CHARACTER
            if inside:
                pieces.append("")
                continue
            pieces.append(whole[len(before) :] if whole.startswith(before) else self._decode(kept[waiting:stop]))
            start, waiting = waiting, stop
        return pieces

    def _decode(self, ids: list[int]) -> str:
        text = str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""
        return _SURROGATES.sub(_BROKEN, text)

    def _name(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def _word_pieces(self, ids: list[int]) -> list[str]:
        texts = ["" if token in self._special else self._word_piece(token) for token in ids]
        return _respaced(texts)

    def _word_piece(self, token: int) -> str:
        if token not in self._spelled:
            name = _BROKEN if token == self._unknown else self._name(token)
            self._spelled[token] = name[2:] if name.startswith("##") else " " + name
        return str(self._spelled[token])


def _unknown(tokenizer: Any) -> int | None:
    """The token for what the tokenizer does not know; None where it is a mark of another meaning too."""
    token = getattr(tokenizer, "unk_token_id", None)
    marks = ("bos", "eos", "pad", "cls", "sep", "mask")
    return None if token in [getattr(tokenizer, f"{mark}_token_id", None) for mark in marks] else token


def _is_wordpiece(tokenizer: Any) -> bool:
    """Whether ## marks what continues a word, as in BERT's vocabulary: its own decoder then takes it away.

    In others ## is text like any other, a heading in Markdown for one.
    """
    marked = next((name for name in tokenizer.get_vocab() if name.startswith("##") and len(name) > 2), None)
    return marked is not None and "##" not in tokenizer.convert_tokens_to_string(["a", marked])


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the names of tokens spell bytes: the decoder then reads the sign for a space as one."""
    spaced = next((name for name in tokenizer.get_vocab() if name.startswith(_SPACE)), None)
    return spaced is not None and _SPACE not in tokenizer.convert_tokens_to_string([spaced])


def _joined(spelled: list[str | bytes], byte_level: bool) -> list[str]:
    """Texts of tokens, given texts and bytes: a character of several tokens stands with the last of them."""
    pieces: list[str] = []
    for are_bytes, run in groupby(spelled, lambda part: isinstance(part, bytes)):
        if are_bytes:
            pieces += _characters([part for part in run if isinstance(part, bytes)], byte_level)
        else:
            pieces += [part for part in run if isinstance(part, str)]
    return pieces


def _characters(parts: list[bytes], byte_level: bool) -> list[str]:
    """Bytes of consecutive tokens as characters, each with the token that ends it.

    Bytes that are none are � for as many as could begin one, as byte-level decoders write it; byte fallback writes one
    for each byte of a run that is not whole.
    """
    whole = b"".join(parts)
    if not byte_level and not _is_whole(whole):
        return [_BROKEN * len(part) for part in parts]
    characters = _ended(whole)
    pieces: list[str] = []
    stop, character, end = 0, *next(characters)
    for part in parts:
        stop += len(part)
        piece = ""
        while end <= stop:
            piece += character
            character, end = next(characters, ("", len(whole) + 1))
        pieces.append(piece)
    return pieces


def _is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _ended(whole: bytes) -> Iterator[tuple[str, int]]:
    """The characters of UTF-8, and the byte after each; � where it is none."""
    start = 0
    while start < len(whole):
        try:
            good, broken = whole[start:].decode(), None
        except UnicodeDecodeError as error:
            good, broken = whole[start : start + error.start].decode(), start + error.end
        for character in good:
            start += len(character.encode())
            yield character, start
        if broken is not None:
            start = broken
            yield _BROKEN, start


def same_word(a: str, b: str) -> bool:
    """Forms of one word, roughly: they begin with the same three letters."""
    a, b = a.strip().lower().lstrip("-"), b.strip().lower().lstrip("-")
    return a == b or (min(len(a), len(b)) >= 3 and a[:3] == b[:3])


# Signs with no space before them, and with none after; a lone quote could be either, except in don't and the like.
_CLOSING, _OPENING = set(".,;:!?)]}%_-/"), set("([{_-/")
_AFTER_APOSTROPHE = {"s", "t", "re", "ve", "ll", "d", "m"}


def _respaced(pieces: list[str]) -> list[str]:
    """Pieces that all begin with a space, without the spaces that nobody would write."""
    bare = [piece.strip() for piece in pieces]
    for i, sign in enumerate(bare):
        apostrophe = sign == "'" and i + 1 < len(bare) and bare[i + 1] in _AFTER_APOSTROPHE
        before = bare[i - 1] if i else ""
        short = before == "'" and sign in _AFTER_APOSTROPHE
        number = i > 1 and bare[i - 2].isdigit() and _goes_on(before, sign)
        if sign in _CLOSING or before in _OPENING or apostrophe or short or number:
            pieces[i] = pieces[i].lstrip()
    return pieces


def _goes_on(sign: str, digits: str) -> bool:
    """Whether a number goes on after a sign: 3.5, 12:30 and 1,000, but not 5, 6."""
    return digits.isdigit() and (sign in {".", ":"} or (sign == "," and len(digits) == 3))
