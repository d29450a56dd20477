"""The table of telling latents from a harvest, and what is written of it: the page, the Markdown and the pictures."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from latents_db import make_db

from saefast.analysis.feature_table import Feature, FeatureTable, Snippet, TokenShare, make_table
from saefast.analysis.plots import draw_curves, draw_density, draw_features
from saefast.analysis.report import to_html, to_markdown, write_features
from saefast.errors import InputError
from saefast.latents.database import LatentsDB

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_table_is_what_the_database_holds(tmp_path: Path) -> None:
    db = LatentsDB(make_db(tmp_path))
    found = make_table(db, [7, 3], contexts=2)
    assert [feature.latent for feature in found.features] == [7, 3]
    for feature in found.features:
        facts = db.latent(feature.latent)
        assert (feature.n_fired, feature.max_act, feature.density) == (facts.n_fired, facts.max_act, facts.density)
        assert [t.token for t in feature.tokens] == [t.token for t in db.tokens_of(feature.latent) if t.own]
        assert len(feature.snippets) == 2
        for snippet, example in zip(feature.snippets, db.examples(feature.latent, 0), strict=False):
            assert snippet.texts == example.context.pieces
            assert snippet.acts[snippet.peak] == max(snippet.acts) == pytest.approx(example.act)
    assert "40 latents" in found.about


def table() -> FeatureTable:
    nasty = [" a", "|b", " <script>", " $x_1$", " *done*", " `end`"]
    features = [
        Feature(
            latent=7 + i,
            score=1.5,
            density=0.004,
            n_fired=120,
            max_act=3.0,
            tokens=[
                TokenShare(1, "raise", 0.6, 0.9),
                TokenShare(2, "<error>", 0.2, 1.0),
                TokenShare(3, "raised", 0.1, 1.0),
            ],
            snippets=[Snippet(nasty, [0, 0.5, 3.0, 0, 1.0, 0], 2), Snippet([" y"] * 30, [0.0] * 29 + [2.5], 29)],
        )
        for i in range(3)
    ]
    return FeatureTable(features, "How they were chosen.")


class Checker(HTMLParser):
    """Collects what a browser would fetch, and whether tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.contexts: list[str] = []
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
            self.places.append(dict(attrs).get("class") or tag)
        if ("class", "context") in attrs:
            self.contexts.append("")
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.places.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if "context" in self.places and "em" not in self.places:
            self.contexts[-1] += data


def test_the_page_is_self_contained_and_escaped() -> None:
    page = to_html(table(), "Title & more")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.fetched == []
    assert not re.search(r"https?:|url\(|@import|<script", page)
    assert "a|b <script> $x_1$ *done* `end`" in checker.text
    assert "raise · <error>" in checker.text
    # White space shows in a context: there is what the tokens have, and no more.
    assert checker.contexts == ["".join(s.texts) for feature in table().features for s in feature.snippets]
    assert page.count("rgba(255, 159, 28, 0.90)") == 3  # the strongest firing of each latent, at full shade


def test_markdown_rows_stay_rows() -> None:
    lines = to_markdown(table(), "Title").splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| latent")]
    assert len(rows) == 3
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)
    assert "**&lt;script&gt;**" in rows[0]


def curves(n: int = 30) -> list[dict[str, float]]:
    return [
        {
            "step": s,
            "tokens": 100 * s,
            "losses/overall_loss": 1 / s,
            "fvu": 1 / s,
            "dead_share": 0.0,
            "heldout/fvu": 1.1 / s,
        }
        for s in range(1, n)
    ]


def test_pictures_are_written(tmp_path: Path) -> None:
    draw_curves(curves(), tmp_path / "a.png", "title")
    draw_curves(
        [{"step": 1, "tokens": 5, "losses/overall_loss": 0.0, "fvu": 0.5, "dead_share": 0.0}], tmp_path / "b.png"
    )
    draw_density(torch.tensor([0, 1, 5, 900]), 1000, tmp_path / "c.png")
    draw_density(torch.zeros(4, dtype=torch.int64), 1000, tmp_path / "d.png")
    draw_features(table(), tmp_path / "e.png", "title")
    written = sorted(tmp_path.iterdir())
    assert [path.name for path in written] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
    assert all(path.read_bytes().startswith(PNG) and path.stat().st_size > 3000 for path in written)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'saefast\[demo\]'"):
        draw_curves(curves(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_two_pages_of_features(tmp_path: Path) -> None:
    written = write_features(tmp_path, table(), "Title")
    assert [path.name for path in written] == ["features.html", "features.md"]
    assert all(path.is_file() for path in written)
