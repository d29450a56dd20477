"""Columns into tables of latents.db, and what people wrote into an earlier file."""

import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from saefast.errors import InputError
from saefast.latents.schema import APPLICATION_ID, UNREADABLE

# Rows that are Python's numbers at a time.
_ROWS = 1 << 16
ASIDE = ".damaged"


def insert(db: sqlite3.Connection, table: str, *columns: np.ndarray | Sequence[Any]) -> None:
    """Rows from columns, one of each of the table's, in order; all of one length."""
    marks = ", ".join("?" * len(columns))
    db.executemany(f"INSERT INTO {table} VALUES ({marks})", _rows(columns))


def _rows(columns: Sequence[np.ndarray | Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    for start in range(0, len(columns[0]), _ROWS):
        parts = [column[start : start + _ROWS] for column in columns]
        yield from zip(*(part.tolist() if isinstance(part, np.ndarray) else part for part in parts), strict=True)


def insert_ranked(db: sqlite3.Connection, table: str, others: np.ndarray, *values: np.ndarray, first: int = 0) -> None:
    """What each of some latents has n of, best first: others (latents, n), and values in the same shape.

    Args:
        others: those below 0 are none. first: the latent of the first row.
    """
    latent, rank = (others >= 0).nonzero()
    insert(db, table, latent + first, rank, *(column[latent, rank] for column in (others, *values)))


def insert_array(db: sqlite3.Connection, name: str, dtype: str, array: np.ndarray) -> None:
    kept = np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<"))
    insert(db, "arrays", [name], [dtype], [json.dumps(list(array.shape))], [kept.tobytes()])


def insert_meta(db: sqlite3.Connection, facts: Mapping[str, Any]) -> None:
    insert(db, "meta", list(facts), [json.dumps(value, allow_nan=False) for value in facts.values()])


def check_ours(path: Path) -> None:
    """Raises InputError where a file that is to be replaced is another program's."""
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
    except UNREADABLE:
        return
    if application != APPLICATION_ID:
        raise InputError(f"{path} is another program's SQLite file: move it away")


def carry_labels(old: Path, new: Path) -> None:
    """What people wrote of the latents into an earlier file, with the digest of the weights that it was written for.

    An earlier file that cannot be read is moved aside, because it may hold labels.
    """
    if not old.exists():
        return
    try:
        # Open for writing, so that a write that was cut off is undone now and not in the file that takes its place.
        with closing(sqlite3.connect(old, timeout=10)) as db:
            labels = db.execute("SELECT latent, text, written, sae FROM labels").fetchall()
    except UNREADABLE as error:
        _put_aside(old, error)
        return
    with closing(sqlite3.connect(new)) as db, db:
        (n_latents,) = db.execute("SELECT count(*) FROM latents").fetchone()
        kept = [label for label in labels if label[0] < n_latents]
        db.executemany("INSERT INTO labels VALUES (?, ?, ?, ?)", kept)
    if len(kept) < len(labels):
        lost = len(labels) - len(kept)
        warnings.warn(f"{lost} labels of latents from {n_latents} on are left out", RuntimeWarning, stacklevel=2)


def _put_aside(path: Path, error: Exception) -> None:
    aside = path.with_name(path.name + ASIDE)
    for ending in ("", "-journal"):
        part = path.with_name(path.name + ending)
        if part.exists():
            part.replace(path.with_name(path.name + ASIDE + ending))
    warnings.warn(f"{path} was damaged ({error}) and is kept as {aside.name}", RuntimeWarning, stacklevel=2)
