"""Text given as Python objects, and the data sets of the package `datasets`, by name or as they are."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from saefast.errors import InputError
from saefast.harvest.documents import Document, Refused, Text
from saefast.harvest.records import NoColumn, documents_of, fields, id_arrays, kind


class Given(Text):
    """Documents or records given as Python objects. An iterator, which cannot be started again, is read into memory."""

    def __init__(self, documents: Iterable[Any], column: str = "text") -> None:
        super().__init__("the given text")
        try:
            iter(documents)
        except TypeError as error:  # a tensor without dimensions, say
            raise InputError(f"text is a {type(documents).__name__}, expected documents ({error})") from None
        self._given = list(documents) if isinstance(documents, Iterator) else documents
        self._column = column

    def size(self) -> int | None:
        if isinstance(self._given, list | tuple) and all(isinstance(document, str) for document in self._given):
            return sum(map(len, self._given))
        return None

    def _documents(self, tokenizer: Any) -> Iterator[Document]:
        records = ((f"{self.name} row {i}", record) for i, record in enumerate(self._given))
        yield from documents_of(records, self._column, tokenizer, self.skip)


class Dataset(Text):
    """A Hugging Face dataset, streamed: "owner/name", "owner/name:config", or "owner/name:config:split"."""

    def __init__(self, name: str, column: str = "text") -> None:
        super().__init__(name)
        self._column = column

    def _documents(self, tokenizer: Any) -> Iterator[Document]:
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
            raise InputError(
                f"text {self.name!r} is no file or folder, nor a dataset that opens: {_line(error)}"
            ) from None
        yield from documents_of(self._records(rows), self._column, tokenizer, self.skip)

    def _records(self, rows: Any) -> Iterator[tuple[str, Any]]:
        number, source = 0, iter(with_columns(rows, self.name, self._column))
        while True:
            try:
                row = next(source)
            except StopIteration:
                return
            except Exception as error:
                raise InputError(f"{self.name} cannot be read on from row {number}: {_line(error)}") from None
            yield f"{self.name} row {number}", row
            number += 1


def given(text: Any, column: str) -> Text:
    """Text of an object: documents, records, a data set of `datasets`, a table of pandas, or an array of ids."""
    if isinstance(text, Mapping):
        return given(_only_split(text), column)
    if isinstance(text, torch.Tensor | np.ndarray) and text.ndim and text.dtype != object:
        return Given(_of_array(text), column)
    if hasattr(text, "column_names"):
        return Given(with_columns(text, f"the given {type(text).__name__}", column), column)
    if hasattr(text, "columns") and hasattr(text, "dtypes"):
        return Given(_column_of(text, column), column)
    return Given(text, column)


def with_columns(rows: Any, name: str, column: str) -> Any:
    """A data set without the columns that are not needed, which may be pictures. Raises NoColumn."""
    names = getattr(rows, "column_names", None)
    if names is None:
        return rows
    wanted = fields(names, column)
    if not wanted:
        raise NoColumn(name, column, names)
    return rows.select_columns(wanted) if hasattr(rows, "select_columns") else rows


def _only_split(text: Mapping[Any, Any]) -> Any:
    if text and all(hasattr(split, "column_names") for split in text.values()):
        if len(text) == 1:
            return next(iter(text.values()))
        names = ", ".join(map(str, text))
        raise InputError(
            f"text is a {type(text).__name__} with the splits {names}: give one, text[{next(iter(text))!r}]"
        )
    raise InputError(
        f"text is a {type(text).__name__} with the keys {', '.join(map(str, text))}: expected documents; rows are given"
        " as a list of mappings"
    )


def _of_array(text: Any) -> list[Any]:
    """The documents of an array: of strings, or of token ids, one sequence a row."""
    if isinstance(text, np.ndarray) and text.dtype.kind in "UT" and text.ndim == 1:
        return list(map(str, text))
    try:
        return list(id_arrays(text))
    except Refused:
        raise InputError(f"text is a {kind(text)}, expected documents or token ids") from None


def _column_of(text: Any, column: str) -> Iterable[Any]:
    """A column of a table, row by row, or two of token ids and their mask."""
    wanted = fields(text.columns, column)
    if not wanted:
        raise NoColumn(f"the given {type(text).__name__}", column, text.columns)
    rows = zip(*(text[name] for name in wanted), strict=True)
    return [dict(zip(wanted, row, strict=True)) for row in rows]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
