"""A latent's page: every number on it is the file's, its label is written, and no text of the data becomes markup."""

import html
import re
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
from explorer_client import HOME, client, explorer_of, from_our_page, page, stranger
from starlette.testclient import TestClient

from saefast.explorer.guard import FORM_KEY
from saefast.explorer.latent import HEIGHT, WIDTH, decades, histogram
from saefast.explorer.shading import marked_spans, shaded, shares
from saefast.explorer.state import Explorer
from saefast.latents.database import LONGEST_LABEL, Context, Example
from saefast.latents.numbers import act, share
from saefast.latents.schema import BINS, INTERVALS

N = 60


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    return explorer_of(tmp_path_factory.mktemp("run"), N, n_sequences=200)


@pytest.fixture(scope="module")
def visitor(explorer: Explorer) -> TestClient:
    return client(explorer)


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def test_contexts_are_shaded_by_the_files_activations(explorer: Explorer, visitor: TestClient) -> None:
    latent, examples = explorer.db.latent(7), explorer.db.examples(7)
    texts = re.findall(r'<div class="text" dir="auto">(.*?)</div>', page(visitor, "/latent/7"), flags=re.DOTALL)
    assert len(texts) == len(examples) > 20
    for text, example in zip(texts, examples, strict=True):
        assert plain(text) == "".join(example.context.pieces)
        spans = re.findall(r'<span class="s(\d+)( peak)?" title="([^"]+)">([^<]*)</span>', text)
        on = [i for i, value in enumerate(example.acts.tolist()) if value > 0]
        assert [words.strip() for *_, words in spans] == [example.context.pieces[i].strip() for i in on]
        assert [title for _, _, title, _ in spans] == [act(float(example.acts[i])) for i in on]
        assert [i for i, (_, peak, *_) in zip(on, spans, strict=True) if peak] == [example.peak]
        steps = [int(np.ceil(20 * example.acts[i] / latent.max_act)) for i in on]
        assert [int(step) for step, *_ in spans] == steps


def test_parts_say_their_interval_and_its_share_of_firings(explorer: Explorer, visitor: TestClient) -> None:
    text, latent = page(visitor, "/latent/7"), explorer.db.latent(7)
    heads = [plain(head) for head in re.findall(r"<h2>(.*?)</h2>", text.split("<aside")[0])]
    assert heads[0] == "Strongest 20 contexts"
    assert len(heads) == len({example.part for example in explorer.db.examples(7)}) > 2
    counts, step = explorer.db.histogram(7), latent.max_act / INTERVALS
    for head in heads[1:]:
        low, high = (float(number) for number in re.findall(r"[\d.]+", head)[:2])
        part = INTERVALS - round(low / step)
        assert high == pytest.approx(low + step, abs=0.01)
        fired = counts[(INTERVALS - part) * 10 : (INTERVALS - part + 1) * 10].sum()
        assert f"{share(float(fired / latent.n_fired))} of firings" in head


def test_the_text_around_is_shown_where_it_is_asked_for(explorer: Explorer, visitor: TestClient) -> None:
    text = page(visitor, "/latent/7?wide=1&sort=density&at=3")
    texts = re.findall(r'<div class="text" dir="auto">(.*?)</div>', text, flags=re.DOTALL)
    for shown, example in zip(texts, explorer.db.examples(7), strict=True):
        beside = explorer.db.contexts_of(example.context.sequence)
        place = [context.context for context in beside].index(example.context.context)
        near = beside[max(place - 1, 0) : place + 2]
        assert plain(shown) == "".join("".join(context.pieces) for context in near)
        # A latent that fires beside its context is shaded there too, and its peak is marked once.
        codes = explorer.db.codes(example.context.sequence)
        positions, _ = codes.of(7)
        inside = sum(near[0].start <= position < near[-1].stop for position in positions.tolist())
        assert len(re.findall(r'class="s[1-9]\d*', shown)) == inside
        assert shown.count(" peak") == 1
    assert 'href="?sort=density&amp;at=3"' in text
    assert 'href="?wide=1"' in page(visitor, "/latent/7")


def test_what_the_side_shows_is_the_files(explorer: Explorer, visitor: TestClient) -> None:
    text = page(visitor, "/latent/7")
    for token in explorer.db.tokens_of(7):
        row = next(row for row in re.findall(r"<tr.*?</tr>", text) if f">{token.text}<" in row and "<rect" in row)
        assert share(token.share) in row
        assert share(token.covered) in row
        assert ('class="own"' in row) is token.own
    for relatives in (explorer.db.neighbours(7), explorer.db.cofiring(7)):
        for other in relatives:
            assert f'<a href="/latent/{other.latent}"><span class="id">{other.latent}</span>' in text
    raised, lowered = explorer.db.logit_weights(7)
    assert f'>{raised[0].text}</span></td><td class="number">+{raised[0].value:.2f}<' in text
    assert f'>{lowered[0].text}</span></td><td class="number">−{-lowered[0].value:.2f}<' in text
    latent = explorer.db.latent(7)
    command = f"saefast steer made-up {explorer.run} --set 7={latent.max_act:.3g} --prompt 'I think'"
    assert html.unescape(text).count(command) == 2
    assert text.count('data-copy="7"') == 1


def test_the_histogram_is_the_files(explorer: Explorer) -> None:
    counts = explorer.db.histogram(7)
    bars = histogram(counts, explorer.db.latent(7).max_act)
    places = [round(bar.x / (WIDTH / BINS)) for bar in bars]
    assert places == np.flatnonzero(counts).tolist()
    for bar, place in zip(bars, places, strict=True):
        assert f": {counts[place]:,} firings" in bar.title
        assert bar.height == pytest.approx(HEIGHT * np.log1p(counts[place]) / np.log1p(counts.max()))
        assert bar.y + bar.height == pytest.approx(HEIGHT)
    assert decades(np.zeros(BINS, np.int32)) == []
    assert [words for _, words in decades(np.full(BINS, 12_345, np.int32))] == ["1", "100", "10,000"]
    for y, words in decades(np.full(BINS, 12_345, np.int32)):
        assert y == pytest.approx(HEIGHT * (1 - np.log1p(int(words.replace(",", ""))) / np.log1p(12_345)))


def test_shares_are_of_all_firings_the_highest_interval_first() -> None:
    counts = np.zeros(BINS, np.int32)
    counts[[0, 9, 10, 49]] = [1, 2, 3, 4]
    assert shares(counts, INTERVALS) == [0.4, 0.0, 0.0, 0.3, 0.3]
    assert shares(np.zeros(BINS, np.int32), INTERVALS) == [0.0] * INTERVALS


def test_a_dead_latent_says_so(visitor: TestClient) -> None:
    text = page(visitor, "/latent/0")
    assert "It fired on none of 6,000 tokens." in text
    assert "A dead latent has no contexts." in text
    assert "saefast steer" not in text


@pytest.mark.parametrize("number", [N, 10**18, 10**30])
def test_a_latent_that_is_not_there_is_said(visitor: TestClient, number: int) -> None:
    answer = visitor.get(f"/latent/{number}")
    assert answer.status_code == 404
    assert f"There is no latent {number}: expected 0 to {N - 1}." in answer.text


@pytest.mark.parametrize("address", ["/latent/-1", "/latent/x", "/latent/1.5", "/latent/", "/latent/1/", "/latent/%00"])
def test_no_number_is_no_latent(visitor: TestClient, address: str) -> None:
    assert visitor.get(address).status_code in (307, 404)


@pytest.mark.parametrize("query", ["at=-1", "at=x", "at=NaN", "at=" + "9" * 30, "at=1&sort=x", "at=1&page=x"])
def test_an_odd_place_is_refused_in_words(visitor: TestClient, query: str) -> None:
    answer = visitor.get(f"/latent/7?{query}")
    assert answer.status_code == 400
    assert "expected" in answer.text


def test_the_way_on_is_the_order_one_came_from(explorer: Explorer, visitor: TestClient) -> None:
    expected, total = explorer.db.page("max_act", limit=N, dead=False)
    first = re.search(r'href="(/latent/\d+\?[^"]+)"', page(visitor, "/?sort=max_act&show=alive"))
    assert first is not None
    address, walked = html.unescape(first[1]), []
    while address:
        text = page(visitor, address)
        walked.append(int(address.split("/")[2].split("?")[0]))
        assert f"{len(walked)} of {total} by max activation" in text
        forward = re.search(r'<a rel="next"[^>]* href="([^"]+)"', text)
        address = html.unescape(forward[1]) if forward else ""
        back = re.search(r'<a rel="prev"[^>]* href="/latent/(\d+)', text)
        assert [int(back[1])] == walked[-2:-1] if back else len(walked) == 1
    assert walked == [row.latent for row in expected]
    assert 'href="/?sort=max_act&amp;show=alive&amp;page=2">← All' in page(
        visitor, f"/latent/{walked[-1]}?sort=max_act&show=alive&at={total - 1}"
    )


def test_a_place_that_has_moved_gives_way_to_the_order_of_numbers(visitor: TestClient) -> None:
    for at in (0, 5, N + 5):
        assert f"8 of {N} by number" in page(visitor, f"/latent/7?sort=latent&order=reverse&at={at}")


# Labels


def label_of(explorer: Explorer, latent: int) -> str:
    found = explorer.db.label_of(latent)
    return found[0] if found else ""


def test_a_script_writes_a_label_and_takes_it_away(explorer: Explorer, visitor: TestClient) -> None:
    answer = visitor.post("/latent/11/label", data={"text": "  a\n bridge <b>  "}, headers=from_our_page(explorer))
    assert answer.json()["text"] == "a bridge <b>" == label_of(explorer, 11)
    assert re.fullmatch(r"Written \d{4}-\d\d-\d\d", answer.json()["about"])
    assert 'value="a bridge &lt;b&gt;"' in page(visitor, "/latent/11")
    assert "a bridge &lt;b&gt;</span>" in page(visitor, "/?show=labelled")
    visitor.post("/latent/11/label", data={"text": ""}, headers=from_our_page(explorer))
    assert label_of(explorer, 11) == ""
    assert "No latent is like that." in page(visitor, "/?show=labelled")


def test_a_form_without_scripts_writes_one_and_comes_back(explorer: Explorer, visitor: TestClient) -> None:
    key = re.search(r'name="key" value="([^"]+)"', page(visitor, "/latent/12"))
    assert key is not None
    answer = visitor.post("/latent/12/label", data={"text": "twelve", FORM_KEY: key[1]}, headers={"Origin": HOME})
    assert (answer.status_code, answer.headers["location"]) == (303, "/latent/12")
    assert label_of(explorer, 12) == "twelve"
    explorer.db.write_label(12, "")


def test_nothing_else_writes(explorer: Explorer, visitor: TestClient) -> None:
    ours = from_our_page(explorer)
    tries = [
        visitor.get("/latent/13/label?text=x", headers=ours),
        visitor.get(f"/latent/13?text=x&key={explorer.form_key}", headers=ours),
        visitor.post("/latent/13", data={"text": "x"}, headers=ours),
        visitor.post("/latent/13/label", data={"text": "x"}, headers=ours | {"Origin": "http://evil.example"}),
        visitor.post("/latent/13/label", data={"text": "x"}, headers=ours | {"X-Saefast-Key": "x"}),
        visitor.post("/latent/13/label", data={"text": "x"}, headers={"Origin": HOME}),
        visitor.put("/latent/13/label", data={"text": "x"}, headers=ours),
        stranger(explorer).post("/latent/13/label", data={"text": "x"}, headers=ours),
    ]
    assert [answer.status_code for answer in tries] == [405, 200, 405, 403, 403, 403, 405, 403]
    assert label_of(explorer, 13) == ""


def test_a_label_that_cannot_be_kept_is_refused_in_words(explorer: Explorer, visitor: TestClient) -> None:
    ours = from_our_page(explorer)
    answer = visitor.post("/latent/14/label", data={"text": "x" * (LONGEST_LABEL + 1)}, headers=ours)
    assert answer.status_code == 400
    assert f"expected at most {LONGEST_LABEL}" in answer.json()["error"]
    assert visitor.post(f"/latent/{N}/label", data={"text": "x"}, headers=ours).status_code == 404
    assert visitor.post(f"/latent/{10**30}/label", data={"text": "x"}, headers=ours).status_code == 404


def test_a_label_for_other_weights_says_so(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path)
    explorer.db.write_label(5, "a bridge")
    with closing(sqlite3.connect(explorer.db.path)) as db, db:
        db.execute("UPDATE labels SET sae = 'older'")
    assert "for other weights of this run" in page(client(explorer), "/latent/5")


# Text of the data

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>{{'a'*7}}"


class Tags(HTMLParser):
    """What elements and attributes a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs} | {(tag, "")}
        for name, value in attrs:
            assert name not in ("style",)
            assert not name.startswith("on")
            assert not (name in ("href", "src", "action") and not (value or "").startswith(("/", "?", "#")))
        if tag == "script":
            assert dict(attrs).get("src")


@pytest.mark.parametrize(
    "address", ["/", "/latent/5", "/latent/5?wide=1", "/?q=alert", "/?q=" + ATTACK, "/?sort=" + ATTACK]
)
def test_no_text_of_the_data_becomes_markup(tmp_path: Path, address: str) -> None:
    explorer = explorer_of(tmp_path, score=ATTACK, logits={"what": ATTACK, "why": ATTACK}, clusters=[ATTACK])
    with closing(sqlite3.connect(explorer.db.path)) as db, db:
        db.execute("UPDATE tokens SET text = ?", (ATTACK,))
        db.execute("UPDATE latents SET title = ?", (ATTACK,))
        db.execute("INSERT INTO labels VALUES (5, ?, ?, ?)", (ATTACK, ATTACK, "made-up"))
        db.execute(
            "UPDATE meta SET value = json_set(value, '$.model', ?, '$.hook', ?) WHERE name = 'sae'", (ATTACK,) * 2
        )
        db.execute("UPDATE meta SET value = json_set(value, '$.data', ?) WHERE name = 'rows'", (ATTACK,))
        lengths = np.array([len(ATTACK)] * 10, "<u2").tobytes()
        db.execute("UPDATE contexts SET text = ?, lengths = ?", (ATTACK * 10, lengths))
        db.execute("INSERT INTO context_search (context_search) VALUES ('rebuild')")
    answer = client(Explorer.of_run(tmp_path)).get(address)
    assert answer.status_code in (200, 400)
    assert html.escape("<script>alert(1)") in answer.text
    for piece in ("<script>alert", "<img", "<b>{{", "aaaaaaa"):
        assert piece not in answer.text
    tags = Tags()
    tags.feed(answer.text)


def test_texts_of_every_kind_are_shown_whole(tmp_path: Path) -> None:
    """Right to left, control characters, a token of 5,000 characters, marks that join."""
    explorer = explorer_of(tmp_path)
    pieces = [
        "שלום ",
        "\u202eabc",
        "\x00\x1b[31m",
        "x" * 5000,
        "👩\u200d👩\u200d👧",
        "e\u0301",
        "\n",
        "\t",
        "&amp;",
        " ",
    ]
    with closing(sqlite3.connect(explorer.db.path)) as db, db:
        lengths = np.array([len(piece) for piece in pieces], "<u2").tobytes()
        db.execute("UPDATE contexts SET text = ?, lengths = ?", ("".join(pieces), lengths))
    text = page(client(Explorer.of_run(tmp_path)), "/latent/5")
    shown = [plain(found) for found in re.findall(r'<div class="text" dir="auto">(.*?)</div>', text, flags=re.DOTALL)]
    assert set(shown) == {"שלום \\u202eabc␀␛[31m" + "x" * 5000 + "👩\u200d👩\u200d👧e\u0301↵⇥&amp; "}


def test_runs_of_text_join_to_the_text() -> None:
    context = Context(1, 0, 0, 6, [" a", " b", "", "c", "   ", " d"])
    acts = np.array([0, 2, 1, 0, 4, 0], np.float32)
    runs = shaded(Example(0, 4.0, 4, acts, context), 4.0)
    assert "".join(run.text for run in runs) == " a bc    d"
    assert [(run.text, run.css, run.title) for run in runs if run.css] == [
        ("b", "s10", "2.00"), ("", "s5", "1.00"), ("   ", "s20 peak", "4.00"),
    ]  # fmt: skip
    marked = marked_spans(context, [(3, 4), (0, 2), (1, 3)])
    assert [(run.text, run.css) for run in marked] == [
        (" ", ""), ("a b", "found"), ("", "found"), ("c", "found"), ("    d", ""),
    ]  # fmt: skip


def test_a_character_of_several_tokens_is_shaded_once() -> None:
    context = Context(0, 0, 0, 4, ["a", "", "🦊", "b"])
    runs = shaded(Example(0, 4.0, 1, np.array([0, 4, 1, 0], np.float32), context), 4.0)
    assert [run.text for run in runs] == ["a", "🦊", "b"]
    assert runs[1].css.endswith(" peak")
    assert runs[1].title == act(4.0)


def test_a_file_that_is_damaged_while_it_is_shown_is_told_in_words(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path, 400, n_sequences=100)
    whole = explorer.db.path.read_bytes()
    # All pages but the first few, in which the tables are declared.
    explorer.db.path.write_bytes(whole[: 8192 * 4] + b"\xff" * (len(whole) - 8192 * 4))
    visitor = client(explorer)
    for address in ("/", "/latent/399", "/?q=bridge"):
        answer = visitor.get(address)
        assert answer.status_code == 400, address
        assert "saefast features makes it anew" in html.unescape(answer.text)


def test_labels_of_many_at_once_are_all_kept(tmp_path: Path) -> None:
    explorer = explorer_of(tmp_path)
    visitor, ours = client(explorer), from_our_page(explorer)

    def write(latent: int) -> int:
        visitor.get(f"/latent/{latent}")
        return visitor.post(f"/latent/{latent}/label", data={"text": f"number {latent}"}, headers=ours).status_code

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(write, range(40))) == {200}
    assert [label_of(explorer, latent) for latent in range(40)] == [f"number {latent}" for latent in range(40)]
