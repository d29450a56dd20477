"""Images of a run on images: sent as images and nothing else, with the patches that a latent fires on."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
from explorer_client import client, explorer_of, stranger

from saefast.explorer.images import images_of, picture_of
from saefast.explorer.state import Explorer

# A PNG of one pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c63f8cfc0f01f000500"
    "01ff89993d1d0000000049454e44ae426082"
)
GRID = {"rows": 5, "columns": 5, "first": 4}


@pytest.fixture
def explorer(tmp_path: Path) -> Explorer:
    """Sequences of 30 positions in contexts of 10, as make_db has them; images of all but the first two."""
    found = explorer_of(
        tmp_path, kind="images", unit="patches", grid=GRID,
        images={"shown": 10, "missing": 2, "whole": False, "why": None},
    )  # fmt: skip
    with closing(sqlite3.connect(found.db.path)) as db, db:
        db.execute("UPDATE sequences SET name = 'photos/' || sequence || '<b>.png'")
        for sequence in range(2, 12):
            db.execute("INSERT INTO images VALUES (?, 'image/png', ?)", (sequence, PNG))
        db.execute("UPDATE images SET mime = 'text/html' WHERE sequence = 3")
    return found


def test_an_image_is_sent_as_one(explorer: Explorer) -> None:
    visitor = client(explorer)
    answer = visitor.get("/image/5")
    assert (answer.status_code, answer.content) == (200, PNG)
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert stranger(explorer).get("/image/5").status_code == 403


@pytest.mark.parametrize("path", ["0", "1", "99", "9" * 30, "-1", "x", "3"])
def test_what_is_no_image_is_not_sent(explorer: Explorer, path: str) -> None:
    """Nor a file that is said to be of another type, which is 3."""
    assert client(explorer).get(f"/image/{path}").status_code == 404


def test_patches_lie_where_the_grid_has_them(explorer: Explorer) -> None:
    checked = 0
    for latent in range(1, 40):
        most = explorer.db.latent(latent).max_act
        for example in explorer.db.examples(latent):
            picture = picture_of(explorer.db, example, most)
            found = {(patch.row, patch.column): patch for patch in picture.patches}
            expected = np.zeros(30, np.float32)
            expected[example.context.start : example.context.stop] = example.acts
            for position, act in enumerate(expected.tolist()):
                inside = 4 <= position < 29
                if not act:
                    assert not inside or divmod(position - 4, 5) not in found
                elif inside:
                    patch = found[divmod(position - 4, 5)]
                    assert patch.act == act
                    assert patch.share == min(act / most, 1)
                    assert patch.peak == (position == example.context.start + example.peak)
                else:
                    assert (position, act) in picture.outside
                checked += act > 0
            assert picture.name == f"photos/{example.context.sequence}<b>.png"
            assert picture.shown == (example.context.sequence >= 2)
    assert checked > 300


def test_without_a_grid_nothing_is_shaded(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path, kind="images", grid=None)
    picture = picture_of(explorer.db, explorer.db.examples(5)[0], 1.0)
    assert picture.patches == []
    assert picture.outside
    assert (picture.columns, picture.rows, picture.shown) == (0, 0, False)


def test_a_list_shows_the_images_of_the_strongest_examples(explorer: Explorer) -> None:
    for latent in range(1, 40):
        sequences = [example.context.sequence for example in explorer.db.examples(latent, 0)]
        assert images_of(explorer.db, latent) == [sequence for sequence in sequences if sequence >= 2][:4]
    assert images_of(explorer.db, 0) == []
