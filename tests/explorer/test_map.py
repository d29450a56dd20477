"""The map: its one binary answer, what is told of latents, how it was made in words, and odd queries."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
from explorer_client import client, explorer_of
from starlette.testclient import TestClient

from saefast.explorer.map import MOST_FOUND, MOST_IDS, in_words, points_of
from saefast.explorer.state import Explorer
from saefast.latents.database import LatentsDB

ASK = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    return explorer_of(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def visitor(explorer: Explorer) -> TestClient:
    return client(explorer)


def change(explorer: Explorer, sql: str, *values: Any) -> None:
    connection = sqlite3.connect(explorer.db.path)
    connection.execute(sql, values)
    connection.commit()
    connection.close()


def set_array(explorer: Explorer, name: str, array: np.ndarray) -> None:
    values = (array.dtype.name, json.dumps(list(array.shape)), array.tobytes(), name)
    change(explorer, "UPDATE arrays SET dtype = ?, shape = ?, data = ? WHERE name = ?", *values)


def address(visitor: TestClient) -> str:
    page = visitor.get("/map").text
    return page.partition('data-points="')[2].partition('"')[0]


def test_the_points_are_those_of_the_file_column_by_column(explorer: Explorer, visitor: TestClient) -> None:
    answer = visitor.get(address(visitor))
    n = explorer.db.n_latents
    assert answer.headers["content-type"] == "application/octet-stream"
    assert len(answer.content) == n * (8 + 4 + 2)
    for name, dtype, start, count in (
        ("map", "<f4", 0, 2 * n),
        ("density", "<f4", 8 * n, n),
        ("cluster", "<i2", 12 * n, n),
    ):
        column = explorer.db.array(name)
        assert column is not None
        assert np.array_equal(np.frombuffer(answer.content, dtype, count, start), column.ravel())
    assert 'data-columns="map density cluster"' in visitor.get("/map").text


def test_as_many_points_as_a_large_dictionary_has(tmp_path: Path) -> None:
    explorer, n = explorer_of(tmp_path), 131_072
    rng = np.random.default_rng(0)
    columns = {
        "map": rng.normal(size=(n, 2)).astype(np.float32),
        "density": rng.random(n).astype(np.float32),
        "cluster": rng.integers(-1, 30_000, n).astype(np.int16),
    }
    for name, column in columns.items():
        set_array(explorer, name, column)
    change(explorer, "UPDATE meta SET value = ? WHERE name = 'n_latents'", str(n))
    visitor = client(Explorer.of_run(tmp_path))
    answer = visitor.get(address(visitor))
    assert answer.content == b"".join(column.tobytes() for column in columns.values())


def test_a_browser_keeps_the_points_for_as_long_as_they_are_true(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path)
    visitor = client(explorer)
    first = address(visitor)
    answer = visitor.get(first)
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert visitor.get(first, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    for other in ("/map/points", "/map/points?digest=", "/map/points?digest=0123"):
        plain = visitor.get(other)
        assert plain.headers["cache-control"] == "private, no-cache"
        assert plain.content == answer.content
    set_array(explorer, "density", np.full(40, 0.5, np.float32))
    assert address(client(Explorer.of_run(tmp_path))) != first


def test_columns_that_are_missing_are_left_out(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path)
    change(explorer, "DELETE FROM arrays WHERE name = 'cluster'")
    page = client(explorer).get("/map").text
    assert 'data-columns="map density"' in page
    assert 'value="cluster"' not in page
    change(explorer, "DELETE FROM arrays WHERE name = 'map'")
    page = client(explorer).get("/map").text
    assert "This latents.db has no map." in page
    assert "<canvas" not in page


def test_a_column_of_other_latents_is_refused(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path)
    set_array(explorer, "map", np.zeros((39, 2), np.float32))
    answer = client(explorer).get("/map")
    assert answer.status_code == 400
    assert "map has shape (39, 2), expected (40, 2)" in answer.text


def test_values_of_another_type_are_told_as_the_script_takes_them(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path)
    set_array(explorer, "cluster", np.arange(40, dtype=np.int64))
    points = points_of(LatentsDB(explorer.db.path))
    assert np.array_equal(np.frombuffer(points.data, "<i2", offset=12 * 40), np.arange(40))


def test_latents_are_told_in_the_order_asked_for(explorer: Explorer, visitor: TestClient) -> None:
    explorer.db.write_label(3, "<b>bridges</b>")
    found = visitor.get("/map/latents", params={"ids": "3,0,39,999999"}, headers=ASK).json()["latents"]
    assert [one["latent"] for one in found] == [3, 0, 39]
    expected = explorer.db.latent(3)
    assert found[0] == {
        "latent": 3,
        "title": expected.title,
        "label": "<b>bridges</b>",
        "density": expected.density,
        "max_act": expected.max_act,
        "dead": False,
    }
    assert found[1]["dead"] is True
    assert visitor.get("/map/latents", headers=ASK).json() == {"latents": []}


@pytest.mark.parametrize(
    "ids", [",", "x", "1,", "-1", "1.0", "1e3", "9" * 30, "٣", " 1", "1;2", "1,2)--", ",".join(["1"] * (MOST_IDS + 1))]
)
def test_odd_ids_are_refused_in_words(visitor: TestClient, ids: str) -> None:
    answer = visitor.get("/map/latents", params={"ids": ids}, headers=ASK)
    assert answer.status_code == 400
    assert "with commas between them" in answer.json()["error"]


def test_a_search_marks_latents(explorer: Explorer, visitor: TestClient) -> None:
    found = visitor.get("/map/search", params={"q": " bridge "}, headers=ASK).json()
    assert found["latents"]
    assert len(found["latents"]) <= MOST_FOUND
    scores = [one["score"] for one in found["latents"]]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) > 0
    assert found["how"]
    number = visitor.get("/map/search", params={"q": "7"}, headers=ASK).json()
    assert [one["latent"] for one in number["latents"]] == [7]


@pytest.mark.parametrize("text", ["", "  ", "%", "_", "\\", "'", '"', "\x00", "x" * 10_000, "40", "-1", "NEAR(", "🌉"])
def test_odd_searches_find_little_and_break_nothing(visitor: TestClient, text: str) -> None:
    answer = visitor.get("/map/search", params={"q": text}, headers=ASK)
    assert answer.status_code == 200
    assert answer.json()["latents"] == []


def test_the_page_says_how_the_map_was_made(tmp_path: Path) -> None:
    for facts, says in (
        ({"method": "umap"}, "those with the most similar decoder rows (UMAP)"),
        ({"method": "pca", "variance": 0.0731}, "two directions of most variance (PCA), which hold 7.3 % of it."),
        ({"method": "pca"}, "two directions of most variance (PCA). "),
        ({"method": "<b>other</b>"}, "in two dimensions (<b>other</b>)."),
        ({}, "Decoder rows in two dimensions."),
    ):
        assert says in in_words(facts)
    names = ["<script>alert(1)</script>", 3, ""]
    page = client(explorer_of(tmp_path, map={"method": "<b>x</b>"}, clusters=names)).get("/map").text
    assert "in two dimensions (&lt;b&gt;x&lt;/b&gt;)." in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert '<span dir="auto">cluster 2</span>' in page
    (tmp_path / "other").mkdir()
    page = client(explorer_of(tmp_path / "other", map=None, clusters=None)).get("/map").text
    assert "Decoder rows in two dimensions." in page


def test_a_latents_page_leads_to_its_place(visitor: TestClient) -> None:
    assert '<a href="/map?latent=7">' in visitor.get("/latent/7").text
