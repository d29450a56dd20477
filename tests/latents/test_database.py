"""latents.db read back: pages, a latent whole, labels, and files that are none."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from latents_db import make_db

from saefast.errors import InputError
from saefast.latents.database import LONGEST_LABEL, LatentsDB
from saefast.latents.schema import TOP


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> LatentsDB:
    return LatentsDB(make_db(tmp_path_factory.mktemp("db")))


def test_pages_are_all_latents_in_order(db: LatentsDB) -> None:
    for sort in ("latent", "density", "mean_act", "max_act", "score"):
        parts = [db.page(sort, offset=start, limit=7) for start in range(0, 42, 7)]
        rows = [row for part, _ in parts for row in part]
        assert {total for _, total in parts} == {40}
        assert sorted(row.latent for row in rows) == list(range(40))
        values = [getattr(row, sort) for row in rows]
        assert values == sorted(values, reverse=True)


def test_the_most_telling_come_first_and_then_all_others_by_score(db: LatentsDB) -> None:
    chosen = db.telling()
    assert len(chosen) == len(set(chosen)) == 10
    assert db.telling(3) == chosen[:3]
    rest = [row.latent for row in db.page("score", limit=40)[0] if row.latent not in chosen]
    for descending, expected in ((True, chosen + rest), (False, (chosen + rest)[::-1])):
        parts = [db.page("telling", descending, offset=start, limit=7) for start in range(0, 42, 7)]
        rows = [row for part, _ in parts for row in part]
        assert {total for _, total in parts} == {40}
        if descending:
            assert [row.latent for row in rows] == expected
        else:  # latents of one score keep their order
            assert [row.score for row in rows[:30]] == sorted(row.score or 0 for row in rows[:30])
            assert [row.latent for row in rows[30:]] == chosen[::-1]
    alive, total = db.page("telling", dead=False, limit=100)
    assert total == len(alive) == 39
    assert db.page("telling", offset=40) == ([], 40)


def test_pages_are_filtered(db: LatentsDB) -> None:
    assert [row.latent for row in db.page(dead=True)[0]] == [0]
    alive, total = db.page(dead=False, limit=100)
    assert len(alive) == total == 39
    low, high = sorted(row.density for row in alive)[10], sorted(row.density for row in alive)[20]
    inside, _ = db.page(within={"density": (low, high)}, limit=100)
    assert {row.latent for row in inside} == {row.latent for row in alive if low <= row.density <= high}


def test_what_is_beside_a_context_is_of_its_sequence(db: LatentsDB) -> None:
    for sequence in (0, 11):
        contexts = db.contexts_of(sequence)
        assert len(contexts) == 3
        expected = list(zip([None, *contexts[:-1]], [*contexts[1:], None], strict=True))
        assert [db.beside(context) for context in contexts] == expected


def test_an_example_holds_the_latents_activations_of_the_whole_context(db: LatentsDB) -> None:
    checked = 0
    for latent in range(1, 40):
        examples = db.examples(latent)
        assert [e.part for e in examples] == sorted(e.part for e in examples)
        assert len(db.examples(latent, 0)) <= TOP
        for example in examples:
            context = example.context
            assert len(context.pieces) == len(example.acts) == context.stop - context.start
            assert example.acts[example.peak] == np.float32(example.act)
            codes = db.codes(context.sequence)
            mine = codes.latents == latent
            dense = np.zeros(db.sequence(context.sequence).n, np.float32)
            dense[codes.positions[mine]] = codes.acts[mine]
            assert np.array_equal(example.acts, dense[context.start : context.stop])
            checked += 1
    assert checked > 300


def test_contexts_of_a_sequence_join_to_all_of_it(db: LatentsDB) -> None:
    for row, codes in db.all_codes():
        contexts = db.contexts_of(row.sequence)
        assert [c.start for c in contexts] == [0, *(c.stop for c in contexts[:-1])]
        assert contexts[-1].stop == row.n == len(row.tokens)
        assert int(codes.positions.max()) < row.n


def test_labels_are_written_read_and_taken_away(tmp_path: Path) -> None:
    db = LatentsDB(make_db(tmp_path))
    db.write_label(3, "  bridges\n")
    assert db.latent(3).label == "bridges"
    assert db.label_of(3)[::2] == ("bridges", True)
    assert [row.latent for row in db.page(labelled=True)[0]] == [3]
    db.write_label(3, "")
    assert db.label_of(3) is None
    with pytest.raises(InputError, match="there is no latent 40: expected 0 to 39"):
        db.write_label(40, "x")
    with pytest.raises(InputError, match="at most 1000"):
        db.write_label(3, "x" * (LONGEST_LABEL + 1))


def test_a_file_that_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*latents\.db: saefast features .* makes it"):
        LatentsDB(tmp_path / "latents.db")
    (tmp_path / "latents.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(InputError, match="damaged, or no SQLite file"):
        LatentsDB(tmp_path / "latents.db")
    (tmp_path / "latents.db").unlink()
    path = make_db(tmp_path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(InputError, match="version 7: expected version 1"):
        LatentsDB(path)


def test_a_file_whose_contents_were_altered_is_refused_in_a_line(tmp_path: Path) -> None:
    path = make_db(tmp_path)
    for change, read in (
        ("UPDATE histograms SET counts = x'0102'", lambda db: db.histogram(3)),
        ("UPDATE contexts SET lengths = x'01'", lambda db: db.examples(3)),
        ("UPDATE codes SET acts = 'text'", lambda db: db.examples(3)),
        ("UPDATE arrays SET shape = '[7]'", lambda db: db.array("map")),
        ("UPDATE arrays SET dtype = 'no dtype'", lambda db: db.array("map")),
        ("UPDATE meta SET value = '{' WHERE name = 'sae'", lambda db: db.meta),
        ("DELETE FROM meta", lambda db: db.meta),
    ):
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(change)
        with pytest.raises(InputError, match=r"latents\.db is damaged \(.*\): saefast features makes it anew"):
            read(LatentsDB(path))


def test_an_error_that_quotes_broken_bytes_is_told_in_a_line_as_well(tmp_path: Path) -> None:
    path = make_db(tmp_path)
    whole = path.read_bytes()
    broken = whole.replace(b"CREATE TABLE histograms (", b"CREATE TABLE histograms \xdc", 1)
    assert broken != whole
    path.write_bytes(broken)
    with pytest.raises(InputError, match=r"latents\.db .*(damaged|cannot be read)"):
        LatentsDB(path)
