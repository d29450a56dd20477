"""The text view: what is posted is read and described, one text at a time, and nothing else waits for it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
from explorer_client import client, explorer_of, from_our_page
from hanging import HANG, wait_until
from starlette.testclient import TestClient

from saefast.errors import InputError
from saefast.explorer import text
from saefast.explorer.loading import Loading, NotReady
from saefast.explorer.reader import ReadText
from saefast.explorer.state import Explorer
from saefast.explorer.text import described, latents_of

L = 40


def read_text(words: list[str], left_out: int = 0) -> ReadText:
    """A made-up code: none of a special token, then of the i-th word latents 2 + i and 7; once of latent 0, dead."""
    n = len(words)
    pairs = [sorted([(5.0 + i, 2 + i), (0.5, 7)], reverse=True) for i in range(n)]
    pairs[0].append((0.25, 0))
    flat = [entry for entries in pairs for entry in entries]
    return ReadText(
        np.arange(n + 1, dtype=np.int32),
        ["", *words],
        np.array([False] + [True] * n),
        [0],
        np.cumsum([0, 0, *map(len, pairs)]),
        np.array([latent for _, latent in flat], np.int32),
        np.array([act for act, _ in flat], np.float32),
        left_out,
    )


class FakeReader:
    """Reads words; `gate` holds it up, and `most` is how many texts it has had in hand at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.began = threading.Semaphore(0)
        self._now = self.most = 0

    def read(self, words: str) -> ReadText:
        if not words.strip():
            raise InputError("the text is empty: type or paste some")
        self._now += 1
        self.most = max(self.most, self._now)
        self.began.release()
        assert self.gate.wait(HANG)
        self._now -= 1
        return read_text(words.split(" "))

    def name(self, token: int) -> str:
        return "<s>"


@pytest.fixture
def explorer(tmp_path: Path) -> Explorer:
    return explorer_of(tmp_path, L)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeReader:
    found = FakeReader()
    monkeypatch.setattr(text, "_reader", lambda explorer: found)
    return found


def ready(explorer: Explorer) -> TestClient:
    """A client that has seen the page, once the model is there."""
    visitor = client(explorer)
    assert visitor.get("/text").status_code == 200
    wait_until(lambda: visitor.get("/text/state").json()["state"] != "loading", "the model")
    return visitor


def test_a_text_is_described(explorer: Explorer, fake: FakeReader) -> None:
    answer = ready(explorer).post("/text/read", data={"text": "a b c"}, headers=from_our_page(explorer))
    assert answer.status_code == 200
    found, read = answer.json(), read_text(["a", "b", "c"])
    assert found["texts"] == ["", "a", "b", "c"]
    assert found["names"] == {"0": "<s>"}
    assert found["kept"] == [0, 1, 1, 1]
    assert found["row_ptr"] == read.row_ptr.tolist()
    assert [found["latents"][place]["latent"] for place in found["place"]] == read.idx.tolist()
    assert found["acts"] == read.acts.tolist()


def test_latents_come_with_what_latents_db_knows_of_them(explorer: Explorer) -> None:
    explorer.db.write_label(3, "bridges")
    read = read_text(["a", "b", "c"])
    found = {latent["latent"]: latent for latent in described(explorer.db, read)["latents"]}
    assert set(found) == {0, 2, 3, 4, 7}
    for number, latent in found.items():
        known = explorer.db.latent(number)
        assert (latent["title"], latent["label"], latent["density"]) == (known.title, known.label, known.density)
        where = [i for i in range(4) if number in read.idx[read.row_ptr[i] : read.row_ptr[i + 1]]]
        assert latent["n"] == len(where)
        assert latent["peak"] == where[0]
        assert latent["act"] == max(read.acts[read.idx == number])
        # A dead latent has no largest activation: here is the first.
        assert latent["most"] == (0.25 if known.dead else known.max_act)
    assert found[3]["label"] == "bridges"


def test_the_telling_latents_come_first(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path, L)
    answer = described(explorer.db, read_text(["a", "b", "c"]))["latents"]
    told = [min(latent["act"] / latent["most"], 1) * latent["rarity"] for latent in answer]
    assert told == sorted(told, reverse=True)
    for latent in answer:
        density = explorer.db.latent(latent["latent"]).density
        assert latent["rarity"] == pytest.approx(-np.log10(density) if density else 0)
    assert answer[-1]["latent"] == 0


def test_a_text_without_a_code(explorer: Explorer) -> None:
    none = ReadText(np.zeros(2, np.int32), ["", ""], np.zeros(2, bool), [0], np.zeros(3, np.int64),
                    np.zeros(0, np.int32), np.zeros(0, np.float32), 0)  # fmt: skip
    found = described(explorer.db, none)
    assert (found["latents"], found["place"], found["acts"], found["kept"]) == ([], [], [], [0, 0])


def test_any_number_of_latents_is_looked_up(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_AT_A_TIME", 7)
    assert [latent.latent for latent in latents_of(explorer.db, list(range(L)))] == list(range(L))


def test_control_characters_are_shown_and_markup_is_left_to_the_page(explorer: Explorer) -> None:
    found = described(explorer.db, read_text(["<b>", "\x1b[0m", "\u202e", "a\nb"]))
    assert found["texts"] == ["", "<b>", "␛[0m", "\\u202e", "a\nb"]


def test_texts_are_read_one_at_a_time_and_nothing_else_waits(explorer: Explorer, fake: FakeReader) -> None:
    visitor = ready(explorer)
    headers = from_our_page(explorer)
    fake.gate.clear()
    texts = ["a b", "c d e", "f", "a b"]
    with visitor, ThreadPoolExecutor(len(texts)) as pool:
        answers = [pool.submit(visitor.post, "/text/read", data={"text": one}, headers=headers) for one in texts]
        assert fake.began.acquire(timeout=HANG)
        assert visitor.get("/text/state").json() == {"state": "ready", "why": ""}
        assert visitor.get("/static/base.css").status_code == 200
        assert visitor.get("/text").status_code == 200
        assert not any(answer.done() for answer in answers)
        fake.gate.set()
        found = [answer.result(HANG).json()["texts"][1:] for answer in answers]
    assert found == [one.split(" ") for one in texts]
    assert fake.most == 1


def test_before_the_model_is_there_it_says_so(explorer: Explorer, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, fake = threading.Event(), FakeReader()
    monkeypatch.setattr(text, "_reader", lambda explorer: fake if gate.wait(HANG) else None)
    visitor = client(explorer)
    assert visitor.get("/text/state").json()["state"] == "not begun"
    assert visitor.get("/text").status_code == 200
    assert visitor.get("/text/state").json()["state"] == "loading"
    answer = visitor.post("/text/read", data={"text": "a"}, headers=from_our_page(explorer))
    assert (answer.status_code, answer.json()["state"]) == (503, "loading")
    gate.set()
    wait_until(lambda: visitor.get("/text/state").json()["state"] == "ready", "the model")
    assert visitor.post("/text/read", data={"text": "a"}, headers=from_our_page(explorer)).status_code == 200


def test_a_model_that_does_not_load_says_why_and_is_tried_again(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: Iterator[Exception | FakeReader] = iter(
        [InputError("no such model"), OSError("disk\ngone"), FakeReader()]
    )

    def load(_: Explorer) -> FakeReader:
        found = next(failures)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(text, "_reader", load)
    visitor, seen = client(explorer), []
    for _ in range(3):
        assert visitor.get("/text").status_code == 200
        wait_until(lambda: visitor.get("/text/state").json()["state"] != "loading", "the model")
        seen.append(visitor.get("/text/state").json())
    why = {"state": "failed", "why": "no such model"}
    assert seen == [why, {"state": "failed", "why": "OSError: disk gone"}, {"state": "ready", "why": ""}]


def test_what_is_asked_wrongly_gets_a_line(explorer: Explorer, fake: FakeReader) -> None:
    visitor, headers = ready(explorer), from_our_page(explorer)
    empty = visitor.post("/text/read", data={"text": " \n"}, headers=headers)
    assert (empty.status_code, empty.json()) == (400, {"error": "the text is empty: type or paste some"})
    assert visitor.post("/text/read", data={}, headers=headers).status_code == 400
    huge = visitor.post("/text/read", data={"text": "a" * (1 << 20)}, headers=headers)
    assert huge.status_code == 413
    assert "longer than 1,048,576 bytes" in huge.json()["error"]
    assert visitor.post("/text/read", data={"text": "a"}, headers={"Origin": headers["Origin"]}).status_code == 403
    assert visitor.get("/text/read").status_code == 405
    assert visitor.get("/text", params={"latent": L}).status_code == 404
    assert visitor.get("/text", params={"latent": 10**30}).status_code == 404


def test_a_latent_comes_with_a_text_that_it_fires_in(explorer: Explorer, fake: FakeReader) -> None:
    for latent in range(L):
        examples = explorer.db.examples(latent, 0)
        expected = "".join(examples[0].context.pieces).strip() if examples else ""
        assert text.strongest(explorer.db, explorer.db.latent(latent)) == expected
    page = ready(explorer).get("/text", params={"latent": "3"}).text
    assert f'data-example="{text.strongest(explorer.db, explorer.db.latent(3))}"' in page
    assert "its strongest context" not in client(explorer).get("/text", params={"latent": "0"}).text


def test_the_page_knows_the_latent_that_it_was_asked_for(explorer: Explorer, fake: FakeReader) -> None:
    explorer.db.write_label(3, '"><script>')
    page = ready(explorer).get("/text", params={"latent": "3"}).text
    assert 'data-latent="3"' in page
    assert "&#34;&gt;&lt;script&gt;" in page
    for odd in ("", "-1", "x", "²", "3.5"):
        assert 'data-latent=""' in client(explorer).get("/text", params={"latent": odd}).text


@pytest.mark.parametrize("kind", ["images", "audio"])
def test_a_model_that_reads_no_text_is_not_loaded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: Explorer) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(text, "_reader", load)
    visitor = client(explorer_of(tmp_path, L, kind=kind))
    page = visitor.get("/text")
    assert page.status_code == 200
    assert f"The rows of this run are of {kind}, not of text" in page.text
    assert visitor.get("/text/state").json()["state"] == "not begun"


def test_loading_is_done_once(tmp_path: Path) -> None:
    calls: list[int] = []
    gate = threading.Event()

    def load() -> str:
        calls.append(1)
        assert gate.wait(HANG)
        return "there"

    found = Loading(load)
    with pytest.raises(NotReady):
        found.get()
    for _ in range(5):
        found.start()
    gate.set()
    wait_until(lambda: found.state == "ready", "loading")
    found.start()
    assert (found.get(), len(calls)) == ("there", 1)


def test_nothing_heavy_is_imported_for_the_page(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, saefast.explorer.text; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
