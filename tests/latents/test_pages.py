"""Pages of latents, in every order and under every filter, against sorting all of them in Python."""

import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest
from latents_db import make_db

from saefast.latents.database import Latent, LatentsDB

N, SIZE = 60, 7
VALUES = ("density", "mean_act", "max_act", "score")


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> LatentsDB:
    """With equal values, several dead latents, and some without a score."""
    path = make_db(tmp_path_factory.mktemp("db"), N)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE latents SET density = 0.25, max_act = 1.5 WHERE latent % 5 = 0")
        connection.execute("UPDATE latents SET score = NULL WHERE latent % 6 = 0")
        connection.execute("UPDATE latents SET dead = 1, dense = 0 WHERE latent % 10 = 0")
    found = LatentsDB(path)
    for latent in (3, 17, 30):
        found.write_label(latent, "a label")
    return found


def rows_of(db: LatentsDB, descending: bool, sort: str, **filters: object) -> tuple[list[Latent], set[int]]:
    """All pages one after the other, and the totals that they told."""
    rows: list[Latent] = []
    totals: set[int] = set()
    for offset in range(0, N + 2 * SIZE, SIZE):
        page, total = db.page(sort, descending, offset, SIZE, **filters)  # type: ignore[arg-type]
        rows += page
        totals.add(total)
    return rows, totals


FILTERS: list[tuple[dict[str, object], Callable[[Latent], bool]]] = [
    ({}, lambda row: True),
    ({"dead": True}, lambda row: row.dead),
    ({"dead": False, "dense": False}, lambda row: not row.dead and not row.dense),
    ({"labelled": True}, lambda row: bool(row.label)),
    ({"labelled": True, "dead": False}, lambda row: bool(row.label) and not row.dead),
    ({"within": {"density": (0.01, 0.25)}}, lambda row: 0.01 <= row.density <= 0.25),
    (
        {"within": {"score": (0.5, float("inf")), "max_act": (float("-inf"), 1.9)}, "dense": True},
        lambda row: row.dense and row.score is not None and row.score >= 0.5 and row.max_act <= 1.9,
    ),
    ({"within": {"mean_act": (5.0, 1.0)}}, lambda row: False),
]


@pytest.mark.parametrize("place", range(len(FILTERS)))
@pytest.mark.parametrize("sort", ["latent", *VALUES])
def test_pages_are_the_sorted_list(db: LatentsDB, sort: str, place: int) -> None:
    filters, wanted = FILTERS[place]
    everything = [db.latent(latent) for latent in range(N)]

    def key(row: Latent) -> tuple[float, int]:
        value = getattr(row, sort)
        return -(float("-inf") if value is None else value), 0 if sort == "latent" else row.latent

    expected = sorted(filter(wanted, everything), key=key)
    rows, totals = rows_of(db, True, sort, **filters)
    assert (rows, totals) == (expected, {len(expected)})
    rows, totals = rows_of(db, False, sort, **filters)
    assert (rows, totals) == (expected[::-1], {len(expected)})


@pytest.mark.parametrize("place", range(len(FILTERS)))
def test_the_most_telling_come_before_all_others_under_every_filter(db: LatentsDB, place: int) -> None:
    filters, wanted = FILTERS[place]
    chosen = db.telling()
    by_score = [row.latent for row in rows_of(db, True, "score")[0]]
    expected = [row for row in chosen + [i for i in by_score if i not in chosen] if wanted(db.latent(row))]
    for descending, order in ((True, expected), (False, expected[::-1])):
        rows, totals = rows_of(db, descending, "telling", **filters)
        assert ([row.latent for row in rows], totals) == (order, {len(expected)})


@pytest.mark.parametrize("sort", VALUES)
def test_the_order_is_read_off_an_index(db: LatentsDB, sort: str) -> None:
    """No page sorts all latents, nor looks at rows of the table to skip them."""
    where, order = "true AND dead = 0 AND +l.density BETWEEN 0 AND 1", f"l.{sort} DESC, l.latent ASC"
    sql = f"SELECT l.latent FROM latents l WHERE {where} ORDER BY {order} LIMIT 50 OFFSET 10"
    plan = " ".join(row[3] for row in db.query(f"EXPLAIN QUERY PLAN {sql}"))
    assert f"COVERING INDEX latents_by_{sort}" in plan
    assert "TEMP B-TREE" not in plan
