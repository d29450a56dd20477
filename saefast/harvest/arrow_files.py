"""Parquet and Arrow files, and data sets as `datasets` saves them, read through pyarrow batch by batch."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saefast.errors import InputError
from saefast.harvest.records import NoColumn, Record, Unreadable, fields
from saefast.harvest.unpack import opened_anywhere

ENDINGS = (".parquet", ".arrow", ".feather")
# Rows read at a time.
_BATCH = 1024
# What `datasets` writes beside the rows: of a data set, of a split of it, and of all its splits.
INFO, STATE, SPLITS = "dataset_info.json", "state.json", "dataset_dict.json"


def records(file: Path, column: str) -> Iterator[Record]:
    """A record a row, with the fields that are needed and no others.

    Raises InputError where pyarrow is not installed, NoColumn, and OSError where the file is damaged, after the rows
    that come before.
    """
    arrow = _pyarrow(file)
    row = 0
    try:
        with opened_anywhere(file) as stream:
            for batch in _batches(arrow, file, stream, column):
                columns = {name: _checked(arrow, batch.column(name)) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    yield f"{file} row {row}", _record(arrow, columns, i)
                    row += 1
    except InputError:
        raise
    except Exception as error:  # damaged bytes raise errors of every kind in pyarrow
        raise OSError(" ".join(str(error).split())[:160] or type(error).__name__) from None


def saved_files(folder: Path) -> list[Path] | None:
    """The files of a data set saved with save_to_disk, in the order of their rows; None for any other folder.

    Others may lie beside them: what `map` has cached. Raises InputError for a folder of several splits, naming them.
    """
    if (folder / SPLITS).is_file():
        splits = _listed(folder / SPLITS, "splits")
        raise InputError(f"{folder} holds the splits {', '.join(splits)}: name one of them, {folder / splits[0]}")
    if not ((folder / STATE).is_file() and (folder / INFO).is_file()):
        return None
    return [folder / name for name in _listed(folder / STATE, "_data_files")]


def _listed(file: Path, key: str) -> list[str]:
    """The names in a list of `datasets`' own JSON."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
        names = [Path(item["filename"] if isinstance(item, dict) else item).name for item in found]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is not what save_to_disk writes ({error!r}): save the data set again") from None
    if not names:
        raise InputError(f"{file} lists nothing in {key!r}: save the data set again")
    return names


def _batches(arrow: Any, file: Path, stream: Any, column: str) -> Iterator[Any]:
    """Record batches with the columns that are needed. The first bytes say which of three formats it is."""
    begins = stream.read(6)
    stream.seek(0)
    if begins[:4] == b"PAR1":
        parquet = importlib.import_module("pyarrow.parquet").ParquetFile(stream)
        wanted = _wanted(file, parquet.schema_arrow.names, column)
        yield from parquet.iter_batches(batch_size=_BATCH, columns=wanted)
        return
    if begins == b"ARROW1":
        reader = arrow.ipc.open_file(stream)
        batches: Iterator[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = reader = arrow.ipc.open_stream(stream)
    wanted = _wanted(file, reader.schema.names, column)
    for batch in batches:
        yield batch.select(wanted)


def _wanted(file: Path, names: list[str], column: str) -> list[str]:
    wanted = fields(names, column)
    if not wanted:
        raise NoColumn(str(file), column, names)
    return wanted


def _checked(arrow: Any, column: Any) -> Any:
    """A column that is safe to look into, strings as bytes. Raises pyarrow's error for damage that would crash it."""
    kinds = arrow.types
    as_bytes = {kinds.is_string: arrow.binary, kinds.is_large_string: arrow.large_binary}
    for is_kind, make in as_bytes.items():
        if is_kind(column.type):
            # Checked as strings, one that is not UTF-8 would cost all those beside it.
            column = column.view(make())
    column.validate(full=True)
    return column


def _record(arrow: Any, columns: dict[str, Any], row: int) -> Any:
    """A row by the names of its columns; numbers in lists stay arrays."""
    record = {}
    for name, column in columns.items():
        value = column[row]
        numbers: Any = getattr(value, "values", None)
        if numbers is not None and not numbers.null_count and arrow.types.is_integer(numbers.type):
            record[name] = numbers.to_numpy(zero_copy_only=False)
            continue
        found = value.as_py()
        try:
            record[name] = found.decode() if isinstance(found, bytes) else found
        except UnicodeDecodeError:
            return Unreadable("is not UTF-8 text")
    return record


def _pyarrow(file: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError:
        raise InputError(f"{file} needs the package pyarrow to be read: pip install pyarrow") from None
