"""Documents to harvest from: files, folders, a `datasets` name, any iterable of strings, or Python's own docstrings."""

import ast
import functools
import hashlib
import json
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from saefast.errors import InputError
from saefast.files import usable
from saefast.typed import typed

# Longer files are cut into documents at blank lines, so that the held-out share can be whole documents.
DOCUMENT_CHARS = 16_384
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Text(Iterable[str]):
    """Non-empty documents, the same ones in the same order each time it is iterated.

    name: where they come from. skipped: files and lines that were left out, and why, as of the last iteration.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[str]:
        self.skipped = []
        found = False
        for document in map(_whole_characters, self._documents()):
            if document.strip():
                found = True
                yield document
        if not found:
            why = f" ({self.skipped[0]}, {len(self.skipped)} skipped)" if self.skipped else ""
            raise InputError(f"{self.name} holds no text{why}")

    def size(self) -> int | None:
        """About how many characters there are, to show the time left; None where it is not known."""
        return None

    def _documents(self) -> Iterator[str]:
        raise NotImplementedError


@typed
def open_text(text: str | Path | Iterable[str] | None = None, column: str = "text", seed: int = 0) -> Text:
    """Text from a path (file or folder), a `datasets` name ("owner/name[:config[:split]]"), strings, or None.

    None is the docstrings of Python's standard library, shuffled with `seed`: nothing is downloaded.
    column: the field that holds the text in .jsonl files and datasets. Raises InputError for what does not exist.
    """
    if text is None:
        return Docstrings(seed)
    if isinstance(text, Text):
        return text
    if not isinstance(text, str | Path):
        return Strings(text)
    path = usable(text)
    if path.exists():
        return Files(path, column)
    looks_like_a_path = isinstance(text, Path) or text.startswith((".", "/", "~")) or path.suffix in (".txt", ".jsonl")
    if looks_like_a_path:
        raise InputError(f"text {str(text)!r} does not exist")
    return Dataset(str(text), column)


def open_texts(names: Iterable[str], column: str = "text", seed: int = 0) -> Text:
    """Several texts as `open_text` takes them, one after the other."""
    return Joined([open_text(name, column, seed) for name in names])


class Strings(Text):
    """Documents given as Python strings. An iterator, which cannot be started again, is read into memory."""

    def __init__(self, documents: Iterable[str]) -> None:
        super().__init__("the given text")
        try:
            iter(documents)
        except TypeError as error:  # a tensor without dimensions, say
            raise InputError(f"text is a {type(documents).__name__}, expected documents ({error})") from None
        self._given = list(documents) if isinstance(documents, Iterator) else documents

    def size(self) -> int | None:
        return sum(map(len, self._given)) if isinstance(self._given, list | tuple) else None

    def _documents(self) -> Iterator[str]:
        for document in self._given:
            if not isinstance(document, str):
                raise InputError(f"text holds a {type(document).__name__}, expected strings, one per document")
            yield document


class Files(Text):
    """A UTF-8 file, or every file below a folder in the order of their paths; hidden ones are not looked at.

    A .jsonl file is one document a line (an object with `column`, or a string). Other files are cut at blank lines
    into documents of about DOCUMENT_CHARS. What is not UTF-8, or holds NUL bytes, is skipped and listed.
    """

    def __init__(self, path: Path, column: str = "text") -> None:
        super().__init__(str(path))
        self._path, self._column = path, column

    def size(self) -> int | None:
        return sum(file.stat().st_size for file in self._files())

    def _files(self) -> list[Path]:
        return sorted(_visible_files(self._path)) if self._path.is_dir() else [self._path]

    def _documents(self) -> Iterator[str]:
        for file in self._files():
            try:
                with file.open(encoding="utf-8-sig", newline=None) as lines:
                    yield from self._json_lines(file, lines) if file.suffix == ".jsonl" else _blocks(lines)
            except UnicodeDecodeError as error:
                self.skipped.append(f"{file} is not UTF-8 text ({error.reason} after byte {error.start})")
            except OSError as error:
                self.skipped.append(f"{file} cannot be read ({error.strerror or error})")

    def _json_lines(self, file: Path, lines: Iterable[str]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets by the thousand
                reason = getattr(error, "msg", None) or str(error).split(";")[0]
                self.skipped.append(f"{file} line {number} is not JSON ({reason})")
                continue
            yield _field(value, self._column, f"{file} line {number}")


class Dataset(Text):
    """A Hugging Face dataset, streamed: "owner/name", "owner/name:config", or "owner/name:config:split"."""

    def __init__(self, name: str, column: str = "text") -> None:
        super().__init__(name)
        self._column = column

    def _documents(self) -> Iterator[str]:
        try:
            import datasets
        except ImportError:
            raise InputError(
                f"text {self.name!r} is no file or folder, and to read it as a dataset's name the package datasets is"
                " needed: pip install datasets"
            ) from None
        name, config, split = ([*self.name.split(":"), "", ""])[:3]
        try:
            rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"text {self.name!r} is no file or folder, nor a dataset that opens: {reason}") from None
        for number, row in enumerate(rows):
            yield _field(row, self._column, f"{self.name} row {number}")


class Docstrings(Text):
    """The docstrings of Python's standard library, without its tests, each once, in an order that `seed` fixes."""

    def __init__(self, seed: int = 0) -> None:
        version = sysconfig.get_python_version()
        super().__init__(f"docstrings of Python {version}'s standard library")
        self._seed = seed
        self._found: list[str] | None = None

    def size(self) -> int | None:
        return sum(map(len, self._all()))

    def _documents(self) -> Iterator[str]:
        yield from self._all()

    def _all(self) -> list[str]:
        if self._found is None:
            self._found = list(_library_docstrings(Path(sysconfig.get_paths()["stdlib"])))
            random.Random(self._seed).shuffle(self._found)
        return self._found


class Joined(Text):
    """Several texts, one after the other."""

    def __init__(self, texts: Sequence[Text]) -> None:
        super().__init__(", ".join(text.name for text in texts))
        self._texts = texts

    def size(self) -> int | None:
        sizes = [text.size() for text in self._texts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def _documents(self) -> Iterator[str]:
        for text in self._texts:
            yield from text
            self.skipped += text.skipped


class Fingerprint:
    """A running digest of the documents read, to tell whether a text is still the one a harvest began with."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.count = 0

    def add(self, document: str) -> None:
        self.count += 1
        self._hash.update(hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=16).digest())

    @property
    def value(self) -> str:
        return self._hash.hexdigest()

    def copy(self) -> "Fingerprint":
        """One of the same documents, to go on with apart from this."""
        other = Fingerprint()
        other._hash, other.count = self._hash.copy(), self.count
        return other


def skip_documents(documents: Iterator[str], count: int, fingerprint: Fingerprint, expected: str, name: str) -> None:
    """Advances past documents that were harvested before. Raises InputError when they are not the same ones."""
    for document in islice(documents, count):
        fingerprint.add(document)
    if fingerprint.count != count or fingerprint.value != expected:
        raise InputError(
            f"text {name!r} is not what the harvest began with (its first {count} documents differ):"
            " harvest into another folder"
        )


def _whole_characters(document: str) -> str:
    """The document with U+FFFD for each half of a surrogate pair, which JSON may hold alone and no tokenizer takes."""
    try:
        document.encode()
    except UnicodeEncodeError:
        return document.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return document


def _visible_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Documents of about DOCUMENT_CHARS, ended at a blank line, or at any line where none comes for as long again."""
    parts: list[str] = []
    size = 0
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
    yield "".join(parts)


def _field(value: Any, column: str, place: str) -> str:
    text = value.get(column) if isinstance(value, dict) else value
    if not isinstance(text, str):
        seen = f"fields {', '.join(map(str, value))}" if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{place} has no text in field {column!r} (seen: {seen}): name the field that holds it")
    return text


# Parsing the library takes seconds, and within a process it stays as it is.
@functools.cache
def _library_docstrings(root: Path) -> tuple[str, ...]:
    """Each docstring once, in the order of the files' paths."""
    files = (f for f in root.rglob("*.py") if not _NOT_LIBRARY.intersection(f.relative_to(root).parts))
    in_order = sorted(files, key=lambda f: f.relative_to(root).as_posix())
    return tuple(dict.fromkeys(doc for file in in_order for doc in _docstrings(file)))


def _docstrings(file: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            # Old modules hold escapes that today's parser warns about.
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        # lib2to3 and the like keep files that are not Python 3 on purpose.
        return
    for node in ast.walk(tree):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring and re.search(r"\w", docstring):
                yield docstring
