"""Two runs side by side: what is matched in the background, its lists, and runs that cannot be compared."""

import html
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hanging import wait_until
from latents_db import make_db

pytest.importorskip("starlette")
import torch
from explorer_client import client
from starlette.testclient import TestClient
from two_runs import SHARED, A, B, decoders, make_run

from saefast.explorer.compare import PAGE, siblings
from saefast.explorer.pairing import Columns, Rows, in_order, parts_of
from saefast.explorer.state import Explorer
from saefast.latents import matched
from saefast.latents.database import LatentsDB

ASK = {"Accept": "application/json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, (a, b) = tmp_path_factory.mktemp("runs"), decoders()
    return make_run(folder / "first", a), make_run(folder / "second", b, seed=1)


def visiting(run: Path, other: Path | None) -> TestClient:
    return client(Explorer.of_run(run, other))


def settled(visitor: TestClient) -> dict[str, Any]:
    """What becomes of the matching that a first look has begun."""
    assert visitor.get("/compare").status_code == 200
    found: list[dict[str, Any]] = []

    def done() -> bool:
        found[:] = [visitor.get("/compare/state", headers=ASK).json()]
        return found[0]["is"] != "working"

    wait_until(done, "the matching")
    return found[0]


@pytest.fixture(scope="module")
def visitor(runs: tuple[Path, Path]) -> TestClient:
    opened = visiting(*runs)
    assert settled(opened)["is"] == "ready"
    return opened


@pytest.fixture(scope="module")
def found(runs: tuple[Path, Path], visitor: TestClient) -> matched.Matched:
    digests = [LatentsDB(run / "latents.db").meta["sae"]["digest"] for run in runs]
    return matched.read(matched.path_of(runs[0], *digests))


def rows(visitor: TestClient, **query: Any) -> list[tuple[int, int, float]]:
    """The latents of a page, side by side."""
    page = visitor.get("/compare", params=query)
    assert page.status_code == 200
    numbers = [int(n) for n in re.findall(r"<h3>.*?<small>(\d+)</small>", page.text, re.DOTALL)]
    cosines = [float(c.replace("−", "-")) for c in re.findall(r'<p class="cosine"[^>]*>([^<]+)<', page.text)]
    return list(zip(numbers[::2], numbers[1::2], cosines, strict=True))


def all_rows(visitor: TestClient, **query: Any) -> list[tuple[int, int, float]]:
    pages: list[list[tuple[int, int, float]]] = []
    while len(pages) < 2 or pages[-1] != pages[-2]:
        pages.append(rows(visitor, page=len(pages) + 1, **query))
    # Beyond the last page is the last page.
    return [row for page in pages[:-1] for row in page]


def test_pages_hold_every_pair_once_the_most_alike_first(visitor: TestClient, found: matched.Matched) -> None:
    seen = all_rows(visitor)
    pairs = found.mutual()
    assert [row[:2] for row in seen] == [tuple(pair) for pair in pairs.tolist()]
    # Rows that are not shared may be alike by chance: what is shared is there in any case.
    assert {(i, SHARED - 1 - i) for i in range(SHARED)} <= {row[:2] for row in seen}
    assert len(rows(visitor)) == PAGE
    assert [row[2] for row in seen] == pytest.approx(found.a_cosine[pairs[:, 0]].tolist(), abs=0.005)
    assert all_rows(visitor, sort="reverse") == seen[::-1]


@pytest.mark.parametrize("side", ["a", "b"])
def test_pages_hold_every_latent_that_only_one_has(
    runs: tuple[Path, Path], visitor: TestClient, found: matched.Matched, side: Any
) -> None:
    db = LatentsDB(runs["ab".index(side)] / "latents.db")
    expected = [i for i in found.only(side, 0.8).tolist() if not db.latent(i).dead]
    here = {row["ab".index(side)]: row for row in all_rows(visitor, list=side, sort="cosine", alike=0.8)}
    assert list(here) == expected
    best, cosine = (found.a_best, found.a_cosine) if side == "a" else (found.b_best, found.b_cosine)
    for latent, row in here.items():
        assert row["ba".index(side)] == best[latent]
        assert row[2] == pytest.approx(cosine[latent], abs=0.005)
    by_score = [row["ab".index(side)] for row in all_rows(visitor, list=side, alike=0.8)]
    scores = [db.latent(i).score for i in by_score]
    assert sorted(by_score) == sorted(expected)
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    densities = [db.latent(row["ab".index(side)]).density for row in all_rows(visitor, list=side, sort="density")]
    assert densities == sorted(densities, reverse=True)


def test_every_latent_is_in_one_part(runs: tuple[Path, Path], found: matched.Matched) -> None:
    for alike in (0.3, 0.7, 0.95):
        for side, run, n in (("a", runs[0], A), ("b", runs[1], B)):
            parts = parts_of(found, side, alike, Columns(LatentsDB(run / "latents.db")))  # type: ignore[arg-type]
            assert sum(parts) == n
            assert min(parts) >= 0
            assert parts.paired == len(found.mutual(alike))


def test_a_page_shows_titles_contexts_and_figures(runs: tuple[Path, Path], visitor: TestClient) -> None:
    page = visitor.get("/compare").text
    a, b, _ = rows(visitor)[0]
    for run, latent in zip(runs, (a, b), strict=True):
        db = LatentsDB(run / "latents.db")
        assert f'<span class="title" dir="auto">{html.escape(db.latent(latent).title)}</span>' in page
        example = db.examples(latent, 0)[0]
        piece = re.escape(example.context.pieces[example.peak].strip())
        assert re.search(rf'<span class="s20 peak" title="[\d.]+">{piece}</span>', page)
    assert f'<a href="/latent/{a}">' in page
    for figure in ("<td>topk", f"<td>{A}", f"<td>{B}", "<td>4.00"):
        assert figure in page
    assert page.count("<rect class=") == 2 * (50 + 3)
    assert "one in a hundred reaches" in page


@pytest.mark.parametrize("odd", ["", "x", "-1", "0", "1.5", "NaN", "inf", "1e999", "9" * 40, "٣", "\x00", "pairs;"])
def test_odd_queries_show_what_there_is(visitor: TestClient, odd: str) -> None:
    plain = rows(visitor)
    assert rows(visitor, list=odd) == plain
    assert rows(visitor, sort=odd) == plain
    assert rows(visitor, alike=odd) == plain
    last = rows(visitor, page="999")
    assert rows(visitor, page=odd) in (plain, last)


def test_what_was_found_is_there_at_once_the_next_time(runs: tuple[Path, Path], visitor: TestClient) -> None:
    again = visiting(*runs)
    assert "are each other" in again.get("/compare").text
    assert again.get("/compare/state", headers=ASK).json() == {"is": "ready", "done": 0, "of": 0, "error": ""}


def test_views_are_served_without_torch(runs: tuple[Path, Path], visitor: TestClient) -> None:
    program = (
        "import sys; from pathlib import Path; from starlette.testclient import TestClient\n"
        "from saefast.explorer.app import make_app; from saefast.explorer.state import Explorer\n"
        "explorer = Explorer.of_run(*map(Path, sys.argv[1:]))\n"
        "client = TestClient(make_app(explorer), base_url='http://127.0.0.1:8765')\n"
        "client.cookies.set('saefast-8765', explorer.token)\n"
        "for path in ('/compare', '/map', '/map/points', '/training', '/training/data'):\n"
        "    assert client.get(path).status_code == 200, path\n"
        "assert 'each other' in client.get('/compare').text\n"
        "assert 'torch' not in sys.modules\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, runs)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("damage", [b"", b"no file of ours", b"PK\x03\x04"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    a, b = decoders()
    run, other = make_run(tmp_path / "a", a), make_run(tmp_path / "b", b)
    digests = [LatentsDB(folder / "latents.db").meta["sae"]["digest"] for folder in (run, other)]
    path = matched.path_of(run, *digests)
    path.write_bytes(damage)
    assert settled(visiting(run, other))["is"] == "ready"
    assert len(matched.read(path).a_best) == A


def test_a_page_never_waits_for_the_matching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saefast.latents import matching

    a, b = decoders()
    visitor = visiting(make_run(tmp_path / "a", a), make_run(tmp_path / "b", b))
    go_on, begun, plain, calls = threading.Event(), threading.Event(), matching.match, []

    def slow(a: Any, b: Any, facts: Any, advance: Any) -> Any:
        calls.append(1)
        advance(10)
        begun.set()
        go_on.wait()
        return plain(a, b, facts)

    monkeypatch.setattr(matching, "match", slow)
    for _ in range(3):
        page = visitor.get("/compare").text
        assert 'id="working"' in page
        assert "<td>topk" in page
    begun.wait()
    state = visitor.get("/compare/state", headers=ASK).json()
    assert state == {"is": "working", "done": 10, "of": A + B + 2 * matching.CONTROL_ROWS, "error": ""}
    go_on.set()
    assert settled(visitor)["is"] == "ready"
    assert calls == [1]


def test_a_process_that_ends_ends_the_matching_first(tmp_path: Path) -> None:
    """Ctrl-C while latents are compared: nothing is left half done, and nothing is said."""
    run = make_run(tmp_path / "a", torch.randn(4096, 64), db=False)
    make_db(run, 50, n_sequences=2)
    program = (
        "import sys, time; from pathlib import Path; from saefast.latents.database import LatentsDB\n"
        "import saefast.explorer.matching as explorer; import saefast.latents.matching as latents\n"
        "weights, match = explorer.weights, latents.match\n"
        "def endless(a, b, facts, advance):\n"
        "    while True:\n"
        "        match(a, b, facts)\n"
        "        advance(1)\n"
        "latents.match = endless\n"
        "run = Path(sys.argv[1]); db = LatentsDB(run / 'latents.db')\n"
        "explorer.weights = lambda run: (weights(run)[0], db.meta['sae']['digest'])\n"
        "matching = explorer.Matching(run, db, run, None); matching.begin()\n"
        "while not matching.done: time.sleep(0.001)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not list(run.glob("*match*"))


def test_a_run_without_latents_db_is_compared_without_titles(tmp_path: Path) -> None:
    a, b = decoders()
    visitor = visiting(make_run(tmp_path / "a", a), make_run(tmp_path / "b", b, db=False))
    assert settled(visitor)["is"] == "ready"
    page = visitor.get("/compare").text
    assert "B has no latents.db, so its latents have no titles" in page
    assert {(i, SHARED - 1 - i) for i in range(SHARED)} <= {row[:2] for row in all_rows(visitor)}
    for query in ({"list": "b"}, {"list": "b", "sort": "density"}, {"list": "a"}):
        assert rows(visitor, **query)


def test_a_folder_that_cannot_be_written_is_shown_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saefast.latents import matching

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    a, b = decoders()
    visitor = visiting(make_run(tmp_path / "a", a), make_run(tmp_path / "b", b))
    monkeypatch.setattr(matching, "write", refuse)
    assert settled(visitor)["is"] == "ready"
    assert rows(visitor)


def test_runs_that_cannot_be_compared_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = decoders()
    run = make_run(tmp_path / "a", a)
    narrow = make_run(tmp_path / "narrow", b[:, :8])
    (empty := tmp_path / "<i>empty").mkdir()
    changed = make_run(tmp_path / "changed", b, sae={"digest": "0" * 64, "architecture": "topk", "k": 4, "hook": "h"})
    for other, why in (
        (narrow, "vectors of 16 and of 8 numbers"),
        (empty, "empty"),
        (changed, "is of other weights than"),
        (tmp_path / "nowhere", "There is no folder"),
    ):
        visitor = visiting(run, other)
        if other.is_dir():
            assert settled(visitor)["is"] == "failed"
        page = visitor.get("/compare").text
        assert why in page, page
        assert "<i>empty" not in page
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "latents.db").write_bytes(b"x" * 1000)
    visitor = visiting(run, damaged)
    assert "is damaged, or no SQLite file" in visitor.get("/compare").text
    assert visitor.get("/compare/state", headers=ASK).status_code == 400


def test_without_another_run_those_beside_it_are_named(tmp_path: Path) -> None:
    for name in ("run", "it's <i>", "other"):
        (tmp_path / name).mkdir()
        make_db(tmp_path / name)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "latents.db").write_bytes(b"x")
    (tmp_path / "no run").mkdir()
    found = siblings(tmp_path / "run")
    assert [one.name for one in found] == ["it's <i>", "other"]
    for one in found:
        assert shlex.split(one.command) == ["saefast", "explore", str(tmp_path / "run"), str(tmp_path / one.name)]
    visitor = visiting(tmp_path / "run", None)
    page = visitor.get("/compare").text
    assert "it&#39;s &lt;i&gt;" in page
    assert "<i>" not in page
    assert visitor.get("/compare/state", headers=ASK).json() == {"is": "none"}
    # Nothing of the query names a folder.
    for query in ({"other": str(tmp_path / "other")}, {"run": ".."}):
        assert visitor.get("/compare", params=query).text == page
    shutil.rmtree(tmp_path / "other")
    shutil.rmtree(tmp_path / "it's <i>")
    assert "No other folder in" in visitor.get("/compare").text


def test_columns_are_those_of_the_latents_and_missing_scores_come_last(tmp_path: Path) -> None:
    path = make_db(tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE latents SET score = NULL WHERE latent % 3 = 0")
    db = LatentsDB(path)
    columns = Columns(db)
    latents = db.latents(range(40))
    assert columns.dead.tolist() == [latent.dead for latent in latents] == [True] + [False] * 39
    assert columns.density.tolist() == pytest.approx([latent.density for latent in latents])
    assert [None if np.isnan(value) else value for value in columns.score] == [latent.score for latent in latents]
    ids = np.arange(40)
    by_score = in_order(Rows(ids, ids, ids.astype(np.float32)), "a", "score", columns).a.tolist()
    assert sorted(by_score[-14:]) == list(range(0, 40, 3))
    scores = [latents[i].score for i in by_score[:-14]]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
