"""Pages that need no server: what they hold is text, each stands alone, and their numbers are those of latents.db."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from latents_db import make_db
from odd_latents import HOSTILE, attack, written

from saefast.analysis.page import (
    INDEX,
    about,
    pieces,
    shown,
    summary,
    to_html,
    to_markdown,
    write_features,
    write_page,
)
from saefast.errors import InputError
from saefast.latents.database import Context, Example, LatentsDB
from saefast.readable import visible


class Page(HTMLParser):
    """What a browser makes of a page: its tags, what it would fetch and follow, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.links: list[str] = []
        self.contexts: list[str] = []
        self.acts: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag not in ("meta", "input", "img"):
            self.open.append(f"{tag} {named.get('class') or ''}")
        if named.get("class") == "text":
            self.contexts.append("")
        if "href" in named:
            self.links.append(named["href"] or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split(" ")[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1].split(" ")[0] in ("script", "style"):
            return
        self.text += data
        if "div text" in self.open:
            self.contexts[-1] += data
            if self.open[-1].startswith("span s"):
                self.acts.append((self.open[-1].removeprefix("span "), dict(self.tags[-1][1])["title"] or "", data))


def check_alone(page: Page) -> None:
    """Nothing is fetched or run but the style and the script whose digests the policy names."""
    (policy,) = (named["content"] or "" for tag, named in page.tags if named.get("http-equiv"))
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.source, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in page.tags].count("style") == 1
    for tag, named in page.tags:
        assert not any(name.startswith("on") or name in ("style", "src", "srcset", "action") for name in named), tag
    assert all(
        re.fullmatch(r"(latents/)?\d+\.html|\.\./index\.html|data:image/[a-z]+;base64,.*", x) for x in page.links
    )
    assert not re.search(r"https?://|@import|url\((?!#mask-)", page.source)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_db(tmp_path, n_latents=60, n_sequences=30)


def test_nothing_of_the_data_is_markup(path: Path, tmp_path: Path) -> None:
    attack(path)
    db = LatentsDB(path)
    write_page(db, tmp_path / "out", range(60), HOSTILE)
    features = [shown(db, latent) for latent in db.latents(range(60))]
    (tmp_path / "few.html").write_text(to_html(db, features, HOSTILE), encoding="utf-8")
    files = [*(tmp_path / "out").rglob("*.html"), tmp_path / "few.html"]
    assert len(files) == 62
    for file in files:
        page = Page(file.read_text(encoding="utf-8"))
        check_alone(page)
        assert HOSTILE in page.text
        assert not {"img", "iframe", "object"} & {tag for tag, _ in page.tags}
    latent = next(one for one in features if one.strongest)
    page = Page((tmp_path / "out" / "latents" / f"{latent.latent.latent}.html").read_text(encoding="utf-8"))
    # White space shows in a context: within it there is what its pieces have, and no more.
    expected = [
        "".join(visible(piece, lines=True) for piece in e.context.pieces) for g in latent.groups for e in g.examples
    ]
    assert [text.strip() for text in page.contexts] == [text.strip() for text in expected]


def test_a_latents_page_has_its_examples_and_numbers(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    write_page(db, tmp_path / "out", range(60))
    for latent in db.latents(range(60)):
        page = Page((tmp_path / "out" / "latents" / f"{latent.latent}.html").read_text(encoding="utf-8"))
        check_alone(page)
        examples = db.examples(latent.latent)
        assert page.contexts == ["".join(e.context.pieces).strip() for e in examples]
        fired = [
            (float(act), piece)
            for e in examples
            for act, piece in zip(e.acts, e.context.pieces, strict=True)
            if act > 0
        ]
        assert len(page.acts) == len(fired)
        for (shade, title, text), (act, piece) in zip(page.acts, fired, strict=True):
            assert text == piece.strip()
            assert float(title) == pytest.approx(act, rel=0.006, abs=5e-4)
            assert int(shade.split()[0][1:]) == int(np.ceil(20 * act / latent.max_act - 1e-5))
        for word in (f"{latent.n_fired:,} times", f"latent {latent.latent}"):
            assert word in page.text
        heights = [float(named["height"] or 0) for tag, named in page.tags if tag == "rect"]
        counts = db.histogram(latent.latent)
        assert len(heights) == (counts > 0).sum()
        assert heights == [pytest.approx(np.log1p(n) / np.log1p(counts.max()), abs=6e-4) for n in counts if n]


def test_the_index_leads_to_every_latent_and_they_to_each_other(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    chosen = [7, 3, 50, 7, 0]
    assert write_page(db, tmp_path / "out", chosen) == 4
    files = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.html"))
    assert files == [INDEX, "latents/0.html", "latents/3.html", "latents/50.html", "latents/7.html"]
    index = Page((tmp_path / "out" / INDEX).read_text(encoding="utf-8"))
    check_alone(index)
    assert index.links == [f"latents/{latent}.html" for latent in (7, 3, 50, 0)]
    for number, latent in enumerate([7, 3, 50, 0]):
        page = Page((tmp_path / "out" / "latents" / f"{latent}.html").read_text(encoding="utf-8"))
        walked = [f"{other}.html" for other in [7, 3, 50, 0][max(number - 1, 0) : number + 2] if other != latent]
        related = [*db.neighbours(latent), *db.cofiring(latent)]
        linked = [f"{other.latent}.html" for other in related if other.latent in chosen]
        assert page.links == ["../index.html", *walked, *linked]
        # Those without a page are named.
        assert all(str(other.latent) in page.text for other in related)


def test_every_latent_is_there_or_none(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    for latents, message in (([], "no latent is asked for"), ([1, 60], "there is no latent 60: expected 0 to 59")):
        with pytest.raises(InputError, match=message):
            write_page(db, tmp_path / "out", latents)
    assert not (tmp_path / "out").exists()


def test_a_latent_without_name_tokens_or_contexts_has_a_page(path: Path, tmp_path: Path) -> None:
    with written(path) as raw:
        raw.execute("UPDATE latents SET title = '', score = NULL WHERE latent = 2")
        raw.execute("DELETE FROM examples WHERE latent = 2")
        raw.execute("DELETE FROM latent_tokens WHERE latent = 2")
    db = LatentsDB(path)
    write_page(db, tmp_path / "out", [0, 2])
    for latent in (0, 2):
        page = Page((tmp_path / "out" / "latents" / f"{latent}.html").read_text(encoding="utf-8"))
        assert "No context is known" in page.text
        assert f"latent {latent}" in page.text
    few = [shown(db, latent) for latent in db.latents([0, 2])]
    check_alone(Page(to_html(db, few, "t")))
    assert len(to_markdown(few, "t", "").splitlines()) == 8
    assert len(summary(few).splitlines()) == 2


def test_a_page_of_a_few_shows_the_strongest_contexts(path: Path, tmp_path: Path) -> None:
    db = LatentsDB(path)
    few = [shown(db, latent) for latent in db.latents([5, 9])]
    files = write_features(tmp_path, db, few, "Title")
    assert [file.name for file in files] == ["features.html", "features.md"]
    page = Page(files[0].read_text(encoding="utf-8"))
    check_alone(page)
    assert page.links == []
    strongest = [e for one in few for e in db.examples(one.latent.latent, 0)[:6]]
    assert page.contexts == ["".join(e.context.pieces).strip() for e in strongest]
    assert "2 of 60 latents (L0 = 4.0), judged on 900 tokens of made-up rows" in page.text
    assert "The score is made up." in about(db, 2)


def test_markdown_rows_stay_rows(path: Path) -> None:
    attack(path)
    db = LatentsDB(path)
    few = [shown(db, latent) for latent in db.latents(range(60)) if latent.n_fired]
    lines = to_markdown(few, "Title", "").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| latent")]
    assert len(rows) == len(few)
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5
        assert not re.search(r"<(?!br>)", row)
        assert "\0" not in row
    terminal = summary(few)
    assert len(terminal.splitlines()) == len(few)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e]", terminal)


def test_white_space_that_a_latent_fires_on_is_shaded() -> None:
    context = Context(1, 0, 0, 3, [" a", "  ", "\n"])
    found = pieces(Example(0, 2.0, 1, np.array([1, 2, 3], np.float32), context))
    assert [(piece.space, piece.text, piece.act) for piece in found] == [("", "a", 1), ("", "  ", 2), ("", "\n", 3)]


def test_white_space_around_a_context_is_left_out() -> None:
    context = Context(1, 0, 0, 6, ["\n\n", "  ", " a", "\n  b", " c \n", "\n"])
    acts = np.array([0, 0, 0, 2, 0, 0], np.float32)
    found = pieces(Example(0, 2.0, 3, acts, context))
    assert [(piece.space, piece.text, piece.peak) for piece in found] == [
        ("", "a", False), ("\n  ", "b", True), (" ", "c", False)
    ]  # fmt: skip
    assert pieces(Example(0, 2.0, 0, acts * 0, context._replace(pieces=[" "] * 6))) == []


@pytest.mark.parametrize("first", [0, 1, 4])
def test_an_image_is_shown_with_its_patches(path: Path, tmp_path: Path, first: int) -> None:
    with written(path) as raw:
        raw.execute("INSERT INTO images SELECT sequence, 'image/png', x'89504e47' FROM sequences")
        # Positions up to `first` are before the patches, those from 3 · 8 on after them.
        raw.execute("INSERT INTO meta VALUES ('grid', ?)", (json.dumps({"rows": 3, "columns": 8, "first": first}),))
    db = LatentsDB(path)
    write_page(db, tmp_path / "out", [1])
    page = Page((tmp_path / "out" / "latents" / "1.html").read_text(encoding="utf-8"))
    check_alone(page)
    assert page.contexts == []
    images = [named for tag, named in page.tags if tag == "image"]
    examples = db.examples(1)
    assert len(images) == len(examples) > 5
    assert {(named["width"], named["height"]) for named in images} == {("8", "3")}
    data = base64.b64encode(b"\x89PNG").decode()
    assert {named["href"] for named in images} == {f"data:image/png;base64,{data}"}
    most = db.latent(1).max_act
    expected = [
        (str((p - first) % 8), str((p - first) // 8), float(act) / most)
        for e in examples
        for p, act in zip(range(e.context.start, e.context.stop), e.acts, strict=True)
        if act > 0 and 0 <= p - first < 24
    ]
    assert len(expected) > 20
    patches = [named for tag, named in page.tags if tag == "rect" and named.get("class") == "patch"]
    assert [(named["x"], named["y"]) for named in patches] == [(x, y) for x, y, _ in expected]
    # The stronger it fires on a patch, the less of the image is darkened there.
    lit = [named for tag, named in page.tags if tag == "rect" and "fill-opacity" in named]
    assert [(named["x"], named["y"]) for named in lit] == [(x, y) for x, y, _ in expected]
    assert [float(named["fill-opacity"] or 0) for named in lit] == [
        pytest.approx(0.2 + 0.8 * share, abs=6e-4) for _, _, share in expected
    ]
    masks = [named["id"] for tag, named in page.tags if tag == "mask"]
    assert len(set(masks)) == len(masks) == len(images)
    assert [named["mask"] for _, named in page.tags if "mask" in named] == [f"url(#{mask})" for mask in masks]


def test_an_image_without_a_grid_is_shown_alone(path: Path, tmp_path: Path) -> None:
    with written(path) as raw:
        raw.execute("INSERT INTO images SELECT sequence, 'image/webp', x'00' FROM sequences WHERE sequence % 2")
        raw.execute("INSERT INTO meta VALUES ('grid', 'null')")
    db = LatentsDB(path)
    write_page(db, tmp_path / "out", [1])
    page = Page((tmp_path / "out" / "latents" / "1.html").read_text(encoding="utf-8"))
    examples = db.examples(1)
    images = [named for tag, named in page.tags if tag == "img"]
    assert len(images) == sum(e.context.sequence % 2 for e in examples) > 0
    assert {named["src"] for named in images} == {"data:image/webp;base64,AA=="}
    # One that is not kept is a text, as it is.
    assert page.contexts == ["".join(e.context.pieces).strip() for e in examples if not e.context.sequence % 2]


def test_rows_without_text_or_picture_are_named(path: Path, tmp_path: Path) -> None:
    with written(path) as raw:
        raw.execute("UPDATE contexts SET text = '', lengths = zeroblob(length(lengths))")
        raw.execute("UPDATE sequences SET name = '<i>cat</i>.png' WHERE sequence % 2")
    db = LatentsDB(path)
    write_page(db, tmp_path / "out", [5])
    page = Page((tmp_path / "out" / "latents" / "5.html").read_text(encoding="utf-8"))
    check_alone(page)
    for example in db.examples(5):
        sequence = example.context.sequence
        place = f"sequence {sequence + 100}, position {example.context.start + example.peak}"
        assert ("<i>cat</i>.png" if sequence % 2 else place) in page.text
