"""Records of a data set (an object, a string, a list of ids) made into documents; bad ones are left out and counted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from saefast.errors import InputError
from saefast.harvest.chat import chat_ids, is_chat
from saefast.harvest.documents import Document, Refused

# The fields that hold text, ids of text that was tokenised before, and 0 for each of these ids that is padding.
TEXT, IDS, MASK = "text", "input_ids", "attention_mask"
# So many records without the field, and none with it, are enough to say that it has another name.
LOOK = 1000

# Where a record is from, as a message names it, and what it holds.
Record = tuple[str, Any]


class Unreadable(NamedTuple):
    """What stands in place of a record that cannot be read: why."""

    reason: str


class NoColumn(InputError):
    """No record has the field that was asked for. records: how many were looked at."""

    def __init__(self, place: str, column: str, seen: Iterable[Any], records: int = LOOK) -> None:
        self.records = records
        super().__init__(f"{place} {_missing(column, seen)}: name the field that holds it with text_column")


def documents_of(
    records: Iterable[Record], column: str, tokenizer: Any, skip: Callable[[str], None]
) -> Iterator[Document]:
    """The documents in records: in their field `column`, or what is itself a string, ids or a chat.

    skip: told what is left out. Raises NoColumn where no record has the field, or none of the first LOOK.
    """
    without = _Without(column, skip)
    for place, record in records:
        if isinstance(record, Unreadable):
            skip(f"{place} {record.reason}")
            continue
        if not has_field(record, column):
            without.add(place, record)
            continue
        without.found()
        try:
            yield from _documents_in(record, column, tokenizer)
        except Refused as error:
            skip(f"{place} {error}")
    without.end()


def has_field(record: Any, column: str) -> bool:
    """Whether there is something to look at in a record; one that is no mapping is looked at as it is."""
    return not isinstance(record, Mapping) or bool(fields(record, column))


def fields(names: Iterable[Any], column: str) -> list[str]:
    """Which of a record's fields are needed: `column`; or, where that is "text" and missing, token ids."""
    names = list(names)
    found = column if column in names else IDS
    if found not in names or (found != column and column != TEXT):
        return []
    return [found, MASK] if found == IDS and MASK in names else [found]


def id_arrays(value: Any) -> list[np.ndarray]:
    """Token ids (n,) int64 of a list, array or tensor of them; of a 2-D one each row. Raises Refused for all else."""
    if isinstance(value, torch.Tensor):
        # numpy knows no bfloat16, and nothing on a GPU or on meta.
        plain = value.device.type != "meta" and value.layout == torch.strided and not value.is_floating_point()
        value = value.detach().cpu().numpy() if plain and not value.is_complex() else value
    if not isinstance(value, list | tuple | range | np.ndarray):
        raise Refused(f"holds a {kind(value)}, expected text, token ids or messages")
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise Refused("holds lists of different lengths, expected token ids") from None
    if array.size == 0 and array.ndim < 3:
        return []
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise Refused(f"holds a {kind(value)}, expected text, token ids or messages")
    return list(np.atleast_2d(array.astype(np.int64)))


def kind(value: Any) -> str:
    """A value's type, with what is in it."""
    name = type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{name} of {value.dtype} and shape {tuple(value.shape)}"
    return f"{name} of {type(value[0]).__name__}" if isinstance(value, list | tuple) and value else name


class _Without:
    """Records without the field: skipped like other bad ones, once there has been one that has it."""

    def __init__(self, column: str, skip: Callable[[str], None]) -> None:
        self._column, self._skip, self._found = column, skip, False
        self._first: tuple[str, list[Any]] | None = None
        self._lines: list[str] = []

    def add(self, place: str, record: Mapping[Any, Any]) -> None:
        line = f"{place} {_missing(self._column, record)}"
        if self._found:
            self._skip(line)
            return
        self._first = self._first or (place, list(record))
        self._lines.append(line)
        if len(self._lines) == LOOK:
            self.end()

    def found(self) -> None:
        self._found = True
        while self._lines:
            self._skip(self._lines.pop(0))

    def end(self) -> None:
        if self._lines and self._first:
            place, seen = self._first
            raise NoColumn(place, self._column, seen, len(self._lines))


def _documents_in(record: Any, column: str, tokenizer: Any) -> list[Document]:
    mask = None
    if isinstance(record, Mapping):
        names = fields(record, column)
        mask = record[names[1]] if len(names) > 1 else None
        record = record[names[0]]
    if isinstance(record, str):
        return [record]
    if isinstance(record, np.ndarray) and record.dtype == object:
        # What pandas and Arrow make of lists.
        record = record.tolist()
    if is_chat(record):
        return [chat_ids(record, tokenizer)]
    return list(id_arrays(record) if mask is None else _without_padding(id_arrays(record), id_arrays(mask)))


def _without_padding(ids: list[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    if [len(row) for row in ids] != [len(row) for row in masks]:
        raise Refused(f"has {IDS} and {MASK} of different shapes")
    return [row[mask != 0] for row, mask in zip(ids, masks, strict=True)]


def _missing(column: str, seen: Iterable[Any]) -> str:
    return f"has no text in field {column!r} (seen: fields {', '.join(map(str, seen))})"
