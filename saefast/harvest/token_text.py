"""Token ids as text to read, for every kind of tokenizer: byte-level BPE, sentencepiece, word pieces, whole words."""

from typing import Any

# The character that a decoder writes for bytes that are no whole character.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# How byte-level tokens spell bytes (Radford et al. 2019): these as the character of that number, others from 256 on.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PLAIN}
_BYTES |= {chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))}


class Texts:
    """Token ids as text to read."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._wordpiece = _is_wordpiece(tokenizer)

    def token(self, token: int) -> str:
        """A token by itself; -ize is one that continues a word, \\xe2\\x80 one that is a part of a character."""
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._wordpiece:
            return "-" + name[2:] if name.startswith("##") else name
        text = self._decode([token])
        if _BROKEN in text and all(sign in _BYTES for sign in name):
            return "".join(f"\\x{_BYTES[sign]:02x}" for sign in name)
        # sentencepiece drops a space at the beginning, which only the token's name shows.
        return text.strip() or repr(text or name.replace("\N{LOWER ONE EIGHTH BLOCK}", " "))

    def n_words(self, tokens: list[int]) -> int:
        """Different words of three letters or more among the tokens; forms of one word are one."""
        words: list[str] = []
        for token in tokens:
            text = self.token(token)
            if sum(map(str.isalpha, text)) >= 3 and not any(same_word(text, word) for word in words):
                words.append(text)
        return len(words)

    def run(self, ids: list[int]) -> list[str]:
        """Texts of consecutive tokens that, joined, read as the text they came from.

        Special tokens are empty, and so are those that end inside a character: the one that ends it has all of it.
        """
        return self._word_pieces(ids) if self._wordpiece else self._decoded(ids)

    def continues(self, ids: list[int], texts: list[str], i: int) -> bool:
        """Whether token i of a run stands in the text of the one after it, being a part of a character."""
        return not texts[i] and ids[i] not in self._special and i + 1 < len(ids)

    def _decoded(self, ids: list[int]) -> list[str]:
        """What each token adds to the text of those before it: spaces depend on the neighbours."""
        kept: list[int] = []
        shown, pieces = "", []
        for place, token in enumerate(ids):
            if token in self._special:
                pieces.append("")
                continue
            kept.append(token)
            whole = self._decode(kept)
            if whole.endswith(_BROKEN) and place + 1 < len(ids):
                pieces.append("")
                continue
            pieces.append(whole[len(shown) :] if whole.startswith(shown) else self._decode([token]))
            shown = whole
        return [piece.replace("\n", " ") for piece in pieces]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _word_pieces(self, ids: list[int]) -> list[str]:
        names = [str(self._tokenizer.convert_ids_to_tokens(token)) for token in ids]
        spaced = [name[2:] if name.startswith("##") else " " + name for name in names]
        return _respaced(["" if token in self._special else piece for token, piece in zip(ids, spaced, strict=True)])


def _is_wordpiece(tokenizer: Any) -> bool:
    """Whether ## marks what continues a word, as in BERT's vocabulary: its own decoder then takes it away.

    In others ## is text like any other, a heading in Markdown for one.
    """
    marked = next((name for name in tokenizer.get_vocab() if name.startswith("##") and len(name) > 2), None)
    return marked is not None and "##" not in tokenizer.convert_tokens_to_string(["a", marked])


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
        if sign in _CLOSING or before in _OPENING or apostrophe or short:
            pieces[i] = pieces[i].lstrip()
    return pieces
