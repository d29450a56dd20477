"""The text that is always there: the docstrings of Python's standard library."""

import ast
import functools
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saefast.harvest.documents import Document, Text

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Docstrings(Text):
    """The docstrings of Python's standard library, without its tests, each once, in an order that `seed` fixes."""

    def __init__(self, seed: int = 0) -> None:
        version = sysconfig.get_python_version()
        super().__init__(f"docstrings of Python {version}'s standard library")
        self._seed = seed
        self._found: list[str] | None = None

    def size(self) -> int | None:
        return sum(map(len, self._all()))

    def _documents(self, tokenizer: Any) -> Iterator[Document]:
        yield from self._all()

    def _all(self) -> list[str]:
        if self._found is None:
            self._found = list(library_docstrings(Path(sysconfig.get_paths()["stdlib"])))
            random.Random(self._seed).shuffle(self._found)
        return self._found


# Parsing the library takes seconds, and within a process it stays as it is.
@functools.cache
def library_docstrings(root: Path) -> tuple[str, ...]:
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
