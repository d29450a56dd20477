"""The table of latents and the search: what they show is what the file holds, and odd addresses break nothing."""

import html
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

pytest.importorskip("starlette")
from explorer_client import client, explorer_of, page
from starlette.testclient import TestClient

from saefast.explorer.listing import ROWS, SHOWN, SORTS, SPANS, Listing
from saefast.explorer.state import Explorer
from saefast.latents.search import search

N = 130


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    explorer = explorer_of(tmp_path_factory.mktemp("run"), N)
    explorer.db.write_label(7, "the seventh")
    explorer.db.write_label(9, "the ninth")
    return explorer


@pytest.fixture(scope="module")
def visitor(explorer: Explorer) -> TestClient:
    return client(explorer)


def shown(text: str) -> list[int]:
    """The latents of a table, in order."""
    return [int(number) for number in re.findall(r'<td class="id"><a href="/latent/(\d+)', text)]


def rank(row: Any, column: str) -> float:
    value = getattr(row, column)
    return float("-inf") if value is None else value


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sort", ["score", "density", "max_act", "mean_act", "latent"])
def test_pages_one_after_the_other_are_all_latents_in_order(
    explorer: Explorer, visitor: TestClient, sort: str, reverse: bool
) -> None:
    found: list[int] = []
    for number in range(1, 4):
        query = {"sort": sort, "page": number} | ({"order": "reverse"} if reverse else {})
        rows = shown(page(visitor, f"/?{urlencode(query)}"))
        assert len(rows) == min(ROWS, N - len(found))
        found += rows
    everything = [explorer.db.latent(latent) for latent in range(N)]
    down = sorted(everything, key=lambda row: (-rank(row, sort), row.latent))
    expected = [row.latent for row in (down[::-1] if sort == "latent" else down)]
    assert found == (expected[::-1] if reverse else expected)


def test_the_most_telling_come_first_where_nothing_is_asked_for(explorer: Explorer, visitor: TestClient) -> None:
    telling = explorer.db.telling()
    assert shown(page(visitor, "/"))[: len(telling)] == telling


def test_the_next_page_and_the_column_heads_keep_what_was_asked_for(visitor: TestClient) -> None:
    text = page(visitor, "/?sort=density&show=alive&max_from=0.5&page=2")
    links = {html.unescape(link) for link in re.findall(r'href="(/\?[^"]*)"', text)}
    assert "/?sort=density&show=alive&max_from=0.5&page=3" in links
    assert "/?sort=density&show=alive&max_from=0.5" in links
    assert "/?sort=max_act&show=alive&max_from=0.5" in links
    assert "/?sort=density&order=reverse&show=alive&max_from=0.5" in links
    assert '<option value="density" selected>' in text
    assert '<option value="alive" selected>' in text
    assert 'name="max_from" value="0.5"' in text


def test_filters_are_those_of_a_look_at_every_latent(explorer: Explorer, visitor: TestClient) -> None:
    everything = [explorer.db.latent(latent) for latent in range(N)]
    cases = {
        "show=dead": [row for row in everything if row.dead],
        "show=alive": [row for row in everything if not row.dead],
        "show=dense": [row for row in everything if row.dense],
        "show=sparse": [row for row in everything if not row.dense and not row.dead],
        "show=labelled": [row for row in everything if row.label],
        "density_from=0.5&density_to=1": [row for row in everything if 0.005 <= row.density <= 0.01],
        "max_from=1.9": [row for row in everything if row.max_act >= 1.9],
        "mean_to=0.8&show=alive": [row for row in everything if row.mean_act <= 0.8 and not row.dead],
        "score_from=1&score_to=2": [row for row in everything if row.score is not None and 1 <= row.score <= 2],
        "score_from=2&score_to=1": [],
        "max_from=inf": [],
    }
    for query, expected in cases.items():
        text = page(visitor, f"/?sort=latent&{query}")
        assert shown(text) == [row.latent for row in expected][:ROWS], query
        if expected:
            assert f"of {len(expected):,}</span>" in text, query
        else:
            assert "No latent is like that." in text


ODD = [
    "page=-1", "page=0", "page=1.5", "page=x", "page=NaN", "page=%E0%A5%A7", "page=" + "9" * 30, "page=1e3",
    "sort=x", "sort=", "sort[]=score", "show=x", "order=x", "density_from=x", "density_from=NaN", "max_to=1,5",
    "score_from=%00", "q=%00", "q=" + "a" * 5000, "q=%22%27%28*%29+OR+NEAR", "q=%F0%9F%98%80", "q=%FF%FE",
    "q=%23" + "9" * 40, "q=%23" + "9" * 18, "sort=score&sort=density", "a=1&a=2", "%00=%00", "q=%E2%80%AE",
    "density_from=1e999", "density_from=-1e-400", "max_to=-inf",
]  # fmt: skip


@pytest.mark.parametrize("query", ODD)
def test_an_odd_address_is_a_page_or_told_what_was_expected(visitor: TestClient, query: str) -> None:
    answer = visitor.get(f"/?{query}")
    assert answer.status_code in (200, 303, 400)
    if answer.status_code == 400:
        assert "expected" in answer.text


def test_most_odd_addresses_are_refused(visitor: TestClient) -> None:
    refused = {query for query in ODD if visitor.get(f"/?{query}").status_code == 400}
    assert {"page=-1", "page=0", "page=x", "page=NaN", "sort=x", "show=x", "order=x", "density_from=NaN"} <= refused
    assert "a=1&a=2" not in refused


def test_a_page_behind_the_last_leads_to_the_last(visitor: TestClient) -> None:
    answer = visitor.get("/?page=1000000000000000&sort=density")
    assert answer.headers["location"] == "/?sort=density&page=3"
    assert visitor.get("/?show=dead&page=2").headers["location"] == "/?show=dead"


def test_an_address_says_all_that_was_asked_for() -> None:
    for sort in SORTS:
        for show in SHOWN:
            asked = {"sort": sort, "show": show, "order": "reverse", "page": "3"}
            asked |= {
                f"{span.name}_{end}": value for span in SPANS for end, value in (("from", "0.25"), ("to", "1e-07"))
            }
            listing = Listing.of(asked)
            query = listing.address().partition("?")[2]
            assert Listing.of(dict(pair.split("=") for pair in query.split("&"))) == listing
    assert Listing.of({}).address() == "/"


def test_the_head_says_what_the_dictionary_is(explorer: Explorer, visitor: TestClient) -> None:
    text = page(visitor, "/")
    assert f"<h1>{N} latents" in text
    dead = sum(explorer.db.latent(latent).dead for latent in range(N))
    assert f"<b>{100 * dead / N:.2f} %</b> dead" in text
    assert "<b>2</b> labelled" in text
    assert "<b>360</b> tokens" in text


def test_each_row_has_its_numbers_and_its_histogram(explorer: Explorer, visitor: TestClient) -> None:
    rows = re.findall(r"<tr data-walk>.*?</tr>", page(visitor, "/?sort=latent"), flags=re.DOTALL)
    assert "never fires" in rows[0]
    assert "<svg" not in rows[0]
    assert "the seventh" in rows[7]
    for latent in (1, 7, 30):
        row = explorer.db.latent(latent)
        assert f">{row.max_act:.2f}<" in rows[latent]
        path = re.search(r'<path d="M0 18(.*?)V18Z"', rows[latent])
        assert path is not None
        tops = [float(step) for step in re.findall(r"V([\d.]+)h1", path[1])]
        counts = explorer.db.histogram(latent).reshape(25, -1).sum(1)
        assert [top == 18 for top in tops] == [count == 0 for count in counts.tolist()]
        assert min(tops) == 0 == tops[counts.argmax()]


def test_a_search_shows_what_was_found(explorer: Explorer, visitor: TestClient) -> None:
    text = page(visitor, "/?q=bridge")
    found = search(explorer.db, "bridge")
    assert found.hits
    assert shown(text) == [hit.latent for hit in found.hits]
    assert html.escape(found.how) in text
    assert text.count('<span class="found">') == sum(len(match.spans) for match in found.matches)
    assert re.findall(r'<span class="found">\s*(\w+)</span>', text) == ["bridge"] * text.count('class="found"')
    assert 'value="bridge"' in text


def test_a_number_with_its_sign_is_a_latent_and_one_without_may_be_a_word(visitor: TestClient) -> None:
    assert visitor.get("/?q=%237").headers["location"] == "/latent/7"
    assert visitor.get(f"/?q=%23{N}").status_code == 200
    assert shown(page(visitor, "/?q=7"))[0] == 7


def test_a_label_is_found(visitor: TestClient) -> None:
    assert shown(page(visitor, "/?q=seventh")) == [7]


def test_a_dictionary_without_tokens_or_scores_has_its_table(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path, kind="rows", unit="rows", score=None, logits={"what": None, "why": "no model"})
    with closing(sqlite3.connect(explorer.db.path)) as db, db:
        db.execute("UPDATE latents SET score = NULL, title = ''")
        for table in ("telling", "latent_tokens", "tokens", "contexts", "examples", "logit_weights"):
            db.execute(f"DELETE FROM {table}")
    visitor = client(explorer)
    assert len(shown(page(visitor, "/"))) == 40
    assert "no tokens of its own" in page(visitor, "/")
    text = page(visitor, "/latent/3")
    assert "There are no contexts" in text
    assert "no model" in text


def test_a_run_without_latents_shows_its_training(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    explorer = Explorer(tmp_path, why="it is still training")
    visitor = client(explorer)
    assert visitor.get("/").headers["location"] == "/training"
    answer = visitor.get("/latent/1")
    assert answer.status_code == 404
    assert "Which latents" not in visitor.get("/training").text
