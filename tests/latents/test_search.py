"""Which latents fire on a word: against all rows counted one by one, on texts of any script, and for any query."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harvest.test_token_text import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from latents.test_contexts import Text, spool_of
from latents_db import WORDS, make_db

from saefast.harvest.token_text import Texts
from saefast.latents import occurrences as places
from saefast.latents import search as searching
from saefast.latents.contexts import write_sequences
from saefast.latents.database import LatentsDB
from saefast.latents.occurrences import occurrences
from saefast.latents.schema import create, finish
from saefast.latents.search import LONGEST_QUERY, Found, search


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> LatentsDB:
    return LatentsDB(make_db(tmp_path_factory.mktemp("db"), n_latents=80))


def counted(db: LatentsDB, words: list[str]) -> dict[int, tuple[float, float, int]]:
    """Latent -> share of its activation on the words, share of their occurrences it fires on, and how many, of all."""
    wanted = [WORDS.index(word) for word in words]
    on: dict[int, float] = {}
    fired: dict[int, set[tuple[int, int]]] = {}
    total: dict[int, float] = {}
    n = 0
    for row, codes in db.all_codes():
        tokens = row.tokens.tolist()
        # A context ends after ten words, and a phrase does not go on in the next.
        firsts = [
            i
            for i in range(len(tokens))
            if tokens[i : i + len(wanted)] == wanted and i // 10 == (i + len(wanted) - 1) // 10
        ]
        n += len(firsts)
        for latent, position, act in zip(*(column.tolist() for column in codes), strict=True):
            total[latent] = total.get(latent, 0.0) + act
            for first in firsts:
                if first <= position < first + len(wanted):
                    on[latent] = on.get(latent, 0.0) + act
                    fired.setdefault(latent, set()).add((row.sequence, first))
    return {latent: (on[latent] / total[latent], len(fired[latent]) / n, len(fired[latent])) for latent in on}


@pytest.mark.parametrize("query", ["bridge", "BRIDGE", " Stone ", "the of", "river bridge"])
def test_hits_are_those_of_all_rows_counted(db: LatentsDB, query: str) -> None:
    words = query.lower().split()
    expected = counted(db, words)
    assert expected or words == ["the", "of"]
    found = search(db, query, limit=1000)
    assert not found.sampled
    of_contexts = {hit.latent: hit for hit in found.hits if hit.why == "context"}
    for latent, hit in of_contexts.items():
        share, covered, n = expected[latent]
        assert hit.n == n
        assert hit.covered == pytest.approx(covered)
        assert hit.share == pytest.approx(share, rel=1e-5)
        beyond = (covered - (density := db.latent(latent).density)) / (1 - density)
        assert hit.score == pytest.approx(2 * share * beyond / (share + beyond), rel=1e-5)
    # Left out are those that fire there no more than by chance, and those whose tokens say more.
    for latent in expected.keys() - of_contexts.keys():
        by_token = [hit for hit in found.hits if hit.latent == latent and hit.why == "token"]
        assert by_token or expected[latent][1] <= db.latent(latent).density + 1e-9
    scores = [hit.score for hit in found.hits]
    assert scores == sorted(scores, reverse=True)


def test_the_latent_that_fires_on_a_word_alone_comes_first(tmp_path: Path) -> None:
    # One latent for each word, and one that fires everywhere.
    db = LatentsDB(make_db(tmp_path, n_latents=len(WORDS) + 2, k=2))
    for number, word in enumerate(WORDS):
        first = search(db, word).hits[0]
        assert first.latent == 2 + number
        assert (first.score, first.share, first.covered) == pytest.approx((1, 1, 1))
        assert 1 not in [hit.latent for hit in search(db, word).hits if hit.why == "context"]


def test_own_tokens_count_all_rows(db: LatentsDB) -> None:
    token = WORDS.index("bridge")
    hits = {hit.latent: hit for hit in search(db, "bridge", limit=1000).hits if hit.why == "token"}
    assert hits
    for latent, hit in hits.items():
        ((share, covered),) = db.query(
            "SELECT share, covered FROM latent_tokens WHERE latent = ? AND token = ?", (latent, token)
        )
        assert (hit.share, hit.covered) == pytest.approx((share, covered))


def test_matches_hold_the_words(db: LatentsDB) -> None:
    found = search(db, "bridge")
    assert found.matches
    assert len({"".join(match.context.pieces) for match in found.matches}) == len(found.matches)
    for match in found.matches:
        assert match.context == db.context(match.context.context)
        assert match.spans
        for first, stop in match.spans:
            assert "".join(match.context.pieces[first:stop]).strip() == "bridge"
        if match.latent is not None:
            codes = db.codes(match.context.sequence)
            positions, acts = codes.of(match.latent)
            on = [match.context.start + place for first, stop in match.spans for place in range(first, stop)]
            assert match.act in acts[np.isin(positions, on)].tolist()
    assert any(match.latent == found.hits[0].latent for match in found.matches)


def test_a_number_is_a_latent_and_labels_are_searched(tmp_path: Path) -> None:
    db = LatentsDB(make_db(tmp_path))
    assert [(hit.latent, hit.why) for hit in search(db, "17").hits] == [(17, "number")]
    assert search(db, " #3 ").hits[0].latent == 3
    assert search(db, "40").hits == []
    db.write_label(9, "Bridges and other crossings")
    assert [(hit.latent, hit.why) for hit in search(db, "other CROSS").hits] == [(9, "label")]
    first = search(db, "bridge").hits[0]
    assert (first.latent, first.why) == (9, "label")


TEXTS = [
    "The fox jumps over the lazy dog. The fox's dog isn't lazy, but foxes are!",
    "One fox\njumps over the\n    lazy fox; get_fox(fox_1) in C++ is 100% foxy.",
    "naïve – 狐狸跳过懒狗。狐 🦊 אריה שלום foo\x1b[31m <b>fox</b> \"quoted\" it's a 'fox'.",
    "Straße über Ärger, ÉCOLE école. 한국의 다리는 길다. สะพานยาว",
]
# Of each query the text that it stands in, and how often there.
QUERIES = {
    "fox": {0: 2, 1: 4, 2: 2},
    "FOX JUMPS": {0: 1, 1: 1},
    "the lazy": {0: 1, 1: 1},
    "lazy dog.": {0: 1},
    "isn't": {0: 1},
    "is": {1: 1},
    "C++": {1: 1},
    "100%": {1: 1},
    "get_fox(": {1: 1},
    "狐": {2: 2},
    "跳过": {2: 1},
    "懒狗": {2: 1},
    "狐狸跳过": {2: 1},
    "🦊": {2: 1},
    "שלום": {2: 1},
    "<b>fox</b>": {2: 1},
    '"quoted"': {2: 1},
    "'fox'": {2: 1},
    "école": {3: 2},
    "ärger": {3: 1},
    "다리": {3: 1},
    "สะพาน": {3: 1},
    # Inside of words, where no word is it.
    "umps": {0: 1, 1: 1},
    "aï": {2: 1},
    "no such words": {},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> LatentsDB:
    """A database in which latent n fires on token n, with activation 1."""
    tokenizer = byte_level()
    source = Text(tokenizer, TEXTS)
    path = tmp_path_factory.mktemp("texts") / "latents.db"
    db = create(path)
    n_latents = len(tokenizer.get_vocab())
    db.execute("INSERT INTO meta VALUES ('n_latents', ?)", (str(n_latents),))
    db.execute("INSERT INTO meta VALUES ('sae', '{\"digest\": \"x\"}')")
    write_sequences(db, spool_of([len(ids) for ids in source.ids]), source, Texts(tokenizer))
    counts = np.zeros(n_latents, np.int64)
    for sequence, ids in enumerate(source.ids):
        order = np.argsort(ids, kind="stable")
        columns = np.array(ids, "<i4")[order], order.astype("<u2"), np.ones(len(ids), "<f4")
        db.execute("INSERT INTO codes VALUES (?, ?, ?, ?)", (sequence, *(column.tobytes() for column in columns)))
        counts += np.bincount(ids, minlength=n_latents)
    for latent, n in enumerate(counts.tolist()):
        row = (latent, n, n / counts.sum(), float(n > 0), float(n > 0), None, n == 0, False, "")
        db.execute("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    finish(db)
    return LatentsDB(path)


@pytest.mark.parametrize("query", list(QUERIES))
def test_words_of_any_script_are_found_where_they_are(texts: LatentsDB, query: str) -> None:
    found = occurrences(texts, query.split())
    counts: dict[int, int] = {}
    for each in found.found:
        counts[each.sequence] = counts.get(each.sequence, 0) + len(each.spans)
        pieces = texts.context(each.context).pieces
        for first, stop in each.spans:
            text = "".join(pieces[first:stop])
            folded = " ".join(query.lower().split())
            assert folded in " ".join(text.lower().split())
            # No token more than it takes.
            for less in (pieces[first + 1 : stop], pieces[first : stop - 1]):
                assert folded not in " ".join("".join(less).lower().split()) or not pieces[first]
    assert counts == QUERIES[query]
    assert found.n_contexts == len(found.found)


def test_latents_fire_on_all_tokens_of_a_word(texts: LatentsDB) -> None:
    tokenizer = byte_level()
    # A character of several tokens: each of them is on it.
    ids = tokenizer("跳", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    hits = {hit.latent: hit for hit in search(texts, "跳").hits}
    assert set(ids) <= set(hits)
    assert all(hits[token].covered == hits[token].n == 1 for token in ids)


NASTY = [
    "", " ", "\0", "\n\t", '"', '""', "'", "''", "\\", "%", "_", "*", "fox*", "NEAR(fox dog)", "fox OR", "AND",
    "NOT fox", "text : fox", "{text} : fox", "^fox", "-fox", "fox + dog", "(((", ")", '"fox', "' OR 1=1", "fo.", "?1",
    "fox\"; DROP TABLE latents; --", "fox\0dog", "\ud800", "\udfff fox", "👩\u200d🚀", "🦊" * 3000, "\u202efox",
    "שלום עולם", "a" * 10_000, "fox " * 2500, "(" * 10_000, "[" * 50, "\\d+", "İ", "ß", "ſ", "\u212a", "#", "#fox",
    "9" * 9, "9" * 40, "-1", "1e5", "٣", "x'00'", ":a", "@a", "\ufeff", "\uffff", "\U0010ffff", "e\u0301",
    "<script>alert(1)</script>", "狐" * 500, "%" * 300, "a b c d e f g h i j k", "\\" * 300, "İİİ" * 60,
]  # fmt: skip


@pytest.mark.parametrize("query", NASTY)
def test_no_query_is_an_error(texts: LatentsDB, query: str) -> None:
    check_found(search(texts, query))


@settings(max_examples=120, deadline=None, database=None, derandomize=True)
@given(query=st.one_of(st.text(max_size=12), st.text(alphabet="fox \"'*():^-+%_\\0\n", max_size=12)))
def test_no_drawn_query_is_an_error(texts: LatentsDB, query: str) -> None:
    check_found(search(texts, query))


def check_found(found: Found) -> None:
    assert len(found.query) <= LONGEST_QUERY
    assert found.how.endswith(".")
    # Neither raw control characters nor what cannot be written as UTF-8.
    assert not any(sign < " " for sign in found.how)
    found.how.encode()
    assert all(0 <= hit.score <= 1 and 0 <= hit.share <= 1 and 0 <= hit.covered <= 1 for hit in found.hits)
    assert all(match.spans for match in found.matches)


def test_a_sample_is_looked_at_where_a_word_is_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = LatentsDB(make_db(tmp_path, n_latents=120, n_sequences=150, length=60, seed=3))
    whole = search(db, "river", limit=20)
    assert not whole.sampled
    assert whole.how == f"{whole.n_contexts} contexts hold “river”."
    exact = {hit.latent: hit for hit in whole.hits if hit.why == "context"}
    monkeypatch.setattr(searching, "MOST_ENTRIES", 12_000)
    read: list[int] = []
    codes = db.codes
    monkeypatch.setattr(db, "codes", lambda sequence: read.append(sequence) or codes(sequence))
    part = search(db, "river", limit=20)
    # 50 sequences of 240 entries.
    assert len(read) == len(set(read)) == 50
    assert part.sampled
    assert "A sample of" in part.how
    assert part.n_contexts == whole.n_contexts
    assert part.hits[0].latent in list(exact)[:3]
    for hit in part.hits[:5]:
        if hit.why == "context" and hit.latent in exact:
            assert hit.share == pytest.approx(exact[hit.latent].share, rel=0.5)


def test_contexts_read_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    db = LatentsDB(make_db(tmp_path, n_sequences=150, length=60, seed=4))
    n = occurrences(db, ["river"]).n_contexts
    monkeypatch.setattr(places, "MOST_KEPT", 30)
    kept = occurrences(db, ["river"])
    assert len(kept.found) == 30
    assert kept.n_contexts == pytest.approx(n, rel=0.3)
    monkeypatch.setattr(places, "MOST_READ", 40)
    for words in (["riv"], ["iv"], ["ver"], ["e"]):
        inside = occurrences(db, words)
        assert inside.n_read <= 40
        assert not inside.whole
        assert inside.found
    assert "inside of words" in search(db, "riv").how


def test_words_that_are_everywhere_are_looked_for_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More contexts have all of the words than are read, and few have them one after the other."""
    db = LatentsDB(make_db(tmp_path, n_sequences=150, length=60, seed=4))
    exact = {each.context for each in occurrences(db, ["river", "bridge"]).found}
    assert exact
    monkeypatch.setattr(places, "MOST_READ", 20)
    assert {each.context for each in occurrences(db, ["river", "bridge"]).found} == exact


def test_rows_of_no_text_have_no_words(tmp_path: Path) -> None:
    db = create(tmp_path / "latents.db")
    db.execute("INSERT INTO meta VALUES ('n_latents', '5')")
    source: Any = SimpleNamespace(folder=SimpleNamespace(kind="images", item=str))
    write_sequences(db, spool_of([4, 4], first=0), source, None)
    finish(db)
    found = search(LatentsDB(tmp_path / "latents.db"), "bridge")
    assert (found.hits, found.matches, found.how) == ([], [], "No context holds “bridge”.")


def test_searching_needs_no_torch() -> None:
    code = "import sys, saefast.latents.search; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
