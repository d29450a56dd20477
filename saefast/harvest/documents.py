"""Documents and Text, what gives them: strings, or token ids that are taken as they are; and what they hash to."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from saefast.errors import InputError

# Text, or the ids (n,) int64 of one that was tokenised before.
Document = str | np.ndarray
# A token is about so many characters.
_CHARS_PER_TOKEN = 4
# Lines on what was skipped that are kept; all are counted.
_KEPT = 1000


class Refused(Exception):
    """Why something is no document; how the sentence goes on that begins with its place."""


class Text(Iterable[Document]):
    """Non-empty documents, the same ones in the same order each time it is iterated.

    name: where they come from. skipped, n_skipped: what was left out and why, as of the last iteration: the first
    thousand of them, and how many there were.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped: list[str] = []
        self.n_skipped = 0

    def __iter__(self) -> Iterator[Document]:
        return self.documents()

    def documents(self, tokenizer: Any = None) -> Iterator[Document]:
        """Strings, and ids (n,) int64 of what was tokenised before. tokenizer: writes chats out.

        Raises InputError where there is none, and where chats have no tokenizer or one without a template.
        """
        self.skipped, self.n_skipped = [], 0
        found = False
        for document in self._documents(tokenizer):
            whole = whole_characters(document) if isinstance(document, str) else document
            if not _is_empty(whole):
                found = True
                yield whole
        if not found:
            why = f" ({self.skipped[0]}, {self.n_skipped} skipped)" if self.skipped else ""
            raise InputError(f"{self.name} holds no text{why}")

    def skip(self, line: str) -> None:
        """Notes something that is left out."""
        self.n_skipped += 1
        if len(self.skipped) < _KEPT:
            self.skipped.append(line)

    def size(self) -> int | None:
        """About how many characters there are, to show the time left; None where it is not known."""
        return None

    def _documents(self, tokenizer: Any) -> Iterator[Document]:
        raise NotImplementedError


class Fingerprint:
    """A running digest of the documents read, to tell whether a text is still the one a harvest began with."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.count = 0

    def add(self, document: Document) -> None:
        self.count += 1
        self._hash.update(digest(document, 16))

    @property
    def value(self) -> str:
        return self._hash.hexdigest()

    def copy(self) -> "Fingerprint":
        """One of the same documents, to go on with apart from this."""
        other = Fingerprint()
        other._hash, other.count = self._hash.copy(), self.count
        return other


def skip_documents(
    documents: Iterator[Document], count: int, fingerprint: Fingerprint, expected: str, name: str
) -> None:
    """Advances past documents that were harvested before. Raises InputError when they are not the same ones."""
    for document in islice(documents, count):
        fingerprint.add(document)
    if fingerprint.count != count or fingerprint.value != expected:
        raise InputError(
            f"text {name!r} is not what the harvest began with (its first {count} documents differ):"
            " harvest into another folder"
        )


def digest(document: Document, size: int, key: bytes = b"") -> bytes:
    """The document's digest of `size` bytes; ids never have that of a string, whatever their bytes spell."""
    if isinstance(document, str):
        return hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=size, key=key).digest()
    ids = np.ascontiguousarray(document, dtype="<i8").tobytes()
    return hashlib.blake2b(ids, digest_size=size, key=key, person=b"token ids").digest()


def weight(document: Document) -> int:
    """About how many characters a document has."""
    return len(document) if isinstance(document, str) else _CHARS_PER_TOKEN * len(document)


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair, which JSON may hold alone and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _is_empty(document: Document) -> bool:
    return not document.strip() if isinstance(document, str) else len(document) == 0
